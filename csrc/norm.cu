// Batch normalization, residual and activation: statistics, normalization, and the backward pass.

#include "operators.h"

#include "images.cuh"
#include "moments.cuh"
#include "nonlinearity.cuh"

namespace dfkd_fast {
namespace {

constexpr int kWarps = kTileThreads / 32;

// Per channel; the normalized value is (x - mean) * scale + shift.
struct Constants {
  const float* mean;
  const float* inverse;  // reciprocal standard deviation
  const float* scale;
  const float* shift;
};

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

template <typename TileT>
__device__ __forceinline__ void center(const Constants& constants, int64_t c, float (&values)[TileT::kCount]) {
  float means[TileT::kChannels];
  load(constants.mean + c, means);
#pragma unroll
  for (int i = 0; i < TileT::kCount; ++i) {
    values[i] -= means[i % TileT::kChannels];
  }
}

// From differences from the mean.
template <typename TileT>
__device__ __forceinline__ void normalize(
    const Constants& constants, int64_t c, const float (&centered)[TileT::kCount], float (&normalized)[TileT::kCount]) {
  float scales[TileT::kChannels];
  float shifts[TileT::kChannels];
  load(constants.scale + c, scales);
  load(constants.shift + c, shifts);
#pragma unroll
  for (int i = 0; i < TileT::kCount; ++i) {
    normalized[i] = centered[i] * scales[i % TileT::kChannels] + shifts[i % TileT::kChannels];
  }
}

struct Forward {
  View x;
  View residual;  // data is null if there is none
  View y;
  Constants constants;
  Nonlinearity nonlinearity;
  float slope;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    float values[TileT::kCount];
    load_tile<TileT>(x, n, c, p, values);
    center<TileT>(constants, c, values);
    normalize<TileT>(constants, c, values, values);
    if (residual.data != nullptr) {
      float residuals[TileT::kCount];
      load_tile<TileT>(residual, n, c, p, residuals);
      add(residuals, values);
    }
    apply_nonlinearity(nonlinearity, slope, values);
    store_tile<TileT>(y, n, c, p, values);
  }
};

struct GradientInputs {
  View gradient;
  View x;
  View output;  // data is null unless the derivative of the activation is a function of it
  Constants constants;
  Nonlinearity nonlinearity;
  float slope;
};

// Sums of g and of g * (x - mean), where g is the gradient before the activation. `from_output`: whether inputs.output exists.
template <bool from_output>
struct Sums {
  static constexpr int kTensors = from_output ? 3 : 2;

  GradientInputs inputs;
  float2* parts;  // (2, C, blocks)
  int64_t channels;

  template <typename TileT>
  struct Loaded {
    float values[TileT::kCount];
    float gradients[TileT::kCount];
    float outputs[from_output ? TileT::kCount : 1];
  };

  template <typename TileT>
  __device__ int64_t constants(int64_t c) const {
    return c;
  }

  template <typename TileT>
  __device__ __forceinline__ void load(int64_t n, int64_t c, int64_t p, Loaded<TileT>& loaded) const {
    load_tile<TileT>(inputs.x, n, c, p, loaded.values);
    load_tile<TileT>(inputs.gradient, n, c, p, loaded.gradients);
    if constexpr (from_output) {
      load_tile<TileT>(inputs.output, n, c, p, loaded.outputs);
    }
  }

  template <typename TileT, typename Sum>
  __device__ __forceinline__ void add(
      int64_t c, Loaded<TileT>& loaded, Sum (&first)[TileT::kChannels], Sum (&second)[TileT::kChannels]) const {
    // The constants are loaded again for every tile, because registers are scarce.
    center<TileT>(inputs.constants, c, loaded.values);
    if constexpr (from_output) {
      multiply_by_derivative(inputs.nonlinearity, inputs.slope, loaded.outputs, loaded.gradients);
    } else {
      float normalized[TileT::kCount];
      normalize<TileT>(inputs.constants, c, loaded.values, normalized);
      multiply_by_derivative(inputs.nonlinearity, inputs.slope, normalized, loaded.gradients);
    }
#pragma unroll
    for (int i = 0; i < TileT::kCount; ++i) {
      first[i % TileT::kChannels] += loaded.gradients[i];
      second[i % TileT::kChannels] += static_cast<Sum>(loaded.gradients[i]) * loaded.values[i];
    }
  }

  __device__ void store(int64_t c, int64_t block, int64_t blocks, double2 sums) const {
    parts[c * blocks + block] = split(sums.x);
    parts[(channels + c) * blocks + block] = split(sums.y);
  }
};

struct Backward {
  GradientInputs inputs;
  View x_gradient;
  View residual_gradient;  // data is null if it is not needed
  const float* slopes;  // null, like offsets, if the statistics are constants
  const float* offsets;

