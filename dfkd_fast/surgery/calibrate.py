"""Calibration of a quantized copy of a network on images for which there are no labels, such as generated ones."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError

from .fold import has_running_statistics
from .modes import eval_mode
from .quantize import quantized_layers
from .round_weights import round_weights

__all__ = ["calibrate", "check_copy"]

LARGEST_RATIO = 4.0
"""Largest factor of a variance's correction; channels that hardly vary on the images would have larger ones."""
SMALLEST_VARIANCE = 1e-8


class Moments(NamedTuple):
    """Mean and biased variance per channel of a tensor, (C,) each."""

    mean: Tensor
    variance: Tensor


def calibrate(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    """Rounds the weights of a quantized copy, sets the ranges of its inputs, and corrects the shifts that remain.

    In the order of the forward pass, every layer's input range is set to the one with the smallest squared rounding error, and its
    weights are rounded for a small error of its outputs (:func:`~dfkd_fast.surgery.round_weights`). Every quantized layer with a bias
    gets the bias with which its output has the same mean per channel as the teacher's, and every batch norm the running statistics with
    which its output has the same mean and variance per channel as the teacher's. The correction of biases is
    that of Nagel et al. 2019 (arXiv 1906.04721, sec. 4.2). Both networks see the same images, so that errors of images that are unlike
    the teacher's training data largely cancel: the student keeps the statistics of that data.

    Args:
        student: Copy of the teacher, quantized by :func:`~dfkd_fast.surgery.quantize`; changed in place.
        teacher: Network, images → logits.
        images: Images (N, C, H, W), for one forward pass of each network in evaluation mode.

    Raises:
        DfkdError: The student is not a copy of the teacher.
    """
    check_copy(student, teacher)
    layers = quantized_layers(student)
    norms = {name: norm for name, norm in student.named_modules() if has_running_statistics(norm)}
    biased: dict[str, Any] = {name: layer for name, layer in layers.items() if isinstance(layer.bias, Tensor)}
    inputs: dict[str, Moments] = {}
    outputs: dict[str, Moments] = {}

    def record_input(name: str, x: Tensor) -> None:
        inputs[name] = _moments(x, channels=1)

    def record_output(name: str, y: Tensor) -> None:
        outputs[name] = _moments(y, _channels_of_output(layers[name]))

    def start_layer(name: str, x: Tensor) -> None:
        layers[name].fit_input_range(x)
        round_weights(layers[name], layers[name].rounded_input(x))
        if name in biased:  # as it was, so that calibrating again gives the same
            biased[name].bias.copy_(teacher.get_submodule(name).bias)

    def correct_bias(name: str, y: Tensor) -> Tensor:
        layer: Any = layers[name]
        channels = _channels_of_output(layer)
        shift = outputs[name].mean - _moments(y, channels).mean
        layer.bias.add_(shift)
        return (y.movedim(channels, -1) + shift.to(y.dtype)).movedim(-1, channels)

    def correct_statistics(name: str, x: Tensor) -> None:
        norm: Any = norms[name]
        original: Any = teacher.get_submodule(name)
        expected, actual = inputs[name], _moments(x, channels=1)
        ratio = (actual.variance / expected.variance).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
        ratio = torch.where(expected.variance > SMALLEST_VARIANCE, ratio, 1.0)
        norm.running_mean.copy_(actual.mean + (original.running_mean - expected.mean) * ratio.sqrt())
        eps = getattr(norm, "eps", 0.0)  # a user's batch norm may have none
        norm.running_var.copy_(((original.running_var + eps) * ratio - eps).clamp(min=SMALLEST_VARIANCE))

    with eval_mode(teacher), _on_first_call(teacher, norms, record_input), _on_first_call(teacher, biased, record_output, outputs=True):
        teacher(images.clone())  # a copy: networks may modify their input in place
    with ExitStack() as hooks:
        hooks.enter_context(eval_mode(student))
        hooks.enter_context(_on_first_call(student, layers, start_layer))
        hooks.enter_context(_on_first_call(student, norms, correct_statistics))
        hooks.enter_context(_on_first_call(student, biased, correct_bias, outputs=True))
        student(images.clone())


def check_copy(student: nn.Module, teacher: nn.Module) -> None:
    """Raises a :class:`DfkdError` if a quantized student is not a copy of the teacher."""
    layers: dict[str, nn.Module] = dict(quantized_layers(student))
    if layers:
        layers |= {name: norm for name, norm in student.named_modules() if has_running_statistics(norm)}
    modules = dict(teacher.named_modules())
    for name, layer in layers.items():
        if _shapes(layer) != _shapes(modules.get(name)):
            raise DfkdError(f"the student is quantized, and its layer {name!r} differs from the teacher's: quantize a copy of the teacher")


def _shapes(layer: nn.Module | None) -> list[torch.Size | None]:
    return [getattr(getattr(layer, name, None), "shape", None) for name in ("weight", "bias", "running_mean")]


def _moments(x: Tensor, channels: int) -> Moments:
    """Returns the moments of a tensor whose channels are in the dimension ``channels``."""
    variance, mean = torch.var_mean(x.detach().float().movedim(channels, 0).flatten(1), dim=1, correction=0)
    return Moments(mean, variance)


def _channels_of_output(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


@contextmanager
def _on_first_call(
    network: nn.Module, names: Iterable[str], function: Callable[[str, Tensor], Any], *, outputs: bool = False
) -> Iterator[None]:
    """Context manager that passes the name and the input of each layer to a function before its first call.

    With ``outputs``, it passes the output after the call, which the function's result replaces, unless that is None.
    """
    pending = {network.get_submodule(name): name for name in names}

    def before(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer in pending and inputs:
            function(pending.pop(layer), inputs[0])

    def after(layer: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return function(pending.pop(layer), output) if layer in pending else None

    handles = [layer.register_forward_hook(after) if outputs else layer.register_forward_pre_hook(before) for layer in pending]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
