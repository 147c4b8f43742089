"""The context of a stage: its device, the remaining time, and where to send its records.

PyTorch, which takes seconds to import, is imported only by the stages that use it.
"""

import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .records import Record, Status

if TYPE_CHECKING:
    import torch

__all__ = ["CaptureError", "Context", "GpuLostError"]

Case = TypeVar("Case")
DETAIL = 4000  # characters kept of the end of a failure's detail


class CaptureError(RuntimeError):
    """A CUDA graph could not be captured. PyTorch 2.11 may then consider the capture unfinished, and fail in later calls."""


class GpuLostError(BaseException):
    """The process lost the GPU, for example after an illegal address; the stage continues in a new process."""


@dataclass
class Context:
    """One run of a stage.

    Args:
        stage: name of the stage.
        device_type: type of the device to run on, "cuda"; "cpu" in a rehearsal.
        rehearse: whether to run at toy size, on a CPU.
        deadline: time of ``time.monotonic()`` shortly after which the process is killed.
        send: called with each record; returns after the record has left the process.
        announce: called with a case's name before it starts, so that a case that ends the process is known.
        done: cases that an earlier run of the stage completed on the same commit and device.
        data_root: folder of datasets, or None.
        origin: device, versions, commit and command, for every record; see :class:`~bench.gpu.records.Record`.
    """

    stage: str
    device_type: str
    rehearse: bool
    deadline: float
    send: Callable[[Record], None]
    announce: Callable[[str], object] = lambda case: None
    done: Collection[str] = ()
    data_root: Path | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    """Cases that did not run because no time was left."""

    @property
    def device(self) -> "torch.device":
        """Device to run on."""
        import torch

        return torch.device(self.device_type)

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
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
        """Yield the cases that an earlier run did not complete, as long as time is left; the others are recorded as left.

        Args:
            cases: all cases.
            name: returns the name of a case.
            needs: minimum remaining time in seconds to start a case.
        """
        for case in cases:
            if name(case) in self.done:
                continue
            if self.seconds_left() < needs:
                self.leave(name(case))
                continue
            yield case

    def leave(self, case: str, reason: str = "no time was left") -> None:
        """Record a case as left for a later call."""
        self.left.append(case)
        self.record(case, "left", reason)

    def finish(self, seconds: float) -> None:
        """Send the record of the stage itself, its last one."""
        text = f"{len(self.left)} cases are left" if self.left else ""
        self.record("", "left" if self.left else "ok", text, seconds=round(seconds, 2), row={"complete": not self.left})

    @contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """Context manager that records an error as the failure of a case; the stage continues.

        Raises:
            GpuLostError: The process cannot use the GPU after the failure.
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
            if self.device_type == "cuda":
                import torch

                try:
                    torch.cuda.synchronize(self.device)
                except RuntimeError as lost:
                    raise GpuLostError(str(lost).splitlines()[0]) from None
