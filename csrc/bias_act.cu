// Bias, residual and activation after a convolution in one pass, optionally with the moments of x + bias, and the backward pass.

#include "operators.h"

#include "images.cuh"
#include "moments.cuh"
#include "nonlinearity.cuh"

namespace dfkd_fast {
namespace {

// Adds per-channel values to a tile.
template <typename TileT>
__device__ __forceinline__ void add_channels(const float (&channels)[TileT::kChannels], float (&values)[TileT::kCount]) {
#pragma unroll
  for (int i = 0; i < TileT::kCount; ++i) {
    values[i] += channels[i % TileT::kChannels];
  }
}

struct Inputs {
  View x;
  View residual;  // data is null if there is none
  const float* bias;
  Nonlinearity nonlinearity;
};

struct Forward {
  Inputs inputs;
  View y;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    float values[TileT::kCount];
    float biases[TileT::kChannels];
    load_tile<TileT>(inputs.x, n, c, p, values);
    load(inputs.bias + c, biases);
    add_channels<TileT>(biases, values);
    if (inputs.residual.data != nullptr) {
      float residuals[TileT::kCount];
      load_tile<TileT>(inputs.residual, n, c, p, residuals);
      add(residuals, values);
    }
    apply_nonlinearity(inputs.nonlinearity, 0, values);
    store_tile<TileT>(y, n, c, p, values);
  }
};

// Partial moments of x + bias; the same pass writes the result.
struct Moments {
  static constexpr int kTensors = 2;

  Inputs inputs;
  View y;
  PartialMoments moments;

  template <typename TileT>
  struct Loaded {
    int64_t offset;  // of the tile in y
    float values[TileT::kCount];
    float residuals[TileT::kCount];
  };

  template <typename TileT>
  struct Constants {
    int64_t c;
    float pivots[TileT::kChannels];
  };

  __device__ float pivot(int64_t c) const {
    float value[1];
    load_tile<Tile<1, 1>>(inputs.x, 0, c, 0, value);
    return rounded_pivot(value[0] + inputs.bias[c]);
  }

  template <typename TileT>
  __device__ Constants<TileT> constants(int64_t c) const {
    Constants<TileT> constants;
    constants.c = c;
#pragma unroll
    for (int k = 0; k < TileT::kChannels; ++k) {
      constants.pivots[k] = pivot(c + k);
    }
    return constants;
  }

  template <typename TileT>
  __device__ __forceinline__ void load(int64_t n, int64_t c, int64_t p, Loaded<TileT>& loaded) const {
    loaded.offset = TileT::offset(y, n, c, p);
    load_tile<TileT>(inputs.x, n, c, p, loaded.values);
    if (inputs.residual.data != nullptr) {
      load_tile<TileT>(inputs.residual, n, c, p, loaded.residuals);
    }
  }

  template <typename TileT, typename Sum>
  __device__ __forceinline__ void add(
      const Constants<TileT>& constants,
      Loaded<TileT>& loaded,
      Sum (&first)[TileT::kChannels],
      Sum (&second)[TileT::kChannels]) const {
    float biases[TileT::kChannels];  // loaded again for every tile, because registers are scarce
#pragma unroll
    for (int k = 0; k < TileT::kChannels; ++k) {
      biases[k] = inputs.bias[constants.c + k];
    }
    add_channels<TileT>(biases, loaded.values);
    add_differences<TileT>(loaded.values, constants.pivots, first, second);
    if (inputs.residual.data != nullptr) {
      dfkd_fast::add(loaded.residuals, loaded.values);
    }
    apply_nonlinearity(inputs.nonlinearity, 0, loaded.values);
    View tile = y;
    tile.data = static_cast<char*>(y.data) + loaded.offset * element_size(y.dtype);
    store_tile<TileT>(tile, 0, 0, 0, loaded.values);
  }

