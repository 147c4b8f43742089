import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_fast.methods import Batch, Objective, Part, Update

PARTS = [
    [Part(6, 1.0)],
    [Part(6, 0.7)],
    [Part(4, 1.0), Part(2, 1.0)],
    [Part(2, 0.5), Part(4, 2.0)],
    [Part(3, 1.0), Part(3, 0.0)],
    [Part(1, 1.0), Part(2, 3.0), Part(3, 0.25)],
]


def students(dense: bool) -> list[nn.Module]:
    """Twins with batch norm, through which every row's loss reaches the others."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 5, 1)] if dense else [nn.Flatten(), nn.Linear(64, 5)]
    network = nn.Sequential(*layers).double()
    return [network, copy.deepcopy(network)]


def batch(parts: Sequence[Part], dense: bool) -> Batch:
    torch.manual_seed(1)
    logits = torch.randn(6, 5, 4, 4) if dense else torch.randn(6, 5)
    return Batch(torch.randn(6, 2, 4, 4).double(), logits.double(), parts)


def weighted_sum(logits: Tensor, targets: Tensor, parts: Sequence[Part], discrepancy: str) -> Tensor:
    loss, start = torch.zeros((), dtype=torch.float64), 0
    for rows, weight in parts:
        student, teacher = logits[start : start + rows], targets[start : start + rows]
        if discrepancy == "l1":
            loss = loss + weight * F.l1_loss(student, teacher)
        else:
            loss = loss + weight * F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
        start += rows
    return loss


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("discrepancy", ["l1", "kl"])
@pytest.mark.parametrize("dense", [False, True])
def test_the_plain_update_is_the_gradient_of_the_weighted_sum_over_one_forward(parts: list[Part], discrepancy: Any, dense: bool) -> None:
    student, twin = students(dense)
    given = batch(parts, dense)
    loss = Update().backward(student, given, Objective(discrepancy=discrepancy))
    expected = weighted_sum(twin(given.images), given.teacher_logits, parts, discrepancy)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    for parameter, other in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    for buffer, same in zip(student.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, same)


def test_gradients_are_added_to_those_there_are() -> None:
    once, twice = students(dense=False)
    given = batch(PARTS[2], dense=False)
    Update().backward(once, given, Objective())
    for _ in range(2):
        Update().backward(twice, given, Objective())
    for parameter, other in zip(once.parameters(), twice.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(2 * parameter.grad, other.grad)


def test_parts_that_do_not_add_up_to_the_batch_are_refused() -> None:
    student, _ = students(dense=False)
    with pytest.raises(RuntimeError, match="split"):
        Update().backward(student, batch([Part(4, 1.0), Part(1, 1.0)], dense=False), Objective())


def test_an_unknown_kind_is_refused() -> None:
    wrong: Any = "pcgrad"
    with pytest.raises(ValidationError, match="kind"):
        Update(kind=wrong)
