#include "guard.cuh"
#include "memory.cuh"
#include "reduce.cuh"
#include "table.cuh"

namespace dst::cuda {
namespace {

constexpr int kGuardBlocks = 32;  // for each layer
constexpr int kGuardUnroll = 8;

struct GuardCommon {
  const float* found_inf;
};

using GuardTable = Table<GuardEntry, GuardCommon>;

// The part of this block and thread in `numel` numbers.
template <typename F>
__device__ __forceinline__ void for_each_of(int64_t numel, const F& f) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < numel; i += kGuardBlocks * kThreads) f(i);
}

__device__ int64_t sum_counts(const GuardEntry& entry) {
  const int4* fours = reinterpret_cast<const int4*>(entry.counts);
  const int whole = entry.blocks / 4;
  int64_t mine = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < whole; i += kThreads) {
    const int4 four = fours[i];
    mine += int64_t{four.x} + four.y + four.z + four.w;
  }
  const int rest = 4 * whole + threadIdx.x;
  if (rest < entry.blocks) mine += entry.counts[rest];
  return block_sum(mine);
}

// W under a threshold of zero, and how many of them this thread kept.
template <typename W>
__device__ __forceinline__ int mask_again(const GuardEntry& entry) {
  const W* weights = static_cast<const W*>(entry.weight);
  const int64_t stride = static_cast<int64_t>(kGuardBlocks) * kThreads;
  int kept = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       first < entry.numel; first += kGuardUnroll * stride) {
    W loaded[kGuardUnroll];
#pragma unroll
    for (int i = 0; i < kGuardUnroll; ++i) {
      if (first + i * stride < entry.numel) loaded[i] = weights[first + i * stride];
    }
#pragma unroll
    for (int i = 0; i < kGuardUnroll; ++i) {
      const int64_t place = first + i * stride;
      if (place >= entry.numel) break;
      const float weight = to_float(loaded[i]);
      store_as<Cache::kKeep>(entry.masked_storage, entry.masked, place,
                             Vector<float, 1>{masked(weight, 0.0f)});
      kept += !pruned(weight, 0.0f);
    }
  }
  return kept;
}

__global__ void __launch_bounds__(kThreads) guard_kernel(const __grid_constant__ GuardTable table) {
  const float* found_inf = table.common.found_inf;
  if (found_inf != nullptr && *found_inf == 1.0f) return;
  const GuardEntry& entry = table.entries[blockIdx.y];
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  if (first) {
    for (float* step : entry.steps) {
      if (step != nullptr) *step += 1.0f;
    }
  }
  if (entry.kept == nullptr) return;
  if (entry.collapsed < 0 && blockIdx.x != 0) return;

  // The thresholds must not be read here: another block may already have reset them.
  const int64_t kept = sum_counts(entry);
  if (kept > entry.collapsed) {
    if (first) *entry.kept = kept;
    return;
  }
  for (float* numbers : entry.reset) {
    if (numbers != nullptr) for_each_of(entry.resets, [&](int64_t i) { numbers[i] = 0.0f; });
  }
  int again = 0;
  with_type(entry.weight_storage, [&](auto type) { again = mask_again<decltype(type)>(entry); });
  // The first launch has set the sum to 0. Integers: the order does not matter.
  const int of_block = block_sum(again);
  if (threadIdx.x == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(entry.kept),
              static_cast<unsigned long long>(of_block));
  }
}

}  // namespace

void launch_guard(const Launcher& launch, const std::vector<GuardEntry>& entries,
                  const float* found_inf) {
  const auto start = [&](const GuardTable& table, unsigned segments) {
    launch(guard_kernel, dim3(kGuardBlocks, segments), table);
  };
  Batch<GuardTable, decltype(start)> batch(start);
  batch.common() = {found_inf};
  for (const GuardEntry& entry : entries) batch.add(entry);
  batch.flush();
}

}  // namespace dst::cuda
