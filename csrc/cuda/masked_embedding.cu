// masked_embedding for few rows: checks its arguments and launches a block a row.
#include <optional>

#include "masked_embedding_kernel.h"
#include "tensors.h"

namespace mlmfast::cuda {
namespace {

const char* const OP = "masked_embedding";

template <class T>
__global__ void __launch_bounds__(NORM_THREADS) masked_embedding_rows(MaskedEmbedding a) {
  extern __shared__ __align__(16) char memory[];
  masked_embedding_row<T>(a, blockIdx.x, memory);
}

// An id a row, or null.
const int64_t* check_ids(const char* name, const std::optional<Tensor>& ids, int64_t rows, const Tensor& beside) {
  if (!ids) return nullptr;
  check_ints(OP, name, *ids, ScalarType::Long, beside);
  STD_TORCH_CHECK(ids->size(0) == rows, OP, ": ", name, " must have an id a row");
  return ids->const_data_ptr<int64_t>();
}

}  // namespace

Tensor masked_embedding(const Tensor& token_ids, const Tensor& masked_rows, int64_t mask_token_id, const Tensor& words,
                        const std::optional<Tensor>& position_ids, const std::optional<Tensor>& positions,
                        const std::optional<Tensor>& token_types, const std::optional<Tensor>& types,
                        const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
                        const std::optional<Tensor>& copy_scale, const std::optional<Tensor>& cu_seqlens) {
  check_half(OP, words);
  STD_TORCH_CHECK(words.dim() == 2, OP, " takes words [V, e]");
  MaskedEmbedding a{};
  a.width = check_int(OP, "the width", words.size(1), 1, WIDEST_NORM), a.eps = static_cast<float>(eps);
  check_rows(OP, "words", words, a.width, words);
  STD_TORCH_CHECK(mask_token_id >= 0 && mask_token_id < words.size(0), OP, ": mask_token_id is no row of words");
  const int rows = check_int(OP, "rows", token_ids.size(0));
  a.token_ids = check_ids("token_ids", token_ids, rows, words);
  check_ints(OP, "masked_rows", masked_rows, ScalarType::Long, words);
  a.masked_rows = masked_rows.const_data_ptr<int64_t>(), a.masks = check_int(OP, "masked_rows", masked_rows.size(0));
  a.mask_token_id = mask_token_id;
  a.words = words.const_data_ptr(), a.words_row = words.stride(0);
  if (positions) {
    STD_TORCH_CHECK(position_ids.has_value(), OP, ": positions need position_ids");
    check_rows(OP, "positions", *positions, a.width, words);
    a.positions = positions->const_data_ptr(), a.positions_row = positions->stride(0);
    a.position_ids = check_ids("position_ids", position_ids, rows, words);
  }
  if (types) {
    check_rows(OP, "types", *types, a.width, words);
    a.types = types->const_data_ptr(), a.types_row = types->stride(0);
    a.token_types = check_ids("token_types", token_types, rows, words);
  }
  a.norm_weight = check_row(OP, "norm_weight", norm_weight, a.width, words);
  a.norm_bias = check_row(OP, "norm_bias", norm_bias, a.width, words);
  if (copy_scale) {
    STD_TORCH_CHECK(cu_seqlens.has_value(), OP, ": copy_scale needs cu_seqlens");
    check_ints(OP, "cu_seqlens", *cu_seqlens, ScalarType::Int, words);
    STD_TORCH_CHECK(copy_scale->scalar_type() == ScalarType::Float && copy_scale->dim() == 1 &&
                        copy_scale->is_contiguous() && copy_scale->is_cuda() &&
                        copy_scale->get_device_index() == words.get_device_index() &&
                        copy_scale->size(0) + 1 == cu_seqlens->size(0),
                    OP, ": copy_scale must be one float32 a copy, on the device of words");
    a.scales = copy_scale->const_data_ptr<float>(), a.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
    a.copies = check_int(OP, "copies", copy_scale->size(0));
  }
  Tensor out = torch::stable::new_empty(words, {token_ids.size(0), words.size(1)});
  if (rows == 0) return out;
  a.out = out.mutable_data_ptr();

  const torch::stable::accelerator::DeviceGuard guard(words.get_device_index());
  const auto kernel =
      words.scalar_type() == ScalarType::BFloat16 ? masked_embedding_rows<bfloat16> : masked_embedding_rows<float16>;
  kernel<<<rows, NORM_THREADS, row_bytes(a.width), current_stream(words)>>>(a);
  check(OP, cudaGetLastError());
  return out;
}

}  // namespace mlmfast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cuda, m) {
  m.def(
      "masked_embedding(Tensor token_ids, Tensor masked_rows, int mask_token_id, Tensor words, Tensor? position_ids, "
      "Tensor? positions, Tensor? token_types, Tensor? types, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "Tensor? copy_scale, Tensor? cu_seqlens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CUDA, m) {
  m.impl("masked_embedding", TORCH_BOX(&mlmfast::cuda::masked_embedding));
}
