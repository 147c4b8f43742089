from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from scipy.spatial.distance import jensenshannon
from scipy.special import entr, log_softmax, rel_entr, softmax
from torch import Tensor

from dfkd_fast.methods import Objective
from dfkd_fast.surgery import Observation

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
    """KL(teacher ‖ student) per sample or pixel, times temperature²."""
    p, q = (softmax(logits / temperature, axis=1) for logits in (teacher, student))
    return float(temperature**2 * rel_entr(p, q).sum() / p[:, 0].size)


def js(student: Array, teacher: Array, temperature: float) -> float:
    """Jensen–Shannon divergence per sample or pixel; scipy computes its square root."""
    p, q = (softmax(logits / temperature, axis=1) for logits in (teacher, student))
    return float((jensenshannon(p, q, axis=1) ** 2).sum() / p[:, 0].size)


@pytest.mark.parametrize("shape", [(5, 7), (2, 11, 3, 5)])
@pytest.mark.parametrize(("discrepancy", "oracle"), [("l1", l1), ("kl", kl), ("js", js)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_student_minimizes_the_configured_discrepancy(
    shape: tuple[int, ...], discrepancy: Any, oracle: Any, temperature: float
) -> None:
    student, teacher = pair(*shape)
    loss = Objective(discrepancy=discrepancy, temperature=temperature).student_loss(student, teacher)
    assert loss.item() == pytest.approx(oracle(student.detach().numpy(), teacher.numpy(), temperature), rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 7), (2, 11, 3, 5)])
@pytest.mark.parametrize(("adversary", "oracle"), [("l1", l1), ("log_l1", log_l1), ("kl", kl), ("js", js)])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_generator_maximizes_the_weighted_adversary(shape: tuple[int, ...], adversary: Any, oracle: Any, weight: float) -> None:
    student, teacher = pair(*shape)
    terms = Objective(adversary=adversary, adversarial=weight, temperature=2.5).generator_terms(student, Observation(teacher))
    assert list(terms) == ["adversarial"]
    assert terms["adversarial"].item() == pytest.approx(-weight * oracle(student.detach().numpy(), teacher.numpy(), 2.5), rel=1e-12)


@pytest.mark.parametrize("adversary", ["l1", "log_l1", "kl", "js"])
def test_a_step_along_the_generators_negative_gradient_increases_the_discrepancy(adversary: Any) -> None:
    student, teacher = pair(5, 7)
    objective = Objective(adversary=adversary)
    before = objective.generator_terms(student, Observation(teacher))["adversarial"]
    (gradient,) = torch.autograd.grad(before, student)
    after = objective.generator_terms(student.detach() - 1e-3 * gradient, Observation(teacher))["adversarial"]
    # To first order, the term decreases by the step size times the squared gradient.
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
        {"bn_moments": -0.1},
        {"adversarial_cap": -1.0},
        {"tau": 1.0},
    ],
)
def test_a_section_with_a_wrong_value_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Objective(**wrong)


def rows_of(logits: Array) -> Array:
    """Reshapes (N, C) or (N, C, H, W) to one row per prediction."""
    return np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])


