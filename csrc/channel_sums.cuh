// Two sums a channel over all images and pixels, the same bits at every call.
//
// A block sums some tiles of some channels and writes a partial; a second kernel adds up each channel's partials. Sums are
// float64, except of the few tiles that a thread has in flight. Neither the number of blocks nor any order depends on the
// device.
#pragma once

#include "images.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

namespace dfkd_fast {

struct SumGrid {
  int64_t groups;           // tiles side by side along channels
  int64_t tiles;            // of a group
  int64_t tiles_per_image;
  int32_t width;            // groups of a block; the threads of a group are `width` apart
};

constexpr int kSumBlocks = 1024;  // about as many as a large GPU holds at once

template <typename AnyTile, typename Terms>
constexpr int kTilesInFlight = AnyTile::kCount > 8 ? 1 : 4 / Terms::kTensors;

// `Terms` brings the number of tensors that it reads, constants<Tile>(c) of the channels of a tile, load<Tile>(n, c, p) from memory, and
// add(constants, loaded, first, second) to two sums a channel of the tile.
template <typename AnyTile, typename Terms>
__global__ void __launch_bounds__(kTileThreads, 2) partial_sums_kernel(
    const __grid_constant__ SumGrid grid, const __grid_constant__ Terms terms, double2* __restrict__ partials) {
  constexpr int kChannels = AnyTile::kChannels;
  constexpr int kInFlight = kTilesInFlight<AnyTile, Terms>;
  // Tiles of one element are few, or as slow to address as float64 is to add.
  using Few = std::conditional_t<AnyTile::kCount == 1, double, float>;
  const int rows = kTileThreads / grid.width;
  const int row = static_cast<int>(threadIdx.x) / grid.width;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * grid.width + threadIdx.x % grid.width;
  const int64_t c = group * kChannels;
  double first[kChannels] = {};
  double second[kChannels] = {};
  if (row < rows && group < grid.groups) {
    const auto constants = terms.template constants<AnyTile>(c);
    const int64_t step = static_cast<int64_t>(gridDim.y) * rows;
    const int64_t step_images = step / grid.tiles_per_image;
    const int64_t step_tiles = step - step_images * grid.tiles_per_image;
    int64_t tile = static_cast<int64_t>(blockIdx.y) * rows + row;
    int64_t n = tile / grid.tiles_per_image;
    int64_t at = tile - n * grid.tiles_per_image;  // in the image
    while (tile < grid.tiles) {
      typename Terms::template Loaded<AnyTile> loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (tile + i * step < grid.tiles) {
          terms.template load<AnyTile>(n, c, at * AnyTile::kPixels, loaded[i]);
          n += step_images;
          at += step_tiles;
          if (at >= grid.tiles_per_image) {
            at -= grid.tiles_per_image;
            ++n;
          }
        }
      }
      Few some_first[kChannels] = {};
      Few some_second[kChannels] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (tile + i * step < grid.tiles) {
          terms.template add<AnyTile>(constants, loaded[i], some_first, some_second);
        }
      }
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        first[k] += some_first[k];
        second[k] += some_second[k];
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
      partials[(c + k) * gridDim.y + blockIdx.y] = sums[k][threadIdx.x];
    }
  }
}

// A warp a channel, which ends in terms.finish(c, first, second).
template <typename Terms>
__global__ void __launch_bounds__(kTileThreads) total_sums_kernel(
    const __grid_constant__ Terms terms, const double2* __restrict__ partials, int64_t splits, int64_t channels) {
  const int lane = threadIdx.x % 32;
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x) / 32;
  if (c >= channels) {
    return;
  }
  double first = 0;
  double second = 0;
  for (int64_t i = lane; i < splits; i += 32) {
    const double2 partial = partials[c * splits + i];
    first += partial.x;
    second += partial.y;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    first += __shfl_xor_sync(0xffffffffu, first, offset);
    second += __shfl_xor_sync(0xffffffffu, second, offset);
  }
  if (lane == 0) {
    terms.finish(c, first, second);
  }
}

// Neighbouring threads take neighbouring channels where those lie closer in memory than pixels do.
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

template <typename Terms>
void sum_channels(const Launcher& launcher, const Shape& shape, const std::vector<View>& views, const Terms& terms, const Tensor& like) {
  if (shape.channels == 0) {
    return;
  }
  const Tiling tiling = tiling_of(shape, views);
  with_tile(tiling, [&](auto tile) {
    using AnyTile = decltype(tile);
    const SumGrid grid = sum_grid_of(shape, tiling, AnyTile::kPixels, AnyTile::kChannels, views);
    const int64_t columns = (grid.groups + grid.width - 1) / grid.width;
    const int64_t tiles_at_once = kTileThreads / grid.width * kTilesInFlight<AnyTile, Terms>;
    const int64_t splits = std::min(std::max<int64_t>(kSumBlocks / columns, 1), (grid.tiles + tiles_at_once - 1) / tiles_at_once);
    const Tensor partials = torch::stable::new_empty(like, {shape.channels * splits, 2}, ScalarType::Double);
    auto* const data = static_cast<double2*>(partials.mutable_data_ptr());
    launcher(partial_sums_kernel<AnyTile, Terms>, columns, splits, kTileThreads, grid, terms, data);
    constexpr int64_t kWarps = kTileThreads / 32;
    launcher(total_sums_kernel<Terms>, (shape.channels + kWarps - 1) / kWarps, kTileThreads, terms, data, splits, shape.channels);
  });
}

}  // namespace dfkd_fast
