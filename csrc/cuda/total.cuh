// The last step of sums over everything: one number from one partial sum per block.
#pragma once

#include <cstdint>

#include "launch.h"

namespace dst::cuda {

enum class Finish { kSum, kRoot };

// result := the sum of the partial ones, or its square root; in a fixed order.
void launch_total(const Launcher& launch, const double* partial, int64_t count, float* result,
                  Finish finish);

}  // namespace dst::cuda
