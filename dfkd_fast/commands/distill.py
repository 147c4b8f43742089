"""``dfkd-fast distill``."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import torch
import torchvision
from rich.console import Console
from torch import nn

import dfkd_fast
from dfkd_fast import distributed
from dfkd_fast.console import print_table
from dfkd_fast.data import palette
from dfkd_fast.engine import Epoch, Trainer
from dfkd_fast.engine.agreement import AGREEMENT_SAMPLES
from dfkd_fast.engine.batch_size import largest_batch_size
from dfkd_fast.engine.device import device_name
from dfkd_fast.errors import DfkdError
from dfkd_fast.evaluation import Evaluator, chance, is_at_chance, retention
from dfkd_fast.log import LOGGER
from dfkd_fast.models import sample
from dfkd_fast.out_of_memory import memory_for, sizes_of
from dfkd_fast.recipe import Recipe
from dfkd_fast.recipe_files import BUDGET_RECORD
from dfkd_fast.report import Progress, RunFolder
from dfkd_fast.report.html import write_report
from dfkd_fast.run import Run
from dfkd_fast.surgery import eval_mode

from .budget import choose_epochs
from .networks import build_networks
from .quantized import calibration_row, float_layers, record_calibration, size_row, write_quantized
from .rehearsal import initialize_student, rehearse, step_sizes
from .segmentation import label_maps, print_iou
from .teach import obtain_teacher, teacher_warning, weights_metadata

__all__ = ["auto_batch_size", "distill"]


def distill(run: Run) -> dict[str, Any]:
    """Distill the recipe's student, resuming from the newest checkpoint of the run folder.

    The trainer never sees the data: it calls ``evaluate``, whose result is only reported.

    Returns:
        The content of ``summary.json``.
    """
    recipe, folder, device = run.recipe, run.folder, run.device
    teacher, student, generator = build_networks(recipe, device)
    rehearse(run, teacher, student, generator)
    evaluate = _evaluator(run)
    if recipe.loop.budget:
        recipe = choose_epochs(run, teacher, student, generator, evaluate, _write_samples)
    teacher_seconds = obtain_teacher(run, teacher, evaluate)
    if evaluate is None and recipe.data.has_images:
        run.note(
            "data.root is not set: no accuracy is measured, but the student's agreement with the teacher on"
            f" {AGREEMENT_SAMPLES:,} generated samples"
        )
    with memory_for("the evaluation", sizes_of(recipe, "data.batch_size", "data.image_size")):
        teacher_accuracy = evaluate(teacher) if evaluate else None
    if teacher_accuracy is not None and (warning := teacher_warning(recipe, teacher_accuracy)):
        run.note(warning)
    initialize_student(recipe, student, teacher)

    measure_agreement = evaluate is None or recipe.student.is_quantized
    trainer = Trainer(
        *(teacher, student, generator, recipe), evaluate=evaluate, measure_agreement=measure_agreement, seed=recipe.seed, device=device
    )
    run.resume(trainer, folder.checkpoints)
    for note in filter(None, (float_layers(recipe, student), *trainer.notes)):
        run.note(note)
    before = run.seconds - sum(trainer.state.clock.read().values())
    _train_student(run, trainer, teacher_accuracy)
    training_seconds = run.seconds - before
    iou = evaluate.iou({"teacher": teacher, "student": trainer.result}) if evaluate else {}

    folder.save_weights(trainer.result, folder.student, weights_metadata(recipe, "student"))
    folder.plot_curves(trainer.history, teacher_accuracy, f"{recipe.name}, seed {recipe.seed}", recipe.data.metric)
    quantized = {"quantized": write_quantized(run, teacher, trainer.result)} if recipe.student.is_quantized else {}
    summary = _summarize(run, trainer, teacher_accuracy, teacher_seconds) | ({"iou": iou} if iou else {}) | quantized
    if BUDGET_RECORD in recipe.provenance:
        summary["budget"] = {"computed": recipe.provenance[BUDGET_RECORD], "training_seconds": training_seconds}
    folder.write_summary(summary)
    write_report(folder)
    _print_summary(run.console, summary, folder)
    print_iou(run.console, iou)
    return summary


def auto_batch_size(recipe: Recipe, device: torch.device) -> Recipe:
    """Returns the recipe with the largest power of 2 as ``loop.batch_size`` that fits the GPU.

    Raises:
        DfkdError: there is no GPU, or not even the smallest batch fits.
    """
    if device.type != "cuda":
        raise DfkdError(f"--auto-batch-size: needs a GPU, and the device is {device.type!r}")
    if distributed.world_size() > 1:
        raise DfkdError("--auto-batch-size: works on one GPU; run it in a single process, then set loop.batch_size")

    data = recipe.data

    def with_batch(size: int) -> Recipe:
        return replace(recipe, loop=replace(recipe.loop, batch_size=size, budget=""))

    def attempt(size: int) -> None:
        trainer = Trainer(*build_networks(recipe, device), with_batch(size), device=device)
        trainer.steps.warm_up()
        if data.has_images:  # evaluation between two epochs, while the steps keep their memory
            images = torch.zeros(data.batch_size, data.channels, data.image_size, data.image_size, device=trainer.device)
            with eval_mode(trainer.result):
                trainer.result(images.to(memory_format=torch.channels_last))

    smallest = max(2, recipe.engine.micro_batches, recipe.replay.smallest_batch)
    size = largest_batch_size(attempt, smallest)
    if size == 0:
        raise DfkdError(
            f"--auto-batch-size: not even {smallest} samples fit: use smaller networks, engine.micro_batches or generator.checkpointing"
        )
    LOGGER.info("--auto-batch-size: loop.batch_size = %d (the recipe has %d)", size, recipe.loop.batch_size)
    return replace(recipe, loop=replace(recipe.loop, batch_size=size))


def _evaluator(run: Run) -> Evaluator | None:
    """Returns the evaluator on the recipe's data; None if there is none, which a teacher with weights does not need."""
    data = run.recipe.data
    if data.has_images and not data.can_be_opened and run.recipe.teacher.weights:
        return None
    return Evaluator(data, run.device, run.note) if data.has_images else None


