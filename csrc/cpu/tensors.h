// Checks on tensors, and torch's own threads, over the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>

namespace mlmfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 0 for float32, 1 for bfloat16: the index into Kernels' pairs.
inline int dtype_index(const char* op, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, " takes float32 and bfloat16");
  return type == ScalarType::BFloat16;
}

inline void check_same(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " has another dtype than the first tensor");
}

inline void check_ints(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", type == ScalarType::Int ? "int32" : "int64");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), op, ": ", name, " must be one contiguous row");
}

// Memory of one thread that outlives a call, so that a pass of many small calls does not fault its pages in anew; more
// than KEPT, for a very long sequence, does not outlive it.
class Workspace {
 public:
  static constexpr int64_t KEPT = 8 << 20;
  ~Workspace() { std::free(memory_); }
  void trim() {
    if (size_ <= KEPT) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }
  char* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 63) / 64 * 64;
      memory_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

inline Workspace& workspace() {
  static thread_local Workspace own;
  return own;
}

inline char* scratch(int64_t bytes) { return workspace().get(bytes); }

// Calls `work(item)` for items 0 .. count - 1 on torch's threads, whoever is free taking the next `grain`. Which thread
// computes an item changes nothing in its result. An exception inside is thrown again here.
template <class Work>
void for_each(int64_t count, int64_t grain, const Work& work) {
  if (count <= grain) {
    for (int64_t item = 0; item < count; ++item) work(item);
    workspace().trim();
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t item; (item = next.fetch_add(grain)) < count;)
        for (const int64_t end = item + grain < count ? item + grain : count; item < end; ++item) work(item);
    } catch (...) {
      next.store(count);
      const std::lock_guard<std::mutex> lock(failing);
      failure = std::current_exception();
    }
    workspace().trim();
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace mlmfast
