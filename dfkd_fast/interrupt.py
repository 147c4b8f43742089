"""Ctrl-C and a scheduler's SIGTERM: finish the step under way, save, then go."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

__all__ = ["Interrupted", "stopping_on_signals"]


class Interrupted(Exception):  # noqa: N818  # nothing went wrong
    """A run was asked to stop and has saved what it had; the message says how to go on."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Stoppable(Protocol):
    """What can be asked to stop after the step under way."""

    def stop(self) -> None:
        """Ask."""


@contextmanager
def stopping_on_signals(running: Stoppable) -> Iterator[list[int]]:
    """Turn the first SIGINT or SIGTERM into ``running.stop()``; a second one interrupts at once.

    Gives the list of signals caught, empty as long as there was none.
    """
    caught: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        running.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
