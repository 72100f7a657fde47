#include "targets.h"

#include <atomic>
#ifdef INVOLUTION_X86
#include <cpuid.h>
#endif

namespace involution {
namespace {

#ifdef INVOLUTION_X86
struct CpuFeatures {
  bool avx2 = false, avx512 = false, bf16 = false;
};

// By CPUID: the runtime library that Zig links does not support all of __builtin_cpu_supports.
CpuFeatures detect_features() {
  CpuFeatures found;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return found;  // OSXSAVE
  const bool fma = c & (1u << 12);
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the registers that the OS saves
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  found.avx2 = fma && (low & 0x6) == 0x6 && (b & (1u << 5));
  found.avx512 = found.avx2 && (low & 0xe6) == 0xe6 && (b & avx512) == avx512;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    found.bf16 = found.avx512 && (a & (1u << 5));
  return found;
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures found = detect_features();
  return found;
}
#endif

std::vector<const KernelTable*> detect_targets() {
  std::vector<const KernelTable*> found = {&plain_kernels};
#ifdef INVOLUTION_X86
  if (cpu_features().avx2) found.push_back(&avx2_kernels);
  if (cpu_features().avx512) found.push_back(&avx512_kernels);
#endif
  return found;
}

std::atomic<int> selected_target{-1};

}  // namespace

const std::vector<const KernelTable*>& targets() {
  static const std::vector<const KernelTable*> found = detect_targets();
  return found;
}

const KernelTable& current_target() {
  const int index = selected_target.load(std::memory_order_relaxed);
  return index < 0 ? *targets().back() : *targets()[index];
}

void set_target(int index) { selected_target.store(index); }

bool has_avx512_bf16(const KernelTable& target) {
  if (target.gemm_bf16 == nullptr) return false;
#ifdef INVOLUTION_X86
  return cpu_features().bf16;
#else
  return false;
#endif
}

}  // namespace involution
