import json
from pathlib import Path
from statistics import fmean

import pytest

from bench import report
from bench.micro import KERNELS
from bench.provenance import ROOT
from bench.report import compressed, cpu, methods, readme
from bench.report.markdown import END, fill
from bench.report.replays import FOLDER, replay_table
from bench.report.results import Results, is_gpu
from dfkd_fast import DfkdError

RESULTS = Results(ROOT / "bench" / "results")
SECTIONS = [(name, begin) for name, sections in report.documents(RESULTS).items() for begin in sections]


@pytest.mark.parametrize(("name", "begin"), SECTIONS)
def test_the_table_in_the_document_equals_the_one_generated_from_the_files(name: str, begin: str) -> None:
    document = (ROOT / name).read_text()
    assert document.count(begin) == 1
    shown = document.partition(begin)[2].partition(END)[0]
    assert shown.strip() == report.documents(RESULTS)[name][begin]


def test_the_tables_hold_the_recipes_and_kernels_that_the_documents_discuss() -> None:
    assert {entry["recipe"] for entry in RESULTS.runs} >= {
        "digits",
        "digits-dfad",
        "digits-mad",
        "digits-bank",
        "digits-vae",
        "digits-retain",
        "mnist-cpu",
    }
    assert {row["kernel"] for row in RESULTS.rows("micro", "cpu")} == set(KERNELS)


def test_no_value_of_a_cpu_comes_from_uncommitted_code_or_a_failed_check() -> None:
    rows = [row for kind in ("micro", "methods", "end-to-end", "evaluation", "with-data") for row in RESULTS.rows(kind, "cpu")]
    assert not any("dirty" in row["commit"] for row in rows)
    assert not any(row["status"].startswith("wrong") for row in RESULTS.rows("micro", "cpu"))


def test_every_run_names_its_command_commit_and_versions() -> None:
    for entry in RESULTS.runs:
        assert entry["command"].startswith("dfkd-fast distill")
        assert is_gpu(entry["device_name"]) or "dirty" not in entry["commit"]
        assert entry["versions"]["torch"]


def test_the_report_writes_every_table_of_every_document_and_nothing_else(tmp_path: Path) -> None:
    documents = report.documents(Results(tmp_path / "bench" / "results"))
    for name, sections in documents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(f"before\n{begin}\nold\n{END}\nafter\n" for begin in sections))
    assert report.main((), tmp_path) == []
    for name, sections in documents.items():
        assert (tmp_path / name).read_text() == "".join(f"before\n{begin}\n{text}\n{END}\nafter\n" for begin, text in sections.items())


def test_a_document_without_the_marker_of_a_table_is_an_error(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"{cpu.RUNS}\n")
    for begin in (cpu.RUNS, cpu.KERNELS):
        with pytest.raises(DfkdError, match="has no line"):
            fill(document, {begin: "a table"})


def test_only_the_text_between_the_markers_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"before\n{cpu.RUNS}\nold\n{END}\nbetween\n{cpu.KERNELS}\nold\n{END}\nafter\n")
    text = fill(document, {cpu.KERNELS: "new"})
    assert text == f"before\n{cpu.RUNS}\nold\n{END}\nbetween\n{cpu.KERNELS}\nnew\n{END}\nafter\n"


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def digits_accuracies() -> list[float]:
    """The teacher's mean accuracy, and the student's of the last epoch for each seed."""
    runs = [run for run in RESULTS.runs if run["recipe"] == "digits"]
    return [fmean(run["teacher_accuracy"] for run in runs), *(run["retention"]["last"] for run in runs)]


def test_the_readme_has_one_row_for_each_recipe_and_the_newest_gpu_run_replaces_the_last() -> None:
    gpu_run = max((run for run in RESULTS.runs if is_gpu(run["device_name"])), key=RESULTS.runs.index)
    recipes = [*readme.ON_CPU[:-1], gpu_run["recipe"]]
    rows = cells(readme.result_table(RESULTS))
    assert [row[0] for row in rows] == [f"[`{name}`](dfkd_fast/recipes/{name}.toml)" for name in recipes]
    teacher, *last = digits_accuracies()
    assert rows[0][2] == f"{teacher:.2f} → **{fmean(last):.2f}** ({', '.join(f'{value:.2f}' for value in last)})"
    assert rows[-1][4] == gpu_run["device_name"]


