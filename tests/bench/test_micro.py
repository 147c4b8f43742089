"""Micro-benchmarks: correctness check, output and error messages. No test depends on measured times."""

import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench import table
from bench.__main__ import main
from bench.micro import KERNELS, PROVIDERS, Case, check, discrepancy, rows, select, timing
from bench.micro.workload import Trial, default_backends
from bench.provenance import measured_on
from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import dispatch

TINY = {"ema": "generator-a", "l1": "4x5", "kl": "4x5", "js": "2x3x4x5", "concat": "2x4x3x4x4"}
TINY |= dict.fromkeys(("moments", "bias_act", "conv", "norm"), "3x4x5x5")
PLAIN = ["--provider", "eager", "--provider", "reference"]  # numba compiles for seconds and is tested elsewhere
COMPILER = shutil.which("g++") or shutil.which("clang++")


class CommandResult(NamedTuple):
    code: int
    out: str
    err: str
    rows: list[dict[str, str]]
    """Rows of the CSV file, if it exists."""


Run = Callable[..., CommandResult]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process; ``micro`` writes out.csv with one call per provider."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(timing, "COPIED_BYTES", {"cpu": 1 << 20})

    def call(command: str, *arguments: str) -> CommandResult:
        usual = ["--device", "cpu", "--repeats", "1", "--out", "out.csv"] if command == "micro" else []
        monkeypatch.setattr(sys, "argv", ["bench", command, *usual, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code, captured, out = ended.value.code, capsys.readouterr(), Path("out.csv")
        status = code if isinstance(code, int) else int(code is not None)
        return CommandResult(status, captured.out, captured.err, table.read(out) if out.exists() else [])

    return call


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_one_row_per_mode_and_provider(run: Run, kernel: str) -> None:
    result = run("micro", "--kernel", kernel, "--size", TINY[kernel], *PLAIN)
    assert result.code == 0, result.err
    selected = [row for row in result.rows if row["dtype"] == "float32" and row["layout"] == result.rows[0]["layout"]]
    modes = {"update"} if kernel == "ema" else {"forward", "backward", "full"}
    assert {(row["mode"], row["provider"]) for row in selected} == {(mode, name) for mode in modes for name in ("eager", "reference")}
    for row in result.rows:
        assert tuple(row) == rows.COLUMNS
        assert (row["kernel"], row["size"], row["status"], row["calls"]) == (kernel, TINY[kernel], "ok", "1")
        for column in ("median_us", "q20_us", "q80_us", "gb_per_s", "share_of_copy", "speedup_over_eager", "copy_gb_per_s"):
            assert float(row[column]) > 0
        assert row["timed"] == "wall clock"
        assert row["torch"] == torch.__version__
        assert row["device"]
        assert row["commit"]
        assert row["threads"] == "1"
        assert row["command"].startswith("python -m bench micro")
    assert f"{kernel} " in result.out


def test_a_file_that_cannot_be_written_is_refused_before_the_measurement(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "timer_for", None)
    for out, message in ((".", "is a folder"), ("none/rows.csv", "there is no folder")):
        result = run("micro", "--out", out)
        assert result.code == 2
        assert message in result.err and len(result.err.splitlines()) == 1


def test_all_our_backends_for_the_device_are_measured(run: Run) -> None:
    result = run("micro", "--kernel", "l1", "--size", "4x5", "--mode", "forward", *(f"--provider={name}" for name in PROVIDERS[2:6]))
    assert result.code == 0, result.err
    assert {row["provider"] for row in result.rows} == {"reference", "numba"}
    assert all(row["median_us"] and not row["speedup_over_eager"] for row in result.rows)


def test_peers_of_the_ema_are_measured_and_a_missing_one_is_not_an_error(run: Run) -> None:
    result = run("micro", "--kernel", "ema", "--size", "generator-a", *(f"--provider={name}" for name in PROVIDERS[6:]))
    assert result.code == 0, result.err
    plain = {row["provider"]: row["status"] for row in result.rows if row["variant"] == "plain" and row["layout"] == "channels_last"}
    assert plain["apex"].startswith("not installed")
    assert plain["averaged_model"] == plain["flat_lerp"] == "ok, without num_batches_tracked"
    assert {plain[name] for name in ("fused_ema", "model_ema_v3", "foreach_lerp")} == {"ok"}
    assert all(bool(row["median_us"]) == row["status"].startswith("ok") for row in result.rows)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_torch_compile_is_checked_and_timed(run: Run) -> None:
    result = run("micro", "--kernel", "l1", "--size", "4x5", "--mode", "forward", "--provider", "eager", "--provider", "compile")
    assert result.code == 0, result.err
    compiled = next(row for row in result.rows if row["provider"] == "compile" and row["dtype"] == "float32")
    assert compiled["status"] == "ok"
    assert float(compiled["speedup_over_compile"]) == 1


def _no_gradient_for_the_teacher(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
    return torch.nn.functional.l1_loss(student, teacher.detach() + 0 * teacher, reduction=reduction)


def _slightly_off(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
    return torch.nn.functional.l1_loss(student, teacher, reduction=reduction) * 1.0001


@pytest.mark.parametrize(("wrong", "named"), [(_no_gradient_for_the_teacher, "gradient of teacher"), (_slightly_off, "loss")])
def test_a_wrong_result_is_not_timed_and_exits_with_1(
    run: Run, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor], named: str
) -> None:
    monkeypatch.setattr(discrepancy, "l1_discrepancy", wrong)
    result = run("micro", "--kernel", "l1", "--size", "4x5", "--mode", "full", *PLAIN)
    assert result.code == 1
    assert result.err.count("\n") == 1
    by_provider = {row["provider"]: row for row in result.rows if (row["variant"], row["dtype"]) == ("both", "float32")}
    assert by_provider["eager"]["median_us"]
    assert by_provider["reference"]["status"].startswith(f"wrong: {named} is off by")
    assert not by_provider["reference"]["median_us"]
    assert not by_provider["reference"]["speedup_over_eager"]


def test_a_provider_that_raises_is_not_timed_and_exits_with_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Tensor, **__: str) -> Tensor:
        raise RuntimeError("out of order\nsecond line")

    monkeypatch.setattr(discrepancy, "l1_discrepancy", broken)
    result = run("micro", "--kernel", "l1", "--size", "4x5", "--mode", "forward", *PLAIN)
    assert result.code == 1
    assert {row["status"] for row in result.rows if row["provider"] == "reference"} == {"failed: RuntimeError: out of order"}
    assert all(row["median_us"] for row in result.rows if row["provider"] == "eager")


@pytest.mark.parametrize(
    ("actual", "named"),
    [
        ({"y": torch.ones(3)}, None),
        ({"y": torch.full((3,), 1 + 1e-3)}, "y is off by 1.0e-03"),
        ({"y": torch.tensor([1.0, 1.0, torch.nan])}, "y is off by nan"),
        ({"y": torch.ones(3, 1)}, "y is off by inf"),
        ({}, "no y"),
    ],
)
def test_mismatch_names_the_result(actual: dict[str, Tensor], named: str | None) -> None:
    message = check.mismatch(actual, {"y": torch.ones(3, dtype=torch.float64)}, {"y": 1e-7}, ())
    assert message is None if named is None else message is not None and message.startswith(named)


def test_a_result_from_rounded_values_may_be_off_by_their_rounding() -> None:
    actual, expected = {"y": torch.full((3,), 1 + 1e-3)}, {"y": torch.ones(3, dtype=torch.float64)}
    assert check.mismatch(actual, expected, {"y": 1e-7}, (), rounded={"y": torch.bfloat16}) is None
    assert check.mismatch(actual, expected, {"y": 1e-7}, (), rounded={"y": torch.float16}) == "y is off by 1.0e-03, allowed 4.9e-04"


def test_rows_of_the_same_case_are_replaced_and_others_kept(run: Run) -> None:
    for size in ("4x5", "4x6", "4x5"):
        result = run("micro", "--kernel", "l1", "--size", size, "--mode", "forward", "--provider", "eager")
    keys = [tuple(row[name] for name in rows.KEY) for row in result.rows]
    assert len(keys) == len(set(keys)) == 4  # two sizes, two dtypes


def test_the_last_of_several_rows_of_a_case_is_written(tmp_path: Path) -> None:
    early = rows.Row("l1", "both", "full", "4x5", "float32", "contiguous", "cuda", "ok", median_us=9.0, provenance=measured_on("a CPU", ""))
    rows.write(tmp_path / "out.csv", map(table.cells, [early, replace(early, provider="eager"), replace(early, median_us=3.0)]))
    assert [(row["provider"], row["median_us"]) for row in table.read(tmp_path / "out.csv")] == [("cuda", "3"), ("eager", "9")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "l2"], "--kernel 'l2': must be one of ema, l1, kl, js, concat, moments, bias_act, conv, norm"),
        (["--mode", "both"], "--mode 'both': must be one of forward, backward, full, update"),
        (["--provider", "jax"], "--provider 'jax': must be one of eager, compile, reference, numba"),
        (["--kernel", "kl", "--size", "4x5x6"], "--size '4x5x6': must be a size of a chosen kernel (kl: NxC or NxCxHxW"),
        (["--kernel", "ema", "--size", "resnet19"], "resnet18 or resnet34"),
        (["--device", "tpu"], "device 'tpu': must be auto, cpu or cuda"),
        (["--repeats", "0"], "--repeats 0: must be a whole number ≥ 1"),
        (["--threads", "many"], "'--threads'"),
    ],
)
def test_an_invalid_value_gives_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    result = run("micro", *arguments)
    assert result.code == 2
    assert result.err.startswith("bench: ")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not result.rows


