"""A run: a recipe, a folder, and trainings that can be interrupted there and go on."""

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
from .engine.checkpoint_files import latest_checkpoint, load_checkpoint, load_latest, set_aside
from .engine.method import resolved
from .errors import DfkdError, NonFiniteLossError, OutOfMemoryError, describe_os_error, first_line
from .interrupt import Interrupted, stopping_on_signals
from .log import LOGGER
from .models import is_user_function
from .out_of_memory import memory_for, sizes_of
from .recipe import Recipe, load_recipe, recipe_from_toml, recipe_to_dict, recipe_to_toml
from .report import RunFolder

__all__ = ["Run", "Training", "open_run"]

# What may differ when a run goes on elsewhere: where things lie, and what is written about it.
MOVABLE = ("data.root", "data.workers", "teacher.weights", "teacher.weights_key", "report")

T = TypeVar("T")


class Training(Protocol):
    """What the training of a teacher and of a student have in common."""

    @property
    def finished(self) -> bool: ...
    @property
    def iterations_done(self) -> int: ...
    def __iter__(self) -> Iterator[Epoch]: ...
    def stop(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """One folder and the wall-clock time spent on it, over all the commands that worked there.

    As a context manager it gives the folder back at the end.

    Args:
        recipe: every number of it.
        folder: where it keeps everything.
        device: where it computes.
        console: where it prints results.
        command: what goes on with it, up to its options.
        resumed: whether the folder holds it already.
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
        if isinstance(error, Interrupted) and not error.left:
            raise Interrupted(error.what, error.signal_number, self._left()) from error
        if isinstance(error, SystemExit):
            said = f"sys.exit({error.code!r}) was called, as a network's own code may; {self._left() or 'nothing was saved yet'}"
            raise DfkdError(said) from error
        if error is not None and not isinstance(error, DfkdError | Interrupted) and (left := self._left()):
            error.add_note(f"dfkd-fast: {left}")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far."""
        return self._before + time.perf_counter() - self._begin

    def count_earlier(self, seconds: float) -> None:
        """Count the seconds of earlier processes; what is told again, as part of a larger sum, counts once."""
        self._before = max(self._before, seconds)

    def note(self, note: str) -> None:
        """Tell the user, in one line, what a reader of the figures must know."""
        LOGGER.warning("%s", note)

    def begin(self) -> None:
        """Make the folder and put the recipe there; called once everything that can be checked was, by all processes."""
        distributed.barrier()
        if not self.resumed:  # else its checkpoints have a say first, see resume
            self.folder.write_recipe(recipe_to_toml(self.recipe))

    def resume(self, training: Training, checkpoints: Path) -> None:
        """Load the newest undamaged checkpoint into a training, if there is one; damaged ones are named, and renamed.

        Only then is the folder's recipe what this run's is, for options may have moved data and teacher.

        Raises:
            DfkdError: all are damaged, or it is another run's.
        """
        loaded = []

        def newest() -> tuple[Path, list[str]] | None:
            if (found := load_latest(checkpoints)) is None:
                return None
            loaded.append(found.state)
            for damaged in found.damaged:
                set_aside(damaged)
            return found.path, list(found.damaged.values())

        # By the first process alone: all must go on from the same one, and another may read while this one renames.
        found = _first_decides(newest)
        if found is not None:
            path, problems = found
            for problem in problems:
                self.note(f"{problem}; going on from {path}")
            self._load(training, path, loaded[0] if loaded else load_checkpoint(path))
        self.folder.write_recipe(recipe_to_toml(self.recipe))

    def _load(self, training: Training, path: Path, saved: dict[str, Any]) -> None:
        """Load a checkpoint's content; a :class:`DfkdError` where it is another run's."""
        kinds = {"training": dict, "seconds": float, "recipe": str}
        saved.setdefault("recipe", recipe_to_toml(self.recipe))  # earlier versions did not write whose it is
        if not all(isinstance(saved.get(name), kind) for name, kind in kinds.items()):
            raise DfkdError(f"checkpoint {path} is none of a run")
        self.check_owner(f"checkpoint {path}", saved["recipe"])
        try:
            training.load_state_dict(saved["training"])
        except DfkdError as error:
            raise DfkdError(f"checkpoint {path}: {error}") from error
        self.count_earlier(saved["seconds"])

    def check_owner(self, what: str, recipe: str, sections: Container[str] | None = None) -> None:
        """Find out whether a file of the folder was left by a run of this recipe and seed.

        Args:
            what: the file, as an error calls it.
            recipe: TOML, from the file.
            sections: names of what it depends on of a recipe; None for all of it.

        Raises:
            DfkdError: it was left by another run; the message names the first difference.
        """
        ours = recipe_from_toml(recipe_to_toml(self.recipe), "the recipe")
        theirs = recipe_from_toml(recipe, f"the recipe in {what}")
        for name, before, after in _fixed_differences(theirs, ours):
            if sections is not None and name.partition(".")[0] not in sections:
                continue
            raise DfkdError(f"{what} is of another run: {name} is {before!r} there, and {after!r} in {self.folder.recipe}")

    def train(self, training: Training, checkpoints: Path, on_epoch: Callable[[Epoch], None], sizes: Sequence[str]) -> None:
        """Run the epochs that are left, with a checkpoint every so many of them, and one when interrupted.

        Args:
            training: what is run.
            checkpoints: the folder for them.
            on_epoch: called with every epoch.
            sizes: dotted paths of the settings that its memory depends on.

        Raises:
            Interrupted: by a signal; everything is saved, unless there was another or a step failed meanwhile, as the message then says.
            NonFiniteLossError: a loss became NaN or infinite; the message names the last good checkpoint, too.
            OutOfMemoryError: likewise.
            DfkdError: something could not be written, likewise.
        """

        def save() -> None:
            state = training.state_dict()  # every process has something to say
            saved = {"training": state, "seconds": self.seconds, "recipe": recipe_to_toml(self.recipe)}
            self.folder.save_checkpoint(saved, checkpoints, training.iterations_done)
            LOGGER.debug("a checkpoint after %d iterations is in %s", training.iterations_done, checkpoints)

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
                raise DfkdError(f"{describe_os_error(error)}; {_last_good(checkpoints)}; {self._going_on}") from error
            except Exception as error:
                if not caught or isinstance(error, DfkdError):
                    raise
                # A terminal's Ctrl-C reaches the C++ compiler, too, that torch.compile has started, and the step fails for want of it.
                raise Interrupted(f"interrupted while a step failed: {first_line(error)}", caught[0]) from error
        if caught and not training.finished:
            raise Interrupted("interrupted and saved", caught[0], self._going_on)

    @property
    def _going_on(self) -> str:
        return f"go on with: {self.command} --out {shell_quoted(self.folder.path)} --resume"

    def _left(self) -> str:
        """What is saved after an interruption, and how to go on; empty where nothing is."""
        if not self.folder.holds_run:
            return ""
        begun = latest_checkpoint(self.folder.checkpoints) is not None
        return f"{_last_good(self.folder.checkpoints if begun else self.folder.teacher_checkpoints)}; {self._going_on}"


def open_run(
    command: str, recipe_name: str, overrides: dict[str, Any], out: Path | None, resume: bool, device: torch.device, console: Console
) -> Run:
    """A new run, or one that goes on, whose folder is this process's alone until the run is left; no more is written yet.

    Its recipe has the precision that ``auto`` is on the device. A run that goes on keeps the recipe in its folder; overrides may
    only move its data and its teacher, and change what is reported.

    Args:
        command: "distill" or "teach".
        recipe_name: a shipped recipe or a TOML file.
        overrides: values by dotted path, over that recipe.
        out: the folder; by default one in ``runs/`` that is named after the recipe, to go on the newest of them that holds a run.
        resume: go on with what is there.
        device: where to compute.
        console: where to print results.

    Raises:
        DfkdError: the folder holds another run, or none to go on with, is in use by another process, or cannot be written.
    """
    recipe = load_recipe(recipe_name, overrides)
    default = Path("runs") / recipe.name
    claimed: list[RunFolder] = []

    def claim() -> tuple[Path, bool, bool]:
        folder, found = claim_folder(out, default, resume)
        claimed.append(folder)
        return folder.path, found, folder.lockable

    try:
        path, found, lockable = _first_decides(claim)
        folder = claimed[0] if claimed else RunFolder(path)
        if found:
            named, recipe = recipe, _stored_recipe(folder, recipe.name, overrides)
            _confirm_code(folder, recipe, named)
        # Code is named again where a run goes on, see _confirm_code.
        code = [f" --set {at}={overrides[at]}" for at in ("teacher.model", "student.model") if is_user_function(str(overrides.get(at, "")))]
        # A run that was given a name of its own is found by it.
        shown = str(folder.recipe) if "name" in overrides else recipe_name
        command = f"dfkd-fast {command} {shlex.quote(shown)}{''.join(code)}"
        run = Run(resolved(recipe, device), folder, device, console, command, resumed=found)
    except BaseException:
        for folder in claimed:
            folder.release()
        raise
    if not lockable:
        run.note(f"the file system of {path} has no locks: nothing keeps another process from the same folder")
    return run


def _first_decides(decide: Callable[[], T]) -> T:
    """What a function returns in the first process, in all of them; what it raises as an error for the user, too."""
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
    if moved.engine.precision == "auto":  # the run's own, wherever it began
        moved = replace(moved, engine=replace(moved.engine, precision=stored.engine.precision))
    for path, before, after in _fixed_differences(stored, moved):
        raise DfkdError(f"--resume: {path} is {before!r} in {folder.recipe}, and cannot become {after!r} in the middle of a run")
    return moved


def _confirm_code(folder: RunFolder, stored: Recipe, named: Recipe) -> None:
    """Raise a :class:`DfkdError` where only the folder's recipe names a function to run: the folder may be someone else's."""
    for path, model, confirmed in (
        ("teacher.model", stored.teacher.model, named.teacher.model),
        ("student.model", stored.student.model, named.student.model),
    ):
        if is_user_function(model) and model != confirmed:
            raise DfkdError(
                f"--resume: {path} = {model!r} in {folder.recipe}: code that a folder names is run only if the command line names it, too:"
                f" --set {path}={model}, or {folder.recipe} in RECIPE's place"
            )


def _fixed_differences(before: Recipe, after: Recipe) -> list[tuple[str, Any, Any]]:
    """Paths and both values of what differs and may not during a run."""
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
