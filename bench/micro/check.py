"""Whether a provider computes what the oracle computes. No time is taken of one that does not."""

import torch

from .workload import Results

__all__ = ["errors", "mismatch"]

# What any arithmetic may be off by, whatever eager does: in half precision one rounding; in float32 what long sums cost, and
# far less than operands rounded to tf32 (3e-4) or bfloat16 would.
SLACK = {torch.float32: 2e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
TIMES_EAGER = 2.0


def errors(found: Results, expected: Results) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ of every result that was found; infinite where shapes differ."""
    norms = [
        norm
        for name, tensor in found.items()
        if tensor.shape == expected[name].shape
        for exact in [expected[name].detach().double()]
        for norm in ((tensor.detach().double() - exact).norm(), exact.norm())
    ]
    numbers = iter(torch.stack(norms).tolist() if norms else ())  # one wait for the device, not one a tensor
    return {name: _ratio(next(numbers), next(numbers)) if found[name].shape == expected[name].shape else float("inf") for name in found}


def mismatch(
    found: Results,
    expected: Results,
    of_eager: dict[str, float],
    lacks: tuple[str, ...],
    found_errors: dict[str, float] | None = None,
) -> str | None:
    """What is wrong with the results, or None.

    Args:
        found, expected: the provider's results, and the oracle's in float64.
        of_eager: the errors of plain PyTorch in the case's dtype; twice as much is allowed, and a little.
        lacks: endings of the names of results that the provider does not compute.
        found_errors: the :func:`errors` of what was found, if they are known.
    """
    missing = [name for name in expected if name not in found and not name.endswith(lacks)]
    if missing:
        return f"no {missing[0]}"
    for name, off_by in (errors(found, expected) if found_errors is None else found_errors).items():
        allowed = TIMES_EAGER * of_eager[name] + SLACK.get(found[name].dtype, 0.0)
        if not off_by <= allowed:  # true of NaN
            return f"{name} is off by {off_by:.1e}, allowed {allowed:.1e}"
    return None


def _ratio(difference: float, size: float) -> float:
    return difference / size if size > 0 else difference
