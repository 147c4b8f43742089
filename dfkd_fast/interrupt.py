"""Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP: finish the step under way, save, then go."""

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
"""Seconds within which several signals are one: a closed terminal hangs up twice, torchrun passes a Ctrl-C on that its processes got."""


class Interrupted(BaseException):
    """A command was asked to stop; like a KeyboardInterrupt, no ``except Exception`` shall take it for a failure.

    Args:
        what: happened.
        signal_number: which signal it was.
        left: what is saved, and how to go on; empty as long as nobody has said it.
    """

    def __init__(self, what: str = "interrupted", signal_number: int = signal.SIGINT, left: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.signal_number = signal_number
        self.left = left
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return f"{self.what}; {self.left or 'nothing was saved yet'}"


class Stoppable(Protocol):
    """What can be asked to stop after the step under way."""

    def stop(self) -> None:
        """Ask."""


@contextmanager
def interrupting_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into :class:`Interrupted` at once."""

    def interrupt(number: int) -> None:
        raise Interrupted(signal_number=number)

    with _handling(interrupt):
        yield


@contextmanager
def stopping_on_signals(running: Stoppable, clock: Callable[[], float] = time.monotonic) -> Iterator[list[int]]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into ``running.stop()``; a later one is :class:`Interrupted` at once.

    Gives the list of signals caught, empty as long as there was none.
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
            raise Interrupted("interrupted again, at once", number)

    with _handling(stop):
        yield caught


@contextmanager
def _handling(handle: Callable[[int], None]) -> Iterator[None]:
    """Call a function with every signal; not with a SIGHUP that is ignored, as under nohup, nor in a forked process."""
    owner = os.getpid()
    terminals = [file for file in (1, 2) if os.isatty(file)]

    def called(number: int, _: FrameType | None) -> None:
        if os.getpid() == owner:
            _leave_hung_up(terminals)
            handle(number)
        elif number != signal.SIGINT:  # a terminal's Ctrl-C reaches a loader's workers, too, which the owner ends
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
    """Write no more to what was a terminal and has hung up: it would fail what is still to be saved."""
    for file in terminals:
        if not os.isatty(file):
            discard(file)


def discard(descriptor: int) -> None:
    """Let what is written to a file descriptor from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
