"""The averaged copy of a module, for users: one fused update a step."""

import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ..dispatch import Backend, forced
from . import Pairs, pairs
from .gathered import Gathered

__all__ = ["FusedEMA"]


class _Checked(NamedTuple):
    """What an update of one module found, good for the next one as long as nothing changed."""

    gathered: Gathered
    forced: Backend | None
    pairs: Pairs
    copied: tuple[list[Tensor], list[Tensor]]
    """Averages and shadows that take over the values of their sources, and these."""


# Not an attribute: a copy or a pickle of an average must not take the module along, nor an average keep it alive.
_checked: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Checked]] = WeakKeyDictionary()


class FusedEMA(nn.Module):
    """An exponential moving average of a module's parameters and buffers.

    Integers are copied, having no average, and so are the singular vectors of PyTorch's spectral norms: the
    mean of unit vectors that turn is shorter than 1, and a weight that is normalised by it too large.

    ``ema.module`` is the averaged copy: float32, or float64 where the source is, in evaluation mode, without gradients.
    Calling ``ema`` calls it. ``state_dict`` and ``load_state_dict`` are those of ``nn.Module``. With a warm-up the decay
    is computed on the device, so that updates can be captured in a CUDA graph and replayed.

    Args:
        model: the module to average; its present values are where the average begins.
        decay: in [0, 1].
        warm_up: the n-th update uses ``min(decay, (1 + n) / (10 + n))``, n from 0, so that the early values, which
            are far from the later ones, are forgotten quickly (as ``tf.train.ExponentialMovingAverage`` with num_updates).
        shadow_dtype: keep a second copy, ``ema.shadow``, in this floating dtype, written in the same pass.

    Raises:
        ValueError: decay is not in [0, 1], the module holds something that cannot be copied, or an update finds tensors that no
            longer match.
    """

    updates: Tensor

    def __init__(self, model: nn.Module, decay: float, *, warm_up: bool = False, shadow_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], not {decay}")
        self.decay, self.warm_up = decay, warm_up
        self.module = _frozen_copy(model, None)
        self.shadow = None if shadow_dtype is None else _frozen_copy(model, shadow_dtype)
        device = next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    def update(self, model: nn.Module) -> None:
        """Move the average towards the module's values.

        Modules and tensors are checked at the first update, and again after any of them was replaced or changed its shape, strides,
        dtype or device. An average whose source has other strides, as after ``model.to(memory_format=torch.channels_last)``, is
        laid out anew as its source is.

        Raises:
            ValueError: the module's tensors differ in number, shape or device from the average's.
        """
        decay: float | Tensor = self.decay
        if self.warm_up:
            decay = ((1.0 + self.updates) / (10.0 + self.updates)).clamp_(max=self.decay)
        checked = self._check(model)
        checked.pairs.update_(decay)
        if checked.copied[0]:
            torch._foreach_copy_(*checked.copied)
        self.updates.add_(1)

    def _check(self, model: nn.Module) -> _Checked:
        known = _checked.setdefault(self, WeakKeyDictionary())
        checked = known.get(model)
        if checked is None or checked.forced != forced() or not checked.gathered.unchanged():
            shadows = None if self.shadow is None else _tensors(self.shadow)
            averages, sources = _tensors(self.module), _tensors(model)
            _lay_out(averages, sources)
            _lay_out(shadows or [], sources)
            found = pairs(averages, sources, shadows)
            copied = _singular_vectors(self), _singular_vectors(model) * (1 if shadows is None else 2)
            checked = known[model] = _Checked(Gathered(self, model), forced(), found, copied)
        return checked

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged module returns."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> "FusedEMA":
        """Nothing: an average stays in evaluation mode."""
        return self


@torch.no_grad()  # or the parameters of a copied script would be clones with a graph
def _frozen_copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """With floating tensors in a dtype, or else in float32 at least: a half would drop the increments of an average."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype or torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor

    # What a module has computed and kept, as torch.nn.utils.weight_norm keeps its weight, has a graph, which cannot be copied.
    kept = {id(value): value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)}
    memo = {place: value.detach().clone() for place, value in kept.items() if value.grad_fn is not None}
    try:
        copied = copy.deepcopy(model, memo)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:  # whatever a user's module holds
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the module {type(model).__name__} cannot be copied: {problem}") from error
    average = copied._apply(cast).eval()
    for parameter in average.parameters():  # of a script, too, which has no requires_grad_
        parameter.requires_grad_(False)
    return average


def _lay_out(averages: list[Tensor], sources: list[Tensor]) -> None:
    """Give averages the strides of their sources, where they differ and may."""
    for average, source in zip(averages, sources, strict=False):
        if average.stride() != source.stride() and average.shape == source.shape and average.device == source.device:
            average.data = torch.empty_like(source, dtype=average.dtype).copy_(average)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _singular_vectors(model: nn.Module) -> list[Tensor]:
    """Of spectral norms, as parametrizations and as the hooks that ``torch.nn.utils.spectral_norm`` registers."""
    vectors = [vector for module in model.modules() if isinstance(module, _SpectralNorm) for vector in module.buffers()]
    for module in model.modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
        vectors += [getattr(module, f"{hook.name}_{side}") for hook in hooks for side in "uv"]
    return vectors
