// add_layer_norm for few rows: checks its arguments and launches a block a row.
#include <optional>

#include "add_layer_norm_kernel.h"
#include "tensors.h"

namespace mlmfast::cuda {
namespace {

const char* const OP = "add_layer_norm";

template <class T>
__global__ void __launch_bounds__(NORM_THREADS) add_layer_norm_rows(AddLayerNorm a) {
  extern __shared__ __align__(16) char memory[];
  add_layer_norm_row<T>(a, blockIdx.x, memory);
}

}  // namespace

Tensor add_layer_norm(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& bias,
                      const Tensor& norm_weight, const std::optional<Tensor>& norm_bias, double eps) {
  check_half(OP, x);
  STD_TORCH_CHECK(x.dim() == 2, OP, " takes x [T, d]");
  AddLayerNorm a{};
  a.width = check_int(OP, "the width", x.size(1), 1, WIDEST_NORM), a.eps = static_cast<float>(eps);
  check_rows(OP, "x", x, a.width, x);
  if (residual) {
    check_rows(OP, "residual", *residual, a.width, x);
    STD_TORCH_CHECK(residual->size(0) == x.size(0), OP, ": residual must have as many rows as x");
    a.residual = residual->const_data_ptr(), a.residual_row = residual->stride(0);
  }
  a.bias = check_row(OP, "bias", bias, a.width, x);
  a.norm_weight = check_row(OP, "norm_weight", norm_weight, a.width, x);
  a.norm_bias = check_row(OP, "norm_bias", norm_bias, a.width, x);
  const int rows = check_int(OP, "rows", x.size(0));
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (rows == 0) return out;
  a.x = x.const_data_ptr(), a.out = out.mutable_data_ptr(), a.x_row = x.stride(0);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto kernel = x.scalar_type() == ScalarType::BFloat16 ? add_layer_norm_rows<bfloat16> : add_layer_norm_rows<float16>;
  kernel<<<rows, NORM_THREADS, row_bytes(a.width), current_stream(x)>>>(a);
  check(OP, cudaGetLastError());
  return out;
}

}  // namespace mlmfast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cuda, m) {
  m.def(
      "add_layer_norm(Tensor x, Tensor? residual, Tensor? bias, Tensor norm_weight, Tensor? norm_bias, float eps) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CUDA, m) {
  m.impl("add_layer_norm", TORCH_BOX(&mlmfast::cuda::add_layer_norm));
}
