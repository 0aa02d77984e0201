// Few rows times a weight as it lies, x [rows, inner] @ weight [outer, inner]^T: dot products along the weight's rows, which
// are read once. W partial sums a product keep its rounding error below that of products that add in one chain.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

// Weight rows, and rows of x, whose sums stay in registers together.
constexpr int OUTER = 4;
#if defined(__AVX512F__)
constexpr int INNER_ROWS = 6;
#else
constexpr int INNER_ROWS = 2;
#endif

template <int outer, int rows>
inline void few_rows_tile(const mlmfast::FewRows& a, int64_t first, int64_t row) {
  const float* w = a.weight + first * a.weight_row;
  const float* x = a.x + row * a.x_row;
  const float* next = w + outer * a.weight_row;  // what this thread mostly reads next
  Vec sums[outer][rows] = {};
  int64_t i = 0;
  for (; i + W <= a.inner; i += W) {
    Vec left[outer];
#pragma GCC unroll 8
    for (int o = 0; o < outer; ++o) {
      left[o] = load(w + o * a.weight_row + i);
      __builtin_prefetch(next + o * a.weight_row + i);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec right = load(x + r * a.x_row + i);
#pragma GCC unroll 8
      for (int o = 0; o < outer; ++o) sums[o][r] += left[o] * right;
    }
  }
  if (i < a.inner) {  // zeros past the end, on both sides
    float left[outer][W] = {}, right[W] = {};
    for (int o = 0; o < outer; ++o) std::memcpy(left[o], w + o * a.weight_row + i, (a.inner - i) * sizeof(float));
    for (int r = 0; r < rows; ++r) {
      std::memcpy(right, x + r * a.x_row + i, (a.inner - i) * sizeof(float));
      for (int o = 0; o < outer; ++o) sums[o][r] += load(left[o]) * load(right);
    }
  }
  for (int o = 0; o < outer; ++o)
    for (int r = 0; r < rows; ++r) a.sums[(row + r) * a.outer + first + o] = sum(sums[o][r]);
}

template <int outer>
inline void few_rows_block(const mlmfast::FewRows& a, int64_t first) {
  int64_t row = 0;
  for (; row + INNER_ROWS <= a.rows; row += INNER_ROWS) few_rows_tile<outer, INNER_ROWS>(a, first, row);
  switch (a.rows - row) {
    case 1: return few_rows_tile<outer, 1>(a, first, row);
#if defined(__AVX512F__)
    case 2: return few_rows_tile<outer, 2>(a, first, row);
    case 3: return few_rows_tile<outer, 3>(a, first, row);
    case 4: return few_rows_tile<outer, 4>(a, first, row);
    case 5: return few_rows_tile<outer, 5>(a, first, row);
#endif
  }
}

// Columns [first, last) of the result.
void few_rows(const mlmfast::FewRows& a, int64_t first, int64_t last) {
  for (; first + OUTER <= last; first += OUTER) few_rows_block<OUTER>(a, first);
  for (; first < last; ++first) few_rows_block<1>(a, first);
}

}  // namespace
