// Multiplies the gradients saved by a discrepancy's forward pass by the upstream gradient, both sides in one launch.

#include "operators.h"

#include "launch.cuh"
#include "dtype.cuh"

#include <algorithm>
#include <utility>

namespace dfkd_fast {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kScaleVector = 8;

struct Scaling {
  const void* grad_unscaled;
  void* gradient;
  int64_t count;
  float scale;
  Dtype grad_unscaled_dtype;
  Dtype gradient_dtype;
  bool vectors;
};

struct Scalings {
  Scaling sides[2];
  const float* upstream;
};

__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const __grid_constant__ Scalings scalings) {
  const Scaling& side = scalings.sides[blockIdx.y];
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * kScaleVector;
  const auto factor = *scalings.upstream * side.scale;
  const bool vectorized = side.vectors && first + kScaleVector <= side.count;
  if (first >= side.count) {
    return;
  }
  float values[kScaleVector];
  dispatch_floating_or_int8(side.grad_unscaled_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const source = static_cast<const T*>(side.grad_unscaled) + first;
    if (vectorized) {
      load(source, values);
      return;
    }
#pragma unroll
    for (int i = 0; i < kScaleVector; ++i) {
      if (first + i < side.count) {
        values[i] = widen(source[i]);
      }
    }
  });
#pragma unroll
  for (float& value : values) {
    value *= factor;
  }
  dispatch_floating(side.gradient_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* const target = static_cast<T*>(side.gradient) + first;
    if (vectorized) {
      store(target, values);
      return;
    }
#pragma unroll
    for (int i = 0; i < kScaleVector; ++i) {
      if (first + i < side.count) {
        narrow(values[i], target[i]);
      }
    }
  });
}

Scaling scaling_of(const Tensor& grad_unscaled, const Tensor& gradient, double scale) {
  const ScalarType dtype = grad_unscaled.scalar_type();
  Scaling scaling{};
  scaling.grad_unscaled = grad_unscaled.const_data_ptr();
  scaling.gradient = gradient.mutable_data_ptr();
  scaling.count = grad_unscaled.numel();
  scaling.scale = static_cast<float>(scale);
  scaling.grad_unscaled_dtype = dtype == ScalarType::Char ? Dtype::kInt8 : dtype_of(dtype, "gradients before scaling");
  scaling.gradient_dtype = dtype_of(gradient.scalar_type(), "gradients");
  scaling.vectors = is_aligned(scaling.grad_unscaled, 16) && is_aligned(scaling.gradient, 16);
  return scaling;
}

}  // namespace

std::tuple<Tensor, Tensor> scale_gradients(
    const Tensor& student_grad_unscaled,
    const Tensor& teacher_grad_unscaled,
    const Tensor& upstream,
    double student_scale,
    double teacher_scale,
    ScalarType student_dtype,
    ScalarType teacher_dtype) {
  const Tensor student_grad = empty_like(student_grad_unscaled, student_dtype);
  const Tensor teacher_grad = empty_like(teacher_grad_unscaled, teacher_dtype);
  const int64_t largest = std::max(student_grad_unscaled.numel(), teacher_grad_unscaled.numel());
  Scalings scalings{};
  scalings.upstream = float_data(upstream, "upstream");
  scalings.sides[0] = scaling_of(student_grad_unscaled, student_grad, student_scale);
  scalings.sides[1] = scaling_of(teacher_grad_unscaled, teacher_grad, teacher_scale);
  if (scalings.sides[0].count == 0) {
    std::swap(scalings.sides[0], scalings.sides[1]);
  }
  constexpr int64_t kPerBlock = kScaleThreads * kScaleVector;
  const Launcher launcher(upstream);
  launcher(scale_kernel, (largest + kPerBlock - 1) / kPerBlock, scalings.sides[1].count == 0 ? 1 : 2, kScaleThreads, scalings);
  return {student_grad, teacher_grad};
}

}  // namespace dfkd_fast
