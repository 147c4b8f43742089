"""The folder of a run. Its names and the keys in its files are a contract: other tools read them.

One process writes in it (:meth:`RunFolder.claim`). It may be killed at any byte, or the machine may lose its power; ``--resume``, or a
start in the same folder where there is nothing to resume, then does what is right, because of how each file is written:

===========================  ============================================================================================================
what                         why a kill in the middle does no harm
===========================  ============================================================================================================
the folder, ``.lock``        the system takes the lock away with the process; a folder of nothing else counts as empty
``recipe.toml``              replaced whole, and the first file of all: without it there is nothing to go on with; its last line tells
                             a copy that was cut off elsewhere
``checkpoints/``             a checkpoint appears whole, content and name on the disk, before an older one is deleted; its checksum
                             tells what happened to it later, and the one before it is read instead
``teacher.safetensors``      replaced whole, after the teacher's last checkpoint, from which it is written again
``metrics.jsonl``            a line is appended before its epoch's checkpoint: a half line, and those of epochs that the checkpoint does
                             not know, are left out when the run goes on; readers leave out a half last line (:func:`read_metrics`)
``tensorboard/``             every process writes files of its own, and says first which steps of earlier ones no longer count
``samples/``,                replaced whole, before the epoch's checkpoint: written again when the epoch is repeated
``curves.png``
``student.safetensors``      replaced whole, after the last checkpoint, from which it is written again
``student-best-on-test``     replaced whole, before the epoch's checkpoint: written again when the epoch is repeated and no worse
``summary.json``             replaced whole, last of all; removed when a run goes on that has epochs left: it tells of finished ones only
temporary files              are named as such, and deleted when a process claims the folder
===========================  ============================================================================================================
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dfkd_fast import distributed
from dfkd_fast.engine import Epoch
from dfkd_fast.engine.checkpoint_files import save_checkpoint
from dfkd_fast.errors import DfkdError
from dfkd_fast.files import is_temporary, make_folders, naming, remove_temporaries, replacing
from dfkd_fast.locks import LOCK, FolderLock
from dfkd_fast.models import save_weights

from .events import EventFile
from .pictures import draw_curves, draw_samples

__all__ = ["RunFolder", "read_metrics"]

END_MARK = "# end of recipe.toml"
BEGIN_MARK = f"# Every number of the run. The last line is {END_MARK!r}: without it a part is missing."


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
        self.events = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.teacher_checkpoints = path / "checkpoints" / "teacher"
        self._events: EventFile | None = None
        self._lock: FolderLock | None = None
        self._made: list[Path] = []
        self._begun_here = self._written = False

    @property
    def is_unused(self) -> bool:
        """Whether it is not there, empty, or holds only what a process leaves that is killed before its run has begun."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(self._is_leftover(entry) for entry in self.path.iterdir())

    @property
    def holds_run(self) -> bool:
        """Whether there is a run to go on with, as far as names tell."""
        return self.recipe.is_file()

    @property
    def is_new(self) -> bool:
        """Whether :meth:`claim` made it."""
        return self.path in self._made

    @property
    def lockable(self) -> bool:
        """False where it is claimed, but the file system has no locks to keep others away."""
        return self._lock is None or self._lock.effective

    def claim(self, job: str = "") -> None:
        """Make the folder if need be, lock it for this process, and delete temporary files that killed ones left.

        Args:
            job: what :meth:`FolderLock.job_of` shall tell.

        Raises:
            FolderInUseError: another process has it.
            OSError: it cannot be made, or not be written.
        """
        for attempts_left in reversed(range(100)):
            self._made += make_folders(self.path)
            try:
                self._lock = FolderLock(self.path, job)
                break
            except FileNotFoundError:  # whoever had made it has removed it meanwhile
                if not attempts_left:
                    raise
            except BaseException:
                self._unmake()
                raise
        for folder in (self.path, self.samples, self.checkpoints, self.teacher_checkpoints):
            remove_temporaries(folder)

    def release(self, *, failed: bool = False) -> None:
        """Let others have the folder; where no run has begun, it is as it was before :meth:`claim`.

        Args:
            failed: the run has; where nothing came of it yet, it counts as not begun.
        """
        if self._lock is None:
            return
        if failed and self._begun_here and self._holds_nothing:
            self.metrics.unlink(missing_ok=True)
            shutil.rmtree(self.events, ignore_errors=True)
            self.recipe.unlink(missing_ok=True)  # the last: without it there is no run
        unused = self.is_unused and not self.holds_run
        lock, self._lock = self._lock, None
        lock.release(remove=unused or (lock.made and not self._written))
        if unused:
            self._unmake()

    def check_recipe(self) -> None:
        """Find out whether the recipe is whole.

        Raises:
            DfkdError: it is empty, or its end is missing.
        """
        text = self.recipe.read_bytes()
        if not text.strip():
            raise DfkdError(f"{self.recipe} is empty")
        if text.startswith(BEGIN_MARK.encode()[: len(text)]) and not text.rstrip().endswith(END_MARK.encode()):
            raise DfkdError(f"{self.recipe} is cut off: its last line must be {END_MARK!r}")

    def write_recipe(self, recipe: str) -> None:
        """Write the recipe's TOML, with what shows that it is whole."""
        self._begun_here = self._begun_here or not self.recipe.exists()
        self._written = True
        self.write_text(self.recipe, f"{BEGIN_MARK}\n{recipe}{END_MARK}\n")

    def write_text(self, path: Path, text: str) -> None:
        """Write one of the folder's text files, whole."""
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(text, "utf-8")

    def begin_log(self, done: Sequence[Epoch]) -> None:
        """Start the logs; of a run that goes on, keep just the epochs its checkpoint knows."""
        if not self.writes:
            return
        self.write_text(self.metrics, "".join(_line(epoch) for epoch in done))
        self._events = EventFile(self.events, first_step=len(done) + 1)

    def log(self, epoch: Epoch) -> None:
        """Add an epoch to the logs."""
        if not self.writes:
            return
        with naming(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(_line(epoch))
        if self._events is not None:
            accuracy = {} if epoch.student_accuracy is None else {"accuracy/student": epoch.student_accuracy}
            groups = {"loss": epoch.losses, "drift": epoch.drift}
            scalars = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
            self._events.add_scalars(scalars | accuracy, epoch.number)

    def end_log(self) -> None:
        """Close what :meth:`begin_log` opened."""
        if self._events is not None:
            with suppress(OSError):  # a full disk has been told by then: nothing is left to be written
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

    def remove_summary(self) -> None:
        """Of a run that has epochs left: it would tell of other epochs than the logs do."""
        if self.writes:
            self.summary.unlink(missing_ok=True)

    @property
    def _holds_nothing(self) -> bool:
        """Whether there is nothing beside the recipe that was worth its time: no epoch, no weights, no checkpoint."""
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

    def _unmake(self) -> None:
        with suppress(OSError):  # as soon as another process has put something there
            while self._made:
                self._made.pop().rmdir()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs in a run's ``metrics.jsonl``; a half last line, as a killed process or a full disk leaves it, is left out.

    Raises:
        ValueError: another line is no JSON.
    """
    *whole, last = path.read_text("utf-8").split("\n")
    epochs = [json.loads(line) for line in whole]
    with suppress(ValueError):
        epochs += [json.loads(last)] if last else []
    return epochs


def _line(epoch: Epoch) -> str:
    record = asdict(epoch)
    return json.dumps({"epoch": record.pop("number"), **record}) + "\n"
