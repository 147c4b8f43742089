"""Runs commands with a time limit. Their output is forwarded immediately, and their child processes do not outlive them.

``bench/processes.py`` calls functions in other processes instead.
"""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from ..provenance import ROOT

__all__ = ["Ending", "run"]

CLEARED = ("DFKD_FAST_BACKEND", "PYTEST_ADDOPTS", "TRITON_INTERPRET")
"""Environment variables that are removed, because they would change what is checked or measured."""
TICK = 1.0  # seconds between calls of ``on_tick``
CHUNK = 1 << 16


class Ending(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code; negative signal number if killed by a signal."""
    timed_out: bool

    def describe(self) -> str:
        """Return a short description."""
        if self.timed_out:
            return "out of time"
        return f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


def run(
    command: Sequence[str],
    standard_input: bytes,
    variables: Mapping[str, str],
    seconds: float,
    *,
    on_line: Callable[[bytes], None],
    on_output: Callable[[bytes], None],
    on_tick: Callable[[], None],
) -> Ending:
    """Run a command in the repository's root, in its own process group; returns how it ended.

    Args:
        command: command and arguments, to which the number of a file descriptor is appended; the command may write lines to it.
        standard_input: standard input of the command; unlike an argument, its length is not limited.
        variables: environment variables, added to those of this process without ``CLEARED``.
        seconds: time limit, after which the process group is killed.
        on_line: called with each line written to the file descriptor, without the newline.
        on_output: called with chunks of standard output and standard error.
        on_tick: called about every second.
    """
    reading, writing = os.pipe()
    content = os.memfd_create("standard input")  # not a file, because the disk may be full
    try:
        os.write(content, standard_input)
        os.lseek(content, 0, os.SEEK_SET)
        process = subprocess.Popen(
            [*command, str(writing)],
            cwd=ROOT,
            env={**{name: value for name, value in os.environ.items() if name not in CLEARED}, **variables},
            stdin=content,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
        os.close(content)
    assert process.stdout is not None
    with process.stdout, os.fdopen(reading, "rb", buffering=0) as lines:
        try:
            handlers = {lines.fileno(): _by_lines(on_line), process.stdout.fileno(): on_output}
            timed_out = _listen(process, handlers, time.monotonic() + seconds, on_tick)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ending(process.returncode, timed_out)


def _by_lines(on_line: Callable[[bytes], None]) -> Callable[[bytes], None]:
    rest = b""

    def take(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            on_line(line)

    return take


def _listen(
    process: subprocess.Popen[bytes], handlers: Mapping[int, Callable[[bytes], None]], deadline: float, on_tick: Callable[[], None]
) -> bool:
    """Forward a process's output until it ends; returns whether the deadline came first."""
    next_tick = time.monotonic() + TICK
    with selectors.DefaultSelector() as selector:
        for descriptor, handler in handlers.items():
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ, handler)
        while True:
            ended, late = process.poll() is not None, time.monotonic() > deadline
            ready = selector.select(0 if ended else 0.2)
            for key, _ in ready:
                if data := os.read(key.fd, CHUNK):
                    key.data(data)
                else:
                    selector.unregister(key.fd)
            # A child process may still hold the pipes open, and even write to them.
            if late or (ended and not ready):
                return late and not ended
            if time.monotonic() > next_tick:
                on_tick()
                next_tick = time.monotonic() + TICK
