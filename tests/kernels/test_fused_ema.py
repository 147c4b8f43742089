import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from dfkd_fast.kernels import Backend, FusedEMA

pytestmark = pytest.mark.usefixtures("poisoned")

DECAY, STEPS = 0.8, 15


def network(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3, bias=False)).to(device, dtype)


def train_a_step(model: nn.Module) -> None:
    """Change all parameters and batch normalization buffers."""
    parameter = next(model.parameters())
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
        model.train()(torch.randn(4, 3, 7, 7, device=parameter.device, dtype=parameter.dtype))


def follow(ema: FusedEMA, model: nn.Module, decay_of: Callable[[int], float], steps: int = STEPS) -> dict[str, Tensor]:
    """Train and update; return the averages computed in float64."""
    expected = {name: tensor.to(torch.float64, copy=True) for name, tensor in model.state_dict().items()}
    for step in range(steps):
        train_a_step(model)
        ema.update(model)
        decay = decay_of(step)
        for name, tensor in model.state_dict().items():
            moved = decay * expected[name] + (1 - decay) * tensor.double()
            expected[name] = moved if tensor.is_floating_point() else tensor.double()
    return expected


def check(module: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    state = module.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_average_matches_float64_and_is_stored_in_float32(
    backend: Backend, device: torch.device, dtype: torch.dtype, channels_last: bool
) -> None:
    model = network(device, dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    ema = FusedEMA(model, DECAY)
    check(ema.module, follow(ema, model, lambda _: DECAY))
    assert all(tensor.dtype == torch.float32 for tensor in ema.module.parameters())
    assert int(ema.updates) == STEPS


def test_the_average_of_a_float64_model_is_stored_in_float64() -> None:
    model = network(torch.device("cpu"), torch.float64)
    ema = FusedEMA(model, DECAY)
    check(ema.module, follow(ema, model, lambda _: DECAY), tolerance=1e-14)
    assert all(tensor.dtype == torch.float64 for tensor in ema.module.parameters())


def test_num_batches_tracked_is_copied(backend: Backend, device: torch.device) -> None:
    model = network(device)
    ema = FusedEMA(model, 0.9999)
    for expected in range(1, 4):
        train_a_step(model)
        ema.update(model)
        assert ema.module.state_dict()["1.num_batches_tracked"].item() == expected


@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16], ids=str)
def test_spectral_norm_of_the_average_normalizes_the_averaged_weight(
    backend: Backend, device: torch.device, shadow_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    # The norm of a vector has no singular vectors.
    model = nn.Sequential(spectral_norm(nn.Linear(6, 5)), spectral_norm(nn.LayerNorm(5))).to(device)
    ema = FusedEMA(model, DECAY, shadow_dtype=shadow_dtype)
    for _ in range(STEPS):
        with torch.no_grad():
            model[0].parametrizations.weight.original.copy_(torch.randn(5, 6))  # type: ignore[union-attr, operator]
        for _ in range(20):
            model.train()(torch.randn(4, 6, device=device))  # each forward runs one power iteration
        ema.update(model)
    averages = [ema.module] if ema.shadow is None else [ema.module, ema.shadow]
    for average in averages:
        for ours, theirs in zip(average.modules(), model.modules(), strict=True):
            if isinstance(ours, _SpectralNorm):
                for vector, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
                    assert torch.equal(vector, expected.to(vector.dtype))
                    torch.testing.assert_close(
                        vector.float().norm().item(), 1.0, rtol=0, atol=1e-5 if vector.dtype == torch.float32 else 0.01
                    )


@pytest.mark.parametrize("decay", [0.3, 0.9999, 1.0, 0.0])
def test_warm_up_follows_its_closed_form(backend: Backend, device: torch.device, decay: float) -> None:
    model = network(device)
    ema = FusedEMA(model, decay, warm_up=True)
    check(ema.module, follow(ema, model, lambda n: min(decay, (1 + n) / (10 + n))))


@pytest.mark.parametrize("shadow_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_shadow_is_the_average_rounded(backend: Backend, device: torch.device, shadow_dtype: torch.dtype) -> None:
    model = network(device)
    ema = FusedEMA(model, DECAY, shadow_dtype=shadow_dtype)
    check(ema.module, follow(ema, model, lambda _: DECAY))
    assert ema.shadow is not None
    for (name, average), shadow in zip(ema.module.state_dict().items(), ema.shadow.state_dict().values(), strict=True):
        assert shadow.dtype == (shadow_dtype if average.is_floating_point() else average.dtype), name
        assert torch.equal(shadow, average.to(shadow.dtype)), name
    assert not any(parameter.requires_grad for parameter in ema.shadow.parameters())


@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16], ids=str)
def test_a_restored_average_continues_identically(backend: Backend, device: torch.device, shadow_dtype: torch.dtype | None) -> None:
    model = network(device)
    ema = FusedEMA(model, 0.99, warm_up=True, shadow_dtype=shadow_dtype)
    follow(ema, model, lambda _: 0.0, steps=5)
    saved = copy.deepcopy(ema.state_dict())
    assert saved["updates"].item() == 5
    train_a_step(model)
    train_a_step(model)
    resumed = FusedEMA(model, 0.99, warm_up=True, shadow_dtype=shadow_dtype)
    resumed.load_state_dict(saved)
    for either in (ema, resumed):
        either.update(model)
    assert int(resumed.updates) == 6
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_average_is_initialized_with_a_copy_of_the_model(device: torch.device, backend: Backend) -> None:
    model = network(device)
    before = copy.deepcopy(model.state_dict())
    ema = FusedEMA(model, DECAY)
    train_a_step(model)
    for name, tensor in ema.module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_an_average_stays_in_evaluation_mode_without_gradients(backend: Backend, device: torch.device) -> None:
    model = network(device)
    ema = FusedEMA(model, DECAY, shadow_dtype=torch.bfloat16)
    wrapper = nn.ModuleList([ema]).train()
    assert wrapper.training
    for part in (ema.module, ema.shadow):
        assert part is not None
        assert not any(module.training for module in part.modules())
        assert not any(parameter.requires_grad for parameter in part.parameters())
    images = torch.randn(2, 3, 7, 7, device=device)
    train_a_step(model)
    ema.update(model)
    assert torch.equal(ema(images), ema.module(images))
    assert not ema(images).requires_grad
    expected = copy.deepcopy(model).eval()
    expected.load_state_dict(ema.module.state_dict())
    torch.testing.assert_close(ema(images), expected(images).detach())


