"""Networks and methods small enough for a test."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from dfkd_fast import Engine, GeneratorA, Loop, Method, Optimizer, Replay
from dfkd_fast.models import build_model

Networks = tuple[nn.Module, nn.Module, nn.Module]


def small_networks(seed: int = 0, *, teacher: str = "lenet5", student: str = "lenet5_half", channels: int = 1) -> Networks:
    torch.manual_seed(seed)
    size = 32 if "lenet5" in (teacher, student) else 16
    return build_model(teacher, 10, channels), build_model(student, 10, channels), GeneratorA(20, channels, size, width=4)


def loop_and_engine(**settings: Any) -> dict[str, Any]:
    """The two sections of a method that hold such settings."""
    of_engine = {field.name for field in fields(Engine)} & settings.keys()
    return {
        "loop": Loop(**{name: value for name, value in settings.items() if name not in of_engine}),
        "engine": Engine(**{name: settings[name] for name in of_engine}),
    }


def small_method(
    *,
    replay: Replay | None = None,
    epochs: int = 2,
    iterations: int = 3,
    batch_size: int = 8,
    channels_last: bool = False,
    student_steps: int = 2,
    steps_per_batch: int = 1,
    fold_teacher: bool = True,
) -> Method:
    return Method(
        loop=Loop(
            epochs=epochs,
            iterations_per_epoch=iterations,
            batch_size=batch_size,
            student_steps=student_steps,
            steps_per_batch=steps_per_batch,
        ),
        engine=Engine(channels_last=channels_last, cpu_convolutions=channels_last, fold_teacher=fold_teacher),
        replay=replay or Replay(),
        student_optimizer=Optimizer(lr=0.01, weight_decay=5e-4, schedule="cosine"),
        generator_optimizer=Optimizer(kind="adam", lr=1e-3),
    )
