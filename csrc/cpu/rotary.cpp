// rotary: checks its arguments and every position before it is an address, and hands blocks of rows to torch's threads.
#include "kernels.h"
#include "rows.h"

namespace mlmfast {
namespace {

const float* table_of(const char* name, const Tensor& table) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.is_contiguous(), "rotary: ",
                  name, " must be [positions, half of the rotary width], contiguous, in float32");
  return table.const_data_ptr<float>();
}

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& position_ids) {
  const char* op = "rotary";
  const int type = dtype_index(op, x);
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must be [rows, heads, width]");
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) == 1 || x.numel() == 0, op, ": heads must be contiguous");
  Rotary a{};
  a.cos = table_of("cos", cos), a.sin = table_of("sin", sin);
  STD_TORCH_CHECK(cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1), op, ": cos is [", cos.size(0), ", ",
                  cos.size(1), "] and sin [", sin.size(0), ", ", sin.size(1), "]; they must be as large");
  a.heads = x.size(1), a.width = x.size(2), a.half = cos.size(1);
  STD_TORCH_CHECK(a.half <= a.width / 2, op, ": tables of width ", a.half, " rotate ", 2 * a.half,
                  " elements of a head; a head has ", a.width);
  check_ints(op, "position_ids", position_ids, ScalarType::Long);
  const int64_t rows = x.size(0);
  STD_TORCH_CHECK(position_ids.size(0) == rows, op, ": position_ids must have a position a row: there are ",
                  position_ids.size(0), " for ", rows, " rows");
  a.position_ids = position_ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(a.position_ids[i] >= 0 && a.position_ids[i] < cos.size(0), op, ": position_ids[", i, "] is ",
                    a.position_ids[i], "; cos and sin have rows 0 to ", cos.size(0) - 1);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  a.x = x.const_data_ptr(), a.x_row = x.stride(0), a.x_head = x.stride(1);
  a.out = out.mutable_data_ptr();
  const auto serve = kernels().rotary[type];
  const int64_t some = rows_at_a_time(a.heads * a.width);
  for_each((rows + some - 1) / some, 1, [&](int64_t i) {
    const int64_t first = i * some, last = first + some < rows ? first + some : rows;
    serve(a, first, last);
  });
  return out;
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, Tensor position_ids) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CPU, m) { m.impl("rotary", TORCH_BOX(&mlmfast::rotary)); }
