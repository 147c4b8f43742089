import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dfkd_fast import DfkdError
from dfkd_fast.surgery import FLOAT, FixedStatistics, quantize, quantized_layers, sharing_copy

Array = NDArray[np.float64]
CANDIDATES = np.arange(20, 101) / 100
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution with groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 5)),
    "reflected padding": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (3, 4, 5, 5)),
    "channels last": (lambda: nn.Conv2d(4, 6, 3, stride=2).to(memory_format=torch.channels_last), (3, 4, 5, 5)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (3, 4, 7)),
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3))


def images() -> Tensor:
    return torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def quantized(weight_bits: int = 4, activation_bits: int = 8, end_bits: int = 8) -> Any:
    made = network()
    quantize(made, images(), weight_bits=weight_bits, activation_bits=activation_bits, end_bits=end_bits)
    return made


def one_layer(kind: str, bits: int) -> tuple[Any, Any, Tensor]:
    """Returns a layer, its copy that is quantized to some bits, and an input."""
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    original, x = build(), torch.randn(shape)
    copied = nn.Sequential(copy.deepcopy(original))
    assert quantize(copied, x, weight_bits=bits, activation_bits=max(bits, 4), end_bits=bits) == []
    return original, copied[0], x


def rounded_weights(rows: Array, scales: Array, bits: int) -> Array:
    scales = scales[:, None]
    return np.clip(np.rint(rows / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scales


def rounded_inputs(x: Tensor, ends: Tensor, bits: int) -> Tensor:
    low, high = ends.double().numpy()
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return torch.from_numpy((np.clip(np.rint(x.double().numpy() / scale) + zero, 0, 2**bits - 1) - zero) * scale)


def trained_rows(layer: nn.Module) -> Array:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.detach().double().flatten(1).numpy()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_weights_and_inputs_rounded_half_to_even(kind: str, bits: int) -> None:
    original, layer, x = one_layer(kind, bits)
    expected = rounded_weights(trained_rows(original), layer.weight_scale.double().numpy(), bits)
    np.testing.assert_allclose(layer.weight.detach().double().flatten(1), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(layer._parameters["weight"], original.weight)
    oracle: Any = copy.deepcopy(original).double()
    with torch.no_grad():
        oracle.weight.copy_(torch.from_numpy(expected).view_as(oracle.weight))
    inputs = rounded_inputs(x, layer.input_range, layer.activation_bits)
    torch.testing.assert_close(layer(x).double(), oracle(inputs), rtol=1e-5, atol=1e-5)
    integers = layer.integer_weight()
    assert integers.min() >= -(2 ** (bits - 1)) and integers.max() <= 2 ** (bits - 1) - 1 and torch.equal(integers, integers.round())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_scales_and_ranges_have_the_smallest_error_of_all_candidates(kind: str, bits: int) -> None:
    original, layer, x = one_layer(kind, bits)
    rows, scales = trained_rows(original), layer.weight_scale.double().numpy()
    full = np.abs(rows).max(1) / (2 ** (bits - 1) - 1)

    def errors(scales: Array) -> Array:
        return np.square(rounded_weights(rows, scales, bits) - rows).sum(1)

    least = np.min([errors(fraction * full) for fraction in CANDIDATES], axis=0)
    np.testing.assert_allclose(errors(scales), least, rtol=1e-4)
    assert np.all(np.isclose((scales / full)[:, None], CANDIDATES, rtol=1e-5).any(1))
    ends, bits = torch.stack([x.min(), x.max()]).clamp(torch.tensor([-9.0, 0.0]), torch.tensor([0.0, 9.0])), layer.activation_bits
    each = [float((rounded_inputs(x, fraction * ends, bits) - x).square().sum()) for fraction in CANDIDATES]
    assert float((rounded_inputs(x, layer.input_range, bits) - x).square().sum()) == pytest.approx(min(each), rel=1e-4)


def test_ties_are_rounded_to_even_and_values_beyond_the_range_to_its_ends() -> None:
    _, layer, _ = one_layer("linear", 3)
    layer.weight_scale.fill_(1.0)
    with torch.no_grad():
        layer._parameters["weight"][0] = torch.tensor([0.5, 1.5, -2.5, 9.0])
        layer._parameters["weight"][1] = torch.tensor([-0.5, 2.5, -9.0, 0.0])
    assert layer.weight[:2].tolist() == [[0.0, 2.0, -2.0, 3.0], [0.0, 2.0, -4.0, 0.0]]


@pytest.mark.parametrize("shift", [0.0, 3.7, -3.7])
def test_zero_is_represented_exactly_whatever_the_range(shift: float) -> None:
    layer = nn.Linear(4, 6, bias=False)
    quantize(nn.Sequential(layer), torch.rand(3, 4) + shift, end_bits=4, activation_bits=4)
    assert not layer(torch.zeros(2, 4)).any()
    quantize(nn.Sequential(layer), torch.zeros(3, 4), end_bits=4, activation_bits=4)  # a range of no width
    assert not layer(torch.zeros(2, 4)).any()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_channel_of_zeros_stays_zero_and_finite(bits: int) -> None:
    layer: Any = nn.Conv2d(2, 3, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    quantize(nn.Sequential(layer), images(), weight_bits=bits, end_bits=bits)
    layer(images()).sum().backward()
    assert not layer.weight[1].any() and layer.weight.isfinite().all() and not layer.integer_weight()[1].any()
    assert layer._parameters["weight"].grad.isfinite().all()


def test_gradients_pass_the_rounding_within_the_range_and_are_zero_outside() -> None:
    _, layer, x = one_layer("convolution with groups", 4)
    layer.weight_scale.mul_(0.5)
    layer.input_scale.mul_(0.5)
    x.requires_grad_()
    parameter = layer._parameters["weight"]
    ratio = trained_rows(layer) / layer.weight_scale.double().numpy()[:, None]
    within = np.abs(np.rint(ratio) + 0.5) < 8
    (gradient,) = torch.autograd.grad(layer.weight.sum(), parameter)
    assert np.array_equal(gradient.flatten(1).numpy(), within) and 0 < within.mean() < 1
    (unit,) = torch.autograd.grad(layer(x).sum(), x)
    inputs = rounded_inputs(x.detach(), layer.input_range, 4).float().requires_grad_()
    (expected,) = torch.autograd.grad(nn.functional.conv2d(inputs, layer.weight, layer.bias, padding=1, groups=2).sum(), inputs)
    step = float(layer.input_range.diff()) / 15
    inside = (x > layer.input_range[0] - step / 4) & (x < layer.input_range[1] + step / 4)
    outside = (x < layer.input_range[0] - step) | (x > layer.input_range[1] + step)
    assert inside.any() and outside.any() and not unit[outside].any()
    torch.testing.assert_close(unit[inside], expected[inside])


def test_second_derivatives_are_those_at_the_rounded_weights() -> None:
    _, layer, x = one_layer("linear", 8)
    parameter, plain = layer._parameters["weight"], layer.weight.detach().clone().requires_grad_()
    layer.weight_scale.copy_(parameter.detach().abs().amax(1) / 127)  # nothing is outside of the range
    plain.data.copy_(layer.weight.detach())
    inputs = rounded_inputs(x, layer.input_range, 8).float()
    products = []
    for weight, logits in ((parameter, layer(x)), (plain, nn.functional.linear(inputs, plain, layer.bias))):
        (gradient,) = torch.autograd.grad(logits.pow(3).sum(), weight, create_graph=True)
        products += torch.autograd.grad(gradient.square().sum(), weight)
    assert products[0].any()
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)


class OutOfOrder(nn.Module):
    """Registers its layers in another order than it calls them, and modifies an input after it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(3, 2), nn.Conv2d(3, 3, 1), nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        x.zero_()
        return self.last(self.middle(hidden).mean((2, 3)))


def test_the_first_and_the_last_layer_in_call_order_have_the_end_bits() -> None:
    made = OutOfOrder()
    quantize(made, images(), weight_bits=3, activation_bits=4, end_bits=8)
    bits = {name: (layer.weight_bits, layer.activation_bits) for name, layer in quantized_layers(made).items()}
    assert bits == {"first": (8, 8), "middle": (3, 4), "last": (8, 8)}
    made = OutOfOrder()
    quantize(made, images(), weight_bits=3, activation_bits=FLOAT)
    assert [layer.activation_bits for layer in quantized_layers(made).values()] == 3 * [FLOAT]


def test_ranges_are_those_of_inputs_that_the_network_overwrites_later() -> None:
    made = OutOfOrder()
    quantize(made, images())
    assert quantized_layers(made)["first"].input_range.abs().min() > 1


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 5, 5))
        self.stem, self.up = nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.unused, self.spectral = nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (self.up(self.stem(x)) + self.position).flatten(2).mT
        return self.head(self.spectral(self.attention(tokens, tokens, tokens)[0]).mean(1))


def test_what_stays_in_float_is_named() -> None:
    made = Mixed()
    assert quantize(made, images()) == [
        *("position", "up", "attention.in_proj_weight", "attention.out_proj", "unused"),
        "spectral.parametrizations.weight.original",
    ]
    assert list(quantized_layers(made)) == ["stem", "head"]
    assert made(images()).isfinite().all()


def test_a_network_without_a_layer_to_quantize_is_refused_in_one_line() -> None:
    with pytest.raises(DfkdError, match=r"^the network Sequential has no convolution or linear layer that can be quantized$"):
        quantize(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(50)), images())


def test_names_and_values_of_the_tensors_remain_and_scales_and_ranges_are_added() -> None:
    before, after = network().state_dict(), quantized().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after.keys() - before.keys() == {
        f"{name}.{key}" for name in "037" for key in ("weight_scale", "input_scale", "input_zero_point")
    }


def test_32_bits_leave_weights_and_inputs_exactly_as_they_are() -> None:
    original, made = network().eval(), quantized(FLOAT, FLOAT).eval()
    assert torch.equal(made(images()), original(images()))
    assert torch.equal(made[3].weight, original.state_dict()["3.weight"])
    assert made[3].weight is made[3]._parameters["weight"]


def test_batch_norms_keep_their_running_statistics_in_training_mode_and_train_gain_and_bias() -> None:
    made = quantized()
    for each in (made, copy.deepcopy(made)):
        before = copy.deepcopy(each.state_dict())
        each.train()
        each(images()).square().sum().backward()
        assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())
        assert isinstance(each[1], FixedStatistics) and not each[1].training and each[2].training
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in each[1].parameters())


def test_a_network_can_be_quantized_again_with_other_bits() -> None:
    made, expected = quantized(3), quantized(8)
    classes = [type(layer) for layer in made.modules()]
    quantize(made, images(), weight_bits=8)
    assert [type(layer) for layer in made.modules()] == classes == [type(layer) for layer in expected.modules()]
    assert made.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(made[3].weight, expected[3].weight)


def test_a_deep_copy_is_separate_and_a_sharing_copy_trains_the_original() -> None:
    made = quantized()
    separate, sharing = copy.deepcopy(made), sharing_copy(made)
    expected = made(images())
    for each in (separate, sharing):
        assert torch.equal(each(images()), expected)
    sharing(images()).square().sum().backward()
    torch.optim.SGD(sharing.parameters(), lr=0.1).step()
    quantized_layers(sharing)["3"].fit_input_range(10 * images())
    assert torch.equal(made(images()), sharing(images())) and not torch.equal(made(images()), expected)
    assert torch.equal(separate(images()), expected)


def test_autocast_computes_in_bfloat16_with_the_rounded_weights() -> None:
    made = quantized()
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(images())
        logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), made(images()), rtol=0.05, atol=0.05)
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in made.parameters())


def test_a_functional_call_rounds_the_weights_that_it_is_given() -> None:
    made, changed = quantized(), quantized()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(0.7)
    given = {name: 0.7 * parameter for name, parameter in made.named_parameters()}
    logits = torch.func.functional_call(made, given, (images(),))
    assert torch.equal(logits, changed(images()))
    assert all(gradient.any() for gradient in torch.autograd.grad(logits.square().sum(), list(made.parameters())))


@pytest.mark.parametrize("bits", [{"weight_bits": 1}, {"activation_bits": 33}, {"end_bits": 0}, {"weight_bits": 20}])
def test_bits_that_are_not_allowed_are_one_line(bits: dict[str, int]) -> None:
    ((name, value),) = bits.items()
    with pytest.raises(DfkdError, match=f"^quantize: {name} = {value}: must be 2 to 16, or 32 for float$"):
        quantize(network(), images(), **bits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_dtype_are_one_line(dtype: torch.dtype) -> None:
    with pytest.raises(DfkdError, match="must be float32"):
        quantize(network().to(dtype), images().to(dtype), weight_bits=4)


def test_layers_that_share_their_weights_have_the_same_bits() -> None:
    torch.manual_seed(0)
    made: Any = nn.Sequential(nn.Flatten(), nn.Linear(50, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    made[3].weight = made[2].weight
    quantize(made, images(), weight_bits=3, end_bits=8)
    assert [layer.weight_bits for layer in quantized_layers(made).values()] == [8, 8, 8]
    assert torch.equal(made[2].weight, made[3].weight)
