"""Optimisers and their schedules, from settings."""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from dfkd_fast.errors import DfkdError
from dfkd_fast.settings import BelowOne, Fraction, NonNegative, Positive, PositiveInt, settings

__all__ = ["Optimizer", "build_optimizer", "build_schedule", "restore_learning_rates"]


@settings
class Optimizer:
    """Recipe sections ``[student_optimizer]``, ``[generator_optimizer]`` and ``[teacher_optimizer]``."""

    kind: Literal["sgd", "adam", "apex_sgd", "apex_adam"] = "sgd"
    """The last two are those of NVIDIA's apex, on a GPU where it is installed."""
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    """Of ``sgd``, without Nesterov's form."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Of ``adam``."""
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """Of the learning rate, by epoch: ``cosine`` falls to 0 at the end, ``multistep`` by ``gamma`` at ``milestones``."""
    milestones: tuple[PositiveInt, ...] = ()
    gamma: Positive = 0.1


def build_optimizer(wanted: Optimizer, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimiser the settings describe, over these parameters.

    On a GPU it is fused and its learning rate a tensor, so that a step can be captured and its rate still change.

    Raises:
        DfkdError: apex is wanted, and not there.
    """
    sgd = wanted.kind in ("sgd", "apex_sgd")
    options: dict[str, Any] = {"lr": wanted.lr, "weight_decay": wanted.weight_decay}
    options |= {"momentum": wanted.momentum} if sgd else {"betas": wanted.betas}
    if wanted.kind.startswith("apex"):
        apex = _apex(wanted.kind, device)
        return apex.FusedSGD(parameters, **options) if sgd else apex.FusedAdam(parameters, adam_w_mode=False, capturable=True, **options)
    if device.type == "cuda":
        options |= {"lr": torch.tensor(wanted.lr, device=device), "fused": True} | ({} if sgd else {"capturable": True})
    if not sgd:
        return torch.optim.Adam(parameters, **options)
    optimizer = torch.optim.SGD(parameters, **options)
    _start_momentum(optimizer)
    return optimizer


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Give every parameter a momentum of 0: its first update is the gradient, as PyTorch's is, which has a first step of its own.

    That one, fused, makes the momentum without a value, and leaves it so where fp16's gradients overflow and it is skipped;
    captured in a graph, it would begin the momentum anew at every replay.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def restore_learning_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put what was loaded from a checkpoint, whatever device it is of, where :func:`build_optimizer` has it."""
    on_gpu = device.type == "cuda" and (type(optimizer).__module__.startswith("torch.") or getattr(optimizer, "capturable", False))
    for group in optimizer.param_groups:
        rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        group["lr"] = rate.clone() if on_gpu else float(group["lr"])
        group |= {name: value for name, value in optimizer.defaults.items() if name in ("fused", "capturable")}
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].to(device)
    if isinstance(optimizer, torch.optim.SGD):
        _start_momentum(optimizer)


def _apex(kind: str, device: torch.device) -> Any:
    # By its compiled module: the package of that name on PyPI is a web toolkit, and importing it helps nobody.
    if importlib.util.find_spec("amp_C") is None:
        raise DfkdError(
            f"optimizer kind {kind!r} needs NVIDIA's apex with its CUDA extensions, built from github.com/NVIDIA/apex "
            "(the package apex on PyPI is another project); without it, choose 'sgd' or 'adam', which are fused as well"
        )
    if device.type != "cuda":
        raise DfkdError(f"optimizer kind {kind!r} works on a GPU only; choose 'sgd' or 'adam' on a CPU")
    return importlib.import_module("apex.optimizers")


def build_schedule(wanted: Optimizer, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler:
    """The schedule of its learning rate, to be stepped after every epoch."""
    if wanted.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    milestones = list(wanted.milestones) if wanted.schedule == "multistep" else []
    return lr_scheduler.MultiStepLR(optimizer, milestones, wanted.gamma)
