import io

from rich.console import Console

from dfkd_fast import Epoch
from dfkd_fast.console import print_table
from dfkd_fast.report import Progress


def test_without_a_terminal_about_ten_plain_lines_are_printed() -> None:
    out = io.StringIO()
    with Progress(Console(file=out), "student", epochs=40, iterations_per_epoch=2) as progress:
        for number in range(1, 41):
            progress.iteration(2 * number)
            progress.epoch(Epoch(number, 1.0, {"student": 0.5}, 97.25))
    said = out.getvalue().splitlines()
    assert len(said) == 10
    assert said[-1] == "student 40/40  student 0.5  top-1 accuracy 97.25 %"


def test_on_a_terminal_losses_accuracy_and_time_left_are_shown() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120), "student", epochs=4, iterations_per_epoch=2) as progress:
        progress.epoch(Epoch(2, 1.0, {"student": 0.5, "adversarial": -0.25}, 97.25))
        progress.bar.refresh()
    assert "2/4  student 0.5  adversarial -0.25  top-1 accuracy 97.25 %" in out.getvalue()
    assert ":" in out.getvalue()


def test_table_cells_are_printed_as_they_are() -> None:
    out = io.StringIO()
    print_table(Console(file=out, width=80), ("a", "b"), [("[red]x[/red]", "1")])
    assert "[red]x[/red]" in out.getvalue()


def test_figures_are_whole_however_narrow_the_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=20)
    print_table(console, ("contender", "seconds", "memory"), [("plain compiled", "1.2345678", "1234.5")], figures=True)
    assert "plain compiled  1.2345678  1234.5" in out.getvalue()
    assert console.width == 20
