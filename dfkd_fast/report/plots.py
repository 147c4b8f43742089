"""Plots of a run: generated samples, accuracy and loss curves."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from dfkd_fast.engine import Epoch
from dfkd_fast.files import replacing

__all__ = [
    "axis_name",
    "curves_as_svg",
    "literal_label",
    "plot_curves",
    "plot_samples_over_time",
    "read_samples",
    "save_figure",
    "save_samples",
    "spread",
]

MAX_LABEL = 60
"""Characters: a longer label would leave no space for the axes."""
LABEL_WIDTH = 36
"""Characters per line of an axis label."""
MAX_MARKERS = 60
"""Epochs up to which each one has a marker."""
STUDENT, GENERATOR = "#2a7de1", "#e07b28"
"""Colours that are legible on a light and on a dark page."""
INK = "#010203"
"""Stands for the text colour of the page in :func:`curves_as_svg`."""
LOSS_TITLES = {"student": "Student loss", "teacher": "Loss", "vae": "Replay loss: vae"}
"""Of the losses that are not terms of the generator's."""
AGREEMENT = "agreement with the teacher on generated samples"
DARK, LIGHT = "#16181d", "#d7dae0"


def literal_label(text: str) -> str:
    """Returns the text as a matplotlib label without mathtext, truncated to ``MAX_LABEL`` characters."""
    return (text if len(text) <= MAX_LABEL else f"{text[:MAX_LABEL]}…").replace("$", r"\$")


