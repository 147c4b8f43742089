"""From the records of two GPUs to documents."""

import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import provenance, report, table
from bench.__main__ import main
from bench.gpu.records import Record, Status
from bench.micro.rows import Row
from bench.provenance import ROOT
from bench.report import gpu
from bench.report.figures import Figures, is_gpu
from bench.report.markdown import END
from dfkd_fast import DfkdError
from dfkd_fast.engine.device import device_name

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
COMMAND = "python -m bench gpu --minutes 9 --out /scratch/out"


class Device:
    """Writes the records of a GPU that is so many times as slow as an imagined one."""

    def __init__(self, name: str, slowness: float, commit: str = "abc1234", rehearsal: bool = False) -> None:
        self.slowness = slowness
        versions = {"torch": "2.11.0", "triton": "3.6.0", "numba": ""}
        self.origin: dict[str, Any] = {"device": name, **versions, "commit": commit, "command": COMMAND, "rehearsal": rehearsal}

    def record(
        self, stage: str, case: str, status: Status = "ok", text: str = "", table: str = "", row: dict[str, Any] | None = None
    ) -> Record:
        return Record(stage, case, status, text, table=table, row=row or {}, origin=self.origin)

    def kernel(self, provider: str, microseconds: float, status: str = "ok", **others: Any) -> Record:
        timed: dict[str, Any] = (
            {"median_us": microseconds * self.slowness, "share_of_copy": 0.91, "timed": "graph replay"} if status.startswith("ok") else {}
        )
        shared = {name: value for name, value in self.origin.items() if name != "rehearsal"}
        case: dict[str, Any] = {
            "kernel": "ema",
            "variant": "plain",
            "mode": "update",
            "size": "resnet50",
            "dtype": "float32",
            "layout": "contiguous",
        }
        row = asdict(Row(**{**case, "provider": provider, "status": status, **timed, **shared, **others}))
        recorded: Status = "ok" if timed else "wrong"
        return self.record("micro", f"ema resnet50 / {provider}", recorded, status, table="micro", row=row)

    def contender(self, name: str, seconds: float, **others: Any) -> Record:
        row: dict[str, Any] = {
            "recipe": "cifar10-dfad",
            "batch_size": 256,
            "precision": "bf16",
            "contender": name,
            "turns": 5,
            "peak_memory_mib": 1234.5,
            "autocast": "bf16",
            "tf32": "convolutions",
        }
        row |= {"seconds_per_iteration": seconds * self.slowness, "device": self.origin["device"], "commit": self.origin["commit"]}
        return self.record("end-to-end", f"cifar10-dfad {name}", table="end-to-end", row=row | others)

    def profiled(self, contender: str, rank: int) -> Record:
        row: dict[str, Any] = {"recipe": "cifar10-dfad", "batch_size": 256, "contender": contender, "rank": rank, "share": 0.05}
        row |= {"name": f"{contender}_{rank}<float>", "calls_per_iteration": 7.0, "us_per_iteration": (99 - rank) * self.slowness}
        return self.record("end-to-end", f"cifar10-dfad {contender}: kernel {rank}", table="kernels", row=row)

    def run(self, seed: int, last: float) -> Record:
        retention = {"last": last, "best": last + 0.5, "largest_drop": 0.25}
        row: dict[str, Any] = {"recipe": "mnist-dfad (3 of 60 epochs)", "seed": seed, "device": "cuda", "teacher_accuracy": 99.0}
        row |= {"retention": retention}
        row |= {"command": f"dfkd-fast distill mnist-dfad --seed {seed} --set loop.epochs=3", "seconds": {"total": 40 * self.slowness}}
        return self.record("accuracy", f"mnist-dfad seed {seed}", table="accuracy", row=row | {"device_name": self.origin["device"]})

    def everything(self) -> list[Record]:
        return [
            self.record("environment", "versions", table="host", row={"python": "3.12.3", "memory_gib": 80 * self.slowness}),
            self.record("environment", "copy bandwidth", table="ceilings", row={"gb_per_s": 4000 / self.slowness}),
            self.record("environment", "", row={"complete": True}),
            *(self.record("tests", f"tests/kernels/test_ema.py::test_{index}") for index in range(7)),
            self.record("tests", "tests/kernels/test_kl.py::test_wide", "failed", "AssertionError: 0.5 > 0.1"),
            self.record("tests", "tests/kernels/test_kl.py::test_flat", "failed", "AssertionError: 0.5 > 0.1"),
            self.record("tests", "tests/test_apex.py::test_adam", "skipped", "Skipped: needs apex"),
            self.record("tests", "", row={"complete": True}),
            self.kernel("eager", 40),
            self.kernel("foreach_lerp", 20),
            self.kernel("flat_lerp", 5, status="ok, without integer buffers"),
            self.kernel("cuda", 10),
            self.kernel("triton", 0, status="wrong: averages differ"),
            self.contender("plain", 0.8),
            self.contender("engine", 0.2),
            *(self.profiled("plain", rank) for rank in range(25)),
            *(self.profiled("engine", rank) for rank in range(25)),
            self.run(0, 98.0),
            self.run(1, 97.0),
        ]


