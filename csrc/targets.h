// The targets (instruction sets) that this machine supports, and the selected one.
#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace involution {

// The most basic target first.
const std::vector<const KernelTable*>& targets();

const KernelTable& current_target();

// Selects an index of `targets` for all subsequent calls; by default, the last one.
void set_target(int index);

// Whether the target has bfloat16 matrix products and this processor supports them.
bool has_avx512_bf16(const KernelTable& target);

}  // namespace involution
