// The host's side of sgd_step and adamw_step.
#pragma once

#include <vector>

#include "launch.h"
#include "step.cuh"

namespace dst::cuda {

inline StepEntry step_entry(const StepSegment& s, bool updates_threshold) {
  StepEntry entry = {};
  entry.weight = s.weight.data;
  entry.grad = pointer(s.grad);
  entry.threshold = static_cast<float*>(pointer(s.threshold));
  entry.threshold_grad = pointer(s.threshold_grad);
  entry.masked = pointer(s.masked);
  entry.of_weight = Buffers::of(s.weight_state);
  if (updates_threshold) entry.of_threshold = Buffers::of(s.threshold_state);
  entry.tiling = tiling_of(s, kPlainPiece);
  entry.surrogate = s.surrogate;
  entry.grad_storage = s.grad ? s.grad.storage : s.weight.storage;
  entry.threshold_grad_storage = s.threshold_grad.storage;
  entry.masked_storage = s.masked.storage;
  entry.structure = s.structure;
  entry.fresh_weight = s.weight_state.uninitialised;
  entry.fresh_threshold = s.threshold_state.uninitialised;
  const int width = width_of({s.weight.storage, entry.grad_storage});
  entry.wide = fits(width, entry.tiling.columns,
                    {s.weight, s.grad, s.masked, s.weight_state.first, s.weight_state.second});
  return entry;
}

// Rows of hypers that the entries of one table use, under numbers of the table's own.
template <typename Rule>
class Groups {
 public:
  explicit Groups(const std::vector<Hyper>& hypers) : hypers_(hypers) { clear(); }

  void clear() {
    numbers_.assign(hypers_.size(), -1);
    count_ = 0;
  }

  // Whether there is room for two more.
  bool full() const { return count_ + 2 > kGroups; }

  int16_t number(int32_t row, Group<Rule>* groups) {
    if (numbers_[row] < 0) {
      groups[count_] = Group<Rule>::of(hypers_[row]);
      numbers_[row] = count_++;
    }
    return numbers_[row];
  }

 private:
  const std::vector<Hyper>& hypers_;
  std::vector<int16_t> numbers_;
  int16_t count_;
};

// The segments' states have been read already. `weight` is any tensor on the device.
template <typename Rule>
void run_step(const Reader& reader, const Tensor& weight, const std::vector<StepSegment>& segments,
              const std::vector<Hyper>& hypers, const Scales& scales, int64_t* kept) {
  const Launcher launch(reader.op(), weight);
  Arrivals arrivals(launch, segments.size());
  std::vector<StepEntry> entries;
  for (size_t i = 0; i < segments.size(); ++i) {
    const StepSegment& s = segments[i];
    check_grad(reader, s, i);
    StepEntry entry = step_entry(s, updates_threshold(s, hypers));
    entry.guard.kept = kept + i;
    entry.guard.collapsed = s.collapsed;
    if (s.masked || entry.of_weight.steps || entry.of_threshold.steps) {
      entry.guard.arrivals = arrivals.of(s.weight.numel, entry.tiling.blocks());
    }
    entries.push_back(entry);
  }

  for_each_type([&](Storage storage, auto type) {
    Groups<Rule> groups(hypers);
    const auto start = [&]<typename Table>(const Table& table, unsigned grid) {
      launch(step_kernel<Rule, decltype(type), Table>, grid, table);
    };
    Batch<StepTable<Rule>, decltype(start)> batch(start);
    batch.common().scales = scales;
    for (size_t i = 0; i < segments.size(); ++i) {
      const StepSegment& s = segments[i];
      if (s.weight.storage != storage) continue;
      const bool weight_moves = updates_weight(s, hypers);
      const bool threshold_moves = updates_threshold(s, hypers);
      if (!weight_moves && !threshold_moves && !s.masked) continue;
      if (batch.full() || groups.full()) {
        batch.flush();
        groups.clear();
      }
      StepEntry& entry = entries[i];
      Group<Rule>* const table = batch.common().groups;
      entry.weight_group = weight_moves ? groups.number(s.weight_hyper, table) : -1;
      entry.threshold_group = threshold_moves ? groups.number(s.threshold_hyper, table) : -1;
      batch.add(entry, entry.tiling.blocks());
    }
    batch.flush();
  });
}

}  // namespace dst::cuda
