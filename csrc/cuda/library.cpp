// Registers the ops. Their schemas come with the CPU library, which is loaded first.
#include <torch/csrc/stable/library.h>

#include "../ops.h"

STABLE_TORCH_LIBRARY_IMPL(dst_kernels_compiled, CUDA, library) {
  library.impl("pack", TORCH_BOX(&dst::pack));
  library.impl("post", TORCH_BOX(&dst::post));
  library.impl("regularization", TORCH_BOX(&dst::regularization));
  library.impl("sgd_step", TORCH_BOX(&dst::sgd_step));
  library.impl("adamw_step", TORCH_BOX(&dst::adamw_step));
  library.impl("grad_norm", TORCH_BOX(&dst::grad_norm));
}
