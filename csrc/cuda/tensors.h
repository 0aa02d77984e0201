// Checks on CUDA tensors, and torch's current stream, over the stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace mlmfast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

inline void check_ints(const char* op, const char* name, const Tensor& tensor, ScalarType type, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", type == ScalarType::Int ? "int32" : "int64");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), op, ": ", name, " must be one contiguous row");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == beside.get_device_index(), op, ": ", name,
                  " is on another device");
}

// Whether every head of 16-bit `[rows, heads, width]` begins at a multiple of 16 bytes.
inline bool in_pieces(const Tensor& x) {
  return x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// Heads that the kernels can read in pieces of 16 bytes.
inline void check_heads(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == like.size(1) && x.size(2) == like.size(2), op, ": ", name,
                  " must be [rows, heads, width] as q is");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), op, ": ", name, " has another dtype than q");
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), op, ": ", name, " is on another device");
  STD_TORCH_CHECK(in_pieces(x), op, ": ", name, " must have heads on 16-byte bounds");
}

inline void check_half(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, op,
                  " takes bfloat16 and float16");
}

inline void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), op, ": ", name, " has another dtype than the others");
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), op, ": ", name, " is on another device");
}

// `[rows, width]` with neighbours in the last dimension, wherever rows begin.
inline void check_rows(const char* op, const char* name, const Tensor& x, int64_t width, const Tensor& like) {
  check_like(op, name, x, like);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == width && (width < 2 || x.stride(1) == 1), op, ": ", name,
                  " must be rows of ", width, " neighbours");
}

// How far rows may be apart, so that 32 bits count from one of 32 rows to another.
constexpr int64_t FARTHEST = 1 << 25;

// The same with every row on a 16-byte bound, and a width of whole pieces.
inline void check_pieces(const char* op, const char* name, const Tensor& x, int64_t width, const Tensor& like) {
  check_rows(op, name, x, width, like);
  STD_TORCH_CHECK(width > 0 && width % 8 == 0 && (x.size(0) < 2 || (x.stride(0) % 8 == 0 && x.stride(0) <= FARTHEST)) &&
                      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                  op, ": ", name, " must have rows of whole 16-byte pieces on 16-byte bounds");
}

// One contiguous row, or null.
inline const void* check_row(const char* op, const char* name, const std::optional<Tensor>& x, int64_t width,
                             const Tensor& like) {
  if (!x) return nullptr;
  check_like(op, name, *x, like);
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == width && x->is_contiguous(), op, ": ", name, " must be ", width,
                  " neighbours");
  return x->const_data_ptr();
}

// An int for a kernel.
inline int32_t check_int(const char* op, const char* name, int64_t x, int64_t least = 0, int64_t most = 1 << 30) {
  STD_TORCH_CHECK(x >= least && x <= most, op, ": ", name, " must be in [", least, ", ", most, "], not ", x);
  return static_cast<int32_t>(x);
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  // torch 2.10's headers have no macro of their own for this.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "torch tells no current stream of this device");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace mlmfast::cuda
