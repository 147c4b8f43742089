// Batch normalization, residual and activation: the passes over the activations, forward and backward.

#include "operators.h"

#include "images.cuh"
#include "moments.cuh"
#include "nonlinearity.cuh"
#include "norm.cuh"

namespace dfkd_fast {
namespace {

template <typename TileT>
__device__ __forceinline__ void center(const Constants& constants, int64_t c, float (&values)[TileT::kCount]) {
  float means[TileT::kChannels];
  load(constants.mean + c, means);
#pragma unroll
  for (int i = 0; i < TileT::kCount; ++i) {
    values[i] -= means[i % TileT::kChannels];
  }
}

// From differences from the mean.
template <typename TileT>
__device__ __forceinline__ void normalize(
    const Constants& constants, int64_t c, const float (&centered)[TileT::kCount], float (&normalized)[TileT::kCount]) {
  float scales[TileT::kChannels];
  float shifts[TileT::kChannels];
  load(constants.scale + c, scales);
  load(constants.shift + c, shifts);
#pragma unroll
  for (int i = 0; i < TileT::kCount; ++i) {
    normalized[i] = centered[i] * scales[i % TileT::kChannels] + shifts[i % TileT::kChannels];
  }
}

struct Forward {
  View x;
  View residual;  // data is null if there is none
  View y;
  Constants constants;
  Nonlinearity nonlinearity;
  float slope;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    float values[TileT::kCount];
    load_tile<TileT>(x, n, c, p, values);
    center<TileT>(constants, c, values);
    normalize<TileT>(constants, c, values, values);
    if (residual.data != nullptr) {
      float residuals[TileT::kCount];
      load_tile<TileT>(residual, n, c, p, residuals);
      add(residuals, values);
    }
    apply_nonlinearity(nonlinearity, slope, values);
    store_tile<TileT>(y, n, c, p, values);
  }
};

struct GradientInputs {
  View gradient;
  View x;
  View output;  // data is null unless the derivative of the activation is a function of it
  Constants constants;
  Nonlinearity nonlinearity;
  float slope;
};

// Sums of g and of g * (x - mean), where g is the gradient before the activation. `from_output`: whether inputs.output exists.
template <bool from_output>
struct Sums {
  static constexpr int kTensors = from_output ? 3 : 2;

  GradientInputs inputs;
  float2* parts;  // (2, C, blocks)
  int64_t channels;

  template <typename TileT>
  struct Loaded {
    float values[TileT::kCount];
    float gradients[TileT::kCount];
    float outputs[from_output ? TileT::kCount : 1];
  };

  template <typename TileT>
  __device__ int64_t constants(int64_t c) const {
    return c;
  }

  template <typename TileT>
  __device__ __forceinline__ void load(int64_t n, int64_t c, int64_t p, Loaded<TileT>& loaded) const {
    load_tile<TileT>(inputs.x, n, c, p, loaded.values);
    load_tile<TileT>(inputs.gradient, n, c, p, loaded.gradients);
    if constexpr (from_output) {
      load_tile<TileT>(inputs.output, n, c, p, loaded.outputs);
    }
  }

  template <typename TileT, typename Sum>
  __device__ __forceinline__ void add(
      int64_t c, Loaded<TileT>& loaded, Sum (&first)[TileT::kChannels], Sum (&second)[TileT::kChannels]) const {
    // The constants are loaded again for every tile, because registers are scarce.
    center<TileT>(inputs.constants, c, loaded.values);
    if constexpr (from_output) {
      multiply_by_derivative(inputs.nonlinearity, inputs.slope, loaded.outputs, loaded.gradients);
    } else {
      float normalized[TileT::kCount];
      normalize<TileT>(inputs.constants, c, loaded.values, normalized);
      multiply_by_derivative(inputs.nonlinearity, inputs.slope, normalized, loaded.gradients);
    }
#pragma unroll
    for (int i = 0; i < TileT::kCount; ++i) {
      first[i % TileT::kChannels] += loaded.gradients[i];
      second[i % TileT::kChannels] += static_cast<Sum>(loaded.gradients[i]) * loaded.values[i];
    }
  }

