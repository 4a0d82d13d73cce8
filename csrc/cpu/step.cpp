#include "step.h"

#include <memory>
#include <utility>

namespace dst {
namespace {

template <typename Real>
DST_FUNCTION double sum_unit_of(const StepSegment& s, const Part& part, double grad_scale) {
  const Real threshold = static_cast<const Real*>(s.threshold.data)[part.row];
  const int64_t begin = part.row * s.shape.columns + part.column;
  return sum_row(s, grad_scale, threshold, begin, begin + part.columns);
}

DST_CLONES double sum_unit(const StepSegment& s, const Part& part, double grad_scale) {
  if (s.weight.storage == Storage::kFloat64) return sum_unit_of<double>(s, part, grad_scale);
  return sum_unit_of<float>(s, part, grad_scale);
}

template <typename Real>
DST_FUNCTION int64_t mask_rows(const StepSegment& s, const Part& part) {
  Real weights[kBlock], results[kBlock];
  const int64_t begin = part.row * s.shape.columns + part.column;
  const int64_t end = begin + part.rows * part.columns;
  int64_t kept = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* weight = load(s.weight, at, count, weights);
    Real* result = target(s.masked, at, results);
    kept += mask_block(weight, RowThreshold<Real>{Real(0)}, result, count);
    store(s.masked, at, count, result);
  }
  return kept;
}

// W * M under thresholds of 0.
DST_CLONES int64_t mask_collapsed(const StepSegment& s, const Part& part) {
  if (s.weight.storage == Storage::kFloat64) return mask_rows<double>(s, part);
  return mask_rows<float>(s, part);
}

void count(int64_t* kept, int64_t more) { __atomic_fetch_add(kept, more, __ATOMIC_RELAXED); }

// Updates the thresholds of rows that no part has as a whole. `memory` has a number for each unit:
// a share of -dt on the way, the row's old threshold at the end.
void update_split_rows(const Step& step, const Kernels& kernels, const Work& work, double* memory) {
  bool any = false;
  for (const StepSegment& s : step.segments) any |= sums_first(s, step);
  if (any) {
    work.run([&](const Part& part) {
      const StepSegment& s = step.segments[part.segment];
      if (sums_first(s, step)) memory[part.unit] = sum_unit(s, part, step.grad_scale);
    });
  }
  for (size_t i = 0; i < step.segments.size(); ++i) {
    const StepSegment& s = step.segments[i];
    if (!s.threshold || has_whole_rows(s.shape)) continue;
    const int64_t units = units_per_row(s.shape);
    double* unit = memory + work.first_unit(i);
    for (int64_t row = 0; row < s.shape.rows; ++row, unit += units) {
      double minus_sum = 0;
      if (sums_first(s, step)) {
        for (int64_t u = 0; u < units; ++u) minus_sum += unit[u];
      }
      std::fill_n(unit, units, load_one<double>(s.threshold, row));
      if (updates_threshold(s, step.hypers)) kernels.threshold(step, s, row, minus_sum);
    }
  }
}

// Layers of which too little is left start over with thresholds of 0.
void guard(const Step& step, int64_t* kept) {
  std::vector<Rows> shapes(step.segments.size(), Rows{0, 0});
  bool any = false;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const StepSegment& s = step.segments[i];
    if (!s.masked || kept[i] > s.collapsed) continue;
    any = true;
    shapes[i] = s.shape;
    fill_zero(s.threshold);
    kept[i] = 0;
  }
  if (!any) return;
  Work(std::move(shapes)).run([&](const Part& part) {
    count(kept + part.segment, mask_collapsed(step.segments[part.segment], part));
  });
}

}  // namespace

Step::Step(std::vector<StepSegment> segments, std::vector<Hyper> hypers, const Scales& scales)
    : segments(std::move(segments)), hypers(std::move(hypers)) {
  if (scales.grad_scale) grad_scale = *scales.grad_scale;
  if (scales.clip) clip = *scales.clip;
  skipped = scales.found_inf && *scales.found_inf == 1;
  for (Hyper& hyper : this->hypers) {
    if (hyper.rate) hyper.lr = *hyper.rate;
    if (hyper.alpha_tensor) hyper.alpha = *hyper.alpha_tensor;
  }
  for (StepSegment& s : this->segments) {
    const bool idle =
        !updates_weight(s, this->hypers) && !updates_threshold(s, this->hypers) && !s.masked;
    if (idle) s.shape = {0, 0};
  }
}

Work Step::work() const {
  std::vector<Rows> shapes;
  shapes.reserve(segments.size());
  for (const StepSegment& s : segments) shapes.push_back(s.shape);
  return Work(std::move(shapes));
}

void run_step(const Step& step, const Kernels& kernels, int64_t* kept) {
  if (step.skipped) return;
  const Work work = step.work();
  const std::unique_ptr<double[]> memory(new double[work.units()]);
  update_split_rows(step, kernels, work, memory.get());
  for (size_t i = 0; i < step.segments.size(); ++i) {
    if (step.segments[i].masked) kept[i] = 0;
  }
  work.run([&](const Part& part) {
    const StepSegment& s = step.segments[part.segment];
    const int64_t more = kernels.part(step, s, part, memory[part.unit]);
    if (s.masked) count(kept + part.segment, more);
  });
  guard(step, kept);
}

}  // namespace dst
