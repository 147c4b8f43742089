// Per-channel mean and variance: partial moments in one pass, their combination for many tensors, and the backward pass.

#include "operators.h"

#include "images.cuh"
#include "moments.cuh"

namespace dfkd_fast {
namespace {

struct Partial {
  static constexpr int kTensors = 1;

  View x;
  Activation activation;
  PartialMoments moments;

  template <typename TileT>
  struct Loaded {
    float values[TileT::kCount];
  };

  template <typename TileT>
  struct Pivots {
    float values[TileT::kChannels];
  };

  __device__ float pivot(int64_t c) const {
    float value[1];
    load_tile<Tile<1, 1>>(x, 0, c, 0, value);
    activate(activation, value);
    return rounded_pivot(value[0]);
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
    add_differences<TileT>(loaded.values, pivots.values, first, second);
  }

  __device__ void store(int64_t c, int64_t block, int64_t blocks, double2 sums) const { moments.store(c, block, blocks, sums, pivot(c)); }
};

// Partial moments of one tensor.
struct Layer {
  const float* parts;  // (2, C, count)
  const float* center;
  int32_t channels;
  int32_t count;
};

constexpr int kMaxLayers = 160;

// Passed as a kernel argument, so that a captured CUDA graph contains it.
struct Layers {
  Layer layers[kMaxLayers];
};

// (L, width) per plane: first means, then variances.
struct Table {
  float* moments;
  double* raw_moments;  // E[x] and E[x²]; null unless they are required instead of the moments
  float* offsets;       // means minus centers, one plane
  const float* scale;   // may be null, like shift
  const float* shift;
  int64_t first;  // row of the first layer
  int64_t width;
  int64_t plane;  // elements of a plane
};
static_assert(sizeof(Layers) + sizeof(Table) <= 4096);  // up to which arguments have no extra cost

// One warp per channel and layer.
__global__ void __launch_bounds__(kTileThreads) combine_kernel(const __grid_constant__ Layers layers, const __grid_constant__ Table table) {
  const int lane = threadIdx.x % 32;
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x) / 32;
  if (c >= table.width) {
    return;
  }
  const Layer& layer = layers.layers[blockIdx.y];
  const bool exists = c < layer.channels;
  double offset = 0;
  double square = 0;
  if (exists) {
    const float* const first = layer.parts + c * layer.count;
    const float* const second = first + int64_t{layer.channels} * layer.count;
#pragma unroll 16
    for (int i = lane; i < layer.count; i += 32) {
      offset += first[i];
      square += second[i];
    }
  }
  offset = warp_sum(offset);
  square = warp_sum(square);
  if (lane != 0) {
    return;
  }
  const int64_t at = (table.first + blockIdx.y) * table.width + c;
  table.offsets[at] = static_cast<float>(offset);
  const bool empty = exists && layer.count == 0;
  const double center = exists && !empty ? layer.center[c] : 0;
  double mean = empty ? NAN : center + offset;
  if (table.raw_moments != nullptr) {
    // With infinite values the correction terms would give inf - inf.
    table.raw_moments[at] = mean;
    table.raw_moments[table.plane + at] = empty ? NAN : isinf(square) ? square : square + center * (2 * offset + center);
    return;
  }
  double variance = square - offset * offset;
  variance = empty ? NAN : variance < 0 ? 0 : variance;
  if (table.scale != nullptr) {
    mean *= table.scale[at];
    variance *= table.scale[table.plane + at];
  }
  if (table.shift != nullptr) {
    mean += table.shift[at];
    variance += table.shift[table.plane + at];
  }
  table.moments[at] = static_cast<float>(mean);
  table.moments[table.plane + at] = static_cast<float>(variance);
}

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

std::tuple<Tensor, Tensor> partial_moments(const Tensor& x, const std::string& activation, int64_t blocks) {
  const Partial partial{view_of(x, "x"), activation_of(activation), {}};
  return partial_moments_of(x, shape_of(x), {partial.x}, partial, blocks);
}

std::tuple<Tensor, Tensor> combine_moments(
    const std::vector<Tensor>& parts,
    const std::vector<Tensor>& centers,
    const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift,
    bool raw) {
  STD_TORCH_CHECK(!parts.empty() && parts.size() == centers.size(), "parts and centers must be lists of the same length, at least 1");
  const auto count = static_cast<int64_t>(parts.size());
  int64_t width = 0;
  for (const Tensor& center : centers) {
    width = std::max(width, center.numel());
  }
  const Tensor& like = centers[0];
  const Tensor moments = torch::stable::new_empty(like, {2, count, width}, raw ? ScalarType::Double : ScalarType::Float);
  const Tensor offsets = torch::stable::new_empty(like, {count, width});
  Table table{};
  if (raw) {
    table.raw_moments = static_cast<double*>(moments.mutable_data_ptr());
  } else {
    table.moments = static_cast<float*>(moments.mutable_data_ptr());
  }
  table.offsets = static_cast<float*>(offsets.mutable_data_ptr());
  table.width = width;
  table.plane = count * width;
  const auto constant = [&](const std::optional<Tensor>& tensor, const char* name) -> const float* {
    if (!tensor.has_value()) {
      return nullptr;
    }
    STD_TORCH_CHECK(tensor->numel() == 2 * table.plane && tensor->is_contiguous(), name, " must be contiguous (2, L, C)");
    return float_data(*tensor, name);
  };
  table.scale = constant(scale, "scale");
  table.shift = constant(shift, "shift");
  const Launcher launcher(like);
  constexpr int64_t kWarps = kTileThreads / 32;
  for (; table.first < count; table.first += kMaxLayers) {
    const int64_t rows = std::min<int64_t>(kMaxLayers, count - table.first);
    Layers layers{};
    for (int64_t row = 0; row < rows; ++row) {
      const Tensor& part = parts[table.first + row];
      const Tensor& center = centers[table.first + row];
      const auto sizes = part.sizes();
      STD_TORCH_CHECK(
          sizes.size() == 3 && sizes[0] == 2 && sizes[1] == center.numel() && part.is_contiguous() && center.is_contiguous(),
          "parts and centers must be contiguous (2, C, parts) and (C,)");
      layers.layers[row] = {
          float_data(part, "parts"), float_data(center, "centers"), static_cast<int32_t>(sizes[1]), static_cast<int32_t>(sizes[2])};
    }
    launcher(combine_kernel, (width + kWarps - 1) / kWarps, rows, kTileThreads, layers, table);
  }
  return {moments, offsets};
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
