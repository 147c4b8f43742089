"""Every kernel is a traceable operator with a correct schema, fake implementation and autograd formula."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from dfkd_fast.kernels import (
    Backend,
    batch_norm_act,
    bias_act,
    channel_moments,
    channel_sums,
    combine_moments,
    concat_generated,
    conv2d_relu,
    ema_update_,
    js_discrepancy,
    kl_discrepancy,
    l1_discrepancy,
    partial_moments,
    use_backend,
)
from dfkd_fast.kernels.operators import SCHEMAS
from tests.kernels.oracles import bias_act_moments, with_layout

LAYOUTS = ["contiguous", "channels_last", "sliced"]


def arguments(name: str, layout: str, device: torch.device) -> tuple[Any, ...]:
    """Arguments of an operator, with tensors in the given layout."""
    torch.manual_seed(0)
    first, second = (with_layout(torch.randn(2, 5, 4, 6, device=device), layout) for _ in range(2))
    raws, constants = [first, second[:1]], [*(torch.rand(4, 5, device=device) + 0.5)]
    table = torch.rand(2, 5, device=device) + 0.5
    dense = with_layout(torch.randn(2, 5, 4, 6, device=device), "channels_last" if layout == "channels_last" else "contiguous")
    match name:
        case "ema_update_":
            return [dense.clone()], [dense.half()], [dense.bfloat16()], 0.0, torch.tensor(0.9, device=device)
        case "l1_forward":
            return first, second, 0.5, True, True
        case "kl_forward" | "js_forward":
            return first, second, 2.0, 0.5, True, True, True
        case "scale_gradients":
            return dense, dense.half(), torch.tensor(3.0, device=device), 0.5, -0.5, torch.float32, torch.float16
        case "scale_gradients_":
            return dense.clone(), dense.half(), torch.tensor(3.0, device=device), 0.5, -0.5
        case "concat_forward":
            return raws, "tanh", table, table, torch.bfloat16, True
        case "concat_forward_out":
            return torch.zeros(3, 5, 4, 6, device=device), raws, "sigmoid", table, table
        case "concat_backward":
            return first, second, "tanh", *constants
        case "concat_gradient_moments":
            return first, second, "none", *constants[:2]
        case "partial_moments":
            return first, "tanh", 3
        case "combine_moments":
            wide, narrow = torch.randn(2, 7, 3, device=device), torch.randn(2, 5, 1, device=device)
            centers = [torch.randn(7, device=device), torch.randn(5, device=device)]
            scale, shift = torch.randn(2, 2, 2, 7, device=device)
            return [wide, narrow], centers, scale, shift, False
        case "moments_backward":
            return first, *constants[:3], 0.25
        case "bias_act_forward":
            return first, constants[0], second, "hardswish"
        case "bias_act_moments_forward":
            return first, constants[0], second, "hardswish", 3
        case "bias_act_backward":
            return dense, first, constants[0], second, "silu", *constants[1:], 0.25, True
        case "batch_norm_constants":
            return *constants, torch.rand(5, device=device), 1e-3
        case "batch_norm_statistics":
            running = torch.randn(5, device=device), torch.rand(5, device=device), torch.tensor(3, device=device)
            count = torch.tensor([70.0], dtype=torch.float64, device=device)
            return torch.randn(2, 5, 6, device=device), *constants, *running, count, 0.1, 1e-3, 48
        case "batch_norm_act_forward":
            return first, torch.stack(constants), second, "leaky_relu", 0.2
        case "batch_norm_act_sums":
            return dense, first, torch.stack(constants), second, "relu", 0.0, 3
        case "batch_norm_gradients":
            return table[:, :, None].expand(2, 5, 4).contiguous(), torch.stack(constants), torch.ones(1, device=device).double(), 48, True
        case "batch_norm_act_backward":
            return dense, first, torch.stack(constants), torch.rand(5, 5, device=device), second, "relu6", 0.0, True
    raise ValueError(name)


def lean_arguments(name: str, layout: str, device: torch.device) -> tuple[Any, ...]:
    """Arguments of the same operator without optional outputs and inputs."""
    full = arguments(name, layout, device)
    match name:
        case "ema_update_":
            return full[0], full[1], [], 0.5, None
        case "l1_forward":
            return *full[:3], False, False
        case "kl_forward" | "js_forward":
            return *full[:4], False, True, False
        case "scale_gradients":
            sign = full[0].sign().to(torch.int8)
            return sign, sign.new_empty(0), *full[2:5], torch.bfloat16, torch.float32
        case "scale_gradients_":
            return full[0].new_empty(0), *full[1:]
        case "concat_forward":
            return full[0], "none", None, None, torch.float32, False
        case "concat_forward_out":
            return with_layout(full[0], layout), full[1], "none", None, None
        case "concat_backward":
            return full[0][:1], full[1][:1], "sigmoid", None, None, None, None
        case "concat_gradient_moments":
            return full[0][:1], full[1][:1], "tanh", *full[3:]
        case "partial_moments":
            return full[0][:1], "none", 1
        case "combine_moments":
            return full[0][:1], full[1][:1], None, None, True
        case "bias_act_forward":
            return full[0][:1], full[1], None, "relu"
        case "bias_act_moments_forward":
            return full[0][:1], full[1], None, "relu", 1
        case "bias_act_backward":
            return full[0][:1], full[1][:1], full[2], None, "relu6", None, None, None, 0.0, False
        case "batch_norm_constants":
            return *full[:2], None, None, None, 1e-3
        case "batch_norm_statistics":
            return full[0], full[1], *[None] * 7, None, 1e-3, 48
        case "batch_norm_act_forward":
            return full[0][:1], full[1], None, "silu", 0.0
        case "batch_norm_act_sums":
            return full[0][:1], full[1][:1], full[2], None, "hardswish", 0.0, 1
        case "batch_norm_gradients":
            return full[0], full[1], None, 48, False
        case "batch_norm_act_backward":
            return full[0][:1], full[1][:1], full[2], None, None, "none", 0.0, False
    return (full[0][:1], *full[1:])


def operator(name: str, backend: Backend) -> Any:
    return getattr(getattr(torch.ops.dfkd_fast, name), backend)


@pytest.mark.parametrize(("layout", "make"), [*((layout, arguments) for layout in LAYOUTS), ("contiguous", lean_arguments)])
@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_pass_opcheck(fused: Backend, device: torch.device, name: str, layout: str, make: Callable[..., tuple[Any, ...]]) -> None:
    torch.library.opcheck(operator(name, fused), make(name, layout, device))


@pytest.mark.parametrize("make", [arguments, lean_arguments])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name, schema in SCHEMAS.items() if "!" not in schema])
def test_fake_results_match_shapes_strides_and_dtypes(
    fused: Backend, device: torch.device, name: str, layout: str, make: Callable[..., tuple[Any, ...]]
) -> None:
    args = make(name, layout, device)
    real = operator(name, fused)(*args)
    with FakeTensorMode() as mode:
        fake = operator(name, fused)(*tree_map_only(Tensor, mode.from_tensor, args))
    for one, other in zip(*(results if isinstance(results, tuple) else (results,) for results in (real, fake)), strict=True):
        assert (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, other.device)


@pytest.mark.parametrize("changes", ["averages", "shadows", "out"])
def test_in_place_updates_of_saved_tensors_are_detected_by_autograd(backend: Backend, device: torch.device, changes: str) -> None:
    saved, other = torch.ones(1, 5, 4, 6, device=device), torch.zeros(1, 5, 4, 6, device=device)
    loss = (saved * torch.ones(1, device=device, requires_grad=True)).sum()
    match changes:
        case "averages":
            ema_update_([saved], [other], 0.5)
        case "shadows":
            ema_update_([other.clone()], [other], 0.5, shadows=[saved])
        case "out":
            concat_generated([other], activation="tanh", normalize="none", out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_averages_created_in_inference_mode_are_updated(backend: Backend, device: torch.device) -> None:
    with torch.inference_mode():
        average, source = torch.ones(3, device=device), torch.zeros(3, device=device)
        ema_update_([average], [source], 0.5)
    assert average.tolist() == [0.5] * 3


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda s, t: l1_discrepancy(s, t, reduction="mean"),
    "kl": lambda s, t: kl_discrepancy(s, t, temperature=2.0, reduction="batchmean", scale_by_temperature_squared=True),
    "js": lambda s, t: js_discrepancy(s, t, temperature=2.0, reduction="sum", scale_by_temperature_squared=False),
    "agreement": lambda s, t: torch.stack(list(l1_discrepancy(s, t, reduction="sum", agreement=True))).sum(),
    "moments": lambda s, t: torch.stack(channel_moments(s * t)).square().sum(),
    "sums": lambda s, t: torch.stack(channel_sums(s * t)[:2]).sum(),
    "combined moments": lambda s, t: combine_moments([partial_moments(s), partial_moments(t)]).square().sum(),
    "bias_act": lambda s, t: bias_act(s, torch.ones(5).to(s), t, activation="silu").square().sum(),
    "bias_act and moments": lambda s, t: torch.stack(
        [result.square().sum() for result in bias_act_moments(s, torch.ones(5).to(s), t, "relu")]
    ).sum(),
    "batch_norm_act": lambda s, t: (
        batch_norm_act(
            s, torch.zeros(5).to(s), torch.ones(5).to(s), None, None, t, training=True, momentum=0.1, eps=1e-3, activation="relu"
        )
        .square()
        .sum()
    ),
    "concat": lambda s, t: (
        concat_generated([s, t], activation="tanh", normalize="dataset", mean=torch.zeros(5).to(s), std=torch.full((5,), 0.5).to(s))
        .square()
        .sum()
    ),
}


def compiled_as_eager(function: Callable[[Tensor, Tensor], Tensor], compiler: str, device: torch.device) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 4, 6, device=device, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    value, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_with_fullgraph_including_gradients(backend: Backend, device: torch.device, name: str) -> None:
    compiled_as_eager(FUNCTIONS[name], "aot_eager", device)


def of_layers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layers whose gradients have the size of images, each between convolutions."""
    y = F.conv2d(conv2d_relu(x, weight, bias, padding=(1, 1)), weight, padding=1)
    y, moments = bias_act(y, bias, y, activation="silu", moments=True)
    y = F.conv2d(bias_act(F.conv2d(y, weight, padding=1), bias, y, activation="relu"), weight, padding=1)
    mean, variance = torch.zeros_like(bias), torch.ones_like(bias)
    y = batch_norm_act(y, mean, variance, None, None, y, training=True, momentum=0.1, eps=1e-3, activation="relu")
    return F.conv2d(y, weight, padding=1).square().sum() + combine_moments([moments]).square().sum()


