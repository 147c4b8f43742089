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


def positions(out: io.StringIO) -> list[str]:
    """What each line reports, such as "student 3/40"."""
    return [line.split("  ")[1] for line in out.getvalue().splitlines()]


def test_every_epoch_is_one_line() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 40, 2, clock) as progress:
        for number in range(1, 41):
            clock.now += 3
            progress.iteration(2 * number)
            progress.epoch(Epoch(number, 3.0, {"student": 0.5, "adversarial": -0.25}, 97.25))
    lines = out.getvalue().splitlines()
    assert positions(out) == [f"student {number}/40" for number in range(1, 41)]
    metrics = "student 0.5  adversarial -0.25  top-1 accuracy 97.25 %  3 s/epoch  1.5 s/iteration"
    assert lines[3].endswith(f"  student 4/40  {metrics}  0:01:48 left")
    assert lines[-1] == f"{clock.time_of_day}  student 40/40  {metrics}  0:00:00 left"


def test_of_very_short_epochs_the_first_the_last_and_one_every_two_seconds_are_logged() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 50, 4, clock) as progress:
        for number in range(1, 51):
            clock.now += 0.125
            progress.epoch(Epoch(number, 0.125, {}, None))
    assert positions(out) == [f"student {number}/50" for number in (1, 17, 33, 49, 50)]
    assert all("  0.125 s/epoch  " in line for line in out.getvalue().splitlines())


def test_the_seconds_of_a_long_epoch_have_all_their_digits() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 2, 2, clock) as progress:
        clock.now += 3001
        progress.epoch(Epoch(1, 3001.0, {}, None))
    assert "  3001 s/epoch  1500 s/iteration  0:50:01 left\n" in out.getvalue()


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
    assert positions(out) == [f"student 1/40, iteration {done}/100" for done in (3, 23, 43, 63, 83)]
    assert lines[0].endswith("  30 s/iteration  1 day, 9:18:30 left")


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
        progress.epoch(Epoch(6, 20.0, {}, None))
    assert out.getvalue() == f"{clock.time_of_day}  student 6/10  20 s/epoch  2 s/iteration  0:01:20 left\n"


def test_the_first_epoch_of_a_resumed_run_is_logged_however_short() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 10, 10, clock, done=53) as progress:
        for number in (6, 7, 8):
            progress.epoch(Epoch(number, 0.0, {}, None))
    assert positions(out) == ["student 6/10"]


def pretrain(progress: Progress, clock: "Clock", steps: range, total: int, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        progress.pretraining(step, total, {"one_hot": 1 / step})


def test_pretraining_is_logged_in_tenths_with_loss_and_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 40, 100, clock) as progress:
        pretrain(progress, clock, range(1, 501), 500, seconds=0.5)
    lines = out.getvalue().splitlines()
    assert positions(out) == [f"generator pretraining {step}/500" for step in range(50, 501, 50)]
    assert lines[3].endswith("  generator pretraining 200/500  one_hot 0.005  0.5 s/step  0:02:30 left")
    assert lines[-1] == f"{clock.time_of_day}  generator pretraining 500/500  one_hot 0.002  0.5 s/step  0:00:00 left"


def test_of_a_very_short_pretraining_only_the_first_and_the_last_line_are_logged() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 40, 100, clock) as progress:
        pretrain(progress, clock, range(1, 505), 504, seconds=2**-10)
    assert positions(out) == [f"generator pretraining {step}/504" for step in (51, 504)]


def test_a_long_pretraining_is_logged_after_its_first_steps_and_every_ten_minutes() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 40, 100, clock) as progress:
        pretrain(progress, clock, range(101, 160), 1000, seconds=30)
    assert positions(out) == [f"generator pretraining {step}/1000" for step in (103, 123, 143)]


def test_losses_of_pretraining_are_read_only_for_a_line() -> None:
    class Loss:
        reads = 0

        def __float__(self) -> float:
            self.reads += 1
            return 0.5

    out, clock, loss = io.StringIO(), Clock(), Loss()
    with logged(out, 40, 100, clock) as progress:
        for step in range(1, 101):
            clock.now += 3
            progress.pretraining(step, 100, {"one_hot": loss})
    assert loss.reads == len(out.getvalue().splitlines()) == 10


def test_times_of_epoch_and_iterations_exclude_pretraining() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 10, 10, clock) as progress:
        pretrain(progress, clock, range(1, 21), 20, seconds=100)
        clock.now += 20
        progress.epoch(Epoch(1, 2020.0, {}, None))
    assert out.getvalue().splitlines()[-1].endswith("  student 1/10  20 s/epoch  2 s/iteration  0:03:00 left")


def test_times_exclude_what_comes_between_pretraining_and_the_first_epoch() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 10, 10, clock) as progress:
        pretrain(progress, clock, range(1, 21), 20, seconds=1)
        clock.now += 500  # such as a calibration
        progress.begin_training()
        clock.now += 20
        progress.epoch(Epoch(1, 540.0, {}, None))
    assert out.getvalue().splitlines()[-1].endswith("  student 1/10  20 s/epoch  2 s/iteration  0:03:00 left")


def test_the_time_left_after_an_evaluation_does_not_expect_one_in_every_epoch() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 20, 10, clock) as progress:
        for number in range(1, 11):
            clock.now += 110 if number % 5 == 0 else 10
            progress.epoch(Epoch(number, 10.0, {}, None))
        clock.now += 10
        progress.epoch(Epoch(11, 10.0, {}, None))
    assert out.getvalue().splitlines()[-1].endswith("  student 11/20  10 s/epoch  1 s/iteration  0:04:30 left")


def test_the_time_left_forgets_a_slow_first_epoch() -> None:
    out, clock = io.StringIO(), Clock()
    with logged(out, 10, 10, clock) as progress:
        for number, seconds in ((1, 1000), (2, 10)):
            clock.now += seconds
            progress.epoch(Epoch(number, seconds, {}, None))
    assert out.getvalue().splitlines()[-1].endswith("  student 2/10  10 s/epoch  1 s/iteration  0:01:20 left")


def test_the_bar_shows_the_pretraining_and_then_the_student() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with log_to_console(console), Progress(console, "student", epochs=4) as progress:
        progress.pretraining(1, 2, {"one_hot": 0.5})
        progress.bar.refresh()
        assert "generator pretraining" in out.getvalue() and "one_hot 0.5" in out.getvalue()
        progress.pretraining(2, 2, {"one_hot": 0.5})
        out.truncate(out.seek(0))
        progress.bar.refresh()
    assert "student" in out.getvalue() and "pretraining" not in out.getvalue() and "step" not in out.getvalue()


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
