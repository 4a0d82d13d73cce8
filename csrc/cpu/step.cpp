#include "step.h"

#include <memory>
#include <utility>

namespace dst {
namespace {

template <typename Real>
DST_FUNCTION int64_t mask_rows(const StepSegment& s, const Part& part) {
  const Real* thresholds = static_cast<const Real*>(s.threshold.data);
  int64_t kept = 0;
  for (int64_t row = part.row; row < part.row + part.rows; ++row) {
    const int64_t begin = row * s.shape.columns + part.column;
    kept += mask_run(s, thresholds[row], begin, begin + part.columns);
  }
  return kept;
}

DST_CLONES int64_t mask_part(const StepSegment& s, const Part& part) {
  if (s.weight.storage == Storage::kFloat64) return mask_rows<double>(s, part);
  return mask_rows<float>(s, part);
}

void add(int64_t* kept, int64_t count) { __atomic_fetch_add(kept, count, __ATOMIC_RELAXED); }

// Masks and counts segments anew, of those shapes.
void mask(const Step& step, std::vector<Rows> shapes, int64_t* kept) {
  Work(std::move(shapes)).run([&](const Part& part) {
    add(kept + part.segment, mask_part(step.segments[part.segment], part));
  });
}

// New thresholds of rows that no part had as a whole, from their units' shares of -dt, then W * M.
void finish_split_rows(const Step& step, const Kernels& kernels, const Work& work,
                       const double* shares, int64_t* kept) {
  std::vector<Rows> shapes(step.segments.size(), Rows{0, 0});
  bool any = false;
  for (size_t i = 0; i < step.segments.size(); ++i) {
    const StepSegment& s = step.segments[i];
    if (!s.threshold || has_whole_rows(s.shape)) continue;
    if (updates_threshold(s, step.hypers)) {
      const int64_t units = units_per_row(s.shape);
      const double* share = shares + work.first_unit(i);
      for (int64_t row = 0; row < s.shape.rows; ++row, share += units) {
        double minus_sum = 0;
        for (int64_t u = 0; u < units; ++u) minus_sum += share[u];
        kernels.threshold(step, s, row, minus_sum);
      }
    }
    if (!s.masked) continue;
    any = true;
    shapes[i] = s.shape;
  }
  if (any) mask(step, std::move(shapes), kept);
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
  if (any) mask(step, std::move(shapes), kept);
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
  for (size_t i = 0; i < step.segments.size(); ++i) {
    if (step.segments[i].masked) kept[i] = 0;
  }
  const Work work = step.work();
  const std::unique_ptr<double[]> shares(new double[work.units()]);
  work.run([&](const Part& part) {
    const StepSegment& s = step.segments[part.segment];
    const int64_t count = kernels.part(step, s, part, shares[part.unit]);
    if (s.masked) add(kept + part.segment, count);
  });
  finish_split_rows(step, kernels, work, shares.get(), kept);
  guard(step, kept);
}

}  // namespace dst
