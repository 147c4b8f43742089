"""Networks and methods small enough for a test."""

import torch
from torch import nn

from dfkd_fast import GeneratorA, Loop, Method, Optimizer, Replay
from dfkd_fast.models import build_model

Networks = tuple[nn.Module, nn.Module, nn.Module]


def small_networks(seed: int = 0, *, teacher: str = "lenet5", student: str = "lenet5_half", channels: int = 1) -> Networks:
    torch.manual_seed(seed)
    size = 32 if "lenet5" in (teacher, student) else 16
    return build_model(teacher, 10, channels), build_model(student, 10, channels), GeneratorA(20, channels, size, width=4)


def small_method(
    *,
    replay: Replay | None = None,
    epochs: int = 2,
    iterations: int = 3,
    batch_size: int = 8,
    channels_last: bool = False,
    student_steps: int = 2,
    fold_teacher: bool = True,
) -> Method:
    return Method(
        loop=Loop(
            epochs=epochs,
            iterations_per_epoch=iterations,
            batch_size=batch_size,
            student_steps=student_steps,
            channels_last=channels_last,
            fold_teacher=fold_teacher,
        ),
        replay=replay or Replay(),
        student_optimizer=Optimizer(lr=0.01, weight_decay=5e-4, schedule="cosine"),
        generator_optimizer=Optimizer(kind="adam", lr=1e-3),
    )
