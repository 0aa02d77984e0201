// linear for few rows: a block has 16 outputs (GeGLU: 16 and their 16 gates), its warps a share of the inner dimension each.
//
// The shares are added up in shared memory in the order of the warps. How many warps a block has follows from the weights'
// shape alone, so a row's result does not depend on how many others are with it, nor on the run.
#pragma once

#include "rows.h"
#include "skinny_product.h"

namespace mlmfast::cuda {

enum class Activation : int32_t { NONE, GELU, GELU_TANH, RELU, TANH, GEGLU };

struct Linear {
  const void *x, *weight, *bias;  // [T, n], [m, n], [m] or null
  void* out;                      // [T, outputs]
  int64_t x_row, weight_row;      // strides, in numbers
  int32_t rows, width, outputs;   // T, n, and m or m / 2
  Activation activation;
};

constexpr int TILE_OUTPUTS = 16;
constexpr int FULL = 132;  // tiles from which on every multiprocessor of an H100 or H200 has one

// The warps of a block. Where there are fewer tiles than multiprocessors, each tile is read by twice as many warps, so that
// what is under way does not halve: 48 tiles (768 outputs) by 16 warps ask for 3 MB at once.
MLMFAST_BOTH int linear_warps(int width, int outputs) {
  const int most = (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS < FULL ? 16 : 8;
  const int pieces = (width + STEP - 1) / STEP;
  return pieces < most ? pieces : most;
}

// Bytes of shared memory: every warp's sums.
MLMFAST_BOTH int linear_bytes(int warps, int mt, int nt) { return warps * mt * nt * 8 * TILE_OUTPUTS * 4; }

MLMFAST_DEVICE float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678118654752f)); }

MLMFAST_DEVICE float activated(Activation activation, float x, float gate) {
  switch (activation) {
    case Activation::NONE: return x;
    case Activation::GELU: return gelu(x);
    case Activation::GELU_TANH: return 0.5f * x * (1 + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::RELU: return x < 0 ? 0 : x;  // NaN stays
    case Activation::TANH: return tanhf(x);
    case Activation::GEGLU: return gelu(x) * gate;
  }
  return x;
}

// MT is 2 for GeGLU, whose gates are rows `outputs` further down; NT rows of 8 hold all of x.
template <int MT, int NT, class T>
MLMFAST_DEVICE void linear_tile(const Linear& a, int tile, char* memory) {
  const int first = tile * TILE_OUTPUTS;
  const int warp = thread() / 32, warps = threads() / 32, lane = thread() % 32;
  const T* const x = static_cast<const T*>(a.x);
  const T* const weight = static_cast<const T*>(a.weight);
  const T* const bias = static_cast<const T*>(a.bias);
  const int pieces = (a.width + STEP - 1) / STEP;
  const int end = (warp + 1) * pieces / warps * STEP;
  const T* places[MT];
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) places[mt] = weight + (first + static_cast<int64_t>(mt) * a.outputs) * a.weight_row;
  auto o = operands<MT, NT, T>(places, a.weight_row, a.outputs - first, x, a.x_row, a.rows, warp * pieces / warps * STEP,
                               end < a.width ? end : a.width);
  Ring<MT, NT> ring;
  float sums[MT][NT][4] = {};
  fill_weights(ring, o);
  fill_x(ring, o);
  multiply_few(sums, ring, o);

  // [warps][MT][8 NT][16]
  float* const shares = reinterpret_cast<float*>(memory);
  constexpr int SHARE = MT * NT * 8 * TILE_OUTPUTS;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * nt + lane % 4 * 2 + e % 2, output = lane / 4 + e / 2 * 8;
        shares[warp * SHARE + (mt * NT * 8 + row) * TILE_OUTPUTS + output] = sums[mt][nt][e];
      }
  sync_block();
  for (int at = thread(); at < NT * 8 * TILE_OUTPUTS; at += threads()) {
    const int row = at / TILE_OUTPUTS, output = first + at % TILE_OUTPUTS;
    if (row >= a.rows || output >= a.outputs) continue;
    float total[2] = {0, 0};
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      for (int share = 0; share < warps; ++share) total[mt] += shares[share * SHARE + mt * NT * 8 * TILE_OUTPUTS + at];
      if (bias) total[mt] += to_float(bias[output + mt * a.outputs]);
    }
    static_cast<T*>(a.out)[static_cast<int64_t>(row) * a.outputs + output] =
        narrow<T>(activated(a.activation, total[0], total[1]));
  }
}

}  // namespace mlmfast::cuda
