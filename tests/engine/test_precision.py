import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from dfkd_fast import DfkdError, Engine, Loop, Method, Objective, Optimizer, Replay, Trainer
from dfkd_fast.engine import precision
from dfkd_fast.engine.method import resolved
from dfkd_fast.engine.optim import build_optimizer
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.kernels import use_backend
from dfkd_fast.surgery import SpectralNorm
from tests.small import Networks, loop_and_engine, small_networks

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def _bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that emulates bfloat16 adds a note, which the tests of other notes do not expect."""
    monkeypatch.setattr(precision, "computes_in_bf16", lambda: True)


def networks() -> Networks:
    return small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)


def method(name: Any, **changes: Any) -> Method:
    return Method(
        **loop_and_engine(batch_size=16, epochs=1, iterations_per_epoch=1, student_steps=1, precision=name, **changes),
        student_optimizer=Optimizer(lr=0.01),
        generator_optimizer=Optimizer(lr=0.01),
    )


def gradient(network: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def by_hand(step: str, autocast: bool) -> Tensor:
    """Reference gradient of a first step, in float32 or under autocast."""
    teacher, student, generator = copy.deepcopy(networks())
    teacher.eval()
    z = torch.randn(16, 20, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        images = generator(z)
        if step == "student":
            images = images.detach()
        loss = F.l1_loss(student(images).float(), teacher(images).float())
    (loss if step == "student" else -loss).backward()
    return gradient(student if step == "student" else generator)


@pytest.mark.parametrize("step", ["student", "generator"])
@pytest.mark.parametrize("fold_teacher", [False, True])
def test_a_step_in_bf16_errs_no_more_than_plain_autocast(make_trainer: MakeTrainer, step: str, fold_teacher: bool) -> None:
    exact, plain = by_hand(step, autocast=False), by_hand(step, autocast=True)
    trainer = make_trainer(method("bf16", fold_teacher=fold_teacher), networks=networks())
    with use_backend("reference"):
        student_step(trainer.state) if step == "student" else generator_step(trainer.state)
    actual = gradient(trainer.student if step == "student" else trainer.generator)
    assert 0 < relative(actual, exact) <= 1.5 * relative(plain, exact)


@pytest.mark.parametrize("ambient", [False, True])
def test_every_step_in_bf16_computes_with_the_weights_that_the_step_before_left(make_trainer: MakeTrainer, ambient: bool) -> None:
    chosen = Method(
        loop=Loop(batch_size=16, epochs=1, iterations_per_epoch=2, student_steps=3),
        engine=Engine(precision="bf16"),
        replay=Replay(kind="ema_generator"),
        student_optimizer=Optimizer(lr=0.1),
        generator_optimizer=Optimizer(lr=0.1),
    )
    whole, apart = (make_trainer(chosen, networks=networks()) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):  # its weight cache would outlive the optimizer steps
        whole.fit()
    for step in [*range(3), None, *range(3), None]:  # None is the generator step, the last one of an iteration
        apart.steps.generator() if step is None else apart.steps.student(step)
        torch.clear_autocast_cache()
    for network, stepped in ((whole.student, apart.student), (whole.generator, apart.generator)):
        for ours, theirs in zip(network.state_dict().values(), stepped.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)


def test_spectral_norms_of_a_users_networks_are_left_alone_by_autocast(make_trainer: MakeTrainer) -> None:
    teacher, student, generator = networks()
    for network, name in ((teacher, "classifier"), (student, "classifier"), (generator, "body.0")):
        spectral_norm(network.get_submodule(name))
    names = student.state_dict().keys()
    trainer = make_trainer(method("bf16"), networks=(teacher, student, generator))
    for network in (trainer.state.teacher, trainer.state.student, trainer.state.generator):
        assert [type(module) for module in network.modules() if isinstance(module, _SpectralNorm)] == [SpectralNorm]
    trainer.fit()
    assert trainer.student.state_dict().keys() == names


def test_weights_averages_and_optimizer_states_stay_float32_in_bf16(make_trainer: MakeTrainer) -> None:
    chosen = method("bf16", student_ema_decay=0.9)
    chosen = Method(
        loop=chosen.loop, engine=chosen.engine, replay=Replay(kind="ema_generator"), student_optimizer=Optimizer(kind="adam", lr=1e-3)
    )
    trainer = make_trainer(chosen, networks=networks())
    trainer.fit()
    assert (
        trainer.state.average is not None and trainer.state.replay_source is not None and trainer.state.replay_source.generator is not None
    )
    for network in (trainer.student, trainer.generator, trainer.teacher, trainer.state.average, trainer.state.replay_source.generator):
        assert {tensor.dtype for tensor in network.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    states = [value for state in trainer.state.student_optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in states if value.ndim} == {torch.float32}
    dtypes = {name: layer.weight.dtype for name, layer in trainer.state.teacher.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert dtypes.pop("classifier") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert trainer.state.images.dtype == torch.bfloat16


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def segmenter() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.Upsample(scale_factor=2, mode="bilinear")
    )


@pytest.mark.parametrize("gap", [0.5, 0.05])
@pytest.mark.parametrize("discrepancy", ["kl", "l1", "js"])
@pytest.mark.parametrize(("build", "head"), [(classifier, 3), (segmenter, 2)])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_students_gradient_in_bf16_is_that_of_float32_logits_of_the_same_features(
    make_trainer: MakeTrainer, build: Callable[[], nn.Sequential], head: int, discrepancy: Any, gap: float, micro_batches: int
) -> None:
    # A student that differs from its teacher by about the gap in its logits.
    torch.manual_seed(0)
    teacher = build()
    with torch.no_grad():
        for weight in teacher[head].parameters():
            weight.mul_(20)
        student = copy.deepcopy(teacher)
        bias = dict(student[head].named_parameters())["bias"]
        bias.add_(gap * torch.randn(10))
    chosen = method("bf16", micro_batches=micro_batches)
    chosen = Method(
        loop=chosen.loop, engine=chosen.engine, objective=Objective(discrepancy=discrepancy), student_optimizer=chosen.student_optimizer
    )
    trainer = make_trainer(chosen, networks=(teacher, student, small_networks()[2]))
    features: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].requires_grad:
            inputs[0].retain_grad()
            features.append(inputs[0])

    trainer.student.get_submodule(str(head)).register_forward_pre_hook(record)
    student_step(trainer.state)
    assert {feature.dtype for feature in features} == {torch.bfloat16}

    features_64 = torch.cat([piece.detach() for piece in features]).double().requires_grad_()
    answers, targets = (
        copy.deepcopy(network[head:]).double()(x) for network, x in ((student, features_64), (teacher, features_64.detach()))
    )
    assert answers.abs().max() > 4  # bfloat16 resolves such logits to 1/32 at best
    if discrepancy == "l1":
        loss = F.l1_loss(answers, targets)
    else:
        p, q = (logits.log_softmax(1) for logits in (answers, targets))
        m = p if discrepancy == "kl" else ((p.exp() + q.exp()) / 2).log()
        terms = [q.exp() * (q - m)] if discrepancy == "kl" else [p.exp() * (p - m) / 2, q.exp() * (q - m) / 2]
        loss = sum(term.sum(1).mean() for term in terms)
    (expected,) = torch.autograd.grad(loss, features_64)
    actual = torch.cat([piece.grad for piece in features if piece.grad is not None])
    assert relative(actual.double(), expected) < 0.01


@pytest.mark.parametrize("replay", ["none", "ema_generator", "memory_bank", "vae"])
@pytest.mark.parametrize("update", ["plain", "second-order"])
def test_no_logits_are_rounded_before_they_are_compared(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, replay: Any, update: Any
) -> None:
    if update == "second-order" and replay == "none":
        pytest.skip("needs replayed samples")
    compared: list[Tensor] = []
    discrepancy = Objective._discrepancy

    def record(self: Objective, kind: Any, student: Tensor, teacher: Tensor) -> Tensor:
        compared.extend([student, teacher])
        return discrepancy(self, kind, student, teacher)

    monkeypatch.setattr(Objective, "_discrepancy", record)
    chosen = Method(
        loop=Loop(batch_size=16, epochs=2, iterations_per_epoch=1, student_steps=1),
        engine=Engine(precision="bf16"),
        objective={"bn_moments": 1.0, "activation": 1.0},  # type: ignore[arg-type]
        replay={"kind": replay, "vae": {"latent_dim": 8, "width": 4}, "memory_bank": {"every": 1}},  # type: ignore[arg-type]
        update={"kind": update, "inner_lr": 0.01},  # type: ignore[arg-type]
    )
    trainer = make_trainer(chosen, networks=networks())
    trainer.fit()
    assert trainer.notes == []
    assert len(compared) >= 8
    for logits in compared:
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


def test_logits_computed_outside_of_a_layer_are_rounded_with_a_note(make_trainer: MakeTrainer) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classes = (
                nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                nn.Parameter(torch.randn(8, 10)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) @ self.classes

    teacher, _, generator = networks()
    trainer = make_trainer(method("bf16"), networks=(teacher, Product(), generator))
    trainer.fit()
    assert trainer.notes == ["engine.precision: the student's logits are rounded to bf16: its forward computes them outside of a layer"]


@pytest.mark.parametrize("replay", ["none", "ema_generator", "memory_bank", "vae"])
@pytest.mark.parametrize("update", ["plain", "second-order"])
def test_every_replay_and_update_runs_in_bf16_near_its_float32_loss(make_trainer: MakeTrainer, replay: Any, update: Any) -> None:
    if update == "second-order" and replay == "none":
        pytest.skip("needs replayed samples")
    losses = []
    for name in ("fp32", "bf16"):
        chosen = Method(
            loop=Loop(batch_size=16, epochs=1, iterations_per_epoch=1, student_steps=2),
            engine=Engine(precision=name),
            replay={"kind": replay, "vae": {"latent_dim": 8, "width": 4}, "memory_bank": {"every": 1}},  # type: ignore[arg-type]
            update={"kind": update, "inner_lr": 0.01},  # type: ignore[arg-type]
            student_optimizer=Optimizer(lr=0.01),
        )
        trainer = make_trainer(chosen, networks=networks())
        trainer.fit()
        losses.append(trainer.history[0].losses)
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        assert losses[1][name] == pytest.approx(loss, rel=0.05)


@pytest.mark.parametrize(
    ("setting", "capability", "expected"),
    [("auto", None, "fp32"), ("auto", (7, 5), "fp32"), ("auto", (8, 0), "bf16"), ("auto", (9, 0), "bf16"), ("fp32", (9, 0), "fp32")],
)
def test_auto_is_bf16_on_a_gpu_that_computes_in_it_and_float32_elsewhere(
    monkeypatch: pytest.MonkeyPatch, setting: Any, capability: tuple[int, int] | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    assert Method().engine.precision == "auto"
    assert resolved(method(setting), device) == method(expected)


def test_a_trainer_resolves_auto_and_rejects_a_state_of_another_precision(make_trainer: MakeTrainer) -> None:
    automatic = make_trainer(method("auto"))
    assert automatic.method.engine.precision == "fp32"
    assert automatic.state.precision.dtype is None
    state = make_trainer(method("bf16")).state_dict()
    before = copy.deepcopy(automatic.student.state_dict())
    with pytest.raises(DfkdError, match=r"engine\.precision = 'fp32': the state is of a run with 'bf16'"):
        automatic.load_state_dict(state)
    del state["method"]  # as in earlier versions
    with pytest.raises(DfkdError, match=r"engine\.precision = 'fp32': the state is of a run in 'bf16', which must be resumed in 'bf16'"):
        automatic.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in automatic.student.state_dict().items())


@pytest.mark.parametrize("changes", [{"replay": {"kind": "vae"}}, {"replay": {"kind": "memory_bank"}, "update": {"kind": "first-order"}}])
def test_fp16_is_rejected_where_losses_cannot_be_scaled(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'bf16'"):
        Method(engine=Engine(precision="fp16"), **changes)


def test_scaled_losses_give_the_same_student(make_trainer: MakeTrainer) -> None:
    # Scaling by a power of two and back is exact, so only a missing scaling or unscaling changes the result.
    plain, scaled = (make_trainer(method("fp32"), networks=networks()) for _ in range(2))
    scaled.state.precision.scalers = {role: torch.amp.GradScaler("cpu", init_scale=2.0**16) for role in scaled.state.precision.scalers}
    for trainer in (plain, scaled):
        trainer.fit()
    for ours, theirs in zip(plain.student.parameters(), scaled.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_compiled_networks_take_the_same_steps(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and run eagerly: what a compiler does with the trace is not tested here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager, compiled = (make_trainer(method("fp32", compile=enabled), networks=networks()) for enabled in (False, True))
    for trainer in (eager, compiled):
        trainer.fit()
    assert compiled.history[0].losses == pytest.approx(eager.history[0].losses, rel=1e-5)
    assert compiled.student.state_dict().keys() == eager.student.state_dict().keys()


@pytest.mark.parametrize("kind", ["apex_sgd", "apex_adam"])
def test_apex_optimizers_without_apex_raise_with_an_alternative(kind: Any) -> None:
    with pytest.raises(DfkdError, match=r"NVIDIA's apex.*another project.*'sgd' or 'adam'"):
        build_optimizer(Optimizer(kind=kind), [nn.Parameter(torch.zeros(1))], torch.device("cpu"))


def test_a_teacher_that_cannot_be_folded_is_used_unchanged_with_a_note(make_trainer: MakeTrainer) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x if x.mean() > 0 else -x)

    _, student, generator = networks()
    trainer = make_trainer(method("fp32"), networks=(Branching(), student, generator))
    trainer.fit()
    assert len(trainer.notes) == 1
    assert "not folded: Branching cannot be traced" in trainer.notes[0]


@pytest.mark.parametrize("emulates", [True, False])
def test_a_cpu_that_emulates_bf16_is_noted(monkeypatch: pytest.MonkeyPatch, emulates: bool) -> None:
    monkeypatch.setattr(precision, "computes_in_bf16", lambda: not emulates)
    notes = {name: Trainer(*networks(), method(name)).notes for name in ("bf16", "fp32")}
    line = "engine.precision = 'bf16': this CPU has no bfloat16 instructions and emulates them; 'fp32' may be faster"
    assert notes == {"bf16": [line] if emulates else [], "fp32": []}