  template <typename TileT>
  __device__ __forceinline__ void apply(int64_t n, int64_t c, int64_t p) const {
    constexpr int kCount = TileT::kCount;
    constexpr int kChannels = TileT::kChannels;
    float values[kCount];
    float gradients[kCount];
    float outputs[kCount];
    load_tile<TileT>(inputs.x, n, c, p, values);
    load_tile<TileT>(inputs.gradient, n, c, p, gradients);
    if (inputs.output.data != nullptr) {
      load_tile<TileT>(inputs.output, n, c, p, outputs);
    }
    center<TileT>(inputs.constants, c, values);
    if (inputs.output.data == nullptr) {
      normalize<TileT>(inputs.constants, c, values, outputs);
    }
    multiply_by_derivative(inputs.nonlinearity, inputs.slope, outputs, gradients);
    if (residual_gradient.data != nullptr) {
      store_tile<TileT>(residual_gradient, n, c, p, gradients);
    }
    float scales[kChannels];
    load(inputs.constants.scale + c, scales);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gradients[i] *= scales[i % kChannels];
    }
    if (slopes != nullptr) {
      float slope[kChannels];
      float offset[kChannels];
      load(slopes + c, slope);
      load(offsets + c, offset);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        gradients[i] += values[i] * slope[i % kChannels] + offset[i % kChannels];
      }
    }
    store_tile<TileT>(x_gradient, n, c, p, gradients);
  }
};

// Rows of a contiguous float32 table (rows, C).
const float* table_data(const Tensor& table, int64_t rows, int64_t channels, const char* name) {
  STD_TORCH_CHECK(table.numel() == rows * channels && table.is_contiguous(), name, " must be contiguous (", rows, ", C)");
  return float_data(table, name);
}

Constants constants_of(const Tensor& table, int64_t channels) {
  const float* const data = table_data(table, 4, channels, "constants");
  return {data, data + channels, data + 2 * channels, data + 3 * channels};
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

GradientInputs gradient_inputs(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& constants,
    const std::optional<Tensor>& output,
    const std::string& activation,
    double slope) {
  const Shape shape = shape_of(x);
  return {
      view_like_x(gradient, shape, "gradient"),
      view_of(x, "x"),
      output.has_value() ? view_like_x(*output, shape, "output") : View{},
      constants_of(constants, shape.channels),
      nonlinearity_of(activation),
      static_cast<float>(slope)};
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

Tensor batch_norm_act_forward(
    const Tensor& x, const Tensor& constants, const std::optional<Tensor>& residual, const std::string& activation, double slope) {
  const Shape shape = shape_of(x);
  const Tensor y = torch::stable::empty_like(x);
  const Forward forward{
      view_of(x, "x"),
      residual.has_value() ? view_like_x(*residual, shape, "residual") : View{},
      view_of(y, "x"),
      constants_of(constants, shape.channels),
      nonlinearity_of(activation),
      static_cast<float>(slope)};
  const Constants& arrays = forward.constants;
  const Tiling tiling =
      tiling_of(shape, existing({forward.x, forward.residual, forward.y}), {arrays.mean, arrays.scale, arrays.shift});
  for_each_tile(Launcher(x), tiling, shape, forward.y, forward);
  return y;
}

Tensor batch_norm_act_sums(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& constants,
    const std::optional<Tensor>& output,
    const std::string& activation,
    double slope,
    int64_t blocks) {
  const Shape shape = shape_of(x);
  const Tensor parts = torch::stable::new_empty(constants, {2, shape.channels, 2 * blocks});
  const GradientInputs inputs = gradient_inputs(gradient, x, constants, output, activation, slope);
  const Launcher launcher(x);
  const auto launch = [&](const auto& sums) {
    const Constants& arrays = inputs.constants;
    with_sum_grid(
        shape,
        existing({inputs.x, inputs.gradient, inputs.output}),
        [&](auto tile, const SumGrid& grid, int64_t columns) {
          launcher(partial_sums_kernel<decltype(tile), std::decay_t<decltype(sums)>>, columns, blocks, kTileThreads, grid, sums);
        },
        {arrays.mean, arrays.scale, arrays.shift});
  };
  auto* const data = static_cast<float2*>(parts.mutable_data_ptr());
  if (inputs.output.data != nullptr) {
    launch(Sums<true>{inputs, data, shape.channels});
  } else {
    launch(Sums<false>{inputs, data, shape.channels});
  }
  return parts;
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

std::tuple<Tensor, Tensor> batch_norm_act_backward(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& constants,
    const std::optional<Tensor>& coefficients,
    const std::optional<Tensor>& output,
    const std::string& activation,
    double slope,
    bool separate) {
  const Shape shape = shape_of(x);
  const Tensor x_gradient = torch::stable::empty_like(x);
  const Tensor residual_gradient = separate ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const float* const table = coefficients.has_value() ? table_data(*coefficients, 5, shape.channels, "coefficients") : nullptr;
  const Backward backward{
      gradient_inputs(gradient, x, constants, output, activation, slope),
      view_of(x_gradient, "x"),
      separate ? view_of(residual_gradient, "x") : View{},
      table == nullptr ? nullptr : table + 3 * shape.channels,
      table == nullptr ? nullptr : table + 4 * shape.channels};
  const GradientInputs& inputs = backward.inputs;
  const auto views = existing({inputs.x, inputs.gradient, inputs.output, backward.x_gradient, backward.residual_gradient});
  const Tiling tiling = tiling_of(
      shape, views, {inputs.constants.mean, inputs.constants.scale, inputs.constants.shift, backward.slopes, backward.offsets});
  for_each_tile(Launcher(x), tiling, shape, backward.x_gradient, backward);
  return {x_gradient, residual_gradient};
}

}  // namespace dfkd_fast
