"""Dispatch by device, dtype and size; a forced backend never falls back silently."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_fast.doctor import Choice, choices
from dfkd_fast.kernels import (
    BackendError,
    batch_norm_act,
    bias_act,
    channel_moments,
    channel_sums,
    combine_moments,
    concat_generated,
    dispatch,
    ema_update_,
    js_discrepancy,
    kl_discrepancy,
    l1_discrepancy,
    operators,
    partial_moments,
    use_backend,
    winograd_conv2d,
    winograd_is_faster,
)
from dfkd_fast.kernels.dispatch import MIN_NUMEL, PARTIALLY_SUPPORTED, backends, choose, forced, unavailable_reason

CPU = torch.device("cpu")
CALL = "import torch; from dfkd_fast.kernels import channel_moments; print(channel_moments(torch.ones({size}, {dtype}))[0].dtype)"
needs_numba = pytest.mark.skipif(unavailable_reason("numba") is not None, reason="numba is not installed")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)


@needs_numba
@pytest.mark.parametrize("operation", MIN_NUMEL)
def test_large_cpu_tensors_use_numba_and_small_ones_the_reference(operation: str) -> None:
    elements = MIN_NUMEL[operation]
    assert choose(operation, CPU, [torch.float32, torch.bfloat16], elements) == "numba"
    assert choose(operation, CPU, [torch.float32], elements - 1) == "reference"


SOFT: dict[str, Any] = {"temperature": 1.0, "reduction": "sum", "scale_by_temperature_squared": False}
# Each function applied to an input whose total number of elements is the threshold.
FUNCTIONS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "ema_update_": ("ema_update_", lambda x: ema_update_([x[0], x[1]], [x[0].clone(), x[1].clone()], 0.5)),
    "l1_discrepancy": ("l1_discrepancy", lambda x: l1_discrepancy(*x, reduction="sum")),
    "kl_discrepancy": ("kl_discrepancy", lambda x: kl_discrepancy(*x, **SOFT)),
    "js_discrepancy": ("js_discrepancy", lambda x: js_discrepancy(*x, **SOFT)),
    "concat_generated": ("concat_generated", lambda x: concat_generated([*x[:, :, None, None]], activation="tanh", normalize="none")),
    "bias_act": ("bias_act", lambda x: bias_act(x[:, :, None], x.new_ones(8), activation="relu")),
    "bias_act with moments": ("bias_act with moments", lambda x: bias_act(x[:, :, None], x.new_ones(8), activation="relu", moments=True)),
    "channel_moments": ("channel_moments", lambda x: channel_moments(x[:, :, None])),
    "channel_sums": ("channel_moments", lambda x: channel_sums(x[:, :, None])),
    "partial_moments": ("channel_moments", lambda x: partial_moments(x[:, :, None])),
}


@pytest.fixture
def called_backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends of the operators called since the list was cleared."""
    backends: list[str] = []
    operator = operators.operator

    def spied(*arguments: Any) -> Any:
        backends.append(arguments[1])
        return operator(*arguments)

    monkeypatch.setattr(operators, "operator", spied)
    return backends


@needs_numba
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_uses_its_own_threshold(name: str, called_backends: list[str]) -> None:
    operation, function = FUNCTIONS[name]
    enough = torch.ones(2, 8, MIN_NUMEL[operation] // 16)
    for x, kernel in ((enough, True), (enough[:, :, :-1].clone(), False), (enough.double(), False)):
        called_backends.clear()
        with use_backend(None):
            function(x)
        assert set(called_backends) == ({"numba"} if kernel else set())
    for backend in ("reference", "numba"):
        called_backends.clear()
        with use_backend(backend):
            function(enough[:, :, :4].contiguous())
        assert set(called_backends) == ({"numba"} if backend == "numba" else set())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_unsupported_dtypes_use_the_reference(dtype: torch.dtype) -> None:
    assert choose("kl_discrepancy", CPU, [torch.float32, dtype], 1 << 30) == "reference"


def test_other_devices_use_the_reference() -> None:
    assert backends(torch.device("meta")) == ["reference"]
    assert choose("kl_discrepancy", torch.device("meta"), [torch.float32], 1 << 30) == "reference"


@needs_numba
def test_forced_backend_raises_for_an_unsupported_dtype() -> None:
    logits = torch.ones(2, 3, dtype=torch.float64)
    with (
        use_backend("numba"),
        pytest.raises(BackendError, match=r"numba is forced, but supports float32, bfloat16 and float16, not torch\.float64"),
    ):
        l1_discrepancy(logits, logits, reduction="sum")


@needs_numba
def test_forced_backend_raises_for_an_unsupported_layout_and_changes_nothing() -> None:
    average, source = torch.zeros(4, 6)[:, ::2], torch.ones(4, 6)[:, ::2]
    with use_backend("numba"), pytest.raises(BackendError, match="only dense tensors"):
        ema_update_([average], [source], 0.5)
    assert not average.any()


def test_forced_backend_raises_for_an_unsupported_device() -> None:
    meta = torch.ones(2, 3, device="meta")
    with use_backend("reference"):
        assert l1_discrepancy(meta, meta, reduction="sum").device.type == "meta"
    if unavailable_reason("numba") is None:
        with use_backend("numba"), pytest.raises(BackendError, match="numba is forced, but does not support meta tensors"):
            l1_discrepancy(meta, meta, reduction="sum")


PARTIALLY_SUPPORTED_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "winograd_conv2d": lambda x: winograd_conv2d(x, x.new_ones(64, 64, 3, 3)),
}


