// Activation, normalization, cast and concatenation of several generators' outputs in one launch, and the backward pass.
//
// A thread loads and stores 8 pixels of every channel in 16-byte accesses for either layout. The conversion from planar to
// channels-last happens in registers.

#include "operators.h"

#include "channel_sums.cuh"
#include "images.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace dfkd_fast {
namespace {

// A constant per generator and channel; data is null if there is none.
struct Constants {
  const float* data;
  int64_t generator;
  int64_t channel;

  __device__ __forceinline__ float at(int64_t g, int64_t c) const { return data[g * generator + c * channel]; }
};

// From an optional (C,) or (G, C) tensor.
Constants constants_of(const std::optional<Tensor>& tensor, const char* name, int64_t generators, int64_t channels) {
  if (!tensor.has_value()) {
    return {nullptr, 0, 0};
  }
  const auto sizes = tensor->sizes();
  const bool valid = sizes.size() == 1 ? sizes[0] == channels : sizes.size() == 2 && sizes[0] == generators && sizes[1] == channels;
  STD_TORCH_CHECK(valid, name, " must have a value for each of ", generators, " generators and ", channels, " channels");
  return {float_data(*tensor, name), sizes.size() == 2 ? tensor->stride(0) : 0, tensor->stride(tensor->dim() - 1)};
}

// (value - mean) / std for the channels of a tile.
template <int kChannels>
struct Normalisation {
  float mean[kChannels];
  float inverse_std[kChannels];

  __device__ __forceinline__ Normalisation(const Constants& means, const Constants& stds, int64_t g, int64_t c) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      mean[k] = means.data == nullptr ? 0.0f : means.at(g, c + k);
      inverse_std[k] = stds.data == nullptr ? 1.0f : 1.0f / stds.at(g, c + k);
    }
  }

  __device__ __forceinline__ float operator()(float value, int k) const { return (value - mean[k]) * inverse_std[k]; }
};

constexpr int kMaxRaws = 16;  // per launch

struct Forward {
  View raws[kMaxRaws];
  int64_t ends[kMaxRaws];  // end row of each raw within the rows of this launch
  View out;                // rows of the batch that this launch writes
  Constants mean;
  Constants std;
  Activation activation;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    int g = 0;
    while (n >= ends[g]) {
      ++g;
    }
    float values[TileT::kCount];
    load_tile<TileT>(raws[g], g == 0 ? n : n - ends[g - 1], c, p, values);
    activate(activation, values);
    if (std.data != nullptr) {
      const Normalisation<TileT::kChannels> normalise(mean, std, g, c);
#pragma unroll
      for (int i = 0; i < TileT::kCount; ++i) {
        values[i] = normalise(values[i], i % TileT::kChannels);
      }
    }
    store_tile<TileT>(out, n, c, p, values);
  }
};

struct Backward {
  View gradient;
  View raw;
  View raw_gradient;
  Constants mean;
  Constants std;
  Constants gradient_mean;
  Constants gradient_dot;
  Activation activation;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    constexpr int kCount = TileT::kCount;
    constexpr int kChannels = TileT::kChannels;
    float gradients[kCount];
    float values[kCount];
    const bool needs_raw = activation != Activation::kNone || gradient_mean.data != nullptr;
    load_tile<TileT>(gradient, n, c, p, gradients);
    if (needs_raw) {
      load_tile<TileT>(raw, n, c, p, values);
      activate(activation, values);
    }
    const Normalisation<kChannels> normalise(mean, std, 0, c);
    if (gradient_mean.data != nullptr) {
      float means[kChannels];
      float dots[kChannels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        means[k] = gradient_mean.at(0, c + k);
        dots[k] = gradient_dot.at(0, c + k);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        gradients[i] = gradients[i] - means[i % kChannels] - normalise(values[i], i % kChannels) * dots[i % kChannels];
      }
    }
    if (std.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        gradients[i] *= normalise.inverse_std[i % kChannels];
      }
    }
    if (activation == Activation::kTanh) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        gradients[i] *= 1.0f - values[i] * values[i];
      }
    } else if (activation == Activation::kSigmoid) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        gradients[i] *= values[i] * (1.0f - values[i]);
      }
    }
    store_tile<TileT>(raw_gradient, n, c, p, gradients);
  }
};

// Per-channel means of g and of g * x_hat, which the backward pass of batch normalization subtracts.
struct GradientMoments {
  static constexpr int kTensors = 2;

