// What csrc/cuda/*.cu use of CUDA's runtime, on the host: tests/emulated_extension.py compiles them beside this.
#pragma once

#include <functional>
#include <vector>

#include "../../../csrc/cuda/emulation.h"

#define __global__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline const char* cudaGetErrorString(cudaError_t) { return "shared memory that was not asked for"; }

namespace mlmfast::cuda {

// Blocks one after another, their shared memory full of large numbers until a kernel writes others. The threads of every
// launch take turns in another order: what is computed twice and has the same bits lacks no barrier, as far as that shows.
struct Launch {
  static thread_local dim3 block;
  static thread_local char* memory;
  static thread_local size_t allowed;  // bytes of shared memory that the next launch may have

  static constexpr size_t UNASKED = 48 << 10, MOST = 227 << 10;
  static constexpr char UNWRITTEN = 0x7f;

  static void run(dim3 grid, unsigned threads, size_t bytes, void*, const std::function<void()>& kernel) {
    if (bytes > allowed || bytes > MOST) throw std::logic_error("a launch with more shared memory than it may have");
    if (threads > 1024 || grid.y > 65535) throw std::logic_error("a launch larger than a GPU takes");
    allowed = UNASKED;
    static int launches = 0;
    Block::order() = launches++ - 1;
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::vector<char> room(bytes + 16, UNWRITTEN);
        memory = room.data() + (16 - reinterpret_cast<uintptr_t>(room.data()) % 16) % 16;
        block = dim3(x, y);
        Block::run(static_cast<int>(threads), kernel);
      }
  }
};

}  // namespace mlmfast::cuda

#define blockIdx mlmfast::cuda::Launch::block

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  mlmfast::cuda::Launch::allowed = static_cast<size_t>(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
