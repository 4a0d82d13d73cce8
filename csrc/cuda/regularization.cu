// The regulariser over all thresholds of a model, and its slopes.
#include <vector>

#include "../ops.h"
#include "launch.h"
#include "memory.cuh"
#include "reduce.cuh"
#include "table.cuh"
#include "total.cuh"

namespace dst::cuda {
namespace {

constexpr int kRegularizationAhead = 8;
constexpr int32_t kRegularizationPiece = 4096;

struct RegularizationEntry {
  const float* threshold;
  float* slope;
  double* partial;  // one for each block
  Tiling tiling;
  bool wide;  // accesses of several numbers fit
};

using RegularizationTable = Table<RegularizationEntry>;

template <int N>
__device__ __forceinline__ double regularize(const RegularizationEntry& entry, const Share& share) {
  double sum = 0.0;
  stream<N, kRegularizationAhead>(
      share, [&](int64_t i) { return load<Cache::kOnce, N>(entry.threshold + i); },
      [&](int64_t i, const Vector<float, N>& threshold) {
        Vector<float, N> value, slope;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          value.numbers[k] = regularization_value(threshold.numbers[k]);
          slope.numbers[k] = regularization_slope(threshold.numbers[k]);
        }
        sum += tree_sum(value);
        store<Cache::kKeep>(entry.slope + i, slope);
      });
  return sum;
}

template <typename Table>
__global__ void __launch_bounds__(kThreads)
    regularization_kernel(const __grid_constant__ Table table) {
  const auto place = table.place(blockIdx.x);
  const RegularizationEntry& entry = place.entry;
  const int block = place.block;
  const Share share = entry.tiling.share(block);
  const double total =
      block_sum(entry.wide ? regularize<kWidth<float>>(entry, share) : regularize<1>(entry, share));
  if (threadIdx.x == 0) entry.partial[block] = total;
}

std::vector<RegularizationEntry> read_entries(const Reader& reader, const Tensors& thresholds,
                                              const Tensors& slopes) {
  reader.check_length("slopes", slopes.size());
  std::vector<RegularizationEntry> entries;
  for (size_t i = 0; i < reader.count(); ++i) {
    const Array threshold = reader.optional(thresholds[i], {"thresholds", i});
    const Array slope = reader.required(slopes[i], {"slopes", i}, threshold.numel);
    reader.check_storage(threshold, Storage::kFloat32, {"thresholds", i});
    reader.check_storage(slope, Storage::kFloat32, {"slopes", i});
    reader.check_dense(thresholds[i], {"thresholds", i});
    reader.check_dense(slopes[i], {"slopes", i});
    RegularizationEntry entry = {};
    entry.threshold = static_cast<const float*>(threshold.data);
    entry.slope = static_cast<float*>(slope.data);
    entry.tiling = Tiling::flat(threshold.numel, kRegularizationPiece);
    entry.wide = fits(kWidth<float>, threshold.numel, {threshold, slope});
    entries.push_back(entry);
  }
  return entries;
}

}  // namespace

}  // namespace dst::cuda

namespace dst {

using namespace cuda;

void regularization(const Tensors& thresholds, const Tensor& value, const Tensors& slopes) {
  const Reader reader("regularization", thresholds.empty() ? Tensors{value} : thresholds, false);
  const Array result = reader.required(value, {"value", 0}, 1);
  reader.check_storage(result, Storage::kFloat32, {"value", 0});
  std::vector<RegularizationEntry> entries;
  if (!thresholds.empty()) entries = read_entries(reader, thresholds, slopes);
  const Launcher launch(reader.op(), value);

  int64_t blocks = 0;
  for (const RegularizationEntry& entry : entries) blocks += entry.tiling.blocks();
  const Tensor partial = launch.workspace(blocks, ScalarType::Double);
  double* const sums = static_cast<double*>(partial.mutable_data_ptr());
  double* next = sums;
  const auto start = [&]<typename Table>(const Table& table, unsigned grid) {
    launch(regularization_kernel<Table>, grid, table);
  };
  Batch<RegularizationTable, decltype(start)> batch(start);
  for (RegularizationEntry& entry : entries) {
    entry.partial = next;
    next += entry.tiling.blocks();
    batch.add(entry, entry.tiling.blocks());
  }
  batch.flush();
  launch_total(launch, sums, blocks, static_cast<float*>(result.data), Finish::kSum);
}

}  // namespace dst
