"""Files that options name and cannot be written to: reported before the work is done."""

from pathlib import Path

from tests.bad_input.case import Case, case

RUN = {"run/summary.json": "{}"}
"""A finished run that is valid enough: a wrong output is reported first."""


def compares(name: str, plot: str, error: str) -> Case:
    return case(name, "compare", "run", "--out", plot, error=error, files=RUN)


def evaluates(name: str, metrics: str, error: str) -> Case:
    return case(name, "evaluate", "run", "--json", metrics, error=error, files=RUN)


CASES: list[Case] = [
    evaluates("a folder for metrics", "run", error="--json run is a folder, and must be a file"),
    evaluates("this folder for metrics", ".", error="--json . is a folder, and must be a file"),
    evaluates("the folder above for metrics", "..", error="--json .. is a folder, and must be a file"),
    case(
        "metrics in place of the weights",
        *("evaluate", "./weights.pt", "--json", "weights.pt"),
        error="--json weights.pt: would overwrite a file to evaluate",
        files={"weights.pt": b"weights"},
    ),
    evaluates("metrics in no folder", "none/metrics.json", error="--json none/metrics.json: there is no folder"),
    evaluates("metrics below a file", "run/summary.json/metrics.json", error="run/summary.json/metrics.json"),
    evaluates("metrics where nobody may write", "/proc/none/metrics.json", error="there is no folder /proc/none"),
    evaluates("a name too long for metrics", "a" * 300, error="File name too long"),
    case("a run that is given twice", "compare", "run", "./run", error="run is given twice", files=RUN),
    compares("a folder for a plot", "run", error="--out run is a folder, and must be a file"),
    compares("a plot in no folder", "none/plot.png", error="--out none/plot.png: there is no folder"),
    compares("a plot of no kind", "plot.foo", error="--out plot.foo: the suffix must be one of .png, .svg"),
    compares("a plot of no suffix", "plot", error="--out plot: the suffix must be one of .png, .svg"),
    compares("a plot of a suffix alone", ".png", error="--out .png: the suffix must be one of .png, .svg"),
    compares("a plot that is data", "plot.raw", error="--out plot.raw: the suffix must be one of .png, .svg"),
    compares("a name too long for a plot", "a" * 300 + ".png", error="File name too long"),
    case(
        "a symlink into no folder",
        *("compare", "run", "--out", "plot.png"),
        error="--out plot.png: there is no folder",
        files={**RUN, "plot.png": lambda path: Path(path).symlink_to("none/plot.png")},
    ),
    case("a folder for a run that is a file", "distill", "digits", "--out", "file", error="--out file is a file", files={"file": ""}),
    case("a run below a file", "distill", "digits", "--out", "file/run", error="--out file/run cannot be written", files={"file": ""}),
    case("a folder for a run that is taken", "distill", "digits", "--out", "run", error="--out run already exists", files=RUN),
    case("a name too long for a run", "distill", "digits", "--out", "a" * 300, error="File name too long"),
    case("a device for a run", "distill", "digits", "--out", "/dev/null", error="--out /dev/null is a file, and must be a folder"),
]
