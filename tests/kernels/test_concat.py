from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dfkd_fast.kernels import Backend, concat_generated
from dfkd_fast.kernels.concat import Activation
from tests.kernels.oracles import (
    HALVES,
    INF,
    LAYOUTS,
    NAN,
    PROPERTY,
    RUNS,
    SANITIZED_DTYPES,
    activated,
    assert_as_accurate_as_pytorch,
    layouts,
    random,
    with_layout,
)

pytestmark = pytest.mark.usefixtures("poisoned")

CHANNELS = 3
ROWS = (4, 1, 7)
ACTIVATIONS: list[Activation] = ["tanh", "sigmoid", "none"]
NORMALIZATIONS = ["none", "dataset", "training", "running", "mixed"]
MEAN, STD = torch.tensor([0.5, -0.25, 0.0]), torch.tensor([0.5, 2.0, 0.25])
MOMENTUM, EPS = 0.3, 1e-3


def settings(normalize: str, generators: int, channels: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a normalization; "mixed" sets every other generator to training mode."""
    if normalize == "none":
        return {"normalize": "none"}
    if normalize == "dataset":
        mean, std = MEAN.repeat(channels)[:channels].to(device), STD.repeat(channels)[:channels].to(device)
        return {"normalize": "dataset", "mean": mean, "std": std}
    modes = {"training": [True] * generators, "running": [False] * generators, "mixed": [index % 2 == 0 for index in range(generators)]}
    return {
        "normalize": "batch",
        "running_means": [torch.randn(channels).to(device) for _ in range(generators)],
        "running_vars": [(torch.rand(channels) + 0.5).to(device) for _ in range(generators)],
        "training": modes[normalize],
        "momentum": MOMENTUM,
        "eps": EPS,
    }


def layers(arguments: dict[str, Any], dtype: torch.dtype) -> list[nn.BatchNorm2d]:
    """BatchNorm2d layers with the running statistics of the arguments."""
    made = []
    for mean, variance, training in zip(*(arguments[name] for name in ("running_means", "running_vars", "training")), strict=True):
        layer = nn.BatchNorm2d(len(mean), affine=False, momentum=MOMENTUM, eps=EPS).train(training).to(mean.device, dtype)
        layer.load_state_dict({"running_mean": mean, "running_var": variance, "num_batches_tracked": torch.tensor(0)})
        made.append(layer)
    return made


def oracle(inputs: list[Tensor], activation: Activation, arguments: dict[str, Any], norms: list[nn.BatchNorm2d]) -> Tensor:
    """Plain PyTorch in the precision of the inputs: float64 for the exact result, float32 for the tolerance."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": torch.clone}
    images = [activated(raw, activation) if raw.dtype == torch.float64 else functions[activation](raw) for raw in inputs]
    if arguments["normalize"] == "dataset":
        mean, std = (arguments[name].to(images[0].dtype)[:, None, None] for name in ("mean", "std"))
        images = [(image - mean) / std for image in images]
    if arguments["normalize"] == "batch":
        images = [norm(image) if len(image) else image for norm, image in zip(norms, images, strict=True)]
    return torch.cat(images)


def compare(inputs: list[Tensor], activation: Activation, arguments: dict[str, Any], **options: Any) -> Tensor:
    """Compare batch, gradients and running statistics with float64."""
    # Contiguous, because PyTorch's batch normalization has wrong gradients on a CPU for some strides of a single one-row image.
    exact_inputs = [raw.detach().double().contiguous().requires_grad_() for raw in inputs]
    plain_inputs = [raw.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for raw in inputs]
    batch = arguments["normalize"] == "batch"
    exact_norms, plain_norms = (layers(arguments, dtype) if batch else [] for dtype in (torch.float64, torch.float32))
    exact = oracle(exact_inputs, activation, arguments, exact_norms)
    plain = oracle([raw.float() for raw in plain_inputs], activation, arguments, plain_norms)
    result = concat_generated(inputs, activation=activation, **arguments, **options)
    # y − mean cancels near 0; its error is relative to the magnitude of the terms.
    size = max(1.0, exact.detach().abs().max().item()) if exact.numel() else 1.0
    assert_as_accurate_as_pytorch(result.detach(), plain.detach().to(result.dtype), exact.detach(), magnitude=size)
    if batch:
        for index, (mean, variance) in enumerate(zip(arguments["running_means"], arguments["running_vars"], strict=True)):
            for name, running in (("running_mean", mean), ("running_var", variance)):
                assert_as_accurate_as_pytorch(
                    running, plain_norms[index].state_dict()[name], exact_norms[index].state_dict()[name], magnitude=1.0
                )
    upstream = torch.empty_like(result).detach().copy_(torch.randn(result.shape))
    gradients = torch.autograd.grad(result, inputs, upstream)
    expected_gradient = torch.autograd.grad(plain.to(result.dtype), plain_inputs, upstream.contiguous())
    truth = torch.autograd.grad(exact, exact_inputs, upstream.double().contiguous())
    for index, (gradient, plain_gradient, exact_gradient) in enumerate(zip(gradients, expected_gradient, truth, strict=True)):
        # The gradient through batch statistics is a difference, divided by the standard deviation; on few pixels it cancels.
        magnitude = 0.0
        if batch and arguments["training"][index]:
            variance = activated(exact_inputs[index].detach(), activation).var(dim=(0, 2, 3), correction=0)
            magnitude = size * upstream.abs().max().item() / (variance + EPS).sqrt().min().item()
        assert_as_accurate_as_pytorch(gradient, plain_gradient, exact_gradient, magnitude=magnitude)
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_activation_and_normalization_in_every_layout(
    backend: Backend, device: torch.device, normalize: str, activation: Activation, layout: str
) -> None:
    inputs = [random(rows, CHANNELS, 5, 7, layout=layout, device=device) for rows in ROWS]
    compare(inputs, activation, settings(normalize, len(inputs), CHANNELS, device))


