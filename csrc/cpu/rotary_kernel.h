// rotary of a block of rows: each head's two halves turned, the rest of it copied.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { p->bits = narrowed(x); }

// out1 = x1 cos - x2 sin, out2 = x2 cos + x1 sin.
template <class T>
inline void turn(const T* x1, const T* x2, const float* cos, const float* sin, int64_t half, T* __restrict out1,
                 T* __restrict out2) {
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const Vec a = load(x1 + i), b = load(x2 + i), c = load(cos + i), s = load(sin + i);
    store(out1 + i, a * c - b * s);
    store(out2 + i, b * c + a * s);
  }
  // Small heads are nothing but this rest: partial vectors, filled through memory, would stall on every one.
  for (; i < half; ++i) {
    const float a = widened(x1[i]), b = widened(x2[i]);
    put(out1 + i, a * cos[i] - b * sin[i]);
    put(out2 + i, b * cos[i] + a * sin[i]);
  }
}

// Rows [first, last).
template <class T>
void rotary(const mlmfast::Rotary& a, int64_t first, int64_t last) {
  const int64_t turned = 2 * a.half;
  for (int64_t r = first; r < last; ++r) {
    const float* cos = a.cos + a.position_ids[r] * a.half;
    const float* sin = a.sin + a.position_ids[r] * a.half;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* x = static_cast<const T*>(a.x) + r * a.x_row + h * a.x_head;
      T* out = static_cast<T*>(a.out) + (r * a.heads + h) * a.width;
      turn(x, x + a.half, cos, sin, a.half, out, out + a.half);
      std::memcpy(out + turned, x + turned, (a.width - turned) * sizeof(T));
    }
  }
}

}  // namespace
