"""Processes of their own that call functions, for what must be alone in one: its malloc, its GPU memory, its hang or crash."""

import faulthandler
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from dfkd_fast.errors import first_line

__all__ = ["OutOfTime", "Worker", "WorkerError", "Workers"]

FAREWELL = 2.0  # seconds in which a process may end by itself
Result = TypeVar("Result")


class WorkerError(Exception):
    """A call failed: it raised an error, ended its process or took too long.

    Attributes:
        detail: the traceback in the process, if it had one to give.
    """

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class OutOfTime(WorkerError):  # noqa: N818  # nothing went wrong
    """A call took longer than its limit, and its process was killed."""


class Worker:
    """A process of its own that calls functions, one after the other.

    It begins with this package's imports, as long as nothing is asked of it; they do not touch a GPU.

    Args:
        prepare: called first of all.
    """

    def __init__(self, prepare: Callable[[], object] | None = None) -> None:
        # Not fork, nor a server that forks: the imports look for GPUs, after which CUDA refuses to work in a fork.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._ready = False
        self._broken: WorkerError | None = None
        self._idle = False
        self._process = context.Process(target=_serve, args=(other, torch.get_num_threads(), prepare), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def wait_until_ready(self, limit: float | None = None) -> None:
        """Wait until the imports are done.

        Raises:
            WorkerError: they failed, or took longer than ``limit`` seconds.
        """
        if self._broken is not None:
            raise self._broken
        if not self._ready:
            try:
                self._receive(limit)
            except WorkerError as error:
                self._broken = error
                raise
            self._ready = True

    def call(self, function: Callable[..., Result], *arguments: object, limit: float | None = None) -> Result:
        """The result of a function that the process can import, and of arguments that can be pickled.

        Args:
            function: what is called.
            arguments: of it.
            limit: seconds after which the process is killed; None to wait for ever.

        Raises:
            WorkerError: the call failed. After an error the process can still be called, but not after its end.
        """
        self.wait_until_ready(limit)
        self._idle = False
        try:
            self._pipe.send((function, arguments, limit))
        except OSError:
            raise self._ended() from None
        return self._receive(limit)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.join(FAREWELL if self._idle else 0)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _receive(self, limit: float | None) -> Any:
        try:
            if not self._pipe.poll(limit):
                self._process.kill()
                raise OutOfTime(f"out of time: stopped after {limit:.0f} s")
            result, failure = self._pipe.recv()
            self._idle = True
        except (EOFError, OSError):
            raise self._ended() from None
        if failure is not None:
            raise WorkerError(*failure)
        return result

    def _ended(self) -> WorkerError:
        self._process.join()
        code = self._process.exitcode or 0
        return WorkerError(f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}")


class Workers:
    """One worker after the other, each with its imports done before its time: they cost seconds, in which the one before it works.

    Args:
        count: how many there are.
        prepare: see :class:`Worker`.
    """

    def __init__(self, count: int, prepare: Callable[[], object] | None = None) -> None:
        self._left = count
        self._prepare = prepare
        self._current: Worker | None = None
        self._following = self._start()

    def take(self) -> Worker:
        """End the one before, and give the next."""
        if self._current is not None:
            self._current.close()
        self._current, self._following = self._following or Worker(self._prepare), None
        self._following = self._start()
        return self._current

    def settle(self, limit: float | None = None) -> None:
        """Wait, at most so many seconds, until the one to come has its imports done, so that it does not disturb what is timed."""
        if self._following is not None:
            with suppress(WorkerError):  # its own calls will raise it
                self._following.wait_until_ready(limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in (self._current, self._following):
            if worker is not None:
                worker.close()

    def _start(self) -> Worker | None:
        if not self._left:
            return None
        self._left -= 1
        return Worker(self._prepare)


def _serve(pipe: Connection, threads: int, prepare: Callable[[], object] | None) -> None:
    torch.set_num_threads(threads)
    _answer(pipe, prepare or _nothing, (), None)
    while True:
        try:
            function, arguments, limit = pipe.recv()
        except EOFError:
            return
        _answer(pipe, function, arguments, limit)


def _answer(pipe: Connection, function: Callable[..., object], arguments: tuple[object, ...], limit: float | None) -> None:
    try:
        if limit is not None:
            # Where it hangs, the log shows at which line, shortly before it is killed.
            faulthandler.dump_traceback_later(max(0.1, limit - 0.5))
        pipe.send((function(*arguments), None))
    except Exception as error:
        pipe.send((None, (f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())))
    finally:
        if limit is not None:
            faulthandler.cancel_dump_traceback_later()


def _nothing() -> None:
    pass
