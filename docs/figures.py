"""Draws the figures of README.md into docs/images: ``python docs/figures.py``. Speed is drawn by ``python -m bench plot --headline``."""

import ast
import re
import tomllib
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
CAMVID = ROOT / "bench" / "results" / "camvid-cpu" / "samples.png"
GREY, OBJECTIVE, REPLAY, UPDATE = "#57606a", "#bc4c00", "#1a7f37", "#0969da"
TILE, GAP = 128, 3
"""Pixels of an image in CAMVID's grid, and between its cells of image, teacher's and student's label map."""


def main() -> None:
    """Write all figures."""
    IMAGES.mkdir(exist_ok=True)
    # Text stays text, and neither a date nor random ids change the file from one run to the next.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loop", "font.family": "sans-serif"}):
        loop().savefig(IMAGES / "loop.svg", metadata={"Date": None})
    FigureCanvasAgg(camvid := samples())
    camvid.savefig(IMAGES / "camvid.png", dpi=90)
    for name, svg in badges().items():
        (IMAGES / f"{name}.svg").write_text(svg)


def badges() -> dict[str, str]:
    """Returns the badges as SVG by file name, with the values of pyproject.toml and of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = re.search(r'^__version__ = (".+")$', (ROOT / "dfkd_fast" / "__init__.py").read_text(), re.MULTILINE)
    assert version is not None
    torch = next(requirement for requirement in project["dependencies"] if requirement.startswith("torch>"))
    values = {
        "version": ast.literal_eval(version[1]),
        "python": project["requires-python"].replace(">=", "≥ "),
        "pytorch": torch.removeprefix("torch").replace(">=", "≥ "),
        "licence": project["license"],
    }
    labels = {"version": "version", "python": "Python", "pytorch": "PyTorch", "licence": "licence"}
    return {name: _badge(labels[name], value) for name, value in values.items()}


def _badge(label: str, value: str) -> str:
    left, right = (7 * len(text) + 12 for text in (label, value))
    text = 'y="14" fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" aria-label="{label}: {value}">
<title>{label}: {value}</title>
<clipPath id="r"><rect width="{left + right}" height="20" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{left}" height="20" fill="#57606a"/><rect x="{left}" width="{right}" height="20" fill="{UPDATE}"/></g>
<text x="{left / 2:g}" {text}>{label}</text><text x="{left + right / 2:g}" {text}>{value}</text>
</svg>
"""


def loop() -> Figure:
    """Returns the diagram of the training loop, with the three axes in colour."""
    figure = Figure(figsize=(9.6, 3.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-3, 93), ylim=(1, 40))
    axes.axis("off")
    _box(axes, 12, 25, 15, 7, "Generator", "z → image", GREY)
    _box(axes, 12, 9, 15, 7, "Replay source", "EMA generator,\nmemory bank or VAE", REPLAY)
    _box(axes, 34, 17, 12, 7, "Batch", "fresh + replayed", GREY)
    _box(axes, 54, 25, 15, 7, "Teacher", "frozen", GREY)
    _box(axes, 54, 9, 15, 7, "Student", "smaller", GREY)
    _box(axes, 77, 17, 15, 7, "Discrepancy", "L1, KL or JS of logits", GREY)
    axes.text(3.5, 28.5, "z ~ N(0, I)", ha="center", va="center", fontsize=10, color=GREY)
    for begin, end in (((7.5, 28.5), (12, 28.5)), ((27, 28.5), (34, 22)), ((27, 12.5), (34, 19))):
        _arrow(axes, begin, end, GREY)
    for begin, end in (((46, 22), (54, 28.5)), ((46, 19), (54, 12.5)), ((69, 28.5), (77, 22)), ((69, 12.5), (77, 19))):
        _arrow(axes, begin, end, GREY)
    _arrow(axes, (19.5, 25), (19.5, 16), REPLAY, dashed=True)
    axes.text(20.3, 20.5, "follows", ha="left", va="center", fontsize=9, color=REPLAY)
    _route(axes, [(84.5, 24), (84.5, 36), (19.5, 36), (19.5, 32)], OBJECTIVE)
    axes.text(52, 37, "generator step: maximize the discrepancy (objective)", ha="center", va="bottom", fontsize=10, color=OBJECTIVE)
    _route(axes, [(84.5, 17), (84.5, 5), (61.5, 5), (61.5, 9)], UPDATE)
    axes.text(73, 4, "student step: minimize it (update)", ha="center", va="top", fontsize=10, color=UPDATE)
    axes.text(19.5, 7.5, "what the student must not forget (replay)", ha="center", va="top", fontsize=10, color=REPLAY)
    return figure


def samples() -> Figure:
    """Returns a strip of generated images of a CamVid run with the label maps that teacher and student predict for them."""
    grid = Image.open(CAMVID).convert("RGB")
    cells = [(column, row) for row in range(6) for column in range(2)]
    chosen = [cells[index] for index in (1, 3, 5, 7, 8, 10)]
    figure = Figure(figsize=(9.6, 4.9), facecolor="white")
    panels = figure.subplots(
        3, len(chosen), gridspec_kw={"wspace": 0.04, "hspace": 0.04, "left": 0.1, "right": 0.99, "top": 0.99, "bottom": 0.01}
    )
    for number, (column, row) in enumerate(chosen):
        left, top = GAP + column * (3 * TILE + GAP), GAP + row * (TILE + GAP)
        for part, name in enumerate(("generated\nimage", "teacher's\nlabel map", "student's\nlabel map")):
            axes = panels[part, number]
            axes.imshow(grid.crop((left + part * TILE, top, left + (part + 1) * TILE, top + TILE)))
            axes.set(xticks=[], yticks=[])
            if number == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    return figure


def _box(axes: Axes, left: float, bottom: float, width: float, height: float, title: str, text: str, color: str) -> None:
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, "round,pad=0,rounding_size=1", facecolor="#f6f8fa", edgecolor=color, linewidth=1.5)
    )
    lines = text.count("\n")
    axes.text(
        left + width / 2,
        bottom + height * (0.72 + 0.06 * lines),
        title,
        ha="center",
        va="center",
        fontsize=11,
        fontweight="bold",
        color="#1f2328",
    )
    axes.text(
        left + width / 2,
        bottom + height * (0.32 - 0.02 * lines),
        text,
        ha="center",
        va="center",
        fontsize=8.5,
        color=GREY,
        linespacing=1.05,
    )


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], color: str, *, dashed: bool = False) -> None:
    style = "--" if dashed else "-"
    axes.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=12, shrinkA=0, shrinkB=0, color=color, linestyle=style, linewidth=1.4)
    )


def _route(axes: Axes, points: list[tuple[float, float]], color: str) -> None:
    """A line with corners that ends in an arrow."""
    axes.plot(*zip(*points[:-1], strict=True), color=color, linewidth=1.8, solid_joinstyle="round")
    _arrow(axes, points[-2], points[-1], color)


if __name__ == "__main__":
    main()
