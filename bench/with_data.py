"""Distillation with data: the student steps of a recipe on real training images, to compare generated ones with."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from dfkd_fast import Recipe, Trainer
from dfkd_fast.commands.networks import build_networks, load_given_teacher
from dfkd_fast.data import batches, open_split
from dfkd_fast.engine.precision import default_modes
from dfkd_fast.engine.state import TrainState
from dfkd_fast.engine.steps import train_student
from dfkd_fast.errors import DfkdError, NonFiniteLossError
from dfkd_fast.evaluation import Evaluator
from dfkd_fast.methods import Batch, Part

from .provenance import LOOPS, Provenance, measured_on

__all__ = ["Row", "measure"]


@dataclass(frozen=True)
class Row:
    """Accuracy of a student that was distilled on real images."""

    recipe: str
    teacher: str
    student: str
    augment: str
    """``teacher.augment`` of the recipe, applied to the images."""
    metric: str
    """Metric of the accuracies, which are in percent; it names held-out images if the recipe holds some out."""
    student_samples: int
    teacher_accuracy: float
    student_accuracy: float
    """In the last epoch."""
    seconds: float
    """Of the student steps, without evaluations."""
    seed: int
    provenance: Provenance = field(kw_only=True, metadata={"columns": LOOPS})


def measure(recipe: Recipe, device: torch.device, command: str, report: Callable[[str], None]) -> Row:
    """Distill a recipe's student on the training split instead of generated images.

    Loss, optimizer, schedule, batch size and number of student steps are the recipe's. Labels are not used.

    Args:
        recipe: Recipe with ``teacher.weights``, without replay.
        device: Device of the networks.
        command: Command line, for the provenance.
        report: Called with a line for every evaluation.

    Raises:
        DfkdError: The recipe has no teacher weights, replays samples, or splits batches; there are no two training images.
        NonFiniteLossError: The student's loss became NaN or infinite.
    """
    loop = recipe.loop
    if not recipe.teacher.weights:
        raise DfkdError("teacher.weights: not set; distillation with data needs a trained teacher")
    if recipe.replay.replays:
        raise DfkdError(f"replay.kind = {recipe.replay.kind!r}: must be 'none', since real images do not change")
    if recipe.engine.micro_batches > 1:
        raise DfkdError(f"engine.micro_batches = {recipe.engine.micro_batches}: must be 1, since the last batch of the images is smaller")
    provenance = measured_on(device, command)
    teacher, student, generator = build_networks(recipe, device)
    load_given_teacher(recipe, teacher, report)
    evaluate = Evaluator(recipe.data, device, report)
    trainer = Trainer(teacher, student, generator, recipe, seed=recipe.seed, device=device)
    teacher_accuracy = evaluate(teacher)
    real = _labelled_batches(trainer.state, recipe)
    steps = loop.iterations_per_epoch * loop.student_steps
    samples, seconds, accuracy = 0, 0.0, 0.0
    for epoch in range(1, loop.epochs + 1):
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in islice(real, steps):
            with default_modes(device):
                total += train_student(trainer.state, batch)["student"]
            samples += len(batch.images)
        if not total.isfinite():
            raise NonFiniteLossError(f"the student's loss is {total.item() / steps} in epoch {epoch}")
        trainer.state.schedules[0].step()
        seconds += time.perf_counter() - start
        if epoch % loop.evaluate_every == 0 or epoch == loop.epochs:
            accuracy = evaluate(trainer.result)
            report(f"student {epoch}/{loop.epochs}  {recipe.data.metric} {accuracy:.2f} %  {seconds:.0f} s")
    return Row(
        recipe=recipe.name,
        teacher=recipe.teacher.model,
        student=recipe.student.model,
        augment=recipe.teacher.augment,
        metric=recipe.data.metric,
        student_samples=samples,
        teacher_accuracy=teacher_accuracy,
        student_accuracy=accuracy,
        seconds=round(seconds, 1),
        seed=recipe.seed,
        provenance=provenance,
    )


def _labelled_batches(state: TrainState, recipe: Recipe) -> Iterator[Batch]:
    """Yields batches of training images with the teacher's outputs, without end."""
    split = open_split(recipe.data, "train", augment=recipe.teacher.augment)
    stream = torch.Generator().manual_seed(recipe.seed)
    loader = batches(split, recipe.loop.batch_size, shuffle=True, workers=recipe.data.workers, generator=stream)
    if len(loader) == 0:
        raise DfkdError("there is no batch of training images: at least two images are needed")
    layout = torch.channels_last if recipe.engine.channels_last else torch.contiguous_format
    for images, _ in chain.from_iterable(repeat(loader)):
        yield _labelled(state, images.to(state.images, memory_format=layout))


@torch.no_grad()
def _labelled(state: TrainState, images: Tensor) -> Batch:
    with state.precision.autocast():
        logits, vectors = (state.teacher(images), None) if state.features is None else state.features.teacher(images)
    return Batch(images, logits, [Part(len(images), state.method.objective.student_weight)], vectors)
