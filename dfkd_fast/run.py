"""A run: a recipe, a folder, and trainings that can be interrupted and resumed."""

import shlex
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
from rich.console import Console

from . import distributed
from .claim import claim_folder
from .console import shell_quoted
from .engine import Epoch
from .engine.checkpoint_files import latest_checkpoint, load_checkpoint, load_latest, rename_damaged
from .engine.method import resolved
from .errors import DfkdError, NonFiniteLossError, OutOfMemoryError, describe_os_error, first_line
from .interrupt import Interrupted, stopping_on_signals
from .log import LOGGER
from .models import is_user_function
from .out_of_memory import memory_for, sizes_of
from .recipe import Recipe, load_recipe, recipe_from_toml, recipe_to_dict, recipe_to_toml
from .recipe_files import MOVABLE
from .report import RunFolder

__all__ = ["Run", "Training", "open_run"]

T = TypeVar("T")


class Training(Protocol):
    """Interface of the trainings of a teacher and of a student."""

    @property
    def finished(self) -> bool: ...
    @property
    def iterations_done(self) -> int: ...
    def __iter__(self) -> Iterator[Epoch]: ...
    def stop(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """A recipe, its folder, and the wall-clock time of all commands that worked there.

    As a context manager it releases the folder on exit.

    Args:
        recipe: with all values resolved.
        folder: claimed by this process.
        device: to train on.
        console: for results.
        command: command line that resumes it, up to its options.
        resumed: whether the folder already holds the run.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, device: torch.device, console: Console, command: str, *, resumed: bool = False
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = device
        self.console = console
        self.command = command
        self.resumed = resumed
        self._begin = time.perf_counter()
        self._before = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.folder.release(failed=error is not None)
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted()
        if isinstance(error, Interrupted) and not error.saved:
            raise Interrupted(error.what, error.signal_number, self._saved_state()) from error
        if isinstance(error, SystemExit):
            message = f"sys.exit({error.code!r}) was called by code of a network; {self._saved_state() or 'nothing was saved yet'}"
            raise DfkdError(message) from error
        if error is not None and not isinstance(error, DfkdError | Interrupted) and (saved := self._saved_state()):
            error.add_note(f"dfkd-fast: {saved}")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far, including earlier processes."""
        return self._before + time.perf_counter() - self._begin

    def count_earlier(self, seconds: float) -> None:
        """Include the seconds of earlier processes; repeated or smaller values do not add up."""
        self._before = max(self._before, seconds)

    def note(self, note: str) -> None:
        """Log one line that a reader of the results must know."""
        LOGGER.warning("%s", note)

    def begin(self) -> None:
        """Create the folder and write the recipe; called by all processes after every check."""
        distributed.barrier()
        if not self.resumed:  # otherwise the checkpoint is checked first, see resume
            self.folder.write_recipe(recipe_to_toml(self.recipe))

    def resume(self, training: Training, checkpoints: Path, sections: Container[str] | None = None) -> None:
        """Load the newest undamaged checkpoint into a training, if there is one; damaged ones are reported and renamed.

        The folder's recipe is rewritten after that, because options may have changed the locations of data and teacher.

        Args:
            training: to resume.
            checkpoints: folder of its checkpoints.
            sections: recipe sections that it depends on; None for all.

        Raises:
            DfkdError: all checkpoints are damaged, or the newest belongs to another run.
        """
        loaded = []

        def newest() -> tuple[Path, list[str]] | None:
            if (latest := load_latest(checkpoints)) is None:
                return None
            loaded.append(latest.state)
            for damaged in latest.damaged:
                rename_damaged(damaged)
            return latest.path, list(latest.damaged.values())

        # In the first process only: all must resume from the same checkpoint, and none may read one that is being renamed.
        latest = _first_decides(newest)
        if latest is not None:
            path, problems = latest
            for problem in problems:
                self.note(f"{problem}; resuming from {path}")
            self._load(training, path, loaded[0] if loaded else load_checkpoint(path), sections)
        self.folder.write_recipe(recipe_to_toml(self.recipe))

    def _load(self, training: Training, path: Path, saved: dict[str, Any], sections: Container[str] | None) -> None:
        """Load the content of a checkpoint; raises a :class:`DfkdError` if it belongs to another run."""
        kinds = {"training": dict, "seconds": float, "recipe": str}
        saved.setdefault("recipe", recipe_to_toml(self.recipe))  # earlier versions did not store the recipe
        if not all(isinstance(saved.get(name), kind) for name, kind in kinds.items()):
            raise DfkdError(f"{path} is not a checkpoint of a run")
        self.check_owner(f"checkpoint {path}", saved["recipe"], sections)
        try:
            training.load_state_dict(saved["training"])
        except DfkdError as error:
            raise DfkdError(f"checkpoint {path}: {error}") from error
        self.count_earlier(saved["seconds"])

    def check_owner(self, what: str, recipe: str, sections: Container[str] | None = None) -> None:
        """Check that a file of the folder was written by a run with this recipe and seed.

        Args:
            what: name of the file in error messages.
            recipe: TOML, from the file.
            sections: recipe sections that the file depends on; None for all.

        Raises:
            DfkdError: it was written by another run; the message names the first difference.
        """
        ours = recipe_from_toml(recipe_to_toml(self.recipe), "the recipe")
        theirs = recipe_from_toml(recipe, f"the recipe in {what}")
        for name, before, after in _fixed_differences(theirs, ours):
            if sections is not None and name.partition(".")[0] not in sections:
                continue
            raise DfkdError(f"{what} belongs to another run: {name} is {before!r} there, and {after!r} in {self.folder.recipe}")

    def train(self, training: Training, checkpoints: Path, on_epoch: Callable[[Epoch], None], sizes: Sequence[str]) -> None:
        """Run the remaining epochs, with a checkpoint every ``report.checkpoint_every`` epochs and one on interruption.

        Args:
            training: to run.
            checkpoints: folder of its checkpoints.
            on_epoch: called with every epoch.
            sizes: dotted paths of the settings that its memory depends on.

        Raises:
            Interrupted: by a signal; everything is saved, unless the message says that a second signal or a failed step prevented it.
            NonFiniteLossError: a loss became NaN or infinite; the message names the last good checkpoint.
            OutOfMemoryError: likewise.
            DfkdError: a file could not be written, likewise.
        """

        def save() -> None:
            state = training.state_dict()  # all processes take part
            saved = {"training": state, "seconds": self.seconds, "recipe": recipe_to_toml(self.recipe)}
            self.folder.save_checkpoint(saved, checkpoints, training.iterations_done)
            LOGGER.debug("saved a checkpoint after %d iterations in %s", training.iterations_done, checkpoints)

        if not training.finished:
            self.folder.remove_summary()
        with stopping_on_signals(training) as caught:
            try:
                with memory_for("the training", sizes_of(self.recipe, *sizes)):
                    for epoch in training:
                        on_epoch(epoch)
                        if epoch.number % self.recipe.report.checkpoint_every == 0 or training.finished:
                            save()
                    if not training.finished:
                        save()
            except (NonFiniteLossError, OutOfMemoryError) as error:
                raise type(error)(f"{error}; {_last_good(checkpoints)}") from error
            except OSError as error:
                raise DfkdError(f"{describe_os_error(error)}; {_last_good(checkpoints)}; {self._resume_command}") from error
            except Exception as error:
                if not caught or isinstance(error, DfkdError):
                    raise
                # A terminal's Ctrl-C also reaches the C++ compiler that torch.compile has started, which fails the step.
                raise Interrupted(f"interrupted while a step failed: {first_line(error)}", caught[0]) from error
        if caught and not training.finished:
            raise Interrupted("interrupted and saved", caught[0], self._resume_command)

    @property
    def _resume_command(self) -> str:
        return f"resume with: {self.command} --out {shell_quoted(self.folder.path)} --resume"

    def _saved_state(self) -> str:
        """What is saved after an interruption, and how to resume; empty if nothing is."""
        if not self.folder.holds_run:
            return ""
        begun = latest_checkpoint(self.folder.checkpoints) is not None
        return f"{_last_good(self.folder.checkpoints if begun else self.folder.teacher_checkpoints)}; {self._resume_command}"


def open_run(
    command: str, recipe_name: str, overrides: dict[str, Any], out: Path | None, resume: bool, device: torch.device, console: Console
) -> Run:
    """Open a new or a resumed run and claim its folder for this process; nothing else is written yet.

    ``engine.precision = "auto"`` is resolved for the device. A resumed run keeps the recipe of its folder; overrides may only
    change the locations of data and teacher, and what is reported.

    Args:
        command: "distill" or "teach".
        recipe_name: a shipped recipe or a TOML file.
        overrides: recipe values by dotted path.
        out: the folder; default: ``runs/RECIPE``, numbered if it exists, or when resuming the newest of these that holds a run.
        resume: whether to resume the run in the folder.
        device: to train on.
        console: for results.

    Returns:
        The run, a context manager that releases its folder.

    Raises:
        DfkdError: the folder holds another run, or none to resume, is in use by another process, or cannot be written.
    """
    recipe = load_recipe(recipe_name, overrides)
    default = Path("runs") / recipe.name
    claimed: list[RunFolder] = []

    def claim() -> tuple[Path, bool, bool]:
        folder, resumed = claim_folder(out, default, resume)
        claimed.append(folder)
        return folder.path, resumed, folder.lockable

    try:
        path, resumed, lockable = _first_decides(claim)
        folder = claimed[0] if claimed else RunFolder(path)
        if resumed:
            named, recipe = recipe, _stored_recipe(folder, recipe.name, overrides)
            _confirm_code(folder, recipe, named)
        # A resumed run's code has to be named again, see _confirm_code.
        code = [f" --set {at}={overrides[at]}" for at in ("teacher.model", "student.model") if is_user_function(str(overrides.get(at, "")))]
        # A run with a name of its own is resumed from its own recipe file.
        source = str(folder.recipe) if "name" in overrides else recipe_name
        command = f"dfkd-fast {command} {shlex.quote(source)}{''.join(code)}"
        run = Run(resolved(recipe, device), folder, device, console, command, resumed=resumed)
    except BaseException:
        for folder in claimed:
            folder.release()
        raise
    if not lockable:
        run.note(f"the file system of {path} does not support locks: another process could write to the same folder")
    return run


def _first_decides(decide: Callable[[], T]) -> T:
    """Call a function in the first process; all processes return its result, or raise its DfkdError or OSError."""
    outcome: list[T | DfkdError | OSError] = []
    if distributed.rank() == 0:
        try:
            outcome = [decide()]
        except (DfkdError, OSError) as error:
            outcome = [error]
    decided = distributed.all_gather(outcome)[0]
    if isinstance(decided, DfkdError | OSError):
        raise decided
    return decided


def _stored_recipe(folder: RunFolder, name: str, overrides: dict[str, Any]) -> Recipe:
    stored = load_recipe(str(folder.recipe))
    if stored.name != name:
        raise DfkdError(f"--resume: {folder.path} holds a run of recipe {stored.name!r}, not {name!r}")
    moved = load_recipe(str(folder.recipe), overrides)
    if moved.engine.precision == "auto":  # as resolved when the run began
        engine = replace(moved.engine, precision=stored.engine.precision)
        moved = replace(moved, engine=engine, description=stored.description, provenance=stored.provenance)
    if moved.loop.budget and not stored.loop.budget:
        raise DfkdError(
            f"--resume: loop.budget = {moved.loop.budget!r}: {folder.recipe} has loop.epochs = {stored.loop.epochs},"
            " which cannot change in the middle of a run; leave out the budget"
        )
    for path, before, after in _fixed_differences(stored, moved):
        raise DfkdError(f"--resume: {path} is {before!r} in {folder.recipe}, and cannot become {after!r} in the middle of a run")
    return moved


def _confirm_code(folder: RunFolder, stored: Recipe, named: Recipe) -> None:
    """Raise a :class:`DfkdError` if only the folder's recipe, which may be someone else's, names code to run."""
    for path, model, confirmed in (
        ("teacher.model", stored.teacher.model, named.teacher.model),
        ("student.model", stored.student.model, named.student.model),
    ):
        if is_user_function(model) and model != confirmed:
            raise DfkdError(
                f"--resume: {path} = {model!r} in {folder.recipe}: code that a folder names runs only if the command line names it, too:"
                f" --set {path}={model}, or {folder.recipe} in RECIPE's place"
            )


def _fixed_differences(before: Recipe, after: Recipe) -> list[tuple[str, Any, Any]]:
    """Returns path and both values of every difference that is not allowed within a run."""
    return [
        (path, one, other)
        for path, one, other in _differences(recipe_to_dict(before), recipe_to_dict(after))
        if not any(path == free or path.startswith(f"{free}.") for free in MOVABLE)
    ]


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in before.keys() | after.keys():
        one, other = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append((prefix + key, one, other))
    return found


def _last_good(checkpoints: Path) -> str:
    newest = latest_checkpoint(checkpoints)
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
