"""Plot of the predictions: a bar for each step, stacked by what its kernels do."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dfkd_fast.files import replacing

from .cost import KINDS
from .rows import CASE

__all__ = ["plot"]


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write a PNG with a bar for each case and kind of step.

    Args:
        rows: rows of a CSV of :class:`~bench.model.rows.Row`.
        path: file to write.
    """
    bars: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        bar = bars.setdefault((*(row[name] for name in CASE), row["phase"]), dict.fromkeys(KINDS, 0.0))
        bar[row["kind"]] += float(row["ms"]) / int(row["steps"])
    everywhere = {row["precision"] + ", " + _device(row["device"]) for row in rows}
    figure = Figure(figsize=(10, 1.4 + 0.32 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for kind, color in zip(KINDS, mpl.colormaps["tab20"].colors, strict=False):  # type: ignore[attr-defined]
        widths = [bar[kind] for bar in bars.values()]
        if not any(widths):
            continue
        axes.barh(range(len(bars)), widths, left=left, color=color, label=kind)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for position, end in enumerate(left):
        axes.text(end, position, f" {end:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [_label(*bar, full=len(everywhere) > 1) for bar in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * max(left))
    axes.set_xlabel("predicted ms per step" + (f", {everywhere.pop()}" if len(everywhere) == 1 else ""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def _label(recipe: str, settings: str, batch_size: str, precision: str, device: str, phase: str, *, full: bool) -> str:
    case = f"{recipe} ({settings})" if settings else recipe
    where = f", {precision}, {_device(device)}" if full else ""
    return f"{case}, batch size {batch_size}{where}: {phase}"


def _device(name: str) -> str:
    return name.removesuffix(" (model)")
