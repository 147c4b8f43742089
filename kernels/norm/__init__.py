"""Fused batch normalization, residual and activation."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed
from torch import Tensor

from .. import dispatch, operators
from ..checks import differentiable_once, overlaps_itself, require_bools, require_eps, require_number, require_tensors, shown
from ..dispatch import Backend
from ..moments import num_blocks
from . import reference

__all__ = ["NormActivation", "batch_norm_act", "batch_norm_leaky_relu"]

NormActivation = Literal["none", "relu", "leaky_relu", "relu6", "silu", "hardswish"]
FROM_OUTPUT = ("none", "relu", "leaky_relu", "relu6")
"""Activations whose derivative is a function of their output, which the next layer stores anyway."""


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: NormActivation,
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
    input_bias: Tensor | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Compute ``activation(batch_norm(x) + residual)`` with fused kernels (batch normalization: arXiv 1502.03167, alg. 1).

    In training mode the forward pass reads ``x`` twice, once for the statistics, and the backward pass reads ``x`` and the upstream
    gradient twice. The derivative of the activation is recomputed, from ``x`` or, with a residual, from the result: nothing is stored
    for it. Statistics are computed in float32.

    The kernels support float32, bfloat16 and float16 activations with float32 parameters and statistics. Everything else runs on
    PyTorch's own functions: other dtypes, small tensors on a CPU, ``torch.func`` transforms, forward-mode
    derivatives and, in compiled code, a ``group`` of several ranks. :func:`torch.compile` does not fuse the kernels with other operations.

    Args:
        x: activations (N, C, H, W), float64, float32, bfloat16 or float16, of any strides; fastest if dense and channels-last.
        running_mean: running mean (C,), float32 or of the dtype of ``x``; updated in place in training mode. None, like
            ``running_var``, to normalize by the batch statistics only.
        running_var: running variance (C,), likewise; updated with the unbiased variance of the batch.
        weight: scale (C,), float32 or of the dtype of ``x``; None for 1.
        bias: shift (C,), likewise; None for 0.
        residual: tensor (N, C, H, W) of the shape and dtype of ``x``, or None for 0.
        training: normalize by the batch statistics (True) or by the running statistics (False).
        momentum: weight of the batch in the running statistics, in [0, 1]; None for the average over all batches, which requires
            ``num_batches_tracked``.
        eps: value added to the variance; must be > 0 in training mode.
        activation: "none", "relu", "leaky_relu", "relu6", "silu" or "hardswish", as in ``torch.nn.functional``.
        negative_slope: slope of the leaky ReLU for negative inputs, ≥ 0.
        num_batches_tracked: number of batches, int64 with one element; incremented in place in training mode.
        input_bias: per-channel bias of ``x`` (C,), such as that of the convolution before, float32 or of the dtype of ``x``. It is
            added to the mean only: in training mode it changes neither result nor gradients, and its gradient is 0.
        group: process group over whose ranks the batch statistics are computed, as in ``torch.nn.SyncBatchNorm``; every rank must take
            part in the forward and the backward pass. The gradients of ``weight`` and ``bias`` are those of the rank.

    Returns:
        A tensor of the shape and dtype of ``x``, with the strides of ``torch.empty_like(x)``, differentiable with respect to ``x``,
        ``weight``, ``bias``, ``residual`` and ``input_bias``; double backward requires the reference backend.

    Raises:
        ValueError: invalid shapes, dtypes, layouts or devices, an unknown activation, or a number outside its range.
        TypeError: an argument is not a tensor, ``training`` is not a bool, or ``group`` is not a process group.
        RuntimeError: double backward through a fused kernel.
        BackendError: a forced backend does not support the device.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import batch_norm_act
        >>> x, mean, var = torch.randn(4, 3, 8, 8), torch.zeros(3), torch.ones(3)
        >>> y = batch_norm_act(x, mean, var, None, None, x, training=True, momentum=0.1, eps=1e-5, activation="relu")
        >>> y.shape
        torch.Size([4, 3, 8, 8])
    """
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias, "input_bias": input_bias}
    _check(x, parameters, residual, training, num_batches_tracked)
    _check_numbers(momentum, eps, activation, negative_slope, training, num_batches_tracked)
    dispatch.check_forced("batch_norm_act", x.device)
    ranks = _num_ranks(group, training)
    if training and ranks == 1 and x.shape[1] and _elements(x) == 1:
        raise ValueError(f"x must have more than 1 value per channel in training mode, not the shape {tuple(x.shape)}")
    if residual is not None and activation not in FROM_OUTPUT:
        normalized = batch_norm_act(
            *(x, running_mean, running_var, weight, bias),
            training=training,
            momentum=momentum,
            eps=eps,
            activation="none",
            num_batches_tracked=num_batches_tracked,
            input_bias=input_bias,
            group=group,
        )
        return reference.activate(normalized + residual, activation, negative_slope)
    backend = _backend(x, parameters, ranks)
    if backend == "reference":
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1 / float(num_batches_tracked) if training and num_batches_tracked is not None else 0.0
        arguments = x, running_mean, running_var, weight, bias, training, momentum, eps, input_bias
        normalized = reference.batch_norm(*arguments, group if ranks > 1 else None)
        y = reference.activate(normalized if residual is None else normalized + residual, activation, negative_slope)
        return _with_strides_of(y, x)
    # Kernels read memory directly and ignore the negative bit.
    x, residual = x.resolve_neg(), None if residual is None else residual.resolve_neg()
    statistics = _Statistics(running_mean, running_var, num_batches_tracked, momentum, eps, training, group if ranks > 1 else None)
    with torch.no_grad():
        # Not in the differentiable function: torch.compile does not support functions that write in place.
        plain = (None if tensor is None else tensor.resolve_neg().contiguous() for tensor in (weight, bias, input_bias))
        constants, count = statistics.constants(x, backend, *plain)
    how = activation, _slope(activation, negative_slope), backend
    if statistics.group is not None:
        return _Normalized.apply(x, weight, bias, residual, input_bias, constants, count, training, *how, statistics.group)
    return _normalized(x, weight, bias, residual, input_bias, constants, count, training, *how)


