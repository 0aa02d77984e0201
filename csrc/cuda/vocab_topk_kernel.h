// vocab_topk for few rows: a block has a part of the vocabulary, 128 tokens at a time; then a block a row puts the parts
// together.
//
// While a warp multiplies it has 16 of the tokens and all rows; after that it has some of the rows and all 128 tokens. The
// best k of a row are kept sorted, one in each lane, so a tile that brings nothing better costs a comparison; of N tokens in
// no order about k ln(N / k) are put in. Tokens compare by logit, then by id, which no order of work can change. Parts follow
// from the vocabulary's size alone, and every sum is added up in one order, so results are the same from run to run.
#pragma once

#include "rows.h"
#include "skinny_product.h"

namespace mlmfast::cuda {

struct VocabTopk {
  const void *hidden, *vocabulary, *bias;  // [R, d], [V, d], [V] or null
  float* values;                           // [R, parts, k], the best logits of each part
  int32_t* ids;                            // [R, parts, k], NOBODY where a part has no more
  float *peaks, *totals;                   // [R, parts], the greatest logit, the sum of exponentials relative to it
  float* logprobs;                         // [R, k]
  int64_t* best_ids;                       // [R, k]
  int64_t hidden_row, vocabulary_row;      // strides, in numbers
  int32_t rows, tokens, width, k, parts;
  float inverse_temperature;
};

constexpr int MOST_BEST = 32;     // a lane each
constexpr int TOPK_WARPS = 8;
constexpr int TOPK_THREADS = 32 * TOPK_WARPS;
constexpr int TILE_TOKENS = 16 * TOPK_WARPS;
constexpr int LOGITS_ROW = TILE_TOKENS + 4;  // so that a fragment's rows and columns meet different banks
constexpr int MOST_PARTS = TOPK_THREADS;     // two blocks a multiprocessor of an H200; and a thread each when put together
constexpr int32_t NOBODY = 0x7fffffff;
constexpr float LOG2_E = 1.4426950408889634f;

MLMFAST_BOTH int topk_parts(int tokens) {
  const int tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
  return tiles < MOST_PARTS ? tiles : MOST_PARTS;
}

template <int NT>
struct TopkLayout {
  static constexpr int KEPT = 8 * NT * LOGITS_ROW * 4;  // [8 NT][32], the best of a row and what each lane has added up
  static constexpr int BYTES = KEPT + 8 * NT * 32 * 16;
};

struct Token {
  float logit;
  int32_t id;
};

// A sum of exponentials relative to the greatest of them.
struct Partition {
  float peak = -INFINITY, total = 0;
};

// What a lane holds of a row between tiles. In shared memory: the registers are the product's.
struct alignas(16) Held {
  Token kept;
  Partition partition;
};

MLMFAST_DEVICE Token nobody() { return {-INFINITY, NOBODY}; }
// A logit that is not a number is before none.
MLMFAST_DEVICE bool before(const Token& a, const Token& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Puts each lane's token where it belongs among a warp's kept ones, of which lane i has the i-th; only k need be right.
MLMFAST_DEVICE void keep(Token& kept, Token offered, int k) {
  const int lane = thread() % 32;
  for (;;) {
    const Token last{of_lane(kept.logit, k - 1), of_lane(kept.id, k - 1)};
    const bool better = before(offered, last);
    if (!in_any_lane(better)) return;
    Token best = better ? offered : nobody();
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      const Token other{exchange(best.logit, mask), exchange(best.id, mask)};
      if (before(other, best)) best = other;
    }
    if (offered.id == best.id) offered = nobody();
    const int above_lane = lane == 0 ? 0 : lane - 1;
    const Token above{of_lane(kept.logit, above_lane), of_lane(kept.id, above_lane)};
    if (before(best, kept)) kept = lane > 0 && before(best, above) ? above : best;
  }
}

MLMFAST_DEVICE float share(float logit, float peak) {
  return power_of_2((logit - (peak == -INFINITY ? 0 : peak)) * LOG2_E);
}

// The partition of all lanes, in all of them.
MLMFAST_DEVICE Partition over_warp(const Partition& mine) {
  const float peak = over_lanes<32>(mine.peak, Greater());
  return {peak, over_lanes<32>(mine.total * share(mine.peak, peak), Sum())};
}

template <int NT, class T>
MLMFAST_DEVICE void topk_part(const VocabTopk& a, int part, char* memory) {
  float* const logits = reinterpret_cast<float*>(memory);  // [8 NT][LOGITS_ROW]
  const int warp = thread() / 32, lane = thread() % 32;
  const T* const hidden = static_cast<const T*>(a.hidden);
  const T* const vocabulary = static_cast<const T*>(a.vocabulary);
  const T* const bias = static_cast<const T*>(a.bias);
  const int tiles = (a.tokens + TILE_TOKENS - 1) / TILE_TOKENS;
  const int first_tile = static_cast<int>(static_cast<int64_t>(part) * tiles / a.parts);
  const int last_tile = static_cast<int>(static_cast<int64_t>(part + 1) * tiles / a.parts);
  const auto of_tile = [&](int tile) {
    const int first = tile * TILE_TOKENS + 16 * warp;  // of this warp; past the last token for some of the last tile's
    const T* const place[1] = {vocabulary + first * a.vocabulary_row};
    return operands<1, NT, T>(place, a.vocabulary_row, a.tokens - first, hidden, a.hidden_row, a.rows, 0, a.width);
  };

  // The warp's rows are warp, warp + 8, ...
  Held* const held = reinterpret_cast<Held*>(memory + TopkLayout<NT>::KEPT) + thread();
  for (int n = 0; n < NT; ++n) held[n * TOPK_THREADS] = {nobody(), Partition()};
  Ring<1, NT> ring;
  auto o = of_tile(first_tile);
  fill_weights(ring, o);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const int first = tile * TILE_TOKENS;
    float sums[1][NT][4] = {};
    fill_x(ring, o);
    multiply_few(sums, ring, o);
    if (tile + 1 < last_tile) {  // under way while this tile's logits are looked at
      o = of_tile(tile + 1);
      fill_weights(ring, o);
    }
    sync_block();  // the last tile's logits have been read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = 16 * warp + lane / 4 + 8 * half;
      const bool there = first + j < a.tokens;
      const float more = there && bias ? to_float(bias[first + j]) : 0;
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          logits[(8 * n + lane % 4 * 2 + e) * LOGITS_ROW + j] =
              there ? (sums[0][n][2 * half + e] + more) * a.inverse_temperature : -INFINITY;
    }
    sync_block();
#pragma unroll 1
    for (int n = 0; n < NT && warp + 8 * n < a.rows; ++n) {
      const float* const row = logits + (warp + 8 * n) * LOGITS_ROW + lane;
      Held mine = held[n * TOPK_THREADS];
      float peak = mine.partition.peak;
#pragma unroll
      for (int j = 0; j < TILE_TOKENS; j += 32) peak = fmaxf(peak, row[j]);
      float total = mine.partition.total * share(mine.partition.peak, peak);
#pragma unroll
      for (int j = 0; j < TILE_TOKENS; j += 32) total += share(row[j], peak);
      mine.partition = {peak, total};
#pragma unroll 1
      for (int j = lane; j < TILE_TOKENS; j += 32)
        keep(mine.kept, first + j < a.tokens ? Token{row[j - lane], first + j} : nobody(), a.k);
      held[n * TOPK_THREADS] = mine;
    }
  }
