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

constexpr int kGuardAhead = 16;
constexpr int64_t kGuardShare = 1 << 30;

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
  bool wide;             // accesses of several numbers fit
  float* thresholds[2];  // all become zero; null: none
  int64_t count;         // of each
};

// W under a threshold of zero; returns how many this thread has kept.
template <typename W, int N>
__device__ __forceinline__ int64_t mask_again(const Masked& layer) {
  const W* weights = static_cast<const W*>(layer.weight);
  int64_t kept = 0;
  for (int64_t begin = 0; begin < layer.numel; begin += kGuardShare) {
    const int64_t left = layer.numel - begin;
    const int count = static_cast<int>(left < kGuardShare ? left : kGuardShare);
    stream<N, kGuardAhead>(
        Share{0, begin, count, static_cast<int>(threadIdx.x), kThreads},
        [&](int64_t i) { return load<Cache::kOnce, N>(weights + i); },
        [&](int64_t i, const Vector<W, N>& loaded) {
          Vector<float, N> weight = to_floats(loaded);
#pragma unroll
          for (int k = 0; k < N; ++k) {
            kept += !pruned(weight.numbers[k], 0.0f);
            weight.numbers[k] = masked(weight.numbers[k], 0.0f);
          }
          store_as<Cache::kKeep>(layer.masked_storage, layer.masked, i, weight);
        });
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
    kept = block_sum(layer.wide ? mask_again<W, kWidth<float>>(layer) : mask_again<W, 1>(layer));
  }
  if (threadIdx.x == 0 && guard.kept != nullptr) *guard.kept = kept;
}

}  // namespace dst::cuda