def _train_student(run: Run, trainer: Trainer, teacher_accuracy: float | None) -> None:
    recipe, folder = run.recipe, run.folder

    def calibrated(trainer: Trainer) -> None:
        record_calibration(run, trainer)
        progress.begin_training()

    def report(epoch: Epoch) -> None:
        progress.epoch(epoch)
        if epoch is _first_quarter_epoch(recipe, trainer.history):
            for warning in _chance_warnings(recipe, trainer.history, teacher_accuracy):
                run.note(warning)
        folder.log(epoch)
        if epoch.student_accuracy is not None and epoch.student_accuracy >= max(_accuracies(trainer)):
            folder.save_weights(trainer.result, folder.best_student, weights_metadata(recipe, "student"))
        if epoch.number == 1 or epoch.number % recipe.report.samples_every == 0 or trainer.finished:
            _write_samples(recipe, folder, [trainer.teacher, trainer.result], trainer.state.generator, trainer.history, teacher_accuracy)

    if trainer.state.pretrained < recipe.loop.generator_pretraining:
        LOGGER.info("pretraining the generator for %d steps", recipe.loop.generator_pretraining - trainer.state.pretrained)
    folder.begin_log(trainer.history)
    try:
        loop, metric = recipe.loop, recipe.data.metric
        with Progress(run.console, "student", loop.epochs, loop.iterations_per_epoch, trainer.iterations_done, metric) as progress:
            trainer.on_pretraining = lambda trainer, losses: progress.pretraining(
                trainer.state.pretrained, loop.generator_pretraining, losses
            )
            trainer.on_calibration = calibrated
            trainer.on_iteration = lambda trainer: progress.iteration(trainer.iterations_done)
            run.train(trainer, folder.checkpoints, report, (*step_sizes(recipe), "data.batch_size", "report.samples"))
    finally:
        folder.end_log()


def _write_samples(
    recipe: Recipe,
    folder: RunFolder,
    networks: Sequence[nn.Module],
    generator: nn.Module,
    history: Sequence[Epoch],
    teacher_accuracy: float | None,
) -> None:
    """Write a grid of generated samples, with the label maps of segmenters, and the curves up to the last epoch."""
    images = sample(generator, recipe.report.samples, next(generator.parameters()).device)
    maps = label_maps(networks, images, palette(recipe.data)) if recipe.data.task == "segmentation" else []
    folder.save_samples(images, recipe.data.mean, recipe.data.std, history[-1].number, maps)
    folder.plot_curves(history, teacher_accuracy, f"{recipe.name}, seed {recipe.seed}", recipe.data.metric)


