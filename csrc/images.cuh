// Tiled iteration over (N, C, H, W) tensors of arbitrary strides.
//
// A tile is what a thread loads at once. If the layouts of all tensors allow 16-byte accesses, it is 8 pixels of one channel
// (contiguous), 8 channels of one pixel (channels-last), or 8 pixels of all 3 channels (either layout); otherwise it is one
// element. Operations are templates over the tile size.
#pragma once

#include "launch.cuh"
#include "dtype.cuh"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

namespace dfkd_fast {

constexpr int kTileThreads = 256;

struct Shape {
  int64_t images;
  int64_t channels;
  int64_t pixels;

  int64_t count() const { return images * channels * pixels; }
};

// Strides are in elements; the stride of a dimension of size 1 is 0.
struct View {
  void* data;
  int64_t image;
  int64_t channel;
  int64_t pixel;
  int64_t width;  // pixels in a row
  int64_t gap;    // extra stride between the end of a row and the next row
  Dtype dtype;

  // For views with gap == 0.
  __device__ __forceinline__ int64_t offset_without_gaps(int64_t n, int64_t c, int64_t p) const {
    return n * image + c * channel + p * pixel;
  }

  __device__ __forceinline__ int64_t offset(int64_t n, int64_t c, int64_t p) const {
    return offset_without_gaps(n, c, p) + (gap == 0 ? 0 : p / width * gap);
  }
};

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == 4 || sizes.size() == 2, "must be (N, C) or (N, C, H, W), not of ", sizes.size(), " dimensions");
  return {sizes[0], sizes[1], sizes.size() == 4 ? sizes[2] * sizes[3] : 1};
}

inline View view_of(const Tensor& tensor, Dtype dtype) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const auto stride = [&](size_t i) { return i < sizes.size() && sizes[i] > 1 ? strides[i] : 0; };
  View view{};
  view.data = const_cast<void*>(tensor.const_data_ptr());
  view.image = stride(0);
  view.channel = stride(1);
  view.width = sizes.size() == 4 ? std::max<int64_t>(sizes[3], 1) : 1;
  view.pixel = view.width > 1 ? stride(3) : stride(2);
  view.gap = view.width > 1 && sizes[2] > 1 ? strides[2] - view.width * view.pixel : 0;
  view.dtype = dtype;
  return view;
}

inline View view_of(const Tensor& tensor, const char* name) { return view_of(tensor, dtype_of(tensor.scalar_type(), name)); }

inline const float* channels_data(const Tensor& tensor, const Shape& shape, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == shape.channels && tensor.is_contiguous(), name, " must be contiguous (C,)");
  return float_data(tensor, name);
}

inline const float* channels_data(const std::optional<Tensor>& tensor, const Shape& shape, const char* name) {
  return tensor.has_value() ? channels_data(*tensor, shape, name) : nullptr;
}

// View of a tensor that must have the shape of x.
inline View view_like_x(const Tensor& tensor, const Shape& shape, const char* name) {
  const Shape own = shape_of(tensor);
  STD_TORCH_CHECK(
      own.images == shape.images && own.channels == shape.channels && own.pixels == shape.pixels, name, " and x differ in shape");
  return view_of(tensor, name);
}

// The views of tensors that exist.
inline std::vector<View> existing(std::initializer_list<View> views) {
  std::vector<View> result;
  std::copy_if(views.begin(), views.end(), std::back_inserter(result), [](const View& view) { return view.data != nullptr; });
  return result;
}

enum class Tiling { kPixels, kImage, kChannels, kElements };

// The widest tiling that every view allows; `arrays` have one element per channel and are loaded together with the tiles.
inline Tiling tiling_of(const Shape& shape, const std::vector<View>& views, std::initializer_list<const float*> arrays = {}) {
  const auto all_views = [&](auto permits) { return std::all_of(views.begin(), views.end(), permits); };
  const auto aligned_strides = [](const View& view, std::initializer_list<int64_t> strides) {
    return is_aligned(view.data, 16) &&
           std::all_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride * element_size(view.dtype) % 16 == 0; });
  };
  const auto planar = [&](const View& view) {
    return view.pixel == 1 && view.gap == 0 && aligned_strides(view, {view.image, view.channel});
  };
  const auto interleaved = [&](const View& view) {
    return view.channel == 1 && view.pixel == shape.channels && view.gap == 0 && aligned_strides(view, {view.image});
  };
  if (shape.pixels % 8 == 0) {
    if (all_views(planar)) {
      return Tiling::kPixels;
    }
    if (shape.channels == 3 && all_views([&](const View& view) { return planar(view) || interleaved(view); })) {
      return Tiling::kImage;
    }
  }
  if (shape.channels % 8 == 0 && std::all_of(arrays.begin(), arrays.end(), [](const float* array) { return is_aligned(array, 16); }) &&
      all_views([&](const View& view) { return view.channel == 1 && aligned_strides(view, {view.image, view.pixel, view.gap}); })) {
    return Tiling::kChannels;
  }
  return Tiling::kElements;
}

template <int pixels, int channels>
struct Tile {
  static constexpr int kPixels = pixels;
  static constexpr int kChannels = channels;
  static constexpr int kCount = kPixels * kChannels;  // elements of a tile, channels fastest

