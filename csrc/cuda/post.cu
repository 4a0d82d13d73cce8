// dW and dt from the dense gradient G: one pass over all layers.
#include <vector>

#include "../ops.h"
#include "../segments.h"
#include "launch.h"
#include "memory.cuh"
#include "reduce.cuh"
#include "surrogate.cuh"
#include "table.cuh"

namespace dst::cuda {
namespace {

constexpr int kPostAhead = 8;
constexpr int32_t kPostPiece = 8192;

struct PostEntry {
  const void* grad;
  const void* weight;
  const float* threshold;
  void* grad_weight;
  float* grad_threshold;
  float* partial;  // sums of pieces, where a threshold governs more than one
  Tiling tiling;
  Surrogate surrogate;
  Storage grad_storage;
  bool structure;
  bool by_element;  // as many thresholds as weights
  bool wide;        // accesses of several numbers fit
};

using PostTable = Table<PostEntry>;

template <typename G, typename W, int N>
struct Loaded {
  Vector<G, N> grad;
  Vector<W, N> weight;
};

template <typename G, typename W, int N>
__device__ __forceinline__ Loaded<G, W, N> load_both(const PostEntry& entry, int64_t i) {
  return {load<Cache::kOnce, N>(static_cast<const G*>(entry.grad) + i),
          load<Cache::kOnce, N>(static_cast<const W*>(entry.weight) + i)};
}

// One threshold for all of the share; returns this thread's part of -dt.
template <typename G, typename W, int N>
__device__ __forceinline__ float post_under_one(const PostEntry& entry, const Share& share,
                                                const Differentiation& differentiate) {
  W* out = static_cast<W*>(entry.grad_weight);
  const float threshold = share.row < entry.tiling.rows ? entry.threshold[share.row] : 0.0f;
  float sum = 0.0f;
  stream<N, kPostAhead>(
      share, [&](int64_t i) { return load_both<G, W, N>(entry, i); },
      [&](int64_t i, const Loaded<G, W, N>& loaded) {
        const Vector<float, N> grad = to_floats(loaded.grad), weight = to_floats(loaded.weight);
        Vector<float, N> of_weight, minus_threshold;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const auto both = differentiate(grad.numbers[k], weight.numbers[k], threshold);
          of_weight.numbers[k] = both.weight;
          minus_threshold.numbers[k] = both.minus_threshold;
        }
        sum += tree_sum(minus_threshold);
        store<Cache::kOnce>(out + i, from_floats<W>(of_weight));
      });
  return sum;
}

template <typename G, typename W, int N>
struct LoadedWithThreshold {
  Loaded<G, W, N> both;
  Vector<float, N> threshold;
};

template <typename G, typename W, int N>
__device__ __forceinline__ void post_by_element(const PostEntry& entry, const Share& share,
                                                const Differentiation& differentiate) {
  W* out = static_cast<W*>(entry.grad_weight);
  stream<N, kPostAhead>(
      share,
      [&](int64_t i) {
        return LoadedWithThreshold<G, W, N>{load_both<G, W, N>(entry, i),
                                            load<Cache::kOnce, N>(entry.threshold + i)};
      },
      [&](int64_t i, const LoadedWithThreshold<G, W, N>& loaded) {
        const Vector<float, N> grad = to_floats(loaded.both.grad);
        const Vector<float, N> weight = to_floats(loaded.both.weight);
        Vector<float, N> of_weight, of_threshold;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const auto both =
              differentiate(grad.numbers[k], weight.numbers[k], loaded.threshold.numbers[k]);
          of_weight.numbers[k] = both.weight;
          of_threshold.numbers[k] = -both.minus_threshold;
        }
        store<Cache::kOnce>(out + i, from_floats<W>(of_weight));
        store<Cache::kOnce>(entry.grad_threshold + i, of_threshold);
      });
}

template <typename W, typename Table>
__global__ void __launch_bounds__(kThreads) post_kernel(const __grid_constant__ Table table) {
  const auto place = table.place(blockIdx.x);
  const PostEntry& entry = place.entry;
  const int block = place.block;
  const Share share = entry.tiling.share(block);
  const Differentiation differentiate{Curve::of(entry.surrogate), entry.structure};
  float sum = 0.0f;
  with_type(entry.grad_storage, [&](auto type) {
    using G = decltype(type);
    if (entry.by_element) {
      if (entry.wide) {
        post_by_element<G, W, kWidth<G, W, float>>(entry, share, differentiate);
      } else {
        post_by_element<G, W, 1>(entry, share, differentiate);
      }
    } else {
      sum = entry.wide ? post_under_one<G, W, kWidth<G, W>>(entry, share, differentiate)
                       : post_under_one<G, W, 1>(entry, share, differentiate);
    }
  });
  if (entry.by_element) return;
  const float total = share_sum(share, sum);
  if (share.rank != 0 || share.row >= entry.tiling.rows) return;
  if (entry.partial != nullptr) {
    entry.partial[block] = total;
  } else {
    entry.grad_threshold[share.row] = -total;
  }
}

