// Multiplies the gradients saved by a discrepancy's forward pass by the upstream gradient, both sides in one launch.

#include "operators.h"

#include "launch.cuh"
#include "dtype.cuh"

#include <algorithm>

namespace dfkd_fast {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kScaleVector = 8;

// One side; gradient may be grad_unscaled, which is then scaled in place. Pointers are null if the side needs no gradient.
struct Side {
  const void* grad_unscaled;
  void* gradient;
  float scale;
  Dtype grad_unscaled_dtype;
  Dtype gradient_dtype;
};

struct Scaling {
  Side sides[2];
  const float* upstream;
  int64_t count;  // elements of each side
  bool vectors;
};

__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const __grid_constant__ Scaling scaling) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * kScaleVector;
  const bool vectorized = scaling.vectors && first + kScaleVector <= scaling.count;
  if (first >= scaling.count) {
    return;
  }
  const float upstream = *scaling.upstream;
  float values[2][kScaleVector];
#pragma unroll
  for (int k = 0; k < 2; ++k) {  // loads of both sides are in flight together
    const Side& side = scaling.sides[k];
    if (side.grad_unscaled == nullptr) {
      continue;
    }
    dispatch_floating_or_int8(side.grad_unscaled_dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* const source = static_cast<const T*>(side.grad_unscaled) + first;
      if (vectorized) {
        load(source, values[k]);
        return;
      }
#pragma unroll
      for (int i = 0; i < kScaleVector; ++i) {
        if (first + i < scaling.count) {
          values[k][i] = widen(source[i]);
        }
      }
    });
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const Side& side = scaling.sides[k];
    if (side.grad_unscaled == nullptr) {
      continue;
    }
    const float factor = upstream * side.scale;
#pragma unroll
    for (float& value : values[k]) {
      value *= factor;
    }
    dispatch_floating(side.gradient_dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      T* const target = static_cast<T*>(side.gradient) + first;
      if (vectorized) {
        store(target, values[k]);
        return;
      }
#pragma unroll
      for (int i = 0; i < kScaleVector; ++i) {
        if (first + i < scaling.count) {
          narrow(values[k][i], target[i]);
        }
      }
    });
  }
}

Side side_of(const Tensor& grad_unscaled, const Tensor& gradient, double scale) {
  const ScalarType dtype = grad_unscaled.scalar_type();
  return {
      grad_unscaled.numel() == 0 ? nullptr : grad_unscaled.const_data_ptr(),
      gradient.numel() == 0 ? nullptr : gradient.mutable_data_ptr(),
      static_cast<float>(scale),
      dtype == ScalarType::Char ? Dtype::kInt8 : dtype_of(dtype, "gradients before scaling"),
      dtype_of(gradient.scalar_type(), "gradients")};
}

void scale_sides(const Tensor& upstream, int64_t count, const Side& student, const Side& teacher) {
  const auto aligned = [](const Side& side) { return is_aligned(side.grad_unscaled, 16) && is_aligned(side.gradient, 16); };
  const Scaling scaling{{student, teacher}, float_data(upstream, "upstream"), count, aligned(student) && aligned(teacher)};
  constexpr int64_t kPerBlock = kScaleThreads * kScaleVector;
  const Launcher launcher(upstream);
  launcher(scale_kernel, (count + kPerBlock - 1) / kPerBlock, kScaleThreads, scaling);
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
  scale_sides(
      upstream,
      std::max(student_grad.numel(), teacher_grad.numel()),
      side_of(student_grad_unscaled, student_grad, student_scale),
      side_of(teacher_grad_unscaled, teacher_grad, teacher_scale));
  return {student_grad, teacher_grad};
}

void scale_gradients_(
    const Tensor& student_grad, const Tensor& teacher_grad, const Tensor& upstream, double student_scale, double teacher_scale) {
  scale_sides(
      upstream,
      std::max(student_grad.numel(), teacher_grad.numel()),
      side_of(student_grad, student_grad, student_scale),
      side_of(teacher_grad, teacher_grad, teacher_scale));
}

}  // namespace dfkd_fast
