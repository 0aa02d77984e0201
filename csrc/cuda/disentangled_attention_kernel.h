// disentangled_attention on the tensor cores: a block of 64 queries of one head against 64 keys at a time.
//
// A score of query i and key j is (q_i . k_j + q_i . PosKey[r] + k_j . PosQuery[r]) * scale with r the table row of distance
// i - j. Between 64 queries and 64 keys lie 127 distances. Their table rows are brought to shared memory once, and a
// warp, which has 16 of the queries, multiplies its queries with the 79 that it can reach, and 16 keys at a time with
// the 31 between them. It puts these bands down in shared memory and reads them back skewed: what query i adds for key j
// stands at [i][i - j + a constant]. Neither term ever reaches device memory.
//
// From one block of keys to the next all distances fall by 64, so half of the table rows stay where they are.
#pragma once

#include "rows.h"

namespace mlmfast::cuda {

struct Attention {
  const void *q, *k, *v;               // [Tq, H, D], [Tk, H, D], [Tk, H, D]
  const void *pos_key, *pos_query;     // [P, H, D] or null
  void* out;                           // [Tq, H, D]
  const int32_t *cu_q, *cu_k;          // [C + 1]
  const int64_t* q_positions;          // [Tq] or null: queries and keys are the same rows
  const int32_t* buckets;              // [2 reach + 1]
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head;  // strides, in numbers
  int64_t key_row, key_head, query_row, query_head;                        // of the tables
  int32_t reach, width;
  int32_t window;  // greatest distance that a query of a few sees, or -1
  float log2_scale;  // of scores, in powers of 2
};

constexpr int SIDE = 64;      // queries and keys of a block
constexpr int WARPS = 4;      // of 16 queries each
constexpr int THREADS = 32 * WARPS;
constexpr int BAND_KEY = 84;     // numbers from row to row of a band: 80, and some so that banks differ
constexpr int BAND_QUERY = 36;   // 32, and some
constexpr int SCRATCH = 16 * BAND_KEY;  // numbers of a warp's bands

// The table row of a distance.
MLMFAST_BOTH int32_t table_row(const int32_t* buckets, int reach, int distance) {
  return buckets[(distance < -reach ? -reach : distance > reach ? reach : distance) + reach];
}

// Where things lie in shared memory, in bytes. Rows have 8 numbers more than a head, so that 8 of them at a time meet
// different banks.
template <int D>
struct Layout {
  static constexpr int ROW = D + 8;
  static constexpr int TILE = SIDE * ROW * 2;
  static constexpr int KEYS = TILE, VALUES = 2 * TILE, POS_KEY = 3 * TILE, POS_QUERY = 5 * TILE, BANDS = 7 * TILE;
  static constexpr int BYTES = BANDS + WARPS * SCRATCH * 4;
};

// Rows of some tokens to shared memory, zeros past the last one.
template <int D, class T>
MLMFAST_DEVICE void bring_rows(T* shared, const T* rows, int64_t stride, int first, int count) {
  constexpr int PIECES = D / 8;
  for (int piece = thread(); piece < SIDE * PIECES; piece += THREADS) {
    const int row = piece / PIECES, column = piece % PIECES * 8;
    const bool there = first + row < count;
    copy_16(shared + row * Layout<D>::ROW + column, rows + (there ? first + row : 0) * stride + column, there);
  }
}

// The table rows of the distances nearest, nearest + 1, ... to one half of a table's place in shared memory.
template <int D, class T>
MLMFAST_DEVICE void bring_table(T* shared, const T* table, int64_t stride, const Attention& a, int nearest) {
  constexpr int PIECES = D / 8;
  for (int piece = thread(); piece < SIDE * PIECES; piece += THREADS) {
    const int row = piece / PIECES, column = piece % PIECES * 8;
    copy_16(shared + row * Layout<D>::ROW + column,
            table + table_row(a.buckets, a.reach, nearest + row) * stride + column, true);
  }
}

// 16 rows of shared memory as fragments of a left operand, `[16, D]`.
template <int D, class T>
MLMFAST_DEVICE void left_operand(uint32_t (&fragments)[D / 16][4], const T* rows) {
  const int lane = thread() % 32;
  for (int step = 0; step < D / 16; ++step)
    load_matrices(fragments[step], rows + lane % 16 * Layout<D>::ROW + step * 16 + lane / 16 * 8);
}

// sums[16, 8] += left[16, D] @ rows[8, D].T
template <int D, class T>
MLMFAST_DEVICE void multiply_rows(float (&sums)[4], const uint32_t (&left)[D / 16][4], const T* rows) {
  const int lane = thread() % 32;
#pragma unroll
  for (int step = 0; step < D / 32; ++step) {
    uint32_t right[4];  // of two steps
    load_matrices(right, rows + lane % 8 * Layout<D>::ROW + step * 32 + lane / 8 * 8);
    multiply<T>(sums, left[2 * step], {right[0], right[1]});
    multiply<T>(sums, left[2 * step + 1], {right[2], right[3]});
  }
}

// A result of `multiply` to a band in shared memory.
MLMFAST_DEVICE void put_down(float* band, int stride, const float (&sums)[4]) {
  const int lane = thread() % 32;
  float* place = band + lane / 4 * stride + lane % 4 * 2;
  place[0] = sums[0], place[1] = sums[1];
  place[8 * stride] = sums[2], place[8 * stride + 1] = sums[3];
}

template <int D, class T>
MLMFAST_DEVICE void attend_block(const Attention& a, int sequence, int head, int first_query, char* shared) {
  using L = Layout<D>;
  const int q_begin = a.cu_q[sequence], k_begin = a.cu_k[sequence];
  const int queries = a.cu_q[sequence + 1] - q_begin, keys = a.cu_k[sequence + 1] - k_begin;
  if (first_query >= queries) return;

  T* const query_tile = reinterpret_cast<T*>(shared);
  T* const key_tile = reinterpret_cast<T*>(shared + L::KEYS);
  T* const value_tile = reinterpret_cast<T*>(shared + L::VALUES);
  T* const tables[2] = {reinterpret_cast<T*>(shared + L::POS_KEY), reinterpret_cast<T*>(shared + L::POS_QUERY)};
  const int lane = thread() % 32, warp = thread() / 32;
  const int r0 = 16 * warp;  // the warp's first query in the block
  const int g = lane / 4, t = lane % 4 * 2;  // a fragment's first row and column of this lane
  float* const band = reinterpret_cast<float*>(shared + L::BANDS) + warp * SCRATCH;

  const T* const k = static_cast<const T*>(a.k) + k_begin * a.k_row + head * a.k_head;
  const T* const v = static_cast<const T*>(a.v) + k_begin * a.v_row + head * a.v_head;
  const T* const pos_key = static_cast<const T*>(a.pos_key) + (a.pos_key ? head * a.key_head : 0);
  const T* const pos_query = static_cast<const T*>(a.pos_query) + (a.pos_query ? head * a.query_head : 0);

  bring_rows<D>(query_tile, static_cast<const T*>(a.q) + q_begin * a.q_row + head * a.q_head, a.q_row, first_query, queries);

  float mixed[D / 8][4] = {};
  float greatest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // of rows g and g + 8
  for (int first_key = 0, turn = 0; first_key < keys; first_key += SIDE, turn ^= 1) {
    // Row x of a table's 128 is of distance nearest + x; rows 0 to 63 are in half `turn`, the others in the other one.
    const int nearest = first_query - first_key - (SIDE - 1);
    sync_block();  // the last block's keys have been read
    bring_rows<D>(key_tile, k, a.k_row, first_key, keys);
    bring_rows<D>(value_tile, v, a.v_row, first_key, keys);
    for (int far = 0; far < (first_key == 0 ? 2 : 1); ++far) {
      const int place = (turn ^ far) * SIDE * L::ROW;
      if (a.pos_key) bring_table<D>(tables[0] + place, pos_key, a.key_row, a, nearest + far * SIDE);
      if (a.pos_query) bring_table<D>(tables[1] + place, pos_query, a.query_row, a, nearest + far * SIDE);
    }
    arrived();
    sync_block();

    float scores[SIDE / 8][4] = {};
    uint32_t query[D / 16][4];  // anew for each block of keys: kept, it would take the registers of the rest
    left_operand<D>(query, query_tile + r0 * L::ROW);
#pragma unroll
    for (int n = 0; n < SIDE / 8; ++n) multiply_rows<D>(scores[n], query, key_tile + 8 * n * L::ROW);

    if (a.pos_key) {
      // Query r0 + i and key j: x = r0 + i - j + 63, at [i][i - j + 63] of a band that begins at x = r0.
#pragma unroll
      for (int n = 0; n < 10; ++n) {
        const int x = r0 + 8 * n;
        float sums[4] = {};
        multiply_rows<D>(sums, query, tables[0] + ((x / SIDE ^ turn) * SIDE + x % SIDE) * L::ROW);
        put_down(band + 8 * n, BAND_KEY, sums);
      }
      sync_warp();
#pragma unroll
      for (int n = 0; n < SIDE / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = g + e / 2 * 8, j = 8 * n + t + e % 2;
          scores[n][e] += band[i * BAND_KEY + i - j + SIDE - 1];
        }
      sync_warp();
    }
    if (a.pos_query) {
      // Keys 16 m + c, two times 16 at a time: at [c][i - c + 15] of a band that begins at x = r0 - 16 m + 48.
#pragma unroll
      for (int m = 0; m < SIDE / 16; ++m) {
        float* const own = band + m % 2 * 16 * BAND_QUERY;
        uint32_t key[D / 16][4];
        left_operand<D>(key, key_tile + 16 * m * L::ROW);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int x = r0 - 16 * m + 48 + 8 * n;
          float sums[4] = {};
          multiply_rows<D>(sums, key, tables[1] + ((x / SIDE ^ turn) * SIDE + x % SIDE) * L::ROW);
          put_down(own + 8 * n, BAND_QUERY, sums);
        }
        if (m % 2 == 0) continue;
        sync_warp();
#pragma unroll
        for (int n = 2 * m - 2; n < 2 * m + 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = g + e / 2 * 8, j = 8 * n + t + e % 2, c = j % 16;
            scores[n][e] += band[j / 16 % 2 * 16 * BAND_QUERY + c * BAND_QUERY + i - c + 15];
          }
        sync_warp();
      }
    }

    float fade[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = greatest[half];
#pragma unroll
      for (int n = 0; n < SIDE / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const bool there = first_key + 8 * n + t + e % 2 < keys;
          scores[n][e] = there ? scores[n][e] * a.log2_scale : -INFINITY;
          highest = fmaxf(highest, scores[n][e]);
        }
      highest = over_lanes<4>(highest, Greater());  // finite: a block has a key
      fade[half] = power_of_2(greatest[half] - highest);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < SIDE / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) sum += scores[n][e] = power_of_2(scores[n][e] - highest);
      total[half] = total[half] * fade[half] + over_lanes<4>(sum, Sum());
      greatest[half] = highest;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) mixed[n][e] *= fade[e / 2];
#pragma unroll
    for (int step = 0; step < SIDE / 16; ++step) {
      const float(&low)[4] = scores[2 * step], (&high)[4] = scores[2 * step + 1];
      const uint32_t weights[4] = {pair<T>(low[0], low[1]), pair<T>(low[2], low[3]), pair<T>(high[0], high[1]),
                                   pair<T>(high[2], high[3])};
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t values[4];  // of 16 keys and two times 8 columns
        load_matrices_turned(values, value_tile + (16 * step + lane % 16) * L::ROW + 16 * n + lane / 16 * 8);
        multiply<T>(mixed[2 * n], weights, {values[0], values[1]});
        multiply<T>(mixed[2 * n + 1], weights, {values[2], values[3]});
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query_row = first_query + r0 + g + 8 * half;
    if (query_row >= queries) continue;
    T* const out = static_cast<T*>(a.out) + (q_begin + query_row) * a.out_row + head * a.out_head + t;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<uint32_t*>(out + 8 * n) = pair<T>(mixed[n][2 * half] / total[half], mixed[n][2 * half + 1] / total[half]);
  }
}

