// Per-channel values of batch normalization, from partial sums: constants, running statistics, and gradients of the parameters.

#include "operators.h"

#include "channel_sums.cuh"
#include "norm.cuh"

namespace dfkd_fast {
namespace {

constexpr int kWarps = kTileThreads / 32;

// What makes them up; null if there is none.
struct Parameters {
  const float* weight;
  const float* bias;
  const float* input_bias;
};

// The rows (4, C) of a table of constants.
__device__ __forceinline__ void store_constants(
    float* constants, int64_t channels, int64_t c, double mean, double variance, double eps, const Parameters& parameters) {
  const double inverse = 1 / sqrt(variance + eps);
  constants[c] = static_cast<float>(mean);
  constants[channels + c] = static_cast<float>(inverse);
  constants[2 * channels + c] = static_cast<float>(parameters.weight == nullptr ? inverse : inverse * parameters.weight[c]);
  constants[3 * channels + c] = parameters.bias == nullptr ? 0 : parameters.bias[c];
}

__global__ void __launch_bounds__(kTileThreads) constants_kernel(
    const float* running_mean,
    const float* running_var,
    const __grid_constant__ Parameters parameters,
    double eps,
    float* constants,
    int64_t channels) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (c < channels) {
    const double mean = running_mean[c] - (parameters.input_bias == nullptr ? 0 : parameters.input_bias[c]);
    store_constants(constants, channels, c, mean, running_var[c], eps, parameters);
  }
}

// The two sums of a channel's parts (2, C, count), added by a warp in a fixed order.
__device__ __forceinline__ double2 sum_of_parts(const float* parts, int64_t channels, int64_t count, int64_t c) {
  const float* const first = parts + c * count;
  const float* const second = first + channels * count;
  double2 sums = make_double2(0, 0);
#pragma unroll 16
  for (int64_t i = threadIdx.x % 32; i < count; i += 32) {
    sums.x += first[i];
    sums.y += second[i];
  }
  return make_double2(warp_sum(sums.x), warp_sum(sums.y));
}

struct Running {
  float* mean;  // null like variance
  float* variance;
  int64_t* num_batches_tracked;  // may be null
  double momentum;
  bool cumulative;  // average over all batches; num_batches_tracked includes this one
};

__device__ __forceinline__ void update(float& running, double momentum, double value) {
  running = static_cast<float>(running + momentum * (value - running));
}

struct Statistics {
  const float* parts;
  const float* center;
  Parameters parameters;
  Running running;
  const double* count;  // elements per channel of all ranks; null for `elements`
  double elements;
  double eps;
  float* constants;
  int64_t channels;
  int64_t part_count;
};

// One warp per channel.
__global__ void __launch_bounds__(kTileThreads) statistics_kernel(const __grid_constant__ Statistics statistics) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x) / 32;
  if (c >= statistics.channels) {
    return;
  }
  const double2 sums = sum_of_parts(statistics.parts, statistics.channels, statistics.part_count, c);
  if (threadIdx.x % 32 != 0) {
    return;
  }
  const double mean = statistics.center[c] + sums.x;
  const double difference = sums.y - sums.x * sums.x;
  const double variance = difference < 0 ? 0 : difference;
  store_constants(statistics.constants, statistics.channels, c, mean, variance, statistics.eps, statistics.parameters);
  const Running& running = statistics.running;
  if (running.num_batches_tracked != nullptr && !running.cumulative && c == 0) {
    ++*running.num_batches_tracked;
  }
  if (running.mean == nullptr) {
    return;
  }
  const double momentum = running.cumulative ? 1.0 / static_cast<double>(*running.num_batches_tracked) : running.momentum;
  const double count = statistics.count == nullptr ? statistics.elements : *statistics.count;
  const float* const input_bias = statistics.parameters.input_bias;
  update(running.mean[c], momentum, input_bias == nullptr ? mean : mean + input_bias[c]);
  update(running.variance[c], momentum, variance * (count / (count > 1 ? count - 1 : 1)));
}

// One warp per channel; see kernels/norm for the rows of the table.
__global__ void __launch_bounds__(kTileThreads) gradients_kernel(
    const float* sums,
    const __grid_constant__ Constants constants,
    const double* count,
    double elements,
    bool training,
    float* table,
    int64_t channels,
    int64_t part_count) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x) / 32;
  if (c >= channels) {
    return;
  }
  const double2 totals = sum_of_parts(sums, channels, part_count, c);
  if (threadIdx.x % 32 != 0) {
    return;
  }
  const double inverse = constants.inverse[c];
  const double scale = constants.scale[c];
  const double dot = totals.y * inverse;
  const double number = count == nullptr ? elements : *count;
  table[c] = static_cast<float>(dot);
  table[channels + c] = static_cast<float>(totals.x);
  table[2 * channels + c] = training ? 0 : static_cast<float>(scale * totals.x);
  table[3 * channels + c] = static_cast<float>(-scale * inverse * dot / number);
  table[4 * channels + c] = static_cast<float>(-scale * totals.x / number);
}

