"""torch.func transforms and forward-mode derivatives use the reference; a forced kernel raises."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dfkd_fast.kernels import (
    BackendError,
    channel_moments,
    channel_sums,
    combine_moments,
    concat_generated,
    dispatch,
    js_discrepancy,
    kl_discrepancy,
    l1_discrepancy,
    partial_moments,
    use_backend,
)
from tests.kernels import oracles

pytestmark = pytest.mark.skipif(dispatch.unavailable_reason("numba") is not None, reason="numba is not installed")

TEMPERATURE, MEAN, STD = 2.0, torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 1.5, 0.7])


def _bias_act(x: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    shifted = x + bias[:, None, None]
    return F.silu(shifted + residual), *oracles.moments(shifted)


# Each function with its float64 oracle, from a tensor (2, 3, 4, 5) to a scalar; the second argument is constant.
Function = Callable[[Tensor, Tensor], Tensor]
FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "l1": (lambda x, y: l1_discrepancy(x, y, reduction="sum"), lambda x, y: oracles.discrepancy("l1", x, y, 1.0)),
    "kl": (
        lambda x, y: kl_discrepancy(x, y, temperature=TEMPERATURE, reduction="sum", scale_by_temperature_squared=False),
        lambda x, y: oracles.discrepancy("kl", x, y, TEMPERATURE),
    ),
    "js": (
        lambda x, y: js_discrepancy(x, y, temperature=TEMPERATURE, reduction="sum", scale_by_temperature_squared=False),
        lambda x, y: oracles.discrepancy("js", x, y, TEMPERATURE),
    ),
    "concat": (
        lambda x, y: concat_generated([x, y], activation="tanh", normalize="dataset", mean=MEAN, std=STD).pow(3).sum(),
        lambda x, y: ((torch.cat([x, y]).tanh() - MEAN[:, None, None].double()) / STD[:, None, None].double()).pow(3).sum(),
    ),
    "bias_act": (
        lambda x, y: torch.stack([part.sin().sum() for part in oracles.bias_act_moments(x, MEAN, y, "silu")]).sum(),
        lambda x, y: torch.stack([part.sin().sum() for part in _bias_act(x, MEAN.double(), y)]).sum(),
    ),
    "moments": (
        lambda x, y: torch.stack(channel_moments(x * y)).square().sum(),
        lambda x, y: torch.stack(oracles.moments(x * y)).square().sum(),
    ),
    "combined moments": (
        lambda x, y: combine_moments([partial_moments(x), partial_moments(y * x)]).square().sum(),
        lambda x, y: torch.stack([torch.stack(oracles.moments(each)) for each in (x, y * x)]).square().sum(),
    ),
    "sums": (
        lambda x, y: torch.stack(channel_sums(x * y)[:2]).sin().sum(),
        lambda x, y: torch.stack([(x * y).sum((0, 2, 3)), (x * y).square().sum((0, 2, 3))]).sin().sum(),
    ),
}
TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "grad": lambda f, x, y: torch.func.grad(f)(x, y),
    "vmap": lambda f, x, y: torch.func.vmap(f)(torch.stack([x, 2 * x]), torch.stack([y, y])),
    "jvp": lambda f, x, y: torch.func.jvp(lambda x: f(x, y), (x,), (y,))[1],
    "hessian": lambda f, x, y: torch.func.hessian(f)(x, y),
    "vmap of grad": lambda f, x, y: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x]), torch.stack([y, y])),
    "dual": lambda f, x, y: _dual(f, x, y),
}


def _dual(function: Function, x: Tensor, y: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, y), y)).tangent
        assert tangent is not None
        return tangent


@pytest.fixture(autouse=True)
def small_tensors_go_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in dispatch.MIN_NUMEL:
        monkeypatch.setitem(dispatch.MIN_NUMEL, operation, 0)


def tensors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transformed_functions_match_float64(name: str, transform: str) -> None:
    function, oracle = FUNCTIONS[name]
    x, y = tensors()
    with use_backend(None):
        actual = TRANSFORMS[transform](function, x, y)
    expected = TRANSFORMS[transform](oracle, x.double(), y.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_forced_kernel_raises_in_a_transform(name: str, transform: str) -> None:
    with (
        use_backend("numba"),
        pytest.raises(BackendError, match=r"numba is forced, but only the reference supports torch\.func and forward-mode derivatives"),
    ):
        TRANSFORMS[transform](FUNCTIONS[name][0], *tensors())
    with use_backend("numba"):
        assert dispatch.choose("kl_discrepancy", torch.device("cpu"), (torch.float32,), 1) == "numba"  # no state is left over


def test_transforming_detects_active_transforms() -> None:
    output: list[bool] = []

    def function(x: Tensor) -> Tensor:
        output.append(dispatch.transforming())
        return x.sum()

    x = torch.ones(3)
    function(x)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x[None])
    with forward_ad.dual_level():
        function(x)
    function(x)
    assert output == [False, True, True, True, False]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_func_grad_inside_a_compiled_function_matches_float64(name: str) -> None:
    torch.compiler.reset()
    function, oracle = FUNCTIONS[name]
    x, y = tensors()
    with use_backend(None):
        actual = torch.compile(lambda x, y: torch.func.grad(function)(x, y), fullgraph=True, backend="eager")(x, y)
    expected = torch.func.grad(oracle)(x.double(), y.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
