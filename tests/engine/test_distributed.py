"""Several processes over gloo take the steps of a single process with the concatenated batches."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.multiprocessing.spawn import spawn

from dfkd_fast import DfkdError, Method, Objective, Optimizer, Replay, Trainer, Update, distributed
from dfkd_fast.engine import steps
from dfkd_fast.engine.state import TrainState
from dfkd_fast.kernels import channel_moments
from dfkd_fast.methods import EmaGeneratorSettings
from dfkd_fast.methods.objective import bn_moments, entropy
from tests.small import small_method, small_networks
from tests.states import assert_equal, through_a_file, without_times

BATCH = 12


class Plain(nn.Module):
    """A generator without batch norm, which would normalize by the local batch."""

    latent_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 3 * 64), nn.Tanh(), nn.Unflatten(1, (3, 8, 8)))

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z)


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A teacher with batch norms, a student and a generator without."""
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4)
    )
    for layer in teacher:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 4))
    return teacher, student, Plain()


METHODS: dict[str, Method] = {
    "plain": small_method(batch_size=BATCH),
    "features": Method(loop=small_method(batch_size=BATCH).loop, objective=Objective(attention=30.0, hint=2.0)),
    "every term": Method(
        loop=small_method(batch_size=BATCH).loop,
        objective=Objective(adversary="log_l1", one_hot=0.5, entropy=2.0, activation=0.1, bn_moments=0.3, adversarial_cap=0.4),
        replay=Replay(kind="ema_generator", ema_generator=EmaGeneratorSettings(decay=0.8)),
    ),
    **{
        kind: Method(
            loop=small_method(batch_size=BATCH).loop,
            replay=Replay(kind="ema_generator"),
            update=Update(kind=kind, inner_lr=0.3),
            student_optimizer=Optimizer(lr=0.01),
        )
        for kind in ("pooled", "first-order", "second-order")
    },
    "second order with features": Method(
        loop=small_method(batch_size=BATCH).loop,
        objective=Objective(attention=30.0, hint=2.0),
        replay=Replay(kind="ema_generator"),
        update=Update(kind="second-order", inner_lr=0.03),
        student_optimizer=Optimizer(lr=0.01),
    ),
}


