import io
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from dfkd_fast import Epoch
from dfkd_fast.console import print_table
from dfkd_fast.log import log_to_console
from dfkd_fast.report import Progress


@contextmanager
def logged(out: io.StringIO, epochs: int, iterations_per_epoch: int, clock: "Clock", done: int = 0) -> Iterator[Progress]:
    """The progress of a student on a console that is not a terminal."""
    console = Console(file=out)
    with log_to_console(console), Progress(console, "student", epochs, iterations_per_epoch, done, clock=clock) as progress:
        yield progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    @property
    def time_of_day(self) -> str:
        return time.strftime("%H:%M:%S", time.localtime(self.now))


def test_without_a_terminal_about_ten_plain_lines_are_printed() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 40, 2, clock) as progress:
        for number in range(1, 41):
            clock.now += 3
            progress.iteration(2 * number)
            progress.epoch(Epoch(number, 1.0, {"student": 0.5}, 97.25))
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1] == f"{clock.time_of_day}  student 40/40  student 0.5  top-1 accuracy 97.25 %  1.5 s/iteration  0:00:00 left"
    assert lines[0].endswith("  student 4/40  student 0.5  top-1 accuracy 97.25 %  1.5 s/iteration  0:01:48 left")


def test_a_line_has_the_relative_bn_moments() -> None:
    out = io.StringIO()
    with logged(out, 1, 2, Clock()) as progress:
        progress.epoch(Epoch(1, 1.0, {"student": 0.5, "bn_moments": 18.6}, 97.25, relative_bn_moments=0.12345))
    assert "  bn_moments 18.6  relative bn_moments 0.123  top-1 accuracy 97.25 %  " in out.getvalue()


def test_a_long_epoch_is_logged_after_its_first_iterations_and_every_ten_minutes() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 40, 100, clock) as progress:
        for done in range(1, 100):
            clock.now += 30
            progress.iteration(done)
    lines = out.getvalue().splitlines()
    assert [line.partition("  ")[2].partition("  ")[0] for line in lines] == [
        f"student 1/40, iteration {done}/100" for done in (3, 23, 43, 63, 83)
    ]
    assert lines[0].endswith("  30 s/iteration  1 day, 9:18:30 left")


def test_epochs_of_a_long_run_are_logged_at_least_every_ten_minutes() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 1000, 2, clock) as progress:
        for number in range(1, 10):
            clock.now += 400
            progress.epoch(Epoch(number, 1.0, {"student": 0.5}, None))
    assert ["/1000" in line and line.split()[2] for line in out.getvalue().splitlines()] == [f"{number}/1000" for number in (2, 4, 6, 8)]


def test_iterations_of_a_short_epoch_are_not_logged() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 40, 100, clock) as progress:
        for done in range(1, 100):
            clock.now += 0.5
            progress.iteration(done)
    assert out.getvalue() == ""


def test_the_speed_of_a_resumed_run_is_that_of_its_own_iterations() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 10, 10, clock, done=50) as progress:
        clock.now += 20
        progress.epoch(Epoch(6, 1.0, {}, None))
    assert out.getvalue() == f"{clock.time_of_day}  student 6/10  2 s/iteration  0:01:20 left\n"


def test_the_bar_shows_losses_accuracy_and_time_left() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with log_to_console(console), Progress(console, "student", epochs=4, iterations_per_epoch=2) as progress:
        progress.epoch(Epoch(2, 1.0, {"student": 0.5, "adversarial": -0.25}, 97.25))
        progress.bar.refresh()
    assert "2/4  student 0.5  adversarial -0.25  top-1 accuracy 97.25 %" in out.getvalue()
    assert ":" in out.getvalue()


def test_a_log_level_above_info_hides_the_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with log_to_console(console, "warning"), Progress(console, "student", epochs=4) as progress:
        progress.epoch(Epoch(2, 1.0, {"student": 0.5}, 97.25))
    assert out.getvalue() == ""


def test_table_cells_are_printed_without_markup() -> None:
    out = io.StringIO()
    print_table(Console(file=out, width=80), ("a", "b"), [("[red]x[/red]", "1")])
    assert "[red]x[/red]" in out.getvalue()


def test_numbers_are_not_broken_on_a_narrow_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=20)
    print_table(console, ("contender", "seconds", "memory"), [("plain compiled", "1.2345678", "1234.5")], figures=True)
    assert "plain compiled  1.2345678  1234.5" in out.getvalue()
    assert console.width == 20
