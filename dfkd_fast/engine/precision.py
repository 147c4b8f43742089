"""Automatic mixed precision: autocast and loss scaling."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.choices import PrecisionName, PrecisionSetting
from dfkd_fast.errors import DfkdError
from dfkd_fast.surgery import eval_mode, find_heads, get_logits, in_float32

__all__ = ["Precision", "default_modes", "emulation_note", "resolve_precision"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIN_BF16_CAPABILITY = 8
"""Minimum major compute capability with bfloat16 support in hardware. PyTorch emulates bfloat16 on older GPUs."""
BF16_FEATURES = ("avx512bf16", "amx-bf16", "bf16")
"""LLVM's names of bfloat16 instructions: AVX-512's, AMX's and ARM's."""


def resolve_precision(setting: PrecisionSetting, device: torch.device) -> PrecisionName:
    """Returns the precision for a device. ``auto`` is ``bf16`` on GPUs with hardware support and ``fp32`` otherwise."""
    if setting != "auto":
        return setting
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= MIN_BF16_CAPABILITY else "fp32"


@functools.cache
def computes_in_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return any(features.get(feature) for feature in BF16_FEATURES)


def emulation_note(precision: PrecisionName, device: torch.device) -> str | None:
    """Returns a line for a CPU that emulates the precision instead of computing in it, else None."""
    if device.type != "cpu" or precision != "bf16" or computes_in_bf16():
        return None
    return "engine.precision = 'bf16': this CPU has no bfloat16 instructions and emulates them; 'fp32' may be faster"


@contextmanager
def default_modes(device: torch.device) -> Iterator[None]:
    """Context manager that enables gradients and disables autocast and inference mode, regardless of the surrounding modes."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


class Precision:
    """Autocast for forward passes with float32 weights and, for ``fp16``, one gradient scaler per optimizer.

    Weights, their averages, optimizer states and logits (:meth:`keep_logits_in_float32`) are always float32.

    Args:
        setting: Precision; only ``fp16`` uses loss scaling.
        device: Device of the networks.
        roles: Names of the networks that are trained.
    """

    def __init__(self, setting: PrecisionSetting, device: torch.device, roles: Sequence[str] = ("student", "generator")) -> None:
        self.name = resolve_precision(setting, device)
        self.dtype = DTYPES.get(self.name)
        """Autocast dtype; None for ``fp32``."""
        self.device = device
        scaled = self.name == "fp16"
        # One scaler per optimizer: an overflow in one network's gradients must not reduce the scale of the other.
        self.scalers = {role: torch.amp.GradScaler(device.type, enabled=scaled) for role in roles}
        for scaler in self.scalers.values():
            scaler.scale(torch.zeros((), device=device))  # allocates the scale before the first step
        self._heads: list[nn.Module] = []

    @property
    def image_dtype(self) -> torch.dtype:
        """Data type of image buffers."""
        return self.dtype or torch.get_default_dtype()

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        """Returns the context manager for forward passes; it does nothing for ``fp32``."""
        return nullcontext if self.dtype is None else self._autocast

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        # Without the weight cache: within another autocast it outlives this context and is not updated by an optimizer step.
        with torch.autocast(self.device.type, self.dtype, cache_enabled=False), in_float32(self._heads):
            yield

    def keep_logits_in_float32(self, network: nn.Module, images: Tensor) -> None:
        """Excludes the layers that compute a network's logits from autocast, so that they run in float32 within :attr:`autocast`.

        Args:
            network: Maps images to logits or to an output accepted by ``get_logits``.
            images: Example images (B, C, H, W) on the network's device.
        """
        if self.dtype is not None:
            self._heads += find_heads(network, images)

    def rounds_logits(self, network: nn.Module, images: Tensor) -> bool:
        """Whether logits are rounded despite :meth:`keep_logits_in_float32`, because ``forward`` computes them outside of a layer."""
        if self.dtype is None:
            return False
        with eval_mode(network), self.autocast():
            return get_logits(network(images)).dtype == self.dtype

    def scale(self, role: str, loss: Tensor) -> Tensor:
        """Returns the loss multiplied by the gradient scale of a role."""
        return self.scalers[role].scale(loss)

    def step(self, role: str, optimizer: torch.optim.Optimizer) -> None:
        """Steps the optimizer, unless a scaled gradient overflowed, and updates the scale."""
        self.scalers[role].step(optimizer)
        self.scalers[role].update()

    def tensors(self) -> Iterator[Tensor]:
        """Yields the state tensors of the enabled scalers."""
        for scaler in self.scalers.values():
            if scaler.is_enabled():
                yield from (tensor for tensor in (scaler._scale, scaler._growth_tracker) if tensor is not None)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the scalers and the name of the precision."""
        return {"name": self.name} | {role: scaler.state_dict() for role, scaler in self.scalers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state returned by :meth:`state_dict`.

        Raises:
            DfkdError: The state is of another precision.
        """
        # Checkpoints of early versions, which had no "auto", do not contain the name: the recipe next to them does.
        if (name := state.get("name", self.name)) != self.name:
            raise DfkdError(f"engine.precision = {self.name!r}: the state is of a run in {name!r}, which must be resumed in {name!r}")
        for role, scaler in self.scalers.items():
            scaler.load_state_dict(state[role])
