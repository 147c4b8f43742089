"""TensorBoard event files."""

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

from dfkd_fast.files import naming

__all__ = ["EventFile"]


class EventFile:
    """A TensorBoard event file, written by the calling thread.

    PyTorch's SummaryWriter writes from its own thread, which prints a traceback when the disk is full.

    Args:
        folder: TensorBoard's log directory; created if necessary.
        first_step: TensorBoard discards events of this step or later in earlier files.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() / 1e9:020.9f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._file = self._path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"), Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Write one scalar per tag and flush the file."""
        self._write(*(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=x)])) for tag, x in values.items()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, *events: Event) -> None:
        with naming(self._path):
            for event in events:
                event.wall_time = time.time()
                self._records.write(event.SerializeToString())
            self._file.flush()
