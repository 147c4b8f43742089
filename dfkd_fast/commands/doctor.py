"""``dfkd-fast doctor``: a report on the machine, or on a teacher."""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from dfkd_fast.console import print_table
from dfkd_fast.data import Batches
from dfkd_fast.doctor import choices, findings
from dfkd_fast.engine.compatibility import check_classifier
from dfkd_fast.errors import DfkdError
from dfkd_fast.evaluation import Evaluator
from dfkd_fast.kernels import BackendError
from dfkd_fast.recipe import Recipe
from dfkd_fast.surgery import FoldingError, Observer, eval_mode, fold_and_verify, has_running_statistics, logits_only

from .networks import build_network, load_given_teacher

__all__ = ["Check", "check_teacher", "print_machine", "print_teacher"]

IMAGES = 16


class Check(NamedTuple):
    """Result of one check of a teacher."""

    name: str
    result: str
    verdict: Literal["good", "wrong", "note"]


def print_machine(console: Console) -> None:
    """Print a table of the machine's devices and packages, and one of the backend of every operation.

    Raises:
        DfkdError: ``DFKD_FAST_BACKEND`` names a backend that does not exist or is not installed.
    """
    try:
        backends = choices()
    except BackendError as error:
        raise DfkdError(str(error)) from error
    print_table(console, ("", "installed", "used"), findings())
    print_table(console, ("operation", "on a CPU", "on a GPU"), backends)


def print_teacher(recipe: Recipe, device: torch.device, console: Console) -> None:
    """Print the results of :func:`check_teacher` as a table.

    Raises:
        DfkdError: as there; or a check has failed, after the table is printed.
    """
    checks = check_teacher(recipe, device)
    print_table(console, ("check", "result", "verdict"), checks)
    if wrong := [check.name for check in checks if check.verdict == "wrong"]:
        raise DfkdError(f"--teacher {recipe.name}: failed checks: {', '.join(wrong)}")


def check_teacher(recipe: Recipe, device: torch.device) -> list[Check]:
    """Check a teacher's weights against its recipe.

    Args:
        recipe: with ``teacher.weights``; with ``data.root`` the accuracy is measured, too.
        device: to run the teacher on.

    Returns:
        One result per check.

    Raises:
        DfkdError: there are no weights, or they do not fit the network.
    """
    if not recipe.teacher.weights:
        raise DfkdError(f"recipe {recipe.name!r} trains its teacher: name one with --weights FILE")
    teacher = build_network(recipe, "teacher").to(device)
    notes: list[str] = []
    load_given_teacher(recipe, teacher, notes.append)
    evaluate = Evaluator(recipe.data, device) if recipe.data.can_be_opened else None
    images = _images(recipe, evaluate.batches if evaluate else None).to(device)
    check_classifier("teacher", teacher, images, "data.image_size's")
    teacher = logits_only(teacher.eval(), images)
    with eval_mode(teacher):
        return [*(Check("weights", note, "note") for note in notes), *_checks(recipe, teacher, images, evaluate)]


def _images(recipe: Recipe, labelled: Batches | None) -> Tensor:
    """Returns normalized images of the data set, or noise with the 1/f spectrum of natural images, (N, C, H, W)."""
    if labelled is not None:
        for images, _ in labelled:
            return images[:IMAGES].float().clone()
        raise DfkdError(f"data.root {recipe.data.root}: none of its {labelled.count} images can be decoded")
    data, stream = recipe.data, torch.Generator().manual_seed(0)
    frequencies = torch.fft.fftfreq(data.image_size)
    radius = (frequencies[:, None].square() + frequencies.square()).sqrt()
    radius[0, 0] = math.inf  # no mean
    white = torch.fft.fft2(torch.randn(IMAGES, data.channels, data.image_size, data.image_size, generator=stream))
    noise = torch.fft.ifft2(white / radius).real
    pixels = (0.45 + 0.25 * noise / noise.std()).clamp(0, 1)
    mean, std = (torch.tensor(constants)[:, None, None] for constants in (data.mean, data.std))
    return (pixels - mean) / std


