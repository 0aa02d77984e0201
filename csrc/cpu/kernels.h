// What the ops ask of the processor: a table of inner kernels for each instruction set, all from the same source.
//
// kernels.cpp is compiled once for each path with that path's flags; isa.cpp picks a table at run time. The structs here
// are plain: they cross from code for every processor to code for one.
#pragma once

#include <cstdint>

namespace mlmfast {

// One packed attention, disentangled or plain. Elements are float or bfloat16, as T in the kernel says.
struct Attention {
  const void *q, *k, *v;                // [Tq, H, D], [Tk, H, D]
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements; D is contiguous
  void* out;                            // [Tq, H, D], contiguous
  const int32_t *cu_q, *cu_k;           // [C + 1]
  const int64_t* q_positions;           // [Tq] or null: the query's own row
  int64_t heads, width;                 // H, D
  float scale;
  int64_t window;                       // -1: none
  // Position tables of every head as panels, made by pack_table; null without that term.
  const void *key_panels, *query_panels;
  // What is added to each head's scaled scores by distance, from `farthest` down to `nearest` and then at least 15 numbers
  // that are read and not used; or null.
  const float* falling_bias;
  int64_t bias_head;                    // numbers from one head to the next
  int64_t longest;                      // most keys of a sequence
  int64_t nearest, farthest;            // smallest and greatest distance that the tables and the bias reach
};

// Queries [first, last) of a sequence in one head.
struct AttentionItem {
  int64_t sequence, head, first, last;
};

// Rows of a position table [P, H, D] in the order of `rows`, as panels of one head.
struct Table {
  const void* table;
  int64_t row_stride, head_stride, width;
  const int32_t* rows;  // [count] table rows
  int64_t count;
};

// Elements of x, residual and so on are float or bfloat16, as T in the kernel says; widths are contiguous.
struct AddLayerNorm {
  const void *x, *residual, *bias, *norm_weight, *norm_bias;  // [T, d], [T, d] or null, [d] or null, [d], [d] or null
  int64_t x_row, residual_row;
  void *out, *sum;  // [T, d], contiguous; null where the sum before its norm is not asked for
  int64_t width;
  float eps;
};

// Positions are rows of the tables: checked before.
struct Rotary {
  const void* x;                // [T, H, D]
  int64_t x_row, x_head;        // strides in elements; D is contiguous
  const float *cos, *sin;       // [P, half], contiguous
  const int64_t* position_ids;  // [T]
  void* out;                    // [T, H, D], contiguous
  int64_t heads, width, half;   // H, D; 2 * half <= D
};

// Ids are rows of their tables: checked before.
struct MaskedEmbedding {
  const int64_t *token_ids, *position_ids, *token_types;  // [T]; null token types are all 0
  const void *words, *positions, *types;                  // [V, e], [P, e] or null, [K, e] or null
  int64_t words_row, positions_row, types_row;
  const float* scales;                                    // [T] or null: each row's factor on its word
  const void *norm_weight, *norm_bias;                    // [e] or null
  void* out;                                              // [T, e], contiguous
  int64_t width;
  float eps;
};

// sums [rows, outer] = x [rows, inner] @ weight [outer, inner]^T, all float.
struct FewRows {
  const float *x, *weight;
  int64_t x_row, weight_row, rows, inner, outer;
  float* sums;  // contiguous
};

// Logits of some rows at `width` neighbouring tokens.
struct VocabTile {
  const void* logits;
  int64_t stride, width;
  const float* bias;  // [width] or null
  float temperature;
};

// Of a row's x = (logit + bias) / temperature over the tokens seen so far: the greatest, the sum of e^(x - greatest), and
// that of e^(x - greatest) (x - greatest).
struct VocabSums {
  double most, total, weighted;
};

struct Kernels {
  const char* name;
  // For float and bfloat16, in this order.
  // Bytes of scratch that a thread needs for items of at most `queries` queries and `keys` keys.
  int64_t (*attention_scratch[2])(int64_t width, int64_t queries, int64_t keys);
  void (*attention_item[2])(const Attention&, const AttentionItem&, void* scratch);
  // Bytes of one head's panels, and panels [first, last) of them.
  int64_t (*table_bytes[2])(int64_t width, int64_t count);
  void (*pack_table[2])(const Table&, int64_t head, int64_t first, int64_t last, void* panels);
  // Rows [first, last).
  void (*rotary[2])(const Rotary&, int64_t first, int64_t last);
  // Rows [first, last); scratch for one row.
  void (*add_layer_norm[2])(const AddLayerNorm&, int64_t first, int64_t last, float* scratch);
  void (*masked_embedding[2])(const MaskedEmbedding&, int64_t first, int64_t last, float* scratch);
  // Columns [first, last) of the result; of float alone.
  void (*few_rows)(const FewRows&, int64_t first, int64_t last);
  // One row of a tile of logits; scratch for a row filled up to a multiple of 64, left holding the row's x.
  void (*vocab_sums[2])(const VocabTile&, int64_t row, bool entropies, VocabSums*, float* scratch);
  float (*vocab_logit[2])(const VocabTile&, int64_t row, int64_t column);
  int64_t (*vocab_above[2])(const VocabTile&, int64_t row, float than);
  void (*vocab_best[2])(const VocabTile&, int64_t row, int64_t seen, int64_t k, bool last, float* values, int64_t* ids);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels;
#endif

// The table in use: the best that the processor has, unless `use_kernels` chose another.
const Kernels& kernels();

}  // namespace mlmfast
