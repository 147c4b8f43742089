import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dfkd_fast import DfkdError, Engine, NonFiniteLossError, Optimizer
from dfkd_fast.engine import teach
from dfkd_fast.engine.teach import TeacherTrainer, focal_loss
from dfkd_fast.labels import IGNORE_INDEX


def blobs() -> TensorDataset:
    """Three linearly separable classes."""
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(noise + 4.0 * labels[:, None, None, None], labels)


CPU = torch.device("cpu")
IMAGES = torch.zeros(2, 1, 2, 2)


def make(seed: int = 0, *, epochs: int = 4, lr: float = 0.05, batches: Any = None, **options: Any) -> TeacherTrainer:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 3))
    stream = torch.Generator().manual_seed(seed)
    loader = batches or DataLoader(blobs(), 8, shuffle=True, generator=stream)
    return TeacherTrainer(network, loader, Optimizer(lr=lr, schedule="cosine"), epochs, stream, IMAGES, CPU, **options)


def weights(trainer: TeacherTrainer) -> list[Tensor]:
    return list(trainer.network.parameters())


def test_cross_entropy_falls() -> None:
    losses = [epoch.losses["teacher"] for epoch in make(epochs=20)]
    assert losses[-1] < 0.75 * losses[0]


def test_a_training_stopped_in_an_epoch_resumes_bitwise_from_the_epochs_start() -> None:
    whole = make()
    for _ in whole:
        pass

    stopped = make()
    running = iter(stopped)
    next(running)
    stopped.stop()
    assert list(running) == []
    assert stopped.epochs_done == 1

    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = make(seed=8)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [epoch.number for epoch in resumed] == [2, 3, 4]
    for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.9, "evaluate": lambda network: float(network[2].weight.sum()), "evaluate_every": 2}]
)
def test_a_resumed_training_ends_with_the_weights_and_the_history_of_a_whole_one(options: dict[str, Any]) -> None:
    whole = make(**options)
    list(whole)
    stopped = make(**options)
    next(iter(stopped))
    state = copy.deepcopy(stopped.state_dict())
    resumed = make(seed=8, **options)
    resumed.load_state_dict(state)
    list(resumed)
    for ours, theirs in zip(resumed.result.parameters(), whole.result.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [replace(epoch, seconds=0) for epoch in resumed.history] == [replace(epoch, seconds=0) for epoch in whole.history]


def test_the_average_of_the_weights_is_the_result_and_what_is_evaluated() -> None:
    evaluated: list[nn.Module] = []

    def evaluate(network: nn.Module) -> float:
        evaluated.append(network)
        return 42.0

    trainer = make(epochs=1, ema_decay=0.5, evaluate=evaluate, evaluate_every=1)
    weight = trainer.network[2].weight  # type: ignore[index]
    expected = weight.detach().double()
    steps: list[int] = []

    def follow(count: int) -> None:
        nonlocal expected
        expected = 0.5 * expected + 0.5 * weight.detach().double()
        steps.append(count)

    trainer.on_batch = follow
    assert [epoch.student_accuracy for epoch in trainer] == [42.0]
    assert steps == list(range(1, 9))
    assert evaluated == [trainer.result]
    torch.testing.assert_close(trainer.result[2].weight.double(), expected, rtol=1e-6, atol=1e-7)  # type: ignore[index]
    assert not torch.equal(trainer.result[2].weight, weight)  # type: ignore[index]


def test_the_accuracy_is_evaluated_at_the_interval_and_at_the_end() -> None:
    trainer = make(epochs=5, evaluate=lambda _: 7.0, evaluate_every=2)
    assert [epoch.student_accuracy for epoch in trainer] == [None, 7.0, None, 7.0, 7.0]
    assert [epoch.student_accuracy for epoch in make(evaluate=lambda _: 7.0)] == [None] * 4


def test_bf16_is_the_dtype_of_the_convolutions_and_float32_that_of_logits_and_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    stream = torch.Generator().manual_seed(0)
    loader = DataLoader(blobs(), 8, shuffle=True, generator=stream)
    trainer = TeacherTrainer(network, loader, Optimizer(lr=0.1), 40, stream, IMAGES, CPU, engine=Engine(precision="bf16"))
    dtypes = set()
    for index in (0, 3):
        trainer.prepared[index].register_forward_hook(lambda layer, _, output: dtypes.add((type(layer).__name__, output.dtype)))  # type: ignore[index]
    losses = [epoch.losses["teacher"] for epoch in trainer]
    assert {dtype for name, dtype in dtypes if "Conv2d" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes if "Linear" in name} == {torch.float32}
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert losses[-1] < 0.75 * losses[0]


def test_a_state_in_another_precision_is_rejected() -> None:
    state = make(engine=Engine(precision="bf16")).state_dict()
    with pytest.raises(DfkdError, match=r"engine.precision = 'fp32': the state is of a run in 'bf16'"):
        make(engine=Engine(precision="fp32")).load_state_dict(state)


def test_a_state_of_an_early_version_which_had_no_history_is_resumed() -> None:
    whole = make()
    list(whole)
    stopped = make()
    next(iter(stopped))
    state, resumed = stopped.state_dict(), make(seed=8)
    state["done"] = len(state.pop("history"))
    del state["precision"], state["average"]
    resumed.load_state_dict(state)
    assert [epoch.number for epoch in resumed] == [2, 3, 4]
    for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_with_more_epochs_than_configured_is_rejected() -> None:
    whole, shorter = make(epochs=4), make(epochs=3)
    list(whole)
    with pytest.raises(DfkdError, match=r"^teacher.epochs = 3: the state has already completed 4 epochs$"):
        shorter.load_state_dict(whole.state_dict())
    again = make(epochs=4)
    again.load_state_dict(whole.state_dict())
    assert again.finished and list(again) == []


def test_a_loss_that_is_not_finite_stops_it() -> None:
    broken = [(torch.full((4, 1, 2, 2), float("inf")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(NonFiniteLossError, match="teacher's loss is nan in epoch 1"):
        list(make(batches=broken))


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4, 6)])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.7])
def test_the_focal_loss_is_its_equation_over_what_has_a_label(shape: tuple[int, ...], gamma: float) -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(shape).double(), torch.randint(5, (shape[0], *shape[2:]))
    labels[torch.rand(labels.shape) < 0.3] = IGNORE_INDEX
    log_p = np.take_along_axis(log_softmax(logits.numpy(), axis=1), labels.clamp(min=0).numpy()[:, None], axis=1)[:, 0]
    terms = -((1 - np.exp(log_p)) ** gamma) * log_p
    assert focal_loss(logits, labels, gamma).item() == pytest.approx(terms[labels.numpy() != IGNORE_INDEX].mean(), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_losss_gradient_is_that_of_finite_differences(gamma: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True), torch.randint(3, (2, 2, 2))
    labels[0, 0, 0] = IGNORE_INDEX
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, labels, gamma), logits)


