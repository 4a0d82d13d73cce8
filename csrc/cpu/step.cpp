#include "step.h"

#include <memory>
#include <utility>

namespace dst {
namespace {

template <typename Real>
DST_FUNCTION int64_t mask_rows(const StepSegment& s, const Part& part) {
  const Real* thresholds = static_cast<const Real*>(s.threshold.data);
  int64_t kept = 0, to = part.row * s.shape.columns;
  for (int64_t row = part.row; row < part.row + part.rows; ++row) {
    const int64_t begin = row * s.shape.columns + part.column;
    kept += s.kept_columns ? mask_row_kept(s, thresholds[row], row, to)
                           : mask_run(s, thresholds[row], begin, begin + part.columns);
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

void read_masked_or_rows(const Reader& reader, const Tensors& masked,
                         std::vector<StepSegment>& segments) {
  const size_t n = segments.size();
  if (masked.size() != 3 * n || n == 0) return read_masked(reader, masked, segments);
  read_masked(reader, Tensors(masked.begin(), masked.begin() + n), segments);
  for (size_t i = 0; i < n; ++i) {
    StepSegment& s = segments[i];
    const Tensor &columns = masked[n + i], &places = masked[2 * n + i];
    if (columns.numel() == 0) continue;
    STD_TORCH_CHECK(s.masked && !is_long(s.shape), reader.op(), ": segment ", i,
                    " cannot be written as kept rows");
    s.kept_small = columns.scalar_type() == ScalarType::UInt16;
    const ScalarType of_columns = s.kept_small ? ScalarType::UInt16 : ScalarType::Int;
    check_run(reader.op(), columns, "columns", of_columns, s.weight.numel);
    check_run(reader.op(), places, "places", ScalarType::Int, 2 * s.shape.rows);
    STD_TORCH_CHECK(!s.kept_small || s.shape.columns <= 1 << 16, reader.op(),
                    ": columns must be int32 for rows of ", s.shape.columns, " elements");
    STD_TORCH_CHECK(s.weight.numel < int64_t(1) << 31, reader.op(), ": segment ", i,
                    " has too many elements for kept rows");
    s.kept_columns = columns.data_ptr();
    s.kept_places = static_cast<int32_t*>(places.data_ptr());
  }
}

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
