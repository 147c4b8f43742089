"""Quantized copies of a network before any training: what their calibration is worth, by the images that it sees."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from dfkd_fast import Recipe, Trainer
from dfkd_fast.commands.compress import parse_bits
from dfkd_fast.commands.networks import build_networks, load_given_teacher
from dfkd_fast.data import Batches
from dfkd_fast.engine.calibration import CALIBRATION_SAMPLES
from dfkd_fast.engine.precision import default_modes
from dfkd_fast.errors import DfkdError
from dfkd_fast.evaluation import Evaluator
from dfkd_fast.models import sample_batches
from dfkd_fast.surgery import calibrate, eval_mode, get_logits, has_running_statistics, quantize, quantized_layers

from .baselines import pt2e
from .provenance import QUANTIZERS, Provenance, measured_on, version

__all__ = ["CORRECTIONS", "PEER", "Row", "measure"]

PEER = "PT2E"
"""The correction that is PyTorch's own quantization, :mod:`bench.baselines.pt2e`."""


@dataclass(frozen=True)
class Row:
    """Accuracy of a quantized copy that was not trained."""

    network: str
    bits: str
    correction: str
    """``none``; ``batch norms``: their statistics are estimated again on the images; ``calibrate``: :func:`dfkd_fast.surgery.calibrate`;
    ``PT2E``: PyTorch's own quantization, with the ranges that its observers choose for the images."""
    images: str
    """``generated``, after ``pretraining`` steps; ``noise``, standard normal; ``real``, the first of the evaluation, without labels."""
    samples: int
    pretraining: int
    """Steps of the generator."""
    metric: str
    teacher_accuracy: float
    accuracy: float
    agreement: float
    """Percentage of the images of the evaluation that the copy assigns to the same class as the network."""
    evaluated: int
    """Number of images of the evaluation."""
    seed: int
    provenance: Provenance = field(kw_only=True, metadata={"columns": QUANTIZERS})


def measure(
    recipe: Recipe,
    bits: Sequence[str],
    device: torch.device,
    command: str,
    report: Callable[[str], None],
    corrections: Sequence[str] = (),
) -> Iterator[Row]:
    """Quantize copies of a recipe's teacher, and yield the accuracy of each for every correction and source of images.

    Args:
        recipe: Recipe with ``teacher.weights`` and data; its generator is pretrained for ``loop.generator_pretraining`` steps.
        bits: Such as ``w4a8``.
        device: Device of the networks.
        command: Command line, for the provenance.
        report: Called with lines on the weights and the data, and on a peer that is not installed.
        corrections: Names in :data:`CORRECTIONS`; by default all.

    Raises:
        DfkdError: Bits are not allowed, or the recipe has no teacher weights or no data.
    """
    if not recipe.teacher.weights:
        raise DfkdError("teacher.weights: not set; only a trained network can be quantized")
    parsed = {each: parse_bits(each) for each in bits}
    chosen = [name for name in CORRECTIONS if name in (corrections or CORRECTIONS)]
    if PEER in chosen and not version("torchao"):
        report(f"{PEER}: left out, because torchao is not installed: pip install torchao")
        chosen.remove(PEER)
    if set(chosen) <= {PEER} and not (chosen and any(pt2e.supports(*each) for each in parsed.values())):
        raise DfkdError(f"nothing to measure: {PEER} needs torchao, and activations of 8 bits, not {', '.join(parsed)}")
    provenance = measured_on(device, command)
    evaluate = Evaluator(recipe.data, device, report)
    teacher, student, generator = build_networks(recipe, device)
    load_given_teacher(recipe, teacher, report)
    teacher.eval()
    trainer = Trainer(teacher, student, generator, recipe, seed=recipe.seed, device=device)
    labels, expected = _predictions(teacher, evaluate.batches, device)
    sources = {
        "generated": _pretrained_samples(trainer, recipe),
        "noise": torch.randn(CALIBRATION_SAMPLES, *trainer.state.images.shape[1:], generator=torch.Generator().manual_seed(0)).to(device),
        "real": _first_images(evaluate.batches).to(device),
    }
    for each, (weight_bits, activation_bits) in parsed.items():
        for source, images in sources.items():
            for correction in chosen:
                if correction == "none" and source != "generated":
                    continue
                if correction == PEER and not pt2e.supports(weight_bits, activation_bits):
                    continue
                copied = copy.deepcopy(teacher)
                quantize(
                    copied, images[:8], weight_bits=weight_bits, activation_bits=activation_bits, end_bits=recipe.student.first_last_bits
                )
                corrected = _corrected(correction, copied, teacher, images, sources["real"])
                _, predicted = _predictions(corrected, evaluate.batches, device)
                yield Row(
                    network=recipe.teacher.model,
                    bits=each,
                    correction=correction,
                    images=source,
                    samples=len(images),
                    pretraining=recipe.loop.generator_pretraining,
                    metric=recipe.data.metric,
                    teacher_accuracy=_percentage(expected == labels),
                    accuracy=_percentage(predicted == labels),
                    agreement=_percentage(predicted == expected),
                    evaluated=len(labels),
                    seed=recipe.seed,
                    provenance=provenance,
                )


