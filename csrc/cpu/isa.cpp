// Which instruction set serves, found at run time; it can be forced to a lesser one.
#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mlmfast {
namespace {

#if defined(__x86_64__)

// Intel's application note on AMX: tile data must be asked for once a process, or the first use is a fault.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22);
  return tile && bf16 && tiles_permitted();
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  return a & (1u << 5);
}

#endif

// Best first. The compiler's runtime also checks that the system saves the wide registers.
std::vector<const Kernels*> found() {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && has_avx512_bf16();
  // Those that the compiler knew: setup.py says which.
#if defined(MLMFAST_HAS_AMX)
  if (bf16 && has_amx()) usable.push_back(&amx_kernels);
#endif
#if defined(MLMFAST_HAS_AVX512_BF16)
  if (bf16) usable.push_back(&avx512_bf16_kernels);
#endif
#if defined(MLMFAST_HAS_AVX512)
  if (avx512) usable.push_back(&avx512_kernels);
#endif
#if defined(MLMFAST_HAS_AVX2)
  if (avx2) usable.push_back(&avx2_kernels);
#endif
#endif
  usable.push_back(&portable_kernels);
  return usable;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> usable = found();
  return usable;
}

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_relaxed);
  return now ? *now : *usable_kernels().front();
}

bool use_kernels(const char* name) {
  for (const Kernels* each : usable_kernels()) {
    if (std::strcmp(each->name, name) == 0) {
      chosen.store(each, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace mlmfast
