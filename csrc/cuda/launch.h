// The host's side of a launch: device, stream, memory for intermediate results.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <type_traits>

#include "tiling.cuh"

namespace dst::cuda {

using torch::headeronly::ScalarType;

// Makes the device of a tensor the current one. Nothing here waits for the device, and memory
// comes from PyTorch's allocator, so that every op can be captured into a CUDA graph.
class Launcher {
 public:
  Launcher(const char* op, const torch::stable::Tensor& tensor)
      : op_(op), tensor_(tensor), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Runs the kernel in blocks of kThreads.
  template <typename... Parameters>
  void operator()(void (*kernel)(Parameters...), dim3 blocks,
                  const std::type_identity_t<Parameters>&... arguments) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(kThreads);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "a kernel could not be launched");
  }

  const char* op() const { return op_; }
  int device() const { return tensor_.get_device_index(); }
  cudaStream_t stream() const { return stream_; }

  void check(cudaError_t error, const char* what) const {
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", what, ": ", cudaGetErrorString(error));
  }

  void copy(void* to, const void* from, size_t bytes) const {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_),
          "memory could not be copied");
  }

  // Uninitialised memory, for as long as the tensor lives.
  torch::stable::Tensor workspace(int64_t numel, ScalarType type) const {
    return torch::stable::new_empty(tensor_, {numel}, type);
  }

 private:
  const char* op_;
  const torch::stable::Tensor& tensor_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace dst::cuda
