// add_layer_norm and pre_norm of a block of rows, each read once into scratch and written once.
#pragma once

#include "kernels.h"
#include "row_norm.h"

namespace {

// Rows [first, last); scratch holds one row.
template <class T>
void add_layer_norm(const mlmfast::AddLayerNorm& a, int64_t first, int64_t last, float* row) {
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = first; r < last; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_row;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + r * a.residual_row : nullptr;
    const float total = row_sum(
        a.width,
        [&](int64_t i) {
          Vec v = load(x + i);
          if (bias) v += load(bias + i);
          if (residual) v += load(residual + i);
          store(row + i, v);
          return v;
        },
        [&](int64_t i) {
          float v = widened(x[i]);
          if (bias) v += widened(bias[i]);
          if (residual) v += widened(residual[i]);
          return row[i] = v;
        });
    if (a.sum) rounded(static_cast<T*>(a.sum) + r * a.width, row, a.width);
    normalise(static_cast<T*>(a.out) + r * a.width, row, total, a.width, static_cast<const T*>(a.norm_weight),
              static_cast<const T*>(a.norm_bias), a.eps);
  }
}

}  // namespace
