// Many segments in one launch: the kernel's parameters hold a table of them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>

#include "launch.h"

namespace dst::cuda {

// All parameters of a kernel together, from CUDA 12.1 on.
constexpr int kParameterBytes = 32764;

// The parameters of a ResNet-50 or of a GPT with 124 M: these should be one launch.
constexpr int kUsualSegments = 160;

// A launch copies all parameters of its kernel, used or not: a layer by itself, or a small model,
// takes a kernel that has few.
constexpr int kSmallParameterBytes = 2048;
constexpr int kFewSegments = 8;

struct Nothing {};

// Passed by value as a `const __grid_constant__` parameter, which a kernel reads in place.
template <typename Entry_, typename Common_ = Nothing, int bytes = kParameterBytes>
struct Table {
  using Entry = Entry_;
  using Common = Common_;
  using Small = Table<Entry, Common, kSmallParameterBytes>;
  static constexpr int kCapacity = (bytes - 16 - static_cast<int>(sizeof(Common))) /
                                   static_cast<int>(sizeof(Entry) + sizeof(int));

  Common common;
  int count;
  int first_block[kCapacity];
  Entry entries[kCapacity];

  struct Place {
    const Entry& entry;
    int block;  // of this entry's
  };

  // What a block works on: the last entry that begins at or before it.
  __device__ __forceinline__ Place place(int block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return {entries[low], block - first_block[low]};
  }
};

// Fills tables and hands each to `start(table, blocks)` when it is full, and at the end: a `Table`,
// or a `Table::Small` where that has room.
template <typename Table, typename Start>
class Batch {
  using Small = typename Table::Small;
  static_assert(sizeof(Table) <= kParameterBytes && Table::kCapacity >= kUsualSegments);
  static_assert(sizeof(Small) <= kSmallParameterBytes && Small::kCapacity >= kFewSegments);

 public:
  explicit Batch(const Start& start) : start_(start) { table_.count = 0; }

  typename Table::Common& common() { return table_.common; }

  bool full() const { return table_.count == Table::kCapacity; }

  void add(const typename Table::Entry& entry, int64_t blocks = 1) {
    if (full() || blocks_ + blocks > INT_MAX) flush();
    table_.first_block[table_.count] = static_cast<int>(blocks_);
    table_.entries[table_.count++] = entry;
    blocks_ += blocks;
  }

  void flush() {
    const auto blocks = static_cast<unsigned>(blocks_);
    const int count = table_.count;
    if (count > Small::kCapacity) {
      start_(table_, blocks);
    } else if (count != 0) {
      Small small;
      small.common = table_.common;
      small.count = count;
      std::copy_n(table_.first_block, count, small.first_block);
      std::copy_n(table_.entries, count, small.entries);
      start_(small, blocks);
    }
    table_.count = 0;
    blocks_ = 0;
  }

 private:
  const Start& start_;
  Table table_;
  int64_t blocks_ = 0;
};

}  // namespace dst::cuda
