// masked_embedding: puts the masks in, checks every id before it is an address, and hands out blocks of rows.
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace mlmfast {
namespace {

void check_ids(const char* name, const char* table, const int64_t* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < rows, "masked_embedding: ", name, "[", i, "] is ", ids[i], "; ", table,
                    " has rows 0 to ", rows - 1);
}

// The address of ids [T] that pick rows of a table.
const int64_t* ids_of(const char* name, const char* table_name, const std::optional<Tensor>& ids, const Tensor& table,
                      int64_t count) {
  STD_TORCH_CHECK(ids.has_value(), "masked_embedding: ", table_name, " needs ", name);
  check_ints("masked_embedding", name, *ids, ScalarType::Long);
  STD_TORCH_CHECK(ids->size(0) == count, "masked_embedding: ", name, " must have an id a row");
  const int64_t* address = ids->const_data_ptr<int64_t>();
  check_ids(name, table_name, address, count, table.size(0));
  return address;
}

// Each row's factor, from its copy's.
std::vector<float> scales_of(const Tensor& copy_scale, const std::optional<Tensor>& cu_seqlens, int64_t count) {
  const char* op = "masked_embedding";
  STD_TORCH_CHECK(cu_seqlens.has_value(), op, ": copy_scale needs cu_seqlens");
  check_ints(op, "cu_seqlens", *cu_seqlens, ScalarType::Int);
  STD_TORCH_CHECK(copy_scale.scalar_type() == ScalarType::Float && copy_scale.dim() == 1 && copy_scale.is_contiguous(),
                  op, ": copy_scale must be one contiguous row of float32");
  const int64_t copies = copy_scale.size(0);
  STD_TORCH_CHECK(cu_seqlens->size(0) == copies + 1, op, ": cu_seqlens must bound as many copies as copy_scale has");
  const int32_t* bound = cu_seqlens->const_data_ptr<int32_t>();
  const float* scale = copy_scale.const_data_ptr<float>();
  STD_TORCH_CHECK(bound[0] == 0 && bound[copies] == count, op, ": cu_seqlens must run from 0 to the number of rows");
  std::vector<float> scales(count);
  for (int64_t c = 0; c < copies; ++c) {
    STD_TORCH_CHECK(bound[c] <= bound[c + 1] && bound[c + 1] <= count, op, ": cu_seqlens is out of order");
    for (int64_t i = bound[c]; i < bound[c + 1]; ++i) scales[i] = scale[c];
  }
  return scales;
}

}  // namespace

Tensor masked_embedding(const Tensor& token_ids, const Tensor& masked_rows, int64_t mask_token_id, const Tensor& words,
                        const std::optional<Tensor>& position_ids, const std::optional<Tensor>& positions,
                        const std::optional<Tensor>& token_types, const std::optional<Tensor>& types,
                        const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
                        const std::optional<Tensor>& copy_scale, const std::optional<Tensor>& cu_seqlens) {
  const char* op = "masked_embedding";
  const int type = dtype_index(op, words);
  STD_TORCH_CHECK(words.dim() == 2, op, ": words must be [vocabulary, width]");
  check_table(op, "words", words, words);
  check_ints(op, "token_ids", token_ids, ScalarType::Long);
  check_ints(op, "masked_rows", masked_rows, ScalarType::Long);
  const int64_t rows = token_ids.size(0), masks = masked_rows.size(0);
  const int64_t* given = token_ids.const_data_ptr<int64_t>();
  const int64_t* masked = masked_rows.const_data_ptr<int64_t>();
  std::vector<int64_t> ids(given, given + rows);
  for (int64_t i = 0; i < masks; ++i) {
    STD_TORCH_CHECK(masked[i] >= 0 && masked[i] < rows, op, ": masked_rows[", i, "] is ", masked[i], "; there are ",
                    rows, " rows");
    ids[masked[i]] = mask_token_id;
  }
  check_ids("token_ids (masks put in)", "words", ids.data(), rows, words.size(0));

  MaskedEmbedding a{};
  a.token_ids = ids.data();
  a.words = words.const_data_ptr(), a.words_row = words.stride(0);
  if (positions) {
    check_table(op, "positions", *positions, words);
    a.positions = positions->const_data_ptr(), a.positions_row = positions->stride(0);
    a.position_ids = ids_of("position_ids", "positions", position_ids, *positions, rows);
  }
  if (types) {
    check_table(op, "types", *types, words);
    STD_TORCH_CHECK(types->size(0) > 0, op, ": types has no rows");
    a.types = types->const_data_ptr(), a.types_row = types->stride(0);
    if (token_types) a.token_types = ids_of("token_types", "types", token_types, *types, rows);
  }
  std::vector<float> scales;
  if (copy_scale) {
    scales = scales_of(*copy_scale, cu_seqlens, rows);
    a.scales = scales.data();
  }
  a.norm_weight = vector_of(op, "norm_weight", norm_weight, words);
  a.norm_bias = vector_of(op, "norm_bias", norm_bias, words);
  a.width = words.size(1);
  a.eps = static_cast<float>(eps);
  Tensor out = torch::stable::new_empty(words, {rows, a.width});
  a.out = out.mutable_data_ptr();
  const auto serve = kernels().masked_embedding[type];
  const int64_t some = rows_at_a_time(a.width);
  for_each((rows + some - 1) / some, 1, [&](int64_t i) {
    const int64_t first = i * some, last = first + some < rows ? first + some : rows;
    serve(a, first, last, reinterpret_cast<float*>(scratch(a.width * sizeof(float))));
  });
  return out;
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def(
      "masked_embedding(Tensor token_ids, Tensor masked_rows, int mask_token_id, Tensor words, Tensor? position_ids, "
      "Tensor? positions, Tensor? token_types, Tensor? types, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "Tensor? copy_scale, Tensor? cu_seqlens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) { m.impl("masked_embedding", TORCH_BOX(&mlmfast::masked_embedding)); }
