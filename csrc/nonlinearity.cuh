// Activations between the layers of a network, and their derivatives.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace dfkd_fast {

enum class Nonlinearity : int8_t { kNone, kRelu, kRelu6, kSilu, kHardswish, kLeakyRelu };

inline Nonlinearity nonlinearity_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "relu", "relu6", "silu", "hardswish", "leaky_relu"};
  for (int i = 0; i < 6; ++i) {
    if (name == kNames[i]) {
      return static_cast<Nonlinearity>(i);
    }
  }
  STD_TORCH_CHECK(false, "activation must be none, relu, relu6, silu, hardswish or leaky_relu, not ", name);
}

// NaN remains NaN.
__device__ __forceinline__ float clamp_to_6(float value) { return value < 0.0f ? 0.0f : value > 6.0f ? 6.0f : value; }

// `slope` is that of a leaky ReLU for negative inputs.
template <int kCount>
__device__ __forceinline__ void apply_nonlinearity(Nonlinearity nonlinearity, float slope, float (&values)[kCount]) {
  const auto transform = [&](auto function) {
#pragma unroll
    for (float& value : values) {
      value = function(value);
    }
  };
  switch (nonlinearity) {
    case Nonlinearity::kNone:
      return;
    case Nonlinearity::kRelu:
      return transform([](float u) { return u < 0.0f ? 0.0f : u; });
    case Nonlinearity::kRelu6:
      return transform([](float u) { return clamp_to_6(u); });
    case Nonlinearity::kSilu:
      return transform([](float u) { return u / (1.0f + expf(-u)); });
    case Nonlinearity::kHardswish:
      return transform([](float u) { return u * clamp_to_6(u + 3.0f) / 6.0f; });
    case Nonlinearity::kLeakyRelu:
      return transform([slope](float u) { return u > 0.0f ? u : u * slope; });
  }
}

// Multiplies gradients by the derivative at `inputs`, which at its kinks is that of PyTorch.
template <int kCount>
__device__ __forceinline__ void multiply_by_derivative(
    Nonlinearity nonlinearity, float slope, const float (&inputs)[kCount], float (&gradients)[kCount]) {
  const auto transform = [&](auto function) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gradients[i] = function(inputs[i], gradients[i]);
    }
  };
  switch (nonlinearity) {
    case Nonlinearity::kNone:
      return;
    case Nonlinearity::kRelu:
      return transform([](float u, float g) { return u <= 0.0f ? 0.0f : g; });
    case Nonlinearity::kRelu6:
      return transform([](float u, float g) { return u <= 0.0f || u >= 6.0f ? 0.0f : g; });
    case Nonlinearity::kSilu:
      return transform([](float u, float g) {
        const float sigmoid = 1.0f / (1.0f + expf(-u));
        return g * (sigmoid * (1.0f + u * (1.0f - sigmoid)));
      });
    case Nonlinearity::kHardswish:
      return transform([](float u, float g) { return u <= -3.0f ? 0.0f : u < 3.0f ? g * (u / 3.0f + 0.5f) : g; });
    case Nonlinearity::kLeakyRelu:
      return transform([slope](float u, float g) { return u > 0.0f ? g : g * slope; });
  }
}

}  // namespace dfkd_fast
