from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.kernels import concat_generated
from dfkd_fast.kernels.concat import Activation

CHANNELS = 3
ROWS = (4, 1, 7)
LAYOUTS = ["contiguous", "channels_last", "sliced"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
ACTIVATIONS: list[Activation] = ["tanh", "sigmoid", "none"]
MEAN, STD = torch.tensor([0.5, -0.25, 0.0]), torch.tensor([0.5, 2.0, 0.25])


def raws(dtype: torch.dtype, layout: str, rows: tuple[int, ...] = ROWS) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(count, CHANNELS, 5, 7).to(dtype) for count in rows]
    if layout == "channels_last":
        made = [raw.contiguous(memory_format=torch.channels_last) for raw in made]
    if layout == "sliced":
        made = [torch.stack([raw, raw], dim=-1)[..., 0] for raw in made]
    return [raw.detach().requires_grad_() for raw in made]


def activated(raw: Tensor, activation: Activation) -> Tensor:
    """The activation in float64, in terms of exponentials."""
    raw = raw.double()
    if activation == "tanh":
        return 1 - 2 / (1 + (2 * raw).exp())
    return 1 / (1 + (-raw).exp()) if activation == "sigmoid" else raw


def slope(images: Tensor, activation: Activation) -> Tensor:
    if activation == "tanh":
        return 1 - images**2
    return images * (1 - images) if activation == "sigmoid" else torch.ones_like(images)


