// A step's kernels for one update rule: rows from gradients to new thresholds, weights and W * M.
//
// A rule is a class template over Real, made from a param group and a parameter's state, with
//     update(parameter, gradient, state, at, count, result)
// that updates `count` elements from `at` on and their state. `result` may be `parameter`.
#pragma once

#include <optional>

#include "step.h"

namespace dst {

// Updates one threshold in place.
template <template <typename> class Rule, typename Real>
DST_FUNCTION void update_threshold(const Step& step, const StepSegment& s, int64_t row,
                                   const Rule<Real>& rule, double minus_sum) {
  Real* threshold = static_cast<Real*>(s.threshold.data) + row;
  const Real gradient = threshold_gradient(s, step, step.clip, row, *threshold, minus_sum);
  rule.update(threshold, &gradient, s.threshold_state, row, 1, threshold);
}

// Up to kRun elements of a row, or of a plain parameter: new weights from the old threshold, where
// there is a rule for them. Returns their share of -dt.
template <template <typename> class Rule, typename Real>
DST_FUNCTION Real update_run(const Step& step, const StepSegment& s, const Rule<Real>* rule,
                             Real threshold, int64_t begin, int64_t end) {
  Real weights[kBlock], grads[kBlock];
  Lanes<Real> lanes;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    const Real* weight = load(s.weight, at, count, weights);
    if (s.threshold) {
      masked_gradients(s, step, step.clip, weight, threshold, at, count, grads, lanes);
    } else {
      plain_gradients(s, step, step.clip, weight, at, count, grads);
    }
    if (!rule) continue;
    Real* result = target(s.weight, at, weights);
    rule->update(weight, grads, s.weight_state, at, count, result);
    store(s.weight, at, count, result);
  }
  return lanes.sum();
}

template <template <typename> class Rule, typename Real>
DST_FUNCTION int64_t update_rows(const Step& step, const StepSegment& s, const Part& part,
                                 double& minus_sum_of_unit) {
  const Real* thresholds = static_cast<const Real*>(s.threshold.data);
  std::optional<Rule<Real>> rule, threshold_rule;
  if (updates_weight(s, step.hypers)) rule.emplace(step.weight_hyper(s), s.weight_state);
  if (updates_threshold(s, step.hypers)) {
    threshold_rule.emplace(step.threshold_hyper(s), s.threshold_state);
  }
  const bool differentiate = rule || (threshold_rule && s.grad);
  int64_t kept = 0, to = part.row * s.shape.columns;
  for (int64_t row = part.row; row < part.row + part.rows; ++row) {
    const int64_t begin = row * s.shape.columns + part.column;
    const int64_t end = begin + part.columns;
    const Real old_threshold = s.threshold ? thresholds[row] : Real(0);
    double minus_sum = 0;
    for (int64_t at = begin; differentiate && at < end; at += kRun) {
      minus_sum += update_run<Rule, Real>(step, s, rule ? &*rule : nullptr, old_threshold, at,
                                          std::min(at + kRun, end));
    }
    if (is_long(s.shape)) {
      minus_sum_of_unit = minus_sum;
      continue;
    }
    if (threshold_rule) update_threshold(step, s, row, *threshold_rule, minus_sum);
    if (s.kept_columns) {
      kept += mask_row_kept(s, thresholds[row], row, to);
    } else if (s.masked) {
      kept += mask_run(s, thresholds[row], begin, end);
    }
  }
  return kept;
}

template <template <typename> class Rule>
DST_FUNCTION int64_t update_part(const Step& step, const StepSegment& s, const Part& part,
                                 double& minus_sum) {
  if (s.weight.storage == Storage::kFloat64) {
    return update_rows<Rule, double>(step, s, part, minus_sum);
  }
  return update_rows<Rule, float>(step, s, part, minus_sum);
}

template <template <typename> class Rule, typename Real>
void update_split_threshold_as(const Step& step, const StepSegment& s, int64_t row,
                               double minus_sum) {
  const Rule<Real> rule(step.threshold_hyper(s), s.threshold_state);
  update_threshold(step, s, row, rule, minus_sum);
}

template <template <typename> class Rule>
void update_split_threshold(const Step& step, const StepSegment& s, int64_t row, double minus_sum) {
  if (s.weight.storage == Storage::kFloat64) {
    update_split_threshold_as<Rule, double>(step, s, row, minus_sum);
  } else {
    update_split_threshold_as<Rule, float>(step, s, row, minus_sum);
  }
}

}  // namespace dst
