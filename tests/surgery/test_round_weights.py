import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfkd_fast.surgery import quantize, round_weights

Array = NDArray[np.float64]
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (12, 4, 6, 6)),
    "strides and dilation": (nn.Conv2d(4, 6, (3, 1), stride=2, dilation=2, padding="valid", bias=False), (12, 4, 9, 9)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2), (12, 6, 6, 6)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (12, 6, 6, 6)),
    "linear": (nn.Linear(12, 5), (60, 12)),
    "linear on tokens": (nn.Linear(12, 5), (9, 7, 12)),
    "more weights than a block": (nn.Linear(300, 3), (700, 300)),
}


def correlated(*shape: int) -> Tensor:
    """Inputs whose neighbouring channels are similar."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    channels = 1 if len(shape) == 4 else -1
    return (noise + 0.9 * noise.roll(1, channels) + 0.5 * noise.roll(2, channels)).relu()


def quantized(layer: nn.Module, x: Tensor, bits: int = 4) -> Any:
    copied = nn.Sequential(copy.deepcopy(layer))
    quantize(copied, x, weight_bits=bits, activation_bits=32, end_bits=bits)
    return copied[0]


def rounded_one_by_one(rows: Array, scale: Array, moments: Array, bits: int) -> Array:
    """Optimal brain quantization in a fixed order: the inverse Hessian of the weights that are left is updated by elimination."""
    rows, inverse = rows.copy(), np.linalg.inv(moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments)))
    for index in range(rows.shape[1]):
        nearest = np.clip(np.rint(rows[:, index] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        error = (rows[:, index] - nearest) / inverse[index, index]
        rows[:, index + 1 :] -= np.outer(error, inverse[index, index + 1 :])
        rows[:, index] = nearest
        inverse = inverse - np.outer(inverse[:, index], inverse[index]) / inverse[index, index]
    return rows


@pytest.mark.parametrize("bits", [3, 4])
def test_weights_are_those_of_optimal_brain_quantization_in_their_order(bits: int) -> None:
    torch.manual_seed(0)
    original, x = nn.Linear(300, 3), correlated(700, 300)
    layer = quantized(original, x, bits)
    vectors = x.double().numpy()
    expected = rounded_one_by_one(
        original.weight.detach().double().numpy(), layer.weight_scale.double().numpy(), vectors.T @ vectors / 700, bits
    )
    round_weights(layer, x)
    equal = np.isclose(layer.weight.detach().double().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert equal.mean() > 0.98  # a value near a tie may round the other way in float32, and changes those after it


@pytest.mark.parametrize("kind", LAYERS)
def test_the_error_of_the_outputs_is_smaller_than_with_the_nearest_integers(kind: str) -> None:
    (original, shape), bits = LAYERS[kind], 3
    original, x = copy.deepcopy(original), correlated(*shape)
    before = after = 0.0
    for seed in range(8):  # a single small layer may be rounded to a larger error
        torch.manual_seed(seed)
        original.reset_parameters()  # type: ignore[operator]
        layer = quantized(original, x, bits)
        with torch.no_grad():
            expected = original(x)
            before += float((layer(x) - expected).square().mean())
            round_weights(layer, x)
            after += float((layer(x) - expected).square().mean())
        assert torch.equal(layer.weight, layer._parameters["weight"])  # rounded already
    assert after < 0.9 * before


def test_inputs_without_correlation_leave_the_nearest_integers() -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Linear(8, 5), 3 * torch.eye(8))
    nearest = layer.weight.detach().clone()
    round_weights(layer, 3 * torch.eye(8))
    torch.testing.assert_close(layer.weight.detach(), nearest)


@pytest.mark.parametrize("kind", LAYERS)
def test_rounding_again_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    original, shape = LAYERS[kind]
    layer = quantized(original, x := correlated(*shape))
    round_weights(layer, x)
    weight = layer._parameters["weight"].clone()
    round_weights(layer, x)
    assert torch.equal(layer._parameters["weight"], weight)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_inputs_that_are_all_zero_or_not_finite_leave_the_nearest_integers(value: float) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(2, 3, 3), torch.randn(4, 2, 5, 5))
    nearest = layer.weight.detach().clone()
    round_weights(layer, torch.full((4, 2, 5, 5), value))
    torch.testing.assert_close(layer.weight.detach(), nearest)


def test_layers_of_other_kinds_and_in_float_are_not_changed() -> None:
    torch.manual_seed(0)
    for layer, x, bits in ((nn.Conv1d(2, 3, 3), torch.randn(4, 2, 9), 4), (nn.Linear(4, 3), torch.randn(5, 4), 32)):
        made = nn.Sequential(copy.deepcopy(layer))
        quantize(made, x, weight_bits=bits, activation_bits=8, end_bits=4)
        weight = made[0]._parameters["weight"]
        assert weight is not None
        before = weight.clone()
        round_weights(made[0], x)  # type: ignore[arg-type]
        assert torch.equal(weight, before)
