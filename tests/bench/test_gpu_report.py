"""From the records of two GPUs to documents."""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
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
        ('{"stage": "micro", "status": "ok", "row": [1]}\n', "is not what python -m bench gpu writes"),
        (Record("micro", "", "failed", "killed").line() + "\n", "does not say on which device"),
        (Device(H200, 1, rehearsal=True).everything()[0].line() + "\n", "is a rehearsal's"),
        (Device("x86_64 AVX512, 2 threads", 1).everything()[0].line() + "\n", "is not a GPU"),
        (Device(H200, 1).kernel("cuda", 10, device=H100).line() + "\n", "a row of NVIDIA H100"),
        (Device(H200, 1).contender("plain", 1, recipe=None).line() + "\n", "has no recipe"),
        (Device(H200, 1).run(0, 98.0).line().replace("largest_drop", "drop") + "\n", "has no largest_drop"),
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
