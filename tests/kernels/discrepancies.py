"""What the tests of the discrepancies share: calls of any kind, and a comparison with float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.kernels import js_discrepancy, kl_discrepancy, l1_discrepancy
from dfkd_fast.kernels.discrepancy import Reduction
from tests.kernels.oracles import assert_as_exact_as_plain, discrepancy, reduction_factor

FUNCTIONS: dict[str, Callable[..., Any]] = {"l1": l1_discrepancy, "kl": kl_discrepancy, "js": js_discrepancy}
KINDS = list(FUNCTIONS)
REDUCTIONS: list[Reduction] = ["batchmean", "mean", "sum"]
# Each costs numba some seconds for every kernel.
PAIRS_OF_DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16),
]
WEIGHTS, COTANGENT = torch.tensor([0.5, -2.0, 3.0]), torch.tensor([1.0, 0.25, -0.5])


def call(
    kind: str, student: Tensor, teacher: Tensor, *, temperature: float = 1.0, reduction: Reduction = "sum", scaled: bool = False
) -> Tensor:
    return counted(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=scaled)[0]


def counted(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "sum",
    scaled: bool = False,
    agreement: bool = True,
) -> tuple[Tensor, Tensor | None]:
    softened: dict[str, Any] = {} if kind == "l1" else {"temperature": temperature, "scale_by_temperature_squared": scaled}
    found = FUNCTIONS[kind](student, teacher, reduction=reduction, agreement=agreement, **softened)
    return found if agreement else (found, None)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Through more than one number, so that the upstream gradient is not 1; twice, so that the first pass leaves the graph whole."""
    weighted = loss * WEIGHTS.to(loss)
    first = torch.autograd.grad(weighted, inputs, COTANGENT.to(loss), retain_graph=True)
    again = torch.autograd.grad(weighted, inputs, COTANGENT.to(loss))
    for gradient, other in zip(first, again, strict=True):  # the last pass may round the factor once more
        torch.testing.assert_close(gradient, other, rtol=2 * torch.finfo(gradient.dtype).eps, atol=torch.finfo(gradient.dtype).tiny)
    return again


def compare(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "sum",
    scaled: bool = False,
    formula: Callable[[str, Tensor, Tensor, float], Tensor] = discrepancy,
) -> None:
    """Value, both gradients and the agreement against float64."""
    loss, count = counted(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=scaled)
    factor = reduction_factor(reduction, student.shape) * (temperature**2 if scaled and kind != "l1" else 1.0)
    exact_inputs = [side.detach().double().requires_grad_() for side in (student, teacher)]
    plain_inputs = [side.detach().clone().requires_grad_() for side in (student, teacher)]
    exact = factor * formula(kind, exact_inputs[0], exact_inputs[1], temperature)
    plain = factor * formula(kind, plain_inputs[0].float(), plain_inputs[1].float(), temperature)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    # A row's log p and log q are rounded at the size of the logarithm of C, their distances from log m at that of 2, and cancel.
    logarithms = student.numel() // student.shape[1] * factor if kind != "l1" else 0.0
    assert_as_exact_as_plain(loss.detach(), plain.detach(), exact.detach(), summed=logarithms)
    truth = gradients(exact, *exact_inputs)
    for side, gradient, usual, expected in zip(
        (student, teacher), gradients(loss, student, teacher), gradients(plain, *plain_inputs), truth, strict=True
    ):
        assert gradient.dtype == side.dtype
        assert_as_exact_as_plain(gradient, usual, expected, summed=factor if kind == "js" else 0.0)
    assert count is not None
    assert (count.shape, count.dtype) == ((), torch.int64)
    assert count.item() == (exact_inputs[0].argmax(dim=1) == exact_inputs[1].argmax(dim=1)).sum().item()
