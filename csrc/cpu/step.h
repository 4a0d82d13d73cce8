// What sgd_step, adamw_step and grad_norm share: the final gradients of a segment, and the order in
// which a step goes through its segments.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../step_segments.h"
#include "blocks.h"
#include "kept_rows.h"
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

// Final dW of a block of a masked weight into `result`; its shares of -dt, from G alone and not
// clipped, are added to `lanes`.
template <typename Real>
DST_FUNCTION void masked_gradients(const StepSegment& s, const Step& step, double clip,
                                   const Real* weight, Real threshold, int64_t at, int count,
                                   Real* result, Lanes<Real>& lanes) {
  const Real factor = static_cast<Real>(clip);
  const Real* grad = load_gradient(s, step.grad_scale, at, count, result);
  dispatch(s.surrogate, s.structure, [&]<Surrogate surrogate, bool structure>() DST_LAMBDA {
    lanes.add(count, [&](int i) DST_LAMBDA {
      const auto both = gradients<Real, surrogate, structure>(grad[i], weight[i], threshold);
      result[i] = factor * both.weight;
      return both.minus_threshold;
    });
  });
}

// Final gradients of a block of a plain parameter.
template <typename Real>
DST_FUNCTION void plain_gradients(const StepSegment& s, const Step& step, double clip,
                                  const Real* parameter, int64_t at, int count, Real* result) {
  const Real factor = static_cast<Real>(clip);
  const Real* grad = result;
  if (s.grad) {
    grad = load_gradient(s, step.grad_scale, at, count, result);
  } else {
    std::fill(result, result + count, Real(0));
  }
  const Hyper& hyper = step.weight_hyper(s);
  if (hyper.has_alpha) {
    const Real alpha = static_cast<Real>(hyper.alpha);
    for (int i = 0; i < count; ++i) {
      result[i] = factor * (grad[i] + alpha * regularization_slope(parameter[i]));
    }
  } else {
    DST_VECTORIZE for (int i = 0; i < count; ++i) result[i] = factor * grad[i];
  }
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

// W * M of one run of a row; returns how many are kept.
template <typename Real>
DST_FUNCTION int64_t mask_run(const StepSegment& s, Real threshold, int64_t begin, int64_t end) {
  Real weights[kBlock], results[kBlock];
  int64_t kept = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* weight = load(s.weight, at, count, weights);
    Real* result = target(s.masked, at, results);
    kept += mask_block(weight, RowThreshold<Real>{threshold}, result, count);
    store(s.masked, at, count, result);
  }
  return kept;
}

// The same as kept elements, from `to` on, which moves behind them.
template <typename Real, typename Column>
DST_FUNCTION int64_t mask_row_kept(const StepSegment& s, Real threshold, int64_t row, int64_t& to) {
  Real weights[kBlock], masked[kBlock], values[kBlock];
  const int64_t begin = row * s.shape.columns, end = begin + s.shape.columns;
  Column* columns = static_cast<Column*>(s.kept_columns);
  int64_t kept = 0;
  s.kept_places[2 * row] = static_cast<int32_t>(to);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* weight = load(s.weight, at, count, weights);
    Real* result = target(s.masked, to, values);
    int64_t packed = -1;
    if constexpr (std::is_same_v<Real, float>) {
      if (threshold < std::numeric_limits<float>::infinity()) {
        packed = pack_run(weight, count, threshold, at - begin, result, columns + to);
        kept += packed;
      }
    }
    if (packed < 0) {
      kept += mask_block(weight, RowThreshold<Real>{threshold}, masked, count);
      packed = pack_not_zero(masked, count, at - begin, result, columns + to);
    }
    store(s.masked, to, static_cast<int>(packed), result);
    to += packed;
  }
  s.kept_places[2 * row + 1] = static_cast<int32_t>(to);
  return kept;
}

template <typename Real>
DST_FUNCTION int64_t mask_row_kept(const StepSegment& s, Real threshold, int64_t row, int64_t& to) {
  return s.kept_small ? mask_row_kept<Real, uint16_t>(s, threshold, row, to)
                      : mask_row_kept<Real, int32_t>(s, threshold, row, to);
}

// `masked`: of each segment, or three lists one after the other: `masked`, and the columns and
// places of those that are to be written as kept rows.
void read_masked_or_rows(const Reader& reader, const Tensors& masked,
                         std::vector<StepSegment>& segments);

// What an update rule compiles.
struct Kernels {
  // Whole rows: new thresholds, weights and W * M; returns how many weights are kept. Of one unit
  // of a long row the new weights only, and its share of -dt.
  int64_t (*part)(const Step& step, const StepSegment& s, const Part& part, double& minus_sum);
  // The threshold of a row that no part has as a whole.
  void (*threshold)(const Step& step, const StepSegment& s, int64_t row, double minus_sum);
};

void run_step(const Step& step, const Kernels& kernels, int64_t* kept);

}  // namespace dst
