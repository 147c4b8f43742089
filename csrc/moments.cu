// Per-channel mean and variance in one pass, and the backward pass.

#include "operators.h"

#include "channel_sums.cuh"
#include "images.cuh"

namespace dfkd_fast {
namespace {

// Shifted sums: each channel is shifted by one of its own values (the pivot). Unshifted sums would cancel where the mean is
// large compared with the standard deviation.
struct Moments {
  static constexpr int kTensors = 1;

  View x;
  Activation activation;
  double count;  // elements per channel
  double* sum;
  double* square_sum;
  float* mean;
  float* variance;

  template <typename TileT>
  struct Loaded {
    float values[TileT::kCount];
  };

  template <typename TileT>
  struct Pivots {
    float values[TileT::kChannels];
  };

  // Rounded to 12 bits, so that differences from the pivot are exact in float32. Otherwise each difference would be rounded
  // in the same direction, and the error would grow with the count.
  __device__ float pivot(int64_t c) const {
    float value[1];
    load_tile<Tile<1, 1>>(x, 0, c, 0, value);
    activate(activation, value);
    const float rounded = __uint_as_float((__float_as_uint(value[0]) + 0x800u) & ~0xfffu);
    return isfinite(rounded) ? rounded : 0.0f;
  }

  template <typename TileT>
  __device__ Pivots<TileT> constants(int64_t c) const {
    Pivots<TileT> pivots;
#pragma unroll
    for (int k = 0; k < TileT::kChannels; ++k) {
      pivots.values[k] = pivot(c + k);
    }
    return pivots;
  }

  template <typename TileT>
  __device__ __forceinline__ void load(int64_t n, int64_t c, int64_t p, Loaded<TileT>& loaded) const {
    load_tile<TileT>(x, n, c, p, loaded.values);
  }

  template <typename TileT, typename Sum>
  __device__ __forceinline__ void add(
      const Pivots<TileT>& pivots,
      Loaded<TileT>& loaded,
      Sum (&first)[TileT::kChannels],
      Sum (&second)[TileT::kChannels]) const {
    activate(activation, loaded.values);
#pragma unroll
    for (int i = 0; i < TileT::kCount; ++i) {
      constexpr int kChannels = TileT::kChannels;
      const Sum difference = loaded.values[i] - pivots.values[i % kChannels];
      first[i % kChannels] += difference;
      second[i % kChannels] += difference * difference;
    }
  }

  __device__ void finish(int64_t c, double first, double second) const {
    const double center = count > 0 ? pivot(c) : 0;
    const double mean_difference = first / count;
    const double spread = second / count - mean_difference * mean_difference;
    sum[c] = first + count * center;
    // With infinite values the correction terms would give inf - inf.
    square_sum[c] = isinf(second) ? second : second + 2 * center * first + count * center * center;
    mean[c] = static_cast<float>(center + mean_difference);
    variance[c] = static_cast<float>(spread < 0 ? 0 : spread);
  }
};

struct Backward {
  View x;
  View gradient;
  const float* mean_gradient;
  const float* variance_gradient;
  const float* center;
  float scale;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    constexpr int kChannels = TileT::kChannels;
    float values[TileT::kCount];
    float offsets[kChannels];
    float slopes[kChannels];
    float centers[kChannels];
    load_tile<TileT>(x, n, c, p, values);
    load(mean_gradient + c, offsets);
    load(variance_gradient + c, slopes);
    load(center + c, centers);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      offsets[i] *= scale;
      slopes[i] *= 2 * scale;
    }
#pragma unroll
    for (int i = 0; i < TileT::kCount; ++i) {
      values[i] = offsets[i % kChannels] + slopes[i % kChannels] * (values[i] - centers[i % kChannels]);
    }
    store_tile<TileT>(gradient, n, c, p, values);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> moments_forward(const Tensor& x, const std::string& activation) {
  const Shape shape = shape_of(x);
  const View view = view_of(x, "x");
  const auto per_channel = [&](ScalarType dtype) { return torch::stable::new_empty(x, {shape.channels}, dtype); };
  const Tensor sum = per_channel(ScalarType::Double);
  const Tensor square_sum = per_channel(ScalarType::Double);
  const Tensor mean = per_channel(ScalarType::Float);
  const Tensor variance = per_channel(ScalarType::Float);
  const Moments moments{
      view,
      activation_of(activation),
      static_cast<double>(shape.images * shape.pixels),
      static_cast<double*>(sum.mutable_data_ptr()),
      static_cast<double*>(square_sum.mutable_data_ptr()),
      static_cast<float*>(mean.mutable_data_ptr()),
      static_cast<float*>(variance.mutable_data_ptr())};
  sum_channels(Launcher(x), shape, {view}, moments, x);
  return {sum, square_sum, mean, variance};
}

Tensor moments_backward(
    const Tensor& x, const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& center, double scale) {
  const Shape shape = shape_of(x);
  for (const Tensor* array : {&grad_mean, &grad_variance, &center}) {
    STD_TORCH_CHECK(
        array->numel() == shape.channels && array->is_contiguous(), "grad_mean, grad_variance and center must be contiguous (C,)");
  }
  const Tensor gradient = torch::stable::empty_like(x);
  const Backward backward{
      view_of(x, "x"),
      view_of(gradient, "x"),
      float_data(grad_mean, "grad_mean"),
      float_data(grad_variance, "grad_variance"),
      float_data(center, "center"),
      static_cast<float>(scale)};
  const Tiling tiling =
      tiling_of(shape, {backward.x, backward.gradient}, {backward.mean_gradient, backward.variance_gradient, backward.center});
  for_each_tile(Launcher(x), tiling, shape, backward.gradient, backward);
  return gradient;
}

}  // namespace dfkd_fast
