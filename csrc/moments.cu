// The mean and variance of every channel in one read, and the gradient through them.

#include "operators.h"

#include "channel_sums.cuh"
#include "images.cuh"

namespace dfkd_fast {
namespace {

// Sums about a pivot, one of the channel's own values: the sums of its values and squares would cancel where the mean
// is large beside the deviation.
struct Moments {
  static constexpr int kTensors = 1;

  View x;
  Activation activation;
  double count;  // of values of a channel
  double* sum;
  double* square_sum;
  float* mean;
  float* variance;

  template <typename AnyTile>
  struct Loaded {
    float values[AnyTile::kCount];
  };

  template <typename AnyTile>
  struct Pivots {
    float values[AnyTile::kChannels];
  };

  // Rounded to 12 bits, because values differ from such a pivot by numbers that float32 holds. Else each difference
  // would be rounded, by the pivot's last bits and so in the same direction: an error that grows with the count.
  __device__ float pivot(int64_t c) const {
    float value[1];
    load_tile<Tile<1, 1>>(x, 0, c, 0, value);
    activate(activation, value);
    const float rounded = __uint_as_float((__float_as_uint(value[0]) + 0x800u) & ~0xfffu);
    return isfinite(rounded) ? rounded : 0.0f;
  }

  template <typename AnyTile>
  __device__ Pivots<AnyTile> constants(int64_t c) const {
    Pivots<AnyTile> pivots;
#pragma unroll
    for (int k = 0; k < AnyTile::kChannels; ++k) {
      pivots.values[k] = pivot(c + k);
    }
    return pivots;
  }

  template <typename AnyTile>
  __device__ __forceinline__ void load(int64_t n, int64_t c, int64_t p, Loaded<AnyTile>& loaded) const {
    load_tile<AnyTile>(x, n, c, p, loaded.values);
  }

  template <typename AnyTile, typename Sum>
  __device__ __forceinline__ void add(
      const Pivots<AnyTile>& pivots,
      Loaded<AnyTile>& loaded,
      Sum (&first)[AnyTile::kChannels],
      Sum (&second)[AnyTile::kChannels]) const {
    activate(activation, loaded.values);
#pragma unroll
    for (int i = 0; i < AnyTile::kCount; ++i) {
      constexpr int kChannels = AnyTile::kChannels;
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
    // Infinite values leave a finite pivot's terms without meaning.
    square_sum[c] = isinf(second) ? second : second + 2 * center * first + count * center * center;
    mean[c] = static_cast<float>(center + mean_difference);
    variance[c] = static_cast<float>(spread < 0 ? 0 : spread);
  }
};

struct Backward {
  View x;
  View gradient;
  const float* offset;
  const float* slope;
  const float* center;

  template <typename AnyTile>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    constexpr int kChannels = AnyTile::kChannels;
    float values[AnyTile::kCount];
    float offsets[kChannels];
    float slopes[kChannels];
    float centers[kChannels];
    load_tile<AnyTile>(x, n, c, p, values);
    load(offset + c, offsets);
    load(slope + c, slopes);
    load(center + c, centers);
#pragma unroll
    for (int i = 0; i < AnyTile::kCount; ++i) {
      values[i] = offsets[i % kChannels] + slopes[i % kChannels] * (values[i] - centers[i % kChannels]);
    }
    store_tile<AnyTile>(gradient, n, c, p, values);
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

Tensor moments_backward(const Tensor& x, const Tensor& offset, const Tensor& slope, const Tensor& center) {
  const Shape shape = shape_of(x);
  for (const Tensor* array : {&offset, &slope, &center}) {
    STD_TORCH_CHECK(array->numel() == shape.channels && array->is_contiguous(), "offset, slope and center must be contiguous (C,)");
  }
  const Tensor gradient = torch::stable::empty_like(x);
  const Backward backward{
      view_of(x, "x"), view_of(gradient, "x"), floats(offset, "offset"), floats(slope, "slope"), floats(center, "center")};
  const Tiling tiling = tiling_of(shape, {backward.x, backward.gradient}, {backward.offset, backward.slope, backward.center});
  for_each_tile(Launcher(x), tiling, shape, backward.gradient, backward);
  return gradient;
}

}  // namespace dfkd_fast
