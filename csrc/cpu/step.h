// What sgd_step, adamw_step and grad_norm share: the final gradients of a segment, and the order in
// which a step goes through its segments.
#pragma once

#include <algorithm>
#include <vector>

#include "../step_segments.h"
#include "blocks.h"
#include "storage.h"
#include "work.h"

namespace dst {

// One call, with everything that was on the device read.
struct Step {
  std::vector<StepSegment> segments;
  std::vector<Hyper> hypers;
  double grad_scale = 1;
  double clip = 1;
  bool skipped = false;  // an infinity was found

  Step(std::vector<StepSegment> segments, std::vector<Hyper> hypers, const Scales& scales);

  Work work() const;

  const Hyper& weight_hyper(const StepSegment& s) const { return hypers[s.weight_hyper]; }
  const Hyper& threshold_hyper(const StepSegment& s) const { return hypers[s.threshold_hyper]; }
};

// Whether a row's dt, a sum over all of it, must be known before any of its units can go on.
inline bool sums_first(const StepSegment& s, const Step& step) {
  return is_long(s.shape) && s.threshold && s.grad && updates_threshold(s, step.hypers);
}

// G of a block of weights, unscaled.
template <typename Real>
DST_FUNCTION const Real* load_gradient(const StepSegment& s, double grad_scale, int64_t at,
                                       int count, Real* buffer) {
  const Real* gradient = load(s.grad, at, count, buffer);
  if (grad_scale == 1) return gradient;
  const Real scale = static_cast<Real>(grad_scale);
  DST_VECTORIZE for (int i = 0; i < count; ++i) buffer[i] = gradient[i] / scale;
  return buffer;
}

// -dt of up to kRun elements of a row, from G alone.
template <typename Real, Surrogate surrogate>
DST_FUNCTION Real sum_run(const StepSegment& s, double grad_scale, Real threshold, int64_t begin,
                          int64_t end) {
  Real grads[kBlock], weights[kBlock];
  Lanes<Real> lanes(end - begin);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* grad = load_gradient(s, grad_scale, at, count, grads);
    const Real* weight = load(s.weight, at, count, weights);
    DST_VECTORIZE for (int i = 0; i < count; ++i) {
      lanes[i] += gradients<Real, surrogate, false>(grad[i], weight[i], threshold).minus_threshold;
    }
  }
  return lanes.sum();
}

// -dt of a row, or of one unit of a long row, from G alone.
template <typename Real>
DST_FUNCTION double sum_row(const StepSegment& s, double grad_scale, Real threshold, int64_t begin,
                            int64_t end) {
  double sum = 0;
  dispatch(s.surrogate, false, [&]<Surrogate surrogate, bool structure>() DST_LAMBDA {
    for (int64_t at = begin; at < end; at += kRun) {
      sum += sum_run<Real, surrogate>(s, grad_scale, threshold, at, std::min(at + kRun, end));
    }
  });
  return sum;
}

// Final dt of one row, `minus_sum` being what G contributes to -dt.
template <typename Real>
DST_FUNCTION Real threshold_gradient(const StepSegment& s, const Step& step, double clip,
                                     int64_t row, Real threshold, double minus_sum) {
  Real gradient = static_cast<Real>(-minus_sum);
  if (s.threshold_grad) {
    gradient += load_one<Real>(s.threshold_grad, row) / static_cast<Real>(step.grad_scale);
  }
  const Hyper& hyper = step.threshold_hyper(s);
  if (hyper.has_alpha) {
    gradient += static_cast<Real>(hyper.alpha) * regularization_slope(threshold);
  }
  return gradient * static_cast<Real>(clip);
}

// Final gradients of a block of weights, or of a plain parameter, into `result`.
template <typename Real>
DST_FUNCTION void weight_gradients(const StepSegment& s, const Step& step, double clip,
                                   const Real* weight, Real threshold, int64_t at, int count,
                                   Real* result) {
  const Real factor = static_cast<Real>(clip);
  const Real* grad = result;
  if (s.grad) {
    grad = load_gradient(s, step.grad_scale, at, count, result);
  } else {
    std::fill(result, result + count, Real(0));
  }
  if (s.threshold) {
    dispatch(s.surrogate, s.structure, [&]<Surrogate surrogate, bool structure>() DST_LAMBDA {
      DST_VECTORIZE for (int i = 0; i < count; ++i) {
        result[i] =
            factor * gradients<Real, surrogate, structure>(grad[i], weight[i], threshold).weight;
      }
    });
    return;
  }
  const Hyper& hyper = step.weight_hyper(s);
  if (hyper.has_alpha) {
    const Real alpha = static_cast<Real>(hyper.alpha);
    for (int i = 0; i < count; ++i) {
      result[i] = factor * (grad[i] + alpha * regularization_slope(weight[i]));
    }
  } else {
    DST_VECTORIZE for (int i = 0; i < count; ++i) result[i] = factor * grad[i];
  }
}

// What an update rule compiles.
struct Kernels {
  // Whole rows, or one unit of a long row whose threshold was `old_threshold` when dW was made.
  // Returns how many weights are kept.
  int64_t (*part)(const Step& step, const StepSegment& s, const Part& part, double old_threshold);
  // The threshold of a long row.
  void (*threshold)(const Step& step, const StepSegment& s, int64_t row, double minus_sum);
};

void run_step(const Step& step, const Kernels& kernels, int64_t* kept);

}  // namespace dst
