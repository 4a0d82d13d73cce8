// What the step's kernels are told about each segment, and how the host fills that in.
#pragma once

#include <vector>

#include "../step_segments.h"
#include "guard.cuh"
#include "memory.cuh"
#include "table.cuh"
#include "update_rules.cuh"

namespace dst::cuda {

// What an optimizer keeps beside a parameter.
struct Buffers {
  void* states[2];
  float* steps;  // advanced when all have read them; null: the optimizer counts none

  static Buffers of(const State& state) {
    return {{state.first.data, state.second.data}, state.step};
  }
};

struct StepEntry {
  void* weight;
  const void* grad;  // null: none
  float* threshold;  // null: a plain parameter
  const void* threshold_grad;
  void* masked;  // null: not wanted
  Guard guard;
  Buffers of_weight, of_threshold;
  Tiling tiling;
  int16_t weight_group, threshold_group;  // in the table; -1: not updated
  Surrogate surrogate : 8;
  Storage grad_storage : 8, threshold_grad_storage : 8, masked_storage : 8;
  bool structure : 1;
  bool wide : 1;          // accesses of several numbers fit
  bool fresh_weight : 1;  // its states are to be written, not read
  bool fresh_threshold : 1;
};

// Of one table: enough for most models, and few enough for a small table.
constexpr int kGroups = 8;

template <typename Rule>
struct StepCommon {
  Scales scales;
  Group<Rule> groups[kGroups];
};

template <typename Rule>
using StepTable = Table<StepEntry, StepCommon<Rule>>;

constexpr int32_t kPlainPiece = 4096;
constexpr int64_t kLongestRow = int64_t{1} << 30;

// A null pointer, not just any, where the tensor is absent.
inline void* pointer(const Array& array) { return array ? array.data : nullptr; }

// Which gradients the kernels take beside which weights.
inline void check_grad(const Reader& reader, const StepSegment& s, size_t index) {
  const bool taken =
      s.weight.storage == Storage::kFloat32 || !s.grad || s.grad.storage == s.weight.storage;
  STD_TORCH_CHECK(taken, reader.op(), ": ", Name{"grads", index}, " is ", s.grad.storage,
                  ", expected ", s.weight.storage, ", the dtype of its weight");
  STD_TORCH_CHECK(s.shape.columns <= kLongestRow || !s.threshold, reader.op(), ": ",
                  Name{"weights", index}, " has rows of ", s.shape.columns,
                  " elements, expected at most ", kLongestRow);
}

// One row for each block or warp: its threshold must be known before its weights can be updated.
inline Tiling tiling_of(const StepSegment& s, int32_t piece) {
  if (!s.threshold) return Tiling::flat(s.weight.numel, piece);
  return Tiling::of_rows(s.shape.rows, s.shape.columns,
                         static_cast<int32_t>(s.shape.columns < 1 ? 1 : s.shape.columns));
}

}  // namespace dst::cuda
