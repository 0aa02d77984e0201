// What `vocab_logprob` and `vocab_topk` share: a tile of logits as it comes out of a product.
#pragma once

#include <optional>

#include "kernels.h"
#include "tensors.h"

namespace mlmfast {

// logits [r, w], float32 or bfloat16; bias float32 [w] or none.
VocabTile vocab_tile(const char* op, const Tensor& logits, const std::optional<Tensor>& bias, double temperature);

// Rows of a tile that one thread takes at a time.
inline int64_t vocab_grain(const VocabTile& tile) { return tile.width < 16384 ? 16384 / (tile.width + 1) + 1 : 1; }

}  // namespace mlmfast
