// Tiles of logits, and the running sums that turn logits into log-probabilities and entropies.
#include "vocab_tile.h"

#include <cstring>

namespace mlmfast {

VocabTile vocab_tile(const char* op, const Tensor& logits, const std::optional<Tensor>& bias, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1), op,
                  ": logits must be rows, contiguous in width");
  VocabTile tile{logits.const_data_ptr(), logits.stride(0), logits.size(1), nullptr, static_cast<float>(temperature)};
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->is_contiguous() &&
                        bias->size(0) == tile.width,
                    op, ": bias must be one contiguous row of float32, a number a token");
    tile.bias = bias->const_data_ptr<float>();
  }
  return tile;
}

// sums: float64 [r, 3], a VocabSums a row. values: float32 [r, w], takes (logits + bias) / temperature where wanted.
void vocab_sums(const Tensor& logits, const std::optional<Tensor>& bias, double temperature, bool entropies, Tensor sums,
                std::optional<Tensor> values) {
  const char* op = "vocab_sums";
  const int type = dtype_index(op, logits);
  const VocabTile tile = vocab_tile(op, logits, bias, temperature);
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.dim() == 2 && sums.size(0) == logits.size(0) &&
                      sums.size(1) == 3 && sums.is_contiguous(),
                  op, ": sums must be contiguous float64 [rows, 3]");
  static_assert(sizeof(VocabSums) == 3 * sizeof(double), "a VocabSums is a row of sums");
  VocabSums* of = reinterpret_cast<VocabSums*>(sums.mutable_data_ptr());
  float* into = nullptr;
  if (values) {
    STD_TORCH_CHECK(values->scalar_type() == ScalarType::Float && values->dim() == 2 &&
                        values->size(0) == logits.size(0) && values->size(1) == tile.width &&
                        (values->stride(1) == 1 || tile.width <= 1),
                    op, ": values must be float32 rows, as many and as wide as the logits'");
    into = static_cast<float*>(values->mutable_data_ptr());
  }
  const int64_t into_row = values ? values->stride(0) : 0;
  const auto serve = kernels().vocab_sums[type];
  const int64_t bytes = (tile.width + 64) * sizeof(float);
  for_each(logits.size(0), rows_at_a_time(tile.width), [&](int64_t row) {
    float* x = reinterpret_cast<float*>(scratch(bytes));
    serve(tile, row, entropies, of + row, x);
    if (into) std::memcpy(into + row * into_row, x, tile.width * sizeof(float));
  });
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def(
      "vocab_sums(Tensor logits, Tensor? bias, float temperature, bool entropies, Tensor(a!) sums, "
      "Tensor(b!)? values=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) { m.impl("vocab_sums", TORCH_BOX(&mlmfast::vocab_sums)); }
