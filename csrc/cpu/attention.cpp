// attention: checks its arguments, cuts the work into items of one sequence and head, and hands them to torch's threads.
#include "attention.h"

#include <algorithm>
#include <vector>

namespace mlmfast {

// Keys and values are packed once an item, so an item has many queries; one long sequence still makes several.
constexpr int64_t QUERIES = 256;

void reach(const char* op, Attention& a, int64_t max_seqlen_k, const Tensor& q,
           const std::optional<Tensor>& q_positions) {
  STD_TORCH_CHECK(max_seqlen_k > 0, op, ": max_seqlen_k must be positive");
  a.longest = max_seqlen_k;
  a.nearest = 1 - max_seqlen_k, a.farthest = max_seqlen_k - 1;
  STD_TORCH_CHECK(!q_positions || q_positions->size(0) == q.size(0), op, ": q_positions must have a place a query");
  if (q_positions) {  // a few places, of a long sequence's end perhaps
    check_ints(op, "q_positions", *q_positions, ScalarType::Long);
    const int64_t* place = q_positions->const_data_ptr<int64_t>();
    const auto [least, greatest] = std::minmax_element(place, place + q_positions->size(0));
    STD_TORCH_CHECK(*least >= 0 && *greatest < max_seqlen_k, op, ": q_positions leaves its sequence");
    a.nearest = *least - (max_seqlen_k - 1), a.farthest = *greatest;
  }
}

void attend(const char* op, const Kernels& use, Attention a, const Tensor& q, const Tensor& k, const Tensor& v,
            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const std::optional<Tensor>& q_positions,
            const Tensor& out) {
  const int type = dtype_index(op, q);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, op, ": q, k and v must be [rows, heads, width]");
  check_same(op, "k", k, q);
  check_same(op, "v", v, q);
  for (int i = 1; i < 3; ++i)
    STD_TORCH_CHECK(k.size(i) == q.size(i) && v.size(i) == q.size(i), op, ": q, k and v must agree in heads and width");
  STD_TORCH_CHECK(k.size(0) == v.size(0), op, ": k and v must have as many rows");
  STD_TORCH_CHECK(q.stride(2) == 1 && k.stride(2) == 1 && v.stride(2) == 1, op, ": heads must be contiguous");
  check_ints(op, "cu_seqlens_q", cu_seqlens_q, ScalarType::Int);
  check_ints(op, "cu_seqlens_k", cu_seqlens_k, ScalarType::Int);
  if (q_positions) check_ints(op, "q_positions", *q_positions, ScalarType::Long);
  STD_TORCH_CHECK(cu_seqlens_q.size(0) == cu_seqlens_k.size(0), op, ": cu_seqlens_q and cu_seqlens_k must be as long");
  STD_TORCH_CHECK(!q_positions || q_positions->size(0) == q.size(0), op, ": q_positions must have a place a query");

  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.q_row = q.stride(0), a.q_head = q.stride(1);
  a.k_row = k.stride(0), a.k_head = k.stride(1);
  a.v_row = v.stride(0), a.v_head = v.stride(1);
  a.cu_q = cu_seqlens_q.const_data_ptr<int32_t>(), a.cu_k = cu_seqlens_k.const_data_ptr<int32_t>();
  a.q_positions = q_positions ? q_positions->const_data_ptr<int64_t>() : nullptr;
  a.heads = q.size(1), a.width = q.size(2);

