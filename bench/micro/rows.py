"""The rows of the results: what a file in bench/results holds, and what is printed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import table
from ..provenance import KERNELS, Provenance

__all__ = ["COLUMNS", "KEY", "Row", "printed", "write"]


@dataclass(frozen=True)
class Row:
    """One provider of one case, and where its figures come from. What was not measured is None."""

    kernel: str
    variant: str
    mode: str
    size: str
    dtype: str
    layout: str
    provider: str
    status: str
    """"ok", perhaps with what the provider leaves out; else "not installed: …", "wrong: …" or "failed: …", without times."""
    error: float | None = None
    """The largest of ‖result − oracle‖ / ‖oracle‖ over all results and gradients."""
    median_us: float | None = None
    q20_us: float | None = None
    q80_us: float | None = None
    timed: str = ""
    """"wall clock" on a CPU. On a GPU the device's time: "graph replay", or "behind a sleep" that hides the host's time, with the reason
    why there is no graph; or "with the host's time", where the host cannot be hidden."""
    calls: int | None = None
    """How many were measured."""
    gb_per_s: float | None = None
    """The floor of bytes (see the kernel's file) over the median."""
    share_of_copy: float | None = None
    """Of the bandwidth of a large copy in the same run; above 1 where caches serve."""
    peak_memory_bytes: int | None = None
    """Beyond the inputs; on a GPU."""
    speedup_over_eager: float | None = None
    speedup_over_compile: float | None = None
    copy_gb_per_s: float | None = None
    provenance: Provenance = field(kw_only=True, metadata={"columns": KERNELS})

    @property
    def red(self) -> bool:
        """Whether the check failed."""
        return self.status.startswith(("wrong", "failed"))


COLUMNS = table.names(Row)
KEY = COLUMNS[: COLUMNS.index("status")]


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Take rows, by column, into a file; they replace those of the same case and provider, also earlier ones among themselves."""
    new = {tuple(row[name] for name in KEY): {name: _text(row.get(name)) for name in COLUMNS} for row in rows}
    table.replace(path, COLUMNS, list(new.values()), KEY)


HEADER = ("mode", "provider", "median µs", "20–80 %", "timed", "GB/s", "of copy", "× eager", "× compile", "memory", "error", "")


def printed(measured: Sequence[Row]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Header and cells of a table for the terminal, without empty columns."""
    filled = [index for index, column in enumerate(zip(*map(_cells, measured), strict=True)) if any(column)]
    return [HEADER[index] for index in filled], [[_cells(row)[index] for index in filled] for row in measured]


def _cells(row: Row) -> Sequence[str]:
    return (
        row.mode,
        row.provider,
        _figure(row.median_us),
        f"{_figure(row.q20_us)}–{_figure(row.q80_us)}" if row.median_us else "",
        "" if row.timed == "wall clock" else row.timed,
        _figure(row.gb_per_s),
        "" if row.share_of_copy is None else f"{row.share_of_copy:.1%}",
        _figure(row.speedup_over_eager),
        _figure(row.speedup_over_compile),
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.1f} MiB",
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.status == "ok" else row.status,
    )


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
