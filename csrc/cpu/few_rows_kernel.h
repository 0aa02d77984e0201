// Few rows times a weight as it lies, x [rows, inner] @ weight [outer, inner]^T: dot products along the weight's rows, which
// are read once. W or 2 W partial sums a product keep its rounding error below that of products that add in one chain.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

// STEP elements of two rows, multiplied and added into W sums.
struct FloatDot {
  static constexpr int STEP = W;
  using Piece = Vec;
  template <class T>
  static Piece piece(const T* p) {
    return load(p);
  }
  static void add(Vec& sums, Piece a, Piece b) { sums += a * b; }
};

#if defined(__AVX512BF16__)
struct HalfDot {
  static constexpr int STEP = 32;
  using Piece = __m512bh;
  static Piece piece(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static void add(Vec& sums, Piece a, Piece b) { sums = (Vec)_mm512_dpbf16_ps((__m512)sums, a, b); }
};
#else
using HalfDot = FloatDot;
#endif

// Weight rows, and rows of x, whose sums stay in registers together.
constexpr int OUTER = 4;
#if defined(__AVX512F__)
constexpr int INNER_ROWS = 6;
#else
constexpr int INNER_ROWS = 2;
#endif

template <class T, class Dot, int outer, int rows>
inline void few_rows_tile(const mlmfast::FewRows& a, int64_t first, int64_t row) {
  const T* w = static_cast<const T*>(a.weight) + first * a.weight_row;
  const T* x = static_cast<const T*>(a.x) + row * a.x_row;
  const T* next = w + outer * a.weight_row;  // what this thread mostly reads next
  Vec sums[outer][rows] = {};
  int64_t i = 0;
  for (; i + Dot::STEP <= a.inner; i += Dot::STEP) {
    typename Dot::Piece left[outer];
#pragma GCC unroll 8
    for (int o = 0; o < outer; ++o) {
      left[o] = Dot::piece(w + o * a.weight_row + i);
      __builtin_prefetch(next + o * a.weight_row + i);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const typename Dot::Piece right = Dot::piece(x + r * a.x_row + i);
#pragma GCC unroll 8
      for (int o = 0; o < outer; ++o) Dot::add(sums[o][r], left[o], right);
    }
  }
  if (i < a.inner) {  // zeros past the end, on both sides
    T left[outer][Dot::STEP] = {}, right[Dot::STEP] = {};
    for (int o = 0; o < outer; ++o) std::memcpy(left[o], w + o * a.weight_row + i, (a.inner - i) * sizeof(T));
    for (int r = 0; r < rows; ++r) {
      std::memcpy(right, x + r * a.x_row + i, (a.inner - i) * sizeof(T));
      for (int o = 0; o < outer; ++o) Dot::add(sums[o][r], Dot::piece(left[o]), Dot::piece(right));
    }
  }
  for (int o = 0; o < outer; ++o)
    for (int r = 0; r < rows; ++r) a.sums[(row + r) * a.outer + first + o] = sum(sums[o][r]);
}

template <class T, class Dot, int outer>
inline void few_rows_block(const mlmfast::FewRows& a, int64_t first) {
  int64_t row = 0;
  for (; row + INNER_ROWS <= a.rows; row += INNER_ROWS) few_rows_tile<T, Dot, outer, INNER_ROWS>(a, first, row);
  switch (a.rows - row) {
    case 1: return few_rows_tile<T, Dot, outer, 1>(a, first, row);
#if defined(__AVX512F__)
    case 2: return few_rows_tile<T, Dot, outer, 2>(a, first, row);
    case 3: return few_rows_tile<T, Dot, outer, 3>(a, first, row);
    case 4: return few_rows_tile<T, Dot, outer, 4>(a, first, row);
    case 5: return few_rows_tile<T, Dot, outer, 5>(a, first, row);
#endif
  }
}

// Columns [first, last) of the result.
template <class T, class Dot>
void few_rows(const mlmfast::FewRows& a, int64_t first, int64_t last) {
  for (; first + OUTER <= last; first += OUTER) few_rows_block<T, Dot, OUTER>(a, first);
  for (; first < last; ++first) few_rows_block<T, Dot, 1>(a, first);
}

}  // namespace
