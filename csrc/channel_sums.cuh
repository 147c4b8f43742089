// Deterministic reduction of (N, C, H, W) to two sums per channel.
//
// This kernel stores one partial sum per block; a second kernel of the operation adds the partial sums of each channel. Accumulators are
// float64, except for the tiles that one thread has in flight. The number of blocks and the order of the additions do not
// depend on the device, so the result is bitwise reproducible.
#pragma once

#include "images.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

namespace dfkd_fast {

struct SumGrid {
  int64_t groups;           // tiles along the channels
  int64_t tiles;            // tiles per group
  int64_t tiles_per_image;
  int32_t width;            // groups per block; threads of the same group have stride `width`
};

template <typename TileT, typename Terms>
constexpr int kTilesInFlight = TileT::kCount > 8 ? 1 : 4 / Terms::kTensors;

// `Terms` defines kTensors (the number of tensors it reads), constants<Tile>(c) (per-channel constants of a tile),
// load<Tile>(n, c, p), add(constants, loaded, first, second), which accumulates two sums per channel of the tile, and
// store(c, block, blocks, sums), which stores the partial sums of a channel.
template <typename TileT, typename Terms>
__global__ void __launch_bounds__(kTileThreads, 2) partial_sums_kernel(
    const __grid_constant__ SumGrid grid, const __grid_constant__ Terms terms) {
  constexpr int kChannels = TileT::kChannels;
  constexpr int kInFlight = kTilesInFlight<TileT, Terms>;
  // For one-element tiles, float64 additions are not the bottleneck.
  using PartialSum = std::conditional_t<TileT::kCount == 1, double, float>;
  const int rows = kTileThreads / grid.width;
  const int row = static_cast<int>(threadIdx.x) / grid.width;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * grid.width + threadIdx.x % grid.width;
  const int64_t c = group * kChannels;
  double first[kChannels] = {};
  double second[kChannels] = {};
  if (row < rows && group < grid.groups) {
    const auto constants = terms.template constants<TileT>(c);
    const int64_t step = static_cast<int64_t>(gridDim.y) * rows;
    const int64_t step_images = step / grid.tiles_per_image;
    const int64_t step_tiles = step - step_images * grid.tiles_per_image;
    int64_t tile = static_cast<int64_t>(blockIdx.y) * rows + row;
    int64_t n = tile / grid.tiles_per_image;
    int64_t tile_in_image = tile - n * grid.tiles_per_image;
    while (tile < grid.tiles) {
      typename Terms::template Loaded<TileT> loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (tile + i * step < grid.tiles) {
          terms.template load<TileT>(n, c, tile_in_image * TileT::kPixels, loaded[i]);
          n += step_images;
          tile_in_image += step_tiles;
          if (tile_in_image >= grid.tiles_per_image) {
            tile_in_image -= grid.tiles_per_image;
            ++n;
          }
        }
      }
      PartialSum tile_first[kChannels] = {};
      PartialSum tile_second[kChannels] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (tile + i * step < grid.tiles) {
          terms.template add<TileT>(constants, loaded[i], tile_first, tile_second);
        }
      }
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        first[k] += tile_first[k];
        second[k] += tile_second[k];
      }
      tile += kInFlight * step;
    }
  }
  __shared__ double2 sums[kChannels][kTileThreads];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    sums[k][threadIdx.x] = make_double2(first[k], second[k]);
  }
  for (int span = kTileThreads / 2; span > 0; span /= 2) {
    __syncthreads();
    if (row < span && row + span < rows) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const double2 other = sums[k][threadIdx.x + span * grid.width];
        sums[k][threadIdx.x].x += other.x;
        sums[k][threadIdx.x].y += other.y;
      }
    }
  }
  if (row == 0 && group < grid.groups) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      terms.store(c + k, blockIdx.y, gridDim.y, sums[k][threadIdx.x]);
    }
  }
}

// The sum over a warp.
__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Adjacent threads process adjacent channels where the channel stride is smaller than the pixel stride.
inline SumGrid sum_grid_of(const Shape& shape, Tiling tiling, int kPixels, int kChannels, const std::vector<View>& views) {
  const auto channels_inside = [&](const View& view) { return view.channel < (shape.pixels > 1 ? view.pixel : view.image); };
  const int64_t widest = tiling == Tiling::kChannels                                                                    ? 32
                         : tiling == Tiling::kElements && std::any_of(views.begin(), views.end(), channels_inside) ? kTileThreads
                                                                                                                   : 1;
  SumGrid grid{};
  grid.groups = shape.channels / kChannels;
  grid.tiles_per_image = shape.pixels / kPixels;
  grid.tiles = shape.images * grid.tiles_per_image;
  const int64_t columns = (grid.groups + widest - 1) / widest;
  grid.width = static_cast<int32_t>((grid.groups + columns - 1) / columns);
  return grid;
}

// Calls launch(tile, grid, columns) with the tile for the given views and arrays and the number of blocks along the channels.
template <typename Launch>
void with_sum_grid(
    const Shape& shape, const std::vector<View>& views, const Launch& launch, std::initializer_list<const float*> arrays = {}) {
  if (shape.channels == 0) {
    return;
  }
  const Tiling tiling = tiling_of(shape, views, arrays);
  dispatch_tile(tiling, [&](auto tile) {
    using TileT = decltype(tile);
    const SumGrid grid = sum_grid_of(shape, tiling, TileT::kPixels, TileT::kChannels, views);
    launch(tile, grid, (grid.groups + grid.width - 1) / grid.width);
  });
}

}  // namespace dfkd_fast