def write(path: Path, records: Iterable[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(record.line() + "\n" for record in records))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the documents as they are and no results."""
    root = tmp_path / "root"
    for name in ("README.md", "docs/gpu.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "bench" / "results").mkdir(parents=True)
    report.main((), root)
    return root


def shown(root: Path, begin: str) -> str:
    """What stands under a line of a document."""
    name = next(name for name, sections in report.documents(Figures(root)).items() if begin in sections)
    return (root / name).read_text().partition(begin)[2].partition(END)[0].strip()


def column(text: str, device: str) -> dict[tuple[str, ...], str]:
    """A device's cell of each row of the first table, by the cells before the devices."""
    lines = text[text.index("| ") :].partition("\n\n")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    labels = min(index for index, title in enumerate(rows[0]) if title in (H100, H200))
    return {tuple(row[:labels]): row[rows[0].index(device)] for row in rows[1:]}


def all_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_without_a_gpu_every_table_says_so_in_one_line(root: Path) -> None:
    figures = Figures(root / "bench" / "results")
    assert set(gpu.sections(figures).values()) == {gpu.NOT_MEASURED}
    assert set(gpu.readme_sections(figures).values()) == {gpu.README_NOT_MEASURED}
    assert (root / "docs" / "gpu.md").read_text().count(gpu.NOT_MEASURED) == len(gpu.sections(figures))


@pytest.mark.parametrize("together", [True, False])
def test_each_device_has_its_own_column(root: Path, tmp_path: Path, together: bool) -> None:
    records = [Device(H200, 1).everything(), Device(H100, 2).everything()]
    if together:
        sources = [write(tmp_path / "out" / "results.jsonl", [*records[0], *records[1]]).parent]
    else:
        sources = [write(tmp_path / f"{index}.jsonl", of_device) for index, of_device in enumerate(records)]
    report.main(sources, root)

    environment = shown(root, gpu.ENVIRONMENT)
    assert column(environment, H200)["GPU memory (GiB)",] == "80"
    assert column(environment, H100)["GPU memory (GiB)",] == "160"
    assert column(environment, H100)["a large copy (GB/s)",] == "2000"
    case = ("plain", "resnet50", "float32", "contiguous", "update")
    assert column(shown(root, gpu.KERNELS), H200)[case] == "cuda 10 µs, 91 %, 2.00 × foreach_lerp, triton wrong"
    assert column(shown(root, gpu.KERNELS), H100)[case] == "cuda 20 µs, 91 %, 2.00 × foreach_lerp, triton wrong"
    captured = ("`cifar10-dfad`", "256", "bf16", "engine", "bf16, TF32 in convolutions")
    assert column(shown(root, gpu.END_TO_END), H200)[captured] == "0.2 s/iteration, 4.00 × plain, 1234 MiB"
    assert column(shown(root, gpu.END_TO_END), H100)[captured] == "0.4 s/iteration, 4.00 × plain, 1234 MiB"
    run = ("mnist-dfad (3 of 60 epochs)", "`dfkd-fast distill mnist-dfad --seed N --set loop.epochs=3`", "top-1 accuracy")
    text = "last 97.50 (seed 0: 98.00, seed 1: 97.00), best 98.00, teacher 99.00, largest drop 0.25, {} s"
    assert column(shown(root, gpu.ACCURACY), H200)[run] == text.format(40)
    assert column(shown(root, gpu.ACCURACY), H100)[run] == text.format(80)
    assert column(shown(root, gpu.README_KERNELS), H100)["ema", "resnet50", "float32"].startswith("cuda 20 µs")
    assert column(shown(root, gpu.README_END_TO_END), H200)["`cifar10-dfad`", "256", "bf16"].startswith("0.2 s/iteration")


def test_the_ten_most_expensive_kernels_of_each_device_are_listed(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", [*Device(H200, 1).everything(), *Device(H100, 2).everything()])], root)
    first, second = shown(root, gpu.PROFILE).split(f"### {H200}")
    assert "| `cifar10-dfad` | 256 | `engine_0<float>` | 7 | 198 | 5 % |" in first
    assert "| `cifar10-dfad` | 256 | `engine_0<float>` | 7 | 99 | 5 % |" in second
    assert "engine_9<" in second
    assert "engine_10<" not in second
    assert "plain_" not in second


def test_failures_and_reasons_are_shown_for_the_device_that_has_them(root: Path, tmp_path: Path) -> None:
    passed = [record for record in Device(H100, 2).everything() if record.status == "ok"]
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything()), write(tmp_path / "two.jsonl", passed)], root)
    text = shown(root, gpu.STAGES)
    assert column(text, H200)["tests",] == "7 passed, 2 failed, 1 skipped"
    assert column(text, H100)["tests",] == "7 passed"
    assert f"Not passed on {H100}" not in text
    reasons = text.partition(f"Not passed on {H200}")[2]
    assert "| tests | failed | 2 | `AssertionError: 0.5 > 0.1` | `tests/kernels/test_kl.py::test_wide, " in reasons
    assert "`Skipped: needs apex`" in reasons


