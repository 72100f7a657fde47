// Involution with kernels that are generated where they are used and never stored.
#pragma once

#include "plan.h"

namespace involution {

// What `involution_execute_fused_scaled` of params.h does with the result of a forward pass.
struct Scaling {
  const void *scale, *offset;
  bool relu;
};

// `involution_execute_fused` and, with a scaling, `involution_execute_fused_scaled` of params.h;
// false if out of memory.
bool execute_fused(const InvolutionParams& params, index_t batch, int threads, const void* a,
                   const void* b, const void* c, const void* d, void* result, void* dweights,
                   const Scaling* scaling = nullptr);

}  // namespace involution
