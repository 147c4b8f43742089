"""Shared code of the kernel tests: layouts, float64 references built from PyTorch functions, and tolerances."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from dfkd_fast.kernels import bias_act, combine_moments

LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded", "misaligned"]
HALVES = [torch.bfloat16, torch.float16]
KERNEL_DTYPES = [torch.float32, *HALVES]
SANITIZED_DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.sanitize), torch.float16]
# Shapes that allow 16-byte accesses along pixels, along channels, or not at all.
RUNS = [(3, 3, 4, 6), (2, 16, 3, 5), (2, 3, 3, 7)]
NAN, INF = float("nan"), float("inf")
# Deterministic examples; the function-scoped fixtures only select a backend.
PROPERTY = settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def with_layout(values: Tensor, layout: str) -> Tensor:
    """Return values in a layout, with NaN in gaps; "expanded" repeats the first sample with stride 0."""
    match layout:
        case "contiguous":
            return values.contiguous()
        case "channels_last":
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        case "sliced":
            gaps = torch.full_like(values, NAN) if values.is_floating_point() else torch.zeros_like(values)
            return torch.stack([values, gaps], dim=-1)[..., 0]
        case "transposed":
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        case "expanded":
            return values[:1].expand(values.shape)
        case "misaligned":
            return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    raise ValueError(layout)


class Layout(NamedTuple):
    """Layout with permuted dimensions, gaps filled with NaN, and expanded dimensions."""

    order: list[int]
    steps: tuple[int, ...]
    repeated: tuple[bool, ...]

    def __call__(self, values: Tensor) -> Tensor:
        unexpanded = values[tuple(slice(0, 1) if once else slice(None) for once in self.repeated)].permute(self.order)
        memory = values.new_full([size * step for size, step in zip(unexpanded.shape, self.steps, strict=True)], NAN)
        view = memory[tuple(slice(None, None, step) for step in self.steps)].copy_(unexpanded)
        return view.permute([self.order.index(dimension) for dimension in range(values.ndim)]).expand(values.shape)


def layouts(dimensions: int, *, gaps: bool = True) -> st.SearchStrategy[Layout]:
    steps = st.tuples(*[st.integers(1, 2 if gaps else 1)] * dimensions)
    repeated = st.tuples(*[st.integers(0, 4).map(lambda chance: gaps and chance == 0)] * dimensions)
    return st.builds(Layout, st.permutations(range(dimensions)), steps, repeated)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", size: float = 2.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return a leaf with normally distributed values, identical on every device."""
    return with_layout((size * torch.randn(shape)).to(device, dtype), layout).detach().requires_grad_()


def assert_as_accurate_as_pytorch(actual: Tensor, plain: Tensor, exact: Tensor, *, magnitude: float = 0.0) -> None:
    """Assert that the error with respect to float64 is at most twice the largest error of plain PyTorch.

    Plain PyTorch computes in float32 and rounds its results once; a kernel may round twice, hence one more ulp. The absolute
    tolerance is some float32 ulps of the largest result, or of ``magnitude``, the magnitude of the terms if they cancel, because plain
    PyTorch can be exact by chance on a few elements.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == plain.dtype
    assert torch.isfinite(exact).all(), "compare nonfinite values by their positions"
    if not actual.numel():
        return
    exact = exact.double()
    error, usual = (actual.double() - exact).abs(), (plain.double() - exact).abs().max()
    stored = torch.finfo(actual.dtype)
    absolute = 8 * torch.finfo(torch.float32).eps * max(exact.abs().max().item(), magnitude) + stored.smallest_normal * stored.eps
    excess = (error - (2 * usual + stored.eps * exact.abs() + absolute)).nan_to_num(nan=INF).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"element {worst}: {actual.flatten()[worst].item()} for {exact.flatten()[worst].item()}; error of plain PyTorch {usual.item():.3g}"
    )


def discrepancy(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over all rows in the precision of the logits, by F.l1_loss and F.kl_div."""
    if kind == "l1":
        return F.l1_loss(student, teacher, reduction="sum")
    log_q, log_p = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    if kind == "kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    log_m = torch.stack([log_p, log_q]).logsumexp(dim=0) - math.log(2)
    return 0.5 * sum((F.kl_div(log_m, log, reduction="sum", log_target=True) for log in (log_p, log_q)), start=log_m.new_zeros(()))


def reduction_factor(reduction: str, shape: tuple[int, ...] | torch.Size) -> float:
    return {"sum": 1.0, "batchmean": 1 / shape[0], "mean": 1 / math.prod(shape)}[reduction]


def activated(raw: Tensor, activation: str) -> Tensor:
    """Activation by exponentials that cannot overflow."""
    if activation == "none":
        return raw
    x = 2 * raw if activation == "tanh" else raw
    decay = torch.exp(-x.abs())
    sigmoid = torch.where(x >= 0, 1 / (1 + decay), decay / (1 + decay))
    return 2 * sigmoid - 1 if activation == "tanh" else sigmoid


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and biased variance."""
    return x.mean(dim=(0, 2, 3)), torch.var(x, dim=(0, 2, 3), correction=0)


def bias_act_moments(x: Tensor, bias: Tensor, residual: Tensor | None, activation: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of bias_act, and the mean and variance (C,) that its moments combine to."""
    y, partial = bias_act(x, bias, residual, activation=activation, moments=True)
    table = combine_moments([partial])
    return y, table[0, 0], table[1, 0]


def lerp(average: Tensor, source: Tensor, decay: float) -> Tensor:
    return decay * average.double() + (1 - decay) * source.double()
