// few_rows: checks its arguments and hands blocks of the weight's rows to torch's threads.
#include "kernels.h"
#include "rows.h"

namespace mlmfast {

// Bytes of a weight that a thread takes at a time: some pages, so that reading ahead pays.
constexpr int64_t TAKEN = 64 << 10;

Tensor few_rows(const Tensor& x, const Tensor& weight) {
  const char* op = "few_rows";
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, " takes float32");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), op,
                  ": x must be [rows, inner] and weight [outer, inner]");
  check_table(op, "x", x, x);
  check_table(op, "weight", weight, x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  FewRows a{};
  a.x = x.const_data_ptr<float>(), a.x_row = x.stride(0), a.rows = x.size(0), a.inner = x.size(1);
  a.weight = weight.const_data_ptr<float>(), a.weight_row = weight.stride(0), a.outer = weight.size(0);
  a.sums = out.mutable_data_ptr<float>();
  const auto serve = kernels().few_rows;
  const int64_t row_bytes = a.inner * 4 + 1;  // never 0
  const int64_t some = TAKEN / row_bytes / 4 * 4, block = some < 4 ? 4 : some;
  for_each((a.outer + block - 1) / block, 1, [&](int64_t i) {
    const int64_t first = i * block;
    serve(a, first, first + block < a.outer ? first + block : a.outer);
  });
  return out;
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) { m.def("few_rows(Tensor x, Tensor weight) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) { m.impl("few_rows", TORCH_BOX(&mlmfast::few_rows)); }
