#include "ops.h"
#include "step_host.cuh"

namespace dst::cuda {

void sgd_step(Tensors weights, Tensors grads, Tensors buffers, Tensors thresholds,
              Tensors threshold_grads, Tensors threshold_buffers, Tensors masked, Tensor kept,
              Integers settings, Tensor hypers, Tensors rates, Tensors alphas, Tensors scales) {
  const Reader reader("sgd_step", weights, false);
  const auto groups = read_hypers(reader, hypers, &rates, alphas);
  auto segments =
      step_segments(reader, weights, grads, thresholds, threshold_grads, settings, groups.size());
  read_masked(reader, masked, segments);
  read_sgd_state(reader, groups, Half::kWeight, "buffers", buffers, segments);
  read_sgd_state(reader, groups, Half::kThreshold, "threshold_buffers", threshold_buffers,
                 segments);
  int64_t* const counts = reader.counts(kept, "kept");
  if (segments.empty()) return;
  run_step<SgdRule>(reader, weights[0], segments, groups, read_scales(reader, scales), counts);
}

}  // namespace dst::cuda
