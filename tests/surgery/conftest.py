"""Fixtures of the tests of the surgery."""

from typing import Any

import pytest
from torch import Tensor

from dfkd_fast.kernels import batch_norm_act
from dfkd_fast.surgery import fuse_norm_act
from tests.surgery.training_steps import Calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    recorded: Calls = []
    kernel = batch_norm_act

    def recording(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        residual = arguments[4] if len(arguments) > 4 else None
        recorded.append((keywords["activation"], residual is not None, keywords["input_bias"] is not None))
        return kernel(x, *arguments, **keywords)

    monkeypatch.setattr(fuse_norm_act, "batch_norm_act", recording)
    return recorded