def test_every_partially_supported_operation_is_tested_here() -> None:
    assert PARTIALLY_SUPPORTED_CALLS.keys() == PARTIALLY_SUPPORTED.keys()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("operation", "backend"), [("winograd_conv2d", "triton"), ("winograd_conv2d", "cuda")])
def test_forced_backend_without_a_kernel_for_the_operation_raises(
    operation: str, backend: dispatch.Backend, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(16, 64, 8, 8, device=device).to(memory_format=torch.channels_last)
    monkeypatch.setitem(dispatch._UNAVAILABLE, backend, None)  # as if installed
    with use_backend(backend):
        with pytest.raises(BackendError, match=f"{backend} is forced, but has no kernel for {operation}"):
            PARTIALLY_SUPPORTED_CALLS[operation](x)
        assert not winograd_is_faster(x, x.new_ones(64, 64, 3, 3))
        assert Choice(operation, "an error", "an error") in choices()


def test_forced_triton_supports_batch_norm_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._UNAVAILABLE, "triton", None)  # as if installed
    monkeypatch.setattr(dispatch, "BACKENDS_BY_DEVICE", {"cpu": ["numba", "reference"], "cuda": ["cuda", "triton", "reference"]})
    for device in ("cpu", "meta"):
        x = torch.ones(16, 64, 8, 8, device=device)
        with use_backend("triton"), pytest.raises(BackendError, match=f"triton is forced, but does not support {device} tensors"):
            batch_norm_act(x, x.new_zeros(64), x.new_ones(64), None, None, training=True, momentum=0.1, eps=1e-5, activation="relu")
    if unavailable_reason("numba") is None:
        meta = torch.ones(2, 64, 8, 8, device="meta")
        with use_backend("numba"), pytest.raises(BackendError, match="numba is forced, but does not support meta tensors"):
            batch_norm_act(meta, None, None, None, None, training=True, momentum=0.1, eps=1e-5, activation="relu")
    with use_backend("triton"):
        assert Choice("batch_norm_act", "an error", "triton") in choices()
    with use_backend("reference"):
        assert Choice("batch_norm_act", "reference", "reference") in choices()


@pytest.mark.parametrize(("backend", "cpu", "gpu"), [("numba", "numba", "an error"), ("triton", "an error", "triton"), ("reference",) * 3])
def test_doctor_reports_the_device_that_a_forced_backend_does_not_support(
    backend: dispatch.Backend, cpu: str, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS_BY_DEVICE", {"cpu": ["numba", "reference"], "cuda": ["triton", "reference"]})
    monkeypatch.setitem(dispatch._UNAVAILABLE, backend, None)  # as if installed
    with use_backend(backend):
        assert Choice("kl_discrepancy", cpu, gpu) in choices()


@pytest.mark.parametrize("name", ["cudnn", ""])
def test_unknown_backend_raises_with_the_allowed_names(name: str) -> None:
    with pytest.raises(BackendError, match="must be one of reference, numba, triton, cuda"), use_backend(name):  # type: ignore[arg-type]
        pass


def test_blocks_nest_and_are_restored_after_an_error() -> None:
    before = forced()
    with use_backend("reference"):
        with use_backend(None):
            assert forced() is None
        with pytest.raises(ZeroDivisionError), use_backend(None):
            raise ZeroDivisionError
        assert forced() == "reference"
    assert forced() == before


def test_threads_are_independent() -> None:
    before, forced_there, proceed = forced(), threading.Event(), threading.Event()
    observed: list[str | None] = []

    def other() -> None:
        observed.append(forced())
        with use_backend(None), use_backend("reference"):
            forced_there.set()
            proceed.wait(30)
            observed.append(forced())
        observed.append(forced())

    thread = threading.Thread(target=other)
    with use_backend(None):
        thread.start()
        assert forced_there.wait(30)
        assert forced() is None
        proceed.set()
        thread.join()
        assert forced() is None
    assert observed == [before, "reference", before]


def test_asyncio_tasks_are_independent() -> None:
    observed: dict[str | None, list[str | None]] = {}

    async def task(backend: dispatch.Backend | None) -> None:
        with use_backend(backend):
            for _ in range(3):
                await asyncio.sleep(0)  # the other task's turn, in its block
                observed.setdefault(backend, []).append(forced())

    async def both() -> None:
        await asyncio.gather(task(None), task("reference"))

    before = forced()
    asyncio.run(both())
    assert observed == {None: [None] * 3, "reference": ["reference"] * 3}
    assert forced() == before


def test_a_copied_context_keeps_its_backend() -> None:
    with use_backend("reference"):
        context = copy_context()
    with use_backend(None):
        assert context.run(forced) == "reference"
        assert forced() is None


@needs_numba
def test_compiled_function_uses_the_backend_of_the_calling_thread() -> None:
    torch.compiler.reset()

    def function(x: Tensor) -> Tensor:
        with use_backend("reference"):
            inside = choose("kl_discrepancy", CPU, [x.dtype], 1)
        return x + 10 * (inside == "reference") + (choose("kl_discrepancy", CPU, [x.dtype], 1 << 30) == "reference")

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    observed: list[float] = []

    def call() -> None:
        observed.append(compiled(torch.zeros(())).item())

    def other() -> None:
        with use_backend(None):
            call()

    with use_backend("reference"):
        call()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        call()
    with use_backend(None):
        call()
    assert observed == [11, 10, 11, 10]


BACKWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "kl_discrepancy": lambda x: kl_discrepancy(x, x.detach().cos(), **SOFT),
    "l1_discrepancy": lambda x: l1_discrepancy(x, x.detach().cos(), reduction="sum"),
    "concat_generated": lambda x: concat_generated([x], activation="tanh", normalize="none").sum(),
    "bias_act": lambda x: bias_act(x, torch.ones(3), activation="relu").sum(),
    "bias_act with moments": lambda x: bias_act(x, torch.ones(3), activation="relu", moments=True)[1].parts.sum(),
    "channel_moments": lambda x: channel_moments(x)[1].sum(),
    "channel_sums": lambda x: channel_sums(x)[1].sum(),
    "combine_moments": lambda x: combine_moments([partial_moments(x)]).sum(),
}


