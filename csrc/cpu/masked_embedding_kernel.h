// masked_embedding of a block of rows: gathered, added up and normalised in one pass.
#pragma once

#include "kernels.h"
#include "row_norm.h"

namespace {

// Rows [first, last); scratch holds one row.
template <class T>
void masked_embedding(const mlmfast::MaskedEmbedding& a, int64_t first, int64_t last, float* row) {
  for (int64_t r = first; r < last; ++r) {
    const T* word = static_cast<const T*>(a.words) + a.token_ids[r] * a.words_row;
    const T* position =
        a.positions ? static_cast<const T*>(a.positions) + a.position_ids[r] * a.positions_row : nullptr;
    const T* type =
        a.types ? static_cast<const T*>(a.types) + (a.token_types ? a.token_types[r] * a.types_row : 0) : nullptr;
    const float scale = a.scales ? a.scales[r] : 1;
    const Vec factor = all(scale);
    const float total = row_sum(
        a.width,
        [&](int64_t i) {
          Vec v = load(word + i) * factor;
          if (position) v += load(position + i);
          if (type) v += load(type + i);
          store(row + i, v);
          return v;
        },
        [&](int64_t i) {
          float v = widened(word[i]) * scale;
          if (position) v += widened(position[i]);
          if (type) v += widened(type[i]);
          return row[i] = v;
        });
    T* out = static_cast<T*>(a.out) + r * a.width;
    if (a.norm_weight) {
      normalise(out, row, total, a.width, static_cast<const T*>(a.norm_weight), static_cast<const T*>(a.norm_bias),
                a.eps);
    } else {
      rounded(out, row, a.width);
    }
  }
}

}  // namespace
