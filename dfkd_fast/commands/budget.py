"""Number of epochs of a run with ``loop.budget``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from dfkd_fast.engine import Epoch, checkpoint, within_budget
from dfkd_fast.engine.budget import typical_seconds
from dfkd_fast.engine.state import TrainState
from dfkd_fast.log import LOGGER
from dfkd_fast.out_of_memory import memory_for, sizes_of
from dfkd_fast.recipe import Recipe, recipe_to_toml
from dfkd_fast.recipe_files import BUDGET_RECORD
from dfkd_fast.report import RunFolder
from dfkd_fast.run import Run

from .rehearsal import step_sizes

__all__ = ["choose_epochs"]

WriteSamples = Callable[[Recipe, RunFolder, Sequence[nn.Module], nn.Module, Sequence[Epoch], float | None], None]
EPOCHS = 20
"""Number of epochs in the curves that are drawn to measure how long that takes."""


def choose_epochs(
    run: Run,
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
    evaluate: Callable[[nn.Module], float] | None,
    write_samples: WriteSamples,
) -> Recipe:
    """Replaces the run's recipe by one with ``loop.epochs`` computed from ``loop.budget``, and a record of that in ``[provenance]``.

    The networks are unchanged. With several processes, all of them must call it.

    Returns:
        The new recipe of the run.

    Raises:
        DfkdError: the budget is shorter than one epoch.
    """
    recipe = run.recipe
    LOGGER.info("budget %s: measuring the duration of an iteration", recipe.loop.budget)

    def report(state: TrainState) -> float:
        """Returns the mean duration per epoch of checkpoints, samples and curves."""
        accuracy, agreement = (None, 50.0) if evaluate is None else (50.0, None)
        history = [Epoch(number, 1.0, {"student": 1.0}, accuracy, agreement=agreement) for number in range(1, EPOCHS + 1)]
        with TemporaryDirectory() as path:
            folder = RunFolder(Path(path))

            def save() -> None:
                saved = {"training": checkpoint.state_dict(state), "seconds": 0.0, "recipe": recipe_to_toml(recipe)}
                folder.save_checkpoint(saved, folder.checkpoints, 1)

            def draw() -> None:
                write_samples(recipe, folder, [teacher, state.saved_networks["student"]], state.generator, history, None)

            return (
                typical_seconds(save, state.device) / recipe.report.checkpoint_every
                + typical_seconds(draw, state.device) / recipe.report.samples_every
            )

    with memory_for("the steps", sizes_of(recipe, *step_sizes(recipe))):
        measured, line = within_budget(
            *(teacher, student, generator, recipe),
            evaluate=evaluate,
            measure_agreement=evaluate is None or recipe.student.is_quantized,
            report=report,
            seed=recipe.seed,
            device=run.device,
            teacher_trained=False,
        )
    LOGGER.info("%s", line)
    run.recipe = replace(measured, provenance=recipe.provenance | {BUDGET_RECORD: line.removeprefix("budget ")})
    return run.recipe