def batch_norm_leaky_relu(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """Earlier name of :func:`batch_norm_act` with the activation "leaky_relu"."""
    warnings.warn("batch_norm_leaky_relu is now batch_norm_act with activation='leaky_relu'", FutureWarning, stacklevel=2)
    arguments = x, running_mean, running_var, weight, bias
    return batch_norm_act(*arguments, training=training, momentum=momentum, eps=eps, activation="leaky_relu", negative_slope=negative_slope)


@dataclass(frozen=True)
class _Statistics:
    """Running statistics and how they change; not differentiable."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    training: bool
    group: "torch.distributed.ProcessGroup | None"

    def constants(
        self, x: Tensor, backend: Backend, weight: Tensor | None, bias: Tensor | None, input_bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return mean, inverse standard deviation, scale and shift (4, C), and the elements per channel of all ranks, None without ranks.

        In training mode these are those of the batch, and the running statistics are updated.
        """
        parameters = weight, bias, input_bias
        if not self.training:
            constants = operators.operator("batch_norm_constants", backend, x)
            return constants(self.running_mean, self.running_var, *parameters, self.eps), None
        parts, center = operators.operator("partial_moments", backend, x)(x, "none", num_blocks(x, backend))
        count = None
        if self.group is not None:
            raw, _ = operators.operator("combine_moments", backend, x)([parts], [center], None, None, True)
            sums = torch.where(raw.isnan(), 0, raw) if not x.numel() else raw * _elements(x)
            sums, count = _all_reduced(sums.flatten(), _elements(x), self.group)
            parts, center = _split((sums / count).view(2, -1)), torch.zeros_like(center)
        if self.momentum is None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)  # by a launch of its own, because all channels read it
        running = self.running_mean, self.running_var, self.num_batches_tracked
        statistics = operators.operator("batch_norm_statistics", backend, x)
        constants = statistics(parts, center, *parameters, *running, count, self.momentum, self.eps, _elements(x))
        if not torch.compiler.is_compiling():  # compiled code does it
            torch.autograd.graph.increment_version([tensor for tensor in running if tensor is not None and not tensor.is_inference()])
        return constants, count


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        input_bias: Tensor | None,
        constants: Tensor,
        count: Tensor | None,
        training: bool,
        activation: NormActivation,
        slope: float,
        backend: Backend,
        group: "torch.distributed.ProcessGroup | None" = None,
    ) -> Tensor:
        y: Tensor = operators.operator("batch_norm_act_forward", backend, x)(x, constants, residual, activation, slope)
        ctx.from_output = residual is not None and activation != "none"
        # Weight and bias are not read in the backward pass, but double backward with respect to what it depends on raises an error.
        ctx.save_for_backward(x, constants, y if ctx.from_output else None, count, weight, None if activation in FROM_OUTPUT else bias)
        ctx.training, ctx.group, ctx.activation, ctx.slope, ctx.backend = training, group, activation, slope, backend
        return y

    @staticmethod
    @differentiable_once("batch_norm_act")
    def backward(ctx: Any, saved: tuple[Any, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, constants, output, count, *_ = saved
        of_x, of_weight, of_bias, of_residual, of_input_bias = ctx.needs_input_grad[:5]
        gradient = gradient.resolve_neg()
        activation = output, ctx.activation, ctx.slope
        sums = coefficients = None
        if ctx.training or of_weight or of_bias or of_input_bias:
            batch_norm_sums = operators.operator("batch_norm_act_sums", ctx.backend, x)
            parts = batch_norm_sums(gradient, x, constants, *activation, num_blocks(x, ctx.backend))
            batch_norm_gradients = operators.operator("batch_norm_gradients", ctx.backend, x)
            sums = coefficients = batch_norm_gradients(parts, constants, None, _elements(x), ctx.training)
            if ctx.group is not None:
                totals, _ = _all_reduced(parts.double().sum(2).flatten(), 0, ctx.group)
                coefficients = batch_norm_gradients(_split(totals.view(2, -1)), constants, count, _elements(x), ctx.training)
        grad_x = grad_residual = None
        linear = ctx.activation == "none"
        if of_x or (of_residual and not linear):
            separate = of_residual and not linear
            backward = operators.operator("batch_norm_act_backward", ctx.backend, x)
            grad_x, grad_residual = backward(gradient, x, constants, coefficients if ctx.training else None, *activation, separate)
        of_parameters = [sums[row] if needed else None for row, needed in enumerate((of_weight, of_bias, of_input_bias))]  # type: ignore[index]
        grad_residual = None if not of_residual else gradient if linear else grad_residual
        return (grad_x if of_x else None, *of_parameters[:2], grad_residual, of_parameters[2], *[None] * 7)


_normalized = operators.differentiable(
    "batch_norm_act_autograd",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? input_bias, Tensor constants, Tensor? count, bool training, "
    "str activation, float slope, str backend) -> Tensor",
    _Normalized,
)


def _with_strides_of(y: Tensor, x: Tensor) -> Tensor:
    """Return y with the strides of ``torch.empty_like(x)``, which those of PyTorch's functions are for usual layouts only."""
    if torch.compiler.is_compiling() or dispatch.transforming():
        return y
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return y
    expected = torch.empty_like(x)
    return y if y.stride() == expected.stride() else expected.copy_(y)


def _num_ranks(group: "torch.distributed.ProcessGroup | None", training: bool) -> int:
    """Return the number of processes whose images are normalized together."""
    if group is None:
        return 1
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup of which this process is a member, not {shown(group)}")
    return torch.distributed.get_world_size(group) if training else 1


def _elements(x: Tensor) -> int:
    return len(x) * x.shape[2] * x.shape[3]


def _slope(activation: NormActivation, negative_slope: float) -> float:
    return negative_slope if activation == "leaky_relu" else 0.0


def _split(values: Tensor) -> Tensor:
    """Return float64 values (2, C) as the sum of two float32 numbers each, (2, C, 2)."""
    high = values.float()
    return torch.stack([high, torch.where(high.isfinite(), values - high, 0).float()], dim=2)


def _all_reduced(sums: Tensor, elements: int, group: "torch.distributed.ProcessGroup") -> tuple[Tensor, Tensor]:
    """Return the sums of float64 values (K,) and of a number of elements (1,) over all ranks of a group."""
    values = torch.cat([sums, sums.new_full((1,), elements)])
    torch.distributed.all_reduce(values, group=group)
    return values[:-1], values[-1:]


def _backend(x: Tensor, parameters: dict[str, Tensor | None], ranks: int) -> Backend:
    """Return the backend for this call."""
    if dispatch.transforming() or x.dtype not in dispatch.KERNEL_DTYPES:
        return "reference"
    running = [tensor for name, tensor in parameters.items() if name.startswith("running") and tensor is not None]
    # Kernels support float32 parameters only, and write running statistics in place.
    if not all(tensor is None or tensor.dtype == torch.float32 for tensor in parameters.values()):
        return "reference"
    compiling = torch.compiler.is_compiling()  # then PyTorch's dispatcher resolves the negative bit
    if not all(tensor.is_contiguous() and (compiling or not tensor.is_neg()) for tensor in running):
        return "reference"
    if not x.shape[1] or (ranks == 1 and _elements(x) <= 1) or (ranks > 1 and compiling):
        return "reference"
    if compiling and not running:  # Inductor fails for an operator whose arguments that it may change are all None
        return "reference"
    name = dispatch.forced()
    if name is None:  # all ranks must use the same backend, whatever the size of their batches
        small = ranks == 1 and x.device.type == "cpu" and x.numel() < dispatch.MIN_NUMEL["batch_norm_act"]
        return "reference" if small else dispatch.backends(x.device)[0]
    return name


def _check(
    x: Tensor, parameters: dict[str, Tensor | None], residual: Tensor | None, training: bool, num_batches_tracked: Tensor | None
) -> None:
    # Kernels do not check shapes, devices or dtypes.
    require_tensors(x=x)
    require_bools(training=training)
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), not {tuple(x.shape)}")
    if x.dtype not in (torch.float64, *dispatch.KERNEL_DTYPES):
        raise ValueError(f"x must be float64, float32, bfloat16 or float16, not {x.dtype}")
    shape, device, dtype = x.shape[1:2], x.device, x.dtype
    if residual is not None:
        require_tensors(residual=residual)
        if (residual.shape, residual.dtype) != (x.shape, dtype):
            raise ValueError(f"residual must be {dtype} {tuple(x.shape)}, as x, not {residual.dtype} {tuple(residual.shape)}")
    if (parameters["running_mean"] is None) != (parameters["running_var"] is None):
        raise ValueError("running_mean and running_var must be given together")
    if parameters["running_mean"] is None and not training:
        raise ValueError("running_mean and running_var are required unless training is True")
    for name, tensor in {"x": x, "residual": residual, **parameters}.items():
        if tensor is not None:
            require_tensors(**{name: tensor})
            if tensor.layout != torch.strided:
                raise ValueError(f"{name} must have the layout torch.strided, not {tensor.layout}")
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, not {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, dtype):
            raise ValueError(f"{name} must be torch.float32 or have the dtype of x, {dtype}, not {tensor.dtype}")
        if not name.startswith("running"):
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, but the result is not differentiable with respect to it: pass {name}.detach()")
        if training and not tensor.is_contiguous() and not torch.compiler.is_compiling() and overlaps_itself(tensor):
            raise ValueError(f"{name} must not overlap itself: strides {tensor.stride()} of shape {tuple(tensor.shape)}")
    if num_batches_tracked is not None:
        require_tensors(num_batches_tracked=num_batches_tracked)
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.numel() != 1:
            given = f"{num_batches_tracked.dtype} {tuple(num_batches_tracked.shape)}"
            raise ValueError(f"num_batches_tracked must be torch.int64 with one element, not {given}")
    for name, tensor in {**parameters, "residual": residual, "num_batches_tracked": num_batches_tracked}.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on the device of x, {device}, not on {tensor.device}")


def _check_numbers(
    momentum: float | None, eps: float, activation: str, negative_slope: float, training: bool, num_batches_tracked: Tensor | None
) -> None:
    if momentum is not None:
        require_number("momentum", momentum, 0, 1)
    elif training and num_batches_tracked is None:
        raise ValueError("momentum = None, the average over all batches, requires num_batches_tracked")
    require_eps(eps, training)
    if not isinstance(activation, str) or activation not in get_args(NormActivation):
        raise ValueError(f"activation must be one of {', '.join(get_args(NormActivation))}, not {shown(activation)}")
    require_number("negative_slope", negative_slope, 0, math.inf)


def _fake_constants(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, input_bias: Tensor | None, eps: float
) -> Tensor:
    return running_mean.new_empty((4, len(running_mean)))


def _fake_statistics(
    parts: Tensor,
    center: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    count: Tensor | None,
    momentum: float | None,
    eps: float,
    elements: int,
) -> Tensor:
    return center.new_empty((4, len(center)))


def _fake_forward(x: Tensor, constants: Tensor, residual: Tensor | None, activation: str, slope: float) -> Tensor:
    return torch.empty_like(x)


def _fake_sums(gradient: Tensor, x: Tensor, constants: Tensor, output: Tensor | None, activation: str, slope: float, blocks: int) -> Tensor:
    return constants.new_empty((2, x.shape[1], 2 * blocks))


def _fake_gradients(sums: Tensor, constants: Tensor, count: Tensor | None, elements: int, training: bool) -> Tensor:
    return constants.new_empty((5, constants.shape[1]))


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    constants: Tensor,
    coefficients: Tensor | None,
    output: Tensor | None,
    activation: str,
    slope: float,
    separate: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if separate else x.new_empty(0)


# ``constants`` are mean, inverse standard deviation, scale and shift: the normalized value is (x − mean) · scale + shift.
operators.define(
    __name__,
    "batch_norm_constants",
    "(Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? input_bias, float eps) -> Tensor",
    _fake_constants,
)
operators.define(
    __name__,
    "batch_norm_statistics",
    "(Tensor parts, Tensor center, Tensor? weight, Tensor? bias, Tensor? input_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor? count, float? momentum, float eps, int elements) -> Tensor",
    _fake_statistics,
)
operators.define(
    __name__,
    "batch_norm_act_forward",
    "(Tensor x, Tensor constants, Tensor? residual, str activation, float slope) -> Tensor",
    _fake_forward,
)
# Parts (2, C, 2 · blocks) of the sums of g and of g · (x − mean), with g the gradient before the activation. Its derivative is that at
# the recomputed input of the activation, or at ``output`` if it is given.
operators.define(
    __name__,
    "batch_norm_act_sums",
    "(Tensor gradient, Tensor x, Tensor constants, Tensor? output, str activation, float slope, int blocks) -> Tensor",
    _fake_sums,
)
# The gradients of weight, bias and input_bias, and the coefficients a and b (5, C) for the gradient of x, which is
# g · scale + a · (x − mean) + b.
operators.define(
    __name__,
    "batch_norm_gradients",
    "(Tensor sums, Tensor constants, Tensor? count, int elements, bool training) -> Tensor",
    _fake_gradients,
)
operators.define(
    __name__,
    "batch_norm_act_backward",
    "(Tensor gradient, Tensor x, Tensor constants, Tensor? coefficients, Tensor? output, str activation, float slope, bool separate) "
    "-> (Tensor, Tensor)",
    _fake_backward,
)
