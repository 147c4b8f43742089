"""Rows of the results, as written to bench/results and printed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import table
from ..provenance import KERNELS, Provenance

__all__ = ["COLUMNS", "KEY", "Row", "printed", "write"]


@dataclass(frozen=True)
class Row:
    """Result of one provider for one case, with its provenance. Values that were not measured are None."""

    kernel: str
    variant: str
    mode: str
    size: str
    dtype: str
    layout: str
    provider: str
    status: str
    """"ok", possibly followed by the omitted results; else "not installed: …", "wrong: …" or "failed: …", without times."""
    error: float | None = None
    """Largest relative error ‖result − reference‖ / ‖reference‖ of all results and gradients."""
    median_us: float | None = None
    q20_us: float | None = None
    q80_us: float | None = None
    timed: str = ""
    """How time was measured. "wall clock" on a CPU. On a GPU the device time: "graph replay", or "behind a sleep", which hides the launch
    overhead, with the reason why there is no graph; or "with the host's time" if the launch overhead cannot be hidden."""
    calls: int | None = None
    """Number of measured calls."""
    gb_per_s: float | None = None
    """Minimum memory traffic (see the kernel's file) divided by the median time."""
    share_of_copy: float | None = None
    """Relative to the bandwidth of a large copy in the same run; can exceed 1 if data is cached."""
    peak_memory_bytes: int | None = None
    """Peak allocation excluding the inputs; GPU only."""
    speedup_over_eager: float | None = None
    speedup_over_compile: float | None = None
    copy_gb_per_s: float | None = None
    provenance: Provenance = field(kw_only=True, metadata={"columns": KERNELS})

    @property
    def failed(self) -> bool:
        """Return whether the provider failed or gave wrong results."""
        return self.status.startswith(("wrong", "failed"))


COLUMNS = table.names(Row)
KEY = COLUMNS[: COLUMNS.index("status")]


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Merge rows (by column) into a CSV file; they replace earlier rows with the same case and provider."""
    new = {tuple(row[name] for name in KEY): {name: _text(row.get(name)) for name in COLUMNS} for row in rows}
    table.replace(path, COLUMNS, list(new.values()), KEY)


HEADER = ("mode", "provider", "median µs", "20–80 %", "timed", "GB/s", "of copy", "× eager", "× compile", "memory", "error", "")


def printed(measured: Sequence[Row]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return header and cells of a table for the terminal, without empty columns."""
    filled = [index for index, column in enumerate(zip(*map(_cells, measured), strict=True)) if any(column)]
    return [HEADER[index] for index in filled], [[_cells(row)[index] for index in filled] for row in measured]


def _cells(row: Row) -> Sequence[str]:
    return (
        row.mode,
        row.provider,
        _number(row.median_us),
        f"{_number(row.q20_us)}–{_number(row.q80_us)}" if row.median_us else "",
        "" if row.timed == "wall clock" else row.timed,
        _number(row.gb_per_s),
        "" if row.share_of_copy is None else f"{row.share_of_copy:.1%}",
        _number(row.speedup_over_eager),
        _number(row.speedup_over_compile),
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.1f} MiB",
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.status == "ok" else row.status,
    )


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
