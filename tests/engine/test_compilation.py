"""Compilation of the networks: one graph per network in the steps, without graph breaks."""

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dfkd_fast import Method, Objective, Optimizer, Trainer, Update
from dfkd_fast.engine.compilation import Compiled
from dfkd_fast.kernels import dispatch
from dfkd_fast.models import GeneratorA, GeneratorB, GeneratorSettings, build_generator, build_model
from dfkd_fast.surgery import fold, freeze, fuse_norm_acts
from tests.small import Networks, loop_and_engine

MakeTrainer = Callable[..., Trainer]


class Compiler:
    """A torch.compile backend that records the graphs and runs them eagerly."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield compiler
    torch._dynamo.reset()


def lenet5() -> tuple[nn.Module, Tensor]:
    return build_model("lenet5", 10, 1), torch.randn(3, 1, 32, 32)


def generator_a(**changes: Any) -> tuple[nn.Module, Tensor]:
    return build_generator(GeneratorSettings(width=4, latent_dim=10, **changes), 3, 16).body, torch.randn(3, 10)


def generator_b() -> tuple[nn.Module, Tensor]:
    return GeneratorB(10, 3, 256, width=4).body, torch.randn(3, 10)


def generator_d(**changes: Any) -> tuple[nn.Module, Tensor]:
    return build_generator(GeneratorSettings(model="D", width=1, latent_dim=10, **changes), 3, 128).body, torch.randn(3, 10)


def folded() -> tuple[nn.Module, Tensor]:
    return fold(freeze(build_model("wrn10_1", 10, 3))), torch.randn(3, 3, 16, 16)


@pytest.mark.parametrize(
    "build",
    [
        lenet5,
        generator_a,
        partial(generator_a, spectral_norm=True),
        generator_b,
        generator_d,
        partial(generator_d, checkpointing=True),
        partial(generator_d, checkpointing=True, spectral_norm=True),
        folded,
    ],
    ids=["LeNet5", "A", "A with spectral norm", "B", "D", "D with checkpointing", "D with both", "folded teacher"],
)
def test_a_network_is_one_graph_of_all_its_layers(compiler: Compiler, build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    network, x = build()
    expected = copy.deepcopy(network)(x)
    with Compiled([network]):
        torch.testing.assert_close(network(x), expected)
        network(x)
    assert (len(compiler.graphs), compiler.runs) == (1, 2)
    assert not counters["graph_break"]
    weights = sum(isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) for layer in network.modules())
    modules = [module for module in compiler.graphs[0].modules() if isinstance(module, torch.fx.GraphModule)]
    called = [getattr(node.target, "__name__", "") for module in modules for node in module.graph.nodes]
    assert sum(name in ("conv2d", "conv_transpose2d", "linear") for name in called) == weights


def test_networks_of_one_class_do_not_share_the_limit_of_recompilations(compiler: Compiler) -> None:
    networks = [nn.Sequential(nn.Linear(2, 1)) for _ in range(3)]
    with Compiled(networks), torch._dynamo.config.patch(recompile_limit=2):
        for rows in (1, 2):
            for network in networks:
                network(torch.randn(rows, 2))
    assert len(compiler.graphs) == 3 * 2


def test_outside_the_context_a_network_is_not_compiled_and_is_copied_and_pickled_as_ever(compiler: Compiler) -> None:
    network, x = lenet5()
    names, attributes = network.state_dict().keys(), set(vars(network))
    compiled = Compiled([network])
    with compiled:
        network(x)
        inside = copy.deepcopy(network)
    runs = compiler.runs
    for other in (network, inside, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), network(x))
        assert other.state_dict().keys() == names
        assert set(vars(other)) - {"_compiled_call_impl"} == attributes
    assert (compiler.runs, len(compiler.graphs)) == (runs, 1)


def test_a_network_compiled_by_the_user_stays_compiled(compiler: Compiler) -> None:
    network, x = lenet5()
    network.compile(backend="eager")
    before = network._compiled_call_impl
    with Compiled([network]):
        network(x)
    assert network._compiled_call_impl is before
    assert compiler.runs == 1


class Unfused(nn.Module):
    """A generator that is not one of dfkd_fast.models."""

    latent_dim = 10

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 3 * 16 * 16), nn.Unflatten(1, (3, 16, 16)), nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def networks(generator: nn.Module) -> Networks:
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        for _ in range(2)
    )
    return teacher, student, generator


def method(replay: dict[str, Any], *, attention: float = 0.0, **changes: Any) -> Method:
    loop = {"batch_size": 8, "epochs": 2, "iterations_per_epoch": 2, "student_steps": 1, "compile": True, "generator_pretraining": 2}
    return Method(
        **loop_and_engine(**loop | changes),
        objective=Objective(bn_moments=1.0, activation=0.1, attention=attention, hint=attention / 50),
        replay=replay,  # type: ignore[arg-type]
        student_optimizer=Optimizer(lr=0.01),
        generator_optimizer=Optimizer(kind="adam", lr=1e-3),
    )


REPLAYS: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "ema_generator", "rows": 5},
    {"kind": "memory_bank", "rows": 3, "memory_bank": {"every": 1}},
    {"kind": "vae", "rows": 3, "vae": {"latent_dim": 8, "width": 4}},
]


@pytest.mark.parametrize("attention", [0.0, 250.0])
@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: str(replay["kind"]))
def test_a_run_compiles_in_its_first_steps_and_evaluates_what_is_not_compiled(
    make_trainer: MakeTrainer, compiler: Compiler, replay: dict[str, Any], attention: float
) -> None:
    evaluated: list[int] = []

    def evaluate(network: nn.Module) -> float:
        before = compiler.runs
        for rows in (2, 5, 9):
            network(torch.zeros(rows, 3, 16, 16))
        evaluated.append(compiler.runs - before)
        return 0.0

    generator = build_generator(GeneratorSettings(model="C", width=4, latent_dim=10), 3, 16)
    chosen = method(
        replay, attention=attention, epochs=3, micro_batches=3, drift_samples=6, student_ema_decay=0.9, student_in_generator_step="eval"
    )
    trainer = make_trainer(chosen, networks=networks(generator), evaluate=evaluate)
    graphs: list[int] = []
    trainer.on_iteration = lambda trainer: graphs.append(len(compiler.graphs))
    trainer.fit()
    trainer.sample(3)
    assert evaluated == [0] * 6
    assert not counters["graph_break"]
    # A memory bank is empty in the first epoch.
    settled = 2 if replay["kind"] == "memory_bank" else 0
    assert graphs[0] > 0
    assert set(graphs[settled:]) == {graphs[settled]} == {len(compiler.graphs)}


@pytest.mark.parametrize("build", [lambda: GeneratorA(10, 3, 16, width=4), Unfused], ids=["ours", "a user's"])
def test_every_call_of_a_step_is_compiled_that_of_the_averaged_generator_too(
    make_trainer: MakeTrainer, compiler: Compiler, build: Callable[[], nn.Module]
) -> None:
    trainer = make_trainer(method({"kind": "ema_generator"}, generator_pretraining=0), networks=networks(build()))
    trainer.steps.compile()
    before = compiler.runs
    trainer.steps.student(0)
    assert compiler.runs - before == 4, "generator, averaged generator, teacher, student"
    trainer.steps.generator()
    assert compiler.runs - before == 4 + 3, "generator, student, teacher"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_compiled_activation_checkpointing_gives_the_same_gradients_and_updates_buffers_once(
    monkeypatch: pytest.MonkeyPatch, spectral_norm: bool, fused: bool
) -> None:
    # AOT autograd, as in every real compiler: its backward pass recomputes the activations.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setitem(dispatch.MIN_NUMEL, "batch_norm_act", 0)
    torch.manual_seed(0)
    settings = GeneratorSettings(model="D", width=2, latent_dim=10, checkpointing=True, spectral_norm=spectral_norm)
    dtype = torch.float32 if fused else torch.float64  # kernels have no float64
    body, z = build_generator(settings, 3, 32).body.to(dtype), torch.randn(3, 10, dtype=dtype)
    if fused:
        assert fuse_norm_acts(body, every_norm=True)
    plain = copy.deepcopy(body)
    for network, context in ((plain, Compiled()), (body, Compiled([body]))):
        with context:
            for _ in range(2):
                network(z).square().sum().backward()
    for ours, theirs in zip((*body.buffers(), *body.parameters()), (*plain.buffers(), *plain.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def in_order(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class Counting(nn.Sequential):
    """Its forward pass reads a number that changes with every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return in_order(self, x) * min(self.calls, 1)


