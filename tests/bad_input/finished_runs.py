"""Folders that ``compare`` finds no finished run in, or one that was damaged since."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case, case

COLUMNS = ("last", "best", "mean", "variance", "settled_mean", "settled_variance", "largest_drop", "fraction_retained")
STATISTICS = dict.fromkeys(
    ("last", "best", "mean", "variance", "settled_mean", "settled_variance", "largest_drop", "fraction_retained"), 1.0
)
SUMMARY: dict[str, Any] = {"recipe": "digits", "seed": 0, "teacher_accuracy": 98.0, "retention": STATISTICS}
WHOLE = json.dumps(SUMMARY)
METRICS = '{"epoch": 1, "student_accuracy": 50.0}\n'
Content = str | bytes | Callable[[Path], object]


def folder(name: str, error: str, summary: Content = WHOLE, metrics: Content = METRICS) -> Case:
    """A run's folder with these files."""
    return case(name, "compare", "run", error=error, files={"run/summary.json": summary, "run/metrics.jsonl": metrics})


def with_summary(name: str, error: str, **changes: Any) -> Case:
    """A run's folder whose summary has other values."""
    return folder(name, error, json.dumps(SUMMARY | changes))


CASES: list[Case] = [
    case("a run that is not there", "compare", "run", error="run is not a finished run (no summary.json)"),
    case("a file for a run", "compare", "run", error="run is not a finished run (no summary.json)", files={"run": ""}),
    case("a run that has not finished", "compare", "run", error="run is not a finished run", files={"run/metrics.jsonl": METRICS}),
    case(
        "a whole run before a folder that is not a run",
        *("compare", "run", "none"),
        error="none is not a finished run",
        files={"run/summary.json": WHOLE, "run/metrics.jsonl": METRICS},
    ),
    case("a device for a finished run", "compare", "/dev/null", error="/dev/null is not a finished run"),
    # summary.json
    folder("a folder for a summary", "run is not a finished run", Path.mkdir),
    folder("a pipe for a summary", "run is not a finished run", os.mkfifo),
    folder("an empty summary", "summary.json: JSONDecodeError Expecting value", ""),
    folder("half a summary", "summary.json: JSONDecodeError", WHOLE[:50]),
    folder("a summary of bytes", "summary.json: UnicodeDecodeError 'utf-8' codec", b"\x89PNG\xff\xfe"),
    folder("a summary that is a list", "summary.json: TypeError", "[1, 2]"),
    folder("a summary that is a number", "summary.json: TypeError", "3"),
    folder("a summary that is nothing", "summary.json: TypeError", "null"),
    folder("a summary of lists in lists, 100,000 deep", "summary.json: RecursionError", "[" * 100_000),
    folder("a summary with an integer of 5,000 digits", "summary.json: ValueError Exceeds the limit", f'{{"seed": {"9" * 5000}}}'),
    folder("a summary without figures", "run cannot be read as a run: summary.json: key 'retention' is missing", "{}"),
    with_summary(
        "a run that was never evaluated",
        "run was never evaluated: there is nothing to compare; use dfkd-fast evaluate",
        retention=None,
    ),
    with_summary("figures that are a list", "summary.json: TypeError", retention=[1.0]),
    with_summary("figures that lack one", "summary.json: key 'last' is missing", retention={"best": 1.0}),
    with_summary("a figure that is text", "retention.mean = '1': Input should be a valid n", retention=STATISTICS | {"mean": "1"}),
    with_summary("a figure that is nothing", "retention.best = None: Input should be a valid n", retention=STATISTICS | {"best": None}),
    with_summary("a figure that is true", "retention.last = True: Input should be a valid n", retention=STATISTICS | {"last": True}),
    with_summary("a figure that is NaN", "retention.mean = nan: Input should be", retention=STATISTICS | {"mean": float("nan")}),
    with_summary("a figure that is infinite", "retention.variance = inf: Input", retention=STATISTICS | {"variance": float("inf")}),
    with_summary("a figure beyond any", "retention.variance = 1e+300: Input should be", retention=STATISTICS | {"variance": 1e300}),
    with_summary("an accuracy above 100 %", "teacher_accuracy = 101: Input should be less than", teacher_accuracy=101),
    with_summary("an accuracy below 0 %", "teacher_accuracy = -1: Input should be greater than", teacher_accuracy=-1),
    with_summary("no accuracy of the teacher", "teacher_accuracy = None: Input should be a valid n", teacher_accuracy=None),
    with_summary("a recipe that is a number", "recipe = 3: Input should be a valid string", recipe=3),
    with_summary("a recipe that commands the terminal", "recipe = '\\x1b[31m'", recipe="\x1b[31m"),
    with_summary("a seed that is text", "seed = '0': Input should be a valid integer", seed="0"),
    with_summary("a seed that is a fraction", "seed = 0.5: Input should be a valid integer", seed=0.5),
    with_summary("a metric that is a number", "metric = 3: Input should be a valid string", metric=3),
    # metrics.jsonl
    case(
        "a run without its epochs",
        *("compare", "run"),
        error="metrics.jsonl: FileNotFoundError",
        files={"run/summary.json": WHOLE},
    ),
    folder("a folder for epochs", "metrics.jsonl: IsADirectoryError", metrics=Path.mkdir),
    folder("no epochs", "curve = []: List should have at least 1 item", metrics=""),
    folder("no epoch that was evaluated", "curve = []: List", metrics='{"epoch": 1, "student_accuracy": null}\n'),
    folder("epochs of bytes", "metrics.jsonl: UnicodeDecodeError", metrics=b"\xff\xfe\n"),
    folder("a line that is not an epoch", "metrics.jsonl: JSONDecodeError", metrics=f"epoch 1\n{METRICS}"),
    folder("an empty line between epochs", "metrics.jsonl: JSONDecodeError", metrics=f"{METRICS}\n{METRICS}"),
    folder("an epoch that is a list", "metrics.jsonl: TypeError", metrics=f"[]\n{METRICS}"),
    folder("an epoch without its accuracy", "metrics.jsonl: key 'student_accuracy' is missing", metrics=f'{{"epoch": 1}}\n{METRICS}'),
    folder("an epoch without its number", "metrics.jsonl: key 'epoch' is missing", metrics=f'{{"student_accuracy": 1}}\n{METRICS}'),
    folder("an epoch whose number is text", "curve.0.0 = 'one'", metrics=METRICS.replace("1", '"one"')),
    folder("an epoch whose accuracy is NaN", "curve.0.1 = nan", metrics=METRICS.replace("50.0", "NaN")),
    folder("an epoch whose accuracy is a list", "curve.0.1 = [1]", metrics=METRICS.replace("50.0", "[1]")),
    folder("lists in lists in an epoch", "metrics.jsonl: RecursionError", metrics="[" * 100_000 + "\n"),
]
