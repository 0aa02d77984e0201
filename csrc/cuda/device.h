// What the kernels use of a GPU, by one name each. Compiled by a C++ compiler, the same names come from emulation.h, which
// runs a block's threads one after another on the host, so that a kernel is tested, fragments and barriers included,
// where there is no GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MLMFAST_DEVICE __device__ __forceinline__
#define MLMFAST_BOTH __host__ __device__ __forceinline__

namespace mlmfast::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

MLMFAST_DEVICE int thread() { return threadIdx.x; }
MLMFAST_DEVICE int threads() { return blockDim.x; }
MLMFAST_DEVICE void sync_block() { __syncthreads(); }
MLMFAST_DEVICE void sync_warp() { __syncwarp(); }
template <class V>
MLMFAST_DEVICE V exchange(V x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class V>
MLMFAST_DEVICE V of_lane(V x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
MLMFAST_DEVICE bool in_any_lane(bool x) { return __any_sync(0xffffffffu, x); }
MLMFAST_DEVICE float power_of_2(float x) { return exp2f(x); }
MLMFAST_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
MLMFAST_DEVICE float to_float(float16 x) { return __half2float(x); }

// Two numbers side by side in a register, the first in the low half.
template <class T>
MLMFAST_DEVICE uint32_t pair(float first, float second);
template <>
MLMFAST_DEVICE uint32_t pair<bfloat16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
MLMFAST_DEVICE uint32_t pair<float16>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(both);
}

// A number rounded to 16 bits.
template <class T>
MLMFAST_DEVICE T narrow(float x);
template <>
MLMFAST_DEVICE bfloat16 narrow<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
MLMFAST_DEVICE float16 narrow<float16>(float x) {
  return __float2half_rn(x);
}

// sums[16, 8] += a[16, 16] @ b[16, 8] on the tensor cores, fragments as PTX's mma.m16n8k16 has them.
template <class T>
MLMFAST_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
MLMFAST_DEVICE void multiply<bfloat16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
MLMFAST_DEVICE void multiply<float16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

MLMFAST_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit numbers from shared memory: lane 8 i + r names row r of matrix i, 16 bytes; each lane gets two
// neighbours of row lane / 4 of every matrix, or, turned, of column lane / 4.
MLMFAST_DEVICE void load_matrices(uint32_t (&into)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3])
               : "r"(shared_address(row))
               : "memory");
}
MLMFAST_DEVICE void load_matrices_turned(uint32_t (&into)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, zeros instead if there are none; they are there after `arrived`.
MLMFAST_DEVICE void copy_16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
MLMFAST_DEVICE void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 16 bytes of memory that nobody writes while the kernel runs, to registers; zeros if they are not `there`. What is loaded
// once leaves the first-level cache to what is loaded again.
MLMFAST_DEVICE void load_once(uint32_t (&into)[4], const void* global, bool there) {
  asm volatile(
      "{.reg .pred there; setp.ne.u32 there, %5, 0;\n"
      "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@there ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "=&r"(into[0]), "=&r"(into[1]), "=&r"(into[2]), "=&r"(into[3])
      : "l"(global), "r"(there ? 1 : 0));
}
MLMFAST_DEVICE void load_again(uint32_t (&into)[4], const void* global, bool there) {
  asm volatile(
      "{.reg .pred there; setp.ne.u32 there, %5, 0;\n"
      "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@there ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "=&r"(into[0]), "=&r"(into[1]), "=&r"(into[2]), "=&r"(into[3])
      : "l"(global), "r"(there ? 1 : 0));
}

}  // namespace mlmfast::cuda

#else
#include "emulation.h"
#endif
