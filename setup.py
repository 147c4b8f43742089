"""What pyproject.toml cannot say: that a checkout must have kept the link to ``kernels/``."""

from pathlib import Path

from setuptools import setup

if not (Path(__file__).parent / "dfkd_fast" / "kernels").is_dir():
    raise SystemExit(
        "dfkd_fast/kernels must be a link to ../kernels, and this checkout lost it: git config core.symlinks true, then git checkout ."
    )

setup()
