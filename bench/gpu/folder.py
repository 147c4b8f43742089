"""The files of a campaign: kept in one folder from call to call, and copied to an output folder as they grow."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dfkd_fast.errors import DfkdError

from .records import Record, read

__all__ = ["Folder", "check_out"]

RESULTS, LOG, FAILURES, SUMMARY = FILES = ("results.jsonl", "log.txt", "failures.txt", "summary.txt")
FILE_LIMIT = 9_000_000  # bytes; of a longer file only the end is copied


def check_out(folder: Path) -> None:
    """Check that a folder can be used as output folder: it must not hold other files with the names of the outputs.

    Raises:
        DfkdError: It is the current folder, not a folder, or holds such files.
    """
    if folder.resolve() == Path.cwd():
        raise DfkdError(f"--out {str(folder)!r}: must not be the current folder")
    if folder.exists() and not folder.is_dir():
        raise DfkdError(f"--out {folder}: is not a folder")
    try:
        ours = bool(read(folder / RESULTS))
    except (OSError, TypeError, ValueError):
        ours = False
    if not ours and (others := [name for name in FILES if (folder / name).is_file()]):
        raise DfkdError(f"--out {folder}: holds {others[0]}, which python -m bench gpu would replace")


class Folder:
    """Writes the files. A file that cannot be written is reported in ``problems`` and does not end the campaign.

    Args:
        kept: folder that persists from call to call.
        out: output folder: ``results.jsonl`` (the records), ``log.txt`` (output of the stages), ``failures.txt`` and ``summary.txt``.

    Raises:
        OSError: One of the folders cannot be created.
    """

    def __init__(self, kept: Path, out: Path) -> None:
        self.kept, self.out = kept, out
        self._cut: set[str] = set()
        """Files with a possibly incomplete last line."""
        self.problems: list[str] = []
        """One line for each file that could not be read or written."""
        for folder in (kept, out):
            folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            with suppress(OSError):  # a file that cannot be removed cannot be written either, which is reported then
                (out / name).unlink(missing_ok=True)

    def records(self) -> list[Record]:
        """Return the records of earlier calls. A truncated line is removed from the file, so that nothing is appended to it."""
        try:
            records = read(self.kept / RESULTS)
            if records:
                self.replace_records(records)
            return records
        except (OSError, TypeError, ValueError) as error:
            self._problem(f"FAILED {self.kept / RESULTS} cannot be read: {error}")
            return []

    def append(self, name: str, text: str) -> None:
        """Append to a file."""
        self._write(name, f"\n{text}" if name in self._cut else text, "a")

    def replace(self, name: str, text: str) -> None:
        """Replace a file."""
        self._write(name, text, "w")

    def replace_records(self, records: Iterable[Record]) -> None:
        """Replace the file of records."""
        self.replace(RESULTS, "".join(record.line() + "\n" for record in records))

    def copy(self) -> None:
        """Update the copies. Files that are only appended to are copied if their size changed."""
        for name in FILES:
            source, target = self.kept / name, self.out / name
            try:
                if source.is_file() and (name not in (RESULTS, LOG) or _size(target) != min(_size(source), FILE_LIMIT)):
                    target.write_bytes(_end(source))
            except OSError as error:
                self._problem(f"FAILED {target} cannot be written: {error.strerror}")

    def _write(self, name: str, text: str, mode: str) -> None:
        try:
            with (self.kept / name).open(mode) as file:
                file.write(text)
            self._cut.discard(name)
        except OSError as error:
            self._cut.add(name)
            self._problem(f"FAILED {self.kept / name} cannot be written: {error.strerror}")

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, _size(path) - FILE_LIMIT))
        return file.read()
