"""What of the captured steps a CPU can show; that a replay equals the eager run is in tests/engine/test_gpu.py."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast import Loop, Method, Optimizer, Replay, Trainer
from dfkd_fast.engine.capture import preserved
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.methods import VaeReplay
from tests.small import small_method, small_networks
from tests.states import assert_equal

MakeTrainer = Callable[..., Trainer]


def method(replay: Replay, kind: str) -> Method:
    return Method(
        loop=Loop(batch_size=4, epochs=1, iterations_per_epoch=2, student_steps=2, student_ema_decay=0.9, channels_last=False),
        replay=replay,
        student_optimizer=Optimizer(kind=kind, lr=0.01),  # type: ignore[arg-type]
        generator_optimizer=Optimizer(kind="adam", lr=1e-3),
    )


def everything(trainer: Trainer) -> list[Tensor]:
    game = trainer._game
    networks = [trainer.student, trainer.generator, game.average, *(game.memory.networks if game.memory else ())]
    tensors = [tensor for network in networks if network is not None for tensor in network.state_dict().values()]
    return [tensor.clone() for tensor in tensors] + [game.fresh_stream.get_state(), game.replay_stream.get_state()]


REPLAYS = [Replay(), Replay(kind="ema_generator"), Replay(kind="vae", vae={"latent_dim": 8, "width": 4})]  # type: ignore[arg-type]


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: replay.kind)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_steps_taken_to_warm_up_leave_the_game_as_it_was(make_trainer: MakeTrainer, replay: Replay, kind: str) -> None:
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    trainer, untouched = (make_trainer(method(replay, kind), networks=networks) for _ in range(2))
    before = everything(trainer)
    with preserved(trainer._game):
        for step in range(2):
            student_step(trainer._game, step)
        generator_step(trainer._game)
        assert not all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True)), "nothing happened inside"
    assert all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True))
    # The optimisers begin again, too: what follows is what would have been without.
    torch.manual_seed(0)
    trainer.fit()
    torch.manual_seed(0)
    untouched.fit()
    assert all(torch.equal(a, b) for a, b in zip(everything(trainer), everything(untouched), strict=True))


FORBIDDEN = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")


@pytest.mark.parametrize("replay", [*REPLAYS, Replay(kind="memory_bank")], ids=lambda replay: replay.kind)
@pytest.mark.parametrize("update", ["plain", "pooled", "first-order", "second-order"])
def test_nothing_is_read_back_inside_a_step(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, replay: Replay, update: Any
) -> None:
    if update.endswith("order") and not replay.replays:
        pytest.skip("needs replayed samples")
    chosen = method(replay, "sgd")
    chosen = Method(loop=chosen.loop, replay=replay, update={"kind": update}, generator_optimizer=Optimizer(lr=0.01))  # type: ignore[arg-type]
    trainer = make_trainer(chosen)
    game = trainer._game
    if isinstance(game.memory, VaeReplay):
        # PyTorch's Adam reads its own count of steps on a CPU; on a GPU it is built not to.
        game.memory.optimizer = torch.optim.SGD(game.memory.vae.parameters(), lr=0.01)  # type: ignore[assignment]
    student_step(game)
    if game.memory is not None:
        game.memory.end_epoch(5, game.fresh)

    def refuse(name: str) -> Callable[..., object]:
        def read(*_: object, **__: object) -> object:
            raise AssertionError(f"Tensor.{name} waits for the device")

        return read

    with monkeypatch.context() as patched:
        for name in FORBIDDEN:
            patched.setattr(Tensor, name, refuse(name))
        with pytest.raises(AssertionError, match="item"):
            torch.ones(()).item()
        for step in range(2):
            student_step(game, step)
        generator_step(game)


def test_a_learning_rate_from_a_checkpoint_of_a_gpu_is_a_number_on_a_cpu(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method(Replay(), "sgd"))
    state = copy.deepcopy(trainer.state_dict())
    for optimizer in state["optimizers"]:
        optimizer["param_groups"][0]["lr"] = torch.tensor(0.25)
    trainer.load_state_dict(state)
    assert [group["lr"] for group in trainer.student_optimizer.param_groups] == [0.25]
    trainer.fit()


def test_warming_up_takes_steps_and_leaves_no_trace(make_trainer: Callable[..., Trainer]) -> None:
    untouched, warmed = (make_trainer(small_method(replay=Replay(kind="ema_generator"))) for _ in range(2))
    calls: list[int] = []
    warmed.student.register_forward_hook(lambda *_: calls.append(1))
    warmed.warm_up()
    assert len(calls) == 2
    assert_equal(*(fitted.fit().state_dict() for fitted in (untouched, warmed)))
