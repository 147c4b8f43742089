import pytest

from bench import report
from bench.micro import KERNELS


@pytest.mark.parametrize("begin", report.tables())
def test_the_table_in_the_readme_is_the_one_the_files_give(begin: str) -> None:
    assert report.README.read_text().count(begin) == 1
    shown = report.README.read_text().partition(begin)[2].partition(report.END)[0]
    assert shown.strip() == report.tables()[begin]


def test_the_tables_have_what_the_readme_speaks_of() -> None:
    assert {entry["recipe"] for entry in report.results()} >= {
        "digits",
        "digits-dfad",
        "digits-mad",
        "digits-bank",
        "digits-vae",
        "digits-retain",
        "mnist-cpu",
    }
    assert {row["kernel"] for row in report.kernel_results()} == set(KERNELS)


def test_no_figure_comes_from_uncommitted_code_or_a_red_check() -> None:
    rows = [*report.kernel_results(), *report.methods_results(), *report.end_to_end_results(), *report.evaluation_results()]
    assert not any("dirty" in row["commit"] for row in rows)
    assert not any(row["status"].startswith("wrong") for row in report.kernel_results())


def test_every_result_says_how_it_was_got() -> None:
    for entry in report.results():
        assert entry["command"].startswith("dfkd-fast distill")
        assert "dirty" not in entry["commit"]
        assert entry["versions"]["torch"]
