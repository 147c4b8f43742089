"""Comparison of a network in training with a copy that computes the same function in another way."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfkd_fast.errors import USER_CODE_ERRORS, first_line
from dfkd_fast.out_of_memory import is_out_of_memory
from dfkd_fast.surgery import dry_run, eval_mode, get_logits

from .precision import default_modes

__all__ = ["difference_in_training"]

EVALUATED = 2
"""Batch size in evaluation mode, where samples do not affect each other."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest difference of a result relative to its norm.

In float32, batch norms of few values and ReLUs amplify rounding errors; errors of a trace are of the size of the result."""


class Results(NamedTuple):
    """What a network computes; the tensors of a field are concatenated."""

    outputs_in_evaluation: Tensor
    outputs: Tensor
    gradients: Tensor
    buffers: Tensor


def difference_in_training(network: nn.Module, other: nn.Module, inputs: Tensor) -> str | None:
    """Returns what two networks in training mode compute differently, by more than rounding.

    Outputs in both modes, gradients with respect to input and parameters, and buffers after a forward pass are compared, in float64,
    or in float32 if the first network does not run in float64. If the first network computes something else every time although the
    random state is the same, outputs in evaluation mode are compared only.

    Args:
        network, other: networks, unchanged; :func:`~dfkd_fast.surgery.get_logits` returns their output.
        inputs: example inputs; at least two, for batch norms.

    Returns:
        A sentence without its first words, for a note; None if there is no difference.
    """
    for dtype, tolerance in TOLERANCES.items():
        try:
            expected = _results(network, inputs, dtype)
        except USER_CODE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            problem = f"they cannot be compared: {first_line(error)}"
            continue
        try:
            actual = _results(other, inputs, dtype)
        except USER_CODE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            return first_line(error)
        differences = _differences(actual, expected, tolerance)
        is_random = len(differences) > 0 and len(_differences(_results(network, inputs, dtype), expected, tolerance)) > 0
        differences = [name for name in differences if name == Results._fields[0] or not is_random]
        return f"its {differences[0].replace('_', ' ')} would change" if differences else None
    return problem


def _results(network: nn.Module, inputs: Tensor, dtype: torch.dtype) -> Results:
    with default_modes(inputs.device), dry_run(network) as trial:
        trial.to(dtype)
        torch.manual_seed(0)
        with eval_mode(trial):
            evaluated = get_logits(trial(inputs[:EVALUATED].to(dtype, copy=True)))
        torch.manual_seed(0)
        x = inputs.detach().to(dtype, copy=True).requires_grad_()
        outputs = get_logits(trial(x.clone()))  # a network may modify its input in place
        if outputs.requires_grad:
            outputs.square().sum().backward()
        leaves = [x, *(parameter for parameter in trial.parameters() if parameter.requires_grad)]
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return Results(*map(_concatenated, ([evaluated], [outputs.detach()], gradients, [*trial.buffers()])))


def _concatenated(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors]) if tensors else torch.zeros(0)


def _differences(actual: Results, expected: Results, tolerance: float) -> list[str]:
    """Returns the names of the results that differ by more than the tolerance, or are not numbers."""
    names = []
    for name, ours, theirs in zip(Results._fields, actual, expected, strict=True):
        is_equal = ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12
        names += [] if is_equal else [name]
    return names