def close(actual: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", ["none", "dataset"])
def test_activation_and_constants_of_a_data_set_with_their_gradient(
    dtype: torch.dtype, layout: str, activation: Activation, normalize: Any
) -> None:
    inputs = raws(dtype, layout)
    constants: dict[str, Any] = {"mean": MEAN, "std": STD} if normalize == "dataset" else {}
    mean, std = (MEAN[:, None, None], STD[:, None, None]) if normalize == "dataset" else (0.0, torch.ones(()))
    result = concat_generated(inputs, activation=activation, normalize=normalize, **constants)
    images = torch.cat([activated(raw.detach(), activation) for raw in inputs])
    assert result.dtype == dtype
    close(result.detach(), (images - mean) / std, dtype)

    cotangent = torch.randn(result.shape).to(dtype)
    result.backward(cotangent)
    gradient = cotangent.double() * slope(images, activation) / std
    for raw, expected in zip(inputs, gradient.split(ROWS), strict=True):
        close(raw.grad, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [(True, True, True), (False, False, False), (True, False, True)])
def test_batch_normalisation_is_that_of_one_batch_norm_layer_a_generator(
    dtype: torch.dtype, layout: str, training: tuple[bool, ...]
) -> None:
    inputs = raws(dtype, layout)
    layers = [nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.3, eps=1e-3).train(mode) for mode in training]
    running_means = [torch.randn(CHANNELS) for _ in layers]
    running_vars = [torch.rand(CHANNELS) + 0.5 for _ in layers]
    if dtype == torch.float64:
        running_means, running_vars = ([values.double() for values in running] for running in (running_means, running_vars))
    for layer, mean, variance in zip(layers, running_means, running_vars, strict=True):
        layer.double().load_state_dict({"running_mean": mean, "running_var": variance, "num_batches_tracked": torch.tensor(0)})

    result = concat_generated(
        inputs,
        activation="tanh",
        normalize="batch",
        running_means=running_means,
        running_vars=running_vars,
        training=training,
        momentum=0.3,
        eps=1e-3,
    )
    twins = [raw.detach().double().requires_grad_() for raw in inputs]
    expected = torch.cat([layer(activated(twin, "tanh")) for layer, twin in zip(layers, twins, strict=True)])
    close(result.detach(), expected.detach(), dtype)
    for layer, mean, variance in zip(layers, running_means, running_vars, strict=True):
        close(mean, layer.state_dict()["running_mean"], dtype)
        close(variance, layer.state_dict()["running_var"], dtype)

    cotangent = torch.randn(result.shape).to(dtype)
    result.backward(cotangent)
    expected.backward(cotangent.double())
    for raw, twin in zip(inputs, twins, strict=True):
        assert twin.grad is not None
        close(raw.grad, twin.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_of_a_given_batch_is_written_and_none_beside_it(dtype: torch.dtype, layout: str) -> None:
    inputs = raws(torch.float32, "contiguous")
    expected = concat_generated(inputs, activation="tanh", normalize="none", out_dtype=dtype).detach()
    whole = torch.full((sum(ROWS) + 2, CHANNELS, 5, 14), float("nan"), dtype=dtype)
    if layout == "channels_last":
        whole = whole.contiguous(memory_format=torch.channels_last)
    out = whole[1:-1, :, :, ::2] if layout == "sliced" else whole[1:-1, :, :, :7]
    with torch.no_grad():
        result = concat_generated(inputs, activation="tanh", normalize="none", out=out)
    assert result is out
    assert torch.equal(out, expected)
    assert int(whole.isnan().sum()) == whole.numel() - out.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_batch_is_channels_last_unless_asked_otherwise(layout: str) -> None:
    inputs = raws(torch.float32, layout)
    usual = concat_generated(inputs, activation="tanh", normalize="none")
    plain = concat_generated(inputs, activation="tanh", normalize="none", memory_format=torch.contiguous_format)
    assert usual.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(usual, plain)


@pytest.mark.parametrize("wanted", [None, torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_first_generator_unless_asked_otherwise(wanted: torch.dtype | None) -> None:
    inputs = [torch.ones(2, 1, 2, 2, dtype=torch.bfloat16), torch.ones(2, 1, 2, 2)]
    result = concat_generated(inputs, activation="none", normalize="none", out_dtype=wanted)
    assert result.dtype == (wanted or torch.bfloat16)


def test_the_batch_shares_no_memory_with_a_lone_generators_output() -> None:
    raw = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    concat_generated([raw], activation="none", normalize="none").fill_(1.0)
    assert not raw.any()


RAW = torch.zeros(2, CHANNELS, 4, 4)
DATASET = {"normalize": "dataset", "mean": MEAN, "std": STD}
BATCH = {"normalize": "batch", "running_means": [MEAN], "running_vars": [STD], "training": [True]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"raws": []}, "raws is empty"),
        ({"raws": [RAW, RAW[:, :2]]}, r"raws\[1\] is \(2, 2, 4, 4\), not \(B, 3, 4, 4\)"),
        ({"raws": [RAW, RAW[:, :, 1:]]}, r"raws\[1\]"),
        ({"raws": [RAW, RAW[0]]}, r"raws\[1\] is \(3, 4, 4\)"),
        ({"raws": [RAW[0]]}, r"raws\[0\] is \(3, 4, 4\), not \(B, C, H, W\)"),
        ({"activation": "relu"}, "activation must be .* not 'relu'"),
        ({"normalize": "layer"}, "normalize must be .* not 'layer'"),
        ({"mean": MEAN}, "mean goes with normalize='dataset', and normalize is 'none'"),
        ({"std": STD}, "std goes with normalize='dataset'"),
        ({**DATASET, "mean": None}, "mean goes with"),
        ({**DATASET, "std": None}, "std goes with"),
        ({**DATASET, "mean": MEAN[:1]}, r"mean must be \(3,\), not \(1,\)"),
        ({**DATASET, "std": STD[:, None]}, r"std must be \(3,\), not \(3, 1\)"),
        ({"running_means": [MEAN]}, "running_means goes with normalize='batch'"),
        ({"training": [True]}, "training goes with normalize='batch'"),
        ({**BATCH, "running_vars": None}, "running_vars goes with"),
        ({**BATCH, "training": None}, "training goes with"),
        ({**BATCH, "raws": [RAW, RAW]}, "running_means has 1 entries for 2 generators"),
        ({**BATCH, "training": [True, True]}, "training has 2 entries for 1 generators"),
        ({"out": torch.empty(3, CHANNELS, 4, 4)}, r"out must be \(2, 3, 4, 4\), not \(3, 3, 4, 4\)"),
        ({"out": torch.empty(RAW.shape), "out_dtype": torch.bfloat16}, "out_dtype is torch.bfloat16, but out is torch.float32"),
        ({"out": torch.empty(RAW.shape), "raws": [RAW.clone().requires_grad_()]}, "out cannot be given where a gradient is recorded"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"raws": [RAW], "activation": "tanh", "normalize": "none", **changed}
    with pytest.raises(ValueError, match=message):
        concat_generated(arguments.pop("raws"), **arguments)