@pytest.mark.parametrize(
    ("dtypes", "out_dtype"),
    [([torch.bfloat16] * 3, None), ([torch.float16, torch.bfloat16, torch.float16], None), ([torch.float32] * 3, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("normalize", ["dataset", "training"])
def test_half_precision_is_computed_in_float32_and_rounded_once(
    backend: Backend, device: torch.device, normalize: str, dtypes: list[torch.dtype], out_dtype: torch.dtype | None
) -> None:
    inputs = [random(rows, CHANNELS, 5, 7, dtype=dtype, device=device) for rows, dtype in zip(ROWS, dtypes, strict=True)]
    result = compare(inputs, "tanh", settings(normalize, len(inputs), CHANNELS, device), out_dtype=out_dtype)
    assert result.dtype == (out_dtype or dtypes[0])


@pytest.mark.parametrize("shape", RUNS, ids=str)
@pytest.mark.parametrize(
    "layouts", [("contiguous",), ("channels_last",), ("channels_last", "contiguous"), ("contiguous", "misaligned")], ids="-".join
)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", SANITIZED_DTYPES, ids=str)
def test_vectorized_accesses_match_scalar_accesses(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    layouts: tuple[str, ...],
    shape: tuple[int, ...],
) -> None:
    inputs = [random(*shape, dtype=dtype, layout=layout, device=device) for layout in layouts]
    compare(inputs, "tanh", settings("training", len(inputs), shape[1], device), memory_format=memory_format)


@pytest.mark.parametrize("channels", [1, 2, 10, 65, 1000])
@pytest.mark.parametrize("rows", [(1,), (3, 2), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (1, 7), (9, 1)], ids=str)
def test_any_number_of_generators_channels_and_pixels(
    backend: Backend, device: torch.device, channels: int, rows: tuple[int, ...], size: tuple[int, int]
) -> None:
    layouts = ["channels_last", "contiguous", "transposed"]
    inputs = [random(count, channels, *size, layout=layout, device=device) for count, layout in zip(rows, layouts, strict=False)]
    compare(inputs, "sigmoid", settings("mixed", len(inputs), channels, device))


@PROPERTY
@given(data=st.data(), activation=st.sampled_from(ACTIVATIONS), normalize=st.sampled_from(NORMALIZATIONS))
def test_any_shape_and_strides(fused: Backend, device: torch.device, data: st.DataObject, activation: Activation, normalize: str) -> None:
    channels = data.draw(st.one_of(st.integers(1, 5), st.integers(1, 100)))
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(2, 12)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    inputs = []
    for rows in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)):
        raw = torch.randn(rows, channels, *size).to(device)
        inputs.append(data.draw(layouts(4))(raw).detach().requires_grad_())
    memory_format = data.draw(st.sampled_from([torch.channels_last, torch.contiguous_format]))
    compare(inputs, activation, settings(normalize, len(inputs), channels, device), memory_format=memory_format)


def test_many_tiles_the_last_one_incomplete(backend: Backend, device: torch.device) -> None:
    inputs = [random(2, CHANNELS, 67, 61, layout=layout, device=device) for layout in ("contiguous", "channels_last")]
    compare(inputs, "tanh", settings("training", 2, CHANNELS, device))


@pytest.mark.parametrize("normalize", ["none", "dataset", "running"])
@pytest.mark.parametrize("rows", [(0,), (0, 3), (2, 0, 3), (0, 0)], ids=str)
def test_a_generator_output_may_be_empty(backend: Backend, device: torch.device, normalize: str, rows: tuple[int, ...]) -> None:
    inputs = [random(count, CHANNELS, 5, 7, device=device) for count in rows]
    result = compare(inputs, "tanh", settings(normalize, len(inputs), CHANNELS, device))
    assert result.shape == (sum(rows), CHANNELS, 5, 7)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(0, CHANNELS, 5, 7), (2, CHANNELS, 0, 7)], ids=str)
