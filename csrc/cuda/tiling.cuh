// How the numbers of one segment are shared out over blocks and threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dst::cuda {

constexpr int kWarp = 32;
// Of every block. Small blocks, so that a multiprocessor holds several, in different phases: while
// some wait for a row's sum, others keep the memory busy.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// Rows up to this length get one warp each instead of one block.
constexpr int64_t kLongestWarpRow = 1024;

// What one thread works on: `count` numbers from `begin` on, in steps of the `size` threads that
// share them, of which it is number `rank`.
struct Share {
  int64_t row;  // may be past the last one; then there is nothing to do
  int64_t begin;
  int count;
  int rank, size;
};

struct Tiling {
  int64_t rows, columns;
  int32_t pieces;  // blocks of each row; 0: one block for every kWarps rows
  int32_t piece;   // columns of each

  // Every row is cut into pieces of at most `piece` columns, unless it is short.
  static Tiling of_rows(int64_t rows, int64_t columns, int32_t piece) {
    if (columns <= kLongestWarpRow) return {rows, columns, 0, static_cast<int32_t>(columns)};
    return {rows, columns, static_cast<int32_t>((columns + piece - 1) / piece), piece};
  }

  // The same without regard to rows.
  static Tiling flat(int64_t numel, int32_t piece) {
    const int64_t pieces = (numel + piece - 1) / piece;
    return {1, numel, static_cast<int32_t>(pieces < 1 ? 1 : pieces), piece};
  }

  __device__ __forceinline__ int64_t numel() const { return rows * columns; }

  __host__ __device__ int64_t blocks() const {
    const int64_t blocks = pieces == 0 ? (rows + kWarps - 1) / kWarps : rows * pieces;
    return blocks < 1 ? 1 : blocks;
  }

  __device__ __forceinline__ Share share(int block) const {
    const int thread = threadIdx.x;
    if (pieces == 0) {
      const int64_t row = static_cast<int64_t>(block) * kWarps + thread / kWarp;
      const int count = row < rows ? static_cast<int>(columns) : 0;
      return {row, row * columns, count, thread % kWarp, kWarp};
    }
    const int row = block / pieces;
    const int64_t skipped = static_cast<int64_t>(block - row * pieces) * piece;
    const int64_t left = row < rows ? columns - skipped : 0;
    const int count = static_cast<int>(left < piece ? left : piece);
    return {row, row * columns + skipped, count, thread, kThreads};
  }
};

// Calls use(place, load(place)) for every N-th place of the share. Loads about `ahead` numbers
// before it uses any: a loop of load and store would wait for each load in turn, for all the
// compiler knows of what the stores may overwrite.
template <int N, int ahead, typename Load, typename Use>
__device__ __forceinline__ void stream(const Share& share, const Load& load, const Use& use) {
  constexpr int unroll = ahead / N < 1 ? 1 : ahead / N > 4 ? 4 : ahead / N;
  const int steps = share.count / N;
  for (int first = share.rank; first < steps; first += unroll * share.size) {
    decltype(load(int64_t{})) loaded[unroll];
#pragma unroll
    for (int i = 0; i < unroll; ++i) {
      const int step = first + i * share.size;
      if (step < steps) loaded[i] = load(share.begin + static_cast<int64_t>(step) * N);
    }
#pragma unroll
    for (int i = 0; i < unroll; ++i) {
      const int step = first + i * share.size;
      if (step < steps) use(share.begin + static_cast<int64_t>(step) * N, loaded[i]);
    }
  }
}

}  // namespace dst::cuda
