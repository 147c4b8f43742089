"""The folder of a run. Its names and the keys in its files are a contract: other tools read them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from dfkd_fast import distributed
from dfkd_fast.engine import Epoch
from dfkd_fast.engine.checkpoint import save_checkpoint
from dfkd_fast.files import replacing
from dfkd_fast.models import save_weights

from .pictures import draw_curves, draw_samples

__all__ = ["RunFolder"]


class RunFolder:
    """Where a run keeps its recipe, logs, pictures, weights and checkpoints; of several processes the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = distributed.rank() == 0
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
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(text)

    def begin_log(self, done: Sequence[Epoch]) -> None:
        """Start the logs; of a run that goes on, keep just the epochs its checkpoint knows."""
        if not self.writes:
            return
        self.write_text(self.metrics, "".join(_line(epoch) for epoch in done))
        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=len(done) + 1 if done else None)

    def log(self, epoch: Epoch) -> None:
        """Add an epoch to the logs."""
        if not self.writes:
            return
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

    def draw_samples(self, images: Tensor, mean: Sequence[float], std: Sequence[float], epoch: int, beside: Sequence[Tensor] = ()) -> None:
        """A grid of generated images after an epoch, and of pictures that belong beside them."""
        if not self.writes:
            return
        self.samples.mkdir(exist_ok=True)
        draw_samples(images, mean, std, self.samples / f"epoch-{epoch:04d}.png", beside)

    def draw_curves(self, epochs: Sequence[Epoch], teacher_accuracy: float | None, title: str, metric: str) -> None:
        """Accuracy and losses over the epochs so far."""
        if not self.writes:
            return
        draw_curves(epochs, teacher_accuracy, title, self.curves, metric)

    def save_weights(self, network: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
        """A network's weights, with what says which network they are."""
        if self.writes:
            save_weights(network, path, metadata)

    def save_checkpoint(self, state: dict[str, Any], checkpoints: Path, iteration: int) -> None:
        """A state to go on from."""
        if self.writes:
            save_checkpoint(state, checkpoints, iteration)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """The figures of a finished run."""
        self.write_text(self.summary, json.dumps(summary, indent=2) + "\n")


def _line(epoch: Epoch) -> str:
    record = asdict(epoch)
    return json.dumps({"epoch": record.pop("number"), **record}) + "\n"
