// What `attention` and `disentangled_attention` share: checks, items, threads.
#pragma once

#include <optional>

#include "kernels.h"
#include "tensors.h"

namespace mlmfast {

// Runs a packed attention whose position tables are set (or null) into `out`; fills in everything else of `a`. The
// tables are panels of the kernels given.
void attend(const char* op, const Kernels& use, Attention a, const Tensor& q, const Tensor& k, const Tensor& v,
            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const std::optional<Tensor>& q_positions,
            const Tensor& out);

}  // namespace mlmfast
