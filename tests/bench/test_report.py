from pathlib import Path

import pytest

from bench import report
from bench.micro import KERNELS
from bench.provenance import ROOT
from bench.report import readme
from bench.report.figures import Figures, is_gpu
from bench.report.markdown import END, fill
from dfkd_fast import DfkdError

FIGURES = Figures(ROOT / "bench" / "results")
PLACES = [(name, begin) for name, sections in report.documents(FIGURES).items() for begin in sections]


@pytest.mark.parametrize(("name", "begin"), PLACES)
def test_the_table_in_the_document_is_the_one_the_files_give(name: str, begin: str) -> None:
    document = (ROOT / name).read_text()
    assert document.count(begin) == 1
    shown = document.partition(begin)[2].partition(END)[0]
    assert shown.strip() == report.documents(FIGURES)[name][begin]


def test_the_tables_have_what_the_readme_speaks_of() -> None:
    assert {entry["recipe"] for entry in FIGURES.runs} >= {
        "digits",
        "digits-dfad",
        "digits-mad",
        "digits-bank",
        "digits-vae",
        "digits-retain",
        "mnist-cpu",
    }
    assert {row["kernel"] for row in FIGURES.rows("micro", "cpu")} == set(KERNELS)


def test_no_figure_of_a_cpu_comes_from_uncommitted_code_or_a_red_check() -> None:
    rows = [row for kind in ("micro", "methods", "end-to-end", "evaluation") for row in FIGURES.rows(kind, "cpu")]
    assert not any("dirty" in row["commit"] for row in rows)
    assert not any(row["status"].startswith("wrong") for row in FIGURES.rows("micro", "cpu"))


def test_every_result_says_how_it_was_got() -> None:
    for entry in FIGURES.runs:
        assert entry["command"].startswith("dfkd-fast distill")
        assert is_gpu(entry["device_name"]) or "dirty" not in entry["commit"]
        assert entry["versions"]["torch"]


def test_the_report_writes_every_table_of_every_document_and_nothing_else(tmp_path: Path) -> None:
    documents = report.documents(Figures(tmp_path / "bench" / "results"))
    for name, sections in documents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(f"before\n{begin}\nold\n{END}\nafter\n" for begin in sections))
    assert report.main((), tmp_path) == []
    for name, sections in documents.items():
        assert (tmp_path / name).read_text() == "".join(f"before\n{begin}\n{text}\n{END}\nafter\n" for begin, text in sections.items())


def test_a_document_without_a_place_for_a_table_is_an_error(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"{readme.RUNS}\n")
    for begin in (readme.RUNS, readme.KERNELS):
        with pytest.raises(DfkdError, match="has no line"):
            fill(document, {begin: "a table"})


def test_only_the_text_between_the_markers_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"before\n{readme.RUNS}\nold\n{END}\nbetween\n{readme.KERNELS}\nold\n{END}\nafter\n")
    text = fill(document, {readme.KERNELS: "new"})
    assert text == f"before\n{readme.RUNS}\nold\n{END}\nbetween\n{readme.KERNELS}\nnew\n{END}\nafter\n"
