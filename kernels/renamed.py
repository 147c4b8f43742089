"""Earlier public names, which keep working with a warning."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["RENAMED", "current_name", "renamed_argument"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

RENAMED = {"winograd_pays": "winograd_is_faster"}
"""Earlier and current names of functions in ``dfkd_fast.kernels``."""


def current_name(module: str, name: str) -> str:
    """Return the current name of a renamed function of a module, with a warning.

    Raises:
        AttributeError: no function of the module had this name.
    """
    if name not in RENAMED:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is now called {RENAMED[name]}", FutureWarning, stacklevel=3)
    return RENAMED[name]


def renamed_argument(old: str, new: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Return a decorator that accepts a keyword argument under its earlier name, too, with a warning."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if old in kwargs:
                warnings.warn(f"{function.__name__}: the argument {old} is now called {new}", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
