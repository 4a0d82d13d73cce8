// The emulated ops under the name dst_kernels_emulated, for tensors on the CPU, and those functions
// of PyTorch's that need a GPU.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(dst_kernels_emulated, library) {
  for (const char* schema : {
#include "schemas.inc"  // those of csrc/cpu/library.cpp
       }) {
    library.def(schema);
  }
  library.def("seen() -> int[]");
  library.def("on_stream(int id, bool capturing) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dst_kernels_emulated, CPU, library) {
  library.impl("pack", TORCH_BOX(&dst::pack));
  library.impl("post", TORCH_BOX(&dst::post));
  library.impl("regularization", TORCH_BOX(&dst::regularization));
  library.impl("sgd_step", TORCH_BOX(&dst::sgd_step));
  library.impl("adamw_step", TORCH_BOX(&dst::adamw_step));
  library.impl("grad_norm", TORCH_BOX(&dst::grad_norm));
}

namespace {

// Launches, and memory that was cleared and copied without one, since the library was loaded.
std::vector<int64_t> seen() { return {emulation::launches, emulation::clears, emulation::copies}; }

void on_stream(int64_t id, bool capturing) {
  emulation::stream = id;
  emulation::capturing = capturing;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dst_kernels_emulated, CompositeExplicitAutograd, library) {
  library.impl("seen", TORCH_BOX(&seen));
  library.impl("on_stream", TORCH_BOX(&on_stream));
}

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

}  // extern "C"
