// The last step of sums over everything: one number from one partial sum per block.
#pragma once

#include <cstdint>

#include "launch.h"
#include "reduce.cuh"

namespace dst::cuda {

enum class Finish { kSum, kRoot };

static __global__ void __launch_bounds__(kThreads)
    total_kernel(const double* partial, int64_t count, float* result, Finish finish) {
  double mine = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) mine += partial[i];
  const double total = block_sum(mine);
  if (threadIdx.x == 0) *result = static_cast<float>(finish == Finish::kRoot ? sqrt(total) : total);
}

// result := the sum of the partial ones, or its square root; in a fixed order.
inline void launch_total(const Launcher& launch, const double* partial, int64_t count,
                         float* result, Finish finish) {
  launch(total_kernel, dim3(1), partial, count, result, finish);
}

}  // namespace dst::cuda
