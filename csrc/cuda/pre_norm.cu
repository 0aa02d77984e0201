// pre_norm for few rows: add_layer_norm that keeps the sum before its norm.
#include <tuple>

#include "add_layer_norm.h"

namespace mlmfast::cuda {

std::tuple<Tensor, Tensor> pre_norm(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias,
                                    const Tensor& norm_weight, const std::optional<Tensor>& norm_bias, double eps) {
  const Tensor sum = torch::stable::new_empty(x, x.sizes());
  return {sum, norm_rows("pre_norm", x, residual, bias, norm_weight, norm_bias, eps, sum)};
}

}  // namespace mlmfast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cuda, m) {
  m.def(
      "pre_norm(Tensor x, Tensor residual, Tensor? bias, Tensor norm_weight, Tensor? norm_bias, float eps) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CUDA, m) { m.impl("pre_norm", TORCH_BOX(&mlmfast::cuda::pre_norm)); }