def test_compiled_gradients_of_channels_last_images_are_not_copied(fused: Backend, device: torch.device) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, device=device).to(memory_format=torch.channels_last) for shape in ((2, 5, 4, 6), (5, 5, 3, 3)))
    x.requires_grad_()
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(of_layers, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    arguments = x, weight, torch.randn(5, device=device)
    gradients = [torch.autograd.grad(function(*arguments), x)[0] for function in (compiled, of_layers)]
    torch.testing.assert_close(*gradients)
    _, backward = graphs
    names = [
        str(node.target) for node in backward.graph.nodes if "val" in node.meta and getattr(node.meta["val"], "shape", None) == x.shape
    ]
    assert any("batch_norm_act" in str(node.target) for node in backward.graph.nodes)
    assert not [name for name in names if "clone" in name or "copy" in name]


@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_functions_of_lists_compile_with_fullgraph_without_gradients(backend: Backend, device: torch.device, inputs: int) -> None:
    xs = [torch.randn(2, 5, 4, 6, device=device) for _ in range(inputs)]
    functions: list[Callable[..., Tensor]] = [
        lambda *xs: combine_moments([partial_moments(x) for x in xs]),
        lambda *xs: concat_generated(xs, activation="tanh", normalize="none"),
    ]
    for function in functions:
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*xs), function(*xs))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_an_operator() -> None:
    with use_backend("numba"):
        compiled_as_eager(FUNCTIONS["kl"], "inductor", torch.device("cpu"))
