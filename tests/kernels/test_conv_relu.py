"""Convolution, bias, residual and ReLU of a frozen layer in one operation: values and gradients against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.kernels import conv2d_relu, use_backend

CASES: dict[str, dict[str, Any]] = {
    "3x3": {"padding": (1, 1)},
    "strided": {"stride": (2, 1), "padding": (1, 0)},
    "dilated": {"dilation": (2, 2), "padding": (2, 2)},
    "grouped": {"groups": 2},
    "1x1": {"kernel": 1},
    "1x1 strided": {"kernel": 1, "stride": (2, 2)},
    "depthwise": {"groups": 6, "padding": (1, 1)},
    "without pixels to spare": {"kernel": 7, "padding": (0, 0)},
    "an empty batch": {"batch": 0},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def case(
    kernel: int = 3, batch: int = 3, *, groups: int = 1, dtype: torch.dtype = torch.float32, residual: bool = True, **geometry: Any
) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
    stream = torch.Generator().manual_seed(0)
    shapes = (batch, 6, 7, 9), (4 if groups < 6 else 12, 6 // groups, kernel, kernel), (4 if groups < 6 else 12,)
    inputs = [torch.randn(shape, generator=stream).to(dtype) for shape in shapes]
    geometry |= {"groups": groups}
    x, weight, _ = (tensor.double() for tensor in inputs)
    shape = F.conv2d(x, weight, **geometry).shape
    return inputs, torch.randn(shape, generator=stream).to(dtype) if residual else None, geometry


def layout(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if channels_last and tensor.ndim == 4 else tensor


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_values_and_gradients_match_float64(name: str, dtype: torch.dtype, channels_last: bool, with_residual: bool) -> None:
    inputs, residual, geometry = case(dtype=dtype, residual=with_residual, **CASES[name])
    x, weight, bias = (layout(tensor, channels_last) for tensor in inputs)
    residual = None if residual is None else layout(residual, channels_last)
    differentiable = [tensor.requires_grad_() for tensor in (x, residual) if tensor is not None]
    y = conv2d_relu(x, weight, bias, residual, **geometry)

    wide = [tensor.detach().double().requires_grad_() for tensor in differentiable]
    expected = F.conv2d(wide[0], weight.double(), bias.double(), **geometry)
    expected = F.relu(expected + wide[1] if with_residual else expected)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)
    # The mask is that of the rounded output: elements that are 0 up to rounding have no defined gradient.
    clear = (expected.abs() > 10 * TOLERANCE[dtype]) | (expected == 0) & (y == 0)
    upstream = upstream * clear
    gradients = torch.autograd.grad(y, differentiable, upstream)
    expected_gradients = torch.autograd.grad(expected, wide, upstream.double())
    for ours, theirs in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_on_a_gpu_cudnn_computes_the_same_in_a_captured_graph(
    dtype: torch.dtype, with_residual: bool, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    stream = torch.Generator().manual_seed(0)
    shapes = [(4, 64, 9, 7), (32, 64, kernel, kernel), (32,), *([(4, 32, 9, 7)] if with_residual else [])]
    inputs = [torch.randn(shape, generator=stream) / (8 if len(shape) == 4 else 1) for shape in shapes]
    x, weight, bias, *residual = (layout(tensor, channels_last=True).to("cuda", dtype) for tensor in inputs)
    differentiable = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in residual)]
    padding = (kernel // 2, kernel // 2)

    def step() -> tuple[Tensor, ...]:
        y = conv2d_relu(x, weight, bias, *residual, padding=padding)
        return y, *torch.autograd.grad(y.float().square().sum(), differentiable)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    wide = [tensor.detach().cpu().double() for tensor in (x, weight, bias, *residual)]
    for tensor in (wide[0], *wide[3:]):
        tensor.requires_grad_()
    expected = conv2d_relu(*wide, padding=padding)
    gradients = torch.autograd.grad(expected.square().sum(), [wide[0], *wide[3:]])
    for ours, theirs in zip(results, (expected, *gradients), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=4 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_strides_and_gradients_follow_the_channels_last_format_also_for_1x1_filters() -> None:
    inputs, _, geometry = case(kernel=1, residual=False)
    x, weight, bias = inputs
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = conv2d_relu(x, weight, bias, **geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_only_the_output_is_kept_for_the_backward_pass() -> None:
    inputs, _, geometry = case(residual=False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        y = conv2d_relu(inputs[0].requires_grad_(), *inputs[1:], **geometry)
    assert {tensor.data_ptr() for tensor in kept} == {y.data_ptr(), inputs[1].data_ptr()}


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_does_not_apply(backend: Any) -> None:
    (x, weight, bias), _, _ = case(residual=False)
    with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
        assert conv2d_relu(x, weight, bias).dtype == torch.float32


def test_nan_passes_through_and_infinities_are_kept() -> None:
    x, weight, bias = (
        torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0]).view(4, 1, 1, 1),
        torch.ones(1, 1, 1, 1),
        torch.zeros(1),
    )
    assert [str(value) for value in conv2d_relu(x, weight, bias).flatten().tolist()] == ["nan", "inf", "0.0", "1.0"]


def test_a_second_derivative_is_an_error_that_names_the_reference_which_has_it() -> None:
    inputs, _, geometry = case(residual=False)
    x = inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(conv2d_relu(x, *inputs[1:], **geometry).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
        gradient.sum().backward()
    with use_backend("reference"):
        (gradient,) = torch.autograd.grad(conv2d_relu(x, *inputs[1:], **geometry).square().sum(), x, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize("name", ["3x3", "1x1", "grouped"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_operator_passes_opcheck(name: str, channels_last: bool, with_residual: bool) -> None:
    inputs, residual, geometry = case(residual=with_residual, **CASES[name])
    x, weight, bias = (layout(tensor, channels_last) for tensor in inputs)
    defaults: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    numbers = [[*value] if isinstance(value, tuple) else value for value in (defaults | geometry).values()]
    torch.library.opcheck(torch.ops.dfkd_fast.conv2d_relu.default, (x, weight, bias, residual, *numbers))


def test_it_compiles_without_graph_breaks() -> None:
    inputs, residual, geometry = case()

    def function(x: Tensor) -> Tensor:
        return conv2d_relu(x, inputs[1], inputs[2], residual, **geometry)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = inputs[0].requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": nn.Parameter(torch.zeros(4, 6, 3, 3))}, "weight and bias must be frozen"),
        (
            {"weight": torch.zeros(4, 5, 3, 3)},
            r"x must be \(N, C_in, H, W\) and weight .* for 1 groups, not \(3, 6, 7, 9\) and \(4, 5, 3, 3\)",
        ),
        ({"weight": torch.zeros(4, 6, 3, 3, dtype=torch.bfloat16)}, "weight must have dtype and device of x, torch.float32 on cpu"),
        ({"bias": torch.zeros(5)}, r"bias must be \(4,\), not \(5,\)"),
        ({"residual": torch.zeros(3, 4, 1, 1)}, r"residual must have the shape of the output, \(3, 4, 5, 7\), not \(3, 4, 1, 1\)"),
        ({"groups": 1.0}, "groups must be an integer of at least 1, not 1.0"),
        ({"stride": (0, 1)}, r"stride must be two integers of at least 1, not \(0, 1\)"),
        ({"padding": 1}, "padding must be two integers of at least 0, not 1"),
        ({"dilation": (9, 9)}, r"the output is empty: input \(7, 9\), kernel \(3, 3\), padding \(0, 0\)"),
    ],
)
def test_invalid_arguments_are_named(change: dict[str, Any], message: str) -> None:
    (x, weight, bias), _, _ = case(residual=False)
    arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        conv2d_relu(**arguments)