@pytest.mark.parametrize("normalize", ["none", "dataset", "running"])
def test_all_generator_outputs_may_be_empty_in_half_precision(
    backend: Backend, device: torch.device, normalize: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = [random(*shape, dtype=dtype, device=device) for _ in range(2)]
    result = compare(inputs, "tanh", settings(normalize, len(inputs), CHANNELS, device))
    assert (result.shape, result.dtype) == ((2 * shape[0], *shape[1:]), dtype)


@pytest.mark.parametrize("requires_grad", [(True, False, False), (False, False, True), (True, False, True)], ids=str)
@pytest.mark.parametrize("normalize", ["none", "dataset", "training"])
def test_gradients_do_not_depend_on_which_inputs_require_grad(
    backend: Backend, device: torch.device, normalize: str, requires_grad: tuple[bool, ...]
) -> None:
    inputs = [random(rows, CHANNELS, 5, 7, device=device) for rows in ROWS]
    arguments = settings(normalize, len(inputs), CHANNELS, device)
    everything = concat_generated(inputs, activation="tanh", **arguments)
    upstream = torch.randn(everything.shape).to(everything)
    expected = torch.autograd.grad(everything, inputs, upstream)
    some = [raw.detach().requires_grad_(flag) for raw, flag in zip(inputs, requires_grad, strict=True)]
    result = concat_generated(some, activation="tanh", **arguments)
    result.backward(upstream)
    for raw, flag, gradient in zip(some, requires_grad, expected, strict=True):
        if flag:
            assert raw.grad is not None
            assert torch.equal(raw.grad, gradient)
        else:
            assert raw.grad is None


@pytest.mark.parametrize("upstream_layout", LAYOUTS)
def test_the_upstream_gradient_may_have_any_layout(backend: Backend, device: torch.device, upstream_layout: str) -> None:
    inputs = [random(rows, CHANNELS, 5, 7, device=device) for rows in ROWS]
    result = concat_generated(inputs, activation="tanh", **settings("training", 3, CHANNELS, device))
    upstream = with_layout(torch.randn(result.shape).to(device), upstream_layout)
    expected = torch.autograd.grad(result, inputs, upstream.contiguous(), retain_graph=True)
    for gradient, expected_gradient in zip(torch.autograd.grad(result, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_grayscale_images_may_be_expanded_to_rgb_with_the_batch_last(backend: Backend, device: torch.device) -> None:
    """The pixels of these images have one stride, those of torch.empty_like of them do not."""
    raw = torch.randn(1, 8, 6, 4).to(device).permute(3, 0, 1, 2).expand(4, 3, 8, 6).detach().requires_grad_()
    compare([raw], "tanh", settings("training", 1, 3, device))


def test_a_gradient_that_cancels_on_two_pixels_is_as_accurate_as_its_terms(fused: Backend, device: torch.device) -> None:
    for seed in range(13):
        torch.manual_seed(seed)
        compare([random(1, CHANNELS, 1, 2, size=1.0, device=device)], "none", settings("training", 1, CHANNELS, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", ["none", "training"])
def test_a_gradient_has_the_strides_of_empty_like_its_input(fused: Backend, device: torch.device, normalize: str, layout: str) -> None:
    inputs = [random(rows, CHANNELS, 5, 7, layout=layout, device=device) for rows in ROWS]
    result = concat_generated(inputs, activation="tanh", **settings(normalize, 3, CHANNELS, device))
    for raw, gradient in zip(inputs, torch.autograd.grad(result.sum(), inputs), strict=True):
        assert gradient.stride() == torch.empty_like(raw).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "rows"])
@pytest.mark.parametrize("normalize", ["none", "dataset", "training"])
def test_out_is_written_completely_and_nothing_else_is(
    backend: Backend, device: torch.device, normalize: str, dtype: torch.dtype, layout: str
) -> None:
    inputs = [random(rows, CHANNELS, 5, 7, device=device).detach() for rows in ROWS]
    arguments = settings(normalize, len(inputs), CHANNELS, device)
    expected = concat_generated(inputs, activation="tanh", out_dtype=dtype, **arguments)
    whole = torch.full((sum(ROWS) + 2, CHANNELS, 7 if layout == "transposed" else 5, 14), NAN, dtype=dtype, device=device)
    if layout == "channels_last":
        whole = whole.contiguous(memory_format=torch.channels_last)
    out = {"sliced": whole[1:-1, :, :, ::2], "transposed": whole[1:-1, :, :, :5].mT, "rows": whole[1:-1, :, :, 3:10]}.get(
        layout, whole[1:-1, :, :, :7]
    )
    result = concat_generated(inputs, activation="tanh", out=out, **arguments)
    assert result is out
    assert torch.equal(out, expected)
    assert int(whole.isnan().sum()) == whole.numel() - out.numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_the_batch_is_channels_last_by_default(backend: Backend, device: torch.device, layout: str) -> None:
    inputs = [random(rows, CHANNELS, 5, 7, layout=layout, device=device) for rows in ROWS]
    expected_gradient = concat_generated(inputs, activation="tanh", normalize="none")
    plain = concat_generated(inputs, activation="tanh", normalize="none", memory_format=torch.contiguous_format)
    assert expected_gradient.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(expected_gradient, plain)


@pytest.mark.parametrize("out_dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_that_of_the_first_input(out_dtype: torch.dtype | None) -> None:
    inputs = [torch.ones(2, 1, 2, 2, dtype=torch.bfloat16), torch.ones(2, 1, 2, 2)]
    result = concat_generated(inputs, activation="none", normalize="none", out_dtype=out_dtype)
    assert result.dtype == (out_dtype or torch.bfloat16)


def test_a_float64_batch_of_large_float32_inputs_is_supported() -> None:
    raw = random(8, 3, 32, 32).detach()
    result = concat_generated([raw], activation="none", normalize="none", out_dtype=torch.float64)
    assert torch.equal(result, raw.double())


@pytest.mark.parametrize("normalize", ["none", "dataset"])
def test_the_batch_does_not_alias_a_single_input(backend: Backend, device: torch.device, normalize: str) -> None:
    raw = torch.zeros(2, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    concat_generated([raw], activation="none", **settings(normalize, 1, 3, device)).fill_(1.0)
    assert not raw.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nonfinite_and_saturated_values_propagate_as_in_plain_pytorch(
    backend: Backend, device: torch.device, activation: Activation
) -> None:
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 90.0, -90.0, 1e30, -1e30, 20.0, 1e-30, 1.0]).view(1, 1, 3, 4)
    raw, twin = (values.to(device).requires_grad_() for _ in range(2))
    result = concat_generated([raw], activation=activation, normalize="dataset", mean=MEAN[:1].to(device), std=STD[:1].to(device))
    expected = (oracle([twin], activation, {"normalize": "none"}, []) - 0.5) / 0.5
    torch.testing.assert_close(result, expected, equal_nan=True)
    (gradient,), (expected_gradient,) = torch.autograd.grad(result.sum(), raw), torch.autograd.grad(expected.sum(), twin)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [NAN, INF])
def test_nonfinite_values_propagate_within_a_channel_in_training_as_in_batch_norm(
    backend: Backend, device: torch.device, value: float
) -> None:
    inputs = [random(rows, CHANNELS, 5, 7, device=device).detach() for rows in (3, 2)]
    inputs[0][1, 2, 3, 4] = value
    arguments = settings("training", 2, CHANNELS, device)
    expected = oracle(inputs, "none", arguments, layers(arguments, torch.float32))
    result = concat_generated(inputs, activation="none", **arguments)
    assert torch.equal(result.isnan(), expected.isnan())
    torch.testing.assert_close(result, expected, equal_nan=True)


def test_running_statistics_of_other_dtypes_are_updated(fused: Backend, device: torch.device) -> None:
    raw = random(5, CHANNELS, 5, 7, device=device).detach()
    for dtype in (torch.float64, torch.bfloat16):
        mean, variance = torch.zeros(CHANNELS, dtype=dtype, device=device), torch.ones(CHANNELS, dtype=dtype, device=device)
        concat_generated([raw], activation="none", normalize="batch", running_means=[mean], running_vars=[variance], training=[True])
        torch.testing.assert_close(mean.float(), 0.1 * raw.mean(dim=(0, 2, 3)), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(variance.float(), 0.9 + 0.1 * raw.var(dim=(0, 2, 3)), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("normalize", ["none", "dataset", "training", "running"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_has_first_and_second_derivatives(activation: Activation, normalize: str) -> None:
    inputs = tuple(random(rows, 2, 2, 3, dtype=torch.float64, size=1.0) for rows in (2, 1))
    arguments = settings(normalize, 2, 2, torch.device("cpu"))
    for name in ("mean", "std", "running_means", "running_vars"):
        if isinstance(arguments.get(name), list):
            arguments[name] = [statistics.double() for statistics in arguments[name]]
        elif name in arguments:
            arguments[name] = arguments[name].double()

    def function(*raws: Tensor) -> Tensor:
        if normalize == "training":  # a second pass must not see the statistics that the first one running
            arguments["running_means"] = [statistics.clone() for statistics in arguments["running_means"]]
            arguments["running_vars"] = [statistics.clone() for statistics in arguments["running_vars"]]
        return concat_generated(raws, activation=activation, **arguments)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("normalize", ["none", "training"])
def test_double_backward_through_a_kernel_raises(fused: Backend, device: torch.device, normalize: str) -> None:
    raw = random(4, CHANNELS, 5, 7, device=device)
    result = concat_generated([raw], activation="tanh", **settings(normalize, 1, CHANNELS, device))
    (gradient,) = torch.autograd.grad(result.square().sum(), raw, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative.*use_backend\("reference"\)'):
        gradient.sum().backward()


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_bitwise_reproducible_for_any_number_of_threads(fused: Backend, device: torch.device, layout: str) -> None:
    inputs = [random(rows, CHANNELS, 65, 63, layout=layout, device=device) for rows in ROWS]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        arguments = settings("training", 3, CHANNELS, device)
        result = concat_generated(inputs, activation="tanh", **arguments)
        upstream = torch.randn(result.shape).to(result)
        gradients = torch.autograd.grad(result, inputs, upstream)
        results.append([result, *gradients, *arguments["running_means"], *arguments["running_vars"]])
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


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
        ({"raws": [RAW, RAW.to("meta")]}, r"raws\[1\] is on meta, the first on cpu"),
        ({"raws": [RAW[0]]}, r"raws\[0\] is \(3, 4, 4\), not \(B, C, H, W\)"),
        ({"activation": "relu"}, "activation must be .* not 'relu'"),
        ({"normalize": "layer"}, "normalize must be .* not 'layer'"),
        ({"mean": MEAN}, "mean must be given if and only if normalize is 'dataset', and normalize is 'none'"),
        ({"std": STD}, "std must be given if and only if normalize is 'dataset'"),
        ({**DATASET, "mean": None}, "mean must be given"),
        ({**DATASET, "std": None}, "std must be given"),
        ({**DATASET, "mean": MEAN[:1]}, r"mean must be \(3,\), not \(1,\)"),
        ({**DATASET, "std": STD[:, None]}, r"std must be \(3,\), not \(3, 1\)"),
        ({"running_means": [MEAN]}, "running_means must be given if and only if normalize is 'batch'"),
        ({"training": [True]}, "training must be given if and only if normalize is 'batch'"),
        ({**BATCH, "running_vars": None}, "running_vars must be given"),
        ({**BATCH, "training": None}, "training must be given"),
        ({**BATCH, "raws": [RAW, RAW]}, "running_means has 1 entries for 2 generators"),
        ({**BATCH, "training": [True, True]}, "training has 2 entries for 1 generators"),
        ({**BATCH, "raws": [RAW[:1, :, :1, :1]]}, "batch statistics need more than one value per channel"),
        ({**BATCH, "raws": [RAW[:0]]}, "batch statistics need more than one value per channel"),
        ({"out": torch.empty(3, CHANNELS, 4, 4)}, r"out must be \(2, 3, 4, 4\), not \(3, 3, 4, 4\)"),
        ({"out": torch.empty(RAW.shape, device="meta")}, "out is on meta, the inputs on cpu"),
        ({"out": torch.empty(RAW.shape), "out_dtype": torch.bfloat16}, "out_dtype is torch.bfloat16, but out is torch.float32"),
        ({"out": torch.empty(RAW.shape), "raws": [RAW.clone().requires_grad_()]}, "out is not supported with autograd"),
    ],
)
def test_invalid_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"raws": [RAW], "activation": "tanh", "normalize": "none", **changed}
    with pytest.raises(ValueError, match=message):
        concat_generated(arguments.pop("raws"), **arguments)
