"""The model of a GPU's steps: kernels, FLOPs and bytes of operations, and of whole steps against PyTorch's own counter."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import main
from bench.end_to_end import networks
from bench.model import load
from bench.model.cost import Call, Kernel, kernels
from bench.model.rates import Rates
from bench.model.rows import over_layers, predict, total
from bench.model.trace import Launch, Layer, Phase, _Recorder, trace
from bench.provenance import measured_on
from dfkd_fast import DfkdError, load_recipe
from dfkd_fast.engine.prepare import prepare
from dfkd_fast.engine.state import TrainState
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.kernels import dispatch, ema_update_, l1_discrepancy, use_backend
from dfkd_fast.surgery import BatchNormAct2d, CpuConv2d
from tests.command_line import CommandResult

FLOAT, HALF = 4, 2
CHANGES = {"engine.precision": "bf16", "loop.batch_size": 16}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    def call(*arguments: str) -> CommandResult:
        monkeypatch.setattr("sys.argv", ["bench", "model", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        return CommandResult(exited.value.code or 0, *capsys.readouterr())  # type: ignore[arg-type]

    return call


class Recorder(TorchDispatchMode):
    """Records the kernels of operations outside of any network."""

    def __init__(self, module: type | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = operator(*arguments, **(keywords or {}))
        self.kernels += kernels(Call(operator, arguments, keywords or {}, result, self.module))
        return result


def traffic(recorder: Recorder) -> list[tuple[str, int]]:
    return [(kernel.kind, kernel.bytes) for kernel in recorder.kernels]


def test_a_convolution_reads_images_and_weights_once_and_adds_its_bias_in_a_second_kernel() -> None:
    images, weight, bias = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3), torch.zeros(5)
    with Recorder() as recorder:
        F.conv2d(images, weight, bias, padding=1)
    output = 2 * 5 * 8 * 8
    assert recorder.kernels == [
        Kernel("convolution", 2 * output * 3 * 9, FLOAT * (images.numel() + weight.numel() + output)),
        Kernel("bias", 0, 2 * FLOAT * output),
    ]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_backward_pass_of_a_convolution_has_a_kernel_for_each_gradient(frozen: bool) -> None:
    convolution = nn.Conv2d(3, 5, kernel_size=3).requires_grad_(not frozen)
    images = torch.zeros(2, 3, 8, 8, requires_grad=True)
    output = convolution(images)
    upstream = torch.ones_like(output)
    with Recorder() as recorder:
        output.backward(upstream)
    one = Kernel("convolution", 2 * output.numel() * 27, FLOAT * (images.numel() + convolution.weight.numel() + output.numel()))
    bias = Kernel("bias", 0, FLOAT * output.numel())
    assert [kernel for kernel in recorder.kernels if kernel.kind != "cast and copy"] == [one, *([] if frozen else [one, bias])]


def test_a_batch_norm_reads_its_input_twice_in_training_and_once_in_evaluation() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    size, norm = HALF * images.numel(), nn.BatchNorm2d(3)
    with Recorder() as training:
        output = norm(images)
    norm.num_batches_tracked = None
    with Recorder() as backward:
        output.backward(torch.ones_like(output))
    with Recorder() as evaluation:
        norm.eval()(images)
    assert [bytes for kind, bytes in traffic(training) if kind == "batch norm" and bytes] == [size, 2 * size]
    assert [bytes for kind, bytes in traffic(backward) if kind == "batch norm"] == [2 * size, 3 * size]
    assert traffic(evaluation) == [("batch norm", 2 * size)]


@pytest.mark.skipif(dispatch.unavailable_reason("numba") is not None, reason="numba is not installed")
def test_a_fused_batch_norm_adds_and_activates_in_its_two_passes() -> None:
    x, residual = (torch.rand(8, 16, 32, 32).bfloat16().requires_grad_() for _ in range(2))
    norm = nn.BatchNorm2d(16)
    norm.__class__ = type("BatchNorm2d", (BatchNormAct2d, nn.BatchNorm2d), {})
    size, of_channels = HALF * x.numel(), HALF * x.numel() // 100
    with use_backend("numba"), Recorder(type(norm)) as forward:
        y = norm(x, residual, activation="relu")
    with Recorder(type(norm)) as backward:
        y.backward(torch.ones_like(y))
    # Statistics and their sum, result; sums and their sum, gradients of input and residual.
    for recorder, tensors in ((forward, [1, 0, 3]), (backward, [3, 0, 5])):
        launched = [kernel for kernel in recorder.kernels if kernel.kind == "batch norm"]
        assert [round(kernel.bytes / size) for kernel in launched] == tensors
        assert all(kernel.bytes - count * size < of_channels for kernel, count in zip(launched, tensors, strict=True))
        assert not any(kernel.kind in ("activation", "addition", "moments") for kernel in recorder.kernels)


def test_views_and_allocations_launch_nothing_and_an_expanded_dimension_is_read_once() -> None:
    row = torch.zeros(1, 1000)
    with Recorder() as recorder:
        expanded = row.expand(500, -1)
        torch.empty(3).view(1, 3).t().detach()
        expanded.to(torch.bfloat16)
    assert traffic(recorder) == [("cast and copy", FLOAT * 1000 + HALF * 500 * 1000)]


def test_operations_in_place_write_their_argument_and_read_it_unless_they_overwrite_it() -> None:
    x, y = torch.zeros(100), torch.zeros(100)
    with Recorder() as recorder:
        x.zero_()
        x.copy_(y)
        x.relu_()
    assert traffic(recorder) == [("other", 400), ("cast and copy", 800), ("activation", 800)]


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [([10, 10], 1), ([10] * 31, 2), ([320 * 65_536 + 1], 2)],
    ids=["few small tensors", "more tensors than a launch has room for", "more chunks than a launch has blocks"],
)
def test_an_optimizer_step_moves_seven_values_per_parameter_in_as_few_launches_as_pytorch(sizes: list[int], launches: int) -> None:
    weights = [torch.zeros(size, requires_grad=True) for size in sizes]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.Adam(weights, fused=True)
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    _, *adam = recorder.kernels  # the first one counts the step
    assert len(adam) == launches
    steps = 2 * FLOAT * len(sizes)
    assert sum(kernel.bytes for kernel in adam) == pytest.approx(7 * FLOAT * sum(sizes) + steps, abs=launches)


def test_an_average_reads_both_lists_and_writes_one_and_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MIN_NUMEL, "ema_update_", 0)
    average, source, shadow = torch.zeros(100), torch.ones(100), torch.zeros(100, dtype=torch.bfloat16)
    with Recorder() as recorder:
        ema_update_([average], [source], 0.5, shadows=[shadow])
    assert traffic(recorder) == [("average", 3 * 400 + 200)]


@pytest.mark.parametrize(("rows", "launches"), [(256, 1), (2560, 2)])
def test_a_discrepancy_of_many_logits_adds_its_partial_sums_in_a_second_launch(rows: int, launches: int) -> None:
    student, teacher = torch.zeros(rows, 10, requires_grad=True), torch.zeros(rows, 10)
    with use_backend("numba"), Recorder() as recorder:
        l1_discrepancy(student, teacher, reduction="mean")
    moved = 2 * FLOAT * student.numel() + student.numel() + FLOAT  # both logits, the signs and the loss
    assert traffic(recorder) == [("loss", moved), *[("loss", 0)] * (launches - 1)]


def test_flops_of_a_step_are_those_that_pytorch_counts_without_fusion() -> None:
    phases = trace(load_recipe("digits-mad", CHANGES))
    recipe = load_recipe("digits-mad", CHANGES | {"engine.fuse_teacher": False})
    state = prepare(*networks(recipe), recipe, seed=0, device=torch.device("cpu"), optimize_for="cuda")
    steps: list[Callable[[TrainState], object]] = [student_step, generator_step]
    for phase, step in zip(phases, steps, strict=True):
        with FlopCounterMode(display=False) as counter:
            step(state)
        assert phase.steps * counter.get_total_flops() == sum(launch.kernel.flops for launch in phase.launches) > 0


def test_kernels_belong_to_the_layer_that_launched_them_also_in_the_backward_pass() -> None:
    recipe = load_recipe("digits", CHANGES | {"loop.student_steps": 2})
    student, generator = trace(recipe)
    assert (student.name, student.steps, generator.name, generator.steps) == ("student step", 2, "generator step", 1)

    def convolutions(phase: Phase, network: str, *, backward: bool) -> set[str]:
        found = [one for one in phase.launches if one.kernel.kind == "convolution" and one.backward is backward]
        return {one.layer.name for one in found if one.layer.network == network}

    for network in ("teacher", "student", "generator"):
        assert convolutions(generator, network, backward=True) == convolutions(generator, network, backward=False) != set()
    assert convolutions(student, "student", backward=True) == convolutions(student, "student", backward=False) != set()
    assert not convolutions(student, "teacher", backward=True) and not convolutions(student, "generator", backward=True)


def test_memory_is_that_of_the_storages_that_are_alive_at_the_same_time() -> None:
    with FakeTensorMode(), _Recorder([Layer()]) as recorder:
        x = torch.empty(1000)  # 4 kB
        y = x * 2
        del x  # its storage may be used again
        z = y.view(10, 100)[0] + 1  # a view has no storage of its own
        y.add_(1)
        assert recorder.memory.peak == 8000
        z = torch.cat([y, y])
        assert recorder.memory.peak == 4000 + 8000 + 400
        del y, z
        torch.empty(100)
    assert recorder.memory.peak == 12_400


def test_memory_grows_with_the_batch_size_and_weights_do_not() -> None:
    small, large = (trace(load_recipe("digits", CHANGES | {"loop.batch_size": size}))[0] for size in (32, 64))
    assert small.resident_bytes < large.resident_bytes < 1.1 * small.resident_bytes  # static buffers of images
    assert 1.2 * small.peak_bytes < large.peak_bytes <= 2 * small.peak_bytes


def test_the_networks_are_optimized_for_a_gpu() -> None:
    recipe = load_recipe("digits", {"loop.batch_size": 8})
    state = prepare(*networks(recipe), recipe, seed=0, device=torch.device("cpu"), optimize_for="cuda")
    layers = [layer for network in (state.teacher, state.student, state.generator) for layer in network.modules()]
    assert not any(isinstance(layer, CpuConv2d) for layer in layers)
    assert any(isinstance(layer, BatchNormAct2d) for layer in state.generator.modules())
    assert all(optimizer.param_groups[0]["fused"] for optimizer in (state.student_optimizer, state.generator_optimizer))
    assert all(isinstance(optimizer.param_groups[0]["lr"], Tensor) for optimizer in (state.student_optimizer, state.generator_optimizer))


def test_the_activations_of_a_student_are_computed_with_its_batch_norms() -> None:
    of_kinds: dict[str, set[str]] = {}
    for fused in (True, False):
        step, _ = trace(load_recipe("cifar10-dfad", CHANGES | {"engine.fuse_norm_act": fused, "loop.student_steps": 1}))
        of_kinds[str(fused)] = {launch.kernel.kind for launch in step.launches if launch.layer.network == "student"}
    assert of_kinds["False"] - of_kinds["True"] == {"activation"}


@pytest.mark.parametrize("name", ["digits-retain", "digits-bank", "digits-vae"])
def test_steps_of_every_method_can_be_recorded(name: str) -> None:
    assert all(phase.launches for phase in trace(load_recipe(name, CHANGES | {"loop.student_steps": 1})))


def test_a_kernel_takes_the_longest_of_its_flops_its_bytes_and_the_shortest_kernel() -> None:
    rates = Rates("toy", flops=1e3, bandwidth=1e3, kernel_seconds=1.0)
    costs = [Kernel("convolution", 5_000, 1_000), Kernel("activation", 0, 3_000), Kernel("activation", 0, 1)]
    launches = [Launch(Layer("student", "a"), False, "", kernel) for kernel in costs]
    launches.append(Launch(Layer("student", "b"), False, "", costs[2]))
    case = {"recipe": "r", "settings": "", "batch_size": 1, "precision": "bf16"}
    rows = predict(
        [Phase("student step", 2, launches, peak_bytes=3_000_000_000, resident_bytes=500_000_000)], rates, case, measured_on("toy", "")
    )
    assert [(row.layer, row.kind, row.kernels, row.ms) for row in rows] == [
        ("a", "convolution", 1, 5_000),
        ("a", "activation", 2, 4_000),
        ("b", "activation", 1, 1_000),
    ]
    assert [(row.kind, row.kernels, row.ms) for row in over_layers(rows)] == [("convolution", 1, 5_000), ("activation", 3, 5_000)]
    sums = total(rows, per_step=True)
    assert (sums.kernels, sums.ms, sums.tensor_core_ms, sums.rest_ms, sums.memory_gb) == (2, 5_000, 2_500, 2_500, 3.5)


def test_the_command_writes_a_table_and_a_plot_and_replaces_the_rows_of_the_same_case(
    run: Callable[..., CommandResult], tmp_path: Path
) -> None:
    table, layers = tmp_path / "model.csv", tmp_path / "layers.csv"
    arguments = ["--recipe", "digits", "--set", "loop.batch_size=8", "--out", str(table)]
    result = run(*arguments, "--layers", "3", "--by-layer", str(layers))
    assert result.code == 0 and "rest ÷ convolutions" in result.out and "the layers that take longest" in result.out
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    first, detailed = read(table), read(layers)
    assert {row["layer"] for row in first} == {""} and len({row["layer"] for row in detailed}) > 5
    assert sum(float(row["ms"]) for row in detailed) == pytest.approx(sum(float(row["ms"]) for row in first), rel=1e-3)
    run(*arguments)
    run(*arguments, "--set", "engine.fold_teacher=false")
    rows = read(table)
    assert [row["settings"] for row in rows].count("loop.batch_size = 8") == len(first)
    assert {row["settings"] for row in rows} == {"loop.batch_size = 8", "engine.fold_teacher = false, loop.batch_size = 8"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "digits", "--device", "v100"], "--device 'v100': must be one of h200, h100"),
        (["--recipe", "digits", "--set", "engine.precision=fp32"], "engine.precision = 'fp32': must be 'auto' or 'bf16'"),
        (["--recipe", "digits", "--set", "engine.compile=true"], "engine.compile = true: the model does not know"),
        (["--recipe", "digits", "--recipe", "nothing"], "recipe 'nothing'"),
        (["--recipe", "nothing"], "recipe 'nothing'"),
        (["--recipe", "digits", "--set", "loop"], "--set 'loop': must be key.path=value"),
        (["--recipe", "digits", "--layers", "-1"], "not '-1'"),
        (["--recipe", "digits", "--by-layer", "/nonexistent/layers.csv"], "--by-layer /nonexistent/layers.csv"),
    ],
)
def test_bad_arguments_are_one_line(run: Callable[..., CommandResult], arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*arguments, "--out", str(tmp_path / "model.csv"))
    assert result.code == 2 and message in result.err and len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize(("option", "name"), [("--out", "model.png"), ("--by-layer", "model.csv")])
def test_the_table_is_not_overwritten_by_the_plot_or_the_table_of_layers(
    run: Callable[..., CommandResult], option: str, name: str, tmp_path: Path
) -> None:
    result = run("--recipe", "digits", "--out", str(tmp_path / "model.csv"), option, str(tmp_path / name))
    assert result.code == 2 and f"{option} {tmp_path / name}: must" in result.err and not list(tmp_path.iterdir())


def test_a_case_is_named_by_what_differs_from_its_recipe_in_any_order_and_a_file_by_its_path(tmp_path: Path) -> None:
    settings = {"loop.batch_size": 8, "engine.capture": True, "loop.student_steps": 2}
    names = [load("digits", dict(order))[1] for order in (settings.items(), reversed(settings.items()))]
    assert names == 2 * [{"recipe": "digits", "settings": "loop.batch_size = 8, loop.student_steps = 2"}]
    own = tmp_path / "digits.toml"
    own.write_text('extends = "digits"\n[engine]\nprecision = "fp32"\n')
    with pytest.raises(DfkdError, match=r"engine\.precision = 'fp32'"):
        load(str(own), {})
    own.write_text('extends = "digits"\n')
    assert load(str(own), {})[1] == {"recipe": str(own), "settings": ""}


def test_a_table_of_another_benchmark_is_not_overwritten(run: Callable[..., CommandResult], tmp_path: Path) -> None:
    table = tmp_path / "micro.csv"
    table.write_text("kernel,median_us\nema,1\n")
    result = run("--recipe", "digits", "--out", str(table))
    assert result.code == 2 and "has other columns" in result.err and table.read_text() == "kernel,median_us\nema,1\n"
