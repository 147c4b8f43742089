// Partial per-channel moments, which `combine_moments` adds for many tensors at once.
//
// The sums are shifted: each channel is shifted by one of its own values (the pivot), which is returned as its center.
// Unshifted sums would cancel where the mean is large compared with the standard deviation.
#pragma once

#include "channel_sums.cuh"

namespace dfkd_fast {

// Rounded to 12 bits, so that differences from the pivot are exact in float32. Otherwise each difference would be rounded
// in the same direction, and the error would grow with the count.
__device__ __forceinline__ float rounded_pivot(float value) {
  const float rounded = __uint_as_float((__float_as_uint(value) + 0x800u) & ~0xfffu);
  return isfinite(rounded) ? rounded : 0.0f;
}

// A number as the sum of two float32 numbers.
__device__ __forceinline__ float2 split(double value) {
  const float high = static_cast<float>(value);
  return {high, isfinite(high) ? static_cast<float>(value - high) : 0.0f};
}

// Where the partial moments of a tensor are stored.
struct PartialMoments {
  float2* parts;  // (2, C, blocks)
  float* center;
  int64_t channels;
  double weight;  // 1 / elements per channel

  __device__ void store(int64_t c, int64_t block, int64_t blocks, double2 sums, float pivot) const {
    parts[c * blocks + block] = split(sums.x * weight);
    parts[(channels + c) * blocks + block] = split(sums.y * weight);
    if (block == 0) {
      center[c] = pivot;
    }
  }
};

// Adds the differences of a tile's values from its channels' pivots, and their squares.
template <typename TileT, typename Sum>
__device__ __forceinline__ void add_differences(
    const float (&values)[TileT::kCount],
    const float (&pivots)[TileT::kChannels],
    Sum (&first)[TileT::kChannels],
    Sum (&second)[TileT::kChannels]) {
#pragma unroll
  for (int i = 0; i < TileT::kCount; ++i) {
    constexpr int kChannels = TileT::kChannels;
    const Sum difference = values[i] - pivots[i % kChannels];
    first[i % kChannels] += difference;
    second[i % kChannels] += difference * difference;
  }
}

// Allocates the results (2, C, 2 * blocks) and (C,), and launches `terms`, whose member `moments` is where they are stored.
template <typename Terms>
std::tuple<Tensor, Tensor> partial_moments_of(
    const Tensor& x, const Shape& shape, const std::vector<View>& views, Terms terms, int64_t blocks) {
  const Tensor sums = torch::stable::new_empty(x, {2, shape.channels, 2 * blocks}, ScalarType::Float);
  const Tensor center = torch::stable::new_empty(x, {shape.channels}, ScalarType::Float);
  terms.moments = {
      static_cast<float2*>(sums.mutable_data_ptr()),
      static_cast<float*>(center.mutable_data_ptr()),
      shape.channels,
      1.0 / static_cast<double>(shape.images * shape.pixels)};
  const Launcher launcher(x);
  with_sum_grid(shape, views, [&](auto tile, const SumGrid& grid, int64_t columns) {
    launcher(partial_sums_kernel<decltype(tile), Terms>, columns, blocks, kTileThreads, grid, terms);
  });
  return {sums, center};
}

}  // namespace dfkd_fast