class Branching(nn.Sequential):
    """Its forward pass depends on the values of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return in_order(self, x if x.isfinite().all() else torch.zeros_like(x))


def trainers(make_trainer: MakeTrainer, *compiled: Any, student: type[nn.Sequential] = nn.Sequential, **changes: Any) -> list[Trainer]:
    """A trainer of the same networks for each value of ``engine.compile``."""
    made = []
    for value in compiled:
        torch.manual_seed(1)
        teacher, plain, generator = networks(GeneratorA(10, 3, 16, width=4))
        chosen = method({"kind": "ema_generator"}, compile=value, **changes)
        made.append(make_trainer(chosen, networks=(teacher, student(*plain.children()), generator)))
    return made


@pytest.mark.parametrize(
    ("value", "regions"),
    [
        (False, ()),
        ([], ()),
        (["teacher"], ("teacher",)),
        (["generator", "student"], ("student", "generator")),
        (True, ("teacher", "student", "generator")),
    ],
)
def test_the_networks_of_the_chosen_regions_are_compiled(
    make_trainer: MakeTrainer, compiler: Compiler, value: Any, regions: tuple[str, ...]
) -> None:
    (trainer,) = trainers(make_trainer, value)
    assert trainer.method.engine.compiled_regions == regions
    seconds = trainer.steps.compile()
    assert tuple(seconds) == regions
    assert trainer.steps.compile() == {}
    graphs, before = len(compiler.graphs), compiler.runs
    trainer.steps.student(0)
    trainer.steps.generator()
    calls = {"teacher": 2, "student": 2, "generator": 3}  # the averaged generator, too
    assert compiler.runs - before == sum(calls[region] for region in regions)
    assert len(compiler.graphs) == graphs


@pytest.mark.usefixtures("compiler")  # which runs the same operators
def test_compiling_before_the_first_step_leaves_the_training_as_it_is(make_trainer: MakeTrainer) -> None:
    eager, compiled = trainers(make_trainer, False, True)
    for trainer in (eager, compiled):
        trainer.fit()
    for name, network in compiled.state.saved_networks.items():
        for key, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, eager.state.saved_networks[name].state_dict()[key], rtol=1e-4, atol=1e-6)
    assert compiled.history[0].losses == pytest.approx(eager.history[0].losses, rel=1e-5)
    assert "compilation" not in eager.state.clock.read()
    assert compiled.state.clock.read()["compilation"] > 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("student", "reason"), [(Branching, "Data-dependent branching"), (Counting, "its forward pass reads what changes from call")]
)
def test_a_region_that_is_not_one_graph_is_noted_and_not_compiled(
    make_trainer: MakeTrainer, student: type[nn.Sequential], reason: str
) -> None:
    eager, compiled = trainers(make_trainer, False, True, student=student)
    for trainer in (eager, compiled):
        trainer.fit()
    assert [note.partition(reason)[:2] for note in compiled.notes] == [("engine.compile: the student is not compiled: ", reason)]
    assert not eager.notes
    for ours, theirs in zip(compiled.student.parameters(), eager.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_compiler_that_fails_is_noted_and_the_training_goes_on(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    (trainer,) = trainers(make_trainer, True)
    trainer.fit()
    assert trainer.finished
    assert [note.split(":")[:2] for note in trainer.notes] == [
        ["engine.compile", f" the {region} is not compiled"] for region in ("teacher", "student", "generator")
    ]
    assert all("no C++ compiler" in note for note in trainer.notes)


def test_running_out_of_memory_while_compiling_is_an_error(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    (trainer,) = trainers(make_trainer, True)
    monkeypatch.setattr(type(trainer.steps), "warm_up", fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()


def test_a_second_order_student_is_noted_and_not_compiled(make_trainer: MakeTrainer, compiler: Compiler) -> None:
    chosen = method({"kind": "ema_generator"}, compile=["student"])
    chosen = Method(**{**vars(chosen), "update": Update(kind="first-order")})
    trainer = make_trainer(chosen, networks=networks(GeneratorA(10, 3, 16, width=4)))
    assert trainer.steps.compile() == {}
    assert trainer.notes == ["the student is not compiled: update.kind 'first-order' differentiates it twice"]
    assert not compiler.graphs


class Growing(nn.Sequential):
    """Its forward pass reads a number that changes once in an epoch."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return in_order(self, x) * self.factor


def test_a_network_that_changes_now_and_then_is_compiled_again_and_runs_uncompiled_beyond_the_limit(
    make_trainer: MakeTrainer, compiler: Compiler
) -> None:
    eager, compiled = trainers(make_trainer, False, ["student"], student=Growing, fuse_norm_act=False)
    with torch._dynamo.config.patch(recompile_limit=5, fail_on_recompile_limit_hit=False):
        assert compiled.steps.compile()
        for factor in range(2, 10):
            losses = []
            for trainer in (eager, compiled):
                setattr(trainer.state.student, "factor", float(factor))  # noqa: B010  # an attribute of the class above
                losses.append(trainer.steps.student(0)["student"].item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert 2 < len(compiler.graphs) <= 5
