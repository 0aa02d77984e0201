// Attention of one sequence and head, a block of queries at a time; the block's scores stay in cache.
//
// DeBERTa's position terms depend on the distance from key to query, so a block of 16 rows needs only a band of the
// table: (largest place - smallest place) + number of keys distances. Query rows times the table with distances falling
// give content-to-position scores in which a step to the next key is a step to the next column; key rows times the table
// with distances rising give position-to-content scores in which a step to the next query is one. So both are read
// skewed, a row's start shifted against the row above, and only the second needs a transpose, 16 x 16 in registers.
#pragma once

#include "kernels.h"
#include "product.h"

namespace {

constexpr int64_t BLOCK = 64;  // queries

// Sizes of the scratch of an item, in elements; each buffer starts at a multiple of 64 bytes.
template <class Engine>
struct Scratch {
  using E = typename Engine::Element;
  int64_t depth;   // the head width as the k of a product
  int64_t span;    // keys, as columns and as the k of a product
  int64_t stride;  // of the scores
  int64_t bands;   // of a band of position scores

  E *queries, *keys, *key_panels, *value_panels, *weights;
  float *scores, *band, *mixed;
  int64_t bytes;

  Scratch(int64_t width, int64_t queries_, int64_t keys_, char* base) {
    depth = padded(width, 16 * Engine::WORD);
    span = padded(keys_, 32);
    stride = span + 16;  // rows whose distance is a power of two would share cache sets
    bands = 2 * span + 80;
    const int64_t block = padded(queries_ < BLOCK ? queries_ : BLOCK, 16);
    char* next = base;
    auto take = [&next](int64_t size) {
      char* here = next;
      next += padded(size, 64);
      return here;
    };
    queries = reinterpret_cast<E*>(take(block * depth * sizeof(E)));
    keys = reinterpret_cast<E*>(take(span * depth * sizeof(E)));
    key_panels = reinterpret_cast<E*>(take(span * depth * sizeof(E)));
    value_panels = reinterpret_cast<E*>(take(padded(width, 16) * span * sizeof(E)));
    scores = reinterpret_cast<float*>(take(block * stride * sizeof(float)));
    // In float32 the weights take the scores' place.
    weights = sizeof(E) == 4 ? reinterpret_cast<E*>(scores)
                             : reinterpret_cast<E*>(take(block * stride * sizeof(E)));
    band = reinterpret_cast<float*>(take((16 * bands + 16) * sizeof(float)));
    mixed = reinterpret_cast<float*>(take(block * padded(width, 16) * sizeof(float)));
    bytes = next - base;
  }
};

// dst[i][j] += src[j][i], 16 x 16.
inline void add_transposed16(float* dst, int64_t dst_stride, const float* src, int64_t src_stride) {
  transposed16(src, src_stride, [=](int64_t i, int64_t j, Vec v) {
    float* at = dst + i * dst_stride + j;
    store(at, load(at) + v);
  });
}

inline void put(float* p, Vec v, Vec* total) {
  store(p, v);
  *total += v;
}

// The sum is of the rounded weights, so that rounding cancels in the quotient.
inline void put(bf16* p, Vec v, Vec* total) {
  store(p, v);
  *total += load(p);
}

inline Int lanes() {
  Int i;
  for (int n = 0; n < W; ++n) i[n] = n;
  return i;
}

// Softmax without its division: weights = e^(x - max x) of x = (scores + extra) * scale + bias inside [from, to), 0
// elsewhere up to `whole`, a multiple of 16. Returns the sum of the weights. What is null is 0.
template <class E>
inline float exponentials(float* scores, const float* extra, float scale, const float* bias, int64_t from, int64_t to,
                          int64_t whole, E* weights) {
  const Vec factor = all(scale), nothing = all(-__builtin_inff());
  Vec most = nothing;
  const int64_t inner = from ? 0 : to / W * W;  // whole vectors of what is attended
  int64_t j = 0;
  for (; j < inner; j += W) {
    Vec x = load(scores + j);
    if (extra) x += load(extra + j);
    x *= factor;
    if (bias) x += load(bias + j);
    store(scores + j, x);
    most = larger(most, x);
  }
  for (; j < whole; j += W) {
    Vec x = load(scores + j);
    if (extra) x += load(extra + j);
    x *= factor;
    if (bias) x += load(bias + j);
    Int place = lanes() + static_cast<int32_t>(j);
    Int attended = (place >= static_cast<int32_t>(from)) & (place < static_cast<int32_t>(to));
    x = choose(attended, x, nothing);
    store(scores + j, x);
    most = larger(most, x);
  }
  const Vec top = all(largest(most));
  Vec total = {};
  for (j = 0; j < whole; j += W) put(weights + j, exp_of_negative<sizeof(E) == 4 ? 7 : 4>(load(scores + j) - top), &total);
  return sum(total);
}

template <class T, class Engine>
void attention_item(const mlmfast::Attention& a, const mlmfast::AttentionItem& item, void* memory) {
  using E = typename Engine::Element;
  const int64_t width = a.width, columns = padded(width, 16);
  const int64_t first_query = a.cu_q[item.sequence];
  // Keys that some query of the item attends. Places are counted from the first of them: distances stay what they are.
  int64_t before = 0, keys = a.cu_k[item.sequence + 1] - a.cu_k[item.sequence];
  if (a.window >= 0) {
    int64_t least = item.first, greatest = item.last - 1;
    if (a.q_positions) {
      least = greatest = a.q_positions[first_query + item.first];
      for (int64_t i = item.first; i < item.last; ++i) {
        const int64_t place = a.q_positions[first_query + i];
        least = place < least ? place : least;
        greatest = place > greatest ? place : greatest;
      }
    }
    before = least - a.window > 0 ? least - a.window : 0;
    keys = (greatest + a.window + 1 < keys ? greatest + a.window + 1 : keys) - before;
  }
  const int64_t first_key = a.cu_k[item.sequence] + before;
  const Scratch<Engine> s(width, item.last - item.first, keys, static_cast<char*>(memory));
  const T* q = static_cast<const T*>(a.q) + item.head * a.q_head;
  const T* k = static_cast<const T*>(a.k) + item.head * a.k_head + first_key * a.k_row;
  const T* v = static_cast<const T*>(a.v) + item.head * a.v_head + first_key * a.v_row;
  const E* key_table = static_cast<const E*>(a.key_panels);
  const E* query_table = static_cast<const E*>(a.query_panels);
  const int64_t table = padded(a.farthest - a.nearest + 1, 16) * s.depth;
  if (key_table) key_table += item.head * table;
  if (query_table) query_table += item.head * table;
  const int64_t panel = 16 * s.depth;  // a panel's size
  const int64_t rising = -a.nearest, falling = a.farthest;  // the columns of distance 0

  Engine::begin();
  copy_rows(s.keys, s.depth, k, a.k_row, keys, width);
  for (int64_t j = 0; j < keys; j += 16) pack_columns(s.key_panels + j * s.depth, s.keys + j * s.depth, s.depth);
  pack_rows(s.value_panels, s.span, v, a.v_row, keys, width);

  for (int64_t start = item.first; start < item.last; start += BLOCK) {
    const int64_t count = item.last - start < BLOCK ? item.last - start : BLOCK;
    int64_t place[BLOCK], least = INT64_MAX, greatest = -1;
    bool neighbours = true;
    for (int64_t i = 0; i < count; ++i) {
      place[i] = (a.q_positions ? a.q_positions[first_query + start + i] : start + i) - before;
      least = place[i] < least ? place[i] : least;
      greatest = place[i] > greatest ? place[i] : greatest;
      neighbours = neighbours && place[i] == place[0] + i;
    }
    // Keys [low, high) are within the window of some query.
    int64_t low = 0, high = keys;
    if (a.window >= 0) {
      low = least - a.window > 0 ? (least - a.window) / 32 * 32 : 0;
      high = greatest + a.window + 1 < keys ? greatest + a.window + 1 : keys;
    }
    const int64_t span = padded(high - low, 16);
    copy_rows(s.queries, s.depth, q + (first_query + start) * a.q_row, a.q_row, count, width);
    Engine::product(s.queries, s.depth, s.key_panels + low * s.depth, panel, s.depth, count, span / 16, s.scores,
                    s.stride);

    if (query_table) {  // position-to-content: k . pos_query[place - j]
      for (int64_t j = low; j < high; j += 16) {
        const int64_t own = high - j < 16 ? high - j : 16;
        const int64_t begin = (least - (j + own - 1) + rising) / 16 * 16, end = greatest - j + rising + 1;
        Engine::product(s.keys + j * s.depth, s.depth, query_table + begin * s.depth, panel, s.depth, own,
                        padded(end - begin, 16) / 16, s.band, s.bands);
        float* scores = s.scores + (j - low);
        if (neighbours) {
          for (int64_t i = 0; i < count; i += 16)
            add_transposed16(scores + i * s.stride, s.stride, s.band + (place[i] - j + rising - begin), s.bands - 1);
        } else {
          for (int64_t i = 0; i < count; ++i)
            for (int64_t n = 0; n < own; ++n)
              scores[i * s.stride + n] += s.band[n * s.bands + (place[i] - j - n + rising - begin)];
        }
      }
    }

    const int64_t deep = padded(span, 16 * Engine::WORD);
    float sums[BLOCK];
    for (int64_t r = 0; r < count; r += 16) {
      const int64_t own = count - r < 16 ? count - r : 16;
      int64_t begin = 0;
      if (key_table) {  // content-to-position: q . pos_key[place - j], the columns in falling order of distance
        int64_t smallest = place[r], largest = place[r];
        for (int64_t i = r; i < r + own; ++i) {
          smallest = place[i] < smallest ? place[i] : smallest;
          largest = place[i] > largest ? place[i] : largest;
        }
        begin = (falling - largest + low) / 16 * 16;
        const int64_t end = falling - smallest + high;
        Engine::product(s.queries + r * s.depth, s.depth, key_table + begin * s.depth, panel, s.depth, own,
                        padded(end - begin, 16) / 16, s.band, s.bands);
      }
      for (int64_t i = r; i < r + own; ++i) {
        const float* extra = key_table ? s.band + (i - r) * s.bands + (falling - place[i] + low - begin) : nullptr;
        int64_t from = 0, to = high - low;
        if (a.window >= 0) {
          from = place[i] - a.window > low ? place[i] - a.window - low : 0;
          to = place[i] + a.window + 1 < high ? place[i] + a.window + 1 - low : to;
        }
        // Like the columns of a table in falling order: a step to the next key is a step to the next number.
        const float* bias =
            a.falling_bias ? a.falling_bias + item.head * a.bias_head + (falling - place[i] + low) : nullptr;
        E* weights = s.weights + i * s.stride;
        sums[i] = exponentials(s.scores + i * s.stride, extra, a.scale, bias, from, to, span, weights);
        for (int64_t j = span; j < deep; ++j) weights[j] = E{};
      }
    }

    Engine::product(s.weights, s.stride, s.value_panels + low * 16, 16 * s.span, deep, count, columns / 16, s.mixed,
                    columns);
    for (int64_t i = 0; i < count; ++i) {
      T* out = static_cast<T*>(a.out) + ((first_query + start + i) * a.heads + item.head) * width;
      const Vec share = all(1 / sums[i]);
      const float* mixed = s.mixed + i * columns;
      int64_t n = 0;
      for (; n + W <= width; n += W) store(out + n, load(mixed + n) * share);
      if (n < width) store(out + n, load(mixed + n) * share, width - n);
    }
  }
  Engine::end();
}

template <class Engine>
int64_t attention_scratch(int64_t width, int64_t queries, int64_t keys) {
  return Scratch<Engine>(width, queries, keys, nullptr).bytes;
}

template <class Engine>
int64_t table_bytes(int64_t width, int64_t count) {
  return padded(count, 16) * padded(width, 16 * Engine::WORD) * sizeof(typename Engine::Element);
}

template <class T, class Engine>
void pack_table(const mlmfast::Table& t, int64_t head, int64_t first, int64_t last, void* panels) {
  using E = typename Engine::Element;
  const int64_t depth = padded(t.width, 16 * Engine::WORD);
  E* of_head = static_cast<E*>(panels) + head * padded(t.count, 16) * depth;
  const T* table = static_cast<const T*>(t.table) + head * t.head_stride;
  // One panel's rows; the widest head that is known is 256.
  constexpr int64_t MOST = 1024;
  alignas(64) E rows[16 * MOST];
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = 0; c < 16; ++c) {
      const int64_t column = p * 16 + c;
      if (column < t.count) {
        copy_row(rows + c * depth, depth, table + t.rows[column] * t.row_stride, t.width);
      } else {
        std::memset(rows + c * depth, 0, depth * sizeof(E));
      }
    }
    pack_columns(of_head + p * 16 * depth, rows, depth);
  }
}

}  // namespace
