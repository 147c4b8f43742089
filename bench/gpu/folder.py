"""The files of a campaign: kept from call to call in one folder, and copied to another as they grow."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dfkd_fast.errors import DfkdError

from .records import Record, read

__all__ = ["Folder", "check_out"]

RESULTS, LOG, FAILURES, SUMMARY = FILES = ("results.jsonl", "log.txt", "failures.txt", "summary.txt")
FILE_LIMIT = 9_000_000  # bytes of a file's copy; of a longer one the end is kept


def check_out(folder: Path) -> None:
    """Check that copies may go to a folder: that what stands there under their names are older copies.

    Raises:
        DfkdError: it is the current folder, no folder, or holds files of others.
    """
    if folder.resolve() == Path.cwd():
        raise DfkdError(f"--out {str(folder)!r}: must be a folder of its own")
    if folder.exists() and not folder.is_dir():
        raise DfkdError(f"--out {folder}: is not a folder")
    try:
        ours = bool(read(folder / RESULTS))
    except (OSError, TypeError, ValueError):
        ours = False
    if not ours and (others := [name for name in FILES if (folder / name).is_file()]):
        raise DfkdError(f"--out {folder}: holds {others[0]}, which python -m bench gpu would replace")


class Folder:
    """Writes files. One that cannot be written is a trouble, and ends nothing: what it should hold is in the final table, too.

    Args:
        kept: from one call to the next.
        out: gets the copies: ``results.jsonl`` (the records), ``log.txt`` (what the stages printed), ``failures.txt`` and ``summary.txt``.

    Raises:
        OSError: one of the folders cannot be made.
    """

    def __init__(self, kept: Path, out: Path) -> None:
        self.kept, self.out = kept, out
        self._cut: set[str] = set()
        """Files whose last line may be incomplete."""
        self.troubles: list[str] = []
        """What could not be read or written, in a line each."""
        for folder in (kept, out):
            folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            with suppress(OSError):  # what cannot be removed cannot be written either, and that is said
                (out / name).unlink(missing_ok=True)

    def records(self) -> list[Record]:
        """Those of earlier calls. A line that was cut off leaves the file, so that nothing is appended to it."""
        try:
            records = read(self.kept / RESULTS)
            if records:
                self.replace_records(records)
            return records
        except (OSError, TypeError, ValueError) as error:
            self._trouble(f"FAILED {self.kept / RESULTS} cannot be read: {error}")
            return []

    def append(self, name: str, text: str) -> None:
        """Add to a file."""
        self._write(name, f"\n{text}" if name in self._cut else text, "a")

    def replace(self, name: str, text: str) -> None:
        """Write a file anew."""
        self._write(name, text, "w")

    def replace_records(self, records: Iterable[Record]) -> None:
        """Write the records anew."""
        self.replace(RESULTS, "".join(record.line() + "\n" for record in records))

    def copy(self) -> None:
        """Bring the copies up to date. What is only appended to is copied where its size has changed."""
        for name in FILES:
            source, target = self.kept / name, self.out / name
            try:
                if source.is_file() and (name not in (RESULTS, LOG) or _size(target) != min(_size(source), FILE_LIMIT)):
                    target.write_bytes(_end(source))
            except OSError as error:
                self._trouble(f"FAILED {target} cannot be written: {error.strerror}")

    def _write(self, name: str, text: str, mode: str) -> None:
        try:
            with (self.kept / name).open(mode) as file:
                file.write(text)
            self._cut.discard(name)
        except OSError as error:
            self._cut.add(name)
            self._trouble(f"FAILED {self.kept / name} cannot be written: {error.strerror}")

    def _trouble(self, text: str) -> None:
        if text not in self.troubles:
            self.troubles.append(text)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, _size(path) - FILE_LIMIT))
        return file.read()
