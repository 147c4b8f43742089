"""The benchmarks use only public names of dfkd_fast, and do not change the classes of networks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.provenance import ROOT

OURS = ("bench", "dfkd_fast", "tests")
FILES = sorted((ROOT / "bench").rglob("*.py"))


def is_private(name: str) -> bool:
    # These methods of a NamedTuple are public.
    return name.startswith("_") and not name.endswith("__") and name not in ("_asdict", "_replace")


def is_ours(node: ast.ImportFrom) -> bool:
    return node.level > 0 or (node.module or "").partition(".")[0] in OURS


def names_of_others(tree: ast.Module) -> set[str]:
    """Return the names that a file imports from other projects, whose private names are allowed."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not is_ours(node):
            names |= {alias.asname or alias.name for alias in node.names}
    return names - {*OURS}


def violations(source: str) -> Iterator[str]:
    """Yield the uses of private names of other objects, and the assignments of classes."""
    tree = ast.parse(source)
    others = names_of_others(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if node.attr == "__class__" and isinstance(node.ctx, ast.Store):
                yield f"line {node.lineno}: {text} is assigned"
            elif is_private(node.attr) and ast.unparse(node.value) not in ("self", "cls") and text.partition(".")[0] not in others:
                yield f"line {node.lineno}: {text}"
        elif isinstance(node, ast.ImportFrom) and is_ours(node):
            private = [name for name in (*(node.module or "").split("."), *(alias.name for alias in node.names)) if is_private(name)]
            yield from (f"line {node.lineno}: {name} is imported" for name in private)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_benchmark_uses_public_names_only_and_changes_no_class(path: Path) -> None:
    assert list(violations(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("trainer._state", 1),
        ("self.trainer._state.logits", 1),
        ("from dfkd_fast import dispatch\ndispatch._SERVING['cpu'] = []", 1),
        ("from .workload import _fresh", 1),
        ("import dfkd_fast.engine\ndfkd_fast.engine._private()", 1),
        ("layer.__class__ = Conv2d", 1),
        ("self._marks.set(); cls._made", 0),
        ("import torch\nfrom os import path\ntorch._C._dispatch(); path._name", 0),
        ("start._asdict(); type(error).__name__; isinstance(x.__class__, type)", 0),
    ],
)
def test_uses_of_private_names_are_detected(source: str, count: int) -> None:
    assert len(list(violations(source))) == count
