#include "../ops.h"
#include "update.h"

namespace dst {
namespace {

template <typename Real>
class AdamWRule {
 public:
  DST_FUNCTION AdamWRule(const Hyper& h, const State& state)
      : rule_(AdamW<Real>::of(h.lr, h.weight_decay, h.rest[0], h.rest[1], h.rest[2], h.maximize,
                              *state.step + 1.0)) {}

  DST_FUNCTION void update(const Real* parameter, const Real* gradient, const State& state,
                           int64_t at, int count, Real* result) const {
    const AdamW<Real> rule = rule_;
    Real averages[kBlock], squares[kBlock];
    load(state.first, at, count, averages);
    load(state.second, at, count, squares);
    Real* average = target(state.first, at, averages);
    Real* square = target(state.second, at, squares);
    DST_VECTORIZE for (int i = 0; i < count; ++i) {
      result[i] = rule(parameter[i], gradient[i], average[i], square[i]);
    }
    store(state.first, at, count, average);
    store(state.second, at, count, square);
  }

 private:
  AdamW<Real> rule_;
};

DST_CLONES int64_t adamw_part(const Step& step, const StepSegment& s, const Part& part,
                              double& minus_sum) {
  return update_part<AdamWRule>(step, s, part, minus_sum);
}

}  // namespace

void adamw_step(const Tensors& weights, const Tensors& grads, const Tensors& averages,
                const Tensors& squares, const Tensors& steps, const Tensors& thresholds,
                const Tensors& threshold_grads, const Tensors& threshold_averages,
                const Tensors& threshold_squares, const Tensors& threshold_steps,
                const Tensors& masked, const Tensor& kept, const Integers& settings,
                const Tensor& hypers, const Tensors& rates, const Tensors& alphas,
                const Tensors& scales) {
  const Reader reader("adamw_step", weights, true);
  std::vector<Hyper> rows = read_hypers(reader, hypers, rates, alphas);
  std::vector<StepSegment> segments =
      step_segments(reader, weights, grads, thresholds, threshold_grads, settings, rows.size());
  read_masked_or_rows(reader, masked, segments);
  read_adamw_state(reader, rows, Half::kWeight, {"averages", "squares", "steps"}, averages, squares,
                   steps, segments);
  read_adamw_state(reader, rows, Half::kThreshold,
                   {"threshold_averages", "threshold_squares", "threshold_steps"},
                   threshold_averages, threshold_squares, threshold_steps, segments);
  int64_t* counts = reader.counts(kept, "kept");
  const Step step(std::move(segments), std::move(rows), read_scales(reader, scales));
  run_step(step, {adamw_part, update_split_threshold<AdamWRule>}, counts);
  if (step.skipped) return;
  for (const StepSegment& s : step.segments) {
    if (s.weight_state.step) *s.weight_state.step += 1;
    if (s.threshold_state.step) *s.threshold_state.step += 1;
  }
}

}  // namespace dst