Parameters parameters_of(
    const Shape& shape, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& input_bias) {
  return {
      channels_data(weight, shape, "weight"), channels_data(bias, shape, "bias"), channels_data(input_bias, shape, "input_bias")};
}

const double* count_data(const std::optional<Tensor>& count) {
  STD_TORCH_CHECK(
      !count.has_value() || (count->scalar_type() == ScalarType::Double && count->numel() == 1), "count must be float64 with one element");
  return count.has_value() ? static_cast<const double*>(count->const_data_ptr()) : nullptr;
}

int64_t parts_of(const Tensor& parts, int64_t channels, const char* name) {
  const auto sizes = parts.sizes();
  STD_TORCH_CHECK(
      sizes.size() == 3 && sizes[0] == 2 && sizes[1] == channels && parts.is_contiguous(), name, " must be contiguous (2, C, parts)");
  return sizes[2];
}

}  // namespace

Tensor batch_norm_constants(
    const Tensor& running_mean,
    const Tensor& running_var,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& input_bias,
    double eps) {
  const int64_t channels = running_mean.numel();
  const Shape shape{1, channels, 1};
  const Tensor constants = torch::stable::new_empty(running_mean, {4, channels});
  const Launcher launcher(running_mean);
  launcher(
      constants_kernel,
      (channels + kTileThreads - 1) / kTileThreads,
      kTileThreads,
      channels_data(running_mean, shape, "running_mean"),
      channels_data(running_var, shape, "running_var"),
      parameters_of(shape, weight, bias, input_bias),
      eps,
      static_cast<float*>(constants.mutable_data_ptr()),
      channels);
  return constants;
}

Tensor batch_norm_statistics(
    const Tensor& parts,
    const Tensor& center,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& input_bias,
    const std::optional<Tensor>& running_mean,
    const std::optional<Tensor>& running_var,
    const std::optional<Tensor>& num_batches_tracked,
    const std::optional<Tensor>& count,
    std::optional<double> momentum,
    double eps,
    int64_t elements) {
  const int64_t channels = center.numel();
  const Shape shape{1, channels, 1};
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_mean and running_var must be given together");
  STD_TORCH_CHECK(
      !num_batches_tracked.has_value() || (num_batches_tracked->scalar_type() == ScalarType::Long && num_batches_tracked->numel() == 1),
      "num_batches_tracked must be int64 with one element");
  STD_TORCH_CHECK(
      momentum.has_value() || num_batches_tracked.has_value() || !running_mean.has_value(),
      "without momentum, num_batches_tracked is required");
  const Tensor constants = torch::stable::new_empty(center, {4, channels});
  const Statistics statistics{
      float_data(parts, "parts"),
      channels_data(center, shape, "center"),
      parameters_of(shape, weight, bias, input_bias),
      {const_cast<float*>(channels_data(running_mean, shape, "running_mean")),
       const_cast<float*>(channels_data(running_var, shape, "running_var")),
       num_batches_tracked.has_value() ? static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr()) : nullptr,
       momentum.value_or(0),
       !momentum.has_value()},
      count_data(count),
      static_cast<double>(elements),
      eps,
      static_cast<float*>(constants.mutable_data_ptr()),
      channels,
      parts_of(parts, channels, "parts")};
  const Launcher launcher(center);
  launcher(statistics_kernel, (channels + kWarps - 1) / kWarps, kTileThreads, statistics);
  return constants;
}

Tensor batch_norm_gradients(
    const Tensor& sums, const Tensor& constants, const std::optional<Tensor>& count, int64_t elements, bool training) {
  const int64_t channels = constants.size(1);
  const Tensor table = torch::stable::new_empty(constants, {5, channels});
  const Launcher launcher(sums);
  launcher(
      gradients_kernel,
      (channels + kWarps - 1) / kWarps,
      kTileThreads,
      float_data(sums, "sums"),
      constants_of(constants, channels),
      count_data(count),
      static_cast<double>(elements),
      training,
      static_cast<float*>(table.mutable_data_ptr()),
      channels,
      parts_of(sums, channels, "sums"));
  return table;
}

}  // namespace dfkd_fast
