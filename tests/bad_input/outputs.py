"""Files that options name and nothing can be written to: said before the work is done."""

from pathlib import Path

from tests.bad_input.case import Case, case

RUN = {"run/summary.json": "{}"}
"""Enough for a command to go on: what is wrong with the output is said first."""


def compares(name: str, picture: str, says: str) -> Case:
    return case(name, "compare", "run", "--out", picture, says=says, files=RUN)


def evaluates(name: str, figures: str, says: str) -> Case:
    return case(name, "evaluate", "run", "--json", figures, says=says, files=RUN)


CASES: list[Case] = [
    evaluates("a folder for figures", "run", says="--json run is a folder, and must be a file"),
    evaluates("this folder for figures", ".", says="--json . is a folder, and must be a file"),
    evaluates("the folder above for figures", "..", says="--json .. is a folder, and must be a file"),
    case(
        "figures in place of the weights",
        *("evaluate", "./weights.pt", "--json", "weights.pt"),
        says="--json weights.pt: would overwrite a file to evaluate",
        files={"weights.pt": b"weights"},
    ),
    evaluates("figures in no folder", "none/figures.json", says="--json none/figures.json: there is no folder"),
    evaluates("figures below a file", "run/summary.json/figures.json", says="run/summary.json/figures.json"),
    evaluates("figures where nobody may write", "/proc/none/figures.json", says="there is no folder /proc/none"),
    evaluates("a name too long for figures", "a" * 300, says="File name too long"),
    case("a run that is given twice", "compare", "run", "./run", says="run is given twice", files=RUN),
    compares("a folder for a picture", "run", says="--out run is a folder, and must be a file"),
    compares("a picture in no folder", "none/picture.png", says="--out none/picture.png: there is no folder"),
    compares("a picture of no kind", "picture.foo", says="--out picture.foo: the suffix must be one of .png, .svg"),
    compares("a picture of no suffix", "picture", says="--out picture: the suffix must be one of .png, .svg"),
    compares("a picture of a suffix alone", ".png", says="--out .png: the suffix must be one of .png, .svg"),
    compares("a picture that is data", "picture.raw", says="--out picture.raw: the suffix must be one of .png, .svg"),
    compares("a name too long for a picture", "a" * 300 + ".png", says="File name too long"),
    case(
        "a symlink into no folder",
        *("compare", "run", "--out", "picture.png"),
        says="--out picture.png: there is no folder",
        files={**RUN, "picture.png": lambda path: Path(path).symlink_to("none/picture.png")},
    ),
    case("a folder for a run that is a file", "distill", "digits", "--out", "file", says="--out file is a file", files={"file": ""}),
    case("a run below a file", "distill", "digits", "--out", "file/run", says="--out file/run cannot be written", files={"file": ""}),
    case("a folder for a run that is taken", "distill", "digits", "--out", "run", says="--out run already exists", files=RUN),
    case("a name too long for a run", "distill", "digits", "--out", "a" * 300, says="File name too long"),
    case("a device for a run", "distill", "digits", "--out", "/dev/null", says="--out /dev/null is a file, and must be a folder"),
]
