// Replaces csrc/launch.cuh: the launcher for CPU tensors, without streams.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "device.h"

namespace dfkd_fast {

using torch::stable::Tensor;

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

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
    device::launch(grid, static_cast<unsigned>(threads), [&] { kernel(arguments...); });
  }

  // Few, so that grid-stride loops repeat.
  template <typename... Parameters>
  int64_t resident_blocks(void (*)(Parameters...), int64_t tiles, int) const {
    return std::min<int64_t>(tiles, 2);
  }
};

}  // namespace dfkd_fast
