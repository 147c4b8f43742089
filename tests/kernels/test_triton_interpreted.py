"""The Triton kernels in interpreter mode on a CPU, which is selected at import."""

import numpy as np
import pytest

pytest.importorskip("triton")

import triton

from dfkd_fast.kernels.dispatch import interpreting
from tests.kernels.on_cpu import SHARED, run_on_cpu, run_pytest

INTERPRETER = {"TRITON_INTERPRET": "1"}

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="the interpreter runs in this process"),
    pytest.mark.skipif(
        triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
        reason="the interpreter of Triton 3.6 is incompatible with NumPy 2.4",
    ),
]


def test_kernels_pass_their_own_tests() -> None:
    run_pytest(["test_triton.py"], INTERPRETER)


@pytest.mark.parametrize("files", SHARED.values(), ids=SHARED)
def test_kernels_pass_the_tests_of_all_backends(files: tuple[str, ...], exhaustive: bool) -> None:
    run_on_cpu("triton", files, INTERPRETER, sample=not exhaustive)
