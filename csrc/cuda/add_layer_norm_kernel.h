// add_layer_norm and pre_norm for few rows: a block a row, which stays in shared memory in float32.
#pragma once

#include "rows.h"

namespace mlmfast::cuda {

constexpr int WIDEST_NORM = 8192;  // numbers of a row

struct AddLayerNorm {
  const void *x, *residual, *bias, *norm_weight, *norm_bias;  // [T, d], [T, d] or null, [d] each; biases may be null
  void *out, *sum;                                            // [T, d]; the sum before its norm, or null
  int64_t x_row, residual_row;                                // strides, in numbers
  int32_t width;
  float eps;
};

// Bytes of shared memory of a block that holds a row, and a number a warp.
MLMFAST_BOTH int row_bytes(int width) { return (width + NORM_WARPS) * 4; }

template <class T>
MLMFAST_DEVICE void add_layer_norm_row(const AddLayerNorm& a, int row, char* memory) {
  float* const numbers = reinterpret_cast<float*>(memory);
  const T* const x = static_cast<const T*>(a.x) + row * a.x_row;
  const T* const residual = static_cast<const T*>(a.residual) + (a.residual ? row * a.residual_row : 0);
  const T* const bias = static_cast<const T*>(a.bias);
  const int64_t first = static_cast<int64_t>(row) * a.width;
  for (int d = thread(); d < a.width; d += NORM_THREADS)
    numbers[d] = to_float(x[d]) + (a.bias ? to_float(bias[d]) : 0) + (a.residual ? to_float(residual[d]) : 0);
  if (a.sum)
    for (int d = thread(); d < a.width; d += NORM_THREADS) static_cast<T*>(a.sum)[first + d] = narrow<T>(numbers[d]);
  layer_norm(numbers, a.width, static_cast<const T*>(a.norm_weight), static_cast<const T*>(a.norm_bias), a.eps,
             numbers + a.width);
  for (int d = thread(); d < a.width; d += NORM_THREADS) static_cast<T*>(a.out)[first + d] = narrow<T>(numbers[d]);
}

}  // namespace mlmfast::cuda
