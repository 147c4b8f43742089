"""``dfkd-fast teach``, and the teacher of ``dfkd-fast distill``: loaded or trained."""

import torch
from torch import nn

import dfkd_fast
from dfkd_fast.console import print_table
from dfkd_fast.data import batches, open_split
from dfkd_fast.engine import Epoch
from dfkd_fast.engine.teach import TeacherTrainer
from dfkd_fast.errors import DfkdError
from dfkd_fast.evaluation import Evaluator, chance, is_at_chance
from dfkd_fast.models import load_encoder, load_weights, read_metadata
from dfkd_fast.out_of_memory import memory_for, sizes_of
from dfkd_fast.recipe import Recipe, recipe_to_toml
from dfkd_fast.report import Progress
from dfkd_fast.run import Run

from .networks import build_network, check_teacher, load_given_teacher, noise_images
from .rehearsal import check_trainable
from .segmentation import print_iou

__all__ = ["obtain_teacher", "teach", "teacher_warning", "weights_metadata"]

OF_THE_TEACHER = {"seed", "data", "teacher", "teacher_optimizer"}
"""Recipe sections that a trained teacher depends on."""
TEACHER_SIZES = ("teacher.batch_size", "data.image_size", "data.channels")
"""Settings that the memory of the teacher's training depends on."""


def teach(run: Run) -> float:
    """Train the recipe's teacher and save it in the run folder.

    Returns:
        The test accuracy, or mIoU, in percent.
    """
    recipe = run.recipe
    with memory_for("the teacher", sizes_of(recipe, "teacher.model", "data.image_size", "data.channels", "data.num_classes")):
        teacher = build_network(recipe, "teacher").to(run.device)
        check_teacher(recipe, teacher, run.device)
    evaluate = Evaluator(recipe.data, run.device, run.note)
    if weights := recipe.teacher.weights:
        run.note(f"teacher.weights = {weights!r}: this teacher is tested, and none is trained; --set teacher.weights= trains one")
    seconds = obtain_teacher(run, teacher, evaluate)
    accuracy = evaluate(teacher)
    if warning := teacher_warning(recipe, accuracy):
        run.note(warning)
    rows = [
        ("teacher", recipe.teacher.model),
        (recipe.data.metric, f"{accuracy:.2f} %"),
        ("weights", recipe.teacher.weights or str(run.folder.teacher)),
        *([("seconds", f"{seconds:.1f}")] if seconds else []),
    ]
    print_table(run.console, (recipe.name, f"seed {recipe.seed}, {run.device.type}"), rows)
    print_iou(run.console, evaluate.iou({"teacher": teacher}))
    return accuracy


def obtain_teacher(run: Run, teacher: nn.Module, evaluate: Evaluator | None) -> float:
    """Load or train the teacher: weights of the user, of the run folder, or newly trained. From here on the run folder exists.

    Args:
        run: of the recipe.
        teacher: modified in place.
        evaluate: returns a network's accuracy in percent.

    Returns:
        Seconds of the teacher's training, 0 for weights of the user.
    """
    stored = run.folder.teacher
    if run.recipe.teacher.weights:
        load_given_teacher(run.recipe, teacher, run.note)
        run.begin()
        return 0.0
    for name in ("sha256", "weights_key"):
        if value := getattr(run.recipe.teacher, name):
            raise DfkdError(f"teacher.{name} = {value!r}: requires a weight file: name it with --teacher FILE")
    if stored.is_file():
        metadata = read_metadata(stored)
        if "recipe" in metadata:
            run.check_owner(str(stored), metadata["recipe"], OF_THE_TEACHER)
        load_weights(teacher, stored)
        run.begin()
        seconds = float(metadata.get("seconds", 0.0))
        run.count_earlier(seconds)
        return seconds
    return _train_teacher(run, teacher, evaluate)


def _train_teacher(run: Run, teacher: nn.Module, evaluate: Evaluator | None) -> float:
    """Train on the training split, which nothing outside this function holds a reference to.

    Returns:
        Seconds of the training.
    """
    recipe, device = run.recipe, run.device
    check_trainable(recipe, teacher, device)
    stream = torch.Generator().manual_seed(recipe.seed)
    split = open_split(recipe.data, "train", augment=recipe.teacher.augment)
    loader = batches(split, recipe.teacher.batch_size, shuffle=True, workers=recipe.data.workers, generator=stream)
    if recipe.teacher.encoder_weights:
        load_encoder(teacher, recipe.teacher.encoder_weights)
    run.begin()
    settings, folder = recipe.teacher, run.folder
    training = TeacherTrainer(
        teacher,
        loader,
        recipe.teacher_optimizer,
        settings.epochs,
        stream,
        noise_images(recipe, 4, device),
        device,
        engine=recipe.engine,
        focal_gamma=settings.focal_gamma,
        ema_decay=settings.ema_decay,
        evaluate=evaluate,
        evaluate_every=settings.evaluate_every,
    )
    run.resume(training, folder.teacher_checkpoints, OF_THE_TEACHER)
    for note in training.notes:
        run.note(note)
    metric, done = recipe.data.metric, training.epochs_done * len(loader)

    def report(epoch: Epoch) -> None:
        progress.epoch(epoch)
        folder.log_teacher(training.history)
        folder.plot_teacher_curves(training.history, f"{recipe.name}, seed {recipe.seed}", metric)

    with Progress(run.console, "teacher", settings.epochs, len(loader), done, metric) as progress:
        training.on_batch = lambda count: progress.iteration(training.epochs_done * len(loader) + count)
        run.train(training, folder.teacher_checkpoints, report, TEACHER_SIZES)
    teacher.load_state_dict(training.result.state_dict())
    seconds = training.clock.read()["teacher"]
    folder.save_weights(teacher, folder.teacher, weights_metadata(recipe, "teacher") | {"seconds": f"{seconds:.3f}"})
    return seconds


def teacher_warning(recipe: Recipe, accuracy: float) -> str:
    """Returns a warning for a teacher that is no better than chance; an empty string for others."""
    data = recipe.data
    if not is_at_chance(accuracy, data):
        return ""
    return (
        f"the teacher's {data.metric} is {accuracy:.2f} %, which is chance ({chance(data):.2f} %), and a student cannot be better;"
        " check its weights, data.mean and data.std, and the order of the classes"
    )


def weights_metadata(recipe: Recipe, role: str) -> dict[str, str]:
    """Returns the metadata of a run's weight files: role "teacher" or "student", recipe and version."""
    return {"role": role, "recipe": recipe_to_toml(recipe), "version": dfkd_fast.__version__}
