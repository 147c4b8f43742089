"""Fake quantization: layers that round their weights and inputs to few bits, and are trained through the rounding."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from dfkd_fast.errors import DfkdError

from .fold import has_running_statistics
from .modes import dry_run, eval_mode

__all__ = [
    "FLOAT",
    "FakeQuantized",
    "FixedStatistics",
    "left_in_float",
    "quantize",
    "quantize_layers",
    "quantized_layers",
    "restore_weights",
]

FLOAT = 32
"""Number of bits that means "not quantized"."""
BIT_COUNTS = (*range(2, 17), FLOAT)
"""Numbers of bits that weights and activations may have."""
FRACTIONS = [fraction / 100 for fraction in range(20, 101)]
"""Parts of the full range of values among which the one with the smallest rounding error is chosen."""
SIGNS = ((None, 0.0), (0.0, None))
"""Limits of the lower and the upper end of a range."""
SMALLEST_SCALE = 1e-8
RANGE_VALUES = 100_000
"""Number of inputs from which :meth:`FakeQuantized.fit_input_range` chooses a range."""


class FakeQuantized(nn.Module):
    """Mixin of convolutions and linear layers that round their weights and inputs to integers of few bits (:func:`quantize`).

    Weights are symmetric with a scale per output channel, inputs affine with one range per layer. Scales and ranges are not trained.
    Gradients pass the rounding unchanged and are 0 outside of the range (straight-through estimator), as PyTorch's operators define it.

    The key of the weights in the state dict does not change. Three buffers are added to it: ``weight_scale`` (out_channels,), and
    ``input_scale`` and ``input_zero_point``, both 0-d.
    """

    weight_bits: int
    activation_bits: int
    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    """Integer that stands for 0, which is represented exactly, as padding needs it."""

    def _add_buffers(self) -> None:
        weight: Any = self._parameters["weight"]
        self.register_buffer("weight_scale", weight.new_ones(len(weight)))
        self.register_buffer("input_scale", weight.new_ones(()))
        self.register_buffer("input_zero_point", torch.zeros_like(self.input_scale, dtype=torch.int32))
        self.register_buffer("_weight_zero_point", torch.zeros_like(self.weight_scale, dtype=torch.int32), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The rounded weights; ``_parameters["weight"]`` are the trained ones."""
        weight: Any = self._parameters["weight"]
        if self.weight_bits == FLOAT:
            return weight
        zero_points: Any = self._weight_zero_point
        return torch.fake_quantize_per_channel_affine(weight, self.weight_scale, zero_points, 0, *integer_range(self.weight_bits))

    @property
    def input_range(self) -> Tensor:
        """Smallest and largest input that is represented, (2,)."""
        ends = torch.tensor([0, 2**self.activation_bits - 1], device=self.input_scale.device)
        return (ends - self.input_zero_point) * self.input_scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.rounded_input(input))

    def rounded_input(self, input: Tensor) -> Tensor:
        """Returns inputs as the layer computes with them."""
        if self.activation_bits == FLOAT:
            return input
        return round_inputs(input, self.input_scale, self.input_zero_point, self.activation_bits)

    @torch.no_grad()
    def integer_weight(self) -> Tensor:
        """Returns the rounded weights divided by their scales: signed integers of ``weight_bits`` bits, as float32."""
        return (self.weight.float() / self.weight_scale.view(-1, *[1] * (self.weight.ndim - 1))).round()

    @torch.no_grad()
    def fit_weight_scale(self) -> None:
        """Sets the scale of every output channel to the one with the smallest squared rounding error."""
        if self.weight_bits == FLOAT:
            return
        rows: Any = self._parameters["weight"]
        rows = rows.flatten(1)
        smallest, largest = integer_range(self.weight_bits)
        full = (rows.abs().amax(1) / largest).clamp(min=SMALLEST_SCALE)
        least = torch.full_like(full, torch.inf)
        for fraction in FRACTIONS:
            scale = fraction * full
            rounded = (rows / scale[:, None]).round().clamp(smallest, largest) * scale[:, None]
            errors = (rounded - rows).square().sum(1)
            self.weight_scale.copy_(torch.where(errors < least, scale, self.weight_scale))
            least = torch.minimum(errors, least)

    @torch.no_grad()
    def fit_input_range(self, input: Tensor) -> None:
        """Sets the range to the one with the smallest squared rounding error for some inputs."""
        if self.activation_bits == FLOAT:
            return
        values = input.detach().float().flatten()
        values = values[:: max(1, len(values) // RANGE_VALUES) | 1]  # odd: an even step could meet the same columns of each image
        full = torch.stack([bound.clamp(*limits) for bound, limits in zip(torch.aminmax(input.detach().float()), SIGNS, strict=True)])
        scales = [(fraction * full.diff()[0] / (2**self.activation_bits - 1)).clamp(min=SMALLEST_SCALE) for fraction in FRACTIONS]
        zero_points = [(-fraction * full[0] / scale).round().to(torch.int32) for fraction, scale in zip(FRACTIONS, scales, strict=True)]
        errors = [
            (round_inputs(values, scale, zero_point, self.activation_bits) - values).square().sum()
            for scale, zero_point in zip(scales, zero_points, strict=True)
        ]
        best = torch.stack(errors).argmin()
        self.input_scale.copy_(torch.stack(scales)[best])
        self.input_zero_point.copy_(torch.stack(zero_points)[best])


class FixedStatistics(nn.Module):
    """Mixin of batch norms that normalize with their running statistics in training mode, too; gain and bias are trained."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def quantize(network: nn.Module, images: Tensor, *, weight_bits: int = 8, activation_bits: int = 8, end_bits: int = 8) -> list[str]:
    """Quantizes the convolutions and linear layers of a network in place, and fixes the running statistics of its batch norms.

    The batch statistics of generated images would replace those of the data that the network was trained on.

    Args:
        network: Network, images → logits. Its parameters and their names do not change.
        images: Example images (B, C, H, W), a few: noise, if there are no others. The ranges of the inputs are those for these images,
            until :func:`~dfkd_fast.surgery.calibrate` sets them.
        weight_bits: Bits of the weights, 2 to 16; 32 leaves them in float.
        activation_bits: Bits of the layers' inputs; 32 leaves them in float.
        end_bits: Bits of the first and the last layer, in the order of their calls, for whichever of the two is quantized. A layer that
            shares its weights with one of them has as many.

    Returns:
        Names of the layers and parameters with weights that stay in float: transposed convolutions, layers of other kinds, and
        those that are not called as modules.

    Raises:
        DfkdError: The network has no layer that can be quantized, weights that are not float32, or the bits are not allowed.
    """
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits), ("end_bits", end_bits)):
        if bits not in BIT_COUNTS:
            raise DfkdError(f"quantize: {name} = {bits}: must be 2 to 16, or 32 for float")
    inputs = _inputs_of_layers(network, images)
    names = list(inputs)
    if not names:
        raise DfkdError(f"the network {type(network).__name__} has no convolution or linear layer that can be quantized")

    weights = {name: network.get_submodule(name)._parameters["weight"] for name in names}
    for name, weight in weights.items():
        if weight is not None and weight.dtype != torch.float32:
            raise DfkdError(f"quantize: the weights of {name} are {str(weight.dtype).removeprefix('torch.')}: must be float32")

    def bits_of(name: str, bits: int) -> int:
        is_end = weights[name] is weights[names[0]] or weights[name] is weights[names[-1]]
        return end_bits if is_end and bits != FLOAT else bits

    quantize_layers(network, {name: (bits_of(name, weight_bits), bits_of(name, activation_bits)) for name in names})
    for name, layer in quantized_layers(network).items():
        layer.fit_input_range(inputs[name])
    return left_in_float(network)


def restore_weights(network: nn.Module, original: nn.Module, images: Tensor) -> None:
    """Gives a quantized network the weights of the original again, and the scales and ranges that :func:`quantize` gives it.

    Args:
        network: Network quantized by :func:`quantize`, changed in place.
        original: Network of the same architecture that is not quantized.
        images: Example images, as for :func:`quantize`.
    """
    network.load_state_dict(original.state_dict(), strict=False)  # which has no scales
    inputs = _inputs_of_layers(original, images)
    for name, layer in quantized_layers(network).items():
        layer.fit_weight_scale()
        layer.fit_input_range(inputs[name])


def quantize_layers(network: nn.Module, bits: Mapping[str, tuple[int, int]]) -> None:
    """Quantizes layers of a network in place as :func:`quantize` does.

    Args:
        network: Network; its batch norms get fixed statistics.
        bits: Bits of the weights and of the inputs of each layer, by name.

    Raises:
        AttributeError: The network has no layer of a name.
        TypeError: A layer cannot be quantized.
    """
    for name, (weight_bits, activation_bits) in bits.items():
        layer: Any = network.get_submodule(name)
        if not _is_quantizable(layer):
            raise TypeError(f"{name} is a {type(layer).__name__}, which cannot be quantized")
        layer.__class__ = _fake_quantized(type(layer))  # type: ignore[arg-type]  # mypy asks the class for its instances' hash
        layer.weight_bits, layer.activation_bits = weight_bits, activation_bits
        layer._add_buffers()
        layer.fit_weight_scale()
    for norm in network.modules():
        if has_running_statistics(norm) and not isinstance(norm, FixedStatistics):
            norm.__class__ = _fixed_statistics(type(norm))  # type: ignore[arg-type]  # likewise
            norm.training = False


def quantized_layers(network: nn.Module) -> dict[str, FakeQuantized]:
    """Returns the layers that :func:`quantize` has quantized, by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, FakeQuantized)}