  __device__ void store(int64_t c, int64_t block, int64_t blocks, double2 sums) const {
    parts[c * blocks + block] = split(sums.x);
    parts[(channels + c) * blocks + block] = split(sums.y);
  }
};

struct Backward {
  GradientInputs inputs;
  View x_gradient;
  View residual_gradient;  // data is null if it is not needed
  const float* slopes;  // null, like offsets, if the statistics are constants
  const float* offsets;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    constexpr int kCount = TileT::kCount;
    constexpr int kChannels = TileT::kChannels;
    float values[kCount];
    float gradients[kCount];
    float outputs[kCount];
    load_tile<TileT>(inputs.x, n, c, p, values);
    load_tile<TileT>(inputs.gradient, n, c, p, gradients);
    if (inputs.output.data != nullptr) {
      load_tile<TileT>(inputs.output, n, c, p, outputs);
    }
    center<TileT>(inputs.constants, c, values);
    if (inputs.output.data == nullptr) {
      normalize<TileT>(inputs.constants, c, values, outputs);
    }
    multiply_by_derivative(inputs.nonlinearity, inputs.slope, outputs, gradients);
    if (residual_gradient.data != nullptr) {
      store_tile<TileT>(residual_gradient, n, c, p, gradients);
    }
    float scales[kChannels];
    load(inputs.constants.scale + c, scales);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gradients[i] *= scales[i % kChannels];
    }
    if (slopes != nullptr) {
      float slope[kChannels];
      float offset[kChannels];
      load(slopes + c, slope);
      load(offsets + c, offset);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        gradients[i] += values[i] * slope[i % kChannels] + offset[i % kChannels];
      }
    }
    store_tile<TileT>(x_gradient, n, c, p, gradients);
  }
};

GradientInputs gradient_inputs(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& constants,
    const std::optional<Tensor>& output,
    const std::string& activation,
    double slope) {
  const Shape shape = shape_of(x);
  return {
      view_like_x(gradient, shape, "gradient"),
      view_of(x, "x"),
      output.has_value() ? view_like_x(*output, shape, "output") : View{},
      constants_of(constants, shape.channels),
      nonlinearity_of(activation),
      static_cast<float>(slope)};
}

}  // namespace

Tensor batch_norm_act_forward(
    const Tensor& x, const Tensor& constants, const std::optional<Tensor>& residual, const std::string& activation, double slope) {
  const Shape shape = shape_of(x);
  const Tensor y = torch::stable::empty_like(x);
  const Forward forward{
      view_of(x, "x"),
      residual.has_value() ? view_like_x(*residual, shape, "residual") : View{},
      view_of(y, "x"),
      constants_of(constants, shape.channels),
      nonlinearity_of(activation),
      static_cast<float>(slope)};
  const Constants& arrays = forward.constants;
  const Tiling tiling =
      tiling_of(shape, existing({forward.x, forward.residual, forward.y}), {arrays.mean, arrays.scale, arrays.shift});
  for_each_tile(Launcher(x), tiling, shape, forward.y, forward);
  return y;
}

Tensor batch_norm_act_sums(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& constants,
    const std::optional<Tensor>& output,
    const std::string& activation,
    double slope,
    int64_t blocks) {
  const Shape shape = shape_of(x);
  const Tensor parts = torch::stable::new_empty(constants, {2, shape.channels, 2 * blocks});
  const GradientInputs inputs = gradient_inputs(gradient, x, constants, output, activation, slope);
  const Launcher launcher(x);
  const auto launch = [&](const auto& sums) {
    const Constants& arrays = inputs.constants;
    with_sum_grid(
        shape,
        existing({inputs.x, inputs.gradient, inputs.output}),
        [&](auto tile, const SumGrid& grid, int64_t columns) {
          launcher(partial_sums_kernel<decltype(tile), std::decay_t<decltype(sums)>>, columns, blocks, kTileThreads, grid, sums);
        },
        {arrays.mean, arrays.scale, arrays.shift});
  };
  auto* const data = static_cast<float2*>(parts.mutable_data_ptr());
  if (inputs.output.data != nullptr) {
    launch(Sums<true>{inputs, data, shape.channels});
  } else {
    launch(Sums<false>{inputs, data, shape.channels});
  }
  return parts;
}

std::tuple<Tensor, Tensor> batch_norm_act_backward(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& constants,
    const std::optional<Tensor>& coefficients,
    const std::optional<Tensor>& output,
    const std::string& activation,
    double slope,
    bool separate) {
  const Shape shape = shape_of(x);
  const Tensor x_gradient = torch::stable::empty_like(x);
  const Tensor residual_gradient = separate ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const float* const table = coefficients.has_value() ? table_data(*coefficients, 5, shape.channels, "coefficients") : nullptr;
  const Backward backward{
      gradient_inputs(gradient, x, constants, output, activation, slope),
      view_of(x_gradient, "x"),
      separate ? view_of(residual_gradient, "x") : View{},
      table == nullptr ? nullptr : table + 3 * shape.channels,
      table == nullptr ? nullptr : table + 4 * shape.channels};
  const GradientInputs& inputs = backward.inputs;
  const auto views = existing({inputs.x, inputs.gradient, inputs.output, backward.x_gradient, backward.residual_gradient});
  const Tiling tiling = tiling_of(
      shape, views, {inputs.constants.mean, inputs.constants.scale, inputs.constants.shift, backward.slopes, backward.offsets});
  for_each_tile(Launcher(x), tiling, shape, backward.x_gradient, backward);
  return {x_gradient, residual_gradient};
}

}  // namespace dfkd_fast
