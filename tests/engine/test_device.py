import subprocess
import sys

import torch

from dfkd_fast.engine.device import peak_memory_bytes

ASK = "import torch; from dfkd_fast.engine.device import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
GIB = 1 << 30


def childs_peak() -> int:
    return int(subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout)


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    alone = childs_peak()
    ballast = torch.ones(GIB, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) > GIB
    assert abs(childs_peak() - alone) < GIB / 4
    del ballast


def test_the_peak_stays_when_memory_is_given_back() -> None:
    ballast = torch.ones(GIB // 2, dtype=torch.uint8)
    peak = peak_memory_bytes(torch.device("cpu"))
    del ballast
    assert peak_memory_bytes(torch.device("cpu")) >= peak > GIB // 2
