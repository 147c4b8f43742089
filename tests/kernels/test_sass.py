"""The machine code of the CUDA kernels: consecutive elements are stored 16 bytes at a time.

Neither the compiler nor the disassembler needs a GPU.
"""

import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dfkd_fast.kernels import build

REASON = build.unbuildable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"csrc cannot be compiled here: {REASON}")

Stores = Counter[str]  # number of stores by width in bits: "128", "64", "32", "U16", "U8"
SIZES = (4, 2, 2)  # bytes of float32, bfloat16 and float16: a kernel has stores for each


def cuobjdump() -> str:
    """Return the path of cuobjdump, from the CUDA toolkit or Triton."""
    triton = find_spec("triton")
    triton_bin = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin") if triton and triton.origin else ""
    path = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=triton_bin)
    if path is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with Triton")
    return path


def code_of(source: Path, folder: Path) -> dict[str, str]:
    """Return the machine code of the kernels in a source file, by mangled name."""
    cubin = folder / "kernels.cubin"
    includes = "-I", build.SOURCES, "-isystem", Path(torch.__file__).parent / "include"
    command = [build._nvcc(), *build.FLAGS, "-cubin", "-arch=sm_90", *includes, source, "-o", cubin]
    subprocess.run([str(word) for word in command], check=True)
    code = subprocess.run([cuobjdump(), "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    _, *functions = re.split(r"Function : (\S+)", code)
    return dict(zip(functions[::2], functions[1::2], strict=True))


def stores(source: str, folder: Path) -> dict[str, Stores]:
    """Return the global stores of the kernels in a source file, by mangled name."""
    return {name: widths("STG?", code) for name, code in code_of(build.SOURCES / source, folder).items()}


def widths(instruction: str, code: str) -> Counter[str]:
    return Counter(match[1] or "32" for match in re.finditer(rf"\b{instruction}\.E(?:\.BYPASS)?(?:\.(128|64|U16|U8)\b)?", code))


@pytest.mark.parametrize(("source", "kernels"), [("concat.cu", 6), ("moments.cu", 3), ("bias_act.cu", 6)])
def test_tiles_are_stored_16_bytes_at_a_time(source: str, kernels: int, tmp_path: Path) -> None:
    checked = 0
    for name, found in stores(source, tmp_path).items():
        tile = re.search(r"tile_kernel.*?TileILi(\d)ELi(\d)E", name)
        if tile is None or tile.groups() == ("1", "1"):
            continue
        pixels, channels = map(int, tile.groups())
        layouts = 2 if pixels > 1 and channels > 1 else 1  # interleaved or planar, chosen at run time
        tensors = 2 if source == "bias_act.cu" and "Backward" in name else 1
        assert found == {"128": tensors * layouts * sum(pixels * channels * size // 16 for size in SIZES)}, name
        checked += 1
    assert checked == kernels


def test_gradients_are_stored_16_bytes_at_a_time_except_for_the_tail(tmp_path: Path) -> None:
    (found,) = stores("gradients.cu", tmp_path).values()
    vector = 8  # elements per thread and side; stored one by one only at the end of a tensor or if unaligned
    assert found == {"128": 2 * sum(vector * size // 16 for size in SIZES), "32": 2 * vector, "U16": 2 * 2 * vector}


def test_averages_and_shadows_are_stored_vectorized_except_for_the_tail(tmp_path: Path) -> None:
    kernels = stores("ema.cu", tmp_path)
    assert len(kernels) == 2  # for short lists and for long ones
    for found in kernels.values():
        del found["U8"]  # copies of unaligned integers
        # Four vectors of four elements: 16 bytes of averages and float32 shadows, 8 of half-precision shadows, and
        # as many single elements where a tensor ends or is not aligned. Two more of 16 bytes copy integers.
        assert found == {"128": 4 + 4 + 2, "64": 4 + 4, "32": 4 + 4, "U16": 4 + 4}


DENSE_ROWS = """
#include "dense_rows.cuh"
template __global__ void dfkd_fast::dense_kernel<dfkd_fast::KullbackLeibler, 12>(
    const __grid_constant__ dfkd_fast::Problem, const __grid_constant__ dfkd_fast::Sides);
auto flat = dfkd_fast::flat_l1_kernel;
"""


def test_dense_logits_are_read_and_gradients_written_16_bytes_at_a_time_except_for_the_tail(tmp_path: Path) -> None:
    source = tmp_path / "dense_rows.cu"
    source.write_text(DENSE_ROWS)
    kernels = code_of(source, tmp_path)
    (dense,) = (code for name, code in kernels.items() if "dense_kernel" in name)
    (flat,) = (code for name, code in kernels.items() if "flat_l1_kernel" in name)
    # Both kernels end with a store of the partial sums (128) or of the loss (32) and the agreement (64).
    assert set(widths("LDGSTS", dense)) == {"128"}
    assert widths("LDG", dense) == {"U8": 2}  # the last bytes of each side that are less than a vector
    assert widths("STG", dense).keys() == {"128", "U8", "32", "64"}
    assert widths("STG", dense)["U8"] == 2
    assert not re.search(r"\b(LDL|STL)\b", dense)  # no spills
    vector = 16  # elements per thread; one by one only at the end of a tensor or if unaligned
    assert widths("LDG", flat)["128"] == 2 * sum(vector * size // 16 for size in SIZES)
    assert widths("STG", flat) == {"128": 1 + 1, "U8": vector, "32": 1, "64": 1}
