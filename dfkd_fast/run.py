"""A run: from a recipe to a folder with a distilled student and everything about how it came to be."""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torchvision
from rich.console import Console
from torch import nn

import dfkd_fast

from .data import batches, open_split
from .engine import Epoch, Trainer
from .engine.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .engine.device import peak_memory_bytes
from .engine.fit import check_classifier, check_networks
from .engine.teach import TeacherTrainer
from .errors import DfkdError, NonFiniteLossError
from .evaluation import retention, top1_accuracy
from .interrupt import Interrupted, stopping_on_signals
from .models import build_classifier, build_generator, load_weights, read_metadata, save_weights
from .recipe import Recipe, load_recipe, recipe_from_toml, recipe_to_toml
from .report import Progress, RunFolder, print_table

__all__ = ["Evaluated", "distill", "evaluate_weights", "open_run", "teach"]

# What may differ when a run goes on elsewhere: where things lie, and what is written about it.
MOVABLE = {"data.root", "data.workers", "teacher.weights", "report"}


class Training(Protocol):
    """What teacher training and distillation have in common."""

    finished: bool
    iterations_done: int

    def __iter__(self) -> Any: ...
    def stop(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """One folder and the wall-clock time spent on it, over all the commands that worked there."""

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

    def go_on(self, training: Training, checkpoints: Path) -> None:
        """Load the newest checkpoint into a training, if there is one."""
        newest = latest_checkpoint(checkpoints)
        if newest is not None:
            saved = load_checkpoint(newest)
            training.load_state_dict(saved.get("training", {}))
            self._begin -= saved["seconds"]

    def drive(self, training: Training, checkpoints: Path, on_epoch: Callable[[Epoch], None]) -> None:
        """Run the epochs that are left, with a checkpoint every so many of them, and one when interrupted."""

        def save() -> None:
            save_checkpoint({"training": training.state_dict(), "seconds": self.seconds}, checkpoints, training.iterations_done)

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
        if caught and not training.finished:
            raise Interrupted(f"interrupted and saved; go on with: {self.command} --out {self.folder.path} --resume", caught[0])


def open_run(recipe_name: str, overrides: dict[str, Any], out: Path | None, resume: bool) -> tuple[Recipe, RunFolder]:
    """The recipe and the folder of a new run, or of one that goes on.

    A run that goes on keeps the recipe in its folder; overrides may only move its data and its teacher.

    Raises:
        DfkdError: the folder holds another run, or none to go on with.
    """
    recipe = load_recipe(recipe_name, overrides)
    default = Path("runs") / recipe.name
    if not resume:
        folder = RunFolder(out if out is not None else _free(default))
        if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
            raise DfkdError(f"--out {folder.path} already exists: choose another folder, or go on with that run by --resume")
        folder.write_text(folder.recipe, recipe_to_toml(recipe))
        return recipe, folder

    folder = RunFolder(out if out is not None else _newest(default))
    if not folder.recipe.is_file():
        raise DfkdError(f"--resume: {folder.path} holds no run (no recipe.toml)")
    stored = load_recipe(str(folder.recipe))
    if stored.name != recipe.name:
        raise DfkdError(f"--resume: {folder.path} holds a run of recipe {stored.name!r}, not {recipe.name!r}")
    moved = load_recipe(str(folder.recipe), overrides)
    for path, before, after in _differences(asdict(stored), asdict(moved)):
        if not any(path == free or path.startswith(f"{free}.") for free in MOVABLE):
            raise DfkdError(f"--resume: {path} is {before!r} in {folder.recipe}, and cannot become {after!r} in the middle of a run")
    return moved, folder


def teach(recipe: Recipe, folder: RunFolder, device: torch.device, console: Console) -> float:
    """Train the recipe's teacher and store it in the folder; returns its test accuracy in percent."""
    run = Run(recipe, folder, device, console, f"dfkd-fast teach {recipe.name}")
    teacher = _build(recipe, "teacher").to(device)
    images = torch.zeros(2, recipe.data.channels, recipe.data.image_size, recipe.data.image_size, device=device)
    check_classifier("teacher", teacher, images, "data.image_size's")
    if folder.teacher.is_file():
        load_weights(teacher, folder.teacher)
    else:
        _train_teacher(run, teacher)
    accuracy = _evaluator(recipe, device)(teacher)
    print_table(console, ("", ""), [("teacher", recipe.teacher.model), ("top-1", f"{accuracy:.2f} %"), ("weights", str(folder.teacher))])
    return accuracy


def distill(recipe: Recipe, folder: RunFolder, device: torch.device, console: Console) -> dict[str, Any]:
    """Distil the recipe's student, going on from the folder's newest checkpoint; returns the summary."""
    run = Run(recipe, folder, device, console, f"dfkd-fast distill {recipe.name}")
    evaluate = None if recipe.data.name == "none" else _evaluator(recipe, device)
    teacher, student = _build(recipe, "teacher").to(device), _build(recipe, "student").to(device)
    generator = build_generator(recipe.generator, recipe.data.channels, recipe.data.image_size).to(device)
    check_networks(teacher, student, generator, device)
    teacher_seconds = _obtain_weights(run, teacher)
    teacher_accuracy = evaluate(teacher) if evaluate else None

    trainer = Trainer(teacher, student, generator, recipe, evaluate=evaluate, seed=recipe.seed, device=device)
    run.go_on(trainer, folder.checkpoints)
    _train_student(run, trainer, teacher_accuracy)

    save_weights(trainer.student, folder.student, _metadata(recipe, "student"))
    folder.draw_curves(trainer.history, teacher_accuracy, f"{recipe.name}, seed {recipe.seed}")
    summary = _summarise(run, trainer, teacher_accuracy, teacher_seconds)
    folder.write_summary(summary)
    _print_summary(console, summary, folder)
    return summary


@dataclass(frozen=True)
class Evaluated:
    """What one file of weights is worth."""

    weights: str
    role: str
    model: str
    top1: float
    """In percent."""
    count: int
    """Images it was tested on."""


def evaluate_weights(path: Path, recipe: Recipe | None, role: str | None, overrides: dict[str, Any], device: torch.device) -> list[Evaluated]:
    """Test-set accuracy of a file of weights, or of the student and the teacher in a run's folder.

    Args:
        path: the file or the folder.
        recipe: what says the network and the data; by default the one in the file's header.
        role: "teacher" or "student"; by default the one in the file's header.
        overrides: values by dotted path, over that recipe.
        device: where it is evaluated.

    Raises:
        DfkdError: nothing to evaluate, or nothing that says what network it is.
    """
    if path.is_dir():
        folder = RunFolder(path)
        found = [file for file in (folder.student, folder.teacher) if file.is_file()]
        if not found:
            raise DfkdError(f"{path} holds neither student.safetensors nor teacher.safetensors")
        return [result for file in found for result in evaluate_weights(file, recipe, role, overrides, device)]
    metadata = read_metadata(path) if path.exists() else {}
    role = role or metadata.get("role")
    if recipe is None and "recipe" in metadata:
        recipe = recipe_from_toml(metadata["recipe"], f"recipe in {path}", overrides)
    if path.exists() and (recipe is None or role not in ("teacher", "student")):
        raise DfkdError(f"{path} does not say what network it is: give --recipe and --role teacher or student")
    if recipe is None or role not in ("teacher", "student"):
        raise DfkdError(f"weights {path} not found")
    network = _build(recipe, role).to(device)
    load_weights(network, path)
    split = open_split(recipe.data, "test")
    loader = batches(split, recipe.data.batch_size, workers=recipe.data.workers)
    model = recipe.teacher.model if role == "teacher" else recipe.student.model
    return [Evaluated(str(path), role, model, top1_accuracy(network, loader, device), len(split))]  # type: ignore[arg-type]


def _obtain_weights(run: Run, teacher: nn.Module) -> float:
    """Give the teacher its weights: the user's, the folder's, or trained ones; returns the seconds of the training."""
    wanted = run.recipe.teacher.weights
    if wanted:
        load_weights(teacher, Path(wanted).expanduser())
        return 0.0
    if run.folder.teacher.is_file():
        load_weights(teacher, run.folder.teacher)
        return float(read_metadata(run.folder.teacher).get("seconds", 0.0))
    return _train_teacher(run, teacher)


def _train_teacher(run: Run, teacher: nn.Module) -> float:
    """Train on the training split, which nothing outside this function ever holds; returns the seconds it took."""
    recipe = run.recipe
    stream = torch.Generator().manual_seed(recipe.seed)
    train = open_split(recipe.data, "train", augment=recipe.teacher.augment)
    loader = batches(train, recipe.teacher.batch_size, shuffle=True, workers=recipe.data.workers, generator=stream)
    training = TeacherTrainer(teacher, loader, recipe.teacher_optimizer, recipe.teacher.epochs, stream, run.device)
    run.go_on(training, run.folder.teacher_checkpoints)
    with Progress(run.console, "teacher", recipe.teacher.epochs, done=training.done) as progress:
        run.drive(training, run.folder.teacher_checkpoints, progress.epoch)
    seconds = training.clock.read()["teacher"]
    save_weights(teacher, run.folder.teacher, _metadata(recipe, "teacher") | {"seconds": f"{seconds:.3f}"})
    return seconds


def _train_student(run: Run, trainer: Trainer, teacher_accuracy: float | None) -> None:
    recipe, folder = run.recipe, run.folder

    def report(epoch: Epoch) -> None:
        progress.epoch(epoch)
        folder.log(epoch)
        if epoch.number % recipe.report.samples_every == 0 or trainer.finished:
            folder.draw_samples(trainer.sample(recipe.report.samples), recipe.data.mean, recipe.data.std, epoch.number)
            folder.draw_curves(trainer.history, teacher_accuracy, f"{recipe.name}, seed {recipe.seed}")

    folder.begin_log(trainer.history)
    try:
        with Progress(run.console, "student", recipe.loop.epochs, recipe.loop.iterations_per_epoch, trainer.iterations_done) as progress:
            trainer.on_iteration = lambda trainer: progress.iteration(trainer.iterations_done)
            run.drive(trainer, folder.checkpoints, report)
    finally:
        folder.end_log()


def _evaluator(recipe: Recipe, device: torch.device) -> Callable[[nn.Module], float]:
    loader = batches(open_split(recipe.data, "test"), recipe.data.batch_size, workers=recipe.data.workers)
    return lambda network: top1_accuracy(network, loader, device)


def _build(recipe: Recipe, role: str) -> nn.Module:
    """A freshly initialised teacher or student, the same for the same seed whatever was built before."""
    torch.manual_seed(recipe.seed)
    name = recipe.teacher.model if role == "teacher" else recipe.student.model
    return build_classifier(name, recipe.data.num_classes, recipe.data.channels)


def _metadata(recipe: Recipe, role: str) -> dict[str, str]:
    return {"role": role, "recipe": recipe_to_toml(recipe), "version": dfkd_fast.__version__}


def _summarise(run: Run, trainer: Trainer, teacher_accuracy: float | None, teacher_seconds: float) -> dict[str, Any]:
    accuracies = [epoch.student_accuracy for epoch in trainer.history if epoch.student_accuracy is not None]
    phases = trainer.clock.read()
    return {
        "recipe": run.recipe.name,
        "device": run.device.type,
        "device_name": _device_name(run.device),
        "versions": _versions(),
        "seed": run.recipe.seed,
        "teacher_accuracy": teacher_accuracy,
        "student_accuracy": asdict(retention(accuracies)) if accuracies else None,
        "seconds": {
            "total": run.seconds,
            "teacher": teacher_seconds,
            "generator": phases.get("generator", 0.0),
            "student": phases.get("student", 0.0),
            "evaluation": phases.get("evaluation", 0.0),
        },
        "peak_memory_bytes": peak_memory_bytes(run.device),
    }


def _print_summary(console: Console, summary: dict[str, Any], folder: RunFolder) -> None:
    student, seconds = summary["student_accuracy"], summary["seconds"]
    rows = []
    if student is not None:
        rows += [
            ("teacher", f"{summary['teacher_accuracy']:.2f} %"),
            ("student, last epoch", f"{student['last']:.2f} %"),
            ("student over all epochs", f"best {student['best']:.2f} %, mean {student['mean']:.2f} %, variance {student['variance']:.2f}"),
        ]
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    rows += [("seconds", f"{seconds['total']:.1f} ({parts})"), ("everything is in", str(folder.path))]
    print_table(console, (summary["recipe"], f"seed {summary['seed']}, {summary['device']}"), rows)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str | None]:
    return {
        "dfkd_fast": dfkd_fast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "cuda": torch.version.cuda,
    }


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in before.keys() | after.keys():
        one, other = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append((prefix + key, one, other))
    return sorted(found)


def _last_good(checkpoints: Path) -> str:
    newest = latest_checkpoint(checkpoints)
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def _numbered(default: Path) -> list[Path]:
    """The folders a default name stands for, oldest first: runs/digits, runs/digits-2, runs/digits-3."""
    found = [default] if default.exists() else []
    number = 2
    while (path := default.with_name(f"{default.name}-{number}")).exists():
        found.append(path)
        number += 1
    return found


def _free(default: Path) -> Path:
    taken = _numbered(default)
    return default.with_name(f"{default.name}-{len(taken) + 1}") if taken else default


def _newest(default: Path) -> Path:
    return next(reversed(_numbered(default)), default)


