// Operators registered in library.cpp. Semantics and arguments are documented in dfkd_fast.kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace dfkd_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ema.cu
void ema_update_(
    const std::vector<Tensor>& averages,
    const std::vector<Tensor>& sources,
    const std::vector<Tensor>& shadows,
    double decay,
    const std::optional<Tensor>& device_decay);

// discrepancy.cu
std::tuple<Tensor, Tensor, Tensor> l1_forward(
    const Tensor& student, const Tensor& teacher, double scale, bool requires_grad, bool agreement);

using DivergenceForward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& student,
    const Tensor& teacher,
    double temperature,
    double scale,
    bool student_requires_grad,
    bool teacher_requires_grad,
    bool agreement);

DivergenceForward kl_forward;
DivergenceForward js_forward;

std::tuple<Tensor, Tensor> scale_gradients(
    const Tensor& student_grad_unscaled,
    const Tensor& teacher_grad_unscaled,
    const Tensor& upstream,
    double student_scale,
    double teacher_scale,
    ScalarType student_dtype,
    ScalarType teacher_dtype);

void scale_gradients_(
    const Tensor& student_grad, const Tensor& teacher_grad, const Tensor& upstream, double student_scale, double teacher_scale);

// moments.cu
std::tuple<Tensor, Tensor> partial_moments(const Tensor& x, const std::string& activation, int64_t blocks);

std::tuple<Tensor, Tensor> combine_moments(
    const std::vector<Tensor>& parts,
    const std::vector<Tensor>& centers,
    const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift,
    bool raw);

Tensor moments_backward(
    const Tensor& x, const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& center, double scale);

// bias_act.cu
Tensor bias_act_forward(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, const std::string& activation);

std::tuple<Tensor, Tensor, Tensor> bias_act_moments_forward(
    const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, const std::string& activation, int64_t blocks);

std::tuple<Tensor, Tensor> bias_act_backward(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& bias,
    const std::optional<Tensor>& residual,
    const std::string& activation,
    const std::optional<Tensor>& grad_mean,
    const std::optional<Tensor>& grad_variance,
    const std::optional<Tensor>& center,
    double scale,
    bool separate);

// norm_statistics.cu
Tensor batch_norm_constants(
    const Tensor& running_mean,
    const Tensor& running_var,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& input_bias,
    double eps);

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
    int64_t elements);

Tensor batch_norm_gradients(
    const Tensor& sums, const Tensor& constants, const std::optional<Tensor>& count, int64_t elements, bool training);

// norm.cu
Tensor batch_norm_act_forward(
    const Tensor& x, const Tensor& constants, const std::optional<Tensor>& residual, const std::string& activation, double slope);

Tensor batch_norm_act_sums(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& constants,
    const std::optional<Tensor>& output,
    const std::string& activation,
    double slope,
    int64_t blocks);

std::tuple<Tensor, Tensor> batch_norm_act_backward(
    const Tensor& gradient,
    const Tensor& x,
    const Tensor& constants,
    const std::optional<Tensor>& coefficients,
    const std::optional<Tensor>& output,
    const std::string& activation,
    double slope,
    bool separate);

// concat.cu
Tensor concat_forward(
    const std::vector<Tensor>& raws,
    const std::string& activation,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& std,
    ScalarType dtype,
    bool channels_last);

void concat_forward_out(
    const Tensor& out,
    const std::vector<Tensor>& raws,
    const std::string& activation,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& std);

Tensor concat_backward(
    const Tensor& gradient,
    const Tensor& raw,
    const std::string& activation,
    const std::optional<Tensor>& mean,
    const std::optional<Tensor>& std,
    const std::optional<Tensor>& gradient_mean,
    const std::optional<Tensor>& gradient_dot);

std::tuple<Tensor, Tensor> concat_gradient_moments(
    const Tensor& gradient, const Tensor& raw, const std::string& activation, const Tensor& mean, const Tensor& std);

}  // namespace dfkd_fast
