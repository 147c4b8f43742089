"""The Python examples of the documentation run, page by page."""

import re
from pathlib import Path

import pytest

from bench.provenance import ROOT
from dfkd_fast.methods import POLICIES

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = {page: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}


@pytest.mark.parametrize("page", [page for page, blocks in EXAMPLES.items() if blocks], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_examples_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registered = dict(POLICIES)
    names: dict[str, object] = {"__name__": "example"}
    try:
        for number, block in enumerate(EXAMPLES[page], 1):
            exec(compile(block, f"{page.name}, example {number}", "exec"), names)
    finally:
        POLICIES.clear()
        POLICIES.update(registered)


def test_the_pages_that_teach_python_have_examples() -> None:
    assert {page.name for page, blocks in EXAMPLES.items() if blocks} >= {"README.md", "quickstart.md", "kernels.md", "python.md"}
