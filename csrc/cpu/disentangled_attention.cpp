// disentangled_attention: the rows of the position tables that a batch can reach, packed once; then attention.
#include "attention.h"

#include <cstdlib>
#include <memory>
#include <vector>

namespace mlmfast {
namespace {

constexpr int64_t WIDEST = 1024;  // of a head, as pack_table has room for

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Panels = std::unique_ptr<void, Free>;

// Panels of the rows in `rows`, for every head.
Panels pack(const Kernels& use, const Tensor& table, const Tensor& q, const std::vector<int32_t>& rows) {
  const char* op = "disentangled_attention";
  const int type = dtype_index(op, q);
  check_same(op, "a position table", table, q);
  STD_TORCH_CHECK(table.dim() == 3 && table.size(1) == q.size(1) && table.size(2) == q.size(2) && table.stride(2) == 1,
                  op, ": position tables must be [rows, heads, width], contiguous in width");
  for (int32_t row : rows)
    STD_TORCH_CHECK(row >= 0 && row < table.size(0), op, ": buckets name a row that the position table lacks");
  const Table t{table.const_data_ptr(),  table.stride(0), table.stride(1), table.size(2), rows.data(),
                static_cast<int64_t>(rows.size())};
  const int64_t heads = table.size(1), panels = (t.count + 15) / 16;
  Panels memory(std::aligned_alloc(64, (heads * use.table_bytes[type](t.width, t.count) + 63) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  for_each(heads * panels, 16, [&](int64_t i) {
    use.pack_table[type](t, i / panels, i % panels, i % panels + 1, memory.get());
  });
  return memory;
}

}  // namespace

Tensor disentangled_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& pos_key,
                              const std::optional<Tensor>& pos_query, const Tensor& buckets, const Tensor& cu_seqlens_q,
                              const Tensor& cu_seqlens_k, int64_t max_seqlen_k,
                              const std::optional<Tensor>& q_positions, double scale) {
  const char* op = "disentangled_attention";
  check_ints(op, "buckets", buckets, ScalarType::Int);
  STD_TORCH_CHECK(buckets.size(0) % 2 == 1, op, ": buckets must reach as far to both sides");
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) <= WIDEST, op, ": heads are at most ", WIDEST, " wide");
  Tensor out = torch::stable::new_empty(q, q.sizes());
  if (q.size(0) == 0) return out;
  const Kernels& use = kernels();  // once: the panels are of these
  Attention a{};
  a.scale = static_cast<float>(scale);
  a.window = -1;
  reach(op, a, max_seqlen_k, q, q_positions);

  const int64_t longest = buckets.size(0) / 2;
  const int32_t* bucket = buckets.const_data_ptr<int32_t>();
  std::vector<int32_t> rising;  // table rows of the distances nearest .. farthest
  for (int64_t d = a.nearest; d <= a.farthest; ++d) rising.push_back(bucket[clamped(d, longest)]);
  const std::vector<int32_t> falling(rising.rbegin(), rising.rend());
  Panels key_panels, query_panels;
  if (pos_key) key_panels = pack(use, *pos_key, q, falling);
  if (pos_query) query_panels = pack(use, *pos_query, q, rising);
  a.key_panels = key_panels.get(), a.query_panels = query_panels.get();
  attend(op, use, a, q, k, v, cu_seqlens_q, cu_seqlens_k, q_positions, out);
  return out;
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def(
      "disentangled_attention(Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, Tensor buckets, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_k, Tensor? q_positions, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) {
  m.impl("disentangled_attention", TORCH_BOX(&mlmfast::disentangled_attention));
}
