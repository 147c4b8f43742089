"""Pictures of the micro-benchmarks: how many times faster than eager each provider is."""

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

__all__ = ["draw"]

# Ours are filled and strong, the others open; colours that a colour-blind reader can tell apart.
OURS = {"reference": ("#999999", "o"), "numba": ("#d55e00", "o"), "triton": ("#d55e00", "D"), "cuda": ("#009e73", "s")}
OURS |= {"fused_ema": ("#cc79a7", "o")}
OTHERS = {"compile": ("#0072b2", "^"), "averaged_model": ("#e69f00", "v"), "model_ema_v3": ("#56b4e9", "<"), "liger": ("#e69f00", ">")}
OTHERS |= {"foreach_lerp": ("#000000", "x"), "flat_lerp": ("#000000", "+"), "apex": ("#e69f00", "P")}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def draw(path: Path) -> Iterator[Path]:
    """One picture a kernel, next to the CSV; yields their paths.

    Raises:
        DfkdError: the file is not one of ``python -m bench micro``, or has no time beside eager's.
        OSError: it cannot be read, or a picture not written.
    """
    measured = table.read(path)
    if not measured or not {"kernel", "provider", "speedup_over_eager"} <= measured[0].keys():
        raise DfkdError(f"{path}: must be a CSV written by python -m bench micro")
    compared = [row for row in measured if row["speedup_over_eager"] and row["provider"] != "eager"]
    if not compared:
        raise DfkdError(f"{path}: no provider was timed beside eager, so there is no speed-up to draw")
    for kernel in dict.fromkeys(row["kernel"] for row in compared):
        picture = path.with_name(f"{path.stem}-{kernel}.png")
        figure = _figure(kernel, [row for row in compared if row["kernel"] == kernel])
        with replacing(picture) as part:
            figure.savefig(part, dpi=120)
        yield picture


def _figure(kernel: str, found: Sequence[dict[str, str]]) -> Figure:
    """A panel a mode, a line a case, a mark a provider."""
    modes = [mode for mode in ("update", "forward", "backward", "full") if any(row["mode"] == mode for row in found)]
    cases = sorted({_case(row): None for row in found}, key=_by_size)
    figure = Figure(figsize=(3.5 + 3.2 * len(modes), 1.9 + 0.3 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _panel(axes, mode, cases, [row for row in found if row["mode"] == mode])
    panels[0].set_yticks(range(len(cases)), [" ".join(filter(None, case)) for case in cases])
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    marks: dict[str, Any] = {}
    for axes in panels:
        marks |= {label: mark for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [name for name in PROVIDERS if name in marks]
    figure.legend(
        [marks[name] for name in shown], shown, loc="outside lower center", ncols=min(len(shown), 2 + 2 * len(modes)), frameon=False
    )
    devices = ", ".join(dict.fromkeys(row["device"] for row in found))
    figure.suptitle(f"{kernel}: times as fast as eager PyTorch\n{devices}", fontsize=11)
    return figure


def _panel(axes: Axes, mode: str, cases: Sequence[tuple[str, ...]], found: Sequence[dict[str, str]]) -> None:
    place = {case: index for index, case in enumerate(cases)}
    for provider in PROVIDERS:
        points = [(float(row["speedup_over_eager"]), place[_case(row)]) for row in found if row["provider"] == provider]
        if points:
            colour, mark = (OURS | OTHERS)[provider]
            face = colour if provider in OURS else "none"
            axes.plot(*zip(*points, strict=True), linestyle="", marker=mark, color=colour, markerfacecolor=face, label=provider, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(title=mode, xscale="log")
    axes.set_xticks(TICKS)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    speeds = [float(row["speedup_over_eager"]) for row in found]
    axes.set_xlim(min(0.8, *speeds) / 1.2, max(1.25, *speeds) * 1.2)
    axes.grid(alpha=0.3)


def _case(row: dict[str, str]) -> tuple[str, ...]:
    layout = "" if row["layout"] == "contiguous" else row["layout"]
    return row["size"], row["dtype"], layout, row["variant"]


def _by_size(case: tuple[str, ...]) -> tuple[object, ...]:
    """By the number of elements, where a size is a shape."""
    parts = case[0].split("x")
    return math.prod(map(int, parts)) if all(map(str.isdecimal, parts)) else 0, *case
