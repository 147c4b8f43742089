"""Functions called in other processes, for what must be alone in one: its malloc, its GPU memory, its hang or crash.

``gpu/process.py`` runs a command instead, and hands on what it writes.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from dfkd_fast.errors import first_line

__all__ = ["OutOfTime", "Pool", "Worker", "WorkerError", "Workers"]

FAREWELL = 2.0  # seconds in which a process may end by itself
Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerError(Exception):
    """A call failed: it raised an error, ended its process or took too long.

    Attributes:
        detail: the traceback of the error that it raised, else empty.
    """

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class OutOfTime(WorkerError):  # noqa: N818  # nothing went wrong
    """A call took longer than its limit, and its process was killed."""


class Worker:
    """A process that calls functions, one after the other, and ends with the ``with`` block.

    Functions are pickled by name, and the process imports their modules. It does not touch a GPU unless a function does.
    """

    def __init__(self) -> None:
        # Not fork, nor a server that forks: the imports look for GPUs, after which CUDA refuses to work in a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self._idle = False
        self._process = context.Process(target=_serve, args=(other, torch.get_num_threads()), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def call(self, function: Callable[..., Result], *arguments: object, limit: float | None = None) -> Result:
        """Call a function and return its result.

        Args:
            function: what is called.
            arguments: of it.
            limit: seconds after which the process is killed; None to wait without limit.

        Raises:
            WorkerError: the call failed. The process can be called again if the function raised an error.
        """
        self.submit(function, *arguments, limit=limit)
        return self.result(limit)

    def submit(self, function: Callable[..., object], *arguments: object, limit: float | None = None) -> None:
        """Begin a call; :meth:`result` must follow before the next one.

        Args:
            function: what is called.
            arguments: of it.
            limit: seconds after which the call will be stopped: shortly before, the process logs the line at which it is.
        """
        self._idle = False
        with suppress(OSError):  # of a process that has ended: result() says so
            self.pipe.send((function, arguments, None if limit is None else time.monotonic() + limit))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end of the call, at most so many seconds; returns whether it has ended."""
        return self.pipe.poll(seconds)

    def result(self, limit: float | None = None) -> Any:
        """Wait for the call that was submitted, and return its result.

        Raises:
            WorkerError: the call failed, or did not end within ``limit`` seconds.
        """
        try:
            if not self.wait(limit):
                self.kill()
                raise OutOfTime(f"out of time: stopped after {limit:.0f} s")
            result, failure = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(FAREWELL)
            self.kill()
            code = self._process.exitcode or 0
            raise WorkerError(f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}") from None
        self._idle = True
        if failure is not None:
            raise WorkerError(*failure)
        return result

    def close(self) -> None:
        """End the process: if it is idle, by itself, so that what it started ends, too."""
        self.pipe.close()
        if self._idle:
            self._process.join(FAREWELL)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self.pipe.close()
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Workers:
    """One worker after the other, from batches that are prepared together, for imports take seconds and would disturb what is timed.

    Args:
        count: how many will be taken.
        prepare: the first function that each of them calls. With it the process imports its module.
        batch: how many are prepared together.
    """

    def __init__(self, count: int, prepare: Callable[[], object], batch: int = 8) -> None:
        self._left = count
        self._prepare = prepare
        self._batch = batch
        self._current: Worker | None = None
        self._waiting: deque[Worker] = deque()
        self._unprepared: list[Worker] = []
        self._start()

    def take(self, limit: float | None = None) -> Worker:
        """End the worker before, and return the next one; while it works, no other is being prepared.

        Raises:
            WorkerError: it could not be prepared, or not within ``limit`` seconds. The workers that follow are not affected.
            IndexError: all of them were taken.
        """
        if self._current is not None:
            self._current.close()
        if not self._waiting:
            self._start()
        if not self._waiting:
            raise IndexError("all workers were taken")
        deadline = None if limit is None else time.monotonic() + limit
        while self._unprepared:
            self._unprepared.pop().wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._current = self._waiting.popleft()
        self._current.result(limit)
        return self._current

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in (self._current, *self._waiting):
            if worker is not None:
                worker.close()

    def _start(self) -> None:
        for _ in range(min(self._batch, self._left)):
            self._left -= 1
            worker = Worker()
            worker.submit(self._prepare)
            self._waiting.append(worker)
            self._unprepared.append(worker)


class Pool(Generic[Job, Result]):
    """Workers that call one function with many arguments, in parallel; they start when they are needed, and end with the ``with`` block.

    A worker whose call has failed is replaced: its process may have lost the GPU.

    Args:
        function: what is called, with a job.
        processes: how many at most.
    """

    def __init__(self, function: Callable[[Job], Result], processes: int) -> None:
        self.function, self.processes = function, processes
        self._idle: list[Worker] = []

    def results(self, jobs: Iterable[Job], deadline: float) -> Iterator[tuple[Job, Result | WorkerError]]:
        """Call the function with every job, in their order; yield each with its result, or its failure, as soon as its call has ended.

        At the deadline, of ``time.monotonic()``, the calls that have not ended are stopped: their jobs, and those that were
        not begun, are not yielded.
        """
        waiting, busy = deque(jobs), dict[Worker, Job]()
        try:
            while (waiting or busy) and (seconds := deadline - time.monotonic()) > 0:
                while waiting and len(busy) < self.processes:
                    worker = self._idle.pop() if self._idle else Worker()
                    busy[worker] = waiting.popleft()
                    worker.submit(self.function, busy[worker])
                multiprocessing.connection.wait([worker.pipe for worker in busy], seconds)
                for worker in [worker for worker in busy if worker.wait(0)]:
                    job = busy.pop(worker)
                    try:
                        result: Result | WorkerError = worker.result()
                        self._idle.append(worker)
                    except WorkerError as error:
                        worker.kill()
                        result = error
                    yield job, result
        finally:
            for worker in busy:
                worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._idle:
            worker.kill()


def _serve(pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):  # the other end was closed
            return
        try:
            function, arguments, until = pickle.loads(message)  # imports the function's module
            if until is not None:
                # Where it hangs, the log shows at which line, shortly before it is killed. All processes share the clock.
                faulthandler.dump_traceback_later(max(0.1, until - time.monotonic() - 0.5))
            pipe.send((function(*arguments), None))
        except Exception as error:
            pipe.send((None, (f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())))
        finally:
            faulthandler.cancel_dump_traceback_later()
