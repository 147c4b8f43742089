"""Files that options name and nothing can be written to: result before the work is done."""

from pathlib import Path

from tests.bad_input.case import Case, case

RUN = {"run/summary.json": "{}"}
"""Enough for a command to go on: what is wrong with the output is result first."""


def compares(name: str, picture: str, error: str) -> Case:
    return case(name, "compare", "run", "--out", picture, error=error, files=RUN)


def evaluates(name: str, figures: str, error: str) -> Case:
    return case(name, "evaluate", "run", "--json", figures, error=error, files=RUN)


CASES: list[Case] = [
    evaluates("a folder for figures", "run", error="--json run is a folder, and must be a file"),
    evaluates("this folder for figures", ".", error="--json . is a folder, and must be a file"),
    evaluates("the folder above for figures", "..", error="--json .. is a folder, and must be a file"),
    case(
        "figures in place of the weights",
        *("evaluate", "./weights.pt", "--json", "weights.pt"),
        error="--json weights.pt: would overwrite a file to evaluate",
        files={"weights.pt": b"weights"},
    ),
    evaluates("figures in no folder", "none/figures.json", error="--json none/figures.json: there is no folder"),
    evaluates("figures below a file", "run/summary.json/figures.json", error="run/summary.json/figures.json"),
    evaluates("figures where nobody may write", "/proc/none/figures.json", error="there is no folder /proc/none"),
    evaluates("a name too long for figures", "a" * 300, error="File name too long"),
    case("a run that is given twice", "compare", "run", "./run", error="run is given twice", files=RUN),
    compares("a folder for a picture", "run", error="--out run is a folder, and must be a file"),
    compares("a picture in no folder", "none/picture.png", error="--out none/picture.png: there is no folder"),
    compares("a picture of no kind", "picture.foo", error="--out picture.foo: the suffix must be one of .png, .svg"),
    compares("a picture of no suffix", "picture", error="--out picture: the suffix must be one of .png, .svg"),
    compares("a picture of a suffix alone", ".png", error="--out .png: the suffix must be one of .png, .svg"),
    compares("a picture that is data", "picture.raw", error="--out picture.raw: the suffix must be one of .png, .svg"),
    compares("a name too long for a picture", "a" * 300 + ".png", error="File name too long"),
    case(
        "a symlink into no folder",
        *("compare", "run", "--out", "picture.png"),
        error="--out picture.png: there is no folder",
        files={**RUN, "picture.png": lambda path: Path(path).symlink_to("none/picture.png")},
    ),
    case("a folder for a run that is a file", "distill", "digits", "--out", "file", error="--out file is a file", files={"file": ""}),
    case("a run below a file", "distill", "digits", "--out", "file/run", error="--out file/run cannot be written", files={"file": ""}),
    case("a folder for a run that is taken", "distill", "digits", "--out", "run", error="--out run already exists", files=RUN),
    case("a name too long for a run", "distill", "digits", "--out", "a" * 300, error="File name too long"),
    case("a device for a run", "distill", "digits", "--out", "/dev/null", error="--out /dev/null is a file, and must be a folder"),
]