  __device__ void store(int64_t c, int64_t block, int64_t blocks, double2 sums) const { moments.store(c, block, blocks, sums, pivot(c)); }
};

struct Backward {
  Inputs inputs;
  View gradient;
  View x_gradient;
  View residual_gradient;  // data is null if it is not needed or equals x_gradient
  const float* mean_gradient;  // null without moments
  const float* variance_gradient;
  const float* center;
  float scale;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    constexpr int kCount = TileT::kCount;
    constexpr int kChannels = TileT::kChannels;
    float values[kCount];
    float gradients[kCount];
    float biases[kChannels];
    load_tile<TileT>(inputs.x, n, c, p, values);
    load_tile<TileT>(gradient, n, c, p, gradients);
    load(inputs.bias + c, biases);
    add_channels<TileT>(biases, values);
    float corrections[kCount] = {};  // gradient of the moments
    if (mean_gradient != nullptr) {
      float offsets[kChannels];
      float slopes[kChannels];
      float centers[kChannels];
      load(mean_gradient + c, offsets);
      load(variance_gradient + c, slopes);
      load(center + c, centers);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        offsets[i] *= scale;
        slopes[i] *= 2 * scale;
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        corrections[i] = offsets[i % kChannels] + slopes[i % kChannels] * (values[i] - centers[i % kChannels]);
      }
    }
    if (inputs.residual.data != nullptr) {
      float residuals[kCount];
      load_tile<TileT>(inputs.residual, n, c, p, residuals);
      add(residuals, values);
    }
    multiply_by_derivative(inputs.nonlinearity, 0, values, gradients);
    if (residual_gradient.data != nullptr) {
      store_tile<TileT>(residual_gradient, n, c, p, gradients);
    }
    add(corrections, gradients);
    store_tile<TileT>(x_gradient, n, c, p, gradients);
  }
};

Inputs inputs_of(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, const std::string& activation) {
  const Shape shape = shape_of(x);
  return {
      view_of(x, "x"),
      residual.has_value() ? view_like_x(*residual, shape, "residual") : View{},
      channels_data(bias, shape, "bias"),
      nonlinearity_of(activation)};
}

}  // namespace

Tensor bias_act_forward(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, const std::string& activation) {
  const Shape shape = shape_of(x);
  const Tensor y = torch::stable::empty_like(x);
  const Forward forward{inputs_of(x, bias, residual, activation), view_of(y, "x")};
  const Tiling tiling = tiling_of(shape, existing({forward.inputs.x, forward.inputs.residual, forward.y}), {forward.inputs.bias});
  for_each_tile(Launcher(x), tiling, shape, forward.y, forward);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bias_act_moments_forward(
    const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, const std::string& activation, int64_t blocks) {
  const Tensor y = torch::stable::empty_like(x);
  const Moments moments{inputs_of(x, bias, residual, activation), view_of(y, "x"), {}};
  const auto views = existing({moments.inputs.x, moments.inputs.residual, moments.y});
  const auto [sums, center] = partial_moments_of(x, shape_of(x), views, moments, blocks);
  return {y, sums, center};
}

std::tuple<Tensor, Tensor> bias_act_backward(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& bias,
    const std::optional<Tensor>& residual,
    const std::string& activation,
    const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_variance,
    const std::optional<Tensor>& center,
    double scale,
    bool separate) {
  const Shape shape = shape_of(x);
  STD_TORCH_CHECK(
      grad_mean.has_value() == grad_variance.has_value() && grad_mean.has_value() == center.has_value(),
      "grad_mean, grad_variance and center must be given together");
  const Tensor x_gradient = torch::stable::empty_like(x);
  const Tensor residual_gradient = separate ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Backward backward{
      inputs_of(x, bias, residual, activation),
      view_like_x(gradient, shape, "gradient"),
      view_of(x_gradient, "x"),
      separate ? view_of(residual_gradient, "x") : View{},
      channels_data(grad_mean, shape, "grad_mean"),
      channels_data(grad_variance, shape, "grad_variance"),
      channels_data(center, shape, "center"),
      static_cast<float>(scale)};
  const auto views =
      existing({backward.inputs.x, backward.inputs.residual, backward.gradient, backward.x_gradient, backward.residual_gradient});
  const Tiling tiling = tiling_of(shape, views, {backward.inputs.bias, backward.mean_gradient, backward.variance_gradient, backward.center});
  for_each_tile(Launcher(x), tiling, shape, backward.x_gradient, backward);
  return {x_gradient, residual_gradient};
}

}  // namespace dfkd_fast
