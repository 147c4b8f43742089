import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from dfkd_fast import DfkdError
from dfkd_fast.commands.compare import compare_runs
from dfkd_fast.evaluation import retention
from dfkd_fast.report import COLUMNS, plot_comparison, read_run, table_rows


def finished_run(path: Path, recipe: str, seed: int, curve: list[float]) -> Path:
    path.mkdir()
    summary = {"recipe": recipe, "seed": seed, "teacher_accuracy": 98.0, "retention": asdict(retention(curve, 93.0))}
    (path / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"epoch": number, "student_accuracy": accuracy}) for number, accuracy in enumerate(curve, start=1)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_table_has_a_row_per_run_and_a_row_of_means_per_recipe(tmp_path: Path) -> None:
    runs = [
        read_run(finished_run(tmp_path / "a0", "a", 0, [50.0, 90.0, 80.0, 94.0])),
        read_run(finished_run(tmp_path / "b0", "b", 0, [60.0, 70.0, 75.0, 76.0])),
        read_run(finished_run(tmp_path / "a1", "a", 1, [40.0, 80.0, 90.0, 96.0])),
    ]
    rows = table_rows(runs)
    assert [row[0] for row in rows] == ["a, seed 0", "a, seed 1", "a, mean of 2", "b, seed 0"]
    drop = 2 + list(COLUMNS).index("largest_drop")
    assert [row[drop] for row in rows] == ["10.00", "0.00", "5.00", "0.00"]
    assert [row[2] for row in rows] == ["94.00", "96.00", "95.00", "76.00"]


def test_means_are_over_runs_that_differ_only_in_their_seeds(tmp_path: Path) -> None:
    runs = []
    for name, seed, epochs, root in (("a", 0, 4, "/here"), ("b", 1, 4, "/there"), ("c", 0, 60, "/here")):
        folder = finished_run(tmp_path / name, "same", seed, [50.0, 90.0])
        settings = f'name = "same"\nseed = {seed}\n[loop]\nepochs = {epochs}\n[data]\nroot = "{root}"\n'
        (folder / "recipe.toml").write_text(settings)
        runs.append(read_run(folder))
    first, other = "same in a", "same in c"
    assert [row[0] for row in table_rows(runs)] == [f"{first}, seed 0", f"{first}, seed 1", f"{first}, mean of 2", f"{other}, seed 0"]
    assert [row[0] for row in table_rows(runs[:2])] == ["same, seed 0", "same, seed 1", "same, mean of 2"]


def test_folders_of_the_same_name_are_named_with_their_paths(tmp_path: Path) -> None:
    runs = []
    for parent, epochs in (("x", 4), ("y", 60)):
        (tmp_path / parent).mkdir()
        folder = finished_run(tmp_path / parent / "run", "same", 0, [50.0, 90.0])
        (folder / "recipe.toml").write_text(f'name = "same"\n[loop]\nepochs = {epochs}\n')
        runs.append(read_run(folder))
    assert [row[0] for row in table_rows(runs)] == [f"same in {tmp_path}/{parent}/run, seed 0" for parent in ("x", "y")]


def test_the_legend_is_not_wider_than_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("dfkd_fast.report.compare.save_figure", lambda figure, path: figures.append(figure))
    runs = [read_run(finished_run(tmp_path / str(index), f"{index}{'w' * 50}", 0, [50.0, 90.0])) for index in range(4)]
    plot_comparison(runs, tmp_path / "plot.png")
    figures[0].draw_without_rendering()
    assert figures[0].legends[0].get_window_extent().x1 <= figures[0].bbox.x1


def test_runs_with_different_teachers_are_not_averaged(tmp_path: Path) -> None:
    runs = []
    for seed, weights in ((0, "a.pth"), (1, "b.pth"), (2, "a.pth")):
        folder = finished_run(tmp_path / str(seed), "same", seed, [50.0, 90.0])
        (folder / "recipe.toml").write_text(f'name = "same"\nseed = {seed}\n[teacher]\nweights = "{weights}"\n')
        runs.append(read_run(folder))
    names = [row[0].rpartition(", ")[2] for row in table_rows(runs)]
    assert names == ["seed 0", "seed 2", "mean of 2", "seed 1"]


