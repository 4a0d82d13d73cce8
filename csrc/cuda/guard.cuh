// The collapse guard: the second launch behind every kernel that masks.
//
// Whether a layer has collapsed is known only when all of it has been counted. The first launch
// therefore works with the thresholds as they are and leaves one count per block; the second adds
// them up and leaves at once, unless the layer has collapsed. Then it masks the layer again, under
// zero thresholds. Counts are integers: the decision is exact and does not depend on any order.
#pragma once

#include <cstdint>
#include <vector>

#include "../arguments.h"
#include "launch.h"

namespace dst::cuda {

// The counts of each segment begin at a multiple of this.
constexpr int64_t kCountAlignment = 4;

inline int64_t room_for_counts(int64_t blocks) {
  return (blocks + kCountAlignment - 1) / kCountAlignment * kCountAlignment;
}

struct GuardEntry {
  const int* counts = nullptr;  // kept weights, one number for each block of the first launch
  int64_t* kept = nullptr;      // their sum; null: nothing was masked
  int64_t collapsed = -1;       // the layer is reset up to this sum
  const void* weight = nullptr;
  void* masked = nullptr;
  int64_t numel = 0;
  float* reset[2] = {};  // what else becomes zero: thresholds, where a reset is committed
  int64_t resets = 0;    // how many numbers each of them has
  float* steps[2] = {};  // counts of optimizer steps to advance
  int32_t blocks = 0;    // how many counts
  Storage weight_storage, masked_storage;
};

// Nothing happens where `found_inf` is given and 1.
void launch_guard(const Launcher& launch, const std::vector<GuardEntry>& entries,
                  const float* found_inf);

}  // namespace dst::cuda
