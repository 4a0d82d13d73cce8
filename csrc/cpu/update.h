// A step's kernels for one update rule: rows from gradients to new thresholds, weights and W * M.
//
// A rule is a class template over Real, made from a param group and a parameter's state, with
//     update(parameter, gradient, state, at, count, result)
// that updates `count` elements from `at` on and their state. `result` may be `parameter`.
#pragma once

#include "step.h"

namespace dst {

// Updates one threshold in place.
template <template <typename> class Rule, typename Real>
DST_FUNCTION void update_threshold(const Step& step, const StepSegment& s, int64_t row,
                                   double minus_sum) {
  Real* threshold = static_cast<Real*>(s.threshold.data) + row;
  const Real gradient = threshold_gradient(s, step, step.clip, row, *threshold, minus_sum);
  const Rule<Real> rule(step.threshold_hyper(s), s.threshold_state);
  rule.update(threshold, &gradient, s.threshold_state, row, 1, threshold);
}

// One run of a row, or of a plain parameter: new weights from the old threshold, W * M from the
// new.
template <template <typename> class Rule, typename Real>
DST_FUNCTION int64_t update_run(const Step& step, const StepSegment& s, const Rule<Real>* rule,
                                Real old_threshold, Real threshold, int64_t begin, int64_t end) {
  Real weights[kBlock], grads[kBlock], results[kBlock];
  int64_t kept = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    if (rule) {
      const Real* weight = load(s.weight, at, count, weights);
      weight_gradients(s, step, step.clip, weight, old_threshold, at, count, grads);
      Real* result = target(s.weight, at, weights);
      rule->update(weight, grads, s.weight_state, at, count, result);
      store(s.weight, at, count, result);
    }
    if (s.masked) {  // of what was stored: it may have been rounded
      const Real* weight = load(s.weight, at, count, weights);
      Real* result = target(s.masked, at, results);
      kept += mask_block(weight, RowThreshold<Real>{threshold}, result, count);
      store(s.masked, at, count, result);
    }
  }
  return kept;
}

template <template <typename> class Rule, typename Real>
DST_FUNCTION int64_t update_rows(const Step& step, const StepSegment& s, const Part& part,
                                 double old_threshold_of_long_row) {
  const bool with_weight = updates_weight(s, step.hypers);
  const bool with_threshold = updates_threshold(s, step.hypers);
  Real* thresholds = static_cast<Real*>(s.threshold.data);
  alignas(Rule<Real>) unsigned char memory[sizeof(Rule<Real>)];
  const Rule<Real>* rule =
      with_weight ? new (memory) Rule<Real>(step.weight_hyper(s), s.weight_state) : nullptr;
  int64_t kept = 0;
  for (int64_t row = part.row; row < part.row + part.rows; ++row) {
    const int64_t begin = row * s.shape.columns + part.column;
    const int64_t end = begin + part.columns;
    Real old_threshold = 0, threshold = 0;
    if (s.threshold) {
      old_threshold =
          is_long(s.shape) ? static_cast<Real>(old_threshold_of_long_row) : thresholds[row];
      if (with_threshold && !is_long(s.shape)) {
        const double minus_sum =
            s.grad ? sum_row(s, step.grad_scale, old_threshold, begin, end) : 0;
        update_threshold<Rule, Real>(step, s, row, minus_sum);
      }
      threshold = thresholds[row];
    }
    kept += update_run<Rule, Real>(step, s, rule, old_threshold, threshold, begin, end);
  }
  return kept;
}

template <template <typename> class Rule>
DST_FUNCTION int64_t update_part(const Step& step, const StepSegment& s, const Part& part,
                                 double old_threshold) {
  if (s.weight.storage == Storage::kFloat64) {
    return update_rows<Rule, double>(step, s, part, old_threshold);
  }
  return update_rows<Rule, float>(step, s, part, old_threshold);
}

template <template <typename> class Rule>
void update_split_threshold(const Step& step, const StepSegment& s, int64_t row, double minus_sum) {
  if (s.weight.storage == Storage::kFloat64) {
    update_threshold<Rule, double>(step, s, row, minus_sum);
  } else {
    update_threshold<Rule, float>(step, s, row, minus_sum);
  }
}

}  // namespace dst
