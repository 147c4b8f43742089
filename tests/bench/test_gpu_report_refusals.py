"""Invalid results are refused with one line, and no file changes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.__main__ import main
from bench.gpu.records import Record
from bench.report import gpu
from dfkd_fast import DfkdError
from tests.bench.invented_gpus import H100, H200, Device, all_files, shown, write
from tests.bench.invented_gpus import root as root


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
def test_invalid_results_are_refused_with_one_line_and_change_nothing(root: Path, tmp_path: Path, content: str, message: str) -> None:
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
    ("end-to-end", "notes", "\ud800"),
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
    """Return the error for a source, which must not change files nor prevent later reports."""
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


def test_a_run_on_a_cpu_without_the_columns_of_its_table_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(Device("x86_64 AVX512, 2 threads", 1).run(0, 98.0).row))
    (tmp_path / "run" / "recipe.toml").write_text('[data]\nname = "digits"\nroot = ""\n')
    assert "has no retention.mean" in refused(root, tmp_path / "run")


def test_an_error_while_the_tables_are_generated_changes_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_error_of_a_wrong_result_may_be_infinite_or_nan(root: Path, tmp_path: Path) -> None:
    report.main([write(tmp_path / "one.jsonl", [Device(H200, 1).kernel("cuda", 0, status="wrong: NaN", error=NAN)])], root)
    assert "cuda wrong" in shown(root, gpu.KERNELS)


@pytest.mark.parametrize("name", ["README.md", "docs/results.md", "docs/gpu.md"])
def test_a_document_without_the_markers_of_a_table_is_refused_before_anything_is_written(root: Path, tmp_path: Path, name: str) -> None:
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
