// vocab_logprob: the targets' logits out of tiles, and how many tokens are above them.
#include "vocab_tile.h"

namespace mlmfast {
namespace {

// Targets of the rows [first_row, first_row + r) that a tile holds; all others are left alone.
struct Targets {
  const int64_t* rows;  // [N]
  int64_t count, first_row, end_row;

  Targets(const char* op, const Tensor& target_rows, int64_t first_row, int64_t rows)
      : first_row(first_row), end_row(first_row + rows) {
    check_ints(op, "target_rows", target_rows, ScalarType::Long);
    this->rows = target_rows.const_data_ptr<int64_t>(), count = target_rows.size(0);
  }
  bool has(int64_t i) const { return rows[i] >= first_row && rows[i] < end_row; }
};

void check_found(const char* op, const Tensor& found, const Targets& of) {
  STD_TORCH_CHECK(found.scalar_type() == ScalarType::Float && found.dim() == 1 && found.is_contiguous() &&
                      found.size(0) == of.count,
                  op, ": found must be contiguous float32 [N]");
}

}  // namespace

// found[i] = the i-th target's (logit + bias) / temperature, for the tokens [first, first + w).
void vocab_targets(const Tensor& logits, const std::optional<Tensor>& bias, double temperature, int64_t first,
                   const Tensor& targets, const Tensor& target_rows, int64_t first_row, Tensor found) {
  const char* op = "vocab_targets";
  const auto logit = kernels().vocab_logit[dtype_index(op, logits)];
  const VocabTile tile = vocab_tile(op, logits, bias, temperature);
  const Targets of(op, target_rows, first_row, logits.size(0));
  check_found(op, found, of);
  check_ints(op, "targets", targets, ScalarType::Long);
  STD_TORCH_CHECK(targets.size(0) == of.count, op, ": targets and target_rows must be as long");
  const int64_t* token = targets.const_data_ptr<int64_t>();
  float* into = static_cast<float*>(found.mutable_data_ptr());
  for (int64_t i = 0; i < of.count; ++i)
    if (of.has(i) && token[i] >= first && token[i] < first + tile.width)
      into[i] = logit(tile, of.rows[i] - first_row, token[i] - first);
}

// Adds to ranks[i] how many of the tile's tokens are strictly above the i-th target.
void vocab_ranks(const Tensor& logits, const std::optional<Tensor>& bias, double temperature, const Tensor& target_rows,
                 int64_t first_row, const Tensor& found, Tensor ranks) {
  const char* op = "vocab_ranks";
  const auto above = kernels().vocab_above[dtype_index(op, logits)];
  const VocabTile tile = vocab_tile(op, logits, bias, temperature);
  const Targets of(op, target_rows, first_row, logits.size(0));
  check_found(op, found, of);
  check_ints(op, "ranks", ranks, ScalarType::Long);
  STD_TORCH_CHECK(ranks.size(0) == of.count, op, ": ranks must have a place a target");
  const float* than = found.const_data_ptr<float>();
  int64_t* rank = static_cast<int64_t*>(ranks.mutable_data_ptr());
  for_each(of.count, rows_at_a_time(tile.width), [&](int64_t i) {
    if (of.has(i)) rank[i] += above(tile, of.rows[i] - first_row, than[i]);
  });
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def(
      "vocab_targets(Tensor logits, Tensor? bias, float temperature, int first, Tensor targets, Tensor target_rows, "
      "int first_row, Tensor(a!) found) -> ()");
  m.def(
      "vocab_ranks(Tensor logits, Tensor? bias, float temperature, Tensor target_rows, int first_row, Tensor found, "
      "Tensor(a!) ranks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) {
  m.impl("vocab_targets", TORCH_BOX(&mlmfast::vocab_targets));
  m.impl("vocab_ranks", TORCH_BOX(&mlmfast::vocab_ranks));
}
