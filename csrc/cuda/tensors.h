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

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace mlmfast::cuda
