// The norm of all final gradients of a step, before clipping.
#include <cmath>
#include <memory>

#include "../ops.h"
#include "step.h"

namespace dst {
namespace {

// Up to kRun elements of a row, or of a plain parameter: adds their squares, and their share of
// -dt. Squares are in double, which neither over- nor underflows.
template <typename Real>
DST_FUNCTION void square_run(const Step& step, const StepSegment& s, Real threshold, int64_t begin,
                             int64_t end, double& squares, double& minus_sum) {
  Real weights[kBlock], grads[kBlock];
  Lanes<Real> lanes;
  Lanes<double> square_lanes;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* weight = load(s.weight, at, count, weights);
    if (s.threshold) {
      masked_gradients(s, step, 1, weight, threshold, at, count, grads, lanes);
    } else {
      plain_gradients(s, step, 1, weight, at, count, grads);
    }
    square_lanes.add(count, [&](int i) DST_LAMBDA {
      const double gradient = grads[i];
      return gradient * gradient;
    });
  }
  squares += square_lanes.sum();
  minus_sum += lanes.sum();
}

template <typename Real>
DST_FUNCTION double square_of_threshold(const Step& step, const StepSegment& s, int64_t row,
                                        Real threshold, double minus_sum) {
  const double gradient = threshold_gradient(s, step, 1, row, threshold, minus_sum);
  return gradient * gradient;
}

// `squares`: of each unit; `sums`: shares of -dt of long rows.
template <typename Real>
DST_FUNCTION void square_rows(const Step& step, const StepSegment& s, const Part& part,
                              double* squares, double* sums) {
  const bool of_weight = updates_weight(s, step.hypers);
  const bool of_threshold = updates_threshold(s, step.hypers);
  const bool differentiate = of_weight || (of_threshold && s.grad);
  for (int64_t i = 0; i < part.rows; ++i) {
    const int64_t row = part.row + i;
    const int64_t begin = row * s.shape.columns + part.column;
    const int64_t end = begin + part.columns;
    const Real threshold = s.threshold ? static_cast<const Real*>(s.threshold.data)[row] : Real(0);
    double of_weights = 0, minus_sum = 0;
    for (int64_t at = begin; differentiate && at < end; at += kRun) {
      square_run(step, s, threshold, at, std::min(at + kRun, end), of_weights, minus_sum);
    }
    double& total = squares[part.unit + i];
    total = of_weight ? of_weights : 0;
    if (is_long(s.shape)) {
      sums[part.unit] = minus_sum;
    } else if (of_threshold) {
      total += square_of_threshold(step, s, row, threshold, minus_sum);
    }
  }
}

DST_CLONES void square_part(const Step& step, const StepSegment& s, const Part& part,
                            double* squares, double* sums) {
  if (s.weight.storage == Storage::kFloat64) {
    square_rows<double>(step, s, part, squares, sums);
  } else {
    square_rows<float>(step, s, part, squares, sums);
  }
}

template <typename Real>
double square_split_thresholds(const Step& step, const StepSegment& s, const double* sums) {
  const int64_t units = units_per_row(s.shape);
  double total = 0;
  for (int64_t row = 0; row < s.shape.rows; ++row, sums += units) {
    double minus_sum = 0;
    for (int64_t u = 0; u < units; ++u) minus_sum += sums[u];
    const Real threshold = static_cast<const Real*>(s.threshold.data)[row];
    total += square_of_threshold(step, s, row, threshold, minus_sum);
  }
  return total;
}

}  // namespace

void grad_norm(const Tensors& weights, const Tensors& grads, const Tensors& thresholds,
               const Tensors& threshold_grads, const Integers& settings, const Tensor& hypers,
               const Tensors& alphas, const Tensors& scales, const Tensor& norm) {
  const Reader reader("grad_norm", weights, true);
  std::vector<Hyper> rows = read_hypers(reader, hypers, {}, alphas);
  std::vector<StepSegment> segments =
      step_segments(reader, weights, grads, thresholds, threshold_grads, settings, rows.size());
  const Array result = reader.required(norm, {"norm", 0}, 1);
  reader.check_storage(result, Storage::kFloat32, {"norm", 0});
  const Step step(std::move(segments), std::move(rows), read_scales(reader, scales));

  const Work work = step.work();
  const std::unique_ptr<double[]> squares(new double[work.units()]);
  const std::unique_ptr<double[]> sums(new double[work.units()]);
  work.run([&](const Part& part) {
    square_part(step, step.segments[part.segment], part, squares.get(), sums.get());
  });
  double total = 0;
  for (int64_t unit = 0; unit < work.units(); ++unit) total += squares[unit];
  for (size_t i = 0; i < step.segments.size(); ++i) {
    const StepSegment& s = step.segments[i];
    if (has_whole_rows(s.shape) || !updates_threshold(s, step.hypers)) continue;
    const double* first = sums.get() + work.first_unit(i);
    total += s.weight.storage == Storage::kFloat64 ? square_split_thresholds<double>(step, s, first)
                                                   : square_split_thresholds<float>(step, s, first);
  }
  *static_cast<float*>(result.data) = static_cast<float>(std::sqrt(total));
}

}  // namespace dst
