// LayerNorm of one row that lies in float32 scratch.
#pragma once

#include "vec.h"

namespace {

// The sum of term(i) over whole vectors at i and term1(i) over the elements left; partial sums run side by side.
template <class Term, class Term1>
inline float row_sum(int64_t width, Term term, Term1 term1) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sums[n] += term(i + n * W);
  for (; i + W <= width; i += W) sums[0] += term(i);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < width; ++i) total += term1(i);
  return total;
}

// out = (row - mean) / sqrt(variance + eps) * weight + bias, given the row's sum. The variance is that of the centred
// row: the mean of squares less the square of the mean would cancel.
template <class T>
inline void normalise(T* out, const float* row, float total, int64_t width, const T* weight, const T* bias, float eps) {
  const float mean = total / width;
  const Vec centre = all(mean);
  const float squares = row_sum(
      width,
      [&](int64_t i) {
        const Vec off = load(row + i) - centre;
        return off * off;
      },
      [&](int64_t i) { return (row[i] - mean) * (row[i] - mean); });
  const float scale = 1 / __builtin_sqrtf(squares / width + eps);
  const Vec factor = all(scale);
  int64_t i = 0;
  if (bias)
    for (; i + W <= width; i += W) store(out + i, (load(row + i) - centre) * factor * load(weight + i) + load(bias + i));
  else
    for (; i + W <= width; i += W) store(out + i, (load(row + i) - centre) * factor * load(weight + i));
  if (i < width) {
    const int64_t left = width - i;
    Vec y = (load(row + i, left) - centre) * factor * load(weight + i, left);
    if (bias) y += load(bias + i, left);
    store(out + i, y, left);
  }
}

// out = row, rounded to its dtype.
template <class T>
inline void rounded(T* out, const float* row, int64_t width) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store(out + i, load(row + i));
  if (i < width) store(out + i, load(row + i, width - i), width - i);
}

}  // namespace