  // Everything that is used as an address is checked first.
  const int64_t sequences = cu_seqlens_q.size(0) - 1;
  std::vector<AttentionItem> items;
  int64_t most_keys = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t queries = a.cu_q[s + 1] - a.cu_q[s], keys = a.cu_k[s + 1] - a.cu_k[s];
    STD_TORCH_CHECK(a.cu_q[s] >= 0 && queries >= 0 && a.cu_q[s + 1] <= q.size(0), op, ": cu_seqlens_q is out of order");
    STD_TORCH_CHECK(a.cu_k[s] >= 0 && keys >= 0 && a.cu_k[s + 1] <= k.size(0), op, ": cu_seqlens_k is out of order");
    if (queries == 0) continue;
    STD_TORCH_CHECK(keys > 0, op, ": a sequence with queries has no keys");
    STD_TORCH_CHECK(a.longest == 0 || keys <= a.longest, op, ": a sequence is longer than max_seqlen_k");
    STD_TORCH_CHECK(q_positions || queries <= keys, op, ": more queries than keys, and no q_positions");
    if (q_positions)
      for (int64_t i = a.cu_q[s]; i < a.cu_q[s + 1]; ++i)
        STD_TORCH_CHECK(a.q_positions[i] >= 0 && a.q_positions[i] < keys, op, ": q_positions leaves its sequence");
    most_keys = keys > most_keys ? keys : most_keys;
    for (int64_t head = 0; head < a.heads; ++head)
      for (int64_t first = 0; first < queries; first += QUERIES)
        items.push_back({s, head, first, first + QUERIES < queries ? first + QUERIES : queries});
  }
  // Neighbouring heads share cache lines and prefetches, so a thread takes as many as leave work for the others.
  const int64_t share = static_cast<int64_t>(items.size()) / (8 * torch::stable::get_num_threads());
  const int64_t grain = share < 1 ? 1 : share < a.heads ? share : a.heads;
  if (a.window > most_keys) a.window = most_keys;  // all of them, and no sum of places overflows
  // Within a window an item of neighbouring queries reaches only so far.
  if (a.window >= 0 && !q_positions && 2 * a.window + QUERIES < most_keys) most_keys = 2 * a.window + QUERIES;
  const int64_t bytes = use.attention_scratch[type](a.width, QUERIES, most_keys);
  for_each(static_cast<int64_t>(items.size()), grain, [&](int64_t i) {
    use.attention_item[type](a, items[i], scratch(bytes));
  });
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                 const Tensor& cu_seqlens_k, int64_t max_seqlen_k, const std::optional<Tensor>& q_positions,
                 double scale, int64_t local_window, const std::optional<Tensor>& distance_bias) {
  const char* op = "attention";
  Attention a{};
  a.scale = static_cast<float>(scale);
  a.window = local_window < 0 ? -1 : local_window;
  Tensor out = torch::stable::new_empty(q, q.sizes());
  std::vector<float> falling;
  if (distance_bias && q.size(0) > 0) {
    STD_TORCH_CHECK(distance_bias->scalar_type() == ScalarType::Float, op, ": distance_bias must be float32");
    STD_TORCH_CHECK(q.dim() == 3 && distance_bias->dim() == 2 && distance_bias->size(0) == q.size(1) &&
                        distance_bias->size(1) % 2 == 1 && distance_bias->is_contiguous(),
                    op, ": distance_bias must be contiguous [heads, distances], reaching as far to both sides");
    reach(op, a, max_seqlen_k, q, q_positions);
    const float* bias = distance_bias->const_data_ptr<float>();
    a.bias_head = a.farthest - a.nearest + 1 + 15;  // whole vectors are read
    falling.resize(distance_bias->size(0) * a.bias_head);
    for (int64_t head = 0; head < distance_bias->size(0); ++head)
      for (int64_t d = a.farthest; d >= a.nearest; --d)
        falling[head * a.bias_head + a.farthest - d] =
            bias[head * distance_bias->size(1) + clamped(d, distance_bias->size(1) / 2)];
    a.falling_bias = falling.data();
  }
  attend(op, kernels(), a, q, k, v, cu_seqlens_q, cu_seqlens_k, q_positions, out);
  return out;
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_k, "
      "Tensor? q_positions, float scale, int local_window, Tensor? distance_bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) { m.impl("attention", TORCH_BOX(&mlmfast::attention)); }
