// Schemas of all ops, and their CPU implementations. The CUDA library adds its own to these
// schemas.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(dst_kernels_compiled, library) {
  library.def(
      "pack(Tensor[] weights, Tensor(a!)[] thresholds, int[] settings, Tensor(b!)[] masked, "
      "Tensor(c!)[] effective, Tensor(d!) kept) -> ()");
  library.def(
      "post(Tensor[] grads, Tensor[] weights, Tensor[] thresholds, int[] settings, "
      "Tensor(a!)[] grad_weights, Tensor(b!)[] grad_thresholds) -> ()");
  library.def("regularization(Tensor[] thresholds, Tensor(a!) value, Tensor(b!)[] slopes) -> ()");
  library.def(
      "sgd_step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] buffers, "
      "Tensor(c!)[] thresholds, Tensor[] threshold_grads, Tensor(d!)[] threshold_buffers, "
      "Tensor(e!)[] masked, Tensor(f!) kept, int[] settings, Tensor hypers, Tensor[] rates, "
      "Tensor[] alphas, Tensor[] scales) -> ()");
  library.def(
      "adamw_step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] averages, "
      "Tensor(c!)[] squares, Tensor(d!)[] steps, Tensor(e!)[] thresholds, "
      "Tensor[] threshold_grads, Tensor(f!)[] threshold_averages, "
      "Tensor(g!)[] threshold_squares, Tensor(h!)[] threshold_steps, Tensor(i!)[] masked, "
      "Tensor(j!) kept, int[] settings, Tensor hypers, Tensor[] rates, Tensor[] alphas, "
      "Tensor[] scales) -> ()");
  library.def(
      "grad_norm(Tensor[] weights, Tensor[] grads, Tensor[] thresholds, "
      "Tensor[] threshold_grads, int[] settings, Tensor hypers, Tensor[] alphas, "
      "Tensor[] scales, Tensor(a!) norm) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dst_kernels_compiled, CPU, library) {
  library.impl("pack", TORCH_BOX(&dst::pack));
  library.impl("post", TORCH_BOX(&dst::post));
  library.impl("regularization", TORCH_BOX(&dst::regularization));
  library.impl("sgd_step", TORCH_BOX(&dst::sgd_step));
  library.impl("adamw_step", TORCH_BOX(&dst::adamw_step));
  library.impl("grad_norm", TORCH_BOX(&dst::grad_norm));
}
