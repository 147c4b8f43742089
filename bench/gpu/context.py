"""What a stage gets: where it runs, how much time is left, and where its records go."""

import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from .records import Record, Status

__all__ = ["CaptureError", "Context", "GpuLostError"]

Case = TypeVar("Case")
DETAIL = 4000  # characters of a failure's detail that are kept: its end


class CaptureError(RuntimeError):
    """A CUDA graph could not be captured. PyTorch 2.11 may then take the capture for being under way, and fail in what follows."""


class GpuLostError(BaseException):
    """The process cannot use the GPU any more, as after an illegal address: the stage goes on in a new one."""


@dataclass
class Context:
    """One run of a stage.

    Args:
        stage: its name.
        device: where it runs; a CPU in a rehearsal.
        rehearse: toy sizes, on a CPU.
        deadline: of ``time.monotonic()``; the process is killed soon after it.
        send: takes the records; each has left the process when this returns.
        announce: told a case's name before it begins, so that one that ends the process is known.
        done: cases that an earlier run of the stage settled on the same commit and device.
        data_root: a folder of data sets, or None if there is none.
        origin: device, versions, commit and command, for every record; see :class:`~bench.gpu.records.Record`.
    """

    stage: str
    device: torch.device
    rehearse: bool
    deadline: float
    send: Callable[[Record], None]
    announce: Callable[[str], object] = lambda case: None
    done: Collection[str] = ()
    data_root: Path | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    """Cases for which there was no time."""

    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def record(
        self,
        case: str,
        status: Status = "ok",
        text: str = "",
        *,
        detail: str = "",
        seconds: float | None = None,
        highlight: bool = False,
        table: str = "",
        row: dict[str, Any] | None = None,
    ) -> None:
        """Send a record; see :class:`~bench.gpu.records.Record`."""
        one_line = " ".join(text.split())
        self.send(Record(self.stage, case, status, one_line, detail[-DETAIL:], seconds, highlight, table, row or {}, dict(self.origin)))

    def cases(self, cases: Iterable[Case], name: Callable[[Case], str] = str, *, needs: float = 0.0) -> Iterator[Case]:
        """Of some cases, those that an earlier run did not settle, as long as there is time; the others are recorded as left.

        Args:
            cases: all of them.
            name: of a case.
            needs: seconds that a case takes; one that would not end before the deadline is not begun.
        """
        for case in cases:
            if name(case) in self.done:
                continue
            if self.seconds_left() < needs:
                self.leave(name(case))
                continue
            yield case

    def leave(self, case: str, reason: str = "no time was left") -> None:
        """Record a case that a later call may run."""
        self.left.append(case)
        self.record(case, "left", reason)

    def finish(self, seconds: float) -> None:
        """Send the record of the stage itself, which is its last."""
        text = f"{len(self.left)} cases are left" if self.left else ""
        self.record("", "left" if self.left else "ok", text, seconds=round(seconds, 2), row={"complete": not self.left})

    @contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """Inside, an error is the case's failure, not the stage's.

        Raises:
            GpuLostError: after the failure, nothing can run on the GPU in this process.
        """
        begin = time.monotonic()
        self.announce(case)
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            self.record(case, "failed", text, detail=traceback.format_exc(), seconds=round(time.monotonic() - begin, 2))
            if isinstance(error, CaptureError):
                raise GpuLostError(str(error)) from None
            if self.device.type == "cuda":
                try:
                    torch.cuda.synchronize(self.device)
                except RuntimeError as lost:
                    raise GpuLostError(str(lost).splitlines()[0]) from None
