// Which block of a segment is the last to be through: every block adds itself to a counter,
// together with what it has counted. The one that finds all others there also has the sum of their
// counts, as integers in any order.
//
// A counter is 0 before a launch, and the last block leaves a 0 behind: no launch has to clear it.
// So launches that may run at the same time must not share one. Those of one stream run one after
// the other and use the counters of their stream. A graph may be replayed on any stream: a launch
// that is captured gets counters of its own. When all are given away, a call clears some itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>

#include "launch.h"
#include "memory.cuh"

namespace dst::cuda {

using Counter = unsigned long long;  // the blocks, above the sum of what they have counted

constexpr int kCountBits = 36;
constexpr int kBlockBits = 64 - kCountBits;

namespace {  // each of the files that nvcc gets has its own

constexpr int kCounters = 1 << 14;
__device__ Counter counters[kCounters];

// What a device's counters are given away for.
class Counters {
 public:
  static Counters& of(const Launcher& launch) {
    static std::mutex mutex;
    static auto& all = *new std::map<int, Counters>;  // for threads that outlive main
    const std::lock_guard lock(mutex);
    return all[launch.device()];
  }

  // `count` of them that are 0; null if there are none for this stream.
  Counter* take(const Launcher& launch, int count) {
    cudaStreamCaptureStatus status;
    launch.check(cudaStreamIsCapturing(launch.stream(), &status), "the stream could not be asked");
    const std::lock_guard lock(mutex_);
    if (status != cudaStreamCaptureStatusNone) return give(launch, count);
    unsigned long long id;  // unlike a handle, never used again
    if (cudaStreamGetId(launch.stream(), &id) != cudaSuccess) return nullptr;
    Range& range = of_streams_[id];
    if (range.count < count) {
      int room = kLeast;
      while (room < count) room *= 2;
      Counter* const first = give(launch, room);
      if (first == nullptr) return nullptr;
      range = {first, room};
    }
    return range.first;
  }

 private:
  static constexpr int kLeast = 32;

  struct Range {
    Counter* first = nullptr;
    int count = 0;
  };

  Counter* give(const Launcher& launch, int count) {
    if (all_ == nullptr) {
      void* address = nullptr;
      launch.check(cudaGetSymbolAddress(&address, counters), "the counters were not found");
      all_ = static_cast<Counter*>(address);
    }
    if (count > kCounters - given_) return nullptr;
    given_ += count;
    return all_ + given_ - count;
  }

  std::mutex mutex_;
  Counter* all_ = nullptr;
  int given_ = 0;
  std::map<unsigned long long, Range> of_streams_;
};

// The counters of one call.
class Arrivals {
 public:
  Arrivals(const Launcher& launch, size_t segments)
      : launch_(launch), left_(static_cast<int>(segments)) {}

  // For a segment of so many numbers.
  Counter* of(int64_t numel, int64_t blocks) {
    STD_TORCH_CHECK(numel >> kCountBits == 0 && blocks >> kBlockBits == 0, launch_.op(), ": ",
                    numel, " weights in ", blocks,
                    " blocks are too many to be counted, expected less than 2^", kCountBits,
                    " and 2^", kBlockBits);
    if (next_ == nullptr) next_ = first();
    return next_++;
  }

 private:
  Counter* first() {
    if (Counter* const taken = Counters::of(launch_).take(launch_, left_)) return taken;
    cleared_ = launch_.workspace(left_, ScalarType::Long);
    void* const memory = cleared_->mutable_data_ptr();
    launch_.check(cudaMemsetAsync(memory, 0, left_ * sizeof(Counter), launch_.stream()),
                  "counters could not be cleared");
    return static_cast<Counter*>(memory);
  }

  const Launcher& launch_;
  const int left_;
  Counter* next_ = nullptr;
  std::optional<torch::stable::Tensor> cleared_;
};

}  // namespace

// For all threads of a block that has done its part, all of which have been at a barrier since.
// Returns, in the last of the segment's `blocks`, the sum of what all blocks have counted, and what
// they have written is there; in all others, -1.
__device__ __forceinline__ int64_t sum_in_last(Counter* counter, int64_t blocks, int counted) {
  __shared__ Counter before;
  const Counter others = static_cast<Counter>(blocks - 1);
  if (threadIdx.x == 0) {
    before = add_after_writes(counter, (Counter{1} << kCountBits) + counted);
    if (before >> kCountBits == others) {
      __threadfence();
      *counter = 0;
    }
  }
  __syncthreads();
  if (before >> kCountBits != others) return -1;
  return static_cast<int64_t>(before - (others << kCountBits)) + counted;
}

}  // namespace dst::cuda
