"""Plots of the micro-benchmarks: the speedup of each provider over eager."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from dfkd_fast.errors import DfkdError
from dfkd_fast.files import replacing

from . import table
from .micro import PROVIDERS

__all__ = ["plot"]

# This project's providers have filled markers, the others open ones; the colors are the colorblind-safe ones of Okabe and Ito.
OURS = {"reference": ("#999999", "o"), "numba": ("#d55e00", "o"), "triton": ("#d55e00", "D"), "cuda": ("#009e73", "s")}
OURS |= {"fused_ema": ("#cc79a7", "o")}
OTHERS = {"compile": ("#0072b2", "^"), "averaged_model": ("#e69f00", "v"), "model_ema_v3": ("#56b4e9", "<"), "liger": ("#e69f00", ">")}
OTHERS |= {"foreach_lerp": ("#000000", "x"), "flat_lerp": ("#000000", "+"), "apex": ("#e69f00", "P")}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def plot(path: Path) -> Iterator[Path]:
    """Write a PNG for each kernel beside a CSV of ``python -m bench micro``; yields the PNGs' paths.

    Raises:
        DfkdError: The file is not such a CSV, or no provider in it was timed beside eager.
        OSError: The CSV cannot be read, or a PNG cannot be written.
    """
    measured = table.read(path)
    if not measured or not {"kernel", "provider", "speedup_over_eager"} <= measured[0].keys():
        raise DfkdError(f"{path}: must be a CSV written by python -m bench micro")
    compared = [row for row in measured if row["speedup_over_eager"] and row["provider"] != "eager"]
    if not compared:
        raise DfkdError(f"{path}: no provider was timed beside eager, so there is no speedup to plot")
    for kernel in dict.fromkeys(row["kernel"] for row in compared):
        target = path.with_name(f"{path.stem}-{kernel}.png")
        figure = _figure(kernel, [row for row in compared if row["kernel"] == kernel])
        with replacing(target) as part:
            figure.savefig(part, dpi=120)
        yield target


def _figure(kernel: str, rows: Sequence[dict[str, str]]) -> Figure:
    """A panel per mode, a line per case, a marker per provider."""
    modes = [mode for mode in ("update", "forward", "backward", "full") if any(row["mode"] == mode for row in rows)]
    cases = sorted({_case(row): None for row in rows}, key=_by_size)
    figure = Figure(figsize=(3.5 + 3.2 * len(modes), 1.9 + 0.3 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _panel(axes, mode, cases, [row for row in rows if row["mode"] == mode])
    panels[0].set_yticks(range(len(cases)), [" ".join(filter(None, case)) for case in cases])
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {label: marker for marker, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [name for name in PROVIDERS if name in handles]
    figure.legend(
        [handles[name] for name in shown], shown, loc="outside lower center", ncols=min(len(shown), 2 + 2 * len(modes)), frameon=False
    )
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    figure.suptitle(f"{kernel}: speedup over eager PyTorch\n{devices}", fontsize=11)
    return figure


def _panel(axes: Axes, mode: str, cases: Sequence[tuple[str, ...]], rows: Sequence[dict[str, str]]) -> None:
    positions = {case: index for index, case in enumerate(cases)}
    for provider in PROVIDERS:
        points = [(float(row["speedup_over_eager"]), positions[_case(row)]) for row in rows if row["provider"] == provider]
        if points:
            color, marker = (OURS | OTHERS)[provider]
            face = color if provider in OURS else "none"
            axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, color=color, markerfacecolor=face, label=provider, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(title=mode, xscale="log", xlabel="Speedup over eager (×)")
    axes.set_xticks(TICKS)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    speeds = [float(row["speedup_over_eager"]) for row in rows]
    axes.set_xlim(min(0.8, *speeds) / 1.2, max(1.25, *speeds) * 1.2)
    axes.grid(alpha=0.3)


def _case(row: dict[str, str]) -> tuple[str, ...]:
    layout = "" if row["layout"] == "contiguous" else row["layout"]
    return row["size"], row["dtype"], layout, row["variant"]


def _by_size(case: tuple[str, ...]) -> tuple[object, ...]:
    """Sort key: the number of elements, if the size is a shape."""
    parts = case[0].split("x")
    return math.prod(map(int, parts)) if all(map(str.isdecimal, parts)) else 0, *case
