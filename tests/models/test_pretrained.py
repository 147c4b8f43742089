import importlib.util
import pickle
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from dfkd_fast import DfkdError
from dfkd_fast.models.pretrained import PRETRAINED, _read_package


class Harmless:
    pass


@pytest.mark.parametrize(
    "write",
    [lambda path: torch.save({"x": Harmless()}, path, pickle_module=pickle), lambda path: path.write_bytes(b""), lambda path: None],
    ids=["more than tensors", "empty", "absent"],
)
def test_unreadable_weights_of_a_package_are_a_one_line_error_that_does_not_recommend_unsafe_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object]
) -> None:
    name, pretrained = next(iter(PRETRAINED.items()))
    path = tmp_path / pretrained.weights
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: ModuleSpec(pretrained.package, None, origin=str(tmp_path / "__init__.py")))
    with pytest.raises(DfkdError, match=r"cannot be read: \w|not found") as caught:
        _read_package(name)
    assert str(path) in str(caught.value)
    assert not any(word in str(caught.value) for word in ("weights_only", "trust", "\n"))