def axis_name(metric: str) -> str:
    """Returns the name of a metric, such as "top-1 accuracy", as an axis label."""
    return metric if metric == "mIoU" else metric[:1].upper() + metric[1:]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, or as PNG if it has none."""
    with replacing(path) as part, _without_glyph_warnings():
        figure.savefig(part, dpi=120, format=path.suffix[1:].lower() or "png", facecolor=figure.get_facecolor())


def save_samples(images: Tensor, mean: Sequence[float], std: Sequence[float], path: Path, label_maps: Sequence[Tensor] = ()) -> None:
    """Write a grid of generated images as a PNG file.

    Args:
        images: (N, C, H, W), normalised by ``mean`` and ``std``.
        mean, std: per-channel values.
        path: of the PNG file.
        label_maps: uint8 (N, 3, H, W) each, placed to the right of each image.
    """
    pixels = images.detach().cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = pixels.clamp(0, 1)
    if label_maps:
        pixels = torch.cat([pixels.expand(-1, 3, -1, -1), *(labels.cpu().float() / 255 for labels in label_maps)], dim=3)
    columns = max(1, math.isqrt(len(images) // (1 + len(label_maps))))
    grid = make_grid(pixels, nrow=columns, padding=1 + len(label_maps), pad_value=0.5)
    with replacing(path) as part:
        to_pil_image(grid).save(part)


def read_samples(path: Path, image_size: int, label_maps: int, count: int) -> list[list[Image.Image]]:
    """Returns the first ``count`` samples of a grid that :func:`save_samples` wrote: each image, followed by its label maps.

    Args:
        path: of the PNG file.
        image_size: height and width of an image in pixels.
        label_maps: how many there are per image.
        count: fewer are returned if the grid has fewer cells.

    Raises:
        OSError: the file cannot be read.
    """
    with Image.open(path) as file:
        grid = file.convert("RGB")
    padding = 1 + label_maps if grid.height > image_size else 0  # make_grid does not pad a single image
    width, height = (1 + label_maps) * image_size + padding, image_size + padding
    columns, rows = (grid.width - padding) // width, (grid.height - padding) // height
    corners = [(padding + column * width, padding + row * height) for row in range(rows) for column in range(columns)]
    return [
        [grid.crop((x + index * image_size, y, x + (index + 1) * image_size, y + image_size)) for index in range(1 + label_maps)]
        for x, y in corners[:count]
    ]


def spread(items: Sequence[int], count: int) -> list[int]:
    """Returns at most ``count`` items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def plot_samples_over_time(columns: Sequence[tuple[str, Sequence[Image.Image]]], rows: Sequence[str], path: Path) -> None:
    """Write a strip of samples on a dark background.

    Args:
        columns: a title, such as "epoch 5", and one image per row.
        rows: labels, one per row; empty strings for none.
        path: of the image file.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figure = Figure(figsize=(1.1 * len(columns) + 0.5, 1.1 * len(rows) + 0.3), layout=layout, facecolor=DARK)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns):
        axes[0, column].set_title(title, color=LIGHT, fontsize=9)
        for row, (label, image) in enumerate(zip(rows, images, strict=True)):
            axes[row, column].imshow(image)
            axes[row, column].set(xticks=[], yticks=[], frame_on=False)
            if column == 0:
                axes[row, column].set_ylabel(label, color=LIGHT, fontsize=9)
    save_figure(figure, path)


def plot_curves(
    epochs: Sequence[Epoch],
    teacher_accuracy: float | None,
    title: str,
    path: Path,
    metric: str = "top-1 accuracy",
    role: str = "student",
    calibrated: float | None = None,
) -> None:
    """Plot accuracy and losses over the epochs, each loss term on axes of its own.

    Args:
        epochs: of the training; those that were not evaluated have no point in the accuracy curve.
        teacher_accuracy: in percent, drawn as a dashed line; None where it was not evaluated.
        title: of the figure.
        path: of the image file.
        metric: what the accuracies are.
        role: of the trained network.
        calibrated: accuracy or agreement in percent of a quantized student before the first step, drawn as epoch 0.
    """
    evaluated = teacher_accuracy is not None or bool(_evaluated(epochs))
    terms = list(epochs[-1].losses) if epochs else []
    columns = 1 if len(terms) <= 1 else 2 if len(terms) in (2, 4) else 3
    rows = [terms[start : start + columns] for start in range(0, len(terms), columns)]
    heights = ([3.2] if evaluated else []) + [2.1] * len(rows)
    figure = Figure(figsize=(9.6 if columns == 3 else 7.5, sum(heights, start=0.4)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(literal_label(title))
    grid = figure.add_gridspec(max(1, len(heights)), columns, height_ratios=heights or [1])
    if evaluated:
        _plot_accuracy(figure.add_subplot(grid[0, :]), epochs, teacher_accuracy, metric, role, calibrated)
    for index, row in enumerate(rows, start=int(evaluated)):
        for column, term in enumerate(row):
            _plot_loss(figure.add_subplot(grid[index, column]), epochs, term)
    save_figure(figure, path)


def curves_as_svg(epochs: Sequence[Epoch], teacher_accuracy: float | None, metric: str, calibrated: float | None = None) -> list[str]:
    """Returns the panels of :func:`plot_curves` as inline SVG elements in the text colour of the page, the same for the same values."""
    panels = []
    style: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "dfkd_fast"}
    with matplotlib.rc_context(style):
        if teacher_accuracy is not None or _evaluated(epochs):
            panels.append(figure := Figure(figsize=(4.2, 2.8), layout="constrained"))
            _plot_accuracy(figure.add_subplot(), epochs, teacher_accuracy, metric, calibrated=calibrated)
        for term in epochs[-1].losses if epochs else ():
            panels.append(figure := Figure(figsize=(4.2, 2.8), layout="constrained"))
            _plot_loss(figure.add_subplot(), epochs, term)
        return [_as_svg(figure) for figure in panels]


def _as_svg(figure: Figure) -> str:
    text = io.StringIO()
    with _without_glyph_warnings():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Its size is the page's to decide.
    return re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)


def _plot_accuracy(
    axes: Axes,
    epochs: Sequence[Epoch],
    teacher_accuracy: float | None,
    metric: str,
    role: str = "student",
    calibrated: float | None = None,
) -> None:
    accuracies = _evaluated(epochs)
    if accuracies and calibrated is not None:
        accuracies.insert(0, (0, calibrated))
    if any(epoch.agreement is not None for epoch in epochs) and all(epoch.student_accuracy is None for epoch in epochs):
        metric = AGREEMENT
    if accuracies:
        label = f"{role} (last {accuracies[-1][1]:.2f} %)"
        axes.plot(*zip(*accuracies, strict=True), marker=_marker(accuracies), color=STUDENT, label=label)
    unaveraged = [(epoch.number, epoch.unaveraged_accuracy) for epoch in epochs if epoch.unaveraged_accuracy is not None]
    if unaveraged:
        axes.plot(*zip(*unaveraged, strict=True), color=STUDENT, alpha=0.5, linewidth=1, label="student (no EMA)")
    if teacher_accuracy is not None:
        ink = matplotlib.rcParams["text.color"]
        axes.axhline(teacher_accuracy, color=ink, linestyle="--", linewidth=1.2, label=f"teacher ({teacher_accuracy:.2f} %)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2, fontsize="small")
    axes.set_ylabel(textwrap.fill(f"{axis_name(metric)} (%)", LABEL_WIDTH), fontsize="medium" if len(metric) <= LABEL_WIDTH else "small")
    _finish(axes)


def _plot_loss(axes: Axes, epochs: Sequence[Epoch], term: str) -> None:
    values = [(epoch.number, epoch.losses[term]) for epoch in epochs if term in epoch.losses]
    title = LOSS_TITLES.get(term, f"Generator loss: {term}")
    if term == "bn_moments" and (relative := epochs[-1].relative_bn_moments) is not None:
        title += f"\n({relative:.2g} relative)"  # in one line it would be wider than the panel
    axes.plot(*zip(*values, strict=True), marker=_marker(values), color=STUDENT if term == "student" else GENERATOR)
    axes.set_title(literal_label(title), fontsize="medium")
    axes.set_ylabel("Loss")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=matplotlib.rcParams["text.color"], alpha=0.15)


def _evaluated(epochs: Sequence[Epoch]) -> list[tuple[int, float]]:
    """Returns epochs and accuracies, or agreements where there is no accuracy."""
    values = [(epoch.number, epoch.agreement if epoch.student_accuracy is None else epoch.student_accuracy) for epoch in epochs]
    return [(number, value) for number, value in values if value is not None]


def _marker(points: Sequence[tuple[int, float]]) -> str:
    return "." if len(points) <= MAX_MARKERS else ""


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        yield
