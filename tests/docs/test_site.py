"""The site builds without a warning and needs no network."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.provenance import ROOT

pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason='the site needs pip install -e ".[docs]"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?(https?:|//)|<link[^>]*stylesheet[^>]*href=[\"']?(https?:|//)", page.read_text()
        )
        assert not loaded, page.name


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "methods" / "dfad.html").read_text()
    assert page.count("<math") > 5
    assert "arithmatex" not in page


def test_the_reference_has_the_kernels_and_the_commands(site: Path) -> None:
    assert 'id="dfkd_fast.kernels.kl_discrepancy"' in (site / "kernels.html").read_text()
    assert "--data-root" in (site / "cli.html").read_text()