def test_epochs_without_evaluation_are_left_out_of_the_curve(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", "a", 0, [50.0, 90.0])
    lines = ['{"epoch": 1, "student_accuracy": null}', '{"epoch": 2, "student_accuracy": 50.0}', '{"epoch": 3, "student_accuracy": 90.0}']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert read_run(folder).curve == [(2, 50.0), (3, 90.0)]


def test_a_calibrated_student_is_epoch_0_and_minutes_are_those_of_all_epochs_so_far(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", "a", 0, [70.0, 80.0])
    lines = [
        '{"epoch": 1, "seconds": 90.0, "student_accuracy": null}',
        '{"epoch": 2, "seconds": 30.0, "student_accuracy": 70.0}',
        '{"epoch": 3, "seconds": 60.0, "student_accuracy": 80.0}',
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "calibration.json").write_text('{"accuracy": 60.0, "agreement": 50.0, "seconds": 45.0}')
    run = read_run(folder)
    assert run.curve == [(0, 60.0), (2, 70.0), (3, 80.0)]
    assert run.minutes == pytest.approx([0.75, 2.0, 3.0])
    (folder / "calibration.json").write_text('{"accuracy": 60.0, "agreement": 50.0}')  # of an earlier version
    assert read_run(folder).curve == run.curve
    assert read_run(folder).minutes == [None, *run.minutes[1:]]


def test_points_without_a_time_are_left_out_of_a_plot_over_minutes(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "a", "a", 0, [70.0, 80.0])  # its epochs have no seconds
    plot_comparison([read_run(folder)], tmp_path / "epochs.png")
    with pytest.raises(DfkdError, match=r"^--minutes: .*a has no seconds in metrics.jsonl$"):
        plot_comparison([read_run(folder)], tmp_path / "minutes.png", over_minutes=True)
    assert not (tmp_path / "minutes.png").exists()


@pytest.mark.parametrize(
    "content",
    [
        '{"accuracy": null, "agreement": 50.0}',
        "{",
        "[]",
        '{"accuracy": "high"}',
        '{"accuracy": NaN}',
        '{"accuracy": 500}',
        '{"accuracy": true}',
    ],
)
def test_a_calibration_without_accuracy_or_a_damaged_one_has_no_point(tmp_path: Path, content: str) -> None:
    folder = finished_run(tmp_path / "a", "a", 0, [70.0, 80.0])
    (folder / "calibration.json").write_text(content)
    assert read_run(folder).curve == [(1, 70.0), (2, 80.0)]


@pytest.mark.parametrize(("over_minutes", "label", "right"), [(False, "Epoch", 2.0), (True, "Minutes", 10.0)])
def test_curves_are_plotted_over_epochs_or_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_minutes: bool, label: str, right: float
) -> None:
    folder = finished_run(tmp_path / "a", "a", 0, [70.0, 80.0])
    lines = [f'{{"epoch": {number}, "seconds": 300.0, "student_accuracy": 70.0}}' for number in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    figures: list[Figure] = []
    monkeypatch.setattr("dfkd_fast.report.compare.save_figure", lambda figure, path: figures.append(figure))
    plot_comparison([read_run(folder)], tmp_path / "plot.png", over_minutes=over_minutes)
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == label
    assert bool(axes.get_xlim()[0] == 0) is over_minutes
    assert np.asarray(axes.lines[0].get_xdata()).max() == right


def colours_of(plot: Path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(plot).convert("RGB")).reshape(-1, 3)
    return {tuple(map(int, colour)) for colour in np.unique(pixels, axis=0)}


def test_the_plot_shows_each_recipe_in_a_different_colour(tmp_path: Path) -> None:
    runs = [read_run(finished_run(tmp_path / name, name, 0, [50.0, 90.0, 80.0])) for name in "abc"]
    plot_comparison(runs, tmp_path / "all.png")
    plot_comparison(runs[:1], tmp_path / "one.png")
    colours = {name: colours_of(tmp_path / name) for name in ("all.png", "one.png")}
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)

    def near(expected: tuple[int, int, int], plotted: set[tuple[int, ...]]) -> bool:
        # Curves are blended with the white background.
        return any(max(abs(a - (255 - 0.8 * (255 - b))) for a, b in zip(colour, expected, strict=True)) < 3 for colour in plotted)

    assert all(near(colour, colours["all.png"]) for colour in (blue, orange, green))
    assert [near(colour, colours["one.png"]) for colour in (blue, orange, green)] == [True, False, False]


@pytest.mark.parametrize("name", [r"$\foo{$", "$x$", r"\$", "{%", "_hidden", "[red]", "日本", "a" * 200, "#1"])
def test_recipe_names_are_printed_and_plotted_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    drawn: list[str] = []
    draw_text = RendererAgg.draw_text

    def record(self: RendererAgg, gc: object, x: float, y: float, s: str, *rest: Any, **options: Any) -> None:
        drawn.append(s)
        draw_text(self, gc, x, y, s, *rest, **options)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(RendererAgg, "draw_text", record)
    run = finished_run(tmp_path / "run", name, 0, [50.0, 90.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_runs([run], tmp_path / "plot.png", Console(width=300))
    assert f"{name}, seed 0" in capsys.readouterr().out
    assert drawn.count(name if len(name) <= 60 else f"{name[:60]}…") == 1  # in the legend


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "summary.json").unlink(), "is not a finished run"),
        (lambda folder: (folder / "summary.json").write_text("{"), "cannot be read as a run"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "cannot be read as a run"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "cannot be read as a run"),
        (lambda folder: (folder / "metrics.jsonl").write_text("[]\n"), "cannot be read as a run"),
        (lambda folder: (folder / "summary.json").write_text('{"retention": null}'), "never evaluated"),
    ],
    ids=["unfinished", "not JSON", "unexpected JSON", "no log", "unexpected log", "not evaluated"],
)
def test_an_error_names_the_folder_that_cannot_be_compared(tmp_path: Path, break_it: object, message: str) -> None:
    folder = finished_run(tmp_path / "broken", "a", 0, [50.0])
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(DfkdError, match=message) as caught:
        read_run(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
