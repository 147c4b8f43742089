"""Correctness check against a float64 reference. Providers with wrong results are not timed."""

from collections.abc import Mapping

import torch

from .workload import Results

__all__ = ["errors", "mismatch"]

# Relative error allowed in addition to that of eager: in half precision one rounding; in float32 the error of long sums, far less
# than that of operands rounded to tf32 (3e-4) or bfloat16.
SLACK = {torch.float32: 2e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
TIMES_EAGER = 2.0


def errors(actual: Results, expected: Results) -> dict[str, float]:
    """Return ‖actual − expected‖ / ‖expected‖ for each result; infinite if shapes differ."""
    norms = [
        norm
        for name, tensor in actual.items()
        if tensor.shape == expected[name].shape
        for exact in [expected[name].detach().double()]
        for norm in ((tensor.detach().double() - exact).norm(), exact.norm())
    ]
    numbers = iter(torch.stack(norms).tolist() if norms else ())  # one device synchronization instead of one per tensor
    return {name: _ratio(next(numbers), next(numbers)) if actual[name].shape == expected[name].shape else float("inf") for name in actual}


def mismatch(
    actual: Results,
    expected: Results,
    eager_errors: dict[str, float],
    omitted: tuple[str, ...],
    known_errors: dict[str, float] | None = None,
    rounded: Mapping[str, torch.dtype] | None = None,
) -> str | None:
    """Describe the first wrong result, or return None if all are correct.

    Args:
        actual: results of the provider.
        expected: results of the float64 reference.
        eager_errors: errors of eager PyTorch in the dtype of the case; twice as much plus a tolerance is allowed.
        omitted: name suffixes of results that the provider does not compute.
        known_errors: the ``errors`` of ``actual``, if already computed.
        rounded: dtypes to which a provider may round what these results are computed from, by name of the result.
    """
    missing = [name for name in expected if name not in actual and not name.endswith(omitted)]
    if missing:
        return f"no {missing[0]}"
    for name, off_by in (errors(actual, expected) if known_errors is None else known_errors).items():
        dtype = (rounded or {}).get(name, actual[name].dtype)
        allowed = TIMES_EAGER * eager_errors[name] + SLACK.get(dtype, 0.0)
        if not off_by <= allowed:  # also for NaN
            return f"{name} is off by {off_by:.1e}, allowed {allowed:.1e}"
    return None


def _ratio(difference: float, size: float) -> float:
    return difference / size if size > 0 else difference
