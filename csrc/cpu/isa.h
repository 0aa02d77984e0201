// The choice of an instruction set.
#pragma once

#include <vector>

#include "kernels.h"

namespace mlmfast {

// Those that this processor has, best first.
const std::vector<const Kernels*>& usable_kernels();

// Makes `kernels()` return the one of this name; false if the processor lacks it.
bool use_kernels(const char* name);

}  // namespace mlmfast
