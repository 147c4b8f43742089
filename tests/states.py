"""States of a run, through a file and compared."""

import io
from typing import Any

import torch
from torch import Tensor


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


def assert_equal(ours: Any, theirs: Any) -> None:
    """Equal to the bit, whatever the containers."""
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_equal(value, theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


def without_times(state: dict[str, Any]) -> dict[str, Any]:
    history = [{**epoch, "seconds": None} for epoch in state["history"]]
    return {**state, "history": history, "seconds": None}