  View gradient;
  View raw;
  Constants mean;
  Constants std;
  Activation activation;
  double2* partials;  // (C, blocks)

  template <typename TileT>
  struct Loaded {
    float gradients[TileT::kCount];
    float values[TileT::kCount];
  };

  template <typename TileT>
  __device__ Normalisation<TileT::kChannels> constants(int64_t c) const {
    return {mean, std, 0, c};
  }

  template <typename TileT>
  __device__ __forceinline__ void load(int64_t n, int64_t c, int64_t p, Loaded<TileT>& loaded) const {
    load_tile<TileT>(gradient, n, c, p, loaded.gradients);
    load_tile<TileT>(raw, n, c, p, loaded.values);
  }

  template <typename TileT, typename Sum>
  __device__ __forceinline__ void add(
      const Normalisation<TileT::kChannels>& normalise,
      Loaded<TileT>& loaded,
      Sum (&first)[TileT::kChannels],
      Sum (&second)[TileT::kChannels]) const {
    activate(activation, loaded.values);
#pragma unroll
    for (int i = 0; i < TileT::kCount; ++i) {
      constexpr int kChannels = TileT::kChannels;
      first[i % kChannels] += loaded.gradients[i];
      second[i % kChannels] += Sum{loaded.gradients[i]} * normalise(loaded.values[i], i % kChannels);
    }
  }

  __device__ void store(int64_t c, int64_t block, int64_t blocks, double2 sums) const { partials[c * blocks + block] = sums; }
};

// One warp per channel.
__global__ void __launch_bounds__(kTileThreads) gradient_moments_kernel(
    const double2* __restrict__ partials,
    int64_t blocks,
    int64_t channels,
    double count,  // elements per channel
    float* __restrict__ gradient_mean,
    float* __restrict__ gradient_dot) {
  const int lane = threadIdx.x % 32;
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x) / 32;
  if (c >= channels) {
    return;
  }
  double first = 0;
  double second = 0;
  for (int64_t i = lane; i < blocks; i += 32) {
    const double2 partial = partials[c * blocks + i];
    first += partial.x;
    second += partial.y;
  }
  first = warp_sum(first);
  second = warp_sum(second);
  if (lane == 0) {
    gradient_mean[c] = static_cast<float>(first / count);
    gradient_dot[c] = static_cast<float>(second / count);
  }
}

// Shared by concat_forward, which allocates the output, and concat_forward_out.
void concat_into(
    const Tensor& out,
    const std::vector<Tensor>& raws,
    const std::string& activation,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& std) {
  const Shape whole = shape_of(out);
  const auto generators = static_cast<int64_t>(raws.size());
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), "mean and std must be given together");
  Forward forward{};
  forward.activation = activation_of(activation);
  const Constants means = constants_of(mean, "mean", generators, whole.channels);
  const Constants stds = constants_of(std, "std", generators, whole.channels);
  const Launcher launcher(out);
  int64_t written = 0;  // images
  for (int64_t first = 0; first < generators; first += kMaxRaws) {
    Shape part{0, whole.channels, whole.pixels};
    std::vector<View> views;
    for (int64_t g = first; g < std::min(first + kMaxRaws, generators); ++g) {
      const Shape shape = shape_of(raws[g]);
      STD_TORCH_CHECK(shape.channels == whole.channels && shape.pixels == whole.pixels, "raws and out differ in C, H or W");
      part.images += shape.images;
      forward.raws[g - first] = view_of(raws[g], "raws");
      forward.ends[g - first] = part.images;
      if (shape.images > 0) {
        views.push_back(forward.raws[g - first]);
      }
    }
    forward.out = view_of(out, "out");
    forward.out.data = static_cast<char*>(out.mutable_data_ptr()) + written * forward.out.image * element_size(forward.out.dtype);
    views.push_back(forward.out);
    forward.mean = means;
    forward.std = stds;
    if (mean.has_value()) {
      forward.mean.data += first * means.generator;
      forward.std.data += first * stds.generator;
    }
    for_each_tile(launcher, tiling_of(part, views), part, forward.out, forward);
    written += part.images;
  }
  STD_TORCH_CHECK(written == whole.images, "raws have ", written, " images, out ", whole.images);
}

}  // namespace

