import numpy as np
import pytest

from dfkd_fast.evaluation import retention

CURVES = [
    [98.25],
    [10.0, 99.0, 73.5],
    [97.0, 97.0, 97.0],
    list(np.random.default_rng(0).uniform(0, 100, 400)),
    # One-pass formulas lose the variance of an almost flat curve to cancellation.
    [99.0 + 1e-9 * epoch for epoch in range(50)],
]


@pytest.mark.parametrize("curve", CURVES)
def test_the_statistics_equal_numpys(curve: list[float]) -> None:
    statistics = retention(curve, 73.5)
    assert (statistics.last, statistics.best) == (curve[-1], np.max(curve))
    assert statistics.mean == pytest.approx(np.mean(curve), rel=1e-12)
    assert statistics.variance == pytest.approx(np.var(curve), rel=1e-3, abs=0)
    assert statistics.fraction_retained == np.mean(np.array(curve) >= 73.5)
    settled = curve[len(curve) // 4 :]
    assert statistics.settled_mean == pytest.approx(np.mean(settled), rel=1e-12)
    assert statistics.settled_variance == pytest.approx(np.var(settled), rel=1e-3, abs=0)


@pytest.mark.parametrize("curve", CURVES)
def test_the_largest_drop_is_over_all_pairs_of_epochs(curve: list[float]) -> None:
    drops = [before - after for index, after in enumerate(curve) for before in curve[: index + 1]]
    assert retention(curve, 90.0).largest_drop == max(drops)


def test_an_empty_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="never evaluated"):
        retention([], 90.0)