@pytest.mark.parametrize("unfit", [["--mode", "update"], ["--provider", "apex"]])
def test_an_empty_selection_is_reported(run: Run, unfit: list[str]) -> None:
    result = run("micro", "--kernel", "l1", "--size", "4x5", *unfit)
    assert result.code == 2
    assert " ".join(unfit) in result.err
    assert not result.rows


def test_the_default_selection_has_a_few_cases_of_every_kernel() -> None:
    few, every = select(list(KERNELS), [], False), select(list(KERNELS), [], True)
    assert {workload.kernel for workload in few} == set(KERNELS)
    assert len(few) < 20 < len(every)
    assert all(workload.floor_bytes(mode) > 0 for workload in few for mode in workload.modes)


def test_repetitions_fill_the_time_budget_of_a_case() -> None:
    """The overhead of a call (preparation, cache flush) counts towards the budget."""
    calls, now, overhead = {"short": 0, "long": 0}, 0.0, 1e-4

    def timer(trial: Trial, count: int, warm_up: bool) -> list[float]:
        nonlocal now
        name = "short" if trial is trials["short"] else "long"
        calls[name] += count
        seconds = {"short": 1e-5, "long": 0.05}[name]
        now += count * (seconds + overhead)
        return [seconds] * count

    trials = {name: Trial(lambda _: None, dict, torch.no_grad) for name in calls}
    for case_seconds, rounds in ((1.0, 18), (0.5, 9), (0.0, 5)):
        before = dict(calls)
        seconds = timing.measure(trials, timer, None, case_seconds, lambda: now)
        assert calls["long"] - before["long"] - 3 == len(seconds["long"]) == rounds
        assert calls["short"] - before["short"] - 3 == len(seconds["short"]) == 45 * rounds
    assert [len(times) for times in timing.measure(trials, timer, 3).values()] == [3, 3]


