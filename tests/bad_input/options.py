"""Command lines that cannot be understood."""

from tests.bad_input.case import Case, case

CASES: list[Case] = [
    case("an unknown command", "frobnicate", says="No such command 'frobnicate'"),
    case("a missing argument", "distill", says="Missing argument 'RECIPE'"),
    case("an option without a value", "show", "digits", "--set", says="--set"),
    case("--set without a value", "show", "digits", "--set", "loop.epochs", says="--set 'loop.epochs': must be key.path=value"),
    case(
        "image files of no kind",
        "evaluate",
        "--data",
        "imagnet",
        says="--data: unknown data set of image files 'imagnet': did you mean 'imagenet'?",
    ),
    case(
        "a data set that is no image files",
        "evaluate",
        "--data",
        "digits",
        says="unknown data set of image files 'digits': there are folder, ",
    ),
]
