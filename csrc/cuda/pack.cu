// W * M in its own dtype, counts and effective thresholds: one pass over all weights.
#include <algorithm>
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
  float* threshold;
  void* masked;
  float* effective;
  Guard guard;
  Tiling tiling;
  Storage masked_storage;
  bool by_element;  // as many thresholds as weights
  bool wide;        // accesses of several numbers fit
  bool commit;      // a reset is written into `threshold` too
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
  const float* thresholds = entry.threshold;
  P* packed = static_cast<P*>(entry.masked);
  int kept = 0;
  stream<N, kPackAhead / 2>(
      share,
      [&](int64_t i) {
        return WithThreshold<W, N>{load<Cache::kOnce, N>(weights + i),
                                   load<Cache::kOnce, N>(thresholds + i)};
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

template <typename W, typename Table>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Table table) {
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
  if (entry.guard.arrivals == nullptr) return;
  const int64_t of_all = sum_in_last(entry.guard.arrivals, entry.tiling.blocks(), block_sum(kept));
  if (of_all < 0) return;
  Masked layer = {entry.weight, entry.masked, entry.tiling.numel(), entry.masked_storage,
                  entry.wide};
  layer.thresholds[0] = entry.effective;
  layer.thresholds[1] = entry.commit ? entry.threshold : nullptr;
  layer.count = entry.by_element ? layer.numel : entry.tiling.rows;
  settle<W>(entry.guard, layer, of_all);
}

PackEntry entry_of(const PackSegment& s) {
  const bool by_element = s.granularity == Granularity::kElement;
  const bool by_row = s.granularity == Granularity::kRow;
  PackEntry entry = {};
  entry.weight = s.weight.data;
  entry.threshold = static_cast<float*>(s.threshold.data);
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

// Whether segments have thresholds in common, which none of them may write while blocks of another
// still read them.
bool share_thresholds(const std::vector<PackSegment>& segments) {
  std::vector<const void*> all;
  for (const PackSegment& s : segments) {
    if (s.threshold) all.push_back(s.threshold.data);
  }
  std::sort(all.begin(), all.end());
  return std::adjacent_find(all.begin(), all.end()) != all.end();
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
  int64_t* const counts = kept ? reader.counts(*kept, "kept") : nullptr;

  const bool shared = share_thresholds(segments);
  Arrivals arrivals(launch, segments.size());
  std::vector<PackEntry> entries;
  for (size_t i = 0; i < segments.size(); ++i) {
    const PackSegment& s = segments[i];
    PackEntry entry = entry_of(s);
    entry.commit = s.commit && !shared;
    entry.guard.kept = counts ? counts + i : nullptr;
    entry.guard.collapsed = s.weight ? s.collapsed : -1;  // nothing cannot collapse
    if (counts || entry.guard.collapsed >= 0) {
      entry.guard.arrivals = arrivals.of(s.weight.numel, entry.tiling.blocks());
    }
    entries.push_back(entry);
  }

  for_each_type([&](Storage storage, auto type) {
    const auto start = [&]<typename Table>(const Table& table, unsigned grid) {
      launch(pack_kernel<decltype(type), Table>, grid, table);
    };
    Batch<PackTable, decltype(start)> batch(start);
    for (size_t i = 0; i < segments.size(); ++i) {
      if (segments[i].weight.storage == storage) batch.add(entries[i], entries[i].tiling.blocks());
    }
    batch.flush();
  });
  for (size_t i = 0; shared && i < segments.size(); ++i) {
    if (!segments[i].commit) continue;
    launch.copy(entries[i].threshold, entries[i].effective,
                segments[i].threshold.numel * sizeof(float));
  }
  return outputs;
}

}  // namespace dst
