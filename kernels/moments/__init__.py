"""Per-channel mean and variance of activations: partial moments in one pass over each tensor, combined for many tensors at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import operators
from ..checks import differentiable_once, require_tensors
from ..dispatch import MIN_NUMEL, Backend, choose
from . import reference

__all__ = [
    "PartialMoments",
    "channel_moments",
    "channel_sums",
    "combine_moments",
    "gradients_of_sums",
    "mean_and_variance",
    "moments_gradient",
    "num_blocks",
    "partial_moments",
]

BLOCKS: dict[Backend, int] = {"numba": 1, "triton": 1024, "cuda": 1024}
"""Blocks that add the elements of a tensor: about as many as occupy a large GPU, of whatever size, so that sums are reproducible."""


class PartialMoments(NamedTuple):
    """Partial per-channel moments of a tensor, which :func:`combine_moments` adds.

    Each kernel writes its parts in the pass that reads the activations; for all layers of a network, one more launch adds them.

    Args:
        parts: parts of E[x − center] and E[(x − center)²], (2, C, parts), float32 (float64 for float64 inputs). Differentiable; a loss
            may depend on their sum over the parts only, as it does through :func:`combine_moments`.
        center: a value near the mean of each channel, (C,), of the same dtype, without which E[x²] − E[x]² would cancel. Not
            differentiable.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import PartialMoments, combine_moments
        >>> parts = torch.tensor([[[0.25, 0.25]], [[1.0, 0.25]]])  # E[x − 3] = 0.5, E[(x − 3)²] = 1.25
        >>> combine_moments([PartialMoments(parts, center=torch.tensor([3.0]))]).flatten()
        tensor([3.5000, 1.0000])
    """

    parts: Tensor
    center: Tensor


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the per-channel mean and biased variance over N, H and W, as in batch normalization (arXiv 1502.03167, alg. 1).

    Used for the BN statistics loss of DeepInversion (arXiv 1912.08795, eq. 4), which compares them with the running statistics of
    the teacher. For many tensors, :func:`partial_moments` and :func:`combine_moments` need half as many launches.

    Args:
        x: activations (N, C, H, W) of any strides and real dtype; computed in float32.

    Returns:
        mean: per-channel mean (C,), float32 (float64 for float64 inputs); NaN if ``x`` is empty.
        variance: per-channel biased variance (C,), of the same dtype. Both are differentiable; double backward requires the
            reference backend.

    Raises:
        ValueError: ``x`` is not a dense real tensor (N, C, H, W).
        TypeError: ``x`` is not a tensor.
        RuntimeError: double backward through a fused kernel.
        BackendError: a forced backend does not support the device or dtype.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import channel_moments
        >>> x = torch.arange(8.0).view(2, 1, 2, 2)
        >>> channel_moments(x)
        (tensor([3.5000]), tensor([5.2500]))
    """
    _check(x)
    backend = choose("channel_moments", x.device, (x.dtype,), x.numel())
    if backend == "reference":
        return reference.channel_moments(x)
    return _Moments.apply(x.resolve_neg(), backend)  # kernels read memory directly and ignore the negative bit


