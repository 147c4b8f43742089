import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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
    """Two equal students with batch norm, so that the loss of each row depends on all rows."""
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
            divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)
            loss = loss + weight * divergence / teacher[:, 0].numel()
        start += rows
    return loss


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("discrepancy", ["l1", "kl"])
@pytest.mark.parametrize("dense", [False, True])
def test_the_plain_update_is_the_gradient_of_the_weighted_sum_over_one_forward(parts: list[Part], discrepancy: Any, dense: bool) -> None:
    student, twin = students(dense)
    data = batch(parts, dense)
    loss = Update().backward(student, data, Objective(discrepancy=discrepancy))
    expected = weighted_sum(twin(data.images), data.teacher_logits, parts, discrepancy)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    for parameter, other in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    for buffer, same in zip(student.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, same)


class Vectors(nn.Module):
    """Logits of a sequential network, and a stand-in for feature vectors: a projection of the second layer's features."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.projection = network, nn.Conv2d(channels, 2, 1).double()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network[:2](images)  # type: ignore[index]
        return self.network[2:](features), self.projection(features).flatten(1)  # type: ignore[index]


@pytest.mark.parametrize("kind", ["plain", "pooled"])
@pytest.mark.parametrize(("parts", "covered"), [([Part(6, 0.7)], 6), ([Part(4, 1.3), Part(2, 0.5)], 6), ([Part(4, 1.3), Part(2, 0.5)], 4)])
def test_features_are_compared_in_the_rows_that_have_the_teachers(kind: Any, parts: list[Part], covered: int) -> None:
    student, twin = students(dense=False)
    data, maps = batch(parts, dense=False), torch.randn(6, 32).double()
    vectors, by_hand = Vectors(student, 4), Vectors(twin, 4)
    by_hand.projection.load_state_dict(vectors.projection.state_dict())
    data = dataclasses.replace(data, teacher_features=maps[:covered])
    objective = Objective(student_weight=1.9)
    loss = Update(kind=kind).backward(student, data, objective, feature_vectors=vectors)

    logits, features = by_hand(data.images)
    if kind == "pooled":
        expected = 1.9 * (F.l1_loss(logits, data.teacher_logits) + (features - maps)[:covered].pow(2).sum() / 6)
    else:
        expected, start = weighted_sum(logits, data.teacher_logits, parts, "l1"), 0
        for rows, weight in parts:
            if start < covered:
                expected = expected + weight * (features - maps)[start : start + rows].pow(2).sum() / rows
            start += rows
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for parameter, other in zip(vectors.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_gradients_accumulate() -> None:
    once, twice = students(dense=False)
    data = batch(PARTS[2], dense=False)
    Update().backward(once, data, Objective())
    for _ in range(2):
        Update().backward(twice, data, Objective())
    for parameter, other in zip(once.parameters(), twice.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(2 * parameter.grad, other.grad)


def test_parts_that_do_not_sum_to_the_batch_are_rejected() -> None:
    student, _ = students(dense=False)
    with pytest.raises(RuntimeError, match="split"):
        Update().backward(student, batch([Part(4, 1.0), Part(1, 1.0)], dense=False), Objective())


def test_an_unknown_kind_is_rejected() -> None:
    wrong: Any = "pcgrad"
    with pytest.raises(ValidationError, match="kind"):
        Update(kind=wrong)


@pytest.mark.parametrize("discrepancy", ["l1", "kl"])
@pytest.mark.parametrize("dense", [False, True])
def test_the_pooled_update_is_the_gradient_of_one_discrepancy_over_all_rows_whatever_their_weights(discrepancy: Any, dense: bool) -> None:
    student, twin = students(dense)
    data = batch([Part(4, 0.5), Part(2, 3.0)], dense)
    loss = Update(kind="pooled").backward(student, data, Objective(discrepancy=discrepancy))
    expected = weighted_sum(twin(data.images), data.teacher_logits, [Part(6, 1.0)], discrepancy)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients(student), gradients(twin))


def gradients(network: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in network.parameters()]


def smooth(normalised: bool, dense: bool = False) -> nn.Module:
    """A smooth student for 2×3×3 images; with ``dense``, it returns logits for 2×2 pixels."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3) if normalised else nn.Identity()
    if dense:
        return nn.Sequential(nn.Conv2d(2, 3, 2), norm, nn.Tanh(), nn.Conv2d(3, 4, 1), nn.Softplus(), nn.Conv2d(4, 3, 1)).double()
    return nn.Sequential(nn.Conv2d(2, 3, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Softplus(), nn.Linear(4, 3)).double()


def fresh_and_replayed(fresh: float = 1.0, replayed: float = 1.0, dense: bool = False) -> Batch:
    torch.manual_seed(1)
    logits = 2 * torch.randn(8, 3, *([2, 2] if dense else [])).double()
    return Batch(torch.randn(8, 2, 3, 3).double(), logits, [Part(5, fresh), Part(3, replayed)])


def discrepancies(network: nn.Module, data: Batch, discrepancy: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """L_acq and L_ret at the network's current parameters."""

    def of(rows: slice) -> Callable[[], Tensor]:
        part = [Part(len(data.images[rows]), 1.0)]

        def loss() -> Tensor:
            if data.teacher_features is None:
                return weighted_sum(network(data.images[rows]), data.teacher_logits[rows], part, discrepancy)
            logits, features = network(data.images[rows])
            targets = data.teacher_features[rows]
            distance = (features - targets).pow(2).sum(1).mean() if len(targets) else 0.0
            return weighted_sum(logits, data.teacher_logits[rows], part, discrepancy) + distance

        return loss

    fresh = data.parts[0].rows
    return of(slice(fresh)), of(slice(fresh, None))


def slope(loss: Tensor, network: nn.Module) -> Tensor:
    return parameters_to_vector(torch.autograd.grad(loss, list(network.parameters())))


def moved(theta: Tensor, network: nn.Module, acquire: Callable[[], Tensor], update: Update) -> Tensor:
    """θ′ = θ − α(∇L_acq(θ) + λθ)."""
    vector_to_parameters(theta, network.parameters())
    return theta - update.inner_lr * (slope(acquire(), network) + update.inner_weight_decay * theta)


def by_finite_differences(network: nn.Module, data: Batch, update: Update, discrepancy: str) -> Tensor:
    """Gradient of w₀·L_acq(θ) + w₁·L_ret(θ′) at the network's parameters."""
    network = copy.deepcopy(network)
    acquire, retain = discrepancies(network, data, discrepancy)
    theta = parameters_to_vector(network.parameters()).detach()
    (_, acquired), (_, retained) = data.parts

    def objective(point: Tensor) -> float:
        further = moved(point, network, acquire, update)
        value = acquired * acquire().item()
        vector_to_parameters(further, network.parameters())
        return value + retained * retain().item()

    steps = 1e-5 * torch.eye(len(theta), dtype=torch.float64)
    return torch.tensor([(objective(theta + step) - objective(theta - step)) / 2e-5 for step in steps], dtype=torch.float64)


UPDATES = [{"inner_lr": 0.9}, {"inner_lr": 0.3, "inner_weight_decay": 0.2}]


@pytest.mark.parametrize("options", UPDATES)
@pytest.mark.parametrize(("discrepancy", "normalised"), [("kl", False), ("kl", True), ("l1", True)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.4, 2.5)])
@pytest.mark.parametrize("dense", [False, True])
def test_second_order_is_the_gradient_of_acquiring_and_of_retaining_after_the_inner_step(
    options: dict[str, float], discrepancy: Any, normalised: bool, weights: tuple[float, float], dense: bool
) -> None:
    student, data = smooth(normalised, dense), fresh_and_replayed(*weights, dense)
    update = Update(kind="second-order", **options)
    expected = by_finite_differences(student, data, update, discrepancy)
    update.backward(student, data, Objective(discrepancy=discrepancy))
    actual = parameters_to_vector(parameter.grad for parameter in student.parameters())  # type: ignore[misc]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", UPDATES)
@pytest.mark.parametrize("covered", [8, 5])
def test_the_feature_terms_and_their_projection_take_part_in_the_inner_step(options: dict[str, float], covered: int) -> None:
    student, data = smooth(True), fresh_and_replayed(0.4, 2.5)
    vectors = Vectors(student, 3)
    data = dataclasses.replace(data, teacher_features=torch.randn(8, 8).double()[:covered])
    update = Update(kind="second-order", **options)
    expected = by_finite_differences(vectors, data, update, "kl")
    update.backward(student, data, Objective(discrepancy="kl"), feature_vectors=vectors)
    actual = parameters_to_vector(parameter.grad for parameter in vectors.parameters())  # type: ignore[misc]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=3e-6)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in vectors.projection.parameters())


@pytest.mark.parametrize("options", UPDATES)
@pytest.mark.parametrize("normalised", [False, True])
def test_first_order_drops_the_curvature_and_nothing_else(options: dict[str, float], normalised: bool) -> None:
    student, data = smooth(normalised), fresh_and_replayed(0.4, 2.5)
    twin = copy.deepcopy(student)
    acquire, retain = discrepancies(twin, data, "kl")
    theta = parameters_to_vector(twin.parameters()).detach()
    update = Update(kind="first-order", **options)
    g = slope(acquire(), twin)
    vector_to_parameters(moved(theta, twin, acquire, update), twin.parameters())
    # θ′ = (1 − αλ)θ − α∇L_acq(θ), with the last term treated as a constant.
    expected = 0.4 * g + 2.5 * (1 - update.inner_lr * update.inner_weight_decay) * slope(retain(), twin)

    exact = by_finite_differences(student, data, update, "kl")
    update.backward(student, data, Objective(discrepancy="kl"))
    actual = parameters_to_vector(parameter.grad for parameter in student.parameters())  # type: ignore[misc]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert (actual - exact).norm() > 0.01 * exact.norm()


RETAINING: list[Any] = ["first-order", "second-order"]


@pytest.mark.parametrize("kind", RETAINING)
def test_the_loss_is_that_of_fresh_rows_now_and_replayed_ones_after_the_inner_step(kind: Any) -> None:
    student, data = smooth(True), fresh_and_replayed(0.4, 2.5)
    twin = copy.deepcopy(student)
    acquire, retain = discrepancies(twin, data, "kl")
    update = Update(kind=kind, inner_lr=0.3)
    further = moved(parameters_to_vector(twin.parameters()).detach(), twin, acquire, update)
    expected = 0.4 * acquire().item()
    vector_to_parameters(further, twin.parameters())
    loss = update.backward(student, data, Objective(discrepancy="kl"))
    assert loss.item() == pytest.approx(expected + 2.5 * retain().item(), rel=1e-12)
    assert loss.shape == () and not loss.requires_grad


@pytest.mark.parametrize("kind", RETAINING)
def test_only_the_forward_on_fresh_rows_moves_running_statistics_and_no_weight_moves(kind: Any) -> None:
    student, data = smooth(True), fresh_and_replayed()
    twin = copy.deepcopy(student)
    twin(data.images[:5])
    Update(kind=kind).backward(student, data, Objective())
    assert int(student[1].num_batches_tracked) == 1  # type: ignore[index]
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("kind", RETAINING)
def test_with_nothing_to_replay_yet_the_update_is_the_plain_one(kind: Any) -> None:
    student, data = smooth(True), fresh_and_replayed()
    twin = copy.deepcopy(student)
    alone = Batch(data.images[:5], data.teacher_logits[:5], [Part(5, 0.7)])
    assert torch.equal(Update(kind=kind).backward(student, alone, Objective()), Update().backward(twin, alone, Objective()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(student), gradients(twin), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["pooled", *RETAINING])
def test_retain_acquire_gradients_accumulate(kind: Any) -> None:
    once, twice = smooth(False), smooth(False)
    data, update = fresh_and_replayed(), Update(kind=kind)
    update.backward(once, data, Objective())
    for _ in range(2):
        update.backward(twice, data, Objective())
    doubled = [2 * gradient for gradient in gradients(once) if gradient is not None]
    torch.testing.assert_close(gradients(twice), doubled)


@pytest.mark.parametrize("kind", RETAINING)
def test_frozen_parameters_are_used_and_left_alone(kind: Any) -> None:
    student, data = smooth(False), fresh_and_replayed()
    student[0].requires_grad_(False)  # type: ignore[index]
    behind = copy.deepcopy(student[1:])  # type: ignore[index]
    with torch.no_grad():
        features = student[0](data.images)  # type: ignore[index]
    update = Update(kind=kind)
    update.backward(student, data, Objective(discrepancy="kl"))
    update.backward(behind, Batch(features, data.teacher_logits, data.parts), Objective(discrepancy="kl"))
    assert gradients(student[0]) == [None, None]  # type: ignore[index]
    torch.testing.assert_close(gradients(student)[2:], gradients(behind))


@pytest.mark.parametrize("kind", RETAINING)
def test_a_parameter_that_nothing_uses_gets_no_curvature_and_no_error(kind: Any) -> None:
    student, twin = smooth(False), smooth(False)
    student.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    Update(kind=kind).backward(student, fresh_and_replayed(), Objective())
    Update(kind=kind).backward(twin, fresh_and_replayed(), Objective())
    actual = dict(student.named_parameters())
    unused = actual.pop("unused").grad
    assert unused is None or not unused.any()
    torch.testing.assert_close([parameter.grad for parameter in actual.values()], gradients(twin))


def through_the_inner_step(network: nn.Module, data: Batch, update: Update, discrepancy: str) -> list[Tensor]:
    """The exact gradient in float64, differentiated through the inner step."""
    network = copy.deepcopy(network).double()
    images, targets, fresh = data.images.double(), data.teacher_logits.double(), data.parts[0].rows
    names, parameters = zip(*network.named_parameters(), strict=True)
    acquire = weighted_sum(network(images[:fresh]), targets[:fresh], data.parts[:1], discrepancy)
    steps = torch.autograd.grad(acquire, parameters, create_graph=True)
    further = {name: parameter - update.inner_lr * step for name, parameter, step in zip(names, parameters, steps, strict=True)}
    retain = weighted_sum(functional_call(network, further, (images[fresh:],)), targets[fresh:], data.parts[1:], discrepancy)
    return list(torch.autograd.grad(acquire + retain, parameters))


@pytest.mark.parametrize(("discrepancy", "rows"), [("l1", 6), ("kl", 6), ("kl", 300)], ids=["l1", "kl", "kl, of a fused kernel's size"])
def test_second_order_goes_through_relu_and_max_pooling_in_float32(discrepancy: Any, rows: int) -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    student = nn.Sequential(*features, nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    data = Batch(torch.randn(rows + 4, 1, 6, 6), torch.randn(rows + 4, 5), [Part(rows, 1.0), Part(4, 1.0)])
    update = Update(kind="second-order", inner_lr=0.5)
    expected = through_the_inner_step(student, data, update, discrepancy)
    first = copy.deepcopy(student)
    Update(kind="first-order", inner_lr=0.5).backward(first, data, Objective(discrepancy=discrepancy))
    update.backward(student, data, Objective(discrepancy=discrepancy))
    curvature = 0.0
    for parameter, other, exact in zip(student.parameters(), first.parameters(), expected, strict=True):
        assert parameter.grad is not None and other.grad is not None
        torch.testing.assert_close(parameter.grad.double(), exact, rtol=1e-4, atol=1e-6)
        curvature = max(curvature, (other.grad - exact).abs().max().item())
    assert curvature > 1e-3


@pytest.mark.parametrize("wrong", [{"inner_lr": 0.0}, {"inner_weight_decay": -1e-4}, {"alpha": 0.9}])
def test_a_section_with_a_wrong_value_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Update(**wrong)
