// Checks that the row-wise ops share.
#pragma once

#include <optional>

#include "tensors.h"

namespace mlmfast {

// Rows that one thread takes at a time: enough elements to be worth handing out.
inline int64_t rows_at_a_time(int64_t width) { return width < 16384 ? 16384 / (width + 1) + 1 : 1; }

inline void check_table(const char* op, const char* name, const Tensor& table, const Tensor& like) {
  check_same(op, name, table, like);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == like.size(1), op, ": ", name, " must be rows of width ",
                  like.size(1));
  STD_TORCH_CHECK(table.stride(1) == 1 || table.size(1) == 1, op, ": rows of ", name, " must be contiguous");
}

// The address of an optional vector of the row's width, or null.
inline const void* vector_of(const char* op, const char* name, const std::optional<Tensor>& vector, const Tensor& like) {
  if (!vector) return nullptr;
  check_same(op, name, *vector, like);
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == like.size(1) && vector->is_contiguous(), op, ": ", name,
                  " must be one contiguous row of ", like.size(1));
  return vector->const_data_ptr();
}

}  // namespace mlmfast
