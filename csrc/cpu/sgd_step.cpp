#include "../ops.h"
#include "update.h"

namespace dst {
namespace {

template <typename Real>
class SgdRule {
 public:
  DST_FUNCTION SgdRule(const Hyper& h, const State& state)
      : rule_{Real(h.lr),           Real(h.rest[0]), Real(h.rest[1]),
              Real(h.weight_decay), h.rest[2] != 0,  h.maximize},
        first_(state.uninitialised) {}

  DST_FUNCTION void update(const Real* parameter, const Real* gradient, const State& state,
                           int64_t at, int count, Real* result) const {
    const Sgd<Real> rule = rule_;
    if (rule.momentum == Real(0)) {
      DST_VECTORIZE for (int i = 0; i < count; ++i) {
        Real none = 0;
        result[i] = rule(parameter[i], gradient[i], none, false);
      }
      return;
    }
    Real buffers[kBlock];
    load(state.first, at, count, buffers);
    Real* buffer = target(state.first, at, buffers);
    if (first_) {
      DST_VECTORIZE for (int i = 0; i < count; ++i) {
        result[i] = rule(parameter[i], gradient[i], buffer[i], true);
      }
    } else {
      DST_VECTORIZE for (int i = 0; i < count; ++i) {
        result[i] = rule(parameter[i], gradient[i], buffer[i], false);
      }
    }
    store(state.first, at, count, buffer);
  }

 private:
  Sgd<Real> rule_;
  bool first_;
};

DST_CLONES int64_t sgd_part(const Step& step, const StepSegment& s, const Part& part,
                            double& minus_sum) {
  return update_part<SgdRule>(step, s, part, minus_sum);
}

}  // namespace

void sgd_step(const Tensors& weights, const Tensors& grads, const Tensors& buffers,
              const Tensors& thresholds, const Tensors& threshold_grads,
              const Tensors& threshold_buffers, const Tensors& masked, const Tensor& kept,
              const Integers& settings, const Tensor& hypers, const Tensors& rates,
              const Tensors& alphas, const Tensors& scales) {
  const Reader reader("sgd_step", weights, true);
  std::vector<Hyper> rows = read_hypers(reader, hypers, rates, alphas);
  std::vector<StepSegment> segments =
      step_segments(reader, weights, grads, thresholds, threshold_grads, settings, rows.size());
  read_masked_or_rows(reader, masked, segments);
  read_sgd_state(reader, rows, Half::kWeight, "buffers", buffers, segments);
  read_sgd_state(reader, rows, Half::kThreshold, "threshold_buffers", threshold_buffers, segments);
  int64_t* counts = reader.counts(kept, "kept");
  const Step step(std::move(segments), std::move(rows), read_scales(reader, scales));
  run_step(step, {sgd_part, update_split_threshold<SgdRule>}, counts);
}

}  // namespace dst
