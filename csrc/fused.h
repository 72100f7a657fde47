// Involution with kernels that are generated where they are used and never stored.
#pragma once

#include "plan.h"

namespace involution {

// `involution_execute_fused` of params.h; false if out of memory.
bool execute_fused(const InvolutionParams& params, index_t batch, int threads, const void* a,
                   const void* b, const void* c, const void* d, void* result, void* dweights);

}  // namespace involution
