// Registers the ops. Their schemas come with the CPU library, which is loaded first.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dst_kernels_compiled, CUDA, library) {
  library.impl("pack", TORCH_BOX(&dst::cuda::pack));
  library.impl("post", TORCH_BOX(&dst::cuda::post));
  library.impl("regularization", TORCH_BOX(&dst::cuda::regularization));
  library.impl("sgd_step", TORCH_BOX(&dst::cuda::sgd_step));
  library.impl("adamw_step", TORCH_BOX(&dst::cuda::adamw_step));
  library.impl("grad_norm", TORCH_BOX(&dst::cuda::grad_norm));
}
