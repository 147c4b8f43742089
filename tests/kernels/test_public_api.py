"""The public functions of dfkd_fast.kernels: examples in docstrings, and earlier names."""

import doctest
import inspect
import warnings
from typing import Any

import pytest
import torch

from dfkd_fast import kernels
from dfkd_fast.kernels import renamed, winograd_conv2d, winograd_is_faster

FUNCTIONS = [name for name in kernels.__all__ if callable(getattr(kernels, name)) and not name.startswith("Backend")]
WITHOUT_EXAMPLE = {"winograd_is_faster"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_in_docstrings_are_correct(name: str) -> None:
    docstring = inspect.getdoc(getattr(kernels, name))
    assert docstring is not None
    example = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert bool(example.examples) == (name not in WITHOUT_EXAMPLE)
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_document_every_argument_and_the_result(name: str) -> None:
    function = getattr(kernels, name)
    docstring = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in docstring
    if isinstance(function, type) or name in ("ema_update_", "use_backend"):
        return
    assert "\nReturns:\n" in docstring


@pytest.mark.parametrize(("old", "new"), renamed.RENAMED.items())
def test_earlier_names_work_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"^dfkd_fast.kernels.{old} is now called {new}$") as caught:
        function: Any = getattr(kernels, old)
    assert function is getattr(kernels, new)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_unknown_names_raise_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'dfkd_fast.kernels' has no attribute 'winograd'$"):
        kernels.winograd  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("function", [winograd_conv2d, winograd_is_faster])
def test_the_earlier_argument_keep_works_with_a_warning(function: Any) -> None:
    x, weight = torch.randn(7, 128, 8, 8).to(memory_format=torch.channels_last), torch.randn(64, 128, 3, 3)
    with pytest.warns(FutureWarning, match=f"^{function.__name__}: the argument keep is now called cache_weight$"):
        result = function(x, weight, keep=True)
    with warnings.catch_warnings(action="error"):
        expected = function(x, weight, cache_weight=True)
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(expected))
