// What `attention` and `disentangled_attention` share: checks, items, threads.
#pragma once

#include <optional>

#include "kernels.h"
#include "tensors.h"

namespace mlmfast {

// Sets how long sequences are at most, and the smallest and greatest distance that a batch of them has.
void reach(const char* op, Attention& a, int64_t max_seqlen_k, const Tensor& q,
           const std::optional<Tensor>& q_positions);

// A table's place of a distance: `longest` in the middle of those from -longest to longest, where farther ones end.
inline int64_t clamped(int64_t distance, int64_t longest) {
  return (distance < -longest ? -longest : distance > longest ? longest : distance) + longest;
}

// Runs a packed attention whose position tables and bias are set (or null) into `out`; fills in everything else of `a`. The
// tables are panels of the kernels given.
void attend(const char* op, const Kernels& use, Attention a, const Tensor& q, const Tensor& k, const Tensor& v,
            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const std::optional<Tensor>& q_positions,
            const Tensor& out);

}  // namespace mlmfast
