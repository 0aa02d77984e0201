// What `add_layer_norm` and `pre_norm` share: checks, threads.
#pragma once

#include <optional>

#include "tensors.h"

namespace mlmfast {

// LayerNorm(x + bias + residual); writes the sum too, into a contiguous tensor like x, where one is given.
Tensor norm_rows(const char* op, const Tensor& x, const std::optional<Tensor>& residual,
                 const std::optional<Tensor>& bias, const Tensor& norm_weight, const std::optional<Tensor>& norm_bias,
                 double eps, const std::optional<Tensor>& sum);

}  // namespace mlmfast
