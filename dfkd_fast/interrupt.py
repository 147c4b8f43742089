"""SIGINT, SIGTERM and SIGHUP: finish the current step, save, then exit."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

__all__ = ["Interrupted", "discard", "interrupting_on_signals", "stopping_on_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
TOGETHER = 1.0
"""Signals within so many seconds count as one: a closed terminal sends two, and torchrun forwards a Ctrl-C that its processes also get."""


class Interrupted(BaseException):
    """A command was asked to stop. A BaseException, like KeyboardInterrupt, so that ``except Exception`` does not catch it.

    Args:
        what: what happened.
        signal_number: of the signal.
        saved: what is saved, and how to resume; empty if unknown.
    """

    def __init__(self, what: str = "interrupted", signal_number: int = signal.SIGINT, saved: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.signal_number = signal_number
        self.saved = saved
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return f"{self.what}; {self.saved or 'nothing was saved yet'}"


class Stoppable(Protocol):
    """Interface of a training that can stop after the current step."""

    def stop(self) -> None:
        """Request the stop."""


@contextmanager
def interrupting_on_signals() -> Iterator[None]:
    """Raise :class:`Interrupted` immediately on SIGINT, SIGTERM and SIGHUP."""

    def interrupt(number: int) -> None:
        raise Interrupted(signal_number=number)

    with _handling(interrupt):
        yield


@contextmanager
def stopping_on_signals(running: Stoppable, clock: Callable[[], float] = time.monotonic) -> Iterator[list[int]]:
    """Call ``running.stop()`` on the first SIGINT, SIGTERM or SIGHUP, and raise :class:`Interrupted` on a later one.

    Yields:
        The list of signals caught so far.
    """
    caught: list[int] = []
    first = 0.0

    def stop(number: int) -> None:
        nonlocal first
        if not caught:
            first = clock()
            caught.append(number)
            running.stop()
        elif clock() - first > TOGETHER:
            raise Interrupted("interrupted again, without saving", number)

    with _handling(stop):
        yield caught


@contextmanager
def _handling(handle: Callable[[int], None]) -> Iterator[None]:
    """Call a function on every signal, but not on a SIGHUP that is ignored, as under nohup, nor in a forked process."""
    owner = os.getpid()
    terminals = [file for file in (1, 2) if os.isatty(file)]

    def called(number: int, _: FrameType | None) -> None:
        if os.getpid() == owner:
            _leave_hung_up(terminals)
            handle(number)
        elif number != signal.SIGINT:  # a terminal's Ctrl-C also reaches the data loader's workers, which their owner terminates
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    taken = [number for number in SIGNALS if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, called) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_hung_up(terminals: list[int]) -> None:
    """Discard output to a terminal that has hung up: writing to it would fail before everything is saved."""
    for file in terminals:
        if not os.isatty(file):
            discard(file)


def discard(descriptor: int) -> None:
    """Redirect a file descriptor to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
