"""The engine follows bench/baselines/plain.py step for step."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.baselines import plain
from dfkd_fast import Method, Objective, Replay, Trainer
from dfkd_fast.engine.prepare import prepare
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.engine.streams import random_stream
from dfkd_fast.kernels import Backend, use_backend
from dfkd_fast.methods import EmaGeneratorSettings
from dfkd_fast.surgery import BatchNormAct2d
from tests.small import Networks, small_method, small_networks

ITERATIONS = 24
EPOCHS = 3


def run_both(
    networks: Networks, method: Method, *, ema_decay: float | None, backend: Backend = "reference"
) -> tuple[Trainer, Networks, list[plain.Iteration], list[list[float]]]:
    teacher, student, generator = copy.deepcopy(networks)
    student_optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    expected = list(
        plain.distill(
            teacher,
            student,
            generator,
            student_optimizer=student_optimizer,
            generator_optimizer=torch.optim.Adam(generator.parameters(), lr=1e-3, fused=True),
            schedules=[torch.optim.lr_scheduler.CosineAnnealingLR(student_optimizer, EPOCHS)],
            epochs=EPOCHS,
            iterations_per_epoch=ITERATIONS // EPOCHS,
            batch_size=method.loop.batch_size,
            latent_dim=20,
            student_steps=method.loop.student_steps,
            ema_decay=ema_decay,
            student_weight=method.objective.student_weight,
            share=method.replay.share,
            bn_moments=method.objective.bn_moments,
            latents=torch.Generator().manual_seed(3),
            replay_latents=random_stream(3, "replay", torch.device("cpu")),
        )
    )
    trainer = Trainer(*networks, method, seed=3)
    losses: list[list[float]] = []

    def keep(trainer: Trainer) -> None:
        row = trainer.state.iteration - 1
        losses.append([*trainer.state.losses.values["student"][row].tolist(), *trainer.state.losses.values["adversarial"][row].tolist()])

    trainer.on_iteration = keep
    with use_backend(backend):
        trainer.fit()
    return trainer, (teacher, student, generator), expected, losses


def largest_difference(network: nn.Module, other: nn.Module) -> float:
    pairs = zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    return max((ours.double() - theirs.double()).abs().max().item() for ours, theirs in pairs)


@pytest.mark.parametrize("ema_decay", [None, 0.9], ids=["DFAD", "MAD"])
@pytest.mark.parametrize(
    ("network", "channels", "fold_teacher"),
    [("lenet5", 1, False), ("wrn10_1", 3, False), ("wrn10_1", 3, True)],
    ids=["no BN", "BN", "folded"],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_trajectory_equals_the_plain_loop(
    network: str, channels: int, ema_decay: float | None, channels_last: bool, fold_teacher: bool
) -> None:
    # Memory format and folding change the rounding of convolutions, and Adam amplifies the rounding of gradients that are
    # exactly zero (biases before a batch norm). Double precision keeps this small enough to detect errors.
    exact = not channels_last and not fold_teacher
    dtype = torch.float32 if exact else torch.float64
    tolerance = 0.0 if exact else 1e-9
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        networks = small_networks(teacher=network, student=network if channels == 3 else "lenet5_half", channels=channels)
        replay = Replay() if ema_decay is None else Replay(kind="ema_generator", ema_generator=EmaGeneratorSettings(decay=ema_decay))
        method = small_method(
            replay=replay,
            epochs=EPOCHS,
            iterations=ITERATIONS // EPOCHS,
            channels_last=channels_last,
            student_steps=5,
            fold_teacher=fold_teacher,
        )
        # A fused batch norm also skips the bias before it, whose gradient the plain loop computes: zero up to rounding.
        method = replace(method, engine=replace(method.engine, fuse_norm_act=not exact))
        # Powers of two, whose products are exact.
        method = replace(method, objective=Objective(student_weight=2.0), replay=replace(replay, share=0.25))
        trainer, (_, student, generator), expected, losses = run_both(networks, method, ema_decay=ema_decay)
    finally:
        torch.set_default_dtype(before)

    assert len(losses) == ITERATIONS
    flat = [[*iteration.student, iteration.generator] for iteration in expected]
    assert max(abs(a - b) for ours, theirs in zip(losses, flat, strict=True) for a, b in zip(ours, theirs, strict=True)) <= tolerance
    assert largest_difference(trainer.student, student) <= tolerance
    assert largest_difference(trainer.generator, generator) <= tolerance


@pytest.mark.parametrize("fold_teacher", [False, True])
def test_trajectory_with_the_bn_objective_follows_the_plain_loop(fold_teacher: bool) -> None:
    # The norms are summed in a different order.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
        replay = Replay(kind="ema_generator", ema_generator=EmaGeneratorSettings(decay=0.9))
        method = small_method(replay=replay, epochs=EPOCHS, iterations=ITERATIONS // EPOCHS, fold_teacher=fold_teacher)
        method = replace(method, objective=Objective(bn_moments=0.5))
        trainer, (_, student, generator), expected, _ = run_both(networks, method, ema_decay=0.9)
    finally:
        torch.set_default_dtype(before)
    losses = [epoch.losses["adversarial"] + epoch.losses["bn_moments"] for epoch in trainer.history]
    plain_losses = torch.tensor([iteration.generator for iteration in expected], dtype=torch.float64).view(EPOCHS, -1).mean(1).tolist()
    assert losses == pytest.approx(plain_losses, rel=1e-9)
    assert largest_difference(trainer.student, student) <= 1e-9
    assert largest_difference(trainer.generator, generator) <= 1e-9


def test_the_largest_difference_detects_one_changed_bit() -> None:
    _, student, _ = small_networks()
    other = copy.deepcopy(student)
    with torch.no_grad():
        bias = next(reversed(list(other.parameters())))
        bias[0] = torch.nextafter(bias[0], torch.tensor(1.0))
    assert largest_difference(student, other) > 0


def test_first_iterations_with_fused_kernels_follow_the_plain_loop() -> None:
    # Only the first: the kernels round differently, and the training amplifies any difference.
    pytest.importorskip("numba", reason="numba is not installed")
    method = small_method(
        replay=Replay(kind="ema_generator", ema_generator=EmaGeneratorSettings(decay=0.9)), epochs=EPOCHS, iterations=1, student_steps=2
    )
    networks = small_networks(teacher="lenet5", student="lenet5_half", channels=1)
    _, _, expected, losses = run_both(networks, method, ema_decay=0.9, backend="numba")
    flat = [[*iteration.student, iteration.generator] for iteration in expected[: len(losses)]]
    assert losses[0] == pytest.approx(flat[0], rel=1e-4)
    assert losses != flat, "the kernels did not run"


def test_steps_with_the_optimizations_of_a_gpu_follow_those_without() -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    method = small_method(replay=Replay(kind="ema_generator", ema_generator=EmaGeneratorSettings(decay=0.9)), batch_size=16)
    networks = small_networks(teacher="resnet34", student="resnet18", channels=3)
    losses = []
    for fused in (False, True):
        engine = replace(method.engine, fuse_norm_act=fused, fuse_teacher=fused, channels_last=True)
        copies = copy.deepcopy(networks)
        state = prepare(*copies, replace(method, engine=engine), seed=0, device=torch.device("cpu"), optimize_for="cuda")
        assert fused == any(isinstance(layer, BatchNormAct2d) for layer in state.student.modules()) and not state.notes
        with use_backend("numba"):
            losses.append([student_step(state)["student"].item(), generator_step(state)["adversarial"].item()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0] != losses[1], "nothing was fused"
