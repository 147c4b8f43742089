"""Trial steps before a run begins, so that errors come before its folder exists and before a teacher is trained."""

import gc

import torch
from torch import nn

from dfkd_fast.engine.capture import Steps
from dfkd_fast.engine.compatibility import check_batch_of_one, check_trainable_network
from dfkd_fast.engine.optim import build_optimizer
from dfkd_fast.engine.prepare import prepare
from dfkd_fast.engine.state import TrainState
from dfkd_fast.log import LOGGER
from dfkd_fast.models import load_encoder, sample
from dfkd_fast.out_of_memory import memory_for, sizes_of
from dfkd_fast.recipe import Recipe
from dfkd_fast.run import Run
from dfkd_fast.surgery import restore_weights

from .networks import NETWORK_SIZES, check_storable, check_teacher, noise_images

__all__ = ["check_trainable", "initialize_student", "rehearse", "step_sizes"]


def rehearse(run: Run, teacher: nn.Module, student: nn.Module, generator: nn.Module) -> None:
    """Check the networks against the method, and take one step of every kind, before the run folder exists and a teacher is trained.

    Args:
        run: about to begin.
        teacher, student, generator: the recipe's, untrained; unchanged, except that the student gets its initial weights.

    Raises:
        DfkdError: networks and method are incompatible, or do not fit in memory.
    """
    recipe, device = run.recipe, run.device
    build_optimizer(recipe.teacher_optimizer, [nn.Parameter(torch.zeros(1, device=device))], device)
    initialize_student(recipe, student, teacher)
    with memory_for("the networks", sizes_of(recipe, *NETWORK_SIZES)):
        check_teacher(recipe, teacher, device)
        check_storable("student", student)
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []), memory_for("the steps", sizes_of(recipe, *step_sizes(recipe))):
        state = prepare(teacher, student, generator, recipe, seed=recipe.seed, device=device, teacher_trained=False)
        if not recipe.teacher.weights and not run.folder.teacher.is_file() and not run.resumed:
            _take_each_step(recipe, state)
    del state
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def _take_each_step(recipe: Recipe, state: TrainState) -> None:
    """Take and undo every kind of step, and run what happens between epochs."""
    LOGGER.debug("trying every kind of step once")
    Steps(state).warm_up()  # not compiled
    with memory_for("the grid of samples", sizes_of(recipe, "report.samples", "data.image_size")):
        sample(state.generator, recipe.report.samples, state.device)
    with memory_for("the drift measurement", sizes_of(recipe, "loop.drift_samples", "data.image_size")):
        state.drift.measure(state.student, state.generators)


def step_sizes(recipe: Recipe) -> list[str]:
    """Returns dotted paths of the settings, beside the networks, that the memory of the steps depends on."""
    policy = recipe.replay.policy
    of_policy = [f"replay.{recipe.replay.kind}.{name}" for name, value in vars(policy).items() if type(value) is int] if policy else []
    return ["loop.batch_size", "data.image_size", "generator.width", "replay.rows", *of_policy]


def check_trainable(recipe: Recipe, teacher: nn.Module, device: torch.device) -> None:
    """Raise a :class:`DfkdError` if the teacher cannot be trained with the recipe's settings, or cannot be saved."""
    check_storable("teacher", teacher)
    check_trainable_network("teacher", teacher, noise_images(recipe, 4, device), "data.image_size's")
    if recipe.teacher.batch_size == 1:  # the last batch of an epoch never has a single image otherwise
        check_batch_of_one("teacher.batch_size = 1", "teacher", teacher, noise_images(recipe, 1, device), "data.image_size's")


def initialize_student(recipe: Recipe, student: nn.Module, teacher: nn.Module) -> None:
    """Load the initial weights that the recipe names: the teacher's, or ``student.encoder_weights`` into the encoder of a segmenter."""
    if recipe.student.is_quantized:
        restore_weights(student, teacher, noise_images(recipe, 2, next(student.parameters()).device))
    elif recipe.student.init == "teacher":
        student.load_state_dict(teacher.state_dict())
    if initial := recipe.student.encoder_weights:
        load_encoder(student, teacher if initial == "teacher" else initial)
