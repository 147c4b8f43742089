"""Rows and their files: columns, and the provenance in them."""

from pathlib import Path

import pytest

from bench import end_to_end, evaluation, host, methods, provenance, table, with_data
from bench.host import Row
from bench.micro import rows

RESULTS = provenance.ROOT / "bench" / "results"


@pytest.mark.parametrize(
    ("file", "row", "of_gpus_only"),
    [
        ("micro-nvidia-h200.csv", rows.Row, 0),
        ("end-to-end-nvidia-h200.csv", end_to_end.Row, 2),
        ("methods-x86_64-avx512-2-threads.csv", methods.Row, 0),
        ("host-x86_64-avx512-2-threads.csv", host.Row, 0),
        ("evaluation-x86_64-avx512-2-threads.csv", evaluation.Row, 0),
        ("with-data-x86_64-avx512-1-threads.csv", with_data.Row, 0),
    ],
)
def test_the_columns_of_a_table_are_those_of_its_published_file(file: str, row: type, of_gpus_only: int) -> None:
    columns = tuple(table.read(RESULTS / file)[0])
    assert table.names(row) == columns[: len(columns) - of_gpus_only]


def test_a_provenance_is_written_as_columns_of_its_row(tmp_path: Path) -> None:
    here = provenance.measured_on("a CPU", "python -m bench host", "abc")
    row = Row("resnet18", 122, "update", 1.5, 1.0, 2.0, provenance=here)
    assert tuple(table.cells(row)) == table.names(Row)
    table.write_anew(tmp_path / "rows.csv", [row])
    (read,) = table.read(tmp_path / "rows.csv")
    assert (read["network"], read["device"], read["commit"], read["command"]) == ("resnet18", "a CPU", "abc", "python -m bench host")
    assert read["threads"] == str(here.threads)
    assert "dali" not in read


def test_rows_replace_those_with_the_same_key_and_follow_the_others(tmp_path: Path) -> None:
    path, columns = tmp_path / "rows.csv", ("size", "value")
    table.replace(path, columns, [{"size": 1, "value": "a"}, {"size": 1, "value": "b"}, {"size": 2, "value": "c"}], ["size"])
    table.replace(path, columns, [{"size": 1, "value": "d"}], ["size"])
    assert table.read(path) == [{"size": "2", "value": "c"}, {"size": "1", "value": "d"}]