def _checks(recipe: Recipe, teacher: nn.Module, images: Tensor, evaluate: Evaluator | None) -> Iterator[Check]:
    config, source = recipe.teacher, "images of the data set" if evaluate else "1/f noise"
    yield Check("weights", config.weights + (f", sha256 {config.sha256}…" if config.sha256 else ""), "good")
    logits = teacher(images)
    classes = recipe.data.num_classes
    yield Check("classes", f"{logits.shape[1]} logits, data.num_classes is {classes}", "good" if logits.shape[1] == classes else "wrong")
    yield _scores(logits.float())
    again, alone = teacher(images), teacher(images[:1])
    same = torch.equal(logits, again) and torch.allclose(logits[:1].float(), alone.float(), rtol=1e-3, atol=1e-3)
    answers = "logits are deterministic and independent of the batch" if same else "logits change between calls, or with the batch"
    yield Check("evaluation mode", answers, "good" if same else "wrong")
    norms = [layer for layer in teacher.modules() if has_running_statistics(layer)]
    needed = recipe.objective.bn_moments > 0
    reason = "objective.bn_moments requires them" if needed else "not required by the objective"
    yield Check("batch norms", f"{len(norms)} with running statistics; {reason}", "wrong" if needed and not norms else "good")
    if norms:
        yield _folding(teacher, images)
        yield _normalization(recipe, teacher, images, source)
    if evaluate is not None:
        accuracy, chance = evaluate(teacher), 100 / classes
        below = "below " if recipe.data.task == "segmentation" else ""
        text = f"{accuracy:.2f} % {recipe.data.metric}, chance is {below}{chance:.2f} %"
        yield Check("accuracy", text, "wrong" if accuracy < 2 * chance else "good")


def _scores(logits: Tensor) -> Check:
    if not logits.isfinite().all():
        return Check("scores", "NaN or infinite", "wrong")
    sums = logits.sum(1)
    if (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return Check("scores", "probabilities instead of logits: remove the softmax", "wrong")
    if logits.logsumexp(1).abs().max() < 1e-3:
        return Check("scores", "log-probabilities instead of logits: remove the log-softmax", "wrong")
    if logits.std() < 1e-6:
        return Check("scores", "the same for all classes", "wrong")
    return Check("scores", f"logits between {logits.min():.1f} and {logits.max():.1f}", "good")


def _folding(teacher: nn.Module, images: Tensor) -> Check:
    try:
        fold_and_verify(teacher, images[:4])
    except FoldingError as error:
        return Check("folding", f"not possible: {error}", "note")
    return Check("folding", "batch norms fold into convolutions with the same logits", "good")


def _normalization(recipe: Recipe, teacher: nn.Module, images: Tensor, source: str) -> Check:
    """Find the input normalization under which the first batch norm's input matches its running statistics best."""
    mean, std = (torch.tensor(constants, device=images.device)[:, None, None] for constants in (recipe.data.mean, recipe.data.std))
    pixels = images * std + mean
    observer = Observer(teacher, statistics=True, features=False)

    def mismatch(view: Callable[[Tensor], Tensor]) -> float:
        _, _, statistics, running = observer(view(pixels))
        assert statistics is not None and running is not None
        (mean, variance), (expected, spread) = statistics[:, 0], running[:, 0]
        alive = spread > 1e-6 * spread.amax()
        mean, variance, expected, spread = (each[alive] for each in (mean, variance, expected, spread))
        return float(((mean - expected).abs() / spread.sqrt() + (variance / spread).clamp(min=1e-6).log().abs()).median())

    views: dict[str, Callable[[Tensor], Tensor]] = {
        "the recipe's mean and std": lambda x: (x - mean) / std,
        "pixels in [0, 1]": lambda x: x,
        "pixels in [-1, 1]": lambda x: 2 * x - 1,
        "pixels in [0, 255]": lambda x: 255 * x,
    }
    mismatches = {name: mismatch(view) for name, view in views.items()}
    ours, (best, smallest) = mismatches["the recipe's mean and std"], min(mismatches.items(), key=lambda item: item[1])
    text = f"mismatch of the first batch norm's statistics on {source}: {ours:.2f} with the recipe's mean and std"
    if smallest < 0.5 * ours:
        return Check("normalization", f"{text}, {smallest:.2f} with {best}", "wrong")
    return Check("normalization", f"{text}; no other usual normalization halves it", "good")
