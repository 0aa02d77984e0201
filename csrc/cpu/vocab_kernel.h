// What the vocabulary ops do with one row of a tile of logits. A row's numbers are x = (logit + bias) / temperature, and
// every kernel computes them alike, to the bit: so a target is never counted as more probable than itself.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

template <class T>
struct VocabRow {
  const T* logits;
  const float* bias;
  float temperature;

  VocabRow(const mlmfast::VocabTile& tile, int64_t row)
      : logits(static_cast<const T*>(tile.logits) + row * tile.stride), bias(tile.bias), temperature(tile.temperature) {}

  Vec at(int64_t i) const {
    Vec x = load(logits + i);
    if (bias) x += load(bias + i);
    return temperature == 1 ? x : x / all(temperature);
  }

  float one(int64_t i) const {
    float x = widened(logits[i]);
    if (bias) x += bias[i];
    return temperature == 1 ? x : x / temperature;
  }
};

inline bool any(Int where) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)where, (__m512i)where);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)where, (__m256i)where);
#else
  return where[0] | where[1] | where[2] | where[3];
#endif
}

// Takes the tile's row into its running sums. The sum of this tile is in float32, that of all tiles in float64.
// Scratch is left with the row's x, filled up to whole vectors.
template <class T, bool entropies>
inline void add_vocab_row(const mlmfast::VocabTile& tile, int64_t r, mlmfast::VocabSums* sums, float* x) {
  const VocabRow<T> row(tile, r);
  const float nothing = -__builtin_inff();
  Vec most[4] = {all(nothing), all(nothing), all(nothing), all(nothing)};
  int64_t i = 0;
  for (; i + 4 * W <= tile.width; i += 4 * W) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const Vec v = row.at(i + n * W);
      store(x + i + n * W, v);
      most[n] = larger(most[n], v);
    }
  }
  float here = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  for (; i < tile.width; ++i) {
    x[i] = row.one(i);
    here = x[i] > here ? x[i] : here;
  }
  for (; i % (4 * W); ++i) x[i] = nothing;
  const int64_t whole = i;
  const float top = sums->most > here ? sums->most : here;
  const Vec anchor = all(top == nothing ? 0 : top);  // where every token is impossible so far, they add nothing
  Vec total[4] = {}, weighted[4] = {};
  for (i = 0; i < whole; i += 4 * W) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const Vec below = load(x + i + n * W) - anchor;
      const Vec e = exp_of_negative(below);
      total[n] += e;
      if (entropies) weighted[n] += choose(e > 0.f, e * below, Vec{});  // not 0 times infinity
    }
  }
  if (sums->most > nothing) {
    const double shift = static_cast<double>(sums->most) - top, factor = __builtin_exp(shift);
    sums->weighted = factor > 0 ? (sums->weighted + shift * sums->total) * factor : 0;
    sums->total *= factor;
  }
  sums->most = top;
  sums->total += sum((total[0] + total[1]) + (total[2] + total[3]));
  if (entropies) sums->weighted += sum((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

template <class T>
void vocab_sums(const mlmfast::VocabTile& tile, int64_t row, bool entropies, mlmfast::VocabSums* sums, float* scratch) {
  if (entropies) add_vocab_row<T, true>(tile, row, sums, scratch);
  else add_vocab_row<T, false>(tile, row, sums, scratch);
}

template <class T>
float vocab_logit(const mlmfast::VocabTile& tile, int64_t row, int64_t column) {
  return VocabRow<T>(tile, row).one(column);
}

// How many tokens of the tile's row are strictly above `than`.
template <class T>
int64_t vocab_above(const mlmfast::VocabTile& tile, int64_t r, float than) {
  const VocabRow<T> row(tile, r);
  Int less = {};  // a comparison gives -1
  int64_t i = 0;
  for (; i + W <= tile.width; i += W) less += row.at(i) > all(than);
  int64_t count = 0;
  for (; i < tile.width; ++i) count += row.one(i) > than;
  for (int n = 0; n < W; ++n) count -= less[n];
  return count;
}

// Whether a is further down the list than b: less probable, or as probable with a greater id. NaN is above everything,
// as in torch.topk.
inline bool worse(float a, int64_t a_id, float b, int64_t b_id) {
  auto key = [](float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
  };
  const int32_t first = key(a + 0.f), second = key(b + 0.f);  // -0 is 0, as in a comparison
  return first != second ? first < second : a_id > b_id;
}

// Puts (x, id) into the place `i` of a heap of `count` whose root is the worst, after moving better ones up.
inline void sift(float* values, int64_t* ids, int64_t count, int64_t i, float x, int64_t id) {
  for (int64_t child; (child = 2 * i + 1) < count; i = child) {
    if (child + 1 < count && worse(values[child + 1], ids[child + 1], values[child], ids[child])) ++child;
    if (!worse(values[child], ids[child], x, id)) break;
    values[i] = values[child], ids[i] = ids[child];
  }
  values[i] = x, ids[i] = id;
}

// Takes the tile's row into the k best so far: a heap of the min(k, seen) best, its root the worst. The last tile sorts
// it, best first.
template <class T>
void vocab_best(const mlmfast::VocabTile& tile, int64_t r, int64_t seen, int64_t k, bool last, float* values,
                int64_t* ids) {
  const VocabRow<T> row(tile, r);
  int64_t i = 0;
  if (seen < k) {
    int64_t held = seen;
    for (; i < tile.width && held < k; ++i, ++held) values[held] = row.one(i), ids[held] = seen + i;
    if (held == k || last)
      for (int64_t n = held / 2; n-- > 0;) sift(values, ids, held, n, values[n], ids[n]);
  }
  auto offer = [&](float x, int64_t id) {
    if (worse(values[0], ids[0], x, id)) sift(values, ids, k, 0, x, id);
  };
  for (; i + 4 * W <= tile.width; i += 4 * W) {
    const Vec worst = all(values[0]);
    Int hit[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) hit[n] = ~(row.at(i + n * W) <= worst);  // NaN too
    if (any((hit[0] | hit[1]) | (hit[2] | hit[3])))
      for (int64_t n = i; n < i + 4 * W; ++n) offer(row.one(n), seen + n);
  }
  for (; i < tile.width; ++i) offer(row.one(i), seen + i);
  if (!last) return;
  for (int64_t n = k; n-- > 1;) {
    const float x = values[n];
    const int64_t id = ids[n];
    values[n] = values[0], ids[n] = ids[0];
    sift(values, ids, n, 0, x, id);
  }
}

}  // namespace
