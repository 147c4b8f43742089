"""Calls functions in other processes, which isolates malloc settings, GPU memory, hangs and crashes.

``gpu/process.py`` runs a command instead, and forwards its output.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from dfkd_fast.errors import first_line

__all__ = ["OutOfTime", "Pool", "Worker", "WorkerError", "Workers"]

EXIT_TIMEOUT = 2.0  # seconds to wait for a process to exit
Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerError(Exception):
    """A call raised an error, ended its process or exceeded its time limit.

    Attributes:
        detail: Traceback of the error that the call raised, otherwise empty.
    """

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class OutOfTime(WorkerError):  # noqa: N818  # not an error of the call
    """A call exceeded its time limit, and its process was killed."""


class Worker:
    """A process that calls functions one after the other. It ends with the ``with`` block.

    Functions are pickled by name, and the process imports their modules. It uses a GPU only if a function does.
    """

    def __init__(self) -> None:
        # Neither fork nor forkserver: the imports query GPUs, after which CUDA cannot be used in a forked process.
        import torch  # not at the top: every process imports this module, and seconds later PyTorch only if its functions need it

        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self._idle = False
        self._process = context.Process(target=_serve, args=(other, torch.get_num_threads()), daemon=True)
        self._process.start()
        other.close()  # so that the pipe closes when the process ends

    def call(self, function: Callable[..., Result], *arguments: object, limit: float | None = None) -> Result:
        """Call a function and return its result.

        Args:
            function: function to call.
            arguments: its positional arguments.
            limit: time limit in seconds, after which the process is killed; None for no limit.

        Raises:
            WorkerError: The call failed. If the function raised an error, the worker can be called again.
        """
        self.submit(function, *arguments, limit=limit)
        return self.result(limit)

    def submit(self, function: Callable[..., object], *arguments: object, limit: float | None = None) -> None:
        """Start a call. :meth:`result` must be called before the next one.

        Args:
            function: function to call.
            arguments: its positional arguments.
            limit: time limit in seconds; shortly before it, the process logs a traceback.
        """
        self._idle = False
        with suppress(OSError):  # the process has ended, which result() raises
            self.pipe.send((function, arguments, None if limit is None else time.monotonic() + limit))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the call to end, at most ``seconds``; returns whether it has ended."""
        return self.pipe.poll(seconds)

    def result(self, limit: float | None = None) -> Any:
        """Wait for the submitted call and return its result.

        Raises:
            WorkerError: The call failed, or did not end within ``limit`` seconds.
        """
        try:
            if not self.wait(limit):
                self.kill()
                raise OutOfTime(f"out of time: stopped after {limit:.0f} s")
            result, failure = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(EXIT_TIMEOUT)
            self.kill()
            code = self._process.exitcode or 0
            raise WorkerError(f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}") from None
        self._idle = True
        if failure is not None:
            raise WorkerError(*failure)
        return result

    def close(self) -> None:
        """End the process. An idle process exits by itself, so that its own child processes end, too."""
        self.pipe.close()
        if self._idle:
            self._process.join(EXIT_TIMEOUT)
        self.kill()

    def kill(self) -> None:
        """Kill the process."""
        self.pipe.close()
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Workers:
    """A sequence of workers, prepared in batches, because imports take seconds and would disturb timings.

    Args:
        count: number of workers.
        prepare: function that each worker calls first. The process imports its module for it.
        batch: number of workers that are prepared together.
    """

    def __init__(self, count: int, prepare: Callable[[], object], batch: int = 8) -> None:
        self._remaining = count
        self._prepare = prepare
        self._batch = batch
        self._current: Worker | None = None
        self._waiting: deque[Worker] = deque()
        self._unprepared: list[Worker] = []
        self._start()

    def take(self, limit: float | None = None) -> Worker:
        """Close the previous worker and return the next one. No other worker is being prepared while it runs.

        Raises:
            WorkerError: The worker could not be prepared within ``limit`` seconds. Later workers are not affected.
            IndexError: All workers were taken.
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
        for _ in range(min(self._batch, self._remaining)):
            self._remaining -= 1
            worker = Worker()
            worker.submit(self._prepare)
            self._waiting.append(worker)
            self._unprepared.append(worker)


class Pool(Generic[Job, Result]):
    """Workers that call one function on many jobs in parallel. They start on demand and end with the ``with`` block.

    A worker whose call failed is replaced, because its process may have lost the GPU.

    Args:
        function: function of a job.
        processes: maximum number of workers.
    """

    def __init__(self, function: Callable[[Job], Result], processes: int) -> None:
        self.function, self.processes = function, processes
        self._idle: list[Worker] = []

    def results(self, jobs: Iterable[Job], deadline: float) -> Iterator[tuple[Job, Result | WorkerError]]:
        """Call the function on every job, in order; yields each job with its result, or its error, as soon as the call ends.

        At ``deadline``, a time of ``time.monotonic()``, running calls are stopped. Their jobs, and those that did not start, are not
        yielded.
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
    configured = False
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):  # the pipe was closed
            return
        try:
            function, arguments, until = pickle.loads(message)  # imports the function's module
            if not configured and (torch := sys.modules.get("torch")) is not None:
                torch.set_num_threads(threads)
                configured = True
            if until is not None:
                # If the call hangs, the log gets a traceback shortly before the kill. All processes share the monotonic clock.
                faulthandler.dump_traceback_later(max(0.1, until - time.monotonic() - 0.5))
            pipe.send((function(*arguments), None))
        except Exception as error:
            pipe.send((None, (f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())))
        finally:
            faulthandler.cancel_dump_traceback_later()