def test_an_update_records_no_graph(backend: Backend, device: torch.device) -> None:
    model = network(device)
    ema = FusedEMA(model, DECAY)
    ema.update(model)
    assert all(tensor.grad_fn is None for tensor in ema.state_dict(keep_vars=True).values())


def test_a_model_without_tensors_has_an_average(backend: Backend) -> None:
    ema = FusedEMA(nn.ReLU(), DECAY)
    ema.update(nn.ReLU())
    assert int(ema.updates) == 1


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_outside_0_to_1_raises(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be in"):
        FusedEMA(nn.Linear(2, 2), decay)


def test_arguments_of_the_wrong_type_are_named() -> None:
    arguments: dict[str, Any] = {"model": nn.Linear(2, 2), "decay": 0.5}
    with pytest.raises(TypeError, match=r"^model must be a module, not list$"):
        FusedEMA(**arguments | {"model": [nn.Linear(2, 2)]})
    with pytest.raises(TypeError, match=r"^decay must be a float, not str$"):
        FusedEMA(**arguments | {"decay": "0.5"})
    dtypes: list[Any] = [torch.int8, "bfloat16"]
    for dtype in dtypes:
        with pytest.raises(ValueError, match=f"^shadow_dtype must be a floating-point dtype, not {dtype!r}$"):
            FusedEMA(**arguments, shadow_dtype=dtype)
    with pytest.raises(TypeError, match=r"^model must be a module, not Parameter$"):
        FusedEMA(**arguments).update(arguments["model"].weight)


def test_another_model_raises_and_is_not_counted() -> None:
    model = nn.Linear(3, 2)
    ema = FusedEMA(model, DECAY)
    before = copy.deepcopy(ema.state_dict())
    for other, message in ((nn.Linear(3, 2, bias=False), "differ in length"), (nn.Linear(3, 4), "pair 0: .* shape")):
        with pytest.raises(ValueError, match=message):
            ema.update(other)
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_script_module_is_averaged() -> None:
    model = torch.jit.script(nn.Linear(3, 2))
    ema = FusedEMA(model, 0.5)
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    for average, start in zip(ema.module.parameters(), before, strict=True):
        assert average.is_leaf and not average.requires_grad
        torch.testing.assert_close(average, start + 0.5)


def test_singular_vectors_of_the_deprecated_spectral_norm_are_copied(backend: Backend, device: torch.device) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 5))).to(device)
    ema = FusedEMA(model, DECAY)
    for _ in range(STEPS):
        with torch.no_grad():
            model[0].weight_orig.copy_(torch.randn(5, 6))  # type: ignore[operator]
        model.train()(torch.randn(4, 6, device=device))
        ema.update(model)
    ours, theirs = (dict(network.named_buffers()) for network in (ema.module, model))
    assert ours.keys() >= {"0.weight_u", "0.weight_v"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ("0.weight_u", "0.weight_v"))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_module_with_a_computed_weight_attribute_is_averaged(
    norm: Callable[[nn.Module], nn.Module], backend: Backend, device: torch.device
) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        model = nn.Sequential(norm(nn.Linear(6, 5))).to(device)
    x = torch.randn(4, 6, device=device)
    model(x).sum().backward()
    assert model[0].weight.grad_fn is not None  # which copy.deepcopy rejects
    ema = FusedEMA(model, 0.0)
    with torch.no_grad():
        model[0].bias.add_(1.0)  # type: ignore[operator]
    ema.update(model)
    torch.testing.assert_close(ema(x), model.eval()(x))


def test_a_module_that_cannot_be_copied_is_named() -> None:
    model = nn.Linear(3, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^the module Linear cannot be copied: cannot pickle '_thread.lock' object$"):
        FusedEMA(model, 0.5)
