// One float vector as wide as the instruction set that this file is compiled for, and what the kernels do with it.
//
// Arithmetic is the compilers' own (GCC and clang vector extensions), so every path runs the same source; intrinsics
// stand only where no operator says the same. Everything is in an unnamed namespace: each path keeps its own copy, and
// no linker can hand one path's code to a processor that lacks its instructions. Standard headers with templates stay
// out of files that include this one, for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));  // bfloat16 as bits

struct bf16 {
  uint16_t bits;
};

inline float widened(float x) { return x; }
inline float widened(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec all(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const bf16* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  Int wide;
#if defined(__AVX512F__)
  wide = (Int)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  wide = (Int)_mm256_cvtepu16_epi32((__m128i)h);
#else
  for (int i = 0; i < W; ++i) wide[i] = h[i];
#endif
  return (Vec)(wide << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // rounds to nearest even, and keeps NaN
  std::memcpy(p, &h, sizeof h);
#else
  Int bits = (Int)v;
  Int rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Int kept = (bits >> 16) | 0x40;
  Int nan = v != v;
  rounded = (nan & kept) | (~nan & rounded);
  for (int i = 0; i < W; ++i) p[i].bits = static_cast<uint16_t>(rounded[i]);
#endif
}

// The first n < W elements; the others read 0 and are not written.
template <class T>
inline Vec load(const T* p, int64_t n) {
  T whole[W] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}

template <class T>
inline void store(T* p, Vec v, int64_t n) {
  T whole[W];
  store(whole, v);
  std::memcpy(p, whole, n * sizeof(T));
}

inline Vec choose(Int where, Vec yes, Vec no) { return (Vec)((where & (Int)yes) | (~where & (Int)no)); }
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return choose(a > b, a, b);
#endif
}

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  total = v[0];
  return total;
#endif
}

inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < W; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

// e^x for x <= 0; 0 below -87.3, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial, and 2^n
// put into the exponent. Degree 7 is right to about one unit in the last place, degree 4 to 2^-14, enough for what is
// rounded to bfloat16.
template <int degree = 7>
inline Vec exp_of_negative(Vec x) {
  static_assert(degree == 7 || degree == 4);
  const Vec magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  Vec shifted = x * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  Vec p = all(1.f / 24);
  if constexpr (degree == 7) {
    p = all(1.f / 5040);
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
  }
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  Vec power = (Vec)(((Int)shifted - 0x4b400000 + 127) << 23);
  return choose(x < -87.3f, Vec{}, p * power);
}

// A square of 16 x 16 words of 32 bits, transposed: calls put(i, j, v) with W words of column i of `src` from its row j
// on, for every i and every j that W divides.
template <class Put>
inline void transposed16(const float* src, int64_t stride, const Put& put) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    put(i, 0, (Vec)_mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
    put(i + 8, 0, (Vec)_mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
    put(i + 4, 0, (Vec)_mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
    put(i + 12, 0, (Vec)_mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; j += W) {
      Vec v;
      for (int n = 0; n < W; ++n) v[n] = src[(j + n) * stride + i];
      put(i, j, v);
    }
  }
#endif
}

}  // namespace
