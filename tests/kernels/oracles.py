"""What the kernels' tests share: layouts, float64 oracles in PyTorch's own functions, and how far from them a kernel may be."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded", "misaligned"]
HALVES = [torch.bfloat16, torch.float16]
KERNEL_DTYPES = [torch.float32, *HALVES]
SANITIZED_DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.sanitize), torch.float16]
# Images whose rows of 8 pixels, whose pixels of 8 channels, or neither, are runs of 16 bytes that a kernel may take at once.
RUNS = [(3, 3, 4, 6), (2, 16, 3, 5), (2, 3, 3, 7)]
NAN, INF = float("nan"), float("inf")
# The same examples every time; the fixtures that hypothesis warns of only choose a backend.
PROPERTY = settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values in a layout, with NaN in its gaps; "expanded" repeats the first of the batch with stride 0."""
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
    """Dimensions in any order in memory, NaN between the elements, and some of the dimensions with stride 0."""

    order: list[int]
    steps: tuple[int, ...]
    repeated: tuple[bool, ...]

    def __call__(self, values: Tensor) -> Tensor:
        kept = values[tuple(slice(0, 1) if once else slice(None) for once in self.repeated)].permute(self.order)
        memory = values.new_full([size * step for size, step in zip(kept.shape, self.steps, strict=True)], NAN)
        view = memory[tuple(slice(None, None, step) for step in self.steps)].copy_(kept)
        return view.permute([self.order.index(dimension) for dimension in range(values.ndim)]).expand(values.shape)


def layouts(dimensions: int, *, gaps: bool = True) -> st.SearchStrategy[Layout]:
    steps = st.tuples(*[st.integers(1, 2 if gaps else 1)] * dimensions)
    repeated = st.tuples(*[st.integers(0, 4).map(lambda chance: gaps and chance == 0)] * dimensions)
    return st.builds(Layout, st.permutations(range(dimensions)), steps, repeated)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", size: float = 2.0, device: torch.device | str = "cpu"
) -> Tensor:
    """A leaf of normal numbers, the same on every device."""
    return laid_out((size * torch.randn(shape)).to(device, dtype), layout).detach().requires_grad_()


def assert_as_exact_as_plain(actual: Tensor, plain: Tensor, exact: Tensor, *, summed: float = 0.0) -> None:
    """At most twice as far from the float64 truth as plain PyTorch, anywhere.

    Plain PyTorch reads and computes in float32 and rounds its results to the storage dtype once; a kernel may round to it
    twice, hence one ulp. The absolute term is some float32 ulps of the largest result, or of the size of what is
    summed where that cancels, because on a few elements plain PyTorch can be exact by luck.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == plain.dtype
    assert torch.isfinite(exact).all(), "compare what is not finite by its positions"
    if not actual.numel():
        return
    exact = exact.double()
    error, usual = (actual.double() - exact).abs(), (plain.double() - exact).abs().max()
    stored = torch.finfo(actual.dtype)
    absolute = 8 * torch.finfo(torch.float32).eps * max(exact.abs().max().item(), summed) + stored.smallest_normal * stored.eps
    excess = (error - (2 * usual + stored.eps * exact.abs() + absolute)).nan_to_num(nan=INF).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"element {worst}: {actual.flatten()[worst].item()} for {exact.flatten()[worst].item()}; plain PyTorch errs by {usual.item():.3g}"
    )


def discrepancy(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The sum over all rows in the logits' own precision: F.l1_loss, F.kl_div, and Jensen-Shannon as two F.kl_div to the mean."""
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
    """In terms of exponentials that cannot overflow."""
    if activation == "none":
        return raw
    x = 2 * raw if activation == "tanh" else raw
    decay = torch.exp(-x.abs())
    sigmoid = torch.where(x >= 0, 1 / (1 + decay), decay / (1 + decay))
    return 2 * sigmoid - 1 if activation == "tanh" else sigmoid


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, by torch.var."""
    return x.mean(dim=(0, 2, 3)), torch.var(x, dim=(0, 2, 3), correction=0)


def lerp(average: Tensor, source: Tensor, decay: float) -> Tensor:
    return decay * average.double() + (1 - decay) * source.double()