Tensor concat_forward(
    const std::vector<Tensor>& raws,
    const std::string& activation,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& std,
    ScalarType dtype,
    bool channels_last) {
  STD_TORCH_CHECK(!raws.empty() && raws[0].dim() == 4, "raws must be tensors (B, C, H, W)");
  const Tensor& raw = raws[0];
  int64_t images = 0;
  for (const Tensor& each : raws) {
    images += each.size(0);
  }
  const int64_t sizes[] = {images, raw.size(1), raw.size(2), raw.size(3)};
  const auto format = channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  const Tensor out = torch::stable::empty(sizes, dtype, std::nullopt, raw.device(), std::nullopt, format);
  concat_into(out, raws, activation, mean, std);
  return out;
}

void concat_forward_out(
    const Tensor& out,
    const std::vector<Tensor>& raws,
    const std::string& activation,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& std) {
  concat_into(out, raws, activation, mean, std);
}

Tensor concat_backward(
    const Tensor& gradient,
    const Tensor& raw,
    const std::string& activation,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& std,
    const std::optional<Tensor>& gradient_mean,
    const std::optional<Tensor>& gradient_dot) {
  const Shape shape = shape_of(raw);
  const Shape gradient_shape = shape_of(gradient);
  STD_TORCH_CHECK(
      gradient_shape.images == shape.images && gradient_shape.channels == shape.channels && gradient_shape.pixels == shape.pixels,
      "gradient and raw differ in shape");
  STD_TORCH_CHECK(
      mean.has_value() == std.has_value() && gradient_mean.has_value() == gradient_dot.has_value(),
      "mean and std must be given together, and so must gradient_mean and gradient_dot");
  const Tensor raw_gradient = torch::stable::empty_like(raw);
  const Backward backward{
      view_of(gradient, "gradient"),
      view_of(raw, "raw"),
      view_of(raw_gradient, "raw"),
      constants_of(mean, "mean", 1, shape.channels),
      constants_of(std, "std", 1, shape.channels),
      constants_of(gradient_mean, "gradient_mean", 1, shape.channels),
      constants_of(gradient_dot, "gradient_dot", 1, shape.channels),
      activation_of(activation)};
  const Tiling tiling = tiling_of(shape, {backward.gradient, backward.raw, backward.raw_gradient});
  for_each_tile(Launcher(raw), tiling, shape, backward.raw_gradient, backward);
  return raw_gradient;
}

std::tuple<Tensor, Tensor> concat_gradient_moments(
    const Tensor& gradient, const Tensor& raw, const std::string& activation, const Tensor& mean, const Tensor& std) {
  const Shape shape = shape_of(raw);
  const Shape gradient_shape = shape_of(gradient);
  STD_TORCH_CHECK(
      gradient_shape.images == shape.images && gradient_shape.channels == shape.channels && gradient_shape.pixels == shape.pixels,
      "gradient and raw differ in shape");
  const Tensor gradient_mean = torch::stable::new_empty(raw, {shape.channels}, ScalarType::Float);
  const Tensor gradient_dot = torch::stable::new_empty(raw, {shape.channels}, ScalarType::Float);
  GradientMoments moments{
      view_of(gradient, "gradient"),
      view_of(raw, "raw"),
      constants_of(mean, "mean", 1, shape.channels),
      constants_of(std, "std", 1, shape.channels),
      activation_of(activation),
      nullptr};
  const Launcher launcher(raw);
  with_sum_grid(shape, {moments.gradient, moments.raw}, [&](auto tile, const SumGrid& grid, int64_t columns) {
    constexpr int64_t kBlocks = 1024;  // about the number of blocks resident on a large GPU
    const int64_t tiles_at_once = kTileThreads / grid.width * kTilesInFlight<decltype(tile), GradientMoments>;
    const int64_t blocks = std::min(std::max<int64_t>(kBlocks / columns, 1), (grid.tiles + tiles_at_once - 1) / tiles_at_once);
    const Tensor partials = torch::stable::new_empty(raw, {shape.channels * blocks, 2}, ScalarType::Double);
    moments.partials = static_cast<double2*>(partials.mutable_data_ptr());
    launcher(partial_sums_kernel<decltype(tile), GradientMoments>, columns, blocks, kTileThreads, grid, moments);
    constexpr int64_t kWarps = kTileThreads / 32;
    launcher(
        gradient_moments_kernel,
        (shape.channels + kWarps - 1) / kWarps,
        kTileThreads,
        moments.partials,
        blocks,
        shape.channels,
        static_cast<double>(shape.images * shape.pixels),
        static_cast<float*>(gradient_mean.mutable_data_ptr()),
        static_cast<float*>(gradient_dot.mutable_data_ptr()));
  });
  return {gradient_mean, gradient_dot};
}

}  // namespace dfkd_fast
