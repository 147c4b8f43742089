"""README.md: its examples run, its links and images exist, and it stays short."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINKS = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
MAX_WORDS = 1500


def test_the_trainer_example_returns_a_trained_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(EXAMPLES[0], names)
    assert names["trainer"].finished
    assert names["student"] is names["trainer"].student


def test_the_kernel_example_computes_both_gradients() -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[1], names)
    assert len(EXAMPLES) == 2
    assert names["student_logits"].grad.abs().sum() > 0
    assert names["teacher_logits"].grad.abs().sum() > 0


def test_it_is_short() -> None:
    assert len(README.split()) <= MAX_WORDS


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_a_linked_file_exists(link: str) -> None:
    assert (ROOT / link.partition("#")[0]).is_file()


def test_the_badges_show_the_projects_own_versions() -> None:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None and spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    badges = figures.badges()
    assert {name: (ROOT / "docs" / "images" / f"{name}.svg").read_text() for name in badges} == badges
    assert all(f"docs/images/{name}.svg" in README for name in badges)


def test_the_citation_has_the_packages_version() -> None:
    from dfkd_fast import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
