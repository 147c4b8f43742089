"""Shared code of the discrepancy tests: calls of all kinds, and a comparison with float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfkd_fast.kernels import js_discrepancy, kl_discrepancy, l1_discrepancy
from dfkd_fast.kernels.discrepancy import Reduction
from tests.kernels.oracles import assert_as_accurate_as_pytorch, discrepancy, reduction_factor

FUNCTIONS: dict[str, Callable[..., Any]] = {"l1": l1_discrepancy, "kl": kl_discrepancy, "js": js_discrepancy}
KINDS = list(FUNCTIONS)
REDUCTIONS: list[Reduction] = ["batchmean", "mean", "sum"]
# Each combination costs numba some seconds of compilation per kernel.
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
    return call_with_agreement(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=scaled)[0]


def call_with_agreement(
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
    output = FUNCTIONS[kind](student, teacher, reduction=reduction, agreement=agreement, **softened)
    return output if agreement else (output, None)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients for an upstream gradient other than 1, computed twice: with and without ``retain_graph``."""
    weighted = loss * WEIGHTS.to(loss)
    first = torch.autograd.grad(weighted, inputs, COTANGENT.to(loss), retain_graph=True)
    again = torch.autograd.grad(weighted, inputs, COTANGENT.to(loss))
    for gradient, other in zip(first, again, strict=True):  # the last pass may round the factor differently
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
    """Compare loss, both gradients and agreement with float64."""
    loss, count = call_with_agreement(kind, student, teacher, temperature=temperature, reduction=reduction, scaled=scaled)
    factor = reduction_factor(reduction, student.shape) * (temperature**2 if scaled and kind != "l1" else 1.0)
    exact_inputs = [side.detach().double().requires_grad_() for side in (student, teacher)]
    plain_inputs = [side.detach().clone().requires_grad_() for side in (student, teacher)]
    exact = factor * formula(kind, exact_inputs[0], exact_inputs[1], temperature)
    plain = factor * formula(kind, plain_inputs[0].float(), plain_inputs[1].float(), temperature)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    # log p and log q have rounding errors proportional to log C, and cancel in their differences.
    logarithms = student.numel() // student.shape[1] * factor if kind != "l1" else 0.0
    assert_as_accurate_as_pytorch(loss.detach(), plain.detach(), exact.detach(), magnitude=logarithms)
    exact_gradients = gradients(exact, *exact_inputs)
    for side, gradient, plain_gradient, expected in zip(
        (student, teacher), gradients(loss, student, teacher), gradients(plain, *plain_inputs), exact_gradients, strict=True
    ):
        assert gradient.dtype == side.dtype
        assert_as_accurate_as_pytorch(gradient, plain_gradient, expected, magnitude=factor if kind == "js" else 0.0)
    assert count is not None
    assert (count.shape, count.dtype) == ((), torch.int64)
    assert count.item() == (exact_inputs[0].argmax(dim=1) == exact_inputs[1].argmax(dim=1)).sum().item()
