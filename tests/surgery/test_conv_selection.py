"""The fastest algorithm of a convolution is measured once and kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast import Trainer
from dfkd_fast.kernels import use_backend
from dfkd_fast.surgery import conv_selection
from dfkd_fast.surgery.conv_selection import Convolution, fastest_algorithm, measuring
from tests.small import small_method, small_networks


def convolution(**changes: Any) -> Convolution:
    """A convolution for which im2col is measured."""
    defaults: dict[str, Any] = {"x": (64, 64, 4, 4), "weight": (64, 64, 3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    return Convolution(**defaults | {"dtype": torch.bfloat16, "of_x": True, "of_weight": True, "cached_weight": False} | changes)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of measurements of a new user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    conv_selection._file.cache_clear()
    monkeypatch.setattr(conv_selection, "_chosen", {})
    path = conv_selection._file(torch.get_num_threads())
    assert path is not None and path.is_relative_to(tmp_path)
    yield path
    conv_selection._file.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Convolution]:
    """Measurements, in each of which im2col takes half the time."""
    calls: list[Convolution] = []

    def measure(each: Convolution, algorithms: list[str]) -> dict[str, float]:
        calls.append(each)
        return {name: 0.5 if name == "im2col" else 1.0 for name in algorithms}

    monkeypatch.setattr(conv_selection, "_measure", measure)
    return calls


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_selection, "_chosen", {})


@pytest.mark.parametrize(
    ("changes", "algorithms"),
    [
        ({}, ["im2col"]),
        ({"x": (16, 64, 64, 64)}, []),
        ({"x": (16, 64, 64, 64), "weight": (3, 64, 3, 3), "stride": (1, 1)}, []),
        ({"x": (16, 64, 64, 64), "weight": (3, 64, 3, 3), "stride": (1, 1), "dtype": torch.float32}, ["col2im"]),
        ({"x": (16, 64, 64, 64), "weight": (3, 64, 3, 3), "stride": (1, 1), "dtype": torch.float32, "padding": (3, 1)}, []),
        ({"x": (16, 64, 64, 64), "weight": (3, 64, 1, 1), "stride": (1, 1), "dtype": torch.float32, "padding": (0, 0)}, []),
        ({"x": (16, 64, 64, 64), "stride": (1, 1), "dtype": torch.float32}, ["winograd"]),
        ({"x": (16, 64, 64, 64), "stride": (1, 1), "dtype": torch.float64}, []),
        ({"x": (16, 64, 64, 64), "stride": (1, 1), "dilation": (2, 2), "dtype": torch.float32}, []),
        ({"x": (8, 64, 4, 4)}, []),
        ({"x": (0, 64, 4, 4)}, []),
        ({"x": (16, 64, 1, 1), "padding": (0, 0)}, []),
    ],
    ids=str,
)
def test_algorithms_are_measured_where_they_can_be_faster(changes: dict[str, Any], algorithms: list[str]) -> None:
    assert convolution(**changes).algorithms == algorithms


def test_winograds_kernels_are_not_measured_while_another_backend_is_forced() -> None:
    each = convolution(x=(16, 64, 64, 64), stride=(1, 1), dtype=torch.float32)
    with use_backend("reference"):
        assert each.algorithms == []
    assert each.algorithms == ["winograd"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [(False, False), (True, False), (False, True), (True, True)])
def test_every_algorithm_is_timed_without_a_trace(dtype: torch.dtype, gradients: tuple[bool, bool]) -> None:
    each = convolution(x=(16, 64, 8, 8), stride=(1, 1), dtype=dtype, of_x=gradients[0], of_weight=gradients[1])
    names = ["pytorch", *each.algorithms]
    assert names == (["pytorch", "winograd"] if dtype == torch.float32 else ["pytorch"])
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seconds = conv_selection._measure(each, names)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert list(seconds) == names
    assert all(0 < value < 10 for value in seconds.values())


def test_an_algorithm_must_be_clearly_faster(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, expected in ((0.95, "pytorch"), (0.85, "im2col"), (1.5, "pytorch")):
        monkeypatch.setattr(conv_selection, "_measure", lambda each, names, seconds=seconds: {"pytorch": 1.0, "im2col": seconds})
        new_process(monkeypatch)
        file.unlink(missing_ok=True)
        with measuring():
            assert fastest_algorithm(convolution()) == expected


@pytest.mark.usefixtures("file")
def test_outside_of_steps_nothing_is_measured_and_pytorchs_convolution_is_used(measured: list[Convolution]) -> None:
    assert fastest_algorithm(convolution()) == "pytorch"
    assert not measured
    with measuring():
        assert fastest_algorithm(convolution()) == "im2col"
        assert fastest_algorithm(convolution()) == "im2col"
    assert fastest_algorithm(convolution()) == "pytorch"
    assert len(measured) == 1


def test_a_measurement_is_kept_for_later_processes(file: Path, measured: list[Convolution], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        new_process(monkeypatch)
        with measuring():
            assert fastest_algorithm(convolution()) == "im2col"
            assert fastest_algorithm(convolution(of_x=False)) == "im2col"
    assert measured == [convolution(), convolution(of_x=False)]
    assert json.loads(file.read_text()) == {
        "64x64x4x4 64x64x3x3 2,2 1,1 1,1 bfloat16 dx dw": {"pytorch": 1.0, "im2col": 0.5},
        "64x64x4x4 64x64x3x3 2,2 1,1 1,1 bfloat16 dw": {"pytorch": 1.0, "im2col": 0.5},
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '{"KEY": 3}',
        '{"KEY": {"pytorch": 1.0}}',
        '{"KEY": {"pytorch": 1.0, "im2col": NaN}}',
        '{"KEY": {"pytorch": 1.0, "im2col": Infinity}}',
        "[" * 200_000,
    ],
    ids=lambda content: content[:40],
)
def test_a_damaged_file_is_measured_again(content: str, file: Path, measured: list[Convolution]) -> None:
    file.write_text(content.replace("KEY", str(convolution())))
    with measuring():
        assert fastest_algorithm(convolution()) == "im2col"
    assert measured
    assert json.loads(file.read_text())[str(convolution())] == {"pytorch": 1.0, "im2col": 0.5}


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    file: Path, measured: list[Convolution], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    conv_selection._file.cache_clear()
    with measuring():
        assert fastest_algorithm(convolution()) == "im2col"
    assert measured and not file.exists()


@pytest.mark.parametrize("deterministic", [False, True])
def test_steps_measure_their_convolutions_unless_deterministic_algorithms_are_requested(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Convolution] = []

    def find(each: Convolution) -> str:
        found.append(each)
        return "pytorch"

    monkeypatch.setattr(conv_selection, "_chosen", {})
    monkeypatch.setattr(conv_selection, "_find", find)
    trainer = Trainer(*small_networks(), small_method(channels_last=True))
    assert not found
    torch.use_deterministic_algorithms(deterministic)
    try:
        trainer.iterate()
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(found) is not deterministic
    assert len(set(found)) == len(found)
    # Teacher, student and the student in the generator step, whose weights have no gradients.
    assert deterministic or {(each.of_x, each.of_weight, each.cached_weight) for each in found} >= {
        (False, False, True),
        (True, True, False),
        (True, False, False),
    }
