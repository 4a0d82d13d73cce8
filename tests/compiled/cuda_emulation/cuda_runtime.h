// As much of CUDA as csrc/cuda uses, for a C++ compiler: kernels run on the CPU, one block at a
// time, every thread of a block a fiber of its own. First on the include path, in place of the
// toolkit's header, so that the very same sources are compiled.
//
// What it notices: barriers that not all threads reach, lanes that disagree about a warp's
// operation, accesses that are not aligned, shared memory that is read before it is written (it is
// full of NaN), and results that depend on the order of threads (DST_EMULATION_ORDER: forward,
// reversed, or a number to shuffle by).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Thread-local variables of this library lie together, where run_grid can find and fill them. All
// threads of a block are fibers of one system thread.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u,%u, thread %u)\n", what, blockIdx.x,
               blockIdx.y, threadIdx.x);
  std::abort();
}

// Calls `kernel` for every thread of every block.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel);

// Waits for all threads of the block.
void block_barrier();

// Waits for all lanes of the warp, which must all be in the same operation. `words` are those of
// all lanes, valid until the lane's next operation.
constexpr int kLanes = 32;
const uint64_t* exchange(int operation, uint64_t word);

enum Operation { kSync = 1, kShuffleXor = 2, kShuffle = 3 };

template <typename T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp operation on part of a warp is not emulated");
}

template <typename T>
void check_access(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) fail("misaligned access");
}

template <typename T>
T read(const T* pointer) {
  check_access(pointer);
  T value;
  std::memcpy(&value, pointer, sizeof(T));
  return value;
}

template <typename T>
void write(T* pointer, T value) {
  check_access(pointer);
  std::memcpy(pointer, &value, sizeof(T));
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::check_mask(mask);
  emulation::exchange(emulation::kSync, 0);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  emulation::check_mask(mask);
  const uint64_t* words = emulation::exchange(emulation::kShuffleXor, emulation::to_word(value));
  return emulation::from_word<T>(words[(threadIdx.x % emulation::kLanes) ^ lanes]);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  emulation::check_mask(mask);
  const uint64_t* words = emulation::exchange(emulation::kShuffle, emulation::to_word(value));
  return emulation::from_word<T>(words[lane]);
}

// clang-format off
template <typename T> T __ldcs(const T* pointer) { return emulation::read(pointer); }
template <typename T> void __stcs(T* pointer, T value) { emulation::write(pointer, value); }
// clang-format on

inline unsigned long long atomicAdd(unsigned long long* target, unsigned long long value) {
  const unsigned long long old = *target;
  *target += value;
  return old;
}

inline void __threadfence() {}  // blocks run one after the other

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace emulation {

// What has been asked of the GPU so far, and the state of the stream that it was asked on.
inline int64_t launches = 0, clears = 0, copies = 0;
inline unsigned long long stream = 0;
inline bool capturing = false;

}  // namespace emulation

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = emulation::stream;
  return cudaSuccess;
}

template <typename T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  ++emulation::clears;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  ++emulation::copies;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "parameters of a kernel");
  ++emulation::launches;
  emulation::run_grid(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
