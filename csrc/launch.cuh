// Kernel launches on PyTorch's current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace dfkd_fast {

using torch::stable::Tensor;

// Device guard for the tensor's device that launches kernels on PyTorch's current stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Does nothing if the grid is empty, as for an empty tensor.
  template <typename... Parameters>
  void operator()(
      void (*kernel)(Parameters...), int64_t blocks, int threads, const std::type_identity_t<Parameters>&... arguments) const {
    (*this)(kernel, blocks, 1, threads, arguments...);
  }

  template <typename... Parameters>
  void operator()(
      void (*kernel)(Parameters...),
      int64_t columns,
      int64_t rows,
      int threads,
      const std::type_identity_t<Parameters>&... arguments) const {
    if (columns == 0 || rows == 0) {
      return;
    }
    STD_TORCH_CHECK(columns <= INT32_MAX && rows <= UINT16_MAX, "too large for one launch: ", columns, " x ", rows, " blocks");
    const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(rows));
    kernel<<<grid, static_cast<unsigned>(threads), 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Blocks for a grid-stride loop over `tiles`: no more than are resident on the GPU at once.
  template <typename... Parameters>
  int64_t resident_blocks(void (*kernel)(Parameters...), int64_t tiles, int threads) const {
    int multiprocessors = 0;
    int blocks = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
    return std::min(tiles, static_cast<int64_t>(multiprocessors) * blocks);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace dfkd_fast
