"""Calibration of a quantized student on generated samples, before its first step."""

import torch
from torch import nn

from dfkd_fast.errors import DfkdError
from dfkd_fast.models import sample_batches
from dfkd_fast.surgery import calibrate, has_running_statistics, quantized_layers

from .precision import default_modes
from .state import TrainState

__all__ = ["CALIBRATION_SAMPLES", "calibrate_student", "check_quantized"]

CALIBRATION_SAMPLES = 384
"""Number of samples. Deep layers have few pixels per sample, and as many inputs as weights per channel."""


def calibrate_student(state: TrainState, teacher: nn.Module) -> None:
    """Calibrates the quantized student on samples of the current generator, in place; see :func:`~dfkd_fast.surgery.calibrate`.

    Args:
        state: State of the training; its student and the average of that are changed.
        teacher: The teacher as passed to the trainer, whose batch norms are not folded.
    """
    student = state.saved_networks["student"]
    batches = sample_batches(state.generator, CALIBRATION_SAMPLES, len(state.latents), state.device)
    with default_modes(state.device):
        calibrate(student, teacher, torch.cat(list(batches)))
    if state.average is not None:
        state.average.module.load_state_dict(student.state_dict())


def check_quantized(student: nn.Module, teacher: nn.Module) -> None:
    """Raises a :class:`DfkdError` if a quantized student is not a copy of the teacher."""
    layers: dict[str, nn.Module] = dict(quantized_layers(student))
    if layers:
        layers |= {name: norm for name, norm in student.named_modules() if has_running_statistics(norm)}
    modules = dict(teacher.named_modules())
    for name, layer in layers.items():
        if _shapes(layer) != _shapes(modules.get(name)):
            raise DfkdError(f"the student is quantized, and its layer {name!r} differs from the teacher's: quantize a copy of the teacher")


def _shapes(layer: nn.Module | None) -> list[torch.Size | None]:
    return [getattr(getattr(layer, name, None), "shape", None) for name in ("weight", "bias", "running_mean")]
