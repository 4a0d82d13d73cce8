// The norm of all final gradients, dW and dt among them, without writing any.
#include <vector>

#include "../ops.h"
#include "launch.h"
#include "reduce.cuh"
#include "step_table.cuh"
#include "surrogate.cuh"
#include "total.cuh"

namespace dst::cuda {
namespace {

constexpr int kNormAhead = 16;

struct NormEntry {
  const void* grad;  // null: none
  const void* weight;
  const float* threshold;  // null: a plain parameter
  const void* threshold_grad;
  double* partial;  // one for each block
  Tiling tiling;
  Alpha alpha;                           // of the threshold, or of the plain parameter
  bool counts_weight, counts_threshold;  // what is not updated does not count
  Surrogate surrogate : 8;
  Storage grad_storage : 8, threshold_grad_storage : 8;
  bool structure;
  bool wide;  // accesses of several numbers fit
};

struct NormCommon {
  const float* grad_scale;
};

using NormTable = Table<NormEntry, NormCommon>;

template <typename W, typename G, int N>
struct Pair {
  Vector<G, N> grad;
  Vector<W, N> weight;
};

// f(weight, raw gradient) for every element of the share. Without gradient the second is 0.
template <typename W, typename G, int N, typename F>
__device__ __forceinline__ void for_each_pair(const NormEntry& entry, const Share& share,
                                              const F& f) {
  const G* grads = static_cast<const G*>(entry.grad);
  const W* weights = static_cast<const W*>(entry.weight);
  stream<N, kNormAhead>(
      share,
      [&](int64_t i) {
        Pair<W, G, N> loaded = {};
        if (grads != nullptr) loaded.grad = load<Cache::kOnce, N>(grads + i);
        loaded.weight = load<Cache::kOnce, N>(weights + i);
        return loaded;
      },
      [&](int64_t, const Pair<W, G, N>& loaded) {
        f(to_floats(loaded.weight), to_floats(loaded.grad));
      });
}

// The functions below return this thread's part of the sum of squares. Within a few elements it
// is added up in float, from there on in double, which some GPUs have little of.

template <typename W, typename G, int N>
__device__ __forceinline__ double norm_of_rows(const NormEntry& entry, const Share& share,
                                               float inverse) {
  const Differentiation differentiate{Curve::of(entry.surrogate), entry.structure};
  const bool inside = share.row < entry.tiling.rows;
  const float threshold = inside ? entry.threshold[share.row] : 0.0f;
  double squares = 0.0;
  float sum = 0.0f;
  if (entry.grad != nullptr) {
    for_each_pair<W, G, N>(
        entry, share, [&](const Vector<float, N>& weight, const Vector<float, N>& grad) {
          Vector<float, N> square, minus;
#pragma unroll
          for (int k = 0; k < N; ++k) {
            const auto both =
                differentiate(grad.numbers[k] * inverse, weight.numbers[k], threshold);
            square.numbers[k] = both.weight * both.weight;
            minus.numbers[k] = both.minus_threshold;
          }
          squares += tree_sum(square);
          sum += tree_sum(minus);
        });
    if (!entry.counts_weight) squares = 0.0;
  }
  if (!entry.counts_threshold) return squares;
  float gradient = -share_sum(share, sum);
  if (share.rank != 0 || !inside) return squares;
  if (entry.threshold_grad != nullptr) {
    gradient += load_as(entry.threshold_grad_storage, entry.threshold_grad, share.row) * inverse;
  }
  if (entry.alpha.given) gradient += entry.alpha() * regularization_slope(threshold);
  return squares + static_cast<double>(gradient) * gradient;
}

template <typename W, typename G, int N>
__device__ __forceinline__ double norm_of_plain(const NormEntry& entry, const Share& share,
                                                float inverse) {
  const float alpha = entry.alpha.given ? entry.alpha() : 0.0f;
  double squares = 0.0;
  for_each_pair<W, G, N>(entry, share,
                         [&](const Vector<float, N>& weight, const Vector<float, N>& grad) {
                           Vector<float, N> square;
#pragma unroll
                           for (int k = 0; k < N; ++k) {
                             float gradient = grad.numbers[k] * inverse;
                             if (entry.alpha.given)
                               gradient += alpha * regularization_slope(weight.numbers[k]);
                             square.numbers[k] = gradient * gradient;
                           }
                           squares += tree_sum(square);
                         });
  return squares;
}

template <typename W, typename Table>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ Table table) {
  const auto place = table.place(blockIdx.x);
  const NormEntry& entry = place.entry;
  const int block = place.block;
  const Share share = entry.tiling.share(block);
  const float* scale = table.common.grad_scale;
  const float inverse = scale != nullptr ? 1.0f / *scale : 1.0f;
  double squares = 0.0;
  const auto add = [&](auto type) {
    using G = decltype(type);
    constexpr int N = kWidth<W, G>;
    if (entry.threshold != nullptr) {
      squares = entry.wide ? norm_of_rows<W, G, N>(entry, share, inverse)
                           : norm_of_rows<W, G, 1>(entry, share, inverse);
    } else {
      squares = entry.wide ? norm_of_plain<W, G, N>(entry, share, inverse)
                           : norm_of_plain<W, G, 1>(entry, share, inverse);
    }
  };
  if constexpr (std::is_same_v<W, float>) {
    with_type(entry.grad_storage, add);
  } else {
    add(W{});
  }
  const double total = block_sum(squares);
  if (threadIdx.x == 0) entry.partial[block] = total;
}

NormEntry entry_of(const StepSegment& s, const std::vector<Hyper>& hypers) {
  NormEntry entry = {};
  entry.grad = pointer(s.grad);
  entry.weight = s.weight.data;
  entry.threshold = static_cast<const float*>(pointer(s.threshold));
  entry.threshold_grad = pointer(s.threshold_grad);
  entry.tiling = tiling_of(s, kPlainPiece);
  const int32_t row = s.threshold ? s.threshold_hyper : s.weight_hyper;
  if (row >= 0) entry.alpha = Alpha::of(hypers[row]);
  entry.counts_weight = s.weight_hyper >= 0;
  entry.counts_threshold = s.threshold_hyper >= 0;
  entry.surrogate = s.surrogate;
  entry.grad_storage = s.grad ? s.grad.storage : s.weight.storage;
  entry.threshold_grad_storage = s.threshold_grad.storage;
  entry.structure = s.structure;
  entry.wide = fits(width_of({s.weight.storage, entry.grad_storage}), entry.tiling.columns,
                    {s.weight, s.grad});
  return entry;
}

}  // namespace

}  // namespace dst::cuda