def test_with_gamma_0_the_focal_loss_is_bitwise_the_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 5, 5), torch.randint(3, (4, 5, 5))
    labels[0] = IGNORE_INDEX
    assert torch.equal(focal_loss(logits, labels, 0.0), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_a_label_that_is_certain_gives_a_gradient_of_numbers(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0]), gamma).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1].any()


class OutAndMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"aux": images, "out": self.layer(images)}


def test_a_segmenter_that_returns_a_dict_is_trained_as_a_teacher() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 1, 4, 4)
    stream = torch.Generator()
    data = [(images, (images[:, 0] > 0).long())]
    trainer = TeacherTrainer(OutAndMore(), data, Optimizer(lr=1.0), 20, stream, images, CPU, focal_gamma=2.0)
    losses = [epoch.losses["teacher"] for epoch in trainer]
    assert losses[-1] < losses[0] / 4


def test_cudnn_benchmark_is_enabled_while_a_teacher_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[torch.device] = []
    recorded: list[list[torch.device]] = []

    @contextmanager
    def benchmark(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.remove(device)

    monkeypatch.setattr(teach, "benchmark_convolutions", benchmark)
    trainer = make(epochs=1)
    trainer.prepared.register_forward_pre_hook(lambda *_: recorded.append(inside[:]))
    list(trainer)
    assert recorded == [[trainer.device]] * 8
