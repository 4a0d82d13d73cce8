// Kernels that are wrong, each in a way that the emulation must notice. Run as a program with the
// name of one; `right` is right.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 64;

// The sum over the block, by way of shared memory.
__global__ void sum(float* result, bool barrier) {
  __shared__ float numbers[kThreads];
  numbers[threadIdx.x] = 1.0f;
  if (barrier) __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < kThreads; ++i) total += numbers[i];
  result[threadIdx.x] = total;
}

__global__ void divergent_barrier(float*) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void barrier_after_exit(float*) {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void divergent_warp(float* result) {
  if (threadIdx.x % 32 < 16) {
    result[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  } else {
    result[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
  }
}

__global__ void misaligned(float* result) {
  result[0] = static_cast<float>(__ldcs(reinterpret_cast<const uint4*>(result + 1)).x);
}

}  // namespace

int main(int, char** arguments) {
  alignas(16) float result[kThreads] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(kThreads);
  const auto named = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  if (named("right")) cudaLaunchKernelEx(&config, sum, result, true);
  if (named("missing barrier")) cudaLaunchKernelEx(&config, sum, result, false);
  if (named("divergent barrier")) cudaLaunchKernelEx(&config, divergent_barrier, result);
  if (named("barrier after exit")) cudaLaunchKernelEx(&config, barrier_after_exit, result);
  if (named("divergent warp")) cudaLaunchKernelEx(&config, divergent_warp, result);
  if (named("misaligned")) cudaLaunchKernelEx(&config, misaligned, result);
  for (const float number : result) {
    if (number != kThreads) std::puts("wrong");
  }
}
