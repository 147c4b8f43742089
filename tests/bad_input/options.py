"""Command lines that cannot be understood."""

from tests.bad_input.case import Case, case

CASES: list[Case] = [
    case("an unknown command", "frobnicate", says="No such command 'frobnicate'"),
    case("a missing argument", "distill", says="Missing argument 'RECIPE'"),
    case("an option without a value", "show", "digits", "--set", says="--set"),
    case("--set without a value", "show", "digits", "--set", "loop.epochs", says="--set 'loop.epochs': must be key.path=value"),
]
