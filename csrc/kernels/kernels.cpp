// The CPU kernels. Compiled once for each target (instruction set), with INVOLUTION_TARGET as its
// name and INVOLUTION_VECTOR_BYTES as the width of its vectors.
//
// No `std::` templates here, nor any other function with external linkage: the linker keeps one
// copy of each, possibly the AVX-512 one.
#include <cstdint>
#include <cstring>
#if INVOLUTION_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

#include "kernels.h"

namespace involution {
namespace {

// For functions whose accumulators must stay in registers.
#define INLINE inline __attribute__((always_inline))
#define INLINE_BODY __attribute__((always_inline))  // of a lambda
#define NOINLINE __attribute__((noinline))

#include "half-inl.h"
#include "simd-inl.h"

// Compilers fold a load into each instruction that uses it, and so repeat the load. The empty asm
// claims to modify the vector, which forces it into a register.
template <class Vector>
INLINE void keep_in_register([[maybe_unused]] Vector& x) {
#if defined(__x86_64__)
  // Clang has no registers for shorter vectors; no target uses them here.
  if constexpr (sizeof x >= 16) asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// An address or index that the compiler knows nothing of: it cannot precompute, and then spill, all
// that are derived from it.
template <class T>
INLINE T opaque(T x) {
  asm("" : "+r"(x));
  return x;
}

#include "packing-inl.h"
#include "tiles-inl.h"
#include "unrolled-inl.h"
#include "weighted_sum-inl.h"
#include "kernel_gradient-inl.h"
#include "positions-inl.h"
#include "gemm-inl.h"
#include "outside_taps-inl.h"
#include "scale-inl.h"

// --- Peak FLOP/s --------------------------------------------------------------------------------

float fma_peak_loop(index_t times) {
  constexpr int kLanes = INVOLUTION_VECTOR_BYTES / 4;
  typename Simd<float, kLanes>::Vector sum[kFmaChains] = {}, x = {}, y = {};
  for (int l = 0; l < kLanes; ++l) x[l] = 0.5f, y[l] = 0.25f;
  for (int c = 0; c < kFmaChains; ++c) sum[c] = sum[c] + static_cast<float>(c);
  for (index_t n = 0; n < times; ++n) {
#pragma GCC unroll 12
    for (int c = 0; c < kFmaChains; ++c) sum[c] = sum[c] * x + y;
  }
  float total = 0;
  for (int c = 0; c < kFmaChains; ++c)
    for (int l = 0; l < kLanes; ++l) total += sum[c][l];
  return total;
}

// --- Dispatch by axis, vector width and type ----------------------------------------------------

template <class T, int kLanes>
void compute_lanes(const Plan& plan, const Region& region, const TensorView& values,
                   const TensorView& weights, const TensorView& result, char* scratch) {
  if (plan.pass == Pass::kernel_grad)
    kernel_gradient<T, kLanes>(plan, region, values, weights, result,
                               reinterpret_cast<index_t*>(scratch));
  else
    weighted_sum<T, kLanes>(plan, region, values, weights, result);
}

template <class T>
void compute_typed(const Plan& plan, const Region& region, const TensorView& values,
                   const TensorView& weights, const TensorView& result, char* scratch) {
  constexpr int kMaxLanes = INVOLUTION_VECTOR_BYTES / sizeof(T);
  if (plan.vector_axis == VectorAxis::positions) {
    if (plan.pass == Pass::kernel_grad)
      return kernel_gradient_positions<T, kMaxLanes>(plan, region, values, weights, result,
                                                     scratch);
    weighted_sum_positions<T, kMaxLanes>(plan, region, values, weights, result);
  } else {
    // As choose_vector_width: double always fills vectors, and float may not.
    if constexpr (sizeof(T) == 4 && kMaxLanes > 8) {
      if (plan.lanes == 8) compute_lanes<T, 8>(plan, region, values, weights, result, scratch);
    }
    if constexpr (sizeof(T) == 4 && kMaxLanes > 4) {
      if (plan.lanes == 4) compute_lanes<T, 4>(plan, region, values, weights, result, scratch);
    }
    if (plan.lanes == kMaxLanes)
      compute_lanes<T, kMaxLanes>(plan, region, values, weights, result, scratch);
  }
  if (plan.pass != Pass::input_grad) add_outside_taps<T>(plan, region, weights, result);
}

void compute(const Plan& plan, const Region& region, const TensorView& values,
             const TensorView& weights, const TensorView& result, char* scratch) {
  if (plan.type == DataType::float64)
    compute_typed<double>(plan, region, values, weights, result, scratch);
  else
    compute_typed<float>(plan, region, values, weights, result, scratch);
}

}  // namespace

#define INVOLUTION_JOIN(a, b) a##b
#define INVOLUTION_NAME(target) INVOLUTION_JOIN(target, _kernels)
#define INVOLUTION_TEXT(target) #target
#define INVOLUTION_STRING(target) INVOLUTION_TEXT(target)

extern const KernelTable INVOLUTION_NAME(INVOLUTION_TARGET) = {INVOLUTION_STRING(INVOLUTION_TARGET),
                                                               INVOLUTION_VECTOR_BYTES,
                                                               pack,
                                                               unpack,
                                                               compute,
                                                               scale,
                                                               gemm,
#if INVOLUTION_VECTOR_BYTES == 64
                                                               gemm_bf16,
#else
                                                               nullptr,
#endif
                                                               fma_peak_loop};

}  // namespace involution
