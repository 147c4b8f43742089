import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")
import numba

from dfkd_fast.kernels import l1_discrepancy, simd, use_backend

Array = np.ndarray[Any, np.dtype[Any]]
EPS, TINY, HUGE = 2.0**-23, 2.0**-126, float(np.finfo(np.float32).max)
INF, NAN = np.inf, np.nan


def singles(values: list[float]) -> Array:
    return np.array(values, dtype=np.float32)


# Every 4099th bit pattern, which covers all exponents and many mantissas of both signs; then edge cases.
PATTERNS = np.arange(0, 1 << 32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
EDGES = [
    0.0,
    TINY,
    TINY / 2,
    2.0**-149,
    0.5,
    0.55,
    1.0,
    9.0,
    80.0,
    87.3,
    87.4,
    88.6,
    88.7,
    88.72284,
    88.8,
    103.9,
    104.0,
    127.0,
    128.0,
    HUGE,
    INF,
]
NEAR = np.concatenate([np.float32(edge) * singles([1 - EPS, 1, 1 + EPS]) for edge in EDGES[:-2]])
NUMBERS = np.concatenate([PATTERNS, NEAR, -NEAR, singles([HUGE, -HUGE, INF, -INF, NAN]), np.linspace(-110, 110, 200_001, dtype=np.float32)])


def vectorized(function: Any) -> Callable[[Array], Array]:
    """The function in a loop that LLVM vectorizes, as in a kernel."""

    @numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def over(x: Array, out: Array) -> None:
        for i in range(len(x)):
            out[i] = function(x[i])

    def call(x: Array) -> Array:
        out = np.full(len(x), NAN, np.float32)
        over(x, out)
        return out

    return call


def relative(actual: Array, exact: Array) -> Array:
    """Relative errors; for subnormal values, relative to the smallest normal number."""
    return np.asarray(np.abs(actual - exact) / np.maximum(np.abs(exact), TINY))


def test_exp_is_accurate_to_an_ulp_for_normal_results() -> None:
    actual = vectorized(simd.exp)(NUMBERS)
    inside, below, above = (NUMBERS >= -87.3) & (NUMBERS <= 88), NUMBERS < -87.31, NUMBERS > 88.001
    with np.errstate(all="ignore"):
        exact = np.exp(NUMBERS.astype(np.float64))
    assert relative(actual[inside], exact[inside]).max() < 1.5 * EPS
    assert (actual[below] == 0).all()
    assert (actual[above] == INF).all()
    assert np.isnan(actual[np.isnan(NUMBERS)]).all()
    assert (actual[NUMBERS == 0] == 1).all()


def test_exp_of_negative_is_accurate() -> None:
    x = NUMBERS[(NUMBERS <= 0) | np.isnan(NUMBERS)]
    actual = vectorized(simd.exp_of_negative)(x)
    with np.errstate(all="ignore"):
        exact = np.exp(x.astype(np.float64))
    inside, below = x >= -87.3, x < -87.31
    assert relative(actual[inside], exact[inside]).max() < 1.5 * EPS
    assert (actual[below] <= TINY).all()
    assert (actual[below] >= 0).all()
    assert np.isnan(actual[np.isnan(x)]).all()
    assert (actual[x == 0] == 1).all()


def test_log1p_is_accurate_to_two_ulps_from_0_to_1() -> None:
    x = np.concatenate([NUMBERS[(NUMBERS >= 0) & (NUMBERS <= 1)], np.linspace(0, 1, 100_001, dtype=np.float32)])
    assert relative(vectorized(simd.log1p)(x), np.log1p(x.astype(np.float64))).max() < 2 * EPS
    assert np.isnan(vectorized(simd.log1p)(singles([NAN]))).all()


def test_tanh_is_accurate_to_two_ulps_everywhere() -> None:
    actual = vectorized(simd.tanh)(NUMBERS)
    numbers = ~np.isnan(NUMBERS)
    assert relative(actual[numbers], np.tanh(NUMBERS[numbers].astype(np.float64))).max() < 2 * EPS
    assert np.isnan(actual[~numbers]).all()
    assert (np.abs(actual[numbers]) <= 1).all()
    assert (actual[np.abs(NUMBERS) > 10] == np.sign(NUMBERS[np.abs(NUMBERS) > 10])).all()


def test_sigmoid_is_accurate_in_absolute_and_relative_error() -> None:
    actual = vectorized(simd.sigmoid)(NUMBERS)
    numbers = ~np.isnan(NUMBERS)
    with np.errstate(all="ignore"):
        exact = 1 / (1 + np.exp(-NUMBERS.astype(np.float64)))
    assert np.abs(actual - exact)[numbers].max() < EPS
    inside = NUMBERS > -87
    assert relative(actual[inside], exact[inside]).max() < 2.5 * EPS
    assert np.isnan(actual[~numbers]).all()
    assert (actual[NUMBERS == INF] == 1).all()
    assert (actual[NUMBERS == -INF] == 0).all()


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65536 numbers of a half-precision dtype."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@numba.njit  # type: ignore[untyped-decorator]
def widen_all(typed: Any, out: Array) -> None:
    elements = simd.pointer(typed)
    for i in range(len(out)):
        out[i] = simd.widen(elements[i])


@numba.njit  # type: ignore[untyped-decorator]
def narrow_all(x: Array, typed: Any) -> None:
    elements = simd.pointer(typed)
    for i in range(len(x)):
        elements[i] = simd.narrow(x[i], typed)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(x.shape, dtype=dtype)
    narrow_all(x.numpy(), simd.typed_pointer(out))
    return out


def same(actual: Tensor, expected: Tensor) -> bool:
    """Return whether tensors are bitwise equal, apart from NaN payloads."""
    bits = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    numbers = ~expected.isnan()
    return torch.equal(actual.isnan(), ~numbers) and torch.equal(actual.view(bits)[numbers], expected.view(bits)[numbers])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_round_trips_as_in_pytorch(dtype: torch.dtype) -> None:
    numbers_of_dtype = patterns(dtype)
    wide = np.zeros(len(numbers_of_dtype), np.float32)
    widen_all(simd.typed_pointer(numbers_of_dtype), wide)
    assert same(torch.from_numpy(wide), numbers_of_dtype.float())
    assert same(narrowed(torch.from_numpy(wide), dtype), numbers_of_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_precision_matches_pytorch(dtype: torch.dtype) -> None:
    numbers_of_dtype = patterns(dtype)
    wide = numbers_of_dtype[numbers_of_dtype.isfinite()].double().sort().values
    middle = ((wide[1:] + wide[:-1]) / 2).float()  # exact in float32: ties, which go to the even one
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (INF, -INF)]
    for x in (middle, *beside, torch.from_numpy(NUMBERS)):
        assert same(narrowed(x, dtype), x.to(dtype))


def test_float32_and_int8_convert_exactly() -> None:
    x = torch.from_numpy(NUMBERS)
    wide = np.zeros(len(x), np.float32)
    widen_all(simd.typed_pointer(x), wide)
    assert same(torch.from_numpy(wide), x)
    assert same(narrowed(x, torch.float32), x)
    signs = torch.tensor([-1, 0, 1, -128, 127], dtype=torch.int8)
    wide = np.zeros(len(signs), np.float32)
    widen_all(simd.typed_pointer(signs), wide)
    assert wide.tolist() == signs.tolist()


def test_launching_numba_threads_does_not_change_torch_num_threads() -> None:
    # In a separate process, because numba launches its threads once.
    code = """
import torch
torch.set_num_threads(1)
from dfkd_fast.kernels import l1_discrepancy, simd, use_backend
with simd.threads:
    pass
print(torch.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert completed.stdout.split() == ["1"]


def test_compiled_and_cached_kernels_are_bitwise_equal_for_any_number_of_threads(tmp_path: Path, exhaustive: bool) -> None:
    dtypes = ["float32", *(["bfloat16", "float16"] if exhaustive else [])]

    def results(threads: int, seed: int) -> dict[str, str]:
        command = [sys.executable, "-m", "tests.kernels.every_kernel", str(threads), *dtypes]
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "2", "PYTHONHASHSEED": str(seed)}
        completed = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False)
        assert completed.returncode == 0, completed.stderr
        read: dict[str, str] = json.loads(completed.stdout)
        return read

    def cache_files() -> list[Path]:
        return sorted(tmp_path.rglob("*.nbi"))

    compiled = results(threads=1, seed=1)
    kernels = {path.name.split(".")[1].split("-")[0] for path in cache_files()}
    assert kernels >= {"_l1", "_update", "_forward", "_sum_rows", "_sums", "_to_tiles"}
    assert not differences(compiled, results(threads=2, seed=2))
    # Some kernels compiled, the others loaded from the cache.
    for index in cache_files():
        if index.name.split(".")[1].startswith(("_backward-", "_sum_rows-", "_row_by_row-")):
            index.unlink()
    assert not differences(compiled, results(threads=1, seed=3))


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if one[key] != other[key]]


def test_sum_over_blocks_does_not_depend_on_the_number_of_threads() -> None:
    # 2²⁴ + 1 is midway between two float32 numbers, so that the result depends on the order of summation.
    student = torch.zeros(64, simd.BLOCK)
    student[0, 0], student[1, 0], student[32:, 0] = 2.0**24, 1.0, 2.0**-30
    losses = set()
    for threads in {1, min(2, numba.config.NUMBA_NUM_THREADS)}:
        torch.set_num_threads(threads)
        with use_backend("numba"):
            losses.add(l1_discrepancy(student, torch.zeros_like(student), reduction="sum").item())
    assert len(losses) == 1


FORKING = """
import hashlib, multiprocessing, os, sys
import torch
from torch.utils.data import DataLoader, Dataset
from dfkd_fast.kernels import channel_moments, kl_discrepancy, use_backend

def results(_=0):
    logits = torch.arange(64 * 100.0).sin().view(64, 100)
    student = logits.clone().requires_grad_()
    with use_backend("numba"):
        loss = kl_discrepancy(student, logits.square(), temperature=2.0, reduction="mean", scale_by_temperature_squared=True)
        loss.backward()
        mean, variance = channel_moments(logits.view(4, 16, 10, 10))
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in (loss, student.grad, mean, variance))).hexdigest()

