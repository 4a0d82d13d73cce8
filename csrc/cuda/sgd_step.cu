#include "../ops.h"
#include "step_host.cuh"

namespace dst {

using namespace cuda;

void sgd_step(const Tensors& weights, const Tensors& grads, const Tensors& buffers,
              const Tensors& thresholds, const Tensors& threshold_grads,
              const Tensors& threshold_buffers, const Tensors& masked, const Tensor& kept,
              const Integers& settings, const Tensor& hypers, const Tensors& rates,
              const Tensors& alphas, const Tensors& scales) {
  const Reader reader("sgd_step", weights, false);
  const auto groups = read_hypers(reader, hypers, rates, alphas);
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

}  // namespace dst