def back(rows: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of :func:`rows_of`."""
    return np.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


def cross_entropy(logits: Array, labels: Any) -> tuple[float, Array]:
    """Mean cross-entropy and its gradient (p − y) / rows."""
    rows = rows_of(logits)
    targets = np.eye(rows.shape[1])[labels]
    return float(-(targets * log_softmax(rows, axis=1)).sum() / len(rows)), back(
        (softmax(rows, axis=1) - targets) / len(rows), logits.shape
    )


def one_hot(logits: Array) -> tuple[float, Array]:
    return cross_entropy(logits, rows_of(logits).argmax(1))


def entropy(logits: Array) -> tuple[float, Array]:
    """Σ p̄ log p̄ and its gradient: through p̄'s share of each row's softmax."""
    p = softmax(rows_of(logits), axis=1)
    by_mean = np.log(p.mean(0)) + 1
    return float(-entr(p.mean(0)).sum()), back(p * (by_mean - p @ by_mean[:, None]) / len(p), logits.shape)


def activation(features: Array) -> tuple[float, Array]:
    return float(-np.abs(features).mean()), -np.sign(features) / features.size


def embedding_norm(embeddings: Array) -> tuple[float, Array]:
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    excess = np.maximum(norms - np.sqrt(embeddings.shape[1]), 0)
    return float(excess.mean()), (excess > 0) * embeddings / norms / len(embeddings)


def class_nll(logits: Array) -> tuple[float, Array]:
    return cross_entropy(logits, LABELS)


LABELS = [2, 0, 6, 6, 1]


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize(
    ("name", "oracle", "shape"),
    [
        ("one_hot", one_hot, (5, 7)),
        ("one_hot", one_hot, (2, 11, 3, 5)),
        ("entropy", entropy, (5, 7)),
        ("entropy", entropy, (2, 11, 3, 5)),
        ("activation", activation, (5, 7)),
        ("activation", activation, (2, 11, 3, 5)),
        ("class_nll", class_nll, (5, 7)),
        ("embedding_norm", embedding_norm, (5, 7)),
    ],
)
def test_a_term_is_its_equation_times_its_weight_and_so_is_its_gradient(
    name: str, oracle: Any, shape: tuple[int, ...], weight: float
) -> None:
    # Embeddings with norms of 1.6 to 3.4, below and above √7.
    x, other = pair(*shape)
    logits, features, embeddings = (
        x if name in names else other for names in (("one_hot", "entropy", "class_nll"), "activation", "embedding_norm")
    )
    # embedding_norm alone is rejected; without student logits the adversarial term is omitted.
    weights: dict[str, Any] = {"adversarial": float(name == "embedding_norm"), name: weight}
    terms = Objective(**weights).generator_terms(None, Observation(logits, features), torch.tensor(LABELS), embeddings)
    assert list(terms) == [name]
    (gradient,) = torch.autograd.grad(terms[name], x)
    value, slope = oracle(x.detach().numpy())
    assert terms[name].shape == ()
    assert terms[name].item() == pytest.approx(weight * value, rel=1e-6)
    np.testing.assert_allclose(gradient.numpy(), weight * slope, rtol=1e-5, atol=1e-8)


def test_bn_moments_is_the_sum_of_unsquared_norms_and_has_a_gradient_where_they_vanish() -> None:
    generator = np.random.default_rng(0)
    batch_moments, running_moments = ([generator.standard_normal((2, size)) for size in (3, 5)] for _ in range(2))
    padded = [
        torch.stack([F.pad(torch.from_numpy(layer), (0, 5 - layer.shape[1])) for layer in each], dim=1)
        for each in (batch_moments, running_moments)
    ]
    term = Objective(bn_moments=0.7).generator_terms(None, Observation(torch.zeros(1, 1), None, *padded))["bn_moments"]
    norms = [np.linalg.norm(ours - theirs, axis=1).sum() for ours, theirs in zip(batch_moments, running_moments, strict=True)]
    assert term.item() == pytest.approx(0.7 * sum(norms), rel=1e-12)

    # The moments of one layer equal the running ones, those of the other do not.
    reached = torch.ones(2, 2, 3).index_fill(1, torch.tensor(1), 2.0).requires_grad_()
    term = Objective(bn_moments=0.7).generator_terms(None, Observation(torch.zeros(1, 1), None, reached, torch.ones(2, 2, 3)))["bn_moments"]
    (gradient,) = torch.autograd.grad(term, reached)
    assert torch.equal(gradient[:, 0], torch.zeros(2, 3))
    torch.testing.assert_close(gradient[:, 1], torch.full((2, 3), 0.7 / 3**0.5))


def entropy_of(logits: Tensor) -> Tensor:
    return Objective(entropy=1.0).generator_terms(None, Observation(logits))["entropy"]


def test_entropy_is_minimal_for_equal_class_frequencies_at_any_confidence() -> None:
    for scale in (0.5, 5.0, 50.0):
        assert entropy_of(scale * torch.eye(7)).item() == pytest.approx(-np.log(7), rel=1e-6)
        assert entropy_of(scale * (torch.eye(7) + torch.arange(7) / 3)).item() > -0.99 * np.log(7)


def test_entropy_has_a_finite_gradient_where_no_sample_is_of_some_class() -> None:
    # L1 compares raw logits: beyond a gap of 104 a probability is 0 in float32.
    logits = torch.tensor([[200.0, 0.0, 0.0], [200.0, 0.0, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy_of(logits), logits)
    assert gradient.isfinite().all()


def test_terms_of_weight_zero_are_absent_and_the_others_come_together() -> None:
    torch.manual_seed(0)
    student, logits = torch.randn(2, 5, 7)
    observation = Observation(logits, torch.randn(5, 3), torch.ones(2, 1, 2), torch.zeros(2, 1, 2))
    labels, embeddings = torch.tensor(LABELS), 3 * torch.randn(5, 4)
    names = ["adversarial", "one_hot", "entropy", "activation", "bn_moments", "class_nll", "embedding_norm"]
    every = Objective(**dict.fromkeys(names, 0.5))  # type: ignore[arg-type]
    assert list(every.generator_terms(student, observation, labels, embeddings)) == names
    for absent in names:
        weights: dict[str, Any] = {name: 0.5 * (name != absent) for name in names}
        assert absent not in Objective(**weights).generator_terms(student, observation, labels, embeddings)
    assert list(Objective().generator_terms(student, observation, labels, embeddings)) == ["adversarial"]


@pytest.mark.parametrize("weights", [{}, {"embedding_norm": 1.0}])
def test_a_generator_with_nothing_to_learn_is_rejected(weights: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="at least one must be positive"):
        Objective(adversarial=0.0, **weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(("adversary", "oracle"), [("l1", l1), ("log_l1", log_l1), ("kl", kl), ("js", js)])
def test_above_the_cap_the_adversary_is_the_cap_and_pushes_no_further(adversary: Any, oracle: Any) -> None:
    student, teacher = pair(5, 7)
    reached = oracle(student.detach().numpy(), teacher.numpy(), 1.0)
    for cap, weight, expected in ((0.9 * reached, 2.0, 0.9 * reached), (1.1 * reached, 2.0, reached)):
        objective = Objective(adversary=adversary, adversarial_cap=cap, adversarial=weight)
        term = objective.generator_terms(student, Observation(teacher))["adversarial"]
        assert term.item() == pytest.approx(-weight * expected, rel=1e-12)
        (gradient,) = torch.autograd.grad(term, student)
        assert bool(gradient.any()) is (cap > reached)


@pytest.mark.parametrize("shape", [(40, 3), (4, 3, 5, 7)])
@pytest.mark.parametrize(("adversary", "oracle"), [("l1", l1), ("log_l1", log_l1), ("kl", kl), ("js", js)])
def test_only_samples_that_student_and_teacher_assign_to_one_class_count_for_the_adversary(
    shape: tuple[int, ...], adversary: Any, oracle: Any
) -> None:
    student, teacher = pair(*shape)
    teacher.requires_grad_()  # as of images that the generator makes
    arrays = student.detach().numpy(), teacher.detach().numpy()
    agreeing = arrays[0].argmax(1) == arrays[1].argmax(1)
    assert 0 < agreeing.sum() < agreeing.size
    objective = Objective(adversary=adversary, adversarial_rows="agreeing", temperature=2.5)
    term = objective.generator_terms(student, Observation(teacher))["adversarial"]
    # Where the logits are equal, every discrepancy is 0.
    expected = oracle(*(np.where(agreeing[:, None], logits, 0.0) for logits in arrays), 2.5)
    assert term.item() == pytest.approx(-expected, rel=1e-12)
    for gradient in torch.autograd.grad(term, [student, teacher]):
        reached = gradient.abs().sum(1) > 0
        assert torch.equal(reached, torch.from_numpy(agreeing))


def test_an_adversary_without_agreement_is_0_and_its_gradient_finite() -> None:
    student = torch.tensor([[1.0, 0.0], [5.0, -5.0]], requires_grad=True)
    for adversary in ("l1", "log_l1", "kl", "js", "js_clamped"):
        objective = Objective(adversary=adversary, adversarial_rows="agreeing")
        term = objective.generator_terms(student, Observation(-student.detach()))["adversarial"]
        (gradient,) = torch.autograd.grad(term, student)
        assert term.item() == 0 and not gradient.any()


def clamped_js(student: Array, teacher: Array, temperature: float) -> float:
    """Jensen–Shannon divergence of PRE-DFKD's public code: clamped, not renormalized, KL(m ‖ p), mean over N·C."""
    p, q = (softmax(logits / temperature, axis=1) for logits in (student, teacher))
    m = np.clip((p + q) / 2, 0.01, 0.99)
    divergences = [m * (np.log(m) - np.log(np.clip(probabilities, 0.01, 0.99))) for probabilities in (p, q)]
    return float(np.mean(divergences))


@pytest.mark.filterwarnings("error")  # PyTorch warns about kl_div's reduction="mean"
def test_the_public_codes_js_is_clamped_swapped_and_averaged_over_classes() -> None:
    student, teacher = pair(5, 7)
    student = 4 * student  # some probabilities are clamped at each end
    term = Objective(adversary="js_clamped", temperature=1.5).generator_terms(student, Observation(teacher))["adversarial"]
    arrays = student.detach().numpy(), teacher.numpy()
    probabilities = softmax(arrays[0] / 1.5, axis=1)
    assert (probabilities < 0.01).any() and ((probabilities > 0.01) & (probabilities < 0.99)).any()
    assert term.item() == pytest.approx(-clamped_js(*arrays, 1.5), rel=1e-5)


def test_the_public_codes_js_has_no_gradient_over_many_classes_and_flat_logits_and_the_true_one_has() -> None:
    student, teacher = pair(4, 128)
    flat = (0.1 * student).detach().requires_grad_()
    for adversary, learns in (("js_clamped", False), ("js", True)):
        term = Objective(adversary=adversary, temperature=3.0).generator_terms(flat, Observation(0.1 * teacher))["adversarial"]  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(term, flat)
        assert bool(gradient.any()) is learns