def left_in_float(network: nn.Module) -> list[str]:
    """Returns the names of the layers and parameters of a quantized network with weights that are in float."""
    names = []
    for name, layer in network.named_modules():
        if isinstance(layer, FakeQuantized) and layer.weight_bits != FLOAT:
            continue
        for key, parameter in layer.named_parameters(recurse=False):
            if parameter.ndim > 1:
                names.append(name if key == "weight" else f"{name}.{key}" if name else key)
    return names


def integer_range(bits: int) -> tuple[int, int]:
    """Returns the smallest and the largest signed integer of a number of bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def round_inputs(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Returns values rounded to the unsigned integers of a number of bits, in float.

    Args:
        values: Floating-point tensor.
        scale: Difference of the values that two successive integers stand for, 0-d.
        zero_point: Integer that stands for 0, 0-d.
        bits: Number of bits.
    """
    largest = 2**bits - 1
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RoundOnCpu.apply(values, scale, int(zero_point), largest)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, largest)


class _RoundOnCpu(torch.autograd.Function):
    """``fake_quantize_per_tensor_affine`` as operators that are vectorized on a CPU, where it is not; a few ties round the other way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: int, largest: int) -> Tensor:
        ctx.save_for_backward(values)
        ctx.bounds = float((-0.5 - zero_point) * scale), float((largest + 0.5 - zero_point) * scale)
        steps = values.float() * (1 / scale)
        return steps.add_(zero_point).round_().clamp_(0, largest).sub_(zero_point).mul_(scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (values,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, values, *ctx.bounds), None, None, None


def _inputs_of_layers(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Returns the inputs of the layers that can be quantized, by name, in the order of their first calls."""
    called: dict[str, Tensor] = {}
    with dry_run(network) as trial:
        names = {layer: name for name, layer in trial.named_modules() if _is_quantizable(layer)}

        def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs:  # none for a call by keyword
                called.setdefault(names[layer], inputs[0].clone())  # the network may modify it in place

        for layer in names:
            layer.register_forward_pre_hook(record)
        with eval_mode(trial):
            trial(images.clone())  # the network may modify its input in place
    return called


def _is_quantizable(layer: nn.Module) -> bool:
    known = isinstance(layer, nn.Linear | _ConvNd) and not isinstance(layer, _ConvTransposeNd)
    return known and not parametrize.is_parametrized(layer) and isinstance(layer._parameters.get("weight"), nn.Parameter)


@cache  # compiled networks have guards on the classes of their layers: a new class in every call would recompile them
def _fake_quantized(layer: type[nn.Module]) -> type[nn.Module]:
    return layer if issubclass(layer, FakeQuantized) else type(layer.__name__, (FakeQuantized, layer), {})


@cache
def _fixed_statistics(layer: type[nn.Module]) -> type[nn.Module]:
    return type(layer.__name__, (FixedStatistics, layer), {})
