import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import triton

from dfkd_fast.kernels.dispatch import interpreting


@pytest.mark.skipif(interpreting(), reason="test_triton.py runs in this process")
@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 asks numpy 2.4 for an integer that it no longer gives",
)
def test_kernels_pass_their_tests_under_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("test_triton.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " skipped" not in run.stdout
