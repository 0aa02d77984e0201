// What the kernels share that give a block, or a warp, to a row.
#pragma once

#include "device.h"

namespace mlmfast::cuda {

// The greatest, or the sum, of what `LANES` neighbouring lanes have; four hold a row of a fragment.
template <int LANES, class Combine>
MLMFAST_DEVICE float over_lanes(float x, const Combine& combine) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) x = combine(x, exchange(x, mask));
  return x;
}

struct Greater {
  MLMFAST_DEVICE float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct Sum {
  MLMFAST_DEVICE float operator()(float x, float y) const { return x + y; }
};

// The greatest, or the sum, over the block's COUNT warps in their order; `room` is a number a warp.
template <int COUNT, class Combine>
MLMFAST_DEVICE float over_block(float x, float* room, const Combine& combine) {
  x = over_lanes<32>(x, combine);
  if (thread() % 32 == 0) room[thread() / 32] = x;
  sync_block();
  x = room[0];
  for (int warp = 1; warp < COUNT; ++warp) x = combine(x, room[warp]);
  sync_block();
  return x;
}

// The sequence that a row belongs to: the last one that begins at it or before.
MLMFAST_BOTH int sequence_of(const int32_t* cu_seqlens, int sequences, int row) {
  int first = 0, last = sequences;
  while (last - first > 1) {
    const int middle = (first + last) / 2;
    (cu_seqlens[middle] <= row ? first : last) = middle;
  }
  return first;
}

constexpr int NORM_WARPS = 8, NORM_THREADS = 32 * NORM_WARPS;

// LayerNorm of the float32 `row` in shared memory, in place; a thread has every NORM_THREADS-th column, and reads no
// others. Mean first, then the centred squares, each division rounded as IEEE has it.
template <class T>
MLMFAST_DEVICE void layer_norm(float* row, int width, const T* weight, const T* bias, float eps, float* room) {
  float sum = 0;
  for (int d = thread(); d < width; d += NORM_THREADS) sum += row[d];
  const float mean = over_block<NORM_WARPS>(sum, room, Sum()) / static_cast<float>(width);
  float squares = 0;
  for (int d = thread(); d < width; d += NORM_THREADS) {
    row[d] -= mean;
    squares += row[d] * row[d];
  }
  const float inverse = 1 / sqrtf(over_block<NORM_WARPS>(squares, room, Sum()) / static_cast<float>(width) + eps);
  for (int d = thread(); d < width; d += NORM_THREADS)
    row[d] = row[d] * inverse * to_float(weight[d]) + (bias ? to_float(bias[d]) : 0);
}

}  // namespace mlmfast::cuda
