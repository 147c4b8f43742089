"""A run: a recipe, a folder, and trainings that can be interrupted there and go on."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from . import distributed
from .engine import Epoch
from .engine.checkpoint import latest_checkpoint, load_checkpoint
from .engine.method import resolved
from .errors import DfkdError, NonFiniteLossError, first_line
from .interrupt import Interrupted, stopping_on_signals
from .models import names_code
from .recipe import Recipe, load_recipe, recipe_to_dict, recipe_to_toml
from .report import RunFolder

__all__ = ["Run", "Training", "open_run"]

# What may differ when a run goes on elsewhere: where things lie, and what is written about it.
MOVABLE = ("data.root", "data.workers", "teacher.weights", "report")


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

    Args:
        recipe: every number of it.
        folder: where it keeps everything.
        device: where it computes.
        console: where it talks.
        command: what goes on with it, up to its options.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, device: torch.device, console: Console, command: str) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = device
        self.console = console
        self.command = command
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far."""
        return time.perf_counter() - self._begin

    def say(self, remark: str) -> None:
        """Tell the user something in one line."""
        self.console.print(remark, highlight=False, soft_wrap=True)

    def begin(self) -> None:
        """Make the folder and put the recipe there; called once everything that can be checked was, by all processes."""
        distributed.barrier()
        self.folder.write_text(self.folder.recipe, recipe_to_toml(self.recipe))

    def go_on(self, training: Training, checkpoints: Path) -> None:
        """Load the newest checkpoint into a training, if there is one."""
        newest = latest_checkpoint(checkpoints)
        if newest is None:
            return
        saved = load_checkpoint(newest)
        if not saved.keys() >= {"training", "seconds"}:
            raise DfkdError(f"checkpoint {newest} is none of a run")
        training.load_state_dict(saved["training"])
        self._begin -= saved["seconds"]

    def drive(self, training: Training, checkpoints: Path, on_epoch: Callable[[Epoch], None]) -> None:
        """Run the epochs that are left, with a checkpoint every so many of them, and one when interrupted.

        Raises:
            Interrupted: by a signal; everything is saved, unless a step failed meanwhile, as the message then says.
            NonFiniteLossError: a loss became NaN or infinite; the message names the last good checkpoint, too.
            DfkdError: something could not be written, likewise.
        """

        def save() -> None:
            state = training.state_dict()  # every process has something to say
            self.folder.save_checkpoint({"training": state, "seconds": self.seconds}, checkpoints, training.iterations_done)

        with stopping_on_signals(training) as caught:
            try:
                for epoch in training:
                    on_epoch(epoch)
                    if epoch.number % self.recipe.report.checkpoint_every == 0 or training.finished:
                        save()
                if not training.finished:
                    save()
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error}; {_last_good(checkpoints)}") from error
            except OSError as error:
                raise DfkdError(f"{error}; {_last_good(checkpoints)}") from error
            except Exception as error:
                if not caught or isinstance(error, DfkdError):
                    raise
                # A terminal's Ctrl-C reaches the C++ compiler, too, that torch.compile has started, and the step fails for want of it.
                message = f"interrupted while a step failed: {first_line(error)}; {_last_good(checkpoints)}"
                raise Interrupted(message, caught[0]) from error
        if caught and not training.finished:
            raise Interrupted(f"interrupted and saved; go on with: {self.command} --out {self.folder.path} --resume", caught[0])


def open_run(
    command: str, recipe_name: str, overrides: dict[str, Any], out: Path | None, resume: bool, device: torch.device, console: Console
) -> Run:
    """A new run, or one that goes on; nothing is written yet.

    Its recipe has the precision that ``auto`` is on the device. A run that goes on keeps the recipe in its folder; overrides may
    only move its data and its teacher, and change what is reported.

    Args:
        command: "distill" or "teach".
        recipe_name: a shipped recipe or a TOML file.
        overrides: values by dotted path, over that recipe.
        out: the folder; by default one in ``runs/`` that is named after the recipe.
        resume: go on with what is there.
        device: where to compute.
        console: where to talk.

    Raises:
        DfkdError: the folder holds another run, or none to go on with.
    """
    recipe = load_recipe(recipe_name, overrides)
    default = Path("runs") / recipe.name
    # torchrun starts the very same command again where a process has died.
    resume = resume or (distributed.restarted() and RunFolder(out or _newest(default)).recipe.is_file())
    folder = RunFolder(out if out is not None else _newest(default) if resume else _free(default))
    if resume:
        named, recipe = recipe, _stored_recipe(folder, recipe.name, overrides)
        _confirm_code(folder, recipe, named)
    elif folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise DfkdError(f"--out {folder.path} already exists: choose another folder, or go on with that run by --resume")
    # Code is named again where a run goes on, see _confirm_code.
    code = [f" --set {path}={overrides[path]}" for path in ("teacher.model", "student.model") if names_code(str(overrides.get(path, "")))]
    return Run(resolved(recipe, device), folder, device, console, f"dfkd-fast {command} {recipe_name}{''.join(code)}")


def _stored_recipe(folder: RunFolder, name: str, overrides: dict[str, Any]) -> Recipe:
    if not folder.recipe.is_file():
        raise DfkdError(f"--resume: {folder.path} holds no run (no recipe.toml)")
    stored = load_recipe(str(folder.recipe))
    if stored.name != name:
        raise DfkdError(f"--resume: {folder.path} holds a run of recipe {stored.name!r}, not {name!r}")
    moved = load_recipe(str(folder.recipe), overrides)
    if moved.loop.precision == "auto":  # the run's own, wherever it began
        moved = replace(moved, loop=replace(moved.loop, precision=stored.loop.precision))
    for path, before, after in _differences(recipe_to_dict(stored), recipe_to_dict(moved)):
        if not any(path == free or path.startswith(f"{free}.") for free in MOVABLE):
            raise DfkdError(f"--resume: {path} is {before!r} in {folder.recipe}, and cannot become {after!r} in the middle of a run")
    return moved


def _confirm_code(folder: RunFolder, stored: Recipe, named: Recipe) -> None:
    """Raise a :class:`DfkdError` where only the folder's recipe names a function to run: the folder may be someone else's."""
    for path, model, confirmed in (
        ("teacher.model", stored.teacher.model, named.teacher.model),
        ("student.model", stored.student.model, named.student.model),
    ):
        if names_code(model) and model != confirmed:
            raise DfkdError(
                f"--resume: {path} = {model!r} in {folder.recipe}: code that a folder names is run only if the command line names it, too:"
                f" --set {path}={model}, or {folder.recipe} in RECIPE's place"
            )


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


def _numbered(default: Path) -> list[Path]:
    """The folders a default name stands for, oldest first: runs/digits, runs/digits-2, runs/digits-3."""
    found = [default] if default.exists() else []
    while (path := default.with_name(f"{default.name}-{len(found) + 1}")).exists():
        found.append(path)
    return found


def _free(default: Path) -> Path:
    taken = _numbered(default)
    return default.with_name(f"{default.name}-{len(taken) + 1}") if taken else default


def _newest(default: Path) -> Path:
    return next(reversed(_numbered(default)), default)
