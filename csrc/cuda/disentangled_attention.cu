// disentangled_attention: checks its arguments and launches the kernel that fits.
#include <optional>

#include "disentangled_attention_kernel.h"
#include "tensors.h"

namespace mlmfast::cuda {
namespace {

const char* const OP = "disentangled_attention";
static_assert(Layout<128>::BYTES == 143360, "WIDEST_BYTES of mlmfast/cuda/disentangled_attention.py says so, too");

template <int D, class T>
__global__ void __launch_bounds__(THREADS) attend_blocks(Attention a, int blocks) {
  extern __shared__ __align__(16) char memory[];
  attend_block<D, T>(a, blockIdx.x / blocks, blockIdx.y, blockIdx.x % blocks * SIDE, memory);
}

template <int D, class T>
__global__ void __launch_bounds__(THREADS) attend_queries(Attention a, int sequences) {
  extern __shared__ __align__(16) char memory[];
  attend_few<D, T>(a, sequences, blockIdx.x, blockIdx.y, memory);
}

template <int D, class T>
void launch(const Attention& a, int64_t sequences, int64_t rows, int64_t heads, int64_t max_queries, cudaStream_t stream) {
  if (a.q_positions) {
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(heads));
    attend_queries<D, T><<<grid, THREADS, FewLayout<D>::BYTES, stream>>>(a, static_cast<int>(sequences));
  } else {
    const int64_t blocks = (max_queries + SIDE - 1) / SIDE;
    constexpr int bytes = Layout<D>::BYTES;
    check(OP, cudaFuncSetAttribute(attend_blocks<D, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const dim3 grid(static_cast<unsigned>(sequences * blocks), static_cast<unsigned>(heads));
    attend_blocks<D, T><<<grid, THREADS, bytes, stream>>>(a, static_cast<int>(blocks));
  }
  check(OP, cudaGetLastError());
}

template <class T>
void launch(const Attention& a, int64_t sequences, int64_t rows, int64_t heads, int64_t max_queries, cudaStream_t stream) {
  switch (a.width) {
    case 32: return launch<32, T>(a, sequences, rows, heads, max_queries, stream);
    case 64: return launch<64, T>(a, sequences, rows, heads, max_queries, stream);
    case 128: return launch<128, T>(a, sequences, rows, heads, max_queries, stream);
    default: STD_TORCH_CHECK(false, OP, " takes heads 32, 64 or 128 wide, not ", a.width);
  }
}

}  // namespace

Tensor disentangled_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& pos_key,
                              const std::optional<Tensor>& pos_query, const Tensor& buckets, const Tensor& cu_seqlens_q,
                              const Tensor& cu_seqlens_k, int64_t max_seqlen_q, const std::optional<Tensor>& q_positions,
                              double scale) {
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, OP, " takes bfloat16 and float16");
  check_heads(OP, "q", q, q);
  check_heads(OP, "k", k, q);
  check_heads(OP, "v", v, q);
  STD_TORCH_CHECK(k.size(0) == v.size(0), OP, ": k and v must have as many rows");
  check_ints(OP, "buckets", buckets, ScalarType::Int, q);
  check_ints(OP, "cu_seqlens_q", cu_seqlens_q, ScalarType::Int, q);
  check_ints(OP, "cu_seqlens_k", cu_seqlens_k, ScalarType::Int, q);
  STD_TORCH_CHECK(buckets.size(0) % 2 == 1, OP, ": buckets must reach as far to both sides");
  STD_TORCH_CHECK(cu_seqlens_q.size(0) == cu_seqlens_k.size(0), OP, ": cu_seqlens_q and cu_seqlens_k must be as long");
  if (q_positions) {
    check_ints(OP, "q_positions", *q_positions, ScalarType::Long, q);
    STD_TORCH_CHECK(q_positions->size(0) == q.size(0), OP, ": q_positions must have a place a query");
  }
  Tensor out = torch::stable::new_empty(q, q.sizes());
  if (q.numel() == 0) return out;

  Attention a{};
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.q_row = q.stride(0), a.q_head = q.stride(1);
  a.k_row = k.stride(0), a.k_head = k.stride(1);
  a.v_row = v.stride(0), a.v_head = v.stride(1);
  a.out_row = out.stride(0), a.out_head = out.stride(1);
  if (pos_key) {
    check_heads(OP, "pos_key", *pos_key, q);
    a.pos_key = pos_key->const_data_ptr(), a.key_row = pos_key->stride(0), a.key_head = pos_key->stride(1);
  }
  if (pos_query) {
    check_heads(OP, "pos_query", *pos_query, q);
    a.pos_query = pos_query->const_data_ptr(), a.query_row = pos_query->stride(0), a.query_head = pos_query->stride(1);
  }
  a.cu_q = cu_seqlens_q.const_data_ptr<int32_t>(), a.cu_k = cu_seqlens_k.const_data_ptr<int32_t>();
  a.q_positions = q_positions ? q_positions->const_data_ptr<int64_t>() : nullptr;
  a.buckets = buckets.const_data_ptr<int32_t>();
  a.reach = static_cast<int32_t>(buckets.size(0) / 2), a.width = static_cast<int32_t>(q.size(2)), a.window = -1;
  a.log2_scale = static_cast<float>(scale * 1.4426950408889634);

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const auto run = type == ScalarType::BFloat16 ? launch<bfloat16> : launch<float16>;
  run(a, cu_seqlens_q.size(0) - 1, q.size(0), q.size(1), max_seqlen_q, current_stream(q));
  return out;
}

}  // namespace mlmfast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cuda, m) {
  m.def(
      "disentangled_attention(Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, Tensor buckets, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, Tensor? q_positions, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CUDA, m) {
  m.impl("disentangled_attention", TORCH_BOX(&mlmfast::cuda::disentangled_attention));
}
