// attention of few queries: checks its arguments and launches disentangled_attention's kernel for them, without tables.
#include <optional>

#include "disentangled_attention_kernel.h"
#include "tensors.h"

namespace mlmfast::cuda {
namespace {

const char* const OP = "attention";

template <int D, class T>
__global__ void __launch_bounds__(THREADS) attend_plainly(Attention a, int sequences) {
  extern __shared__ __align__(16) char memory[];
  attend_few<D, T>(a, sequences, blockIdx.x, blockIdx.y, memory);
}

template <int D, class T>
void launch(const Attention& a, int sequences, dim3 grid, cudaStream_t stream) {
  attend_plainly<D, T><<<grid, THREADS, FewLayout<D>::BYTES, stream>>>(a, sequences);
  check(OP, cudaGetLastError());
}

template <class T>
void launch(const Attention& a, int sequences, dim3 grid, cudaStream_t stream) {
  switch (a.width) {
    case 32: return launch<32, T>(a, sequences, grid, stream);
    case 64: return launch<64, T>(a, sequences, grid, stream);
    case 128: return launch<128, T>(a, sequences, grid, stream);
    default: STD_TORCH_CHECK(false, OP, " takes heads 32, 64 or 128 wide, not ", a.width);
  }
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                 const std::optional<Tensor>& q_positions, double scale, int64_t local_window) {
  check_half(OP, q);
  check_heads(OP, "q", q, q);
  check_heads(OP, "k", k, q);
  check_heads(OP, "v", v, q);
  STD_TORCH_CHECK(k.size(0) == v.size(0), OP, ": k and v must have as many rows");
  check_ints(OP, "cu_seqlens_q", cu_seqlens_q, ScalarType::Int, q);
  check_ints(OP, "cu_seqlens_k", cu_seqlens_k, ScalarType::Int, q);
  STD_TORCH_CHECK(cu_seqlens_q.size(0) == cu_seqlens_k.size(0), OP, ": cu_seqlens_q and cu_seqlens_k must be as long");
  Tensor out = torch::stable::new_empty(q, q.sizes());
  if (q.numel() == 0) return out;

  Attention a{};
  if (q_positions) {
    check_ints(OP, "q_positions", *q_positions, ScalarType::Long, q);
    STD_TORCH_CHECK(q_positions->size(0) == q.size(0), OP, ": q_positions must have a place a query");
    a.q_positions = q_positions->const_data_ptr<int64_t>();
  }
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.q_row = q.stride(0), a.q_head = q.stride(1);
  a.k_row = k.stride(0), a.k_head = k.stride(1);
  a.v_row = v.stride(0), a.v_head = v.stride(1);
  a.out_row = out.stride(0), a.out_head = out.stride(1);
  a.cu_q = cu_seqlens_q.const_data_ptr<int32_t>(), a.cu_k = cu_seqlens_k.const_data_ptr<int32_t>();
  a.width = static_cast<int32_t>(q.size(2));
  a.window = static_cast<int32_t>(local_window < 0 ? -1 : local_window > 1 << 30 ? 1 << 30 : local_window);
  a.log2_scale = static_cast<float>(scale * 1.4426950408889634);

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const dim3 grid(static_cast<unsigned>(q.size(0)), static_cast<unsigned>(q.size(1)));
  const int sequences = static_cast<int>(cu_seqlens_q.size(0) - 1);
  const auto run = q.scalar_type() == ScalarType::BFloat16 ? launch<bfloat16> : launch<float16>;
  run(a, sequences, grid, current_stream(q));
  return out;
}

}  // namespace mlmfast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cuda, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? q_positions, "
      "float scale, int local_window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CUDA, m) { m.impl("attention", TORCH_BOX(&mlmfast::cuda::attention)); }
