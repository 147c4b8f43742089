"""The first stage of python -m bench gpu: a missing extension is compiled for the GPU of the host."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import environment
from bench.gpu.context import Context
from bench.gpu.records import Record
from dfkd_fast.kernels.build import BuildError


@pytest.fixture
def binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Path of the missing extension, on a host with an H100."""
    path = tmp_path / "dfkd_fast_cuda.so"
    monkeypatch.setattr(environment, "BINARY", path)
    monkeypatch.setattr("dfkd_fast.kernels.dispatch.unavailable_reason", lambda backend: "not built" if backend == "cuda" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return path


def context() -> Context:
    records: list[Record] = []
    return Context("environment", "cuda", False, time.monotonic() + 60, records.append)


def test_a_missing_extension_is_compiled_for_the_gpu_and_loaded(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr(environment, "compile_extension", lambda path, architectures: events.append((path, architectures)))
    monkeypatch.setattr(torch.ops, "load_library", events.append)
    assert environment._reason(context(), "cuda") is None
    assert events == [(binary, ["-gencode=arch=compute_90,code=sm_90"]), str(binary)]


def test_an_extension_that_does_not_compile_is_reported_with_both_reasons(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, architectures: object) -> None:
        raise BuildError("no nvcc\nmore")

    monkeypatch.setattr(environment, "compile_extension", fail)
    assert environment._reason(context(), "cuda") == "not built; and no nvcc"


def test_an_extension_that_cannot_be_loaded_is_not_overwritten(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary.write_text("of another machine")
    assert environment._reason(context(), "cuda") == "not built"
    assert binary.read_text() == "of another machine"


def test_the_reason_for_triton_is_the_dispatcher_s(binary: Path) -> None:
    assert environment._reason(context(), "triton") is None
