"""CUDA graphs and streams, which need a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.kernels import (
    Backend,
    FusedEMA,
    batch_norm_act,
    channel_moments,
    channel_sums,
    combine_moments,
    concat_generated,
    ema_update_,
    js_discrepancy,
    kl_discrepancy,
    l1_discrepancy,
    partial_moments,
)
from tests.kernels.oracles import bias_act_moments, lerp, with_layout

pytestmark = pytest.mark.gpu

SOFT: dict[str, Any] = {"temperature": 2.0, "reduction": "batchmean", "scale_by_temperature_squared": True}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Sequence[Tensor]]] = {
    "l1": lambda a, b: l1_discrepancy(a, b, reduction="mean", agreement=True),
    "kl": lambda a, b: kl_discrepancy(a, b, **SOFT, agreement=True),
    "js": lambda a, b: js_discrepancy(a, b, **SOFT, agreement=True),
    "bias_act": lambda a, b: bias_act_moments(a, b.detach()[0, :, 0, 0], b, "silu"),
    "moments": lambda a, b: channel_moments(a * b),
    "sums": lambda a, b: channel_sums(a * b)[:2],
    "combined moments": lambda a, b: [combine_moments([partial_moments(a), partial_moments(b)])],
    "concat": lambda a, b: [concat_generated([a, b], activation="tanh", normalize="none")],
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a step in a CUDA graph after three warm-up runs; return the graph and the step's results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_replayed_graph_uses_the_current_inputs(gpu_backend: Backend, name: str, dtype: torch.dtype, layout: str) -> None:
    inputs = [with_layout(torch.randn(4, 10, 9, 7, device="cuda", dtype=dtype), layout).detach().requires_grad_() for _ in range(2)]

    def step() -> tuple[Tensor, ...]:
        results = FUNCTIONS[name](*inputs)
        loss = torch.stack([result.float().square().sum() for result in results if result.is_floating_point()]).sum()
        return (*results, *torch.autograd.grad(loss, inputs))

    graph, results = captured(step)
    for _ in range(2):
        with torch.no_grad():
            for tensor in inputs:
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        replayed = [result.detach().clone() for result in results]
        for actual, expected in zip(replayed, step(), strict=True):
            assert torch.equal(actual, expected.detach())


def test_a_replayed_graph_updates_running_statistics(gpu_backend: Backend) -> None:
    raw, mean, variance = torch.randn(4, 3, 9, 7, device="cuda"), torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    layer = nn.BatchNorm2d(3, affine=False).cuda()

    def step() -> Tensor:
        return concat_generated([raw], activation="tanh", normalize="batch", running_means=[mean], running_vars=[variance], training=[True])

    graph, batch = captured(step)
    mean.zero_()
    variance.fill_(1.0)
    for _ in range(2):
        raw.normal_()
        graph.replay()
        torch.testing.assert_close(batch, layer(raw.tanh()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([mean, variance], [layer.running_mean, layer.running_var], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_batch_norm_uses_the_current_inputs(gpu_backend: Backend, dtype: torch.dtype, layout: str) -> None:
    x, residual, upstream = (with_layout(torch.randn(4, 10, 9, 7, device="cuda", dtype=dtype), layout) for _ in range(3))
    x.requires_grad_()
    residual.requires_grad_()
    weight, bias = (torch.randn(10, device="cuda").requires_grad_() for _ in range(2))
    mean, variance = torch.zeros(10, device="cuda"), torch.ones(10, device="cuda")
    batches = torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, ...]:
        keywords: Any = {"momentum": None, "eps": 1e-5, "activation": "relu", "num_batches_tracked": batches}
        y = batch_norm_act(x, mean, variance, weight, bias, residual, training=True, **keywords)
        with torch.no_grad():
            evaluated = batch_norm_act(x, mean, variance, weight, bias, training=False, **keywords)
        return y, evaluated, *torch.autograd.grad(y, (x, residual, weight, bias), upstream)

    graph, results = captured(step)
    for _ in range(2):
        with torch.no_grad():
            for tensor in (x, residual, upstream, weight, bias, mean):
                tensor.copy_(torch.randn_like(tensor))
            variance.uniform_(0.5, 2)
        before = mean.clone(), variance.clone(), batches.clone()
        graph.replay()
        statistics = mean, variance, batches
        replayed = [result.detach().clone() for result in (*results, *statistics)]
        for statistic, value in zip(statistics, before, strict=True):
            statistic.copy_(value)
        for actual, expected in zip(replayed, (*step(), *statistics), strict=True):
            assert torch.equal(actual, expected.detach())


@pytest.mark.parametrize("decay_dtype", [torch.float32, torch.float64], ids=str)
def test_a_replayed_average_uses_the_current_decay_and_sources(gpu_backend: Backend, decay_dtype: torch.dtype) -> None:
    averages, sources = ([torch.randn(size, device="cuda") for size in (3, 5000, 0, 70_001)] for _ in range(2))
    sources[1] = sources[1].bfloat16()
    shadows = [average.half() for average in averages]
    decay = torch.tensor(0.5, device="cuda", dtype=decay_dtype)
    graph, _ = captured(lambda: ema_update_(averages, sources, decay, shadows=shadows))
    for value in (0.9, 0.25, 1.0, 0.0):
        decay.fill_(value)
        for tensor in (*averages, *sources):
            tensor.normal_()
        expected = [lerp(average, source, decay.item()) for average, source in zip(averages, sources, strict=True)]
        graph.replay()
        for average, shadow, exact in zip(averages, shadows, expected, strict=True):
            torch.testing.assert_close(average.double(), exact, rtol=1e-6, atol=1e-6)
            assert torch.equal(shadow, average.half())


def test_a_replayed_warm_up_continues(gpu_backend: Backend) -> None:
    model = nn.Linear(3, 2).cuda()
    ema = FusedEMA(model, 0.999, warm_up=True)
    graph, _ = captured(lambda: ema.update(model))
    begun = int(ema.updates)
    expected = ema.module.state_dict()["weight"].double()
    for n in range(begun, begun + 3):
        with torch.no_grad():
            model.weight.normal_()
        graph.replay()
        expected = lerp(expected, model.weight.detach(), (1 + n) / (10 + n))
    torch.testing.assert_close(ema.module.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert int(ema.updates) == begun + 3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_kernel_runs_on_the_current_stream(gpu_backend: Backend, name: str) -> None:
    first, second = (torch.randn(4, 10, 9, 7, device="cuda") for _ in range(2))
    expected = FUNCTIONS[name](first + 1, second)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read the inputs too early
        results = FUNCTIONS[name](first + 1, second)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))
