"""FusedEMA validates tensors once and detects all later changes."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.kernels import Backend, BackendError, FusedEMA, ema, use_backend
from dfkd_fast.kernels.dispatch import unavailable_reason
from dfkd_fast.kernels.ema import guard
from tests.kernels.oracles import lerp

DECAY = 0.8
CPU = torch.device("cpu")
Change = Callable[[Any, Any], object]
"""A change of the model, or of the FusedEMA."""


def network() -> nn.Sequential:
    """Network with submodules, buffers, a layer without tensors, and square weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.BatchNorm1d(4), nn.Conv2d(4, 4, 3, padding=1))


def tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]


def update_and_compare(average: FusedEMA, model: nn.Module) -> None:
    """Update once from new values and compare with float64."""
    for tensor in (*tensors(model), *tensors(average.module)):
        if tensor.is_floating_point():
            tensor.normal_()
        else:
            tensor.random_(9)
    expected = [
        lerp(old, new, DECAY) if new.is_floating_point() else new.double()
        for old, new in zip(tensors(average.module), tensors(model), strict=True)
    ]
    average.update(model)
    for moved, exact in zip(tensors(average.module), expected, strict=True):
        torch.testing.assert_close(moved.double(), exact, rtol=1e-5, atol=1e-6)


def swap_data(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    for parameter in module.parameters():
        parameter.data = change(parameter.data)


@pytest.fixture
def validated_pairs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the pairs of tensors that are validated."""
    indices: list[int] = []
    check = ema._check_pair

    def spy(index: int, *rest: Any) -> None:
        indices.append(index)
        check(index, *rest)

    monkeypatch.setattr(ema, "_check_pair", spy)
    return indices


@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("warm_up", [False, True])
def test_tensors_are_validated_once(
    backend: Backend, device: torch.device, validated_pairs: list[int], shadow_dtype: torch.dtype | None, warm_up: bool
) -> None:
    model = network().to(device)
    average = FusedEMA(model, DECAY, shadow_dtype=shadow_dtype, warm_up=warm_up)
    average.update(model)
    assert len(validated_pairs) == len(tensors(model)) * (1 if shadow_dtype is None else 2)
    validated_pairs.clear()
    for _ in range(3):
        average.update(model)
    assert not validated_pairs


VALID_CHANGES: dict[str, Change] = {
    "a parameter is replaced": lambda model, _: setattr(model[1], "weight", nn.Parameter(torch.randn(4))),
    "an average is replaced": lambda _, ema: setattr(ema.module[1], "bias", nn.Parameter(torch.randn(4), requires_grad=False)),
    "a buffer is registered anew": lambda model, _: model[1].register_buffer("running_mean", torch.randn(4)),
    "an equal number is registered anew": lambda model, _: model[1].register_buffer("num_batches_tracked", torch.tensor(0)),
    "a submodule is replaced": lambda model, _: model.__setitem__(0, nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
    "a submodule of a submodule is replaced": lambda model, _: model[0].__setitem__(0, nn.Linear(4, 4)),
    "a layer without tensors is added": lambda model, _: model[1].add_module("last", nn.ReLU()),
    "the averaged module is replaced": lambda _, ema: setattr(ema, "module", copy.deepcopy(ema.module)),
    "values are assigned": lambda model, _: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "averages are assigned": lambda _, ema: ema.load_state_dict(copy.deepcopy(ema.state_dict()), assign=True),
    "the dtype changes": lambda model, _: model.to(torch.bfloat16),
    "the memory format changes": lambda model, _: model.to(memory_format=torch.channels_last),
    "the average's memory format changes": lambda _, ema: ema.to(memory_format=torch.channels_last),
    "the strides change in place": lambda model, _: swap_data(model[0], lambda tensor: tensor.t()),
    "an average is transposed": lambda _, ema: swap_data(ema.module[0], lambda tensor: tensor.t()),
    "the dtype and the memory format change": lambda model, _: model.to(torch.bfloat16, memory_format=torch.channels_last),
    "both are channels-last": lambda model, ema: [part.to(memory_format=torch.channels_last) for part in (model, ema)],
    "both are transposed": lambda model, ema: [swap_data(part[0], lambda tensor: tensor.t()) for part in (model, ema.module)],  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", VALID_CHANGES)
def test_a_valid_change_is_detected_and_averaged(backend: Backend, device: torch.device, validated_pairs: list[int], name: str) -> None:
    model = network().to(device)
    average = FusedEMA(model, DECAY)
    average.update(model)
    validated_pairs.clear()
    VALID_CHANGES[name](model, average)
    model.to(device)
    average.to(device)
    update_and_compare(average, model)
    assert validated_pairs == list(range(len(tensors(model))))
    validated_pairs.clear()
    update_and_compare(average, model)
    assert not validated_pairs


INVALID_CHANGES: dict[str, tuple[Change, str]] = {
    "a parameter is added": (lambda model, _: model[2].register_parameter("gain", nn.Parameter(torch.ones(1))), "differ in length"),
    "a buffer is added to a layer without any": (lambda model, _: model[0][1].register_buffer("n", torch.ones(1)), "differ in length"),
    "a submodule is added": (lambda model, _: model.append(nn.Linear(2, 2)), "differ in length"),
    "a submodule is removed": (lambda model, _: model.__delitem__(2), "differ in length"),
    "a parameter is removed": (lambda model, _: setattr(model[2], "bias", None), "differ in length"),
    "the shape changes in place": (lambda model, _: swap_data(model[0], lambda tensor: tensor[:2]), "pair 0: .*shape"),
    "the averages are halved": (lambda _, ema: ema.module.half(), "must be float32"),
    "parameters become integers": (lambda model, _: swap_data(model[0], lambda tensor: tensor.long()), "pair 0: .*dtype"),
    "the device changes": (lambda model, _: model.to("meta"), "pair 0: .*device"),
    "the averages' device changes": (lambda _, ema: ema.module.to("meta"), "pair 0: .*device"),
}


@pytest.mark.parametrize("name", INVALID_CHANGES)
def test_an_invalid_change_is_detected_and_raises(backend: Backend, device: torch.device, name: str) -> None:
    model = network().requires_grad_(False).to(device)  # so that parameters may become integers
    average = FusedEMA(model, DECAY)
    average.update(model)
    change, message = INVALID_CHANGES[name]
    change(model, average)
    before = [tensor.clone() for tensor in tensors(average.module)]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            average.update(model)
    assert int(average.updates) == 1
    if not before[0].is_meta:
        assert all(map(torch.equal, tensors(average.module), before))


def test_new_data_pointers_are_used_without_validation(backend: Backend, device: torch.device, validated_pairs: list[int]) -> None:
    model = network().to(device)
    average = FusedEMA(model, DECAY)
    average.update(model)
    validated_pairs.clear()
    for part in (model, average.module):
        swap_data(part, torch.randn_like)
    update_and_compare(average, model)
    assert not validated_pairs


@pytest.mark.skipif(unavailable_reason("numba") is not None, reason="numba is not installed")
def test_a_backend_forced_later_is_used() -> None:
    model = network().double()
    average = FusedEMA(model, DECAY)
    average.update(model)
    with use_backend("numba"), pytest.raises(BackendError, match="numba is forced"):
        average.update(model)


def test_several_models_may_alternate(backend: Backend, device: torch.device, validated_pairs: list[int]) -> None:
    models = [network().to(device), network().to(device)]
    average = FusedEMA(models[0], DECAY)
    for model in models:
        average.update(model)
    validated_pairs.clear()
    for model in models:
        update_and_compare(average, model)
    assert not validated_pairs


def test_an_average_keeps_no_model_alive() -> None:
    model = network()
    average = FusedEMA(model, DECAY)
    average.update(model)
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)


def test_copies_and_pickles_of_an_average_exclude_the_model() -> None:
    model = nn.Linear(300, 100)
    average = FusedEMA(model, DECAY)
    average.update(model)
    saved = io.BytesIO()
    torch.save(copy.deepcopy(average), saved)
    assert saved.tell() < 1.5 * model.weight.nbytes
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for either in (average, loaded):
        either.update(model)
    assert all(map(torch.equal, tensors(average), tensors(loaded)))


def test_without_pytorchs_guards_every_update_validates(monkeypatch: pytest.MonkeyPatch, validated_pairs: list[int]) -> None:
    monkeypatch.setattr(guard, "TensorGuards", None)
    model = network()
    average = FusedEMA(model, DECAY)
    for _ in range(2):
        update_and_compare(average, model)
    assert len(validated_pairs) == 2 * len(tensors(model))
