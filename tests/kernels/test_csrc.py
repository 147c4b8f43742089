"""The CUDA extension on machines without a GPU: it compiles, loads, and registers the same operators as the other backends.

Its results are tested together with those of the other backends, on a GPU.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast.kernels import build
from dfkd_fast.kernels.dispatch import unavailable_reason
from dfkd_fast.kernels.operators import SCHEMAS

KERNELS = Path(build.__file__).resolve().parent
HOPPER = ("-gencode=arch=compute_90,code=sm_90",)
OTHER_PYTHON = os.environ.get("DFKD_FAST_OTHER_PYTHON")
needs_other_python = pytest.mark.skipif(not OTHER_PYTHON, reason="DFKD_FAST_OTHER_PYTHON names no interpreter with another PyTorch")
REASON = build.unbuildable_reason()

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the extension cannot be built here: {REASON}")


def python(code: str, cwd: Path, interpreter: str = sys.executable, **environment: str) -> str:
    done = subprocess.run(
        [interpreter, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of kernels/ with the compiled extension; compilation must not give warnings."""
    folder_copy = tmp_path_factory.mktemp("extension")
    shutil.copytree(KERNELS, folder_copy / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build.compile_extension(folder_copy / "kernels" / "dfkd_fast_cuda.so", architectures=HOPPER)
    return folder_copy


@pytest.fixture(scope="module")
def binary(folder: Path) -> Path:
    return folder / "kernels" / "dfkd_fast_cuda.so"


def test_extension_loads_without_a_gpu_and_has_the_schemas_of_the_other_backends(folder: Path) -> None:
    code = """
import json, torch, kernels
from kernels.operators import SCHEMAS
assert kernels.extension.load_error() is None, kernels.extension.load_error()
print(json.dumps({name: str(getattr(torch.ops.dfkd_fast, name).cuda._schema) for name in SCHEMAS}))
"""
    registered = json.loads(python(code, folder))
    assert len(registered) == 22
    for name, schema in SCHEMAS.items():
        assert torch._C.parse_schema(registered[name]) == torch._C.parse_schema(f"dfkd_fast::{name}.cuda{schema}"), name


def test_operators_have_fake_implementations(folder: Path) -> None:
    code = """
import torch, kernels
from torch._subclasses.fake_tensor import FakeTensorMode
operators = torch.ops.dfkd_fast
with FakeTensorMode():
    logits = torch.empty(4, 11, 8, 8, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    loss, student, teacher, count = operators.kl_forward.cuda(logits, logits.float(), 2.0, 1.0, True, False, True)
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cuda")
    assert (student.stride(), student.dtype, teacher.shape, count.dtype) == (logits.stride(), torch.bfloat16, (0,), torch.int64)
    batch = operators.concat_forward.cuda([torch.empty(2, 3, 8, 8, device="cuda")] * 2, "tanh", None, None, torch.float16, True)
    assert (batch.shape, batch.dtype) == ((4, 3, 8, 8), torch.float16) and batch.is_contiguous(memory_format=torch.channels_last)
    parts, center = operators.partial_moments.cuda(logits, "none", 7)
    assert (parts.shape, center.shape, parts.dtype, center.dtype) == ((2, 11, 14), (11,), torch.float32, torch.float32)
    assert [t.dtype for t in operators.combine_moments.cuda([parts], [center], None, None, True)] == [torch.float64, torch.float32]
    operators.ema_update_.cuda([torch.empty(3, device="cuda")], [torch.empty(3, device="cuda")], [], 0.9, None)
"""
    python(code, folder)


def test_binary_depends_on_torch_only_and_not_on_python(binary: Path) -> None:
    def read(*command: str) -> str:
        return subprocess.run([*command, str(binary)], capture_output=True, text=True, check=True).stdout

    needed = {line.split("[")[1].rstrip("]") for line in read("readelf", "-d").splitlines() if "(NEEDED)" in line}
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed  # required for symbol resolution
    assert not any(name.startswith(("libtorch_python", "libpython", "libc10", "libcudart")) for name in needed)
    symbols = {line.split()[-1] for line in read("nm", "-D").splitlines()}
    assert not any(symbol.startswith(("PyInit", "Py_", "_ZN3c10", "_ZN2at")) for symbol in symbols)


def registered_elsewhere(binary: Path, cwd: Path, interpreter: str) -> str:
    """Load a binary in a separate process, compare its schemas, and return that PyTorch's version."""
    code = f"""
import json, torch
torch.ops.load_library({str(binary)!r})
print(json.dumps([torch.__version__, *(str(getattr(torch.ops.dfkd_fast, name).cuda._schema) for name in {list(SCHEMAS)})]))
"""
    version, *schemas = json.loads(python(code, cwd, interpreter))
    for (name, schema), registered in zip(SCHEMAS.items(), schemas, strict=True):
        assert torch._C.parse_schema(registered) == torch._C.parse_schema(f"dfkd_fast::{name}.cuda{schema}"), name
    return version


@needs_other_python
def test_the_same_binary_works_with_another_pytorch(binary: Path, tmp_path: Path) -> None:
    assert registered_elsewhere(binary, tmp_path, str(OTHER_PYTHON)) != str(torch.__version__)


@needs_other_python
def test_a_binary_built_with_another_pytorchs_headers_works_with_this_one(tmp_path: Path) -> None:
    binary = tmp_path / "extension.so"
    # only build.py: that environment may lack the dependencies of kernels/
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(KERNELS)!r})
import build
build.compile_extension(Path({str(binary)!r}), architectures={HOPPER})
"""
    python(code, tmp_path, str(OTHER_PYTHON))
    assert registered_elsewhere(binary, tmp_path, sys.executable) == str(torch.__version__)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("int broken( { return 0; }", "error"),
        ("__global__ void kernel() { int forgotten = 1; }", "forgotten"),  # warnings are errors
        ("#include <torch/none.h>", "torch/none.h"),
    ],
)
def test_a_failed_build_reports_the_cause_first_and_keeps_the_old_binary(source: str, cause: str, tmp_path: Path) -> None:
    old = tmp_path / "extension.so"
    old.write_text("old")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "broken.cu").write_text(source)
    with pytest.raises(build.BuildError) as raised:
        build.compile_extension(old, sources=tmp_path / "sources", architectures=HOPPER)
    first, *_ = str(raised.value).splitlines()
    assert first.startswith("nvcc failed: ")
    assert "broken.cu" in first
    assert cause in first
    assert old.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"extension.so", "sources"}


def test_a_build_that_cannot_start_reports_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DFKD_FAST_BUILD", "0")
    with pytest.raises(build.BuildError, match=r"^DFKD_FAST_BUILD is 0$"):
        build.compile_extension(tmp_path / "extension.so")


def test_missing_cuda_toolkit_or_cuda_support_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_nvcc", lambda: None)
    assert "no nvcc" in str(build.unbuildable_reason())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in str(build.unbuildable_reason())


Calls = dict[str, tuple[Any, ...]]


def _calls(device: str) -> Calls:
    """Arguments for every operator, with several layouts and dtypes."""
    logits = torch.randn(4, 11, 8, 8, device=device).to(memory_format=torch.channels_last)
    teacher = torch.randn(4, 22, 8, 8, device=device)[:, ::2].bfloat16()
    raws = [torch.randn(2, 3, 8, 8, device=device), torch.randn(3, 3, 8, 8, device=device).bfloat16()]
    mean, std = torch.randn(2, 3, device=device), torch.rand(2, 3, device=device) + 0.5
    vectors = [torch.randn(11, device=device) for _ in range(3)]
    scalar = torch.tensor(0.5, device=device)
    return {
        "ema_update_": ([torch.randn(70, device=device)], [torch.randn(70, device=device)], [], 0.9, scalar),
        "l1_forward": (logits, teacher, 1.0, True, True),
        "kl_forward": (logits, teacher, 2.0, 1.0, True, True, True),
        "js_forward": (logits, teacher, 2.0, 1.0, True, False, False),
        "scale_gradients": (logits, teacher.contiguous(), scalar, 1.0, -1.0, torch.float16, torch.float32),
        "scale_gradients_": (logits.clone(), teacher.contiguous(), scalar, 1.0, -1.0),
        "partial_moments": (logits, "none", 3),
        "combine_moments": ([torch.randn(2, 11, 3, device=device)], vectors[:1], None, None, False),
        "moments_backward": (teacher, *vectors, 0.5),
        "concat_forward": (raws, "tanh", mean, std, torch.bfloat16, True),
        "concat_forward_out": (torch.empty(5, 3, 8, 8, device=device), raws, "sigmoid", None, None),
        "concat_backward": (raws[1], raws[1], "tanh", mean[0], std[0], None, None),
        "concat_gradient_moments": (raws[1], raws[1], "tanh", mean[0], std[0]),
    }


@pytest.fixture
def calls() -> Calls:
    if reason := unavailable_reason("cuda"):
        pytest.skip(reason)
    return _calls("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_pass_opcheck(name: str, calls: Calls) -> None:
    operator = getattr(torch.ops.dfkd_fast, name).cuda
    torch.library.opcheck(operator, calls[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_captured_in_a_cuda_graph_read_new_inputs(name: str, calls: Calls) -> None:
    def results() -> list[torch.Tensor]:
        returned = operator(*arguments)
        if returned is None:  # it writes to its first argument
            return arguments[0] if isinstance(arguments[0], list) else [arguments[0]]
        return [returned] if isinstance(returned, torch.Tensor) else list(returned)

    operator, arguments = getattr(torch.ops.dfkd_fast, name).cuda, calls[name]
    flat = [tensor for value in arguments for tensor in (value if isinstance(value, list) else [value])]
    inputs = [tensor for tensor in flat if isinstance(tensor, torch.Tensor) and tensor.numel() > 1]
    results()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    for tensor in inputs:
        tensor.mul_(0.5)
    before = [tensor.clone() for tensor in inputs]
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    for tensor, value in zip(inputs, before, strict=True):
        tensor.copy_(value)
    for actual, expected in zip(replayed, results(), strict=True):
        assert torch.equal(actual, expected)
