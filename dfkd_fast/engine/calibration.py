"""Calibration of a quantized student on generated samples, before its first step."""

import torch
from torch import nn

from dfkd_fast import distributed
from dfkd_fast.models import sample_batches
from dfkd_fast.surgery import calibrate

from .precision import default_modes
from .state import TrainState

__all__ = ["CALIBRATION_SAMPLES", "calibrate_student"]

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
    distributed.broadcast_(list(student.state_dict().values()))  # rounding may amplify differences between devices
    if state.average is not None:
        state.average.module.load_state_dict(student.state_dict())
