// add_layer_norm for few rows: checks its arguments and launches a block a row.
#include "add_layer_norm.h"

#include "add_layer_norm_kernel.h"

namespace mlmfast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(NORM_THREADS) add_layer_norm_rows(AddLayerNorm a) {
  extern __shared__ __align__(16) char memory[];
  add_layer_norm_row<T>(a, blockIdx.x, memory);
}

}  // namespace

Tensor norm_rows(const char* op, const Tensor& x, const std::optional<Tensor>& residual,
                 const std::optional<Tensor>& bias, const Tensor& norm_weight, const std::optional<Tensor>& norm_bias,
                 double eps, const std::optional<Tensor>& sum) {
  check_half(op, x);
  STD_TORCH_CHECK(x.dim() == 2, op, " takes x [T, d]");
  AddLayerNorm a{};
  a.width = check_int(op, "the width", x.size(1), 1, WIDEST_NORM), a.eps = static_cast<float>(eps);
  check_rows(op, "x", x, a.width, x);
  if (residual) {
    check_rows(op, "residual", *residual, a.width, x);
    STD_TORCH_CHECK(residual->size(0) == x.size(0), op, ": residual must have as many rows as x");
    a.residual = residual->const_data_ptr(), a.residual_row = residual->stride(0);
  }
  a.bias = check_row(op, "bias", bias, a.width, x);
  a.norm_weight = check_row(op, "norm_weight", norm_weight, a.width, x);
  a.norm_bias = check_row(op, "norm_bias", norm_bias, a.width, x);
  const int rows = check_int(op, "rows", x.size(0));
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (rows == 0) return out;
  if (sum) a.sum = sum->mutable_data_ptr();
  a.x = x.const_data_ptr(), a.out = out.mutable_data_ptr(), a.x_row = x.stride(0);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto kernel = x.scalar_type() == ScalarType::BFloat16 ? add_layer_norm_rows<bfloat16> : add_layer_norm_rows<float16>;
  kernel<<<rows, NORM_THREADS, row_bytes(a.width), current_stream(x)>>>(a);
  check(op, cudaGetLastError());
  return out;
}

Tensor add_layer_norm(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& bias,
                      const Tensor& norm_weight, const std::optional<Tensor>& norm_bias, double eps) {
  return norm_rows("add_layer_norm", x, residual, bias, norm_weight, norm_bias, eps, std::nullopt);
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
