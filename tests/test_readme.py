"""What the README promises in code runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_trainer_example_gives_back_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(EXAMPLES[0], names)
    assert names["trainer"].finished  # type: ignore[attr-defined]
    assert names["student"] is names["trainer"].student  # type: ignore[attr-defined]


def test_the_kernel_example_fills_both_gradients() -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[1], names)
    assert len(EXAMPLES) == 2
    assert names["student_logits"].grad.abs().sum() > 0
    assert names["teacher_logits"].grad.abs().sum() > 0