namespace dst {

using namespace cuda;

void grad_norm(const Tensors& weights, const Tensors& grads, const Tensors& thresholds,
               const Tensors& threshold_grads, const Integers& settings, const Tensor& hypers,
               const Tensors& alphas, const Tensors& scales, const Tensor& norm) {
  const Reader reader("grad_norm", weights.empty() ? Tensors{norm} : weights, false);
  const Array result = reader.required(norm, {"norm", 0}, 1);
  reader.check_storage(result, Storage::kFloat32, {"norm", 0});
  const auto hyper_rows = read_hypers(reader, hypers, {}, alphas);
  std::vector<StepSegment> segments;
  if (!weights.empty()) {
    segments = step_segments(reader, weights, grads, thresholds, threshold_grads, settings,
                             hyper_rows.size());
  }
  const Launcher launch(reader.op(), norm);

  std::vector<NormEntry> entries;
  int64_t blocks = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    check_grad(reader, segments[i], i);
    const bool counts =
        updates_weight(segments[i], hyper_rows) || updates_threshold(segments[i], hyper_rows);
    entries.push_back(entry_of(segments[i], hyper_rows));
    if (counts) blocks += entries.back().tiling.blocks();
  }
  const Tensor partial = launch.workspace(blocks, ScalarType::Double);
  double* const sums = static_cast<double*>(partial.mutable_data_ptr());
  double* next = sums;
  for_each_type([&](Storage storage, auto type) {
    const auto start = [&]<typename Table>(const Table& table, unsigned grid) {
      launch(norm_kernel<decltype(type), Table>, grid, table);
    };
    Batch<NormTable, decltype(start)> batch(start);
    batch.common() = {read_scales(reader, scales).grad_scale};
    for (size_t i = 0; i < segments.size(); ++i) {
      const StepSegment& s = segments[i];
      if (s.weight.storage != storage) continue;
      if (!updates_weight(s, hyper_rows) && !updates_threshold(s, hyper_rows)) continue;
      entries[i].partial = next;
      next += entries[i].tiling.blocks();
      batch.add(entries[i], entries[i].tiling.blocks());
    }
    batch.flush();
  });
  launch_total(launch, sums, blocks, static_cast<float*>(result.data), Finish::kRoot);
}

}  // namespace dst