def _chance_warnings(recipe: Recipe, history: Sequence[Epoch], teacher_accuracy: float | None) -> list[str]:
    """Warnings for a teacher, or a student after a quarter of the epochs, that is no better than chance."""
    if teacher_accuracy is None:
        return []
    if warning := teacher_warning(recipe, teacher_accuracy):
        return [warning]
    epoch, data = _first_quarter_epoch(recipe, history), recipe.data
    if epoch is None or epoch.student_accuracy is None or not is_at_chance(epoch.student_accuracy, data):
        return []
    rates = (f"{name}.lr = {getattr(recipe, name).lr}" for name in ("student_optimizer", "generator_optimizer"))
    return [
        f"after {epoch.number} of {recipe.loop.epochs} epochs the student's {data.metric} is {epoch.student_accuracy:.2f} %,"
        f" which is chance ({chance(data):.2f} %); check the teacher's {data.metric} ({teacher_accuracy:.2f} %),"
        f" that data.mean and data.std are the teacher's, teacher.model and student.model, and {' and '.join(rates)}"
    ]


def _first_quarter_epoch(recipe: Recipe, history: Sequence[Epoch]) -> Epoch | None:
    """The first epoch with an evaluated student after a quarter of the run; None before."""
    quarter = recipe.loop.epochs / 4
    return next((epoch for epoch in history if epoch.number >= quarter and epoch.student_accuracy is not None), None)


def _accuracies(trainer: Trainer) -> list[float]:
    return [epoch.student_accuracy for epoch in trainer.history if epoch.student_accuracy is not None]


def _summarize(run: Run, trainer: Trainer, teacher_accuracy: float | None, teacher_seconds: float) -> dict[str, Any]:
    accuracies, phases = _accuracies(trainer), trainer.state.clock.read()
    student_accuracy = statistics = None
    if accuracies and teacher_accuracy is not None:
        statistics = asdict(retention(accuracies, teacher_accuracy - run.recipe.report.retained_within))
        student_accuracy = {name: statistics[name] for name in ("last", "best", "mean", "variance")}
    drifts = [epoch.drift for epoch in trainer.history if epoch.drift]
    agreements = [epoch.agreement for epoch in trainer.history if epoch.agreement is not None]
    return {
        "recipe": run.recipe.name,
        "device": run.device.type,
        "device_name": device_name(run.device),
        "versions": _versions(),
        "seed": run.recipe.seed,
        "precision": run.recipe.engine.precision,
        "metric": run.recipe.data.metric,
        "teacher_accuracy": teacher_accuracy,
        "student_accuracy": student_accuracy,
        "agreement": {"last": agreements[-1], "best": max(agreements), "samples": AGREEMENT_SAMPLES} if agreements else None,
        "retention": statistics,
        "notes": [*trainer.notes, *_chance_warnings(run.recipe, trainer.history, teacher_accuracy)],
        "drift": {name: fmean(drift[name] for drift in drifts) for name in drifts[0]} if drifts else None,
        "seconds": {
            "total": run.seconds,
            "teacher": teacher_seconds,
            **({"compilation": phases["compilation"]} if "compilation" in phases else {}),
            "generator": phases.get("generator", 0.0),
            **({"calibration": phases["calibration"]} if "calibration" in phases else {}),
            "student": phases.get("student", 0.0),
            "evaluation": phases.get("evaluation", 0.0),
        },
        "peak_memory_bytes": trainer.state.clock.overall_peak_bytes(),
        "peak_memory_bytes_by_phase": trainer.state.clock.peak_bytes or None,
    }


def _print_summary(console: Console, summary: dict[str, Any], folder: RunFolder) -> None:
    student, seconds = summary["student_accuracy"], summary["seconds"]
    quantized = summary.get("quantized")
    rows = [("metric", summary["metric"])] if "held-out" in summary["metric"] else []
    if student is not None:
        rows.append(("teacher", f"{summary['teacher_accuracy']:.2f} %"))
    if quantized is not None:
        rows.append(calibration_row(quantized))
    if student is not None:
        rows += [
            ("student, last epoch", f"{student['last']:.2f} %"),
            ("student, all epochs", f"best {student['best']:.2f} %, mean {student['mean']:.2f} %, variance {student['variance']:.2f}"),
            ("largest drop", f"{summary['retention']['largest_drop']:.2f} points"),
        ]
    if agreement := summary["agreement"]:
        rows.append(("agreement with the teacher", f"{agreement['last']:.2f} % of {agreement['samples']:,} generated samples"))
    if quantized is not None:
        rows.append(size_row(quantized))
    rows += [("note", note) for note in summary["notes"]]
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    if budget := summary.get("budget"):
        rows.append(("budget", f"{budget['computed']}; the training took {budget['training_seconds']:.1f} s"))
    rows += [("seconds", f"{seconds['total']:.1f} ({parts})"), ("folder", str(folder.path))]
    print_table(console, (summary["recipe"], f"seed {summary['seed']}, {summary['device']}"), rows)


def _versions() -> dict[str, str | None]:
    return {
        "dfkd_fast": dfkd_fast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "cuda": torch.version.cuda,
    }
