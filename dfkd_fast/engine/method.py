"""A point on the three axes with everything else the loop is told: all of a recipe but its networks and data."""

from dataclasses import field
from typing import Literal

from dfkd_fast.methods import Objective, Replay, Update
from dfkd_fast.settings import Flag, PositiveInt, settings

from .optim import Optimizer

__all__ = ["Loop", "Method"]


@settings
class Loop:
    """Recipe section ``[loop]``: an epoch is so many iterations, an iteration so many steps of each player."""

    epochs: PositiveInt = 40
    iterations_per_epoch: PositiveInt = 50
    batch_size: PositiveInt = 256
    """Fresh samples a step."""
    student_steps: PositiveInt = 5
    """Imitation steps an iteration, each on new samples; DFAD's k."""
    generator_steps: PositiveInt = 1
    student_in_generator_step: Literal["train", "eval"] = "train"
    """Mode of the student while the generator learns: DFAD trains through its batch statistics."""
    channels_last: Flag = True
    """Memory layout of networks and images. The function is the same, the rounding is not."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations of the student; the last epoch is always evaluated."""


@settings
class Method:
    """What a :class:`~dfkd_fast.Trainer` needs beside the networks. The defaults are DFAD's (arXiv 1912.11006)."""

    loop: Loop = field(default_factory=Loop)
    objective: Objective = field(default_factory=Objective)
    replay: Replay = field(default_factory=Replay)
    update: Update = field(default_factory=Update)
    student_optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.1, weight_decay=5e-4))
    generator_optimizer: Optimizer = field(default_factory=lambda: Optimizer(kind="adam", lr=1e-3))
