"""The folder of a run. Its names and the keys in its files are a contract: other tools read them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dfkd_fast.engine import Epoch
from dfkd_fast.files import replacing

from .pictures import draw_curves, draw_samples

__all__ = ["RunFolder"]


class RunFolder:
    """Where a run keeps its recipe, logs, pictures, weights and checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.toml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.student = path / "student.safetensors"
        self.best_student = path / "student-best-on-test.safetensors"
        self.teacher = path / "teacher.safetensors"
        self.curves = path / "curves.png"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.teacher_checkpoints = path / "checkpoints" / "teacher"
        self._events: SummaryWriter | None = None

    def write_text(self, path: Path, text: str) -> None:
        """Write one of the folder's text files, whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(text)

    def begin_log(self, done: Sequence[Epoch]) -> None:
        """Start the logs; of a run that goes on, keep just the epochs its checkpoint knows."""
        self.write_text(self.metrics, "".join(_line(epoch) for epoch in done))
        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=len(done) + 1 if done else None)

    def log(self, epoch: Epoch) -> None:
        """Add an epoch to the logs."""
        with self.metrics.open("a") as file:
            file.write(_line(epoch))
        if self._events is not None:
            for name, value in epoch.losses.items():
                self._events.add_scalar(f"loss/{name}", value, epoch.number)
            if epoch.student_accuracy is not None:
                self._events.add_scalar("accuracy/student", epoch.student_accuracy, epoch.number)
            for name, value in epoch.drift.items():
                self._events.add_scalar(f"drift/{name}", value, epoch.number)
            self._events.flush()

    def end_log(self) -> None:
        """Close what :meth:`begin_log` opened."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def draw_samples(self, images: Tensor, mean: Sequence[float], std: Sequence[float], epoch: int) -> None:
        """A grid of generated images after an epoch."""
        self.samples.mkdir(exist_ok=True)
        draw_samples(images, mean, std, self.samples / f"epoch-{epoch:04d}.png")

    def draw_curves(self, epochs: Sequence[Epoch], teacher_accuracy: float | None, title: str) -> None:
        """Accuracy and losses over the epochs so far."""
        draw_curves(epochs, teacher_accuracy, title, self.curves)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """The figures of a finished run."""
        self.write_text(self.summary, json.dumps(summary, indent=2) + "\n")


def _line(epoch: Epoch) -> str:
    record = asdict(epoch)
    return json.dumps({"epoch": record.pop("number"), **record}) + "\n"
