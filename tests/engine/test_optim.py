import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import DfkdError, Optimizer, Trainer
from dfkd_fast.engine.optim import build_optimizer, build_schedule, restore_learning_rates
from tests.small import small_method
from tests.states import assert_equal, without_times

CPU = torch.device("cpu")
SGD = Optimizer(lr=0.1, momentum=0.9, weight_decay=0.01)


def weights() -> list[nn.Parameter]:
    stream = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=stream)) for shape in ((4, 3, 3, 3), (7,), ())]


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int) -> None:
    stream = torch.Generator().manual_seed(1)
    for step in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=stream)
        if step == 0:
            parameters[-1].grad = None  # like a layer that the first batch does not use
        optimizer.step()


def test_momentum_from_the_beginning_changes_no_bit() -> None:
    ours, theirs = weights(), weights()
    take_steps(build_optimizer(SGD, ours, CPU), ours, 5)
    take_steps(torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01), theirs, 5)
    assert_equal([*ours], [*theirs])


def test_a_first_step_that_overflows_leaves_no_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's fused SGD, as on a GPU, with uninitialized memory.
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.full_like(tensor, torch.nan, **options))
    weight = nn.Parameter(torch.ones(5))
    optimizer = build_optimizer(Optimizer(lr=0.5), [weight], CPU)
    optimizer.param_groups[0]["fused"] = True
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (torch.inf, 2.0):
        optimizer.zero_grad()
        scaler.scale(gradient * weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [2.0] * 5
    assert weight.tolist() == [0.0] * 5


@pytest.mark.parametrize("buffer", ["absent", "none"])
def test_a_checkpoint_without_momentum_gets_one(buffer: str) -> None:
    parameters = weights()
    optimizer = build_optimizer(SGD, parameters, CPU)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {} if buffer == "absent" else {key: {"momentum_buffer": None} for key in state["state"]}
    optimizer.load_state_dict(state)
    restore_learning_rates(optimizer, CPU)
    for parameter in parameters:
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert isinstance(momentum, Tensor)
        assert momentum.shape == parameter.shape and not momentum.any()


def test_a_gpu_checkpoint_resumes_on_a_cpu(make_trainer: Callable[..., Trainer]) -> None:
    whole, resumed = make_trainer(small_method()), make_trainer(small_method())
    next(iter(whole))
    state: dict[str, Any] = copy.deepcopy(whole.state_dict())
    for optimizer in state["optimizers"]:
        for group in optimizer["param_groups"]:
            group |= {"lr": torch.tensor(group["lr"]), "fused": True} | ({"capturable": True} if "capturable" in group else {})
    resumed.load_state_dict(state)
    for trainer in (whole, resumed):
        trainer.fit()
    expected, actual = (without_times(trainer.state_dict()) for trainer in (whole, resumed))
    # The remaining difference is that a learning rate in a tensor has float32 precision.
    torch.testing.assert_close(actual["networks"], expected["networks"], rtol=1e-5, atol=1e-7)


def test_nesterov_momentum_is_its_equation() -> None:
    weight = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = build_optimizer(Optimizer(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), [weight], CPU)
    w, v = 3.0, 0.0
    for gradient in (1.0, -2.0, 0.5):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        g = gradient + 0.01 * w
        v = 0.9 * v + g
        w -= 0.1 * (g + 0.9 * v)
        assert weight.item() == pytest.approx(w, rel=1e-14)


def test_nesterov_without_momentum_is_rejected() -> None:
    for settings in ({"momentum": 0.0}, {"kind": "adam"}):
        with pytest.raises(ValueError, match=r"nesterov = true: needs kind 'sgd' and a momentum above 0"):
            Optimizer(nesterov=True, **settings)


def test_a_warmup_that_does_not_end_is_rejected() -> None:
    config = Optimizer(warmup_epochs=3)
    with pytest.raises(DfkdError, match=r"^warmup_epochs = 3: must be less than the number of epochs, 3$"):
        build_schedule(config, build_optimizer(config, [nn.Parameter(torch.zeros(1))], CPU), 3)


@pytest.mark.parametrize("device_rate", [False, True])
def test_the_warmup_multiplies_the_cosine_schedule_by_a_rising_factor(device_rate: bool) -> None:
    config = Optimizer(lr=0.8, schedule="cosine", warmup_epochs=3)
    optimizer = build_optimizer(config, [nn.Parameter(torch.zeros(1))], CPU)
    if device_rate:  # as on a GPU
        optimizer.param_groups[0]["lr"] = torch.tensor(0.8)
    schedule = build_schedule(config, optimizer, 10)
    for epoch in range(10):
        expected = 0.8 * min(1, (epoch + 1) / 4) * (1 + math.cos(math.pi * epoch / 10)) / 2
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        schedule.step()


def test_a_warmup_resumes_in_its_middle() -> None:
    config = Optimizer(lr=0.8, schedule="multistep", milestones=(4,), warmup_epochs=3)
    rates: dict[int | None, list[float]] = {}
    for resume_at in (None, 2):
        optimizer = build_optimizer(config, [nn.Parameter(torch.zeros(1))], CPU)
        schedule = build_schedule(config, optimizer, 6)
        rates[resume_at] = []
        for epoch in range(6):
            if epoch == resume_at:
                saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
                optimizer = build_optimizer(config, [nn.Parameter(torch.zeros(1))], CPU)
                schedule = build_schedule(config, optimizer, 6)
                optimizer.load_state_dict(saved[0])
                schedule.load_state_dict(saved[1])
            rates[resume_at].append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step()
    assert rates[None] == rates[2]
    assert rates[None][4] == pytest.approx(0.08)
