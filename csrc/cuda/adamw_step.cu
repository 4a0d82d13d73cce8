#include "../ops.h"
#include "step_host.cuh"

namespace dst {

using namespace cuda;

void adamw_step(const Tensors& weights, const Tensors& grads, const Tensors& averages,
                const Tensors& squares, const Tensors& steps, const Tensors& thresholds,
                const Tensors& threshold_grads, const Tensors& threshold_averages,
                const Tensors& threshold_squares, const Tensors& threshold_steps,
                const Tensors& masked, const Tensor& kept, const Integers& settings,
                const Tensor& hypers, const Tensors& rates, const Tensors& alphas,
                const Tensors& scales) {
  const Reader reader("adamw_step", weights, false);
  const auto groups = read_hypers(reader, hypers, rates, alphas);
  auto segments =
      step_segments(reader, weights, grads, thresholds, threshold_grads, settings, groups.size());
  read_masked(reader, masked, segments);
  read_adamw_state(reader, groups, Half::kWeight, {"averages", "squares", "steps"}, averages,
                   squares, steps, segments);
  read_adamw_state(reader, groups, Half::kThreshold,
                   {"threshold_averages", "threshold_squares", "threshold_steps"},
                   threshold_averages, threshold_squares, threshold_steps, segments);
  int64_t* const counts = reader.counts(kept, "kept");
  if (segments.empty()) return;
  run_step<AdamWRule>(reader, weights[0], segments, groups, read_scales(reader, scales), counts);
}

}  // namespace dst
