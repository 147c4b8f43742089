from pathlib import Path

import pytest

from bench import report
from bench.micro import KERNELS
from bench.provenance import ROOT
from bench.report import cpu
from bench.report.markdown import END, fill
from bench.report.results import Results, is_gpu
from dfkd_fast import DfkdError

RESULTS = Results(ROOT / "bench" / "results")
SECTIONS = [(name, begin) for name, sections in report.documents(RESULTS).items() for begin in sections]


@pytest.mark.parametrize(("name", "begin"), SECTIONS)
def test_the_table_in_the_document_is_the_one_the_files_give(name: str, begin: str) -> None:
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


def test_no_figure_of_a_cpu_comes_from_uncommitted_code_or_a_red_check() -> None:
    rows = [row for kind in ("micro", "methods", "end-to-end", "evaluation") for row in RESULTS.rows(kind, "cpu")]
    assert not any("dirty" in row["commit"] for row in rows)
    assert not any(row["status"].startswith("wrong") for row in RESULTS.rows("micro", "cpu"))


def test_every_result_says_how_it_was_got() -> None:
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
