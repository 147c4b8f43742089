import importlib.util
import pickle
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from dfkd_fast import DfkdError
from dfkd_fast.models.pretrained import PRETRAINED, _packaged


class Harmless:
    pass


@pytest.mark.parametrize(
    "write",
    [lambda path: torch.save({"x": Harmless()}, path, pickle_module=pickle), lambda path: path.write_bytes(b""), lambda path: None],
    ids=["more than tensors", "empty", "absent"],
)
def test_weights_of_a_package_that_cannot_be_read_are_one_line_and_no_advice_to_trust_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object]
) -> None:
    name, known = next(iter(PRETRAINED.items()))
    path = tmp_path / known.weights
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: ModuleSpec(known.package, None, origin=str(tmp_path / "__init__.py")))
    with pytest.raises(DfkdError, match=r"cannot be read: \w|not found") as caught:
        _packaged(name)
    assert str(path) in str(caught.value)
    assert not any(word in str(caught.value) for word in ("weights_only", "trust", "\n"))