  // Tilings of several pixels require gap == 0.
  __device__ __forceinline__ static int64_t offset(const View& view, int64_t n, int64_t c, int64_t p) {
    return kPixels > 1 ? view.offset_without_gaps(n, c, p) : view.offset(n, c, p);
  }
};

// Calls a generic lambda with the Tile type of a tiling.
template <typename Function>
void dispatch_tile(Tiling tiling, Function&& function) {
  switch (tiling) {
    case Tiling::kPixels:
      return function(Tile<8, 1>{});
    case Tiling::kImage:
      return function(Tile<8, 3>{});
    case Tiling::kChannels:
      return function(Tile<1, 8>{});
    case Tiling::kElements:
      return function(Tile<1, 1>{});
  }
}

// A tile of several pixels and channels is either interleaved (one contiguous run) or planar (one run per channel).
template <typename TileT>
__device__ __forceinline__ void load_tile(const View& view, int64_t n, int64_t c, int64_t p, float (&values)[TileT::kCount]) {
  dispatch_floating(view.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const source = static_cast<const T*>(view.data) + TileT::offset(view, n, c, p);
    if constexpr (TileT::kPixels > 1 && TileT::kChannels > 1) {
      if (view.channel != 1) {
#pragma unroll
        for (int k = 0; k < TileT::kChannels; ++k) {
          float plane[TileT::kPixels];
          load(source + k * view.channel, plane);
#pragma unroll
          for (int i = 0; i < TileT::kPixels; ++i) {
            values[i * TileT::kChannels + k] = plane[i];
          }
        }
        return;
      }
    }
    load(source, values);
  });
}

template <typename TileT>
__device__ __forceinline__ void store_tile(const View& view, int64_t n, int64_t c, int64_t p, const float (&values)[TileT::kCount]) {
  dispatch_floating(view.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* const target = static_cast<T*>(view.data) + TileT::offset(view, n, c, p);
    if constexpr (TileT::kPixels > 1 && TileT::kChannels > 1) {
      if (view.channel != 1) {
#pragma unroll
        for (int k = 0; k < TileT::kChannels; ++k) {
          float plane[TileT::kPixels];
#pragma unroll
          for (int i = 0; i < TileT::kPixels; ++i) {
            plane[i] = values[i * TileT::kChannels + k];
          }
          store(target + k * view.channel, plane);
        }
        return;
      }
    }
    store(target, values);
  });
}

template <int kCount>
__device__ __forceinline__ void add(const float (&addends)[kCount], float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] += addends[i];
  }
}

// Final activation of the generators.
enum class Activation : int8_t { kNone, kTanh, kSigmoid };

inline Activation activation_of(const std::string& name) {
  if (name == "tanh") {
    return Activation::kTanh;
  }
  if (name == "sigmoid") {
    return Activation::kSigmoid;
  }
  STD_TORCH_CHECK(name == "none", "activation must be none, tanh or sigmoid, not ", name);
  return Activation::kNone;
}

template <int kCount>
__device__ __forceinline__ void activate(Activation activation, float (&values)[kCount]) {
  if (activation == Activation::kTanh) {
#pragma unroll
    for (float& value : values) {
      value = tanhf(value);
    }
  } else if (activation == Activation::kSigmoid) {
#pragma unroll
    for (float& value : values) {
      value = 1.0f / (1.0f + expf(-value));
    }
  }
}

// Applies `operation.apply<Tile>(n, c, p)` to every tile, where p is the first pixel of the tile.
struct TileGrid {
  int64_t count;
  int64_t inner;   // tiles along the dimension of adjacent threads …
  int64_t middle;  // … and along the other of channels and pixels
  bool channels_inside;
};

template <typename TileT>
TileGrid grid_of(const Shape& shape, const View& written) {
  const int64_t channels = shape.channels / TileT::kChannels;
  const int64_t pixels = shape.pixels / TileT::kPixels;
  const bool channels_inside = written.channel < written.pixel && channels > 1;
  return {
      shape.images * channels * pixels, channels_inside ? channels : pixels, channels_inside ? pixels : channels, channels_inside};
}

template <typename TileT, typename Operation>
__global__ void __launch_bounds__(kTileThreads)
    tile_kernel(const __grid_constant__ TileGrid grid, const __grid_constant__ Operation operation) {
  const auto index = static_cast<uint64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (index >= static_cast<uint64_t>(grid.count)) {
    return;
  }
  const uint64_t line = index / static_cast<uint64_t>(grid.inner);
  const uint64_t n = line / static_cast<uint64_t>(grid.middle);
  const auto inner = static_cast<int64_t>(index - line * grid.inner);
  const auto middle = static_cast<int64_t>(line - n * grid.middle);
  const int64_t c = (grid.channels_inside ? inner : middle) * TileT::kChannels;
  const int64_t p = (grid.channels_inside ? middle : inner) * TileT::kPixels;
  operation.template apply<TileT>(static_cast<int64_t>(n), c, p);
}

template <typename Operation>
void for_each_tile(const Launcher& launcher, Tiling tiling, const Shape& shape, const View& written, const Operation& operation) {
  dispatch_tile(tiling, [&](auto tile) {
    using TileT = decltype(tile);
    const TileGrid grid = grid_of<TileT>(shape, written);
    launcher(tile_kernel<TileT, Operation>, (grid.count + kTileThreads - 1) / kTileThreads, kTileThreads, grid, operation);
  });
}

}  // namespace dfkd_fast