// Thresholds whose sums lie in pieces.
struct PieceEntry {
  const float* partial;
  float* grad_threshold;
  int64_t rows;
  int32_t pieces;
};

using PieceTable = Table<PieceEntry>;

// One warp for each threshold.
template <typename Table>
__global__ void __launch_bounds__(kThreads) add_pieces_kernel(const __grid_constant__ Table table) {
  const auto place = table.place(blockIdx.x);
  const PieceEntry& entry = place.entry;
  const int block = place.block;
  const int64_t row = static_cast<int64_t>(block) * kWarps + threadIdx.x / kWarp;
  if (row >= entry.rows) return;
  const float* partial = entry.partial + row * entry.pieces;
  const int lane = threadIdx.x % kWarp;
  float sum = 0.0f;
#pragma unroll 4
  for (int i = lane; i < entry.pieces; i += kWarp) sum += partial[i];
  sum = warp_sum(sum);
  if (lane == 0) entry.grad_threshold[row] = -sum;
}

PostEntry entry_of(const PostSegment& s) {
  PostEntry entry = {};
  entry.grad = s.grad.data;
  entry.weight = s.weight.data;
  entry.threshold = static_cast<const float*>(s.threshold.data);
  entry.grad_weight = s.grad_weight.data;
  entry.grad_threshold = static_cast<float*>(s.grad_threshold.data);
  entry.tiling = s.granularity == Granularity::kRow
                     ? Tiling::of_rows(s.shape.rows, s.shape.columns, kPostPiece)
                     : Tiling::flat(s.weight.numel, kPostPiece);
  entry.surrogate = s.surrogate;
  entry.structure = s.structure;
  entry.grad_storage = s.grad.storage;
  entry.by_element = s.granularity == Granularity::kElement;
  const int64_t columns = entry.tiling.columns;
  if (entry.by_element) {
    entry.wide = fits(kWidth<float>, columns,
                      {s.grad, s.weight, s.grad_weight, s.threshold, s.grad_threshold});
  } else {
    entry.wide = fits(width_of({s.grad.storage, s.weight.storage}), columns,
                      {s.grad, s.weight, s.grad_weight});
  }
  return entry;
}

bool in_pieces(const PostEntry& entry) { return !entry.by_element && entry.tiling.pieces > 1; }

}  // namespace

}  // namespace dst::cuda

namespace dst {

using namespace cuda;

Outputs post(const Tensors& grads, const Tensors& weights, const Tensors& thresholds,
             const Integers& settings, const std::optional<Tensors>& grad_weights,
             const std::optional<Tensors>& grad_thresholds) {
  const Reader reader("post", weights, false);
  Outputs outputs(grad_weights ? *grad_weights : new_like(weights),
                  grad_thresholds ? *grad_thresholds : new_like(thresholds));
  const auto segments = post_segments(reader, grads, weights, thresholds, settings,
                                      std::get<0>(outputs), std::get<1>(outputs));
  if (segments.empty()) return outputs;
  const Launcher launch(reader.op(), weights[0]);

  std::vector<PostEntry> entries;
  int64_t pieces = 0;
  for (const PostSegment& s : segments) {
    entries.push_back(entry_of(s));
    if (in_pieces(entries.back())) pieces += entries.back().tiling.blocks();
  }
  const Tensor partial = launch.workspace(pieces, ScalarType::Float);
  float* next = static_cast<float*>(partial.mutable_data_ptr());
  const auto start_pieces = [&]<typename Table>(const Table& table, unsigned grid) {
    launch(add_pieces_kernel<Table>, grid, table);
  };
  Batch<PieceTable, decltype(start_pieces)> sums(start_pieces);
  for (PostEntry& entry : entries) {
    if (!in_pieces(entry)) continue;
    entry.partial = next;
    next += entry.tiling.blocks();
  }

  for_each_type([&](Storage storage, auto type) {
    const auto start = [&]<typename Table>(const Table& table, unsigned grid) {
      launch(post_kernel<decltype(type), Table>, grid, table);
    };
    Batch<PostTable, decltype(start)> batch(start);
    for (size_t i = 0; i < segments.size(); ++i) {
      if (segments[i].weight.storage == storage) batch.add(entries[i], entries[i].tiling.blocks());
    }
    batch.flush();
  });

  for (const PostEntry& entry : entries) {
    if (!in_pieces(entry)) continue;
    const int64_t rows = entry.tiling.rows;
    sums.add({entry.partial, entry.grad_threshold, rows, entry.tiling.pieces},
             (rows + kWarps - 1) / kWarps);
  }
  sums.flush();
  return outputs;
}

}  // namespace dst