// ---- few queries, at any places: a block each, on the plain cores

// Eight 16-bit numbers, 16 bytes apart from the next.
template <class T>
struct alignas(16) Eight {
  T numbers[8];
};

template <int D>
struct FewLayout {
  static constexpr int KEYS = 2 * THREADS;  // at a time
  static constexpr int GROUPS = THREADS / (D / 8);
  static constexpr int QUERY = 0, WEIGHTS = QUERY + D, SHARED = WEIGHTS + KEYS, MIXED = SHARED + WARPS;
  static constexpr int BYTES = (MIXED + GROUPS * D) * 4;
};

// Its memory traffic is what it costs: every key, value and table row that the query meets is read once, in 16 bytes.
template <int D, class T>
MLMFAST_DEVICE void attend_few(const Attention& a, int sequences, int query_row, int head, char* memory) {
  using L = FewLayout<D>;
  float* const shared = reinterpret_cast<float*>(memory);
  float* const query = shared + L::QUERY;
  float* const weights = shared + L::WEIGHTS;
  const int sequence = sequence_of(a.cu_q, sequences, query_row);
  const int k_begin = a.cu_k[sequence], keys = a.cu_k[sequence + 1] - k_begin;
  const int place = a.q_positions ? static_cast<int>(a.q_positions[query_row]) : query_row - a.cu_q[sequence];
  const T* const q = static_cast<const T*>(a.q) + query_row * a.q_row + head * a.q_head;
  const T* const k = static_cast<const T*>(a.k) + k_begin * a.k_row + head * a.k_head;
  const T* const v = static_cast<const T*>(a.v) + k_begin * a.v_row + head * a.v_head;
  const T* const pos_key = static_cast<const T*>(a.pos_key) + (a.pos_key ? head * a.key_head : 0);
  const T* const pos_query = static_cast<const T*>(a.pos_query) + (a.pos_query ? head * a.query_head : 0);
  for (int d = thread(); d < D; d += THREADS) query[d] = to_float(q[d]);

  const int piece = thread() % (D / 8), group = thread() / (D / 8);
  float mixed[8] = {}, greatest = -INFINITY, total = 0;
  const int begin = a.window >= 0 && place > a.window ? place - a.window : 0;
  const int end = a.window >= 0 && keys - place > a.window ? place + a.window + 1 : keys;
  for (int first = begin; first < end; first += L::KEYS) {
    sync_block();  // the query is there; the weights have been read
    const int count = end - first < L::KEYS ? end - first : L::KEYS;
    float highest = -INFINITY;
    for (int j = thread(); j < count; j += THREADS) {
      const int64_t row = a.pos_key || a.pos_query ? table_row(a.buckets, a.reach, place - first - j) : 0;
      float score = 0;
#pragma unroll
      for (int d = 0; d < D; d += 8) {
        const Eight<T> key = *reinterpret_cast<const Eight<T>*>(k + (first + j) * a.k_row + d);
        Eight<T> of_key{}, of_query{};
        if (a.pos_key) of_key = *reinterpret_cast<const Eight<T>*>(pos_key + row * a.key_row + d);
        if (a.pos_query) of_query = *reinterpret_cast<const Eight<T>*>(pos_query + row * a.query_row + d);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float key_e = to_float(key.numbers[e]);
          score += query[d + e] * (key_e + to_float(of_key.numbers[e])) + key_e * to_float(of_query.numbers[e]);
        }
      }
      weights[j] = score *= a.log2_scale;
      highest = fmaxf(highest, score);
    }
    highest = fmaxf(greatest, over_block<WARPS>(highest, shared + L::SHARED, Greater()));  // finite: there is a key
    const float fade = power_of_2(greatest - highest);
    float sum = 0;
    for (int j = thread(); j < count; j += THREADS) sum += weights[j] = power_of_2(weights[j] - highest);
    total = total * fade + over_block<WARPS>(sum, shared + L::SHARED, Sum());  // and all weights are there
    greatest = highest;
#pragma unroll
    for (int e = 0; e < 8; ++e) mixed[e] *= fade;
    for (int j = group; j < count; j += L::GROUPS) {
      const Eight<T> value = *reinterpret_cast<const Eight<T>*>(v + (first + j) * a.v_row + 8 * piece);
#pragma unroll
      for (int e = 0; e < 8; ++e) mixed[e] += weights[j] * to_float(value.numbers[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) shared[L::MIXED + group * D + 8 * piece + e] = mixed[e];
  sync_block();
  const float whole = total > 0 ? total : 1;  // a query that sees no key mixes nothing
  T* const out = static_cast<T*>(a.out) + query_row * a.out_row + head * a.out_head;
  for (int d = 2 * thread(); d < D; d += 2 * THREADS) {
    float both[2] = {0, 0};
    for (int other = 0; other < L::GROUPS; ++other)
      for (int e = 0; e < 2; ++e) both[e] += shared[L::MIXED + other * D + d + e];
    *reinterpret_cast<uint32_t*>(out + d) = pair<T>(both[0] / whole, both[1] / whole);
  }
}

}  // namespace mlmfast::cuda
