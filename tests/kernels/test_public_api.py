"""The public functions of dfkd_fast.kernels: examples in docstrings, and earlier names."""

import doctest
import inspect
import warnings
from typing import Any

import numpy as np
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


X, CHANNEL, LOGITS, FILTERS = torch.rand(2, 3, 4, 4), torch.rand(3), torch.rand(2, 3), torch.rand(3, 3, 3, 3)
DIVERGENCE = {"student": LOGITS, "teacher": LOGITS, "temperature": 1.0, "reduction": "sum", "scale_by_temperature_squared": False}
BATCH_NORM = dict.fromkeys(("running_mean", "running_var", "weight", "bias"), CHANNEL)
# Of which each tensor, and each list of tensors, is replaced by something else.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "l1_discrepancy": {"student": LOGITS, "teacher": LOGITS, "reduction": "sum"},
    "kl_discrepancy": DIVERGENCE,
    "js_discrepancy": DIVERGENCE,
    "ema_update_": {"averages": [X], "sources": [X], "shadows": [X], "decay": 0.5},
    "channel_moments": {"x": X},
    "channel_sums": {"x": X},
    "partial_moments": {"x": X},
    "combine_moments": {"layers": [kernels.partial_moments(X)], "scale": torch.ones(2, 1, 3), "shift": torch.ones(2, 1, 3)},
    "bias_act": {"x": X, "bias": CHANNEL, "residual": X, "activation": "relu"},
    "batch_norm_act": {
        **{"x": X, **BATCH_NORM, "residual": X, "num_batches_tracked": torch.zeros((), dtype=torch.int64), "input_bias": CHANNEL},
        **{"training": True, "momentum": 0.1, "eps": 1e-5, "activation": "relu"},
    },
    "concat_generated": {"raws": [X], "activation": "tanh", "normalize": "dataset", "mean": CHANNEL, "std": CHANNEL, "out": X.clone()},
    "conv2d_relu": {"x": X, "weight": FILTERS, "bias": CHANNEL, "residual": X, "padding": (1, 1)},
    "winograd_conv2d": {"x": X, "weight": FILTERS, "bias": CHANNEL},
    "winograd_is_faster": {"x": X, "weight": FILTERS},
}
WITHOUT_TENSORS = {"FusedEMA", "PartialMoments", "ema_multi_avg_fn", "use_backend"}


def arguments_of_type(kind: type) -> list[tuple[str, str]]:
    return [(name, argument) for name, arguments in ARGUMENTS.items() for argument, value in arguments.items() if isinstance(value, kind)]


def test_every_function_of_tensors_is_listed() -> None:
    assert ARGUMENTS.keys() | WITHOUT_TENSORS == set(FUNCTIONS)


@pytest.mark.parametrize("wrong", [3.0, np.zeros((2, 3, 4, 4), np.float32), "x"], ids=["float", "array", "str"])
@pytest.mark.parametrize(("name", "argument"), arguments_of_type(torch.Tensor))
def test_what_is_not_a_tensor_is_named(name: str, argument: str, wrong: Any) -> None:
    function: Any = getattr(kernels, name)
    with pytest.raises(TypeError, match=f"^{argument} must be a tensor, not {type(wrong).__name__}$"):
        function(**ARGUMENTS[name] | {argument: wrong})


@pytest.mark.parametrize(("name", "argument"), [each for each in arguments_of_type(list) if each[0] != "combine_moments"])
def test_what_is_not_a_list_of_tensors_is_named(name: str, argument: str) -> None:
    function: Any = getattr(kernels, name)
    for wrong, message in (
        (X, f"{argument} must be a list or tuple of tensors, not Tensor"),
        ((x for x in [X]), f"{argument} must be a list or tuple of tensors, not generator"),
        (3, f"{argument} must be a list or tuple of tensors, not int"),
        ([X, None], rf"{argument}\[1\] must be a tensor, not NoneType"),
    ):
        with pytest.raises(TypeError, match=f"^{message}$"):
            function(**ARGUMENTS[name] | {argument: wrong})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *((name, "agreement") for name in ("l1_discrepancy", "kl_discrepancy", "js_discrepancy")),
        *((name, "scale_by_temperature_squared") for name in ("kl_discrepancy", "js_discrepancy")),
        *(("bias_act", "moments"), ("winograd_conv2d", "cache_weight"), ("batch_norm_act", "training")),
    ],
)
@pytest.mark.parametrize(
    ("wrong", "shown"), [("no", "'no'"), (1, "1"), (torch.ones(9, 9), "an object of the type Tensor")], ids=["str", "int", "tensor"]
)
def test_flags_must_be_bools(name: str, argument: str, wrong: Any, shown: str) -> None:
    function: Any = getattr(kernels, name)
    with pytest.raises(TypeError, match=f"^{argument} must be True or False, not {shown}$"):
        function(**ARGUMENTS[name] | {argument: wrong})


def test_what_is_not_a_tensor_within_a_list_is_named() -> None:
    batch = ARGUMENTS["concat_generated"] | {"normalize": "batch", "mean": None, "std": None, "training": [True], "running_vars": [CHANNEL]}
    with pytest.raises(TypeError, match=r"^running_means must be a list or tuple of tensors, not Tensor$"):
        kernels.concat_generated(**batch | {"running_means": CHANNEL[None]})
    with pytest.raises(TypeError, match=r"^layers\[0\]\.center must be a tensor, not NoneType$"):
        kernels.combine_moments([kernels.PartialMoments(torch.zeros(2, 3, 4), None)])  # type: ignore[arg-type]


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
