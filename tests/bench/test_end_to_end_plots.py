"""The charts of ``python -m bench end-to-end`` and of ``python -m bench plot --headline``."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from bench import table
from bench.__main__ import main
from bench.end_to_end import plots, rows
from bench.provenance import measured_on
from dfkd_fast import load_recipe

RECIPE = load_recipe("digits", {"loop.batch_size": 4})


SECONDS = {
    "+ no redundant gradients": 3.5,
    "+ malloc reuse": 1.1,
    "plain compiled + malloc reuse": 0.79,
    "engine (+ bf16 autocast)": 0.31,
    "plain": 3.6,
    "plain compiled": 1.5,
    "plain + malloc reuse": 1.46,
}


def case(recipe: str = "mnist-dfad", leave_out: str = "", device: str = "d") -> list[dict[str, str]]:
    """Rows as read from a CSV, not in the order of the plot."""
    measured = {name: [(seconds / 2, seconds)] for name, seconds in SECONDS.items() if name != leave_out}
    others: dict[str, Any] = {"interleaved": False, "precision": "bf16", "provenance": measured_on(device, "")}
    return [
        {column: "" if value is None else str(value) for column, value in table.cells(one).items()} | {"recipe": recipe}
        for one in (rows.row_of(RECIPE, name, measured, None, **others) for name in measured)
    ]


def panels(measured: list[dict[str, str]], path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    figures: list[Figure] = []

    def savefig(figure: Figure, part: Path, **_: object) -> None:
        figures.append(figure)
        part.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    plots.plot(measured, path)
    return figures[0].axes


def test_the_chart_has_the_peers_first_then_the_rungs_and_the_engine_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = panels(case(), tmp_path / "chart.png", monkeypatch)
    assert axes.get_title() == "mnist-dfad, batch size 4, bf16, d"
    assert axes.get_xlabel() == "s/iteration (speedup over plain compiled + malloc reuse)"
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "plain (fp32)",
        "plain + malloc reuse (fp32)",
        "plain compiled",
        "plain compiled + malloc reuse",
        "+ no redundant gradients",
        "+ malloc reuse",
        "engine (+ bf16 autocast)",
    ]
    assert axes.yaxis_inverted(), "the first bar is at the top"
    assert [round(bar.get_width(), 4) for bar in axes.patches] == [3.6, 1.46, 1.5, 0.79, 3.5, 1.1, 0.31]  # type: ignore[attr-defined]
    assert [text.get_text().strip() for text in axes.texts] == [
        *("3.60 (0.22×)", "1.46 (0.54×)", "1.50 (0.53×)", "0.790 (1.00×)", "3.50 (0.23×)", "1.10 (0.72×)", "0.310 (2.55×)")
    ]
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert [len(set(group)) for group in (colors[:4], colors[4:6], colors)] == [1, 1, 3]


def test_the_chart_compares_with_the_strongest_peer_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weaker = case("other", leave_out="plain compiled + malloc reuse")
    first, second = panels([*case(), *weaker], tmp_path / "chart.png", monkeypatch)
    assert first.get_xlabel() == "s/iteration (speedup over plain compiled + malloc reuse)"
    assert second.get_xlabel() == "s/iteration (speedup over plain compiled)"
    assert second.texts[-1].get_text() == " 0.310 (4.84×)"


def test_the_chart_is_a_png_with_a_panel_per_case(tmp_path: Path) -> None:
    plots.plot(case(), tmp_path / "one.png")
    plots.plot([*case(), *case("other")], tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").height > Image.open(tmp_path / "one.png").height


def test_the_headline_figure_has_the_numbers_of_the_csv() -> None:
    measured = [*case(), *case("gpu", leave_out="plain + malloc reuse", device="a GPU")]
    (axes,) = plots._headline(measured).axes
    assert [bar.get_height() for bar in axes.patches] == [1.46, 0.79, 0.31]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.texts] == ["1.46", "0.79", "0.31\n2.55×"]
    assert axes.get_ylabel() == "s/iteration (lower is better)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mnist-dfad, bf16\nbatch size 4"]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["plain + malloc reuse (eager fp32)", "plain compiled + malloc reuse", "dfkd_fast engine"]


def test_the_headline_command_writes_the_same_svg_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write(tmp_path / "rows.csv", list(case()[0]), case())
    files = [tmp_path / "new" / name for name in ("a.svg", "b.svg")]
    for file in files:
        monkeypatch.setattr("sys.argv", ["bench", "plot", "--headline", str(tmp_path / "rows.csv"), "--out", str(file)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    assert capsys.readouterr().out.split() == list(map(str, files))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "2.55×" in files[0].read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--headline", "rows.csv"], "rows.csv: must have the engine and its peers with malloc reuse"),
        (["--out", "speed.svg", "rows.csv"], "--out speed.svg: must come with --headline"),
    ],
)
def test_a_headline_that_cannot_be_plotted_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    measured = case(leave_out="plain compiled + malloc reuse")
    table.write(Path("rows.csv"), list(measured[0]), measured)
    monkeypatch.setattr("sys.argv", ["bench", "plot", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