def test_a_case_is_recovered_from_its_key() -> None:
    case = Case("ema", "shadow", "resnet18", torch.float32, "channels_last", "update")
    workload = pickle.loads(pickle.dumps(case)).workload()
    assert (workload.kernel, workload.variant, workload.size, workload.dtype, workload.layout) == case[:5]
    assert str(case) == "ema shadow resnet18 float32 channels_last update"
    with pytest.raises(DfkdError, match="ema both resnet18 float32 channels_last update is not a case of ema"):
        case._replace(variant="both").workload()


def test_a_backend_that_does_not_support_the_device_is_unavailable() -> None:
    cpu = torch.device("cpu")
    case = Case("l1", "both", "4x5", torch.float32, "contiguous", "full")
    usual = {provider.name: provider.unavailable for provider in case.workload().providers(cpu, default_backends(cpu))}
    assert usual["reference"] is None
    assert "triton" not in usual
    [triton] = [provider for provider in case.workload().providers(cpu, ["triton"]) if provider.backend]
    assert triton.unavailable in (dispatch.unavailable_reason("triton"), "it does not support cpu tensors here")


def test_plot_draws_one_chart_per_kernel_next_to_the_csv(run: Run, tmp_path: Path) -> None:
    run("micro", "--kernel", "l1", "--kernel", "js", "--size", "4x5", *PLAIN)
    result = run("plot", "out.csv")
    assert result.code == 0, result.err
    assert result.out.split() == ["out-l1.png", "out-js.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in result.out.split())


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", ",".join(rows.COLUMNS) + "\n"])
def test_plot_rejects_invalid_files(run: Run, text: str) -> None:
    Path("mine.csv").write_text(text)
    result = run("plot", "mine.csv")
    assert result.code == 2
    assert "mine.csv" in result.err
    assert result.err.count("\n") == 1
