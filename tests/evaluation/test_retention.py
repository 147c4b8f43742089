import numpy as np
import pytest

from dfkd_fast.evaluation import retention


@pytest.mark.parametrize(
    "curve",
    [
        [98.25],
        [10.0, 99.0, 73.5],
        [97.0, 97.0, 97.0],
        list(np.random.default_rng(0).uniform(0, 100, 400)),
        # One-pass formulas lose the variance of an almost flat curve to cancellation.
        [99.0 + 1e-9 * epoch for epoch in range(50)],
    ],
)
def test_the_statistics_are_those_of_numpy(curve: list[float]) -> None:
    found = retention(curve)
    assert (found.last, found.best) == (curve[-1], np.max(curve))
    assert found.mean == pytest.approx(np.mean(curve), rel=1e-12)
    assert found.variance == pytest.approx(np.var(curve), rel=1e-3, abs=0)


def test_an_empty_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="never evaluated"):
        retention([])