def run_steps(method: Method, latents: list[Tensor]) -> tuple[Trainer, list[dict[str, Tensor]]]:
    """Runs two student and generator steps on this process's share of fixed latents."""
    world, rank = distributed.world_size(), distributed.rank()
    share = dataclasses.replace(method.loop, batch_size=BATCH // world)
    trainer = Trainer(*networks(), dataclasses.replace(method, loop=share))
    draws = iter(latents)

    def draw(state: TrainState) -> Tensor:
        return state.latents.copy_(next(draws)[rank::world])

    original, steps._draw_latents = steps._draw_latents, draw
    if trainer.state.replay_source is not None:
        trainer.state.replay_source.latents = lambda stream: next(draws)[rank::world]  # type: ignore[method-assign]
    try:
        losses = [terms for _ in range(2) for terms in (trainer.steps.student(0), trainer.steps.generator())]
    finally:
        steps._draw_latents = original
    for terms in losses:
        distributed.average_(list(terms.values()))
    return trainer, losses


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def as_rank(rank: int, world: int, port: int, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.process_group(torch.device("cpu")):
        work(*arguments)


def together(world: int, work: Callable[..., object], *arguments: Any) -> None:
    spawn(as_rank, (world, free_port(), work, arguments), nprocs=world)


def check_equal(latents: list[Tensor], expected: dict[str, Any]) -> None:
    for name, method in METHODS.items():
        trainer, losses = run_steps(method, latents)
        for ours, theirs in zip(losses, expected[name]["losses"], strict=True):
            assert ours.keys() == theirs.keys()
            for term, value in ours.items():
                where = f"{name}, {term}"
                torch.testing.assert_close(value, theirs[term], rtol=1e-5, atol=1e-6, msg=where)
        for role in ("student", "generator"):
            network = getattr(trainer, role)
            for (path, ours), theirs in zip(network.named_parameters(), expected[name][role], strict=True):
                torch.testing.assert_close(ours, theirs["value"], rtol=1e-5, atol=1e-6, msg=f"{name}, {role} {path}")
                torch.testing.assert_close(ours.grad, theirs["gradient"], rtol=1e-4, atol=1e-6, msg=f"{name}, {role} {path}")


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_take_the_steps_of_a_single_process(world: int) -> None:
    torch.manual_seed(1)
    latents = [torch.randn(BATCH, 6) for _ in range(12)]
    expected: dict[str, Any] = {}
    for name, method in METHODS.items():
        trainer, losses = run_steps(method, latents)
        expected[name] = {"losses": losses}
        for role in ("student", "generator"):
            network = getattr(trainer, role)
            expected[name][role] = [{"value": p.detach(), "gradient": p.grad} for p in network.parameters()]
    together(world, check_equal, latents, expected)


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.double()


def check_terms(world: int) -> None:
    torch.manual_seed(2)
    whole = torch.randn(6 * world, 5, 3, 3) * 3 + 7
    running = torch.tensor([6.5, 8.0]).view(2, 1, 1).expand(2, 1, 5)
    mine = whole[distributed.rank() :: world].clone().requires_grad_()
    loss = bn_moments(torch.stack(channel_moments(mine)).unsqueeze(1), running)
    loss.backward()
    oracle = whole.double().requires_grad_()
    expected = (oracle.mean((0, 2, 3)) - 6.5).norm() + (oracle.var((0, 2, 3), correction=0) - 8.0).norm()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    # Gradients are averaged over processes: that of each share is multiplied by the number of processes.
    torch.testing.assert_close(gradient(mine) / world, gradient(oracle)[distributed.rank() :: world], rtol=1e-4, atol=1e-7)

    logits = torch.randn(4 * world, 7)
    local = logits[distributed.rank() :: world].clone().requires_grad_()
    actual = entropy(local)
    actual.backward()
    oracle = logits.double().requires_grad_()
    p = oracle.softmax(1).mean(0)
    expected = (p * p.log()).sum()
    expected.backward()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(local) / world, gradient(oracle)[distributed.rank() :: world], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("world", [2, 3])
def test_terms_that_are_not_means_are_computed_over_the_global_batch(world: int) -> None:
    together(world, check_terms, world)


def check_draws() -> None:
    trainer = Trainer(*networks(), METHODS["every term"], seed=5)
    drawn = [steps._draw_latents(trainer.state).clone(), trainer.state.replay_source.latents(trainer.state.replay_stream).clone()]  # type: ignore[union-attr]
    everyone = distributed.all_gather(drawn)
    assert all(not torch.equal(one, other) for index, one in enumerate(everyone) for other in everyone[:index])
    again = Trainer(*networks(), METHODS["every term"], seed=5)
    assert torch.equal(steps._draw_latents(again.state), drawn[0])


def check_average() -> None:
    torch.manual_seed(distributed.rank())  # other networks, other random numbers
    trainer = Trainer(*small_networks(distributed.rank()), small_method(replay=Replay(kind="ema_generator"), epochs=1))
    for _ in trainer:
        pass
    assert trainer.state.replay_source is not None
    networks_by_name = {"student": trainer.student, "generator": trainer.generator, "average": trainer.state.replay_source.generator}
    local = {f"{role} {name}": tensor for role, network in networks_by_name.items() for name, tensor in network.state_dict().items()}  # type: ignore[union-attr]
    states = distributed.all_gather([local])
    for name, tensor in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)
    losses = distributed.all_gather([trainer.history[0].losses])
    assert all(one == losses[0] for one in losses)


def check_interruption() -> None:
    method = small_method(replay=Replay(kind="ema_generator"), epochs=2, iterations=3)

    def started() -> Trainer:
        return Trainer(*small_networks(teacher="wrn10_1", student="wrn10_1", channels=3), method)

    whole, stopped, resumed = started(), started(), started()
    whole.fit()
    stopped.on_iteration = lambda trainer: trainer.stop() if trainer.iterations_done == 2 else None
    stopped.fit()
    before = [buffer.clone() for buffer in stopped.student.buffers()]
    states = distributed.all_gather([through_a_file(stopped.state_dict())])
    assert all(map(torch.equal, stopped.student.buffers(), before))
    statistics = [state["processes"][rank]["buffers"] for rank, state in enumerate(states)]
    assert not all(map(torch.equal, *statistics))  # of the processes' local batches
    resumed.load_state_dict(states[0])
    resumed.fit()
    assert_equal(without_times(resumed.state_dict()), without_times(whole.state_dict()))


def test_a_run_stopped_within_an_epoch_ends_as_an_uninterrupted_one() -> None:
    together(2, check_interruption)


def test_every_process_draws_its_own_latents_the_same_for_the_same_seed() -> None:
    together(2, check_draws)


def check_repetition() -> None:
    torch.manual_seed(distributed.rank())
    network = nn.Sequential(nn.Linear(300, 700), nn.ReLU(), nn.Linear(700, 100))
    gradients = [torch.randn_like(parameter) for parameter in network.parameters()]
    repeated = [[gradient.clone() for gradient in gradients] for _ in range(3)]
    for once in repeated:
        distributed.average_(once)
    assert all(torch.equal(one, other) for later in repeated[1:] for one, other in zip(repeated[0], later, strict=True))


def test_equal_gradients_have_equal_means_to_the_bit_however_often_they_are_averaged() -> None:
    together(3, check_repetition)


def test_all_processes_end_with_the_same_networks_for_different_initial_weights() -> None:
    together(2, check_average)


def test_a_restarted_group_ignores_keys_of_the_previous_attempt_in_the_store() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        for attempt in ("first", "second"):
            parts = []
            for rank in (2, 1, 0):
                parts.append(pool.submit(distributed.fresh_namespace, store, rank, 3))
                time.sleep(0.05)
            last, middle, first = (part.result(30) for part in parts)
            assert not last.check(["address"])
            first.set("address", attempt)
            assert last.get("address") == middle.get("address") == attempt.encode()


TINY = ["--set", "loop.epochs=4", "--set", "loop.iterations_per_epoch=6", "--set", "loop.batch_size=8", "--set", "teacher.epochs=1"]


def torchrun(folder: Path, *arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--max-restarts", "1"]
    command += ["-m", "dfkd_fast", "distill", "digits", *TINY, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def worker_of(launcher: int, rank: str) -> int | None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == launcher and f"RANK={rank}".encode() in environment:
                return int(entry.name)
    return None


def test_a_run_with_a_killed_and_restarted_process_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = torchrun(tmp_path, "--out", "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    assert output.count("student, last epoch") == 1
    broken = torchrun(tmp_path, "--out", "broken")
    deadline = time.monotonic() + 200
    metrics = tmp_path / "broken" / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim = worker_of(broken.pid, "1")
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    output, _ = broken.communicate(timeout=300)
    assert broken.returncode == 0, output
    ours, theirs = (load_file(tmp_path / name / "student.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("broken", "whole")]
    broken_losses, whole_losses = ([json.loads(line)["losses"] for line in log] for log in logs)
    assert broken_losses == whole_losses


def test_more_processes_than_gpus_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DfkdError, match="LOCAL_RANK = 2: must be less than 2, the number of GPUs here"):
        distributed.local_device(torch.device("cuda"))


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(variable, value)
        with (
            pytest.raises(DfkdError, match=f"MASTER_ADDR = 'localhost', MASTER_PORT = {port}: rendezvous failed"),
            distributed.process_group(torch.device("cpu")),
        ):
            pytest.fail("there is no group")
