"""Optimizers and learning rate schedules."""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from dfkd_fast.errors import DfkdError
from dfkd_fast.settings import BelowOne, Count, Flag, Fraction, NonNegative, Positive, PositiveInt, settings

__all__ = ["Optimizer", "build_optimizer", "build_schedule", "restore_learning_rates"]


@settings
class Optimizer:
    """Recipe sections ``[student_optimizer]``, ``[generator_optimizer]`` and ``[teacher_optimizer]``."""

    kind: Literal["sgd", "adam", "apex_sgd", "apex_adam"] = "sgd"
    """Optimizer. ``apex_sgd`` and ``apex_adam`` are the fused optimizers of NVIDIA apex, which must be installed, on a GPU."""
    lr: Positive = 0.1
    """Initial learning rate."""
    momentum: Fraction = 0.9
    """Momentum of ``sgd``."""
    nesterov: Flag = False
    """Use Nesterov momentum in ``sgd``."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Coefficients of the running averages of ``adam``."""
    weight_decay: NonNegative = 0.0
    """Weight decay (L2 penalty)."""
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """Learning rate schedule, stepped every epoch: ``cosine`` anneals to 0 at the last epoch, ``multistep`` multiplies the rate by
    ``gamma`` at each of the ``milestones``."""
    milestones: tuple[PositiveInt, ...] = ()
    """Epochs at which ``multistep`` changes the learning rate."""
    gamma: Positive = 0.1
    """Factor of ``multistep``."""
    warmup_epochs: Count = 0
    """Epochs at the start in which the learning rate of the schedule is multiplied by a factor that grows linearly to 1."""

    def __post_init__(self) -> None:
        if self.nesterov and (not self.momentum or not self.kind.endswith("sgd")):
            raise ValueError("nesterov = true: needs kind 'sgd' and a momentum above 0")


def build_optimizer(
    config: Optimizer, parameters: Iterable[nn.Parameter], device: torch.device, *, on_gpu: bool | None = None
) -> torch.optim.Optimizer:
    """Returns the configured optimizer over parameters.

    Adam is fused, which is several times faster also on a CPU; SGD is fused on a GPU. On a GPU the learning rate is a tensor, so that a
    captured step follows the schedule.

    Args:
        config: Configuration.
        parameters: Parameters to optimize.
        device: Device of the parameters.
        on_gpu: Whether the options for GPUs are used; by default if ``device`` is one.

    Raises:
        DfkdError: An apex optimizer is configured, but apex is not installed or the device is not a GPU.
    """
    sgd = config.kind in ("sgd", "apex_sgd")
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    options |= {"momentum": config.momentum, "nesterov": config.nesterov} if sgd else {"betas": config.betas}
    if config.kind.startswith("apex"):
        apex = _apex(config.kind, device)
        return apex.FusedSGD(parameters, **options) if sgd else apex.FusedAdam(parameters, adam_w_mode=False, capturable=True, **options)
    if device.type == "cuda" if on_gpu is None else on_gpu:
        options |= {"lr": torch.tensor(config.lr, device=device), "fused": True} | ({} if sgd else {"capturable": True})
    if not sgd:
        return torch.optim.Adam(parameters, **options | {"fused": True})
    optimizer = torch.optim.SGD(parameters, **options)
    _init_momentum_buffers(optimizer)
    return optimizer


def _init_momentum_buffers(optimizer: torch.optim.SGD) -> None:
    """Initializes missing momentum buffers to 0, so that the first update equals the gradient, as in PyTorch.

    PyTorch creates the buffers in the first step. Its fused implementation leaves them uninitialized if that step is skipped because
    of an overflow in fp16, and a captured first step would reset the momentum at every replay.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def restore_learning_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Restores learning rates and step counters after ``load_state_dict`` to the form that :func:`build_optimizer` uses on a device.

    The loaded state may come from another type of device.
    """
    on_gpu = device.type == "cuda" and (type(optimizer).__module__.startswith("torch.") or getattr(optimizer, "capturable", False))
    for group in optimizer.param_groups:
        rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        group["lr"] = rate.clone() if on_gpu else float(group["lr"])
        group |= {name: value for name, value in optimizer.defaults.items() if name in ("fused", "capturable")}
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].to(device)
    if isinstance(optimizer, torch.optim.SGD):
        _init_momentum_buffers(optimizer)


def _apex(kind: str, device: torch.device) -> Any:
    # Detected by its compiled module: the package named apex on PyPI is an unrelated web toolkit.
    if importlib.util.find_spec("amp_C") is None:
        raise DfkdError(
            f"optimizer kind {kind!r} needs NVIDIA's apex with its CUDA extensions, built from github.com/NVIDIA/apex "
            "(the package apex on PyPI is another project); without it, choose 'sgd' or 'adam', which are fused as well"
        )
    if device.type != "cuda":
        raise DfkdError(f"optimizer kind {kind!r} requires a GPU; choose 'sgd' or 'adam' on a CPU")
    return importlib.import_module("apex.optimizers")


def build_schedule(config: Optimizer, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler:
    """Returns the configured learning rate scheduler, to be stepped after every epoch.

    Raises:
        DfkdError: The warmup does not end before the last epoch.
    """
    if config.warmup_epochs >= epochs:
        raise DfkdError(f"warmup_epochs = {config.warmup_epochs}: must be less than the number of epochs, {epochs}")
    schedule: LRScheduler
    if config.schedule == "cosine":
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    else:
        milestones = list(config.milestones) if config.schedule == "multistep" else []
        schedule = lr_scheduler.MultiStepLR(optimizer, milestones, config.gamma)
    if not config.warmup_epochs:
        return schedule
    warmup = lr_scheduler.LinearLR(optimizer, 1 / (config.warmup_epochs + 1), total_iters=config.warmup_epochs)
    return lr_scheduler.ChainedScheduler([warmup, schedule])
