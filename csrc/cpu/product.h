// Small matrix products for attention: C [rows, 16 * count] = A [rows, k] @ B, float32 sums.
//
// B comes in panels of 16 columns. A float panel is [k][16]; a bfloat16 panel holds pairs of neighbouring k together,
// [k / 2][16][2], as the bfloat16 instructions want them. In units of 32-bit words both are [words][16], so both are
// made by the same 16 x 16 transpose. A is row-major. Rows of A and C may be read and written up to the next multiple of
// 16, columns likewise: scratch is padded.
#pragma once

#include "vec.h"

namespace {

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// float32 by multiply-add. M rows times P panels stay in registers.
struct FloatProduct {
  using Element = float;
  static constexpr int64_t WORD = 1;  // elements of k in 32 bits
#if defined(__AVX512F__)
  static constexpr int M = 8, P = 3;
#elif defined(__AVX2__)
  static constexpr int M = 6, P = 1;
#else
  static constexpr int M = 2, P = 1;
#endif

  static void begin() {}
  static void end() {}

  template <int m, int p>
  static inline void tile(const float* a, int64_t lda, const float* b, int64_t panel, int64_t k, float* c, int64_t ldc) {
    constexpr int N = p * 16 / W;
    Vec sums[m][N] = {};
    for (int64_t i = 0; i < k; ++i) {
      Vec column[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) column[n] = load(b + n * W / 16 * panel + i * 16 + n * W % 16);
#pragma GCC unroll 16
      for (int r = 0; r < m; ++r) {
        Vec x = all(a[r * lda + i]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] += x * column[n];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < m; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(c + r * ldc + n * W, sums[r][n]);
  }

  template <int p>
  static inline void rows(const float* a, int64_t lda, const float* b, int64_t panel, int64_t k, int64_t m, float* c,
                          int64_t ldc) {
    for (; m >= M; m -= M, a += M * lda, c += M * ldc) tile<M, p>(a, lda, b, panel, k, c, ldc);
    switch (m) {
      case 1: return tile<1, p>(a, lda, b, panel, k, c, ldc);
#if defined(__AVX2__)
      case 2: return tile<2, p>(a, lda, b, panel, k, c, ldc);
      case 3: return tile<3, p>(a, lda, b, panel, k, c, ldc);
      case 4: return tile<4, p>(a, lda, b, panel, k, c, ldc);
      case 5: return tile<5, p>(a, lda, b, panel, k, c, ldc);
#endif
#if defined(__AVX512F__)
      case 6: return tile<6, p>(a, lda, b, panel, k, c, ldc);
      case 7: return tile<7, p>(a, lda, b, panel, k, c, ldc);
#endif
    }
  }

  static void product(const float* a, int64_t lda, const float* b, int64_t panel, int64_t k, int64_t m, int64_t count,
                      float* c, int64_t ldc) {
    while (count > 0) {
      // 4 panels are two and two: three and one would leave the multipliers waiting for the one.
      int64_t some = P == 1 ? 1 : count == 4 ? 2 : count < P ? count : P;
      if (some == 1) rows<1>(a, lda, b, panel, k, m, c, ldc);
#if defined(__AVX512F__)
      if (some == 2) rows<2>(a, lda, b, panel, k, m, c, ldc);
      if (some == 3) rows<3>(a, lda, b, panel, k, m, c, ldc);
#endif
      count -= some, b += some * panel, c += some * 16;
    }
  }
};

#if defined(__AVX512BF16__)
// bfloat16 products of pairs, float32 sums (vdpbf16ps).
struct HalfProduct {
  using Element = bf16;
  static constexpr int64_t WORD = 2;

#if defined(__AMX_BF16__)
  // Tiles of 16 rows: 0-3 sums, 4 rows of A, 5-7 panels of B.
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const tiles;
    _tile_loadconfig(&tiles);
  }
  static void end() { _tile_release(); }

  template <int p>
  static inline void tile(const bf16* a, int64_t lda, const bf16* b, int64_t panel, int64_t k, float* c, int64_t ldc) {
    _tile_zero(0);
    if constexpr (p > 1) _tile_zero(1);
    if constexpr (p > 2) _tile_zero(2);
    if constexpr (p > 3) _tile_zero(3);
    for (int64_t i = 0; i < k; i += 32) {
      _tile_loadd(4, a + i, lda * 2);
      _tile_loadd(5, b + i * 16, 64);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (p > 1) {
        _tile_loadd(6, b + panel + i * 16, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (p > 2) {
        _tile_loadd(7, b + 2 * panel + i * 16, 64);
        _tile_dpbf16ps(2, 4, 7);
      }
      if constexpr (p > 3) {
        _tile_loadd(5, b + 3 * panel + i * 16, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, c, ldc * 4);
    if constexpr (p > 1) _tile_stored(1, c + 16, ldc * 4);
    if constexpr (p > 2) _tile_stored(2, c + 32, ldc * 4);
    if constexpr (p > 3) _tile_stored(3, c + 48, ldc * 4);
  }

  static void product(const bf16* a, int64_t lda, const bf16* b, int64_t panel, int64_t k, int64_t m, int64_t count,
                      float* c, int64_t ldc) {
    for (; count > 0; count -= 4, b += 4 * panel, c += 64) {
      for (int64_t r = 0; r < m; r += 16) {
        const bf16* x = a + r * lda;
        float* y = c + r * ldc;
        if (count == 1) tile<1>(x, lda, b, panel, k, y, ldc);
        else if (count == 2) tile<2>(x, lda, b, panel, k, y, ldc);
        else if (count == 3) tile<3>(x, lda, b, panel, k, y, ldc);
        else tile<4>(x, lda, b, panel, k, y, ldc);
      }
    }
  }
#else
  static constexpr int M = 8, P = 3;
  static void begin() {}
  static void end() {}

  template <int m, int p>
  static inline void tile(const bf16* a, int64_t lda, const bf16* b, int64_t panel, int64_t k, float* c, int64_t ldc) {
    __m512 sums[m][p];
#pragma GCC unroll 16
    for (int r = 0; r < m; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < p; ++n) sums[r][n] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 2) {
      __m512bh column[p];
#pragma GCC unroll 16
      for (int n = 0; n < p; ++n) column[n] = (__m512bh)_mm512_loadu_si512(b + n * panel + i * 16);
#pragma GCC unroll 16
      for (int r = 0; r < m; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * lda + i, 4);
        __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
        for (int n = 0; n < p; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], x, column[n]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < m; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < p; ++n) _mm512_storeu_ps(c + r * ldc + n * 16, sums[r][n]);
  }

  static void product(const bf16* a, int64_t lda, const bf16* b, int64_t panel, int64_t k, int64_t m, int64_t count,
                      float* c, int64_t ldc) {
    while (count > 0) {
      int64_t some = count == 4 ? 2 : count < P ? count : P;
      for (int64_t r = 0; r < m; r += M) {  // rows past m lie in padded scratch
        const bf16* x = a + r * lda;
        float* y = c + r * ldc;
        if (some == 1) tile<M, 1>(x, lda, b, panel, k, y, ldc);
        else if (some == 2) tile<M, 2>(x, lda, b, panel, k, y, ldc);
        else tile<M, 3>(x, lda, b, panel, k, y, ldc);
      }
      count -= some, b += some * panel, c += some * 16;
    }
  }
#endif
};
#else
using HalfProduct = FloatProduct;  // no bfloat16 products: widened on the way into scratch
#endif

// A row of `width` elements into scratch, zeros up to ld.
template <class T>
inline void copy_row(float* dst, int64_t ld, const T* src, int64_t width) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store(dst + i, load(src + i));
  for (; i < width; ++i) dst[i] = widened(src[i]);
  for (; i < ld; ++i) dst[i] = 0;
}

inline void copy_row(bf16* dst, int64_t ld, const bf16* src, int64_t width) {
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) std::memcpy(dst + i, src + i, 64);  // of known size: no call
  for (; i < width; ++i) dst[i] = src[i];
  for (; i < ld; ++i) dst[i] = bf16{};
}

// The elements after a row: a head's rows are short and far apart, which no hardware prefetcher follows, and those after
// them are the next head's.
template <class T>
inline void prefetch_after(const T* row, int64_t width) {
  const char* next = reinterpret_cast<const char*>(row + width);
  for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(next + i);
}

// Rows into scratch of stride ld, zeros up to the next multiple of 16 rows.
template <class E, class T>
inline void copy_rows(E* dst, int64_t ld, const T* src, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    prefetch_after(src + r * stride, width);
    copy_row(dst + r * ld, ld, src + r * stride, width);
  }
  std::memset(dst + rows * ld, 0, (padded(rows, 16) - rows) * ld * sizeof(E));
}

// 16 rows of scratch become a panel whose columns they are; ld is a multiple of 16 words.
template <class E>
inline void pack_columns(E* panel, const E* rows, int64_t ld) {
  const float* words = reinterpret_cast<const float*>(rows);
  const int64_t count = ld * sizeof(E) / 4;
  for (int64_t i = 0; i < count; i += 16) {
    float* square = reinterpret_cast<float*>(panel) + i * 16;
    transposed16(words + i, count, [=](int64_t r, int64_t c, Vec v) { store(square + r * 16 + c, v); });
  }
}

// Rows become rows of panels: panel p takes columns 16 p to 16 p + 15, k runs over the rows, zeros up to k.
template <class T>
inline void pack_rows(float* panels, int64_t k, const T* src, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t p = 0; p * 16 < width; ++p) {
    float* panel = panels + p * k * 16;
    const int64_t own = width - p * 16 < 16 ? width - p * 16 : 16;
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = src + r * stride + p * 16;
      if (p == 0) prefetch_after(row, width);
      if (own == 16) {
        for (int i = 0; i < 16; i += W) store(panel + r * 16 + i, load(row + i));
      } else {
        for (int64_t i = 0; i < 16; ++i) panel[r * 16 + i] = i < own ? widened(row[i]) : 0;
      }
    }
    std::memset(panel + rows * 16, 0, (k - rows) * 16 * sizeof(float));
  }
}

#if defined(__AVX512BF16__)
inline void pack_rows(bf16* panels, int64_t k, const bf16* src, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t p = 0; p * 16 < width; ++p) {
    bf16* panel = panels + p * k * 16;
    const int64_t own = width - p * 16 < 16 ? width - p * 16 : 16;
    const __mmask16 columns = static_cast<__mmask16>((1u << own) - 1);
    for (int64_t r = 0; r < rows; r += 2) {
      const bf16* row = src + r * stride + p * 16;
      if (p == 0) prefetch_after(row, width);
      __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, row));
      __m512i second = r + 1 < rows ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, row + stride))
                                    : _mm512_setzero_si512();
      _mm512_storeu_si512(panel + r * 16, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
    const int64_t filled = padded(rows, 2);
    std::memset(panel + filled * 16, 0, (k - filled) * 16 * sizeof(bf16));
  }
}
#endif

}  // namespace
