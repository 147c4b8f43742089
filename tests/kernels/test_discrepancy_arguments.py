"""Invalid arguments of the discrepancies raise one line that names them."""

from typing import Any

import numpy as np
import pytest
import torch

from dfkd_fast.kernels import Backend
from tests.kernels.discrepancies import KINDS, call, call_with_agreement
from tests.kernels.oracles import INF, NAN, random

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3), (3, 2), r"differ in shape: \(2, 3\) and \(3, 2\)"),
        ((2, 3), (1, 3), "differ in shape"),
        ((3,), (3,), r"must be \(N, C\) or \(N, C, H, W\), not \(3,\)"),
        ((2, 3, 4), (2, 3, 4), r"must be \(N, C\)"),
        ((3, 0), (3, 0), r"no classes: \(3, 0\)"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_invalid_shapes_raise(kind: str, student: tuple[int, ...], teacher: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(kind, torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_on_different_devices_raise(kind: str) -> None:
    with pytest.raises(ValueError, match="differ in device: cpu and meta"):
        call(kind, torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))


@pytest.mark.parametrize("wrong", ["none", None, ["sum"], 1, torch.ones(2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_reduction_raises(kind: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match="reduction must be 'batchmean', 'mean' or 'sum', not "):
        call(kind, torch.zeros(2, 3), torch.zeros(2, 3), reduction=wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_must_be_floating_point(backend: Backend, kind: str, side: str, dtype: torch.dtype) -> None:
    sides: dict[str, Any] = {"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 3)} | {side: torch.zeros(2, 3, dtype=dtype)}
    with pytest.raises(ValueError, match=f"{side} logits must have a floating-point dtype, not {dtype}"):
        call(kind, **sides)


@pytest.mark.parametrize("wrong", [[[0.0, 1.0, 2.0]], None, 1.0], ids=["list", "None", "float"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_must_be_dense_tensors(kind: str, side: str, wrong: Any) -> None:
    sides: dict[str, Any] = {"student": torch.zeros(1, 3), "teacher": torch.zeros(1, 3)}
    with pytest.raises(TypeError, match=f"{side} must be a tensor, not {type(wrong).__name__}"):
        call(kind, **sides | {side: wrong})
    with pytest.raises(ValueError, match=f"{side} logits must be dense, not torch.sparse_coo"):
        call(kind, **sides | {side: torch.zeros(1, 3).to_sparse()})


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF, -INF, 1e20, 1e5, 1e-5])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_temperature_out_of_range_raises(backend: Backend, device: torch.device, kind: str, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be > 0, from 0\.0001 to 10000, not "):
        call(kind, torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device), temperature=temperature)


@pytest.mark.parametrize("temperature", [True, None, "1", 1j, torch.tensor(2.0), torch.ones(2)], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_temperature_must_be_a_python_number(backend: Backend, device: torch.device, kind: str, temperature: Any) -> None:
    with pytest.raises(TypeError, match="temperature must be a float, not "):
        call(kind, torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device), temperature=temperature)


@pytest.mark.parametrize("temperature", [2, np.float32(2), np.int64(2)], ids=lambda number: type(number).__name__)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_temperature_may_be_any_real_number(backend: Backend, device: torch.device, kind: str, temperature: Any) -> None:
    student, teacher = (random(2, 3, device=device) for _ in range(2))
    results = [call(kind, student, teacher, temperature=number, scaled=True) for number in (temperature, 2.0)]
    assert torch.equal(*results)


@pytest.mark.parametrize("wrong", [1, "no", None, torch.tensor(True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_flags_must_be_bool(kind: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match="agreement must be True or False, not "):
        call_with_agreement(kind, torch.zeros(2, 3), torch.zeros(2, 3), agreement=wrong)
    if kind != "l1":
        with pytest.raises(TypeError, match="scale_by_temperature_squared must be True or False, not "):
            call(kind, torch.zeros(2, 3), torch.zeros(2, 3), scaled=wrong)
