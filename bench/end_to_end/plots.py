"""Plots of the rows: a bar chart of every contender, and the headline figure with the engine and its peers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dfkd_fast.files import replacing

from .contenders import PEERS, is_engine
from .rows import CASE, SPEEDUPS

__all__ = ["headline_cases", "plot", "plot_headline"]

Row = Mapping[str, str]

GREY, DARK_GREY, BLUE, ORANGE = "#9aa0a6", "#6b7278", "#4e79a7", "#e8710a"
ENGINE = "engine"
HEADLINE = {"plain + malloc reuse": GREY, "plain compiled + malloc reuse": DARK_GREY, ENGINE: ORANGE}
"""The contenders of the headline figure, and their colors."""
HEADLINE_LABELS = {"plain + malloc reuse": "plain + malloc reuse (eager fp32)", ENGINE: "dfkd_fast engine"}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with a panel for each case and a bar for each contender: seconds per iteration, and speedup over the strongest peer.

    The peers come first, in grey, then the ladder of the engine's features, and last the engine.
    """
    cases = _by_case(rows)
    figure = Figure(figsize=(10, 0.6 + sum(1 + 0.27 * len(case) for case in cases.values())), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=[3 + len(case) for case in cases.values()])[:, 0]
    for axes, case in zip(panels, cases.values(), strict=True):
        _panel(axes, case)
    legend = {"plain PyTorch loop": GREY, "dfkd_fast, features enabled one after another": BLUE, "dfkd_fast engine": ORANGE}
    figure.legend([Patch(color=color) for color in legend.values()], legend, loc="outside lower center", ncols=3, frameon=False)
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def _panel(axes: Axes, case: Sequence[Row]) -> None:
    case = sorted(case, key=_position)
    peer = max((row["contender"] for row in case if row["contender"] in SPEEDUPS), key=list(SPEEDUPS).index, default=None)
    seconds = [float(row["seconds_per_iteration"]) for row in case]
    axes.barh(range(len(case)), seconds, color=[_color(row) for row in case])
    for position, (row, value) in enumerate(zip(case, seconds, strict=True)):
        speedup = row[SPEEDUPS[peer]] if peer else ""
        text = f" {value:#.3g}" + (f" ({float(speedup):.2f}×)" if speedup else "")
        axes.text(value, position, text, va="center", fontsize=8, fontweight="bold" if is_engine(row["contender"]) else "normal")
    axes.set_yticks(range(len(case)), [_label(row) for row in case], fontsize=9)
    axes.set_ylim(len(case) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(seconds))
    axes.set_xlabel("s/iteration" + (f" (speedup over {peer})" if peer else ""))
    axes.set_title("{recipe}, batch size {batch_size}, {precision}, {device}".format(**case[0]), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def headline_cases(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Return, for each case that has all contenders of the headline figure, their rows by name; the engine's name is ``engine``."""
    cases = []
    for case in _by_case(rows).values():
        named = {ENGINE if is_engine(row["contender"]) else row["contender"]: row for row in case}
        if named.keys() >= HEADLINE.keys():
            cases.append({name: named[name] for name in HEADLINE})
    return cases


def plot_headline(rows: Sequence[Row], path: Path) -> None:
    """Write an SVG with a group of bars for each of :func:`headline_cases`: the engine beside plain and plain compiled, with malloc reuse.

    Args:
        rows: rows of one or several CSVs; at least one case must have all contenders of the figure.
        path: file to write. Equal rows give an equal file.
    """
    with mpl.rc_context({"svg.hashsalt": "headline"}), replacing(path) as part:  # the names of the SVG's elements would be random
        _headline(rows).savefig(part, format="svg", metadata={"Date": None}, facecolor="white")


def _headline(rows: Sequence[Row]) -> Figure:
    cases = headline_cases(rows)
    devices = list(dict.fromkeys(case[ENGINE]["device"] for case in cases))
    figure = Figure(figsize=(600 / 72, 225 / 72), layout="constrained")  # 800 × 300 pixels in a browser
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for index, (name, color) in enumerate(HEADLINE.items()):
        seconds = [float(case[name]["seconds_per_iteration"]) for case in cases]
        positions = [case + 0.27 * (index - 1) for case in range(len(cases))]
        axes.bar(positions, seconds, width=0.25, color=color, label=HEADLINE_LABELS.get(name, name))
        for position, value, case in zip(positions, seconds, cases, strict=True):
            text = f"{value:.2f}"
            if name == ENGINE:
                text += f"\n{float(case[name][SPEEDUPS['plain compiled + malloc reuse']]):.2f}×"
            axes.text(position, value, text, ha="center", va="bottom", fontsize=8, fontweight="bold" if name == ENGINE else "normal")
    axes.set_xticks(range(len(cases)), [_case_label(case[ENGINE], len(devices) > 1) for case in cases], fontsize=9)
    axes.set_ylabel("s/iteration (lower is better)", fontsize=9)
    axes.set_ylim(0, 1.15 * max(float(row["seconds_per_iteration"]) for case in cases for row in case.values()))
    axes.tick_params(axis="y", labelsize=8)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    device = f" on {devices[0]}" if len(devices) == 1 else ""
    figure.suptitle(f"Time per iteration{device}, and speedup over plain compiled + malloc reuse", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(HEADLINE), frameon=False, fontsize=9)
    return figure


def _case_label(row: Row, with_device: bool) -> str:
    label = "{recipe}, {precision}\nbatch size {batch_size}".format(**row)
    return f"{label}\n{row['device']}" if with_device else label


def _by_case(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE), []).append(row)
    return cases


def _position(row: Row) -> int:
    """Peers first, then the features in the order of the rows, then the engine; what runs on top of the engine comes last."""
    name = row["contender"]
    if name in PEERS:
        return PEERS.index(name)
    return len(PEERS) + (name == "+ torch.compile" or name.startswith("engine, compiled")) * 2 + is_engine(name)


def _color(row: Row) -> str:
    return GREY if row["contender"] in PEERS else ORANGE if is_engine(row["contender"]) else BLUE


def _label(row: Row) -> str:
    """The contender; an eager plain loop is in float32 whatever the precision of the case."""
    eager = row["contender"] in ("plain", "plain + malloc reuse")
    return f"{row['contender']} (fp32)" if eager and row["precision"] != "fp32" else row["contender"]
