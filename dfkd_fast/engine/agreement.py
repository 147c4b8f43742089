"""Agreement of the student with the teacher on generated samples, which needs no data."""

import torch

from dfkd_fast.models import sample_batches
from dfkd_fast.surgery import eval_mode, get_logits

from .precision import default_modes
from .state import TrainState

__all__ = ["AGREEMENT_SAMPLES", "agreement"]

AGREEMENT_SAMPLES = 1000
"""Number of samples, whose latents are the same in every epoch."""


def agreement(state: TrainState) -> float:
    """Returns the percentage of samples of the current generator on which the averaged student, or else the student, and the teacher
    predict the same class; of pixels for segmentation. The training is unchanged."""
    student = state.student if state.average is None else state.average.module
    equal, count = torch.zeros((), dtype=torch.float64, device=state.device), 0
    with default_modes(state.device), eval_mode(student), state.precision.autocast():
        for images in sample_batches(state.generator, AGREEMENT_SAMPLES, len(state.latents), state.device):
            same = get_logits(student(images)).argmax(1) == state.teacher(images).argmax(1)
            equal += same.sum()
            count += same.numel()
    return 100 * float(equal) / count
