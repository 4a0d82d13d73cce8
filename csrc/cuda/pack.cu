// W * M in its own dtype, counts and effective thresholds: one pass over all weights.
#include <vector>

#include "../ops.h"
#include "../segments.h"
#include "guard.cuh"
#include "launch.h"
#include "memory.cuh"
#include "reduce.cuh"
#include "table.cuh"

namespace dst::cuda {
namespace {

constexpr int kPackAhead = 16;
constexpr int32_t kPackPiece = 4096;

struct PackEntry {
  const void* weight;
  const float* threshold;
  void* masked;
  float* effective;
  int64_t* kept;
  int* counts;
  Tiling tiling;
  Storage masked_storage;
  bool by_element;  // as many thresholds as weights
  bool wide;        // accesses of several numbers fit
};

using PackTable = Table<PackEntry>;

// Returns what this thread has kept.
template <typename W, typename P, int N>
__device__ __forceinline__ int pack_under_one(const PackEntry& entry, const Share& share) {
  if (share.row >= entry.tiling.rows) return 0;
  const W* weights = static_cast<const W*>(entry.weight);
  P* packed = static_cast<P*>(entry.masked);
  const float threshold = entry.threshold[share.row];
  if (share.rank == 0) entry.effective[share.row] = threshold;
  int kept = 0;
  stream<N, kPackAhead>(
      share, [&](int64_t i) { return load<Cache::kOnce, N>(weights + i); },
      [&](int64_t i, const Vector<W, N>& loaded) {
        Vector<float, N> weight = to_floats(loaded);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          kept += !pruned(weight.numbers[k], threshold);
          weight.numbers[k] = masked(weight.numbers[k], threshold);
        }
        store<Cache::kKeep>(packed + i, from_floats<P>(weight));
      });
  return kept;
}

template <typename W, int N>
struct WithThreshold {
  Vector<W, N> weight;
  Vector<float, N> threshold;
};

template <typename W, typename P, int N>
__device__ __forceinline__ int pack_by_element(const PackEntry& entry, const Share& share) {
  const W* weights = static_cast<const W*>(entry.weight);
  P* packed = static_cast<P*>(entry.masked);
  int kept = 0;
  stream<N, kPackAhead / 2>(
      share,
      [&](int64_t i) {
        return WithThreshold<W, N>{load<Cache::kOnce, N>(weights + i),
                                   load<Cache::kOnce, N>(entry.threshold + i)};
      },
      [&](int64_t i, const WithThreshold<W, N>& loaded) {
        Vector<float, N> weight = to_floats(loaded.weight);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          kept += !pruned(weight.numbers[k], loaded.threshold.numbers[k]);
          weight.numbers[k] = masked(weight.numbers[k], loaded.threshold.numbers[k]);
        }
        store<Cache::kKeep>(packed + i, from_floats<P>(weight));
        store<Cache::kKeep>(entry.effective + i, loaded.threshold);
      });
  return kept;
}

template <typename W>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackTable table) {
  const auto place = table.place(blockIdx.x);
  const PackEntry& entry = place.entry;
  const int block = place.block;
  const Share share = entry.tiling.share(block);
  int kept = 0;
  with_type(entry.masked_storage, [&](auto type) {
    using P = decltype(type);
    if (entry.by_element) {
      kept = entry.wide ? pack_by_element<W, P, kWidth<W, P, float>>(entry, share)
                        : pack_by_element<W, P, 1>(entry, share);
    } else {
      kept = entry.wide ? pack_under_one<W, P, kWidth<W, P>>(entry, share)
                        : pack_under_one<W, P, 1>(entry, share);
    }
  });
  const int of_block = block_sum(kept);
  if (threadIdx.x != 0) return;
  entry.counts[block] = of_block;
  if (block == 0) *entry.kept = 0;  // for the guard, which may add to it
}

PackEntry entry_of(const PackSegment& s) {
  const bool by_element = s.granularity == Granularity::kElement;
  const bool by_row = s.granularity == Granularity::kRow;
  PackEntry entry = {};
  entry.weight = s.weight.data;
  entry.threshold = static_cast<const float*>(s.threshold.data);
  entry.masked = s.masked.data;
  entry.effective = static_cast<float*>(s.effective.data);
  entry.tiling = by_row ? Tiling::of_rows(s.shape.rows, s.shape.columns, kPackPiece)
                        : Tiling::flat(s.weight.numel, kPackPiece);
  entry.masked_storage = s.masked.storage;
  entry.by_element = by_element;
  if (by_element) {
    entry.wide =
        fits(kWidth<float>, entry.tiling.columns, {s.weight, s.masked, s.threshold, s.effective});
  } else {
    entry.wide = fits(width_of({s.weight.storage, s.masked.storage}), entry.tiling.columns,
                      {s.weight, s.masked});
  }
  return entry;
}

GuardEntry guard_of(const PackSegment& s, const PackEntry& entry) {
  GuardEntry guard;
  guard.counts = entry.counts;
  guard.blocks = static_cast<int32_t>(entry.tiling.blocks());
  guard.kept = entry.kept;
  guard.collapsed = s.weight ? s.collapsed : -1;  // nothing cannot collapse
  guard.weight = entry.weight;
  guard.masked = entry.masked;
  guard.numel = s.weight.numel;
  guard.reset[0] = entry.effective;
  guard.reset[1] = s.commit ? static_cast<float*>(s.threshold.data) : nullptr;
  guard.resets = s.threshold.numel;
  guard.weight_storage = s.weight.storage;
  guard.masked_storage = s.masked.storage;
  return guard;
}

}  // namespace

}  // namespace dst::cuda

namespace dst {

using namespace cuda;

Outputs pack(const Tensors& weights, const Tensors& thresholds, const Integers& settings,
             const std::optional<Tensors>& masked, const std::optional<Tensors>& effective,
             const std::optional<Tensor>& kept, std::optional<ScalarType> dtype) {
  const Reader reader("pack", weights, false);
  Outputs outputs(masked ? *masked : new_like(weights, dtype),
                  effective ? *effective : new_like(thresholds));
  const auto segments = pack_segments(reader, weights, thresholds, settings, std::get<0>(outputs),
                                      std::get<1>(outputs));
  if (segments.empty()) return outputs;
  const Launcher launch(reader.op(), weights[0]);
  const Tensor sums = kept ? *kept : launch.workspace(segments.size(), ScalarType::Long);
  int64_t* const counts_kept = reader.counts(sums, "kept");

  std::vector<PackEntry> entries;
  int64_t room = 0;
  for (const PackSegment& s : segments) {
    entries.push_back(entry_of(s));
    room += room_for_counts(entries.back().tiling.blocks());
  }
  const Tensor counts = launch.workspace(room, ScalarType::Int);
  int* next = static_cast<int*>(counts.mutable_data_ptr());
  std::vector<GuardEntry> guards;
  for (size_t i = 0; i < segments.size(); ++i) {
    entries[i].kept = counts_kept + i;
    entries[i].counts = next;
    next += room_for_counts(entries[i].tiling.blocks());
    guards.push_back(guard_of(segments[i], entries[i]));
  }

  for_each_type([&](Storage storage, auto type) {
    const auto start = [&](const PackTable& table, unsigned grid) {
      launch(pack_kernel<decltype(type)>, grid, table);
    };
    Batch<PackTable, decltype(start)> batch(start);
    for (size_t i = 0; i < segments.size(); ++i) {
      if (segments[i].weight.storage == storage) batch.add(entries[i], entries[i].tiling.blocks());
    }
    batch.flush();
  });
  launch_guard(launch, guards, nullptr);
  return outputs;
}

}  // namespace dst
