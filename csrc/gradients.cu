// The gradients of a discrepancy from the units that its forward pass left, both sides in one launch.

#include "operators.h"

#include "launch.cuh"
#include "storage.cuh"

#include <algorithm>
#include <utility>

namespace dfkd_fast {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kScaleVector = 8;

struct Scaling {
  const void* unit;
  void* gradient;
  int64_t count;
  float scale;
  Storage unit_storage;
  Storage gradient_storage;
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
  const bool whole = side.vectors && first + kScaleVector <= side.count;
  if (first >= side.count) {
    return;
  }
  float values[kScaleVector];
  with_any(side.unit_storage, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const source = static_cast<const T*>(side.unit) + first;
    if (whole) {
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
  with_floating(side.gradient_storage, [&](auto type) {
    using T = typename decltype(type)::type;
    T* const target = static_cast<T*>(side.gradient) + first;
    if (whole) {
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

Scaling scaling_of(const Tensor& unit, const Tensor& gradient, double scale) {
  const ScalarType dtype = unit.scalar_type();
  Scaling scaling{};
  scaling.unit = unit.const_data_ptr();
  scaling.gradient = gradient.mutable_data_ptr();
  scaling.count = unit.numel();
  scaling.scale = static_cast<float>(scale);
  scaling.unit_storage = dtype == ScalarType::Char ? Storage::kInt8 : storage_of(dtype, "units");
  scaling.gradient_storage = storage_of(gradient.scalar_type(), "gradients");
  scaling.vectors = aligned(scaling.unit, 16) && aligned(scaling.gradient, 16);
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
  const Tensor student_gradient = empty_like(student_grad_unscaled, student_dtype);
  const Tensor teacher_gradient = empty_like(teacher_grad_unscaled, teacher_dtype);
  const int64_t largest = std::max(student_grad_unscaled.numel(), teacher_grad_unscaled.numel());
  Scalings scalings{};
  scalings.upstream = floats(upstream, "upstream");
  scalings.sides[0] = scaling_of(student_grad_unscaled, student_gradient, student_scale);
  scalings.sides[1] = scaling_of(teacher_grad_unscaled, teacher_gradient, teacher_scale);
  if (scalings.sides[0].count == 0) {
    std::swap(scalings.sides[0], scalings.sides[1]);
  }
  constexpr int64_t kPerBlock = kScaleThreads * kScaleVector;
  const Launcher launcher(upstream);
  launcher(scale_kernel, (largest + kPerBlock - 1) / kPerBlock, scalings.sides[1].count == 0 ? 1 : 2, kScaleThreads, scalings);
  return {student_gradient, teacher_gradient};
}

}  // namespace dfkd_fast
