"""Commands run with a time limit: what they write is handed on at once, and nothing that they start outlives them.

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
"""Variables of the user's that would change what is checked or measured."""
TICK = 1.0  # seconds between calls of ``on_tick``
CHUNK = 1 << 16


class Ending(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit code; minus the number of the signal that killed it."""
    timed_out: bool

    def describe(self) -> str:
        """In a few words."""
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
    """Run a command in the repository's root, in a process group of its own.

    Args:
        command: the number of a file descriptor is appended, to which it may write lines.
        standard_input: what it can read. Not an argument, whose length is limited.
        variables: added to this process's environment, of which ``CLEARED`` are left out.
        seconds: after which the group is killed.
        on_line: told each line written to that descriptor, without its newline.
        on_output: told what is written to standard output and standard error, in pieces.
        on_tick: called about every second.
    """
    reading, writing = os.pipe()
    content = os.memfd_create("standard input")  # no file, for which the disk may have no room
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
    """Hand on what a process writes until it ends; returns whether the deadline came first."""
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
            # Something it started may still hold the pipes open, and even write to them.
            if late or (ended and not ready):
                return late and not ended
            if time.monotonic() > next_tick:
                on_tick()
                next_tick = time.monotonic() + TICK