class Results(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return results()

def one_thread():
    torch.set_num_threads(1)  # as DataLoader workers do; PyTorch's threads do not survive a fork either

torch.set_num_threads(2)
if WARM:
    parents = results()
"""
FORKS = {
    "os.fork": """
pid = os.fork()
if pid == 0:
    one_thread()
    print(results(), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
""",
    "multiprocessing": """
with multiprocessing.get_context("fork").Pool(2, one_thread) as pool:
    print(*pool.map(results, range(4)))
""",
    "DataLoader": """
for batch in DataLoader(Results(), batch_size=2, num_workers=2, multiprocessing_context="fork"):
    print(*batch)
""",
    "a fork while another thread runs kernels": """
import threading, time
stop = False
def run():
    while not stop:
        results()
thread = threading.Thread(target=run)
thread.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        one_thread()
        print(results(), flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop = True
thread.join()
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(("fork", "warm"), [*((fork, True) for fork in FORKS), ("os.fork", False)])
def test_a_forked_child_computes_the_same_results(fork: str, warm: bool) -> None:
    code = f"WARM = {warm}\n" + FORKING + FORKS[fork] + "torch.set_num_threads(2)\nprint(results())\n"
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert completed.returncode == 0, completed.stderr
    printed = completed.stdout.split()
    assert len(printed) > 1
    assert len(set(printed)) == 1