def test_a_stage_that_was_killed_is_its_device_s_failure(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    killed = device.record("tests", "", "failed", "its process was killed by SIGSEGV")
    report.main([write(tmp_path / "one.jsonl", [*device.everything()[:3], killed])], root)
    assert column(shown(root, gpu.STAGES), H200)["tests",] == "failed: `its process was killed by SIGSEGV`"


def test_the_same_device_again_replaces_its_figures_and_no_other_s(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", [*Device(H200, 1).everything(), *Device(H100, 2).everything()])], root)
    before = all_files(root)
    again = Device(H200, 3)
    report.main([write(tmp_path / "two.jsonl", again.everything())], root)
    case = ("plain", "resnet50", "float32", "contiguous", "update")
    assert column(shown(root, gpu.KERNELS), H200)[case].startswith("cuda 30 µs")
    assert column(shown(root, gpu.KERNELS), H100)[case].startswith("cuda 20 µs")
    assert [line.split(" | ")[4] for line in shown(root, gpu.PROFILE).splitlines() if "engine_0<" in line] == ["198", "297"]
    assert column(shown(root, gpu.STAGES), H200)["tests",] == "7 passed, 2 failed, 1 skipped"
    report.main([write(tmp_path / "three.jsonl", Device(H200, 1).everything())], root)
    assert all_files(root) == before


def test_a_later_call_adds_to_what_an_earlier_one_found(root: Path, tmp_path: Path) -> None:
    first, later = Device(H200, 1), Device(H200, 1, commit="def5678-dirty")
    report.main([write(tmp_path / "one.jsonl", first.everything())], root)
    left = later.record("tests", "", "left", "3 s are left, and it needs 30: the next call runs it")
    report.main([write(tmp_path / "two.jsonl", [later.kernel("apex", 40), later.contender("plain_compiled", 0.3), left])], root)
    rows = column(shown(root, gpu.END_TO_END), H200)
    assert (
        rows["`cifar10-dfad`", "256", "bf16", "plain compiled", "bf16, TF32 in convolutions"] == "0.3 s/iteration, 1234 MiB"
    )  # plain is of another commit
    assert rows["`cifar10-dfad`", "256", "bf16", "engine", "bf16, TF32 in convolutions"].startswith("0.2 s/iteration, 4.00 × plain, ")
    assert column(shown(root, gpu.STAGES), H200)["tests",].startswith("7 passed")
    for begin in (gpu.KERNELS, gpu.END_TO_END):
        assert "commit `abc1234`" in shown(root, begin)
        assert "commit `def5678-dirty` (with uncommitted changes)" in shown(root, begin)


def test_under_each_table_stand_commit_versions_and_command_without_the_machine_s_folders(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    line = f"- {H200}: commit `abc1234`, torch 2.11.0, triton 3.6.0, `python -m bench gpu --minutes 9 --out DIR`"
    for begin in (gpu.ENVIRONMENT, gpu.KERNELS, gpu.END_TO_END, gpu.PROFILE, gpu.STAGES):
        assert line in shown(root, begin)
    assert not any(b"/scratch" in content for content in all_files(root).values())


def test_figures_of_a_gpu_stay_out_of_the_tables_of_a_cpu(root: Path, tmp_path: Path) -> None:
    cpu = table.read(ROOT / "bench" / "results" / "micro-x86_64-avx2-2-threads.csv")
    table.write(root / "bench" / "results" / "micro-x86_64-avx2-2-threads.csv", tuple(cpu[0]), cpu)
    report.main((), root)
    before = report.readme.sections(Figures(root / "bench" / "results"))
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    assert report.readme.sections(Figures(root / "bench" / "results")) == before
    assert not any("x86_64" in text for text in gpu.sections(Figures(root / "bench" / "results")).values())
    assert not is_gpu(device_name(torch.device("cpu")))


def test_a_result_goes_to_the_file_that_a_single_benchmark_writes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.main([write(tmp_path / "one.jsonl", Device(H100, 1).everything())], root)
    monkeypatch.setattr(provenance, "device_name", lambda device: H100)
    name = provenance.file_name(torch.device("cuda"))
    for file in (f"micro-{name}.csv", f"end-to-end-{name}.csv", f"gpu-{name}.json"):
        assert (root / "bench" / "results" / file).is_file()


def test_passed_cases_are_counted_not_kept(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    many = [device.record("tests", f"tests/test_x.py::test_{index}") for index in range(3000)]
    failed = [device.record("tests", f"tests/test_y.py::test_{index}", "failed", "AssertionError") for index in range(100)]
    report.main([write(tmp_path / "one.jsonl", [*many, *failed])], root)
    content = (root / "bench" / "results" / "gpu-nvidia-h200.json").read_text()
    assert len(content) < 2000
    assert json.loads(content)["stages"]["tests"]["counts"] == {"ok": 3000, "failed": 100}


def test_columns_that_only_a_gpu_has_are_kept(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    records = [device.contender("plain", 0.8), device.contender("engine", 0.2, kernels_per_step=12, settings={"tf32": True})]
    report.main([write(tmp_path / "one.jsonl", records)], root)
    rows = table.read(root / "bench" / "results" / "end-to-end-nvidia-h200.csv")
    assert [row["kernels_per_step"] for row in rows] == ["", "12"]
    assert json.loads(rows[1]["settings"]) == {"tf32": True}


def test_a_part_of_a_run_is_no_figure(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    part = Record("accuracy", "mnist-dfad seed 0", "left", "cut at epoch 2", table="accuracy", row={"epoch": 2}, origin=device.origin)
    report.main([write(tmp_path / "one.jsonl", [part])], root)
    assert shown(root, gpu.ACCURACY) == gpu.NOT_MEASURED
    assert "cut at epoch 2" in shown(root, gpu.STAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no records"),
        ("seconds,device\n1,2\n", "is not what python -m bench gpu writes"),
        ('{"stage": "micro", "status": "fine"}\n', "is not what python -m bench gpu writes"),
        ('{"stage": "micro", "status": "ok", "row": [1]}\n', r"micro: row is \[1\]"),
        (Record("micro", "", "failed", "killed").line() + "\n", "does not say on which device"),
        (Device(H200, 1, rehearsal=True).everything()[0].line() + "\n", "is a rehearsal's"),
        (Device("x86_64 AVX512, 2 threads", 1).everything()[0].line() + "\n", "is not a GPU"),
        (Device(H200, 1).kernel("cuda", 10, device=H100).line() + "\n", "a row of NVIDIA H100"),
        (Device(H200, 1).contender("plain", 1, recipe=None).line() + "\n", "has no recipe"),
        (Device(H200, 1).run(0, 98.0).line().replace("largest_drop", "drop") + "\n", r"has no retention\.largest_drop"),
    ],
)
def test_what_may_not_be_published_is_refused_in_a_line_and_changes_nothing(root: Path, tmp_path: Path, content: str, message: str) -> None:
    before = all_files(root)
    good, bad = write(tmp_path / "good.jsonl", Device(H200, 1).everything()), tmp_path / "bad.jsonl"
    bad.write_text(content)
    with pytest.raises(DfkdError, match=message) as caught:
        report.main([good, bad], root)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all_files(root) == before


NAN, INFINITE = float("nan"), float("inf")
BAD_ROWS: list[tuple[str, str, object]] = [
    *(("micro", "median_us", value) for value in (0.0, -1.0, "fast", [1, 2], True, NAN, INFINITE, {"a": 1})),
    *(("micro", name, None) for name in ("kernel", "provider", "size")),
    *(("micro", name, "much") for name in ("share_of_copy", "calls", "load")),
    *(("micro", name, 5) for name in ("commit", "command", "status", "torch")),
    *(("end-to-end", "seconds_per_iteration", value) for value in (0, -0.1, True, "0.5", NAN, INFINITE)),
    *(("end-to-end", "batch_size", value) for value in ("256", 0, 2.5)),
    *(("end-to-end", name, None) for name in ("recipe", "contender", "commit")),
    ("end-to-end", "peak_memory_mib", INFINITE),
    ("end-to-end", "remarks", "\ud800"),
    *(("accuracy", "seconds", value) for value in (5, {}, {"total": NAN}, {"total": -1})),
    *(("accuracy", "retention", value) for value in ([98.0], "98", {"last": "98", "best": 98, "largest_drop": 0}, None)),
    *(("accuracy", "seed", value) for value in ("0", 1.5, True, None)),
    *(("accuracy", name, NAN) for name in ("teacher_accuracy",)),
    *(("accuracy", name, 7) for name in ("recipe", "command", "metric", "versions")),
    *(("kernels", name, None) for name in ("name", "recipe", "contender")),
    *(("kernels", name, "many") for name in ("share", "us_per_iteration", "calls_per_iteration", "batch_size")),
    *(("ceilings", "gb_per_s", value) for value in ("quick", 0, -3.0, NAN, True)),
    *(("host", "python", value) for value in ([3], {"a": 1}, NAN)),
]
BAD_FIELDS: list[tuple[str, object]] = [
    *(("stage", value) for value in (None, 7, "", [1])),
    *(("case", value) for value in ([5], 5, {"a": 1})),
    *(("text", value) for value in (5, ["a"], "\udc00")),
    *(("seconds", value) for value in ("long", -1, NAN, True)),
    *(("table", value) for value in ([5], 5)),
    *(("row", value) for value in ([1], "a", 5)),
    *(("origin", value) for value in ([1], "a", 5, {"device": 5}, {"device": H200, "command": 5}, {"device": H200, "commit": None})),
    ("origin", {"device": "€"}),
    ("origin", {"device": H200, "commit": 5}),
]


def refused(root: Path, source: Path) -> str:
    """The message for a source, which must change nothing and not stop later reports."""
    report.main([write(root.parent / "good.jsonl", Device(H200, 1).everything())], root)
    before = all_files(root)
    with pytest.raises(DfkdError) as caught:
        report.main([root.parent / "good.jsonl", source], root)
    assert all_files(root) == before
    report.main((), root)
    assert all_files(root) == before
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    message.encode()
    return message


@pytest.mark.parametrize(("kind", "field", "value"), BAD_ROWS)
def test_a_row_with_a_bad_value_is_refused_by_name_and_changes_nothing(
    root: Path, tmp_path: Path, kind: str, field: str, value: object
) -> None:
    record = next(one for one in Device(H100, 1).everything() if one.table == kind)
    message = refused(root, write(tmp_path / "bad.jsonl", [replace(record, row=record.row | {field: value})]))
    assert f"{record.stage} / {record.case}: " in message
    assert field in message


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_record_with_a_bad_field_is_refused_by_name_and_changes_nothing(root: Path, tmp_path: Path, field: str, value: object) -> None:
    fields: dict[str, Any] = json.loads(Device(H100, 1).everything()[0].line())
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(fields | {field: value}) + "\n")
    refused(root, bad)


@pytest.mark.parametrize("depth", [20, 600, 100_000])
def test_deeply_nested_records_are_refused(root: Path, tmp_path: Path, depth: int) -> None:
    bad, line = tmp_path / "bad.jsonl", Device(H100, 1).record("micro", "case", row={"deep": "HERE"}).line()
    bad.write_text(line.replace('"HERE"', "[" * depth + "]" * depth) + "\n")
    refused(root, bad)


@pytest.mark.parametrize("content", ["[]", "5", '{"recipe": 5}', "[" * 100_000, '{"recipe": "a", "seed": 0, "device_name": "b"}', "\x00"])
def test_a_bad_run_is_refused_and_changes_nothing(root: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(content)
    (tmp_path / "run" / "recipe.toml").write_text('[data]\nname = "mnist"\nroot = "/data"\n')
    refused(root, tmp_path / "run")


def test_a_run_without_what_the_readme_says_of_a_cpu_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(Device("x86_64 AVX512, 2 threads", 1).run(0, 98.0).row))
    (tmp_path / "run" / "recipe.toml").write_text('[data]\nname = "digits"\nroot = ""\n')
    assert "has no retention.mean" in refused(root, tmp_path / "run")


def test_an_error_while_the_tables_are_made_changes_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: object) -> str:
        raise ZeroDivisionError("float division by zero")

    before = all_files(root)
    monkeypatch.setattr(gpu, "stages", broken)
    with pytest.raises(DfkdError, match="ZeroDivisionError: float division by zero"):
        report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    assert all_files(root) == before


def test_devices_whose_files_would_have_the_same_name_are_not_mixed(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    before = all_files(root)
    with pytest.raises(DfkdError, match="too much like NVIDIA-H200"):
        report.main([write(tmp_path / "two.jsonl", Device("NVIDIA-H200", 1).everything())], root)
    assert all_files(root) == before


def test_a_wrong_result_s_error_need_not_be_finite(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", [Device(H200, 1).kernel("cuda", 0, status="wrong: NaN", error=NAN)])], root)
    assert "cuda wrong" in shown(root, gpu.KERNELS)


@pytest.mark.parametrize("name", ["two\nlines", "a|b", "a `b` c", "<!-- end of the table -->", "\u2028"])
def test_any_name_stays_in_its_cell(root: Path, tmp_path: Path, name: str) -> None:
    device = Device(H200, 1, commit=f"abc{name}")
    device.origin["command"] = f"python -m bench gpu {name}"
    records = [device.kernel("cuda", 10, kernel=name), device.kernel("cuda", 10, size=name), device.contender(name, 0.3, recipe=name)]
    records += [device.contender("engine", 0.3, recipe=name), device.record("smoke", name, "failed", name), device.run(0, 98.0)]
    row = device.profiled("engine", 0).row | {"name": name, "recipe": name}
    records.append(device.record("end-to-end", name, table="kernels", row=row))
    report.main([write(tmp_path / "one.jsonl", records)], root)
    before = all_files(root)
    report.main((), root)
    assert all_files(root) == before
    for begin in [*gpu.sections(Figures(root)), *gpu.readme_sections(Figures(root))]:
        text = shown(root, begin)
        for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
        headings, rows, items, captions = (re.compile(start) for start in (r"###? ", r"\|", r"- ", r"On a GPU|Not measured"))
        for line in filter(None, text.split("\n")):
            assert any(one.match(line) for one in (headings, rows, items, captions)), line
            assert line.count("`") % 2 == 0 or name.count("`")


def test_a_campaign_whose_stages_were_all_killed_is_stored_and_costs_no_figure(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    later = Device(H200, 1, commit="def5678")
    names = ("environment", "smoke", "tests", "micro", "end-to-end", "accuracy")
    killed = [later.record(name, "", "failed", "killed by SIGSEGV") for name in names]
    (line,) = report.main([write(tmp_path / "two.jsonl", killed)], root)
    assert line == f"{H200}: 0 kernel rows, 0 end-to-end rows, stages {', '.join(f'{name} failed' for name in names)}, at def5678"
    assert set(column(shown(root, gpu.STAGES), H200).values()) == {"failed: `killed by SIGSEGV`"}
    old = " (`abc1234`)"
    assert column(shown(root, gpu.ENVIRONMENT), H200)["GPU memory (GiB)",] == f"80{old}"
    assert column(shown(root, gpu.ENVIRONMENT), H200)["a large copy (GB/s)",] == f"4000{old}"
    case = ("plain", "resnet50", "float32", "contiguous", "update")
    assert column(shown(root, gpu.KERNELS), H200)[case] == f"cuda 10 µs, 91 %, 2.00 × foreach_lerp, triton wrong{old}"
    for begin in (gpu.END_TO_END, gpu.README_END_TO_END, gpu.README_KERNELS):
        assert all(cell.endswith(old) for cell in column(shown(root, begin), H200).values())
    (cell,) = column(shown(root, gpu.ACCURACY), H200).values()
    assert f"(seed 0: 98.00{old}, seed 1: 97.00{old})" in cell
    assert f"| `cifar10-dfad`{old} | 256 | `engine_0<float>` | 7 | 99 | 5 % |" in shown(root, gpu.PROFILE)
    for begin in (gpu.ENVIRONMENT, gpu.KERNELS, gpu.END_TO_END, gpu.ACCURACY, gpu.PROFILE):
        assert "commit `abc1234`" in shown(root, begin)
        assert "def5678" not in shown(root, begin)
    report.main([write(tmp_path / "three.jsonl", Device(H200, 1, commit="def5678").everything())], root)
    assert "abc1234" not in "".join(
        text for sections in report.documents(Figures(root / "bench" / "results")).values() for text in sections.values()
    )


def test_a_figure_stays_with_its_commit_until_a_newer_one_replaces_it(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", [*Device(H200, 1).everything(), Device(H200, 1).kernel("triton", 8)])], root)
    later = Device(H200, 1, commit="def5678")
    records = [
        later.kernel("cuda", 9),
        later.kernel("triton", 0, status="failed: out of memory"),
        later.contender("plain", 0.7),
        later.record("end-to-end", "cifar10-dfad engine", "failed", "OutOfMemoryError"),
        later.run(1, 96.0),
        later.record("accuracy", "mnist-dfad seed 0", "failed", "RuntimeError"),
        later.record("environment", "versions", table="host", row={"python": "3.13.0"}),
    ]
    report.main([write(tmp_path / "two.jsonl", records)], root)
    case = ("plain", "resnet50", "float32", "contiguous", "update")
    kernel = "cuda 9 µs, 91 %; triton 8 µs, 91 %, 2.50 × foreach_lerp (`abc1234`)"
    assert column(shown(root, gpu.KERNELS), H200)[case] == kernel
    rows = column(shown(root, gpu.END_TO_END), H200)
    assert rows["`cifar10-dfad`", "256", "bf16", "plain", "bf16, TF32 in convolutions"] == "0.7 s/iteration, 1234 MiB"
    assert rows["`cifar10-dfad`", "256", "bf16", "engine", "bf16, TF32 in convolutions"] == "0.2 s/iteration, 1234 MiB (`abc1234`)"
    assert "(seed 0: 98.00 (`abc1234`), seed 1: 96.00)" in shown(root, gpu.ACCURACY)
    environment = column(shown(root, gpu.ENVIRONMENT), H200)
    assert environment["Python",] == "3.13.0"
    assert environment["a large copy (GB/s)",] == "4000 (`abc1234`)"
    assert "| `cifar10-dfad` (`abc1234`) | 256 |" in shown(root, gpu.PROFILE)
    assert column(shown(root, gpu.STAGES), H200)["tests",].endswith("(`abc1234`)")
    assert "`failed: out of memory`" in shown(root, gpu.STAGES)


def test_a_failure_at_the_same_commit_replaces_the_time(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    report.main([write(tmp_path / "one.jsonl", [device.kernel("cuda", 10)])], root)
    report.main([write(tmp_path / "two.jsonl", [device.kernel("cuda", 0, status="wrong: averages differ")])], root)
    assert set(column(shown(root, gpu.KERNELS), H200).values()) == {"cuda wrong"}


def test_stages_stand_in_their_order_whichever_was_taken_in_first(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    for name in ("micro", "environment", "smoke"):
        report.main([write(tmp_path / f"{name}.jsonl", [device.record(name, "case")])], root)
    assert list(column(shown(root, gpu.STAGES), H200)) == [("environment",), ("smoke",), ("micro",)]


def test_kernels_of_a_profile_are_no_cases(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    assert column(shown(root, gpu.STAGES), H200)["end-to-end",].startswith("2 passed, left: ")


@pytest.mark.parametrize("name", ["README.md", "docs/gpu.md"])
def test_a_document_without_a_place_for_a_table_is_found_before_anything_is_written(root: Path, tmp_path: Path, name: str) -> None:
    (root / name).write_text("nothing\n")
    before = all_files(root)
    with pytest.raises(DfkdError, match="has no line"):
        report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    assert all_files(root) == before


def test_on_the_command_line_a_refused_source_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_of_neither_kind_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DfkdError, match="is neither a run's folder"):
        report.main([tmp_path / name], root)


def test_a_run_s_folder_is_taken_in_at_the_commit_checked_out(root: Path, tmp_path: Path) -> None:
    summary = Device(H200, 1).run(3, 98.0).row | {"recipe": "mnist-dfad"}
    del summary["command"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "run" / "recipe.toml").write_text('[data]\nname = "mnist"\nroot = "/data"\n')
    report.main([tmp_path / "run"], root)
    (entry,) = Figures(root / "bench" / "results").runs
    assert entry["command"] == "dfkd-fast distill mnist-dfad --seed 3 --data-root DIR"
    assert entry["commit"] == provenance.commit()
    assert list(column(shown(root, gpu.ACCURACY), H200)) == [
        ("mnist-dfad", "`dfkd-fast distill mnist-dfad --seed N --data-root DIR`", "top-1 accuracy")
    ]
