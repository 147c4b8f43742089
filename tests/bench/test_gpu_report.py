"""From the records of two GPUs to documents."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench import provenance, report, table
from bench.gpu.records import Record
from bench.provenance import ROOT
from bench.report import gpu
from bench.report.results import Results, is_gpu
from dfkd_fast.engine.device import device_name
from tests.bench.invented_gpus import H100, H200, Device, all_files, column, shown, write
from tests.bench.invented_gpus import root as root


def test_without_a_gpu_every_table_is_one_line(root: Path) -> None:
    results = Results(root / "bench" / "results")
    assert set(gpu.sections(results).values()) == {gpu.NOT_MEASURED}
    assert set(gpu.extracts(results).values()) == {gpu.EXTRACT_NOT_MEASURED}
    assert (root / "docs" / "gpu.md").read_text().count(gpu.NOT_MEASURED) == len(gpu.sections(results))


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
    assert column(shown(root, gpu.KERNELS), H200)[case] == "cuda 10 µs, 91 %, 2.00 × foreach_lerp†, triton wrong"
    assert column(shown(root, gpu.KERNELS), H100)[case] == "cuda 20 µs, 91 %, 2.00 × foreach_lerp†, triton wrong"
    captured = ("`cifar10-dfad`", "256", "bf16", "engine", "bf16, TF32 in convolutions")
    assert column(shown(root, gpu.END_TO_END), H200)[captured] == "0.2 s/iteration, 4.00 × plain, 1234 MiB"
    assert column(shown(root, gpu.END_TO_END), H100)[captured] == "0.4 s/iteration, 4.00 × plain, 1234 MiB"
    run = ("mnist-dfad (3 of 60 epochs)", "`dfkd-fast distill mnist-dfad --seed N --set loop.epochs=3`", "top-1 accuracy")
    text = "last 97.50 (seed 0: 98.00, seed 1: 97.00), best 98.00, teacher 99.00, largest drop 0.25, {} s"
    assert column(shown(root, gpu.ACCURACY), H200)[run] == text.format(40)
    assert column(shown(root, gpu.ACCURACY), H100)[run] == text.format(80)
    assert column(shown(root, gpu.KERNEL_EXTRACT), H100)["ema", "resnet50", "float32"].startswith("cuda 20 µs")
    assert column(shown(root, gpu.END_TO_END_EXTRACT), H200)["`cifar10-dfad`", "256", "bf16"].startswith("0.2 s/iteration")


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


def test_new_results_of_a_device_replace_only_its_own(root: Path, tmp_path: Path) -> None:
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


def test_a_later_call_adds_to_the_results_of_an_earlier_one(root: Path, tmp_path: Path) -> None:
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


def test_each_table_names_commit_versions_and_command_without_local_folders(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    line = f"- {H200}: commit `abc1234`, torch 2.11.0, triton 3.6.0, `python -m bench gpu --minutes 9 --out DIR`"
    for begin in (gpu.ENVIRONMENT, gpu.KERNELS, gpu.END_TO_END, gpu.PROFILE, gpu.STAGES):
        assert line in shown(root, begin)
    assert not any(b"/scratch" in content for content in all_files(root).values())


def test_results_of_a_gpu_are_not_in_the_tables_of_a_cpu(root: Path, tmp_path: Path) -> None:
    cpu = table.read(ROOT / "bench" / "results" / "micro-x86_64-avx2-2-threads.csv")
    table.write(root / "bench" / "results" / "micro-x86_64-avx2-2-threads.csv", tuple(cpu[0]), cpu)
    report.main((), root)
    before = report.cpu.sections(Results(root / "bench" / "results"))
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    assert report.cpu.sections(Results(root / "bench" / "results")) == before
    assert not any("x86_64" in text for text in gpu.sections(Results(root / "bench" / "results")).values())
    assert not is_gpu(device_name(torch.device("cpu")))


def test_results_are_stored_in_the_files_of_the_single_benchmarks(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.main([write(tmp_path / "one.jsonl", Device(H100, 1).everything())], root)
    monkeypatch.setattr(provenance, "device_name", lambda device: H100)
    name = provenance.file_name(torch.device("cuda"))
    for file in (f"micro-{name}.csv", f"end-to-end-{name}.csv", f"gpu-{name}.json"):
        assert (root / "bench" / "results" / file).is_file()


def test_passed_cases_are_counted_and_not_stored(root: Path, tmp_path: Path) -> None:
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


def test_the_time_of_the_kernels_is_shown_beside_the_iteration_s(root: Path, tmp_path: Path) -> None:
    record = Device(H200, 1).contender("plain", 0.034, kernels_per_iteration=853.0, kernel_seconds=0.0252)
    report.main([write(tmp_path / "one.jsonl", [record])], root)
    assert set(column(shown(root, gpu.END_TO_END), H200).values()) == {"0.034 s/iteration, 1234 MiB, 853 kernels of 0.0252 s"}


def test_an_incomplete_run_is_not_a_result(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    part = Record("accuracy", "mnist-dfad seed 0", "left", "cut at epoch 2", table="accuracy", row={"epoch": 2}, origin=device.origin)
    report.main([write(tmp_path / "one.jsonl", [part])], root)
    assert shown(root, gpu.ACCURACY) == gpu.NOT_MEASURED
    assert "cut at epoch 2" in shown(root, gpu.STAGES)


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
    for begin in [*gpu.sections(Results(root)), *gpu.extracts(Results(root))]:
        text = shown(root, begin)
        for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
        headings, rows, items, captions = (re.compile(start) for start in (r"###? ", r"\|", r"- ", r"On a GPU|Not measured"))
        for line in filter(None, text.split("\n")):
            assert any(one.match(line) for one in (headings, rows, items, captions)), line
            assert line.count("`") % 2 == 0 or name.count("`")


def test_a_campaign_whose_stages_were_all_killed_is_stored_and_removes_no_result(root: Path, tmp_path: Path) -> None:
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
    assert column(shown(root, gpu.KERNELS), H200)[case] == f"cuda 10 µs, 91 %, 2.00 × foreach_lerp†, triton wrong{old}"
    for begin in (gpu.END_TO_END, gpu.END_TO_END_EXTRACT, gpu.KERNEL_EXTRACT):
        assert all(cell.endswith(old) for cell in column(shown(root, begin), H200).values())
    (cell,) = column(shown(root, gpu.ACCURACY), H200).values()
    assert f"(seed 0: 98.00{old}, seed 1: 97.00{old})" in cell
    assert f"| `cifar10-dfad`{old} | 256 | `engine_0<float>` | 7 | 99 | 5 % |" in shown(root, gpu.PROFILE)
    for begin in (gpu.ENVIRONMENT, gpu.KERNELS, gpu.END_TO_END, gpu.ACCURACY, gpu.PROFILE):
        assert "commit `abc1234`" in shown(root, begin)
        assert "def5678" not in shown(root, begin)
    report.main([write(tmp_path / "three.jsonl", Device(H200, 1, commit="def5678").everything())], root)
    assert "abc1234" not in "".join(
        text for sections in report.documents(Results(root / "bench" / "results")).values() for text in sections.values()
    )


def test_a_result_stays_with_its_commit_until_a_newer_one_replaces_it(root: Path, tmp_path: Path) -> None:
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
    kernel = "cuda 9 µs, 91 %; triton 8 µs, 91 %, 2.50 × foreach_lerp† (`abc1234`)"
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


def test_a_comparison_without_torch_compile_is_marked(root: Path, tmp_path: Path) -> None:
    device, case = Device(H200, 1), ("plain", "resnet50", "float32", "contiguous", "update")
    report.main([write(tmp_path / "one.jsonl", [device.kernel("cuda", 10), device.kernel("eager", 20)])], root)
    assert column(shown(root, gpu.KERNELS), H200)[case] == "cuda 10 µs, 91 %, 2.00 × eager†"
    report.main([write(tmp_path / "two.jsonl", [device.kernel("compile", 30)])], root)
    assert column(shown(root, gpu.KERNELS), H200)[case] == "cuda 10 µs, 91 %, 2.00 × eager"
    report.main([write(tmp_path / "three.jsonl", [device.kernel("compile", 15)])], root)
    assert column(shown(root, gpu.KERNELS), H200)[case] == "cuda 10 µs, 91 %, 1.50 × torch.compile"


def test_a_failure_at_the_same_commit_replaces_the_time(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    report.main([write(tmp_path / "one.jsonl", [device.kernel("cuda", 10)])], root)
    report.main([write(tmp_path / "two.jsonl", [device.kernel("cuda", 0, status="wrong: averages differ")])], root)
    assert set(column(shown(root, gpu.KERNELS), H200).values()) == {"cuda wrong"}


def test_stages_are_shown_in_order_whichever_was_added_first(root: Path, tmp_path: Path) -> None:
    device = Device(H200, 1)
    for name in ("micro", "environment", "smoke"):
        report.main([write(tmp_path / f"{name}.jsonl", [device.record(name, "case")])], root)
    assert list(column(shown(root, gpu.STAGES), H200)) == [("environment",), ("smoke",), ("micro",)]


def test_kernels_of_a_profile_are_not_counted_as_cases(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", Device(H200, 1).everything())], root)
    assert column(shown(root, gpu.STAGES), H200)["end-to-end",].startswith("2 passed, left: ")


def test_a_run_folder_is_added_with_the_current_commit(root: Path, tmp_path: Path) -> None:
    summary = Device(H200, 1).run(3, 98.0).row | {"recipe": "mnist-dfad"}
    del summary["command"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "run" / "recipe.toml").write_text('[data]\nname = "mnist"\nroot = "/data"\n')
    report.main([tmp_path / "run"], root)
    (entry,) = Results(root / "bench" / "results").runs
    assert entry["command"] == "dfkd-fast distill mnist-dfad --seed 3 --data-root DIR"
    assert entry["commit"] == provenance.commit()
    assert list(column(shown(root, gpu.ACCURACY), H200)) == [
        ("mnist-dfad", "`dfkd-fast distill mnist-dfad --seed N --data-root DIR`", "top-1 accuracy")
    ]