#pragma unroll 1
  for (int n = 0; n < NT && warp + 8 * n < a.rows; ++n) {
    const int row = warp + 8 * n;
    const Held mine = held[n * TOPK_THREADS];
    const Partition whole = over_warp(mine.partition);
    const int64_t at = static_cast<int64_t>(row) * a.parts + part;
    if (lane == 0) a.peaks[at] = whole.peak, a.totals[at] = whole.total;
    if (lane < a.k) a.values[at * a.k + lane] = mine.kept.logit, a.ids[at * a.k + lane] = mine.kept.id;
  }
}

struct TopkRowLayout {
  static constexpr int VALUES = 0, IDS = TOPK_THREADS, ROOM = 2 * TOPK_THREADS;  // in numbers of 4 bytes
  static constexpr int BYTES = (ROOM + TOPK_WARPS) * 4;
};

// Each warp puts an eighth of the parts together, then the first one what all have.
MLMFAST_DEVICE void topk_row(const VocabTopk& a, int row, char* memory) {
  float* const values = reinterpret_cast<float*>(memory) + TopkRowLayout::VALUES;
  int32_t* const ids = reinterpret_cast<int32_t*>(memory) + TopkRowLayout::IDS;
  float* const room = reinterpret_cast<float*>(memory) + TopkRowLayout::ROOM;
  const int warp = thread() / 32, lane = thread() % 32;
  const int64_t parts = static_cast<int64_t>(row) * a.parts;

  Partition mine;
  if (thread() < a.parts) mine = {a.peaks[parts + thread()], a.totals[parts + thread()]};
  const float peak = over_block<TOPK_WARPS>(mine.peak, room, Greater());
  const float total = over_block<TOPK_WARPS>(mine.total * share(mine.peak, peak), room, Sum());

  Token kept = nobody();
  const int last = (warp + 1) * a.parts / TOPK_WARPS * a.k;
  for (int at = warp * a.parts / TOPK_WARPS * a.k; at < last; at += 32) {
    const bool there = at + lane < last;
    keep(kept, there ? Token{a.values[parts * a.k + at + lane], a.ids[parts * a.k + at + lane]} : nobody(), a.k);
  }
  values[thread()] = kept.logit, ids[thread()] = kept.id;
  sync_block();
  if (warp > 0) return;
  for (int other = 1; other < TOPK_WARPS; ++other)
    keep(kept, lane < a.k ? Token{values[32 * other + lane], ids[32 * other + lane]} : nobody(), a.k);
  if (lane >= a.k) return;
  const int64_t at = static_cast<int64_t>(row) * a.k + lane;
  a.logprobs[at] = kept.logit - (peak == -INFINITY ? 0 : peak) - logf(total);
  a.best_ids[at] = kept.id == NOBODY ? lane : kept.id;  // logits that are no numbers: neither is what is beside this id
}

}  // namespace mlmfast::cuda
