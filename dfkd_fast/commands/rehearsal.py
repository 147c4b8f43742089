"""What is tried before a run begins: what cannot work is said before its folder exists and before a teacher is trained."""

import gc

import torch
from torch import nn

from dfkd_fast.engine.capture import Steps
from dfkd_fast.engine.compatibility import check_batch_of_one, check_learner
from dfkd_fast.engine.optim import build_optimizer
from dfkd_fast.engine.prepare import prepare
from dfkd_fast.engine.state import TrainState
from dfkd_fast.log import LOGGER
from dfkd_fast.models import load_encoder, sample
from dfkd_fast.out_of_memory import memory_for, sizes_of
from dfkd_fast.recipe import Recipe
from dfkd_fast.run import Run

from .networks import NETWORK_SIZES, check_storable, check_teacher, noise_images

__all__ = ["check_trainable", "initialize_encoder", "rehearse", "step_sizes"]


def rehearse(run: Run, teacher: nn.Module, student: nn.Module, generator: nn.Module) -> None:
    """Find out what cannot work before the run's folder exists, and before a teacher is trained, if one is, by one step of every kind.

    Args:
        run: that is about to begin.
        teacher, student, generator: the recipe's, untrained; nothing of them changes, but for the student's encoder, which begins
            with its weights.

    Raises:
        DfkdError: networks and method do not fit each other, or need more memory than there is.
    """
    recipe, device = run.recipe, run.device
    build_optimizer(recipe.teacher_optimizer, [nn.Parameter(torch.zeros(1, device=device))], device)
    initialize_encoder(recipe, student, teacher)
    with memory_for("the networks", sizes_of(recipe, *NETWORK_SIZES)):
        check_teacher(recipe, teacher, device)
        check_storable("student", student)
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []), memory_for("the steps", sizes_of(recipe, *step_sizes(recipe))):
        state = prepare(teacher, student, generator, recipe, seed=recipe.seed, device=device, trained=False)
        if not recipe.teacher.weights and not run.folder.teacher.is_file() and not run.resumed:
            _take_each_step(recipe, state)
    del state
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def _take_each_step(recipe: Recipe, state: TrainState) -> None:
    """Take every kind of step and take it back, and what is done between epochs."""
    LOGGER.debug("trying every kind of step once")
    if not recipe.engine.compile:  # which takes minutes, and less memory than the same steps would uncompiled
        Steps(state).warm_up()
    with memory_for("a picture of samples", sizes_of(recipe, "report.samples", "data.image_size")):
        sample(state.generator, recipe.report.samples, state.device)
    with memory_for("the comparison of predictions", sizes_of(recipe, "loop.drift_samples", "data.image_size")):
        state.drift.measure(state.student, state.generators)


def step_sizes(recipe: Recipe) -> list[str]:
    """What the memory of the steps depends on, beside the networks: dotted paths of settings."""
    policy = recipe.replay.policy
    of_policy = [f"replay.{recipe.replay.kind}.{name}" for name, value in vars(policy).items() if type(value) is int] if policy else []
    return ["loop.batch_size", "data.image_size", "generator.width", "replay.rows", *of_policy]


def check_trainable(recipe: Recipe, teacher: nn.Module, device: torch.device) -> None:
    """Raise a :class:`DfkdError` for a teacher that cannot be trained as its recipe says, or cannot be stored."""
    check_storable("teacher", teacher)
    check_learner("teacher", teacher, noise_images(recipe, 4, device), "data.image_size's")
    if recipe.teacher.batch_size == 1:  # of larger batches, no last one has a single image
        check_batch_of_one("teacher.batch_size = 1", "teacher", teacher, noise_images(recipe, 1, device), "data.image_size's")


def initialize_encoder(recipe: Recipe, student: nn.Module, teacher: nn.Module) -> None:
    """Give a segmenter's encoder the weights that ``student.encoder_weights`` names."""
    if initial := recipe.student.encoder_weights:
        load_encoder(student, teacher if initial == "teacher" else initial)
