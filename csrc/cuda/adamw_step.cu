#include "ops.h"
#include "step_host.cuh"

namespace dst::cuda {

void adamw_step(Tensors weights, Tensors grads, Tensors averages, Tensors squares, Tensors steps,
                Tensors thresholds, Tensors threshold_grads, Tensors threshold_averages,
                Tensors threshold_squares, Tensors threshold_steps, Tensors masked, Tensor kept,
                Integers settings, Tensor hypers, Tensors rates, Tensors alphas, Tensors scales) {
  const Reader reader("adamw_step", weights, false);
  const auto groups = read_hypers(reader, hypers, &rates, alphas);
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

}  // namespace dst::cuda
