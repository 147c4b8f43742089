import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

TESTS = """
import time
from pathlib import Path
import pytest

@pytest.mark.parametrize("kind", ["together", pytest.param("alone", marks=pytest.mark.alone), "together"])
@pytest.mark.parametrize("number", range(10))
def test(number, kind, request):
    running = Path(__file__).with_name("running")
    running.mkdir(exist_ok=True)
    own = running / request.node.name
    own.touch()
    time.sleep(0.02)
    beside = [path.name for path in running.iterdir() if path != own]
    own.unlink()
    assert not beside if kind == "alone" else not any("alone" in name for name in beside)
"""


def test_nothing_runs_beside_a_test_that_is_alone(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone")
    (tmp_path / "test_all.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", "2", "-p", "tests.alone", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "30 passed" in run.stdout
