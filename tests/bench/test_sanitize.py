"""The tests that bench/sanitize.sh selects, with fakes of compute-sanitizer and of a PyTorch that finds a GPU."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commands(folder: Path, *arguments: str) -> dict[str, list[str]]:
    """Return the Python arguments that the script passes to each tool of compute-sanitizer."""
    for name, script in (("python", "true"), ("compute-sanitizer", f'printf "%s\\n" "$@" > "{folder}/$2.txt"')):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(ROOT / "bench" / "sanitize.sh"), *arguments], env=environment, check=True)
    runs = {path.stem: path.read_text().splitlines() for path in folder.glob("*.txt")}
    return {tool: run[run.index("python") + 1 :] for tool, run in runs.items()}


def test_a_short_selection_launches_every_kernel_of_the_extension(tmp_path: Path) -> None:
    run = commands(tmp_path)
    assert run.keys() == {"memcheck", "racecheck"}
    collect = [sys.executable, *run["memcheck"], "--collect-only", "-p", "no:cacheprovider"]
    output = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tests = [line for line in output.splitlines() if line.startswith("tests/")]
    assert all("[cuda" in test for test in tests)
    files = Counter(Path(test.split("::")[0]).name for test in tests)
    assert files.keys() == {"test_bias_act.py", "test_concat.py", "test_discrepancy.py", "test_ema.py", "test_moments.py"}
    assert all(5 <= count <= 40 for count in files.values()), files
    for kind in ("l1", "kl", "js"):
        shapes = {test.rpartition(f"[cuda-{kind}-")[2] for test in tests}
        assert shapes >= {"(5, 10)]", "(3, 1001)]", "(2, 11, 33, 31)]", "(2, 21, 5, 3)]", "(2, 100, 3, 1)]"}


def test_further_arguments_reach_pytest_after_the_selection(tmp_path: Path) -> None:
    for run in commands(tmp_path, "-k", "moments and bfloat16", "-x").values():
        assert run[:2] == ["-m", "pytest"]
        assert run.index("moments and bfloat16") > run.index("cuda")
        assert "-x" in run
