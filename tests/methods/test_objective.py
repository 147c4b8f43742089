from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import rel_entr, softmax
from torch import Tensor

from dfkd_fast.methods import Objective
from dfkd_fast.models import Observation

Array = np.ndarray[Any, np.dtype[np.float64]]


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    return student.requires_grad_(), teacher


def l1(student: Array, teacher: Array, _: float) -> float:
    return float(np.abs(student - teacher).mean())


def log_l1(student: Array, teacher: Array, _: float) -> float:
    return float(np.log(1 + np.abs(student - teacher).mean()))


def kl(student: Array, teacher: Array, temperature: float) -> float:
    """KL(teacher ‖ student) a sample, times temperature²."""
    p, q = (softmax(logits / temperature, axis=1) for logits in (teacher, student))
    return float(temperature**2 * rel_entr(p, q).sum() / len(p))


@pytest.mark.parametrize("shape", [(5, 7), (2, 11, 3, 5)])
@pytest.mark.parametrize(("discrepancy", "oracle"), [("l1", l1), ("kl", kl)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_student_minimises_the_chosen_discrepancy(shape: tuple[int, ...], discrepancy: Any, oracle: Any, temperature: float) -> None:
    student, teacher = pair(*shape)
    loss = Objective(discrepancy=discrepancy, temperature=temperature).student_loss(student, teacher)
    assert loss.item() == pytest.approx(oracle(student.detach().numpy(), teacher.numpy(), temperature), rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 7), (2, 11, 3, 5)])
@pytest.mark.parametrize(("adversary", "oracle"), [("l1", l1), ("log_l1", log_l1), ("kl", kl)])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_generator_maximises_the_weighted_adversary(shape: tuple[int, ...], adversary: Any, oracle: Any, weight: float) -> None:
    student, teacher = pair(*shape)
    terms = Objective(adversary=adversary, adversarial=weight, temperature=2.5).generator_terms(student, Observation(teacher))
    assert list(terms) == ["adversarial"]
    assert terms["adversarial"].item() == pytest.approx(-weight * oracle(student.detach().numpy(), teacher.numpy(), 2.5), rel=1e-12)


@pytest.mark.parametrize("adversary", ["l1", "log_l1", "kl"])
def test_a_step_against_the_generators_gradient_drives_student_and_teacher_apart(adversary: Any) -> None:
    student, teacher = pair(5, 7)
    objective = Objective(adversary=adversary)
    before = objective.generator_terms(student, Observation(teacher))["adversarial"]
    (gradient,) = torch.autograd.grad(before, student)
    after = objective.generator_terms(student.detach() - 1e-3 * gradient, Observation(teacher))["adversarial"]
    # First order: the term falls by the step times the squared gradient.
    assert after.item() - before.item() == pytest.approx(-1e-3 * gradient.square().sum().item(), rel=0.05)


@pytest.mark.parametrize(("adversary", "discrepancy", "oracle"), [("l1", "kl", l1), ("kl", "l1", kl), ("log_l1", "kl", log_l1)])
def test_student_and_generator_may_use_different_discrepancies(adversary: Any, discrepancy: Any, oracle: Any) -> None:
    student, teacher = pair(5, 7)
    term = Objective(discrepancy=discrepancy, adversary=adversary).generator_terms(student, Observation(teacher))["adversarial"]
    assert term.item() == pytest.approx(-oracle(student.detach().numpy(), teacher.numpy(), 1.0), rel=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"discrepancy": "l2"},
        {"discrepancy": "log_l1"},
        {"adversary": "mse"},
        {"temperature": 0.0},
        {"temperature": "1"},
        {"adversarial": -1.0},
        {"tau": 1.0},
    ],
)
def test_a_section_with_a_wrong_value_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Objective(**wrong)
