"""Pictures of a run: what the generator makes, and how the student fared."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from dfkd_fast.engine import Epoch
from dfkd_fast.files import replacing

__all__ = ["draw_curves", "draw_samples", "plain", "save_figure"]

LONGEST_LABEL = 60
"""Characters: a longer one would leave no room for what it labels."""


def plain(text: str) -> str:
    """A label that is drawn as it is, cut where it is long: matplotlib takes what stands between dollars for mathematics."""
    return (text if len(text) <= LONGEST_LABEL else f"{text[:LONGEST_LABEL]}…").replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file, as its suffix says; as PNG where it has none, as a device."""
    with replacing(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        figure.savefig(part, dpi=120, format=path.suffix[1:].lower() or "png")


def draw_samples(images: Tensor, mean: Sequence[float], std: Sequence[float], path: Path, beside: Sequence[Tensor] = ()) -> None:
    """A square grid of generated images (N, C, H, W), taken back from the teacher's normalised space.

    Args:
        images: normalised by ``mean`` and ``std``.
        mean, std: a number a channel.
        path: of the PNG.
        beside: pictures that belong to them, uint8 (N, 3, H, W) each, put to the right of each image.
    """
    pixels = images.detach().cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = pixels.clamp(0, 1)
    if beside:
        pixels = torch.cat([pixels.expand(-1, 3, -1, -1), *(picture.cpu().float() / 255 for picture in beside)], dim=3)
    columns = max(1, math.isqrt(len(images) // (1 + len(beside))))
    grid = make_grid(pixels, nrow=columns, padding=1 + len(beside), pad_value=0.5)
    with replacing(path) as part:
        to_pil_image(grid).save(part)


def draw_curves(epochs: Sequence[Epoch], teacher_accuracy: float | None, title: str, path: Path, metric: str = "top-1 accuracy") -> None:
    """Accuracy, or what ``metric`` says, over epochs with the teacher as a line, where there is any, and the losses below."""
    evaluated = [(epoch.number, epoch.student_accuracy) for epoch in epochs if epoch.student_accuracy is not None]
    tested = bool(evaluated) or teacher_accuracy is not None
    figure = Figure(figsize=(7, 6 if tested else 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if tested else 1, 1, sharex=True, squeeze=False)[:, 0]
    losses = panels[-1]
    panels[0].set_title(plain(title))
    if tested:
        panels[0].set_ylabel(f"{metric} (%)")
        if evaluated:
            panels[0].plot(*zip(*evaluated, strict=True), marker=".", label="student")
        if teacher_accuracy is not None:
            panels[0].axhline(teacher_accuracy, color="black", linestyle="--", linewidth=1, label="teacher")
        panels[0].legend(loc="lower right")
    for name in epochs[-1].losses if epochs else ():
        losses.plot([epoch.number for epoch in epochs], [epoch.losses[name] for epoch in epochs], marker=".", label=name)
    losses.set(xlabel="epoch", ylabel="loss (mean over the epoch)")
    if epochs:
        losses.legend(loc="upper right")
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        axes.grid(alpha=0.3)
    save_figure(figure, path)
