// add_layer_norm: checks its arguments and hands blocks of rows to torch's threads.
#include "add_layer_norm.h"

#include "kernels.h"
#include "rows.h"

namespace mlmfast {

Tensor norm_rows(const char* op, const Tensor& x, const std::optional<Tensor>& residual,
                 const std::optional<Tensor>& bias, const Tensor& norm_weight, const std::optional<Tensor>& norm_bias,
                 double eps, const std::optional<Tensor>& sum) {
  const int type = dtype_index(op, x);
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be [rows, width]");
  check_table(op, "x", x, x);
  if (residual) {
    check_table(op, "residual", *residual, x);
    STD_TORCH_CHECK(residual->size(0) == x.size(0), op, ": residual must have as many rows as x");
  }
  Tensor out = torch::stable::new_empty(x, x.sizes());
  AddLayerNorm a{};
  a.x = x.const_data_ptr(), a.x_row = x.stride(0);
  if (residual) a.residual = residual->const_data_ptr(), a.residual_row = residual->stride(0);
  a.bias = vector_of(op, "bias", bias, x);
  a.norm_weight = vector_of(op, "norm_weight", norm_weight, x);
  a.norm_bias = vector_of(op, "norm_bias", norm_bias, x);
  a.out = out.mutable_data_ptr();
  if (sum) a.sum = sum->mutable_data_ptr();
  a.width = x.size(1);
  a.eps = static_cast<float>(eps);
  const auto serve = kernels().add_layer_norm[type];
  const int64_t rows = x.size(0), some = rows_at_a_time(a.width);
  for_each((rows + some - 1) / some, 1, [&](int64_t i) {
    const int64_t first = i * some, last = first + some < rows ? first + some : rows;
    serve(a, first, last, reinterpret_cast<float*>(scratch(a.width * sizeof(float))));
  });
  return out;
}

Tensor add_layer_norm(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& bias,
                      const Tensor& norm_weight, const std::optional<Tensor>& norm_bias, double eps) {
  return norm_rows("add_layer_norm", x, residual, bias, norm_weight, norm_bias, eps, std::nullopt);
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def(
      "add_layer_norm(Tensor x, Tensor? residual, Tensor? bias, Tensor norm_weight, Tensor? norm_bias, float eps) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) { m.impl("add_layer_norm", TORCH_BOX(&mlmfast::add_layer_norm)); }
