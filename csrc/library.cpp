// Registers torch.ops.dfkd_fast.<operator>.cuda with the same schemas as the other backends (kernels/operators.py).

#include "operators.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(dfkd_fast, library) {
  library.def(
      "ema_update_.cuda(Tensor(a!)[] averages, Tensor[] sources, Tensor(b!)[] shadows, float decay, Tensor? device_decay) -> ()");

  library.def(
      "l1_forward.cuda(Tensor student, Tensor teacher, float scale, bool requires_grad, bool agreement) -> (Tensor, Tensor, Tensor)");
  library.def(
      "kl_forward.cuda(Tensor student, Tensor teacher, float temperature, float scale, bool student_requires_grad, "
      "bool teacher_requires_grad, bool agreement) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "js_forward.cuda(Tensor student, Tensor teacher, float temperature, float scale, bool student_requires_grad, "
      "bool teacher_requires_grad, bool agreement) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "scale_gradients.cuda(Tensor student_grad_unscaled, Tensor teacher_grad_unscaled, Tensor upstream, float student_scale, "
      "float teacher_scale, ScalarType student_dtype, ScalarType teacher_dtype) -> (Tensor, Tensor)");
  library.def(
      "scale_gradients_.cuda(Tensor(a!) student_grad, Tensor(b!) teacher_grad, Tensor upstream, float student_scale, "
      "float teacher_scale) -> ()");

  library.def("partial_moments.cuda(Tensor x, str activation, int blocks) -> (Tensor, Tensor)");
  library.def(
      "combine_moments.cuda(Tensor[] parts, Tensor[] centers, Tensor? scale, Tensor? shift, bool raw) -> (Tensor, Tensor)");
  library.def("moments_backward.cuda(Tensor x, Tensor grad_mean, Tensor grad_variance, Tensor center, float scale) -> Tensor");

  library.def("bias_act_forward.cuda(Tensor x, Tensor bias, Tensor? residual, str activation) -> Tensor");
  library.def(
      "bias_act_moments_forward.cuda(Tensor x, Tensor bias, Tensor? residual, str activation, int blocks) -> (Tensor, Tensor, Tensor)");
  library.def(
      "bias_act_backward.cuda(Tensor gradient, Tensor x, Tensor bias, Tensor? residual, str activation, "
      "Tensor? grad_mean, Tensor? grad_variance, Tensor? center, float scale, bool separate) -> (Tensor, Tensor)");

  library.def(
      "batch_norm_constants.cuda(Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? input_bias, float eps) "
      "-> Tensor");
  library.def(
      "batch_norm_statistics.cuda(Tensor parts, Tensor center, Tensor? weight, Tensor? bias, Tensor? input_bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? count, float? momentum, float eps, "
      "int elements) -> Tensor");
  library.def("batch_norm_act_forward.cuda(Tensor x, Tensor constants, Tensor? residual, str activation, float slope) -> Tensor");
  library.def(
      "batch_norm_act_sums.cuda(Tensor gradient, Tensor x, Tensor constants, Tensor? output, str activation, float slope, int blocks) "
      "-> Tensor");
  library.def("batch_norm_gradients.cuda(Tensor sums, Tensor constants, Tensor? count, int elements, bool training) -> Tensor");
  library.def(
      "batch_norm_act_backward.cuda(Tensor gradient, Tensor x, Tensor constants, Tensor? coefficients, Tensor? output, str activation, "
      "float slope, bool separate) -> (Tensor, Tensor)");

  library.def(
      "concat_forward.cuda(Tensor[] raws, str activation, Tensor? mean, Tensor? std, ScalarType dtype, bool channels_last) -> Tensor");
  library.def("concat_forward_out.cuda(Tensor(a!) out, Tensor[] raws, str activation, Tensor? mean, Tensor? std) -> ()");
  library.def(
      "concat_backward.cuda(Tensor gradient, Tensor raw, str activation, Tensor? mean, Tensor? std, "
      "Tensor? gradient_mean, Tensor? gradient_dot) -> Tensor");
  library.def(
      "concat_gradient_moments.cuda(Tensor gradient, Tensor raw, str activation, Tensor mean, Tensor std) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dfkd_fast, CUDA, library) {
  library.impl("ema_update_.cuda", TORCH_BOX(&dfkd_fast::ema_update_));

  library.impl("l1_forward.cuda", TORCH_BOX(&dfkd_fast::l1_forward));
  library.impl("kl_forward.cuda", TORCH_BOX(&dfkd_fast::kl_forward));
  library.impl("js_forward.cuda", TORCH_BOX(&dfkd_fast::js_forward));
  library.impl("scale_gradients.cuda", TORCH_BOX(&dfkd_fast::scale_gradients));
  library.impl("scale_gradients_.cuda", TORCH_BOX(&dfkd_fast::scale_gradients_));

  library.impl("partial_moments.cuda", TORCH_BOX(&dfkd_fast::partial_moments));
  library.impl("combine_moments.cuda", TORCH_BOX(&dfkd_fast::combine_moments));
  library.impl("moments_backward.cuda", TORCH_BOX(&dfkd_fast::moments_backward));

  library.impl("bias_act_forward.cuda", TORCH_BOX(&dfkd_fast::bias_act_forward));
  library.impl("bias_act_moments_forward.cuda", TORCH_BOX(&dfkd_fast::bias_act_moments_forward));
  library.impl("bias_act_backward.cuda", TORCH_BOX(&dfkd_fast::bias_act_backward));

  library.impl("batch_norm_constants.cuda", TORCH_BOX(&dfkd_fast::batch_norm_constants));
  library.impl("batch_norm_statistics.cuda", TORCH_BOX(&dfkd_fast::batch_norm_statistics));
  library.impl("batch_norm_act_forward.cuda", TORCH_BOX(&dfkd_fast::batch_norm_act_forward));
  library.impl("batch_norm_act_sums.cuda", TORCH_BOX(&dfkd_fast::batch_norm_act_sums));
  library.impl("batch_norm_gradients.cuda", TORCH_BOX(&dfkd_fast::batch_norm_gradients));
  library.impl("batch_norm_act_backward.cuda", TORCH_BOX(&dfkd_fast::batch_norm_act_backward));

  library.impl("concat_forward.cuda", TORCH_BOX(&dfkd_fast::concat_forward));
  library.impl("concat_forward_out.cuda", TORCH_BOX(&dfkd_fast::concat_forward_out));
  library.impl("concat_backward.cuda", TORCH_BOX(&dfkd_fast::concat_backward));
  library.impl("concat_gradient_moments.cuda", TORCH_BOX(&dfkd_fast::concat_gradient_moments));
}
