// The collapse guard: what the last block of a layer does.
//
// Whether a layer has collapsed is known only when all of it has been counted. All blocks therefore
// work with the thresholds as they are. If too little is left, the last one masks the layer again,
// under zero thresholds. Counts are integers: the decision is exact and depends on no order.
#pragma once

#include <cstdint>

#include "arrivals.cuh"
#include "memory.cuh"
#include "reduce.cuh"

namespace dst::cuda {

constexpr int kGuardUnroll = 16;

struct Guard {
  Counter* arrivals;  // null: nobody asks for the last block
  int64_t* kept;      // how many weights are kept; null: not wanted
  int64_t collapsed;  // the layer is reset up to this number; -1: never
};

// What a reset changes.
struct Masked {
  const void* weight;
  void* masked;
  int64_t numel;
  Storage masked_storage;
  float* thresholds[2];  // all become zero; null: none
  int64_t count;         // of each
};

// W under a threshold of zero; returns how many this thread has kept.
template <typename W>
__device__ __forceinline__ int64_t mask_again(const Masked& layer) {
  const W* weights = static_cast<const W*>(layer.weight);
  int64_t kept = 0;
  for (int64_t first = threadIdx.x; first < layer.numel; first += kGuardUnroll * kThreads) {
    W loaded[kGuardUnroll];
#pragma unroll
    for (int i = 0; i < kGuardUnroll; ++i) {
      if (first + i * kThreads < layer.numel) loaded[i] = weights[first + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kGuardUnroll; ++i) {
      const int64_t place = first + i * kThreads;
      if (place >= layer.numel) break;
      const float weight = to_float(loaded[i]);
      store_as<Cache::kKeep>(layer.masked_storage, layer.masked, place,
                             Vector<float, 1>{masked(weight, 0.0f)});
      kept += !pruned(weight, 0.0f);
    }
  }
  return kept;
}

// For all threads of a layer's last block; `kept`: what the layer has kept.
template <typename W>
__device__ __forceinline__ void settle(const Guard& guard, const Masked& layer, int64_t kept) {
  if (kept <= guard.collapsed) {
    for (float* thresholds : layer.thresholds) {
      if (thresholds == nullptr) continue;
      for (int64_t i = threadIdx.x; i < layer.count; i += kThreads) thresholds[i] = 0.0f;
    }
    kept = block_sum(mask_again<W>(layer));
  }
  if (threadIdx.x == 0 && guard.kept != nullptr) *guard.kept = kept;
}

}  // namespace dst::cuda
