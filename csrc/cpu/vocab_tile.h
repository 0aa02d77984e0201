// What `vocab_logprob` and `vocab_topk` share: a tile of logits as it comes out of a product.
#pragma once

#include <optional>

#include "kernels.h"
#include "rows.h"

namespace mlmfast {

// logits [r, w], float32 or bfloat16; bias float32 [w] or none.
VocabTile vocab_tile(const char* op, const Tensor& logits, const std::optional<Tensor>& bias, double temperature);

}  // namespace mlmfast
