"""Automatic mixed precision: which dtype networks compute in, and what keeps small gradients from vanishing in it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.choices import PrecisionName, PrecisionSetting
from dfkd_fast.errors import DfkdError
from dfkd_fast.surgery import eval_mode, find_heads, get_logits, in_float32

__all__ = ["Precision", "ordinary_mode", "resolve_precision"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16_FROM = 8
"""Compute capability from which on NVIDIA's GPUs multiply bfloat16; PyTorch emulates it on older ones."""


def resolve_precision(setting: PrecisionSetting, device: torch.device) -> PrecisionName:
    """What ``auto`` is on a device: bfloat16 on a GPU that computes in it, else float32."""
    if setting != "auto":
        return setting
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= BF16_FROM else "fp32"


@contextmanager
def ordinary_mode(device: torch.device) -> Iterator[None]:
    """Gradients are recorded and nothing is cast, whatever autocast, ``no_grad`` or inference mode is around."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


class Precision:
    """Autocast of forward passes over float32 weights, and, for fp16, a scaler an optimiser.

    Weights, their averages and the optimisers' state are float32 always, and so are logits (:meth:`keep_logits`).

    Args:
        setting: ``bf16`` needs no scaler; ``fp16`` does.
        device: where the networks are.
    """

    def __init__(self, setting: PrecisionSetting, device: torch.device) -> None:
        self.name = resolve_precision(setting, device)
        self.dtype = DTYPES.get(self.name)
        self.device = device
        scaled = self.name == "fp16"
        # A scaler an optimiser: an overflow in one player's gradients is no reason for the other to step back.
        self.scalers = {role: torch.amp.GradScaler(device.type, enabled=scaled) for role in ("student", "generator")}
        for scaler in self.scalers.values():
            scaler.scale(torch.zeros((), device=device))  # makes the scale now, not in the first step
        self._heads: list[nn.Module] = []

    @property
    def images(self) -> torch.dtype:
        """What batches of images are kept in."""
        return self.dtype or torch.get_default_dtype()

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        """Makes the context for a forward pass; nothing in float32."""
        return nullcontext if self.dtype is None else self._lowered

    @contextmanager
    def _lowered(self) -> Iterator[None]:
        # Its cache of cast weights outlives the context wherever another autocast is around it, and does not notice an optimizer's step.
        with torch.autocast(self.device.type, self.dtype, cache_enabled=False), in_float32(self._heads):
            yield

    def keep_logits(self, network: nn.Module, images: Tensor) -> None:
        """Let the layers that a network's logits come out of compute in float32 within :attr:`autocast`, and be as they were outside.

        Args:
            network: images → logits, in any form that ``get_logits`` takes.
            images: some for it, (B, C, H, W), on its device.
        """
        if self.dtype is not None:
            self._heads += find_heads(network, images)

    def rounds_logits(self, network: nn.Module, images: Tensor) -> bool:
        """Whether logits are rounded all the same, since no layer makes them but an operation in the network's ``forward``."""
        if self.dtype is None:
            return False
        with eval_mode(network), self.autocast():
            return get_logits(network(images)).dtype == self.dtype

    def scale(self, role: str, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return self.scalers[role].scale(loss)

    def step(self, role: str, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimiser's step, unless a scaled gradient overflowed."""
        self.scalers[role].step(optimizer)
        self.scalers[role].update()

    def tensors(self) -> Iterator[Tensor]:
        """What the scalers keep on the device."""
        for scaler in self.scalers.values():
            if scaler.is_enabled():
                yield from (tensor for tensor in (scaler._scale, scaler._growth_tracker) if tensor is not None)

    def state_dict(self) -> dict[str, Any]:
        """Of the scalers, and the precision's name."""
        return {"name": self.name} | {role: scaler.state_dict() for role, scaler in self.scalers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave.

        Raises:
            DfkdError: it is of another precision.
        """
        # Not in checkpoints of before "auto", whose recipe beside them names it.
        if (name := state.get("name", self.name)) != self.name:
            raise DfkdError(f"engine.precision = {self.name!r}: the state is of a run in {name!r}, and goes on in that")
        for role, scaler in self.scalers.items():
            scaler.load_state_dict(state[role])
