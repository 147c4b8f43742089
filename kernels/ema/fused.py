"""Exponential moving average of a module with one fused update per step."""

import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ..checks import require_bools, shown
from ..dispatch import Backend, forced
from . import Pairs, pairs
from .guard import ModuleGuard

__all__ = ["FusedEMA"]


class _CheckedUpdate(NamedTuple):
    """Validated tensors of an update of one module, reused as long as the guard holds."""

    guard: ModuleGuard
    forced: Backend | None
    pairs: Pairs
    copied: tuple[list[Tensor], list[Tensor]]
    """Averages and shadows that are copied from their sources, and these sources."""


# Not an attribute, so that copies and pickles of an average do not contain the source module, nor keep it alive.
_checked_updates: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _CheckedUpdate]] = WeakKeyDictionary()


class FusedEMA(nn.Module):
    """Exponential moving average of a module's parameters and buffers.

    Integer buffers are copied, as are the singular vectors of PyTorch's spectral norms: an average of unit vectors is shorter than
    1, and the weight normalized by it would be too large.

    The state dict has the keys of ``module``, of ``shadow`` and ``updates``. With ``warm_up``, the decay is computed on the device,
    so that updates can be captured in a CUDA graph.

    Args:
        model: module to average; its current values initialize the average.
        decay: decay rate in [0, 1].
        warm_up: use ``min(decay, (1 + n) / (10 + n))`` in the n-th update, n from 0, so that early values are forgotten quickly
            (as ``tf.train.ExponentialMovingAverage`` with ``num_updates``).
        shadow_dtype: keep a second copy in this floating-point dtype, written in the same pass. Default: no second copy.

    Attributes:
        module: the averaged copy of the model; float32 (float64 for float64 models), in evaluation mode, without gradients.
        shadow: the copy in ``shadow_dtype``, or None.
        updates: number of updates, a 0-d int64 buffer.

    Raises:
        ValueError: ``decay`` is not in [0, 1], ``shadow_dtype`` is not floating-point, or the module cannot be copied.
        TypeError: ``model`` is not a module, or ``decay`` is not a number.

    Examples:
        >>> import torch
        >>> from dfkd_fast.kernels import FusedEMA
        >>> model = torch.nn.Linear(3, 2)
        >>> ema = FusedEMA(model, decay=0.999)
        >>> ema.update(model)  # after each optimizer step
        >>> ema(torch.randn(4, 3)).shape
        torch.Size([4, 2])
    """

    updates: Tensor

    def __init__(self, model: nn.Module, decay: float, *, warm_up: bool = False, shadow_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        _require_module(model)
        require_bools(warm_up=warm_up)
        if not isinstance(decay, int | float):
            raise TypeError(f"decay must be a float, not {type(decay).__name__}")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], not {decay}")
        if shadow_dtype is not None and not (isinstance(shadow_dtype, torch.dtype) and shadow_dtype.is_floating_point):
            raise ValueError(f"shadow_dtype must be a floating-point dtype, not {shown(shadow_dtype)}")
        self.decay, self.warm_up = decay, warm_up
        self.module = _frozen_copy(model, None)
        self.shadow = None if shadow_dtype is None else _frozen_copy(model, shadow_dtype)
        device = next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    def update(self, model: nn.Module) -> None:
        """Update the average with the current values of a module.

        Tensors are validated at the first update, and again after a module or tensor was replaced or changed its shape, strides,
        dtype or device. If the strides of a source change, as with ``model.to(memory_format=torch.channels_last)``, the strides of
        the average follow.

        Args:
            model: the module passed to the constructor, or one of the same architecture.

        Raises:
            ValueError: the module's tensors differ from the average's in number, shape or device.
            TypeError: ``model`` is not a module.
        """
        _require_module(model)
        decay: float | Tensor = self.decay
        if self.warm_up:
            decay = ((1.0 + self.updates) / (10.0 + self.updates)).clamp_(max=self.decay)
        checked = self._check(model)
        checked.pairs.update_(decay)
        if checked.copied[0]:
            torch._foreach_copy_(*checked.copied)
        self.updates.add_(1)

    def _check(self, model: nn.Module) -> _CheckedUpdate:
        cache = _checked_updates.setdefault(self, WeakKeyDictionary())
        checked = cache.get(model)
        if checked is None or checked.forced != forced() or not checked.guard.unchanged():
            shadows = None if self.shadow is None else _tensors(self.shadow)
            averages, sources = _tensors(self.module), _tensors(model)
            _match_strides(averages, sources)
            _match_strides(shadows or [], sources)
            checked_pairs = pairs(averages, sources, shadows)
            copied = _singular_vectors(self), _singular_vectors(model) * (1 if shadows is None else 2)
            checked = cache[model] = _CheckedUpdate(ModuleGuard(self, model), forced(), checked_pairs, copied)
        return checked

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the averaged module."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "FusedEMA":
        """Do nothing; the average stays in evaluation mode."""
        return self


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, not {type(model).__name__}")


@torch.no_grad()  # without it, the parameters of a copied script module would be non-leaf clones
def _frozen_copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy in evaluation mode without gradients, in ``dtype`` or, if None, in at least float32."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype or torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor

    # deepcopy rejects non-leaf tensors, such as the weight that torch.nn.utils.weight_norm computes and stores as an attribute.
    tensors = {id(value): value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)}
    memo = {key: value.detach().clone() for key, value in tensors.items() if value.grad_fn is not None}
    try:
        copied = copy.deepcopy(model, memo)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:  # a user's module may contain anything
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the module {type(model).__name__} cannot be copied: {problem}") from error
    average = copied._apply(cast).eval()
    for parameter in average.parameters():  # script modules have no requires_grad_
        parameter.requires_grad_(False)
    return average


def _match_strides(averages: list[Tensor], sources: list[Tensor]) -> None:
    """Change the strides of averages to those of their sources, if shape and device match."""
    for average, source in zip(averages, sources, strict=False):
        if average.stride() != source.stride() and average.shape == source.shape and average.device == source.device:
            average.data = torch.empty_like(source, dtype=average.dtype).copy_(average)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _singular_vectors(model: nn.Module) -> list[Tensor]:
    """Return the singular vectors of all spectral norms, as parametrizations or hooks (``torch.nn.utils.spectral_norm``)."""
    vectors = [vector for module in model.modules() if isinstance(module, _SpectralNorm) for vector in module.buffers()]
    for module in model.modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
        vectors += [getattr(module, f"{hook.name}_{side}") for hook in hooks for side in "uv"]
    return vectors