def test_without_a_gpu_the_readme_has_the_last_recipe_of_a_cpu(tmp_path: Path) -> None:
    lines = (RESULTS.folder / "distill.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "distill.jsonl").write_text("".join(line for line in lines if "threads" in line))
    assert "recipes/shapes.toml" in cells(readme.result_table(Results(tmp_path)))[-1][0]


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("mnist-dfad (3 of 60 epochs)", "dfad"),
        ("shapes", "dfad"),
        ("camvid-cpu", "mad"),
        ("digits-vae", "pre-dfkd"),
        ("cifar10-bank", "pre-dfkd"),
        ("digits-retain-first-order", "retain"),
        ("cifar10-retain-bank", "retain"),
        ("someone's own", None),
    ],
)
def test_a_run_is_listed_with_the_method_of_its_recipe(recipe: str, method: str | None) -> None:
    assert methods.method_of(recipe) == method


def test_every_run_of_a_shipped_recipe_is_on_the_page_of_its_method() -> None:
    pages = methods.sections(RESULTS).values()
    listed = {row[0] for sections in pages for text in sections.values() for row in cells(text)}
    assert listed == {f"`{run['recipe']}`" for run in RESULTS.runs}


def test_the_time_of_a_run_includes_a_teacher_that_was_trained_before_it() -> None:
    phases = {"teacher": 50.0, "student": 30.0, "generator": 10.0, "evaluation": 1.0}
    assert cpu.duration({"seconds": {"total": 95.0, **phases}}) == 95
    assert cpu.duration({"seconds": {"total": 45.0, **phases}}) == 91
    assert cpu.duration({"seconds": {"total": 45.0}}) == 45


def test_the_table_of_compressed_networks_states_the_results_of_each_run() -> None:
    folder = compressed.FOLDER / "efficientnet_lite0-w4a8-0"
    summary = json.loads((folder / "summary.json").read_text())
    rows = cells(compressed.compressed_table())
    assert len(rows) == len(list(compressed.FOLDER.glob("*/summary.json")))
    (row,) = [row for row in rows if row[:4] == ["`efficientnet_lite0`", "top-1 accuracy on imagenet", "w4a8", "0"]]
    values = summary["teacher_accuracy"], summary["quantized"]["calibrated_accuracy"]
    assert row[4:7] == [*(f"{value:.1f}" for value in values), f"**{summary['student_accuracy']['last']:.1f}**"]
    epochs = (folder / "metrics.jsonl").read_text().splitlines()
    assert row[10] == f"{len(epochs) * 25:,}"  # 5 iterations of 5 steps each
    assert row[12] == "18.78 → 3.42"
    bits = [row[2] for row in rows if row[0] == "`efficientnet_lite0`"]
    assert bits == sorted(bits, key=["w8a8", "w4", "w4a8", "w4a4", "w3"].index)


def test_a_replays_row_states_the_samples_and_metrics_of_its_run() -> None:
    rows = replay_table().splitlines()
    folder = FOLDER / "mad-325"
    retained = json.loads((folder / "summary.json").read_text())["retention"]
    (row,) = [row for row in rows if "`cifar10-cpu-mad`" in row]
    # 25 epochs of 13 iterations of 20 steps on 32 fresh and 32 replayed samples
    assert row.startswith(f"| `cifar10-cpu-mad` | 325 | {25 * 13 * 20 * 64:,} | {retained['last']:.2f} | {retained['best']:.2f} |")
    assert rows[2].startswith("| `cifar10-cpu` | 200 | 128,000 |")
    assert len(rows) == 2 + len(list(FOLDER.glob("*/summary.json")))
