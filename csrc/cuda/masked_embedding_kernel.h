// masked_embedding for few rows: a block a row, which looks itself up among the masked ones.
#pragma once

#include "add_layer_norm_kernel.h"

namespace mlmfast::cuda {

struct MaskedEmbedding {
  const int64_t *token_ids, *masked_rows, *position_ids, *token_types;  // [T], [M], [T] or null, [T] or null
  const void *words, *positions, *types;                                // [V, e], [P, e] or null, [K, e] or null
  const void *norm_weight, *norm_bias;                                  // [e] or null
  const float* scales;                                                  // [C] or null
  const int32_t* cu_seqlens;                                            // [C + 1] or null
  void* out;                                                            // [T, e]
  int64_t mask_token_id, words_row, positions_row, types_row;           // strides, in numbers
  int32_t masks, copies, width;
  float eps;
};

template <class T>
MLMFAST_DEVICE void masked_embedding_row(const MaskedEmbedding& a, int row, char* memory) {
  float* const numbers = reinterpret_cast<float*>(memory);
  float* const room = numbers + a.width;
  float found = 0;
  for (int i = thread(); i < a.masks; i += NORM_THREADS)
    if (a.masked_rows[i] == row) found = 1;
  const bool masked = over_block<NORM_WARPS>(found, room, Greater()) > 0;
  const T* const word = static_cast<const T*>(a.words) + (masked ? a.mask_token_id : a.token_ids[row]) * a.words_row;
  const float scale = a.scales ? a.scales[sequence_of(a.cu_seqlens, a.copies, row)] : 1;
  const T* const position = static_cast<const T*>(a.positions) + (a.positions ? a.position_ids[row] * a.positions_row : 0);
  const T* const type = static_cast<const T*>(a.types) + (a.types && a.token_types ? a.token_types[row] * a.types_row : 0);
  for (int d = thread(); d < a.width; d += NORM_THREADS)
    numbers[d] = to_float(word[d]) * scale + (a.positions ? to_float(position[d]) : 0) + (a.types ? to_float(type[d]) : 0);
  if (a.norm_weight)
    layer_norm(numbers, a.width, static_cast<const T*>(a.norm_weight), static_cast<const T*>(a.norm_bias), a.eps, room);
  T* const out = static_cast<T*>(a.out) + static_cast<int64_t>(row) * a.width;
  for (int d = thread(); d < a.width; d += NORM_THREADS) out[d] = narrow<T>(numbers[d]);
}

}  // namespace mlmfast::cuda