def _corrected(correction: str, student: nn.Module, teacher: nn.Module, images: Tensor, evaluated: Tensor) -> nn.Module:
    """Returns the quantized copy, corrected in place; for the peer, the copy that PyTorch makes with as many bits in each layer."""
    if correction == PEER:
        return pt2e.quantized(teacher, images, evaluated, {name: layer.weight_bits for name, layer in quantized_layers(student).items()})
    with torch.no_grad():
        IN_PLACE[correction](student, teacher, images)
    return student


def _leave(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """Corrects nothing: scales and ranges are those of :func:`quantize`."""


def _estimate_again(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """Replaces the running statistics of the batch norms by the mean and the variance of their inputs for the images."""

    def replace(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0].movedim(1, 0).flatten(1), dim=1)
        norm.running_mean.copy_(mean)  # type: ignore[operator]
        norm.running_var.copy_(variance)  # type: ignore[operator]

    hooks = [norm.register_forward_pre_hook(replace) for norm in student.modules() if has_running_statistics(norm)]
    with eval_mode(student):
        student(images)
    for hook in hooks:
        hook.remove()


IN_PLACE: dict[str, Callable[[nn.Module, nn.Module, Tensor], None]] = {
    "none": _leave,
    "batch norms": _estimate_again,
    "calibrate": calibrate,
}
CORRECTIONS = (*IN_PLACE, PEER)


def _pretrained_samples(trainer: Trainer, recipe: Recipe) -> Tensor:
    """Returns samples of the trainer's generator after its pretraining."""
    for _ in range(recipe.loop.generator_pretraining):
        with default_modes(trainer.device):
            trainer.steps.generator(adversarial=False)
    return torch.cat(list(sample_batches(trainer.state.generator, CALIBRATION_SAMPLES, recipe.loop.batch_size, trainer.device)))


def _first_images(batches: Batches) -> Tensor:
    count = -(-CALIBRATION_SAMPLES // max(1, len(next(iter(batches))[0])))
    return torch.cat([images.float() for images, _ in islice(batches, count)])[:CALIBRATION_SAMPLES]


def _predictions(network: nn.Module, batches: Batches, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns labels and predicted classes of all images."""
    labels, predicted = [], []
    with eval_mode(network):
        for images, of_images in batches:
            labels.append(of_images.flatten().cpu())
            predicted.append(get_logits(network(images.float().to(device))).argmax(1).flatten().cpu())
    return torch.cat(labels), torch.cat(predicted)


def _percentage(correct: Tensor) -> float:
    return round(100 * float(correct.double().mean()), 2)
