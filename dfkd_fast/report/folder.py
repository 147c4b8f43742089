"""The folder of a run. Its file names and the keys in its files are a stable format: other tools read them.

One process writes to it (:meth:`RunFolder.claim`). That process may be killed at any time, or the machine may lose power; ``--resume``, or
a new start in the same folder if there is nothing to resume, then works correctly because of how each file is written:

===========================  ============================================================================================================
file                         why a kill at any time is safe
===========================  ============================================================================================================
the folder, ``.lock``        the operating system releases the lock with the process; a folder with nothing else counts as empty
``recipe.toml``              replaced atomically, and the first file of all: without it there is nothing to resume; its last line detects
                             a copy that was truncated elsewhere
``checkpoints/``             a checkpoint appears atomically, synced to the disk, before an older one is deleted; its checksum detects
                             later damage, and the previous checkpoint is loaded instead
``teacher.safetensors``      replaced atomically, after the teacher's last checkpoint, from which it is written again
``teacher-metrics.jsonl``,   replaced atomically, before the epoch's checkpoint: written again when the epoch is repeated
``teacher-curves.png``
``metrics.jsonl``            a line is appended before its epoch's checkpoint: a partial line, and the lines of epochs after the
                             checkpoint, are removed when the run resumes; readers skip a partial last line (:func:`read_metrics`)
``tensorboard/``             every process writes its own files, and first records which steps of earlier files are superseded
``samples/``,                replaced atomically, before the epoch's checkpoint: written again when the epoch is repeated
``curves.png``
``student.safetensors``      replaced atomically, after the last checkpoint, from which it is written again
``student-best-on-test``     replaced atomically, before the epoch's checkpoint: written again when the epoch is repeated and not worse
``calibration.json``         replaced atomically, before the first iteration: written again when that is repeated
``quantized.safetensors``,   replaced atomically, after ``student.safetensors``, from the same weights
``quantized.py``
``summary.json``             replaced atomically, after all of the above; removed when a run resumes that has epochs left: it exists only
                             for a finished run
``samples.png``,             replaced atomically, after ``summary.json``, from the files above; ``report.html`` is removed before
``report.html``              ``summary.json``
temporary files              have names of their own pattern, and are deleted when a process claims the folder
===========================  ============================================================================================================
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from dfkd_fast import distributed
from dfkd_fast.engine import Epoch
from dfkd_fast.engine.checkpoint_files import save_checkpoint
from dfkd_fast.errors import DfkdError
from dfkd_fast.files import is_temporary, make_folders, naming, remove_temporaries, replacing
from dfkd_fast.locks import LOCK, FolderLock
from dfkd_fast.models import save_weights

from .events import EventFile
from .plots import plot_curves, plot_samples_over_time, read_samples, save_samples, spread

__all__ = ["RunFolder", "read_metrics"]

END_MARK = "# end of recipe.toml"
MAX_EPOCHS = 8
"""Epochs in ``samples.png``."""
BEGIN_MARK = f"# Every number of the run. The last line is {END_MARK!r}: without it a part is missing."


class RunFolder:
    """The recipe, logs, plots, weights and checkpoints of a run; in distributed training only rank 0 writes.

    Args:
        path: of the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = distributed.rank() == 0
        self.recipe = path / "recipe.toml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.student = path / "student.safetensors"
        self.best_student = path / "student-best-on-test.safetensors"
        self.calibration = path / "calibration.json"
        self.quantized = path / "quantized.safetensors"
        self.rebuild = path / "quantized.py"
        self.teacher = path / "teacher.safetensors"
        self.teacher_metrics = path / "teacher-metrics.jsonl"
        self.teacher_curves = path / "teacher-curves.png"
        self.curves = path / "curves.png"
        self.samples = path / "samples"
        self.samples_over_time = path / "samples.png"
        self.report = path / "report.html"
        self.events = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.teacher_checkpoints = path / "checkpoints" / "teacher"
        self._events: EventFile | None = None
        self._lock: FolderLock | None = None
        self._created: list[Path] = []
        self._begun_here = self._written = False

    @property
    def is_unused(self) -> bool:
        """Whether the folder does not exist, is empty, or has only files of a process that was killed before its run began."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(self._is_leftover(entry) for entry in self.path.iterdir())

    @property
    def holds_run(self) -> bool:
        """Whether there is a run that can be resumed; only file names are checked."""
        return self.recipe.is_file()

    @property
    def is_new(self) -> bool:
        """Whether :meth:`claim` created the folder."""
        return self.path in self._created

    @property
    def lockable(self) -> bool:
        """False if the folder is claimed, but its file system does not support locks."""
        return self._lock is None or self._lock.effective

    def claim(self, job: str = "") -> None:
        """Create the folder if necessary, lock it for this process, and delete the temporary files of killed processes.

        Args:
            job: returned by :meth:`FolderLock.job_of` to other processes.

        Raises:
            FolderInUseError: another process has claimed it.
            OSError: it cannot be created or written.
        """
        for attempts_left in reversed(range(100)):
            self._created += make_folders(self.path)
            try:
                self._lock = FolderLock(self.path, job)
                break
            except FileNotFoundError:  # the process that created it has removed it
                if not attempts_left:
                    raise
            except BaseException:
                self._remove_created()
                raise
        for folder in (self.path, self.samples, self.checkpoints, self.teacher_checkpoints):
            remove_temporaries(folder)

    def release(self, *, failed: bool = False) -> None:
        """Unlock the folder. If no run has begun, restore the state before :meth:`claim`.

        Args:
            failed: whether the run failed; a failed run without results counts as not begun.
        """
        if self._lock is None:
            return
        if failed and self._begun_here and self._holds_nothing:
            self.metrics.unlink(missing_ok=True)
            shutil.rmtree(self.events, ignore_errors=True)
            self.recipe.unlink(missing_ok=True)  # last: without it there is no run
        unused = self.is_unused and not self.holds_run
        lock, self._lock = self._lock, None
        lock.release(remove=unused or (lock.made and not self._written))
        if unused:
            self._remove_created()

    def check_recipe(self) -> None:
        """Check that ``recipe.toml`` is complete.

        Raises:
            DfkdError: it is empty or truncated.
        """
        text = self.recipe.read_bytes()
        if not text.strip():
            raise DfkdError(f"{self.recipe} is empty")
        if text.startswith(BEGIN_MARK.encode()[: len(text)]) and not text.rstrip().endswith(END_MARK.encode()):
            raise DfkdError(f"{self.recipe} is truncated: its last line must be {END_MARK!r}")

    def write_recipe(self, recipe: str) -> None:
        """Write ``recipe.toml`` from the recipe's TOML text, between comments that mark its begin and its end."""
        self._begun_here = self._begun_here or not self.recipe.exists()
        self._written = True
        self.write_text(self.recipe, f"{BEGIN_MARK}\n{recipe}{END_MARK}\n")

    def write_text(self, path: Path, text: str) -> None:
        """Replace one of the folder's text files atomically."""
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(text, "utf-8")

    def begin_log(self, done: Sequence[Epoch]) -> None:
        """Open the logs; those of a resumed run are truncated to the epochs in its checkpoint, ``done``."""
        if not self.writes:
            return
        self.write_text(self.metrics, "".join(_line(epoch) for epoch in done))
        self._events = EventFile(self.events, first_step=len(done) + 1)

    def log(self, epoch: Epoch) -> None:
        """Append an epoch to ``metrics.jsonl`` and to the TensorBoard events."""
        if not self.writes:
            return
        with naming(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(_line(epoch))
        if self._events is not None:
            accuracy = {} if epoch.student_accuracy is None else {"accuracy/student": epoch.student_accuracy}
            accuracy |= {} if epoch.agreement is None else {"agreement/generated": epoch.agreement}
            groups = {"loss": epoch.losses, "drift": epoch.drift}
            scalars = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
            relative = {} if epoch.relative_bn_moments is None else {"bn_moments/relative": epoch.relative_bn_moments}
            self._events.add_scalars(scalars | accuracy | relative, epoch.number)

    def log_teacher(self, epochs: Sequence[Epoch]) -> None:
        """Write ``teacher-metrics.jsonl``: the epochs of the teacher's training so far."""
        self.write_text(self.teacher_metrics, "".join(_line(epoch) for epoch in epochs))

    def end_log(self) -> None:
        """Close the logs."""
        if self._events is not None:
            with suppress(OSError):  # a full disk has been reported by then, and nothing is left to be written
                self._events.close()
            self._events = None

    def save_samples(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], epoch: int, label_maps: Sequence[Tensor] = ()
    ) -> None:
        """Write the grid of generated images after an epoch, see :func:`~dfkd_fast.report.plots.save_samples`."""
        if not self.writes:
            return
        self.samples.mkdir(exist_ok=True)
        save_samples(images, mean, std, self.samples / f"epoch-{epoch:04d}.png", label_maps)

    def plot_curves(self, epochs: Sequence[Epoch], teacher_accuracy: float | None, title: str, metric: str) -> None:
        """Write ``curves.png``, see :func:`~dfkd_fast.report.plots.plot_curves`."""
        if self.writes:
            plot_curves(epochs, teacher_accuracy, title, self.curves, metric, calibrated=self.calibrated(epochs))

    def read_calibration(self) -> dict[str, float | None]:
        """Returns the content of ``calibration.json``; empty if the file does not exist or is damaged, since a run goes on without it."""
        with suppress(OSError, ValueError):
            record = json.loads(self.calibration.read_text("utf-8"))
            if isinstance(record, dict) and all(map(_is_measured, record, record.values())):
                return record
        return {}

    def calibrated(self, epochs: Sequence[Epoch]) -> float | None:
        """Returns the accuracy in percent of the calibrated student before the first step, or its agreement if no epoch has an accuracy;
        None if it was not recorded."""
        has_accuracy = any(epoch.student_accuracy is not None for epoch in epochs)
        return self.read_calibration().get("accuracy" if has_accuracy else "agreement")

    def plot_teacher_curves(self, epochs: Sequence[Epoch], title: str, metric: str) -> None:
        """Write ``teacher-curves.png``: loss and accuracy of the teacher's training."""
        if self.writes:
            plot_curves(epochs, None, title, self.teacher_curves, metric, role="teacher")

    def read_samples_over_time(self, image_size: int, segmentation: bool, count: int) -> list[tuple[int, list[Image.Image]]]:
        """Returns the samples of the same latent vectors after up to ``MAX_EPOCHS`` evenly spaced epochs, from the grids in ``samples/``.

        Of epochs with equal grids, as those of a generator that is not trained any more, only the first counts.

        Args:
            image_size: height and width of an image in pixels.
            segmentation: whether the teacher's and the student's label maps follow each image.
            count: of latent vectors.

        Raises:
            OSError: a file cannot be read.
        """
        grids: dict[int, Path] = {}
        previous = b""
        for path in sorted(self.samples.glob("epoch-*.png"), key=_epoch_of):
            if (content := path.read_bytes()) != previous:
                grids[_epoch_of(path)] = path
            previous = content
        columns = []
        for epoch in spread(list(grids), MAX_EPOCHS):
            samples = read_samples(grids[epoch], image_size, 2 if segmentation else 0, count)
            columns.append((epoch, [image for sample in samples for image in sample]))
        fewest = min((len(images) for _, images in columns), default=0)
        return [(epoch, images[:fewest]) for epoch, images in columns if fewest]

    def plot_samples_over_time(self, image_size: int, segmentation: bool, count: int) -> None:
        """Write ``samples.png``: one column per epoch of :meth:`read_samples_over_time`; nothing if there are no samples."""
        if not self.writes:
            return
        columns = self.read_samples_over_time(image_size, segmentation, count)
        if columns:
            names = ("generated", "teacher", "student") if segmentation else ("",)
            rows = [names[index % len(names)] for index in range(len(columns[0][1]))]
            plot_samples_over_time([(f"epoch {epoch}", images) for epoch, images in columns], rows, self.samples_over_time)

    def save_weights(self, network: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
        """Write a network's weights as safetensors, with metadata that identifies the network."""
        if self.writes:
            save_weights(network, path, metadata)

    def save_checkpoint(self, state: dict[str, Any], checkpoints: Path, iteration: int) -> None:
        """Write a checkpoint, see :func:`~dfkd_fast.engine.checkpoint_files.save_checkpoint`."""
        if self.writes:
            save_checkpoint(state, checkpoints, iteration)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``, the results of a finished run."""
        self.write_text(self.summary, json.dumps(summary, indent=2) + "\n")

    def remove_summary(self) -> None:
        """Delete ``summary.json`` and ``report.html`` of a run that has epochs left: they describe fewer epochs than the logs will."""
        if self.writes:
            self.report.unlink(missing_ok=True)
            self.summary.unlink(missing_ok=True)

    @property
    def _holds_nothing(self) -> bool:
        """Whether the folder has no results: no epoch, no weights, no checkpoint."""
        return all(
            entry in (self.recipe, self.events) or (entry == self.metrics and not entry.stat().st_size) or self._is_leftover(entry)
            for entry in self.path.iterdir()
        )

    def _is_leftover(self, entry: Path) -> bool:
        if entry in (self.samples, self.checkpoints, self.teacher_checkpoints) and entry.is_dir():
            return all(self._is_leftover(below) for below in entry.iterdir())
        if entry == self.recipe:
            try:
                self.check_recipe()
            except DfkdError:
                return True
            return False
        return entry.name == LOCK or is_temporary(entry)

    def _remove_created(self) -> None:
        with suppress(OSError):  # another process has put a file there
            while self._created:
                self._created.pop().rmdir()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of ``metrics.jsonl``, one dict per epoch, without a partial last line.

    Raises:
        OSError: the file cannot be read.
        ValueError: another line is not JSON.
    """
    *whole, last = path.read_text("utf-8").split("\n")
    epochs = [json.loads(line) for line in whole]
    with suppress(ValueError):
        epochs += [json.loads(last)] if last else []
    return epochs


def _is_measured(name: str, value: object) -> bool:
    """Whether a value of ``calibration.json`` is one that a run writes."""
    if value is None:
        return True
    largest = math.inf if name == "seconds" else 100.0
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= largest and math.isfinite(value)


def _epoch_of(grid: Path) -> int:
    return int(grid.stem.removeprefix("epoch-"))


def _line(epoch: Epoch) -> str:
    record = asdict(epoch)
    return json.dumps({"epoch": record.pop("number"), **record}) + "\n"