def channel_sums(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Compute the per-channel sum and sum of squares over N, H and W.

    After an all-reduce they give the moments of the global batch: ``mean = sum / count`` and
    ``variance = square_sum / count − mean²``. They are float64, in which the cancellation of this difference is harmless: the kernels
    compute moments about a value near the mean, and are as accurate as float32 in these. Their squares overflow where float32's do.

    Args:
        x: activations (N, C, H, W) of any strides and real dtype.

    Returns:
        sum: per-channel sum (C,), float64.
        square_sum: per-channel sum of squares (C,), float64. Both are differentiable; double backward requires the reference
            backend.
        count: number of elements per channel, N·H·W.

    Raises:
        ValueError: ``x`` is not a dense real tensor (N, C, H, W).
        TypeError: ``x`` is not a tensor.
        RuntimeError: double backward through a fused kernel.
        BackendError: a forced backend does not support the device or dtype.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import channel_sums
        >>> channel_sums(torch.ones(2, 3, 4, 4))
        (tensor([32., 32., 32.], dtype=torch.float64), tensor([32., 32., 32.], dtype=torch.float64), 32)
    """
    _check(x)
    backend = choose("channel_moments", x.device, (x.dtype,), x.numel())
    sums = _Sums.apply(x.resolve_neg(), backend) if backend != "reference" and x.numel() else reference.channel_sums(x)
    return *sums, _elements(x)


def partial_moments(x: Tensor) -> PartialMoments:
    """Compute the per-channel partial moments over N, H and W, the first step of :func:`channel_moments`.

    Args:
        x: activations (N, C, H, W) of any strides and real dtype; computed in float32.

    Returns:
        Partial moments; the number of parts depends on the backend and the shape.

    Raises:
        ValueError: ``x`` is not a dense real tensor (N, C, H, W).
        TypeError: ``x`` is not a tensor.
        RuntimeError: double backward through a fused kernel.
        BackendError: a forced backend does not support the device or dtype.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import combine_moments, partial_moments
        >>> mean, variance = combine_moments([partial_moments(torch.arange(8.0).view(2, 1, 2, 2))])
        >>> mean, variance
        (tensor([[3.5000]]), tensor([[5.2500]]))
    """
    _check(x)
    backend = choose("channel_moments", x.device, (x.dtype,), x.numel())
    if backend == "reference":
        return PartialMoments(*reference.partial_moments(x))
    return PartialMoments(*_PartialMoments.apply(x.resolve_neg(), backend))


def combine_moments(layers: Sequence[PartialMoments], scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Combine partial moments of many tensors in one launch: per-channel means and biased variances, ``· scale + shift``.

    Args:
        layers: partial moments of L tensors, all on the same device and of the same dtype.
        scale: factors (2, L, C) of means and variances, where C is the largest number of channels, or None for 1. Not differentiable.
        shift: what is added to them, (2, L, C), or None for 0. Not differentiable.

    Returns:
        Means and variances (2, L, C) of the dtype of ``layers``, NaN for an empty tensor, 0 (or ``shift``) where a tensor has fewer than C
        channels. Differentiable with respect to the parts; double backward requires the reference backend.

    Raises:
        ValueError: there are no layers, their shapes, dtypes or devices are invalid, or a center, ``scale`` or ``shift`` requires grad.
        TypeError: a part, a center, ``scale`` or ``shift`` is not a tensor.
        RuntimeError: double backward through a fused kernel.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import combine_moments, partial_moments
        >>> layers = [partial_moments(torch.ones(2, 1, 4, 4)), partial_moments(torch.arange(8.0).view(2, 2, 1, 2))]
        >>> mean, variance = combine_moments(layers)
        >>> mean
        tensor([[1.0000, 0.0000],
                [2.5000, 4.5000]])
        >>> variance
        tensor([[0.0000, 0.0000],
                [4.2500, 4.2500]])
    """
    parts, centers = _checked(layers, scale, shift)
    like = centers[0]
    backend = choose("channel_moments", like.device, (like.dtype,), MIN_NUMEL["channel_moments"])  # many small tensors are not small
    if backend == "reference":
        return reference.combine_moments(parts, centers, scale, shift)
    # Kernels read memory directly and ignore the negative bit.
    scale, shift = (None if constant is None else constant.detach().resolve_neg().contiguous() for constant in (scale, shift))
    return _Combined.apply(backend, [center.resolve_neg() for center in centers], scale, shift, *(part.resolve_neg() for part in parts))


def mean_and_variance(x: Tensor, activation: str, backend: Backend) -> tuple[Tensor, Tensor]:
    """Return the per-channel mean and biased variance (C,) of ``activation(x)``, float32, by the kernels of a backend.

    Args:
        x: activations (N, C, H, W), float32, bfloat16 or float16.
        activation: "none", "tanh" or "sigmoid".
        backend: any but the reference.
    """
    table = _of_one_tensor(x, activation, backend, raw=False)
    return table[0], table[1]


def num_blocks(x: Tensor, backend: Backend) -> int:
    """Return the number of blocks per channel, whose sums are the parts of the moments of ``x`` (N, C, H, W), two float32 numbers each.

    On a GPU, a thread block has 64 channels of a channels-last tensor, or one channel, and at least 2,048 elements.
    """
    channels, width = max(x.shape[1], 1), 64 if x.stride(1) == 1 else 1
    return min(max(1, BLOCKS[backend] * width // max(channels, width)), -(-_elements(x) * min(channels, width) // 2048))


def moments_gradient(x: Tensor, grad_mean: Tensor, grad_variance: Tensor, center: Tensor, scale: float, backend: Backend) -> Tensor:
    """Return scale · (grad_mean + 2 · grad_variance · (x − center)) with per-channel constants (C,), in the dtype of ``x``."""
    moments_backward = operators.operator("moments_backward", backend, x)
    return moments_backward(x, grad_mean.contiguous(), grad_variance.contiguous(), center, scale)


def gradients_of_sums(grad_parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (C,) of E[x − center] and E[(x − center)²]: that of ``parts`` is the same for every part."""
    if not grad_parts.shape[2]:
        return grad_parts.new_zeros(grad_parts.shape[1]), grad_parts.new_zeros(grad_parts.shape[1])
    return grad_parts[0, :, 0].contiguous(), grad_parts[1, :, 0].contiguous()


def _of_one_tensor(x: Tensor, activation: str, backend: Backend, raw: bool) -> Tensor:
    """Return the moments (2, C) of the operator ``combine_moments`` for one tensor."""
    parts, center = operators.operator("partial_moments", backend, x)(x, activation, num_blocks(x, backend))
    table, _ = operators.operator("combine_moments", backend, x)([parts], [center], None, None, raw)
    return table[:, 0]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        mean, variance = mean_and_variance(x, "none", backend)
        ctx.save_for_backward(x, mean)
        ctx.backend = backend
        return mean, variance

    @staticmethod
    @differentiable_once("channel_moments")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, None]:
        x, mean = saved
        return moments_gradient(x, grad_mean, grad_variance, mean, 1 / max(_elements(x), 1), ctx.backend), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        table = _of_one_tensor(x, "none", backend, raw=True) * _elements(x)
        ctx.save_for_backward(x)
        ctx.backend = backend
        return table[0], table[1]

    @staticmethod
    @differentiable_once("channel_sums")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_sum: Tensor, grad_square_sum: Tensor) -> tuple[Tensor, None]:
        (x,) = saved
        grad_sum = grad_sum.float()
        return moments_gradient(x, grad_sum, grad_square_sum.float(), torch.zeros_like(grad_sum), 1.0, ctx.backend), None


class _PartialMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        parts, center = operators.operator("partial_moments", backend, x)(x, "none", num_blocks(x, backend))
        ctx.save_for_backward(x, center)
        ctx.backend = backend
        ctx.mark_non_differentiable(center)
        ctx.set_materialize_grads(False)  # of center
        return parts, center

    @staticmethod
    @differentiable_once("partial_moments")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_parts: Tensor, _: None) -> tuple[Tensor, None]:
        x, center = saved
        return moments_gradient(x, *gradients_of_sums(grad_parts), center, 1 / max(_elements(x), 1), ctx.backend), None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # Not as parameters: Dynamo loses ctx if there are as many arguments as parameters, as for two tensors in a parameter *parts.
        backend, centers, scale, shift, *parts = arguments
        table, offsets = operators.operator("combine_moments", backend, centers[0])(parts, centers, scale, shift, False)
        ctx.save_for_backward(offsets, scale, *parts)  # parts: so that double backward raises an error
        return table

    @staticmethod
    @differentiable_once("combine_moments")
    def backward(ctx: Any, saved: tuple[Any, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
        offsets, scale, *parts = saved
        # With the sums m and s of the parts: mean = center + m, variance = s − m².
        table = gradient.clone(memory_format=torch.contiguous_format) if scale is None else gradient * scale
        table[0].addcmul_(table[1], offsets, value=-2)
        return None, None, None, None, *(table[:, row, : part.shape[1], None].expand_as(part) for row, part in enumerate(parts))


def _elements(x: Tensor) -> int:
    return len(x) * x.shape[2] * x.shape[3]


def _check(x: Tensor) -> None:
    require_tensors(x=x)
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), not {tuple(x.shape)}")
    if x.is_complex():
        raise ValueError(f"x must be real, not {x.dtype}")
    if x.layout != torch.strided:
        raise ValueError(f"x must have the layout torch.strided, not {x.layout}")


def _checked(layers: Sequence[PartialMoments], scale: Tensor | None, shift: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parts and the centers of the arguments of ``combine_moments``."""
    if not isinstance(layers, Sequence) or not layers or not all(isinstance(layer, PartialMoments) for layer in layers):
        types = [type(layer).__name__ for layer in layers[:3]] if isinstance(layers, Sequence) else type(layers).__name__
        raise ValueError(f"layers must be a non-empty list or tuple of PartialMoments, not {types}")
    for index, layer in enumerate(layers):
        require_tensors(**{f"layers[{index}].parts": layer.parts, f"layers[{index}].center": layer.center})
    like = layers[0].center
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"layers must have the dtype torch.float32 or torch.float64, not {like.dtype}")
    for index, (part, center) in enumerate(layers):
        if part.ndim != 3 or part.shape[:2] != (2, *center.shape):
            shapes = f"{tuple(part.shape)} and {tuple(center.shape)}"
            raise ValueError(f"layers[{index}] must have parts (2, C, parts) and a center (C,), not {shapes}")
        for name, tensor in (("parts", part), ("center", center)):
            if (tensor.dtype, tensor.device) != (like.dtype, like.device):
                given = f"{tensor.dtype} on {tensor.device}"
                raise ValueError(f"layers[{index}].{name} must be {like.dtype} on {like.device}, as layers[0].center, not {given}")
    shape = 2, len(layers), max(len(layer.center) for layer in layers)
    for name, constant in (("scale", scale), ("shift", shift)):
        if constant is None:
            continue
        require_tensors(**{name: constant})
        if (constant.shape, constant.dtype, constant.device) != (shape, like.dtype, like.device):
            given = f"{constant.dtype} {tuple(constant.shape)} on {constant.device}"
            raise ValueError(f"{name} must be {like.dtype} {shape} on {like.device}, not {given}")
    constants = {"scale": scale, "shift": shift} | {f"layers[{index}].center": layer.center for index, layer in enumerate(layers)}
    for name, constant in constants.items():
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, but the moments are differentiable with respect to parts only: pass a detached tensor")
    return [layer.parts for layer in layers], [layer.center for layer in layers]


def _fake_partial_moments(x: Tensor, activation: str, blocks: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((2, x.shape[1], 2 * blocks), dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


def _fake_combine_moments(
    parts: Sequence[Tensor], centers: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None, raw: bool
) -> tuple[Tensor, Tensor]:
    shape = len(centers), max(map(len, centers))
    return centers[0].new_empty((2, *shape), dtype=torch.float64 if raw else torch.float32), centers[0].new_empty(shape)


def _fake_backward(x: Tensor, grad_mean: Tensor, grad_variance: Tensor, center: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


operators.define(__name__, "partial_moments", "(Tensor x, str activation, int blocks) -> (Tensor, Tensor)", _fake_partial_moments)
operators.define(
    __name__,
    "combine_moments",
    "(Tensor[] parts, Tensor[] centers, Tensor? scale, Tensor? shift, bool raw) -> (Tensor, Tensor)",
    _fake_combine_moments,
)
operators.define(
    __name__,
    "moments_backward",
    "(Tensor x, Tensor grad_mean, Tensor grad_variance, Tensor center, float scale) -> Tensor",
    _fake_backward,
)
