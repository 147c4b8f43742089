"""Calls of a function in processes of their own: one that fails, crashes or never ends loses none of the others."""

import multiprocessing
import multiprocessing.connection
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

__all__ = ["Outcome", "Pool"]

Job = TypeVar("Job")


class Outcome(NamedTuple):
    """How a call ended."""

    error: str | None = None
    """In a line; None if it returned."""
    detail: str = ""
    """The traceback."""
    seconds: float = 0.0


class Pool(Generic[Job]):
    """Processes that call a function; they start when they are needed, stay for the next jobs, and end with the ``with`` block.

    Args:
        function: importable by its name, because the processes share none of this one's memory.
        processes: how many at most.
    """

    def __init__(self, function: Callable[[Job], object], processes: int) -> None:
        self.function, self.processes = function, processes
        self._started: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in list(self._started):
            self._stop(connection)

    def outcomes(self, jobs: Iterable[Job], deadline: float) -> Iterator[tuple[Job, Outcome]]:
        """Call the function with every job, begun in their order; yield each as soon as its call has ended.

        At the deadline, of ``time.monotonic()``, the calls that have not ended are stopped: their jobs, and those that were
        not begun, are not yielded.
        """
        waiting, busy = deque(jobs), dict[Connection, Job]()

        def give(connection: Connection) -> None:
            busy[connection] = waiting.popleft()
            with suppress(OSError):  # of a process that is no more: receiving finds that, too
                connection.send(busy[connection])

        try:
            idle = list(self._started)
            while waiting and len(busy) < self.processes:
                give(idle.pop() if idle else self._start())
            while busy and (seconds := deadline - time.monotonic()) > 0:
                for connection in multiprocessing.connection.wait(list(busy), seconds):
                    assert isinstance(connection, Connection)
                    job = busy.pop(connection)
                    try:
                        outcome = connection.recv()
                        available: Connection | None = connection
                    except (EOFError, OSError):
                        outcome, available = Outcome(f"its process ended with exit code {self._stop(connection)}"), None
                    if waiting:
                        give(available or self._start())
                    yield job, outcome
        finally:
            for connection in busy:
                self._stop(connection)

    def _start(self) -> Connection:
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(self.function, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._started[ours] = process
        return ours

    def _stop(self, connection: Connection) -> int | None:
        """End a process that may have ended; return its exit code."""
        process = self._started.pop(connection)
        process.kill()
        process.join()
        connection.close()
        return process.exitcode


def _serve(function: Callable[[Job], object], connection: Connection) -> None:
    while True:
        job, begin = connection.recv(), time.monotonic()
        try:
            function(job)
            outcome = Outcome()
        except Exception as error:
            outcome = Outcome(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", traceback.format_exc())
        connection.send(outcome._replace(seconds=time.monotonic() - begin))