@needs_numba
@pytest.mark.parametrize("name", BACKWARD)
def test_backward_pass_uses_the_backend_of_its_forward_pass(name: str, called_backends: list[str]) -> None:
    x = torch.randn(2, 3, 4, 5).requires_grad_()
    with use_backend("numba"):
        loss = BACKWARD[name](x)
    called_backends.clear()
    thread = threading.Thread(target=loss.backward, kwargs={"retain_graph": True})  # as autograd's own threads do for a GPU
    with use_backend("reference"):
        thread.start()
        thread.join()
    assert set(called_backends) == {"numba"}
    assert x.grad is not None


def test_unknown_backend_in_the_environment_is_reported_at_the_first_call() -> None:
    output = python(
        "print('begun', flush=True); " + CALL.format(size="(1, 1, 1, 1)", dtype="dtype=torch.float32"), DFKD_FAST_BACKEND="fast"
    )
    assert output.stdout == "begun\n"
    assert ", in choose\n" in output.stderr
    assert output.stderr.splitlines()[-1].endswith(
        "BackendError: DFKD_FAST_BACKEND must be one of reference, numba, triton, cuda, not 'fast'"
    )


def test_environment_forces_a_backend() -> None:
    backend = "reference" if unavailable_reason("numba") else "numba"
    code = "from dfkd_fast.kernels import dispatch; print(dispatch.forced())"
    assert python(code, DFKD_FAST_BACKEND=backend).stdout == f"{backend}\n"


def test_disabled_numba_falls_back_to_the_reference_with_a_reason() -> None:
    call = CALL.format(size="(8, 64, 32, 32)", dtype="dtype=torch.float32")
    output = python(f"{call}; from dfkd_fast.kernels import dispatch; print(dispatch.unavailable_reason('numba'))", NUMBA_DISABLE_JIT="1")
    reason = "NUMBA_DISABLE_JIT is set" if find_spec("numba") else "numba is not installed"
    assert (output.returncode, output.stdout.splitlines()[-1], output.stderr) == (0, reason, "")


def test_a_missing_extension_of_the_environment_variable_is_named(tmp_path: Path) -> None:
    code = "from dfkd_fast.kernels import extension; extension.torch.version.cuda = '13.0'; print(extension.load_error())"
    path = tmp_path / "extension.so"
    assert python(code, DFKD_FAST_EXTENSION=str(path)).stdout == f"DFKD_FAST_EXTENSION is {path}, which is not a file\n"


def test_without_numba_and_triton_everything_uses_the_reference() -> None:
    hidden = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("numba", "triton") else find_spec(name, *rest)
sys.modules["numba"] = None
"""
    call = CALL.format(size="(8, 64, 32, 32)", dtype="dtype=torch.float32")
    forced = "\nfrom dfkd_fast.kernels import use_backend\nwith use_backend('numba'): pass"
    output = python(hidden + call + forced)
    assert output.stdout == "torch.float32\n", output.stderr
    assert output.stderr.splitlines()[-1].endswith("backend is 'numba', which is unavailable: numba is not installed")
