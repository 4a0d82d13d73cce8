// Schemas of all ops, and their CPU implementations. The CUDA library adds its own to these
// schemas.
//
// All lists of a call have one entry per segment, in any mix of sizes and dtypes; a tensor without
// elements is absent, and so are all of an empty list of an optimizer step. Outputs are allocated
// by the caller; pack and post make those that are None, and return all of them. The rows of a
// weight, size(0) of them, lie densely one after the other, and all tensors of its shape have its
// strides. Thresholds, one for each row, for the layer or for each element, are float64 beside
// float64, else float32. What the ops compute is stated in dst_kernels/reference. Sums are made in
// an order that depends on a segment's shape alone, so that results repeat bit for bit. The sparse
// products take one weight each, and make their output.
#include <torch/csrc/stable/library.h>

#include "../ops.h"
#include "sparse.h"

STABLE_TORCH_LIBRARY(dst_kernels_compiled, library) {
  // settings: the largest kept count at which the guard takes all thresholds of the layer for 0
  // (-1: never), and whether that is written into `thresholds`. `kept`: int64, under the effective
  // ones. `dtype`: of masked weights that the op makes (None: each weight's).
  library.def(
      "pack(Tensor[] weights, Tensor(a!)[] thresholds, int[] settings, Tensor(b!)[]? masked=None, "
      "Tensor(c!)[]? effective=None, Tensor(d!)? kept=None, ScalarType? dtype=None) "
      "-> (Tensor(b!)[] masked, Tensor(c!)[] effective)");
  // settings: surrogate, structure gradient. Thresholds are effective ones.
  library.def(
      "post(Tensor[] grads, Tensor[] weights, Tensor[] thresholds, int[] settings, "
      "Tensor(a!)[]? grad_weights=None, Tensor(b!)[]? grad_thresholds=None) "
      "-> (Tensor(a!)[] grad_weights, Tensor(b!)[] grad_thresholds)");
  library.def("regularization(Tensor[] thresholds, Tensor(a!) value, Tensor(b!)[] slopes) -> ()");
  // This and the following: see dst_kernels/reference/step.py, also for the lists that may be
  // empty. `kept` is written for segments with `masked`.
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
  // On CPUs only, and of one weight: see dst_kernels/reference/sparse.py. Tensors are contiguous
  // (sparse_linear makes its input so), in float32 or bfloat16. geometry: kernel, stride, padding
  // and dilation, each over height and width, and groups.
  library.def(
      "sparse_linear(Tensor input, Tensor values, Tensor columns, Tensor row_starts, "
      "Tensor? bias) -> Tensor");
  // Of a weight that is trained, as rows with its kept weights in front: `masked` as such rows
  // (false, and none, if a sample of rows says that it keeps more than `most`), products with them.
  library.def(
      "kept_rows(Tensor masked, int most, Tensor(a!) values, Tensor(b!) columns, "
      "Tensor(c!) places) -> bool");
  library.def(
      "kept_linear(Tensor input, Tensor values, Tensor columns, Tensor places, Tensor? bias) -> "
      "Tensor");
  library.def(
      "kept_linear_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor places) -> "
      "Tensor");
  // Of a weight under a fixed mask: the rows of its kept weights (returned: how many), their values
  // out of and into dense tensors (`clear`: which are 0 elsewhere), and their gradients.
  library.def("kept_columns(Tensor mask, Tensor(a!) columns, Tensor(b!) places) -> int");
  library.def("kept_values(Tensor weight, Tensor columns, Tensor places, Tensor(a!) values) -> ()");
  library.def(
      "kept_dense(Tensor values, Tensor columns, Tensor places, Tensor(a!) dense, bool clear) -> "
      "()");
  library.def(
      "kept_linear_grad_weight(Tensor grad, Tensor input, Tensor columns, Tensor places, "
      "Tensor(a!) values) -> ()");
  library.def(
      "sparse_conv(Tensor input, Tensor values, Tensor columns, Tensor row_starts, Tensor? bias, "
      "int[] geometry) -> Tensor");
  library.def(
      "kept_conv(Tensor input, Tensor values, Tensor columns, Tensor places, Tensor? bias, "
      "int[] geometry) -> Tensor");
  // shape: channels, height and width of the input.
  library.def(
      "kept_conv_grad_input(Tensor grad, Tensor values, Tensor columns, Tensor places, "
      "int[] geometry, int[] shape) -> Tensor");
  library.def(
      "kept_conv_grad_weight(Tensor grad, Tensor input, Tensor columns, Tensor places, "
      "Tensor(a!) values, int[] geometry) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dst_kernels_compiled, CPU, library) {
  library.impl("pack", TORCH_BOX(&dst::pack));
  library.impl("post", TORCH_BOX(&dst::post));
  library.impl("regularization", TORCH_BOX(&dst::regularization));
  library.impl("sgd_step", TORCH_BOX(&dst::sgd_step));
  library.impl("adamw_step", TORCH_BOX(&dst::adamw_step));
  library.impl("grad_norm", TORCH_BOX(&dst::grad_norm));
  library.impl("sparse_linear", TORCH_BOX(&dst::sparse_linear));
  library.impl("kept_rows", TORCH_BOX(&dst::kept_rows));
  library.impl("kept_linear", TORCH_BOX(&dst::kept_linear));
  library.impl("kept_linear_grad_input", TORCH_BOX(&dst::kept_linear_grad_input));
  library.impl("kept_columns", TORCH_BOX(&dst::kept_columns));
  library.impl("kept_values", TORCH_BOX(&dst::kept_values));
  library.impl("kept_dense", TORCH_BOX(&dst::kept_dense));
  library.impl("kept_linear_grad_weight", TORCH_BOX(&dst::kept_linear_grad_weight));
  library.impl("sparse_conv", TORCH_BOX(&dst::sparse_conv));
  library.impl("kept_conv", TORCH_BOX(&dst::kept_conv));
  library.impl("kept_conv_grad_input", TORCH_BOX(&dst::kept_conv_grad_input));
  library.impl("kept_conv_grad_weight", TORCH_BOX(&dst::kept_conv_grad_weight));
}
