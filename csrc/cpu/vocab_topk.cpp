// vocab_topk: the best tokens of each row, kept from tile to tile.
#include "vocab_tile.h"

namespace mlmfast {

// values float32 [r, k] and ids int64 [r, k] hold the best of the tokens [0, first); after the last tile, best first.
void vocab_best(const Tensor& logits, const std::optional<Tensor>& bias, double temperature, int64_t first, bool last,
                Tensor values, Tensor ids) {
  const char* op = "vocab_best";
  const auto serve = kernels().vocab_best[dtype_index(op, logits)];
  const VocabTile tile = vocab_tile(op, logits, bias, temperature);
  for (const Tensor* each : {&values, &ids})
    STD_TORCH_CHECK(each->dim() == 2 && each->size(0) == logits.size(0) && each->is_contiguous(), op,
                    ": values and ids must be contiguous [rows, k]");
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && ids.scalar_type() == ScalarType::Long &&
                      values.size(1) == ids.size(1),
                  op, ": values must be float32 and ids int64, as many");
  const int64_t k = values.size(1);
  STD_TORCH_CHECK(first >= 0 && (!last || k <= first + tile.width), op, ": k is more than there are tokens");
  if (k == 0) return;
  float* value = static_cast<float*>(values.mutable_data_ptr());
  int64_t* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  for_each(logits.size(0), rows_at_a_time(tile.width), [&](int64_t row) {
    serve(tile, row, first, k, last, value + row * k, id + row * k);
  });
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def(
      "vocab_best(Tensor logits, Tensor? bias, float temperature, int first, bool last, Tensor(a!) values, "
      "Tensor(b!) ids) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) { m.impl("vocab_best", TORCH_BOX(&mlmfast::vocab_best)); }
