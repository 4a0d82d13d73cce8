// Sums over the threads that share something, in an order that never changes.
#pragma once

#include <cuda_runtime.h>

#include "memory.cuh"
#include "tiling.cuh"

namespace dst::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Over a warp; every lane gets the same bits, for each addition is commutative.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Over a block; every thread gets it. At most once per type in a kernel: the shared memory is not
// guarded against a second call.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T of_warps[kWarps];
  const T mine = warp_sum(value);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  T total = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) total += of_warps[warp];
  return total;
}

// Over the threads of a share: a warp or the block.
template <typename T>
__device__ __forceinline__ T share_sum(const Share& share, T value) {
  return share.size == kWarp ? warp_sum(value) : block_sum(value);
}

// What the share's thread of rank 0 has. At most once in a kernel.
__device__ __forceinline__ float share_broadcast(const Share& share, float value) {
  if (share.size == kWarp) return __shfl_sync(kAllLanes, value, 0);
  __shared__ float first;
  if (share.rank == 0) first = value;
  __syncthreads();
  return first;
}

// Of the numbers one thread holds, pairwise.
template <int N>
__device__ __forceinline__ float tree_sum(const Vector<float, N>& vector) {
  if constexpr (N == 1) {
    return vector.numbers[0];
  } else {
    Vector<float, N / 2> halved;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      halved.numbers[i] = vector.numbers[2 * i] + vector.numbers[2 * i + 1];
    }
    return tree_sum(halved);
  }
}

}  // namespace dst::cuda
