"""From the pre-activations of several generators to one batch of images."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import reference

__all__ = ["Activation", "Normalize", "concat_generated"]

Activation = Literal["tanh", "sigmoid", "none"]
Normalize = Literal["dataset", "batch", "none"]


def concat_generated(
    raws: Sequence[Tensor],
    *,
    activation: Activation,
    normalize: Normalize,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    running_means: Sequence[Tensor] | None = None,
    running_vars: Sequence[Tensor] | None = None,
    training: Sequence[bool] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Activate, normalise, cast and place the outputs of several generators in one batch.

    Args:
        raws: pre-activations, one tensor (B_i, C, H, W) a generator; only B_i may differ.
        activation: what the generators end in.
        normalize: "none"; "dataset" subtracts ``mean`` and divides by ``std``; "batch" is the affine-free
            batch normalisation behind DFAD's generator A (arXiv 1912.11006), every generator by its own
            statistics.
        mean, std: (C,), for "dataset".
        running_means, running_vars, training: one (C,) float tensor and one flag a generator, for
            "batch". Where ``training`` is true the batch's statistics are used and the running ones
            updated in place as ``torch.nn.BatchNorm2d`` does; elsewhere the running ones are used.
        momentum, eps: of that batch normalisation.
        out_dtype: the batch's dtype, by default that of the first input (or of ``out``).
        out: a preallocated batch to write into; only where no gradient is recorded.
        memory_format: layout of a batch allocated here.

    Returns:
        (ΣB_i, C, H, W), ``out`` if given, differentiable with respect to ``raws``.

    Raises:
        ValueError: no input, inputs that differ in C, H or W, a missing or superfluous argument of the
            chosen normalisation, or an ``out`` that does not fit.
    """
    _check(raws, activation, normalize, mean, std, running_means, running_vars, training)
    rows = sum(len(raw) for raw in raws)
    if out is not None:
        if out.shape != (rows, *raws[0].shape[1:]):
            raise ValueError(f"out must be {(rows, *raws[0].shape[1:])}, not {tuple(out.shape)}")
        if torch.is_grad_enabled() and any(raw.requires_grad for raw in raws):
            raise ValueError("out cannot be given where a gradient is recorded: call under torch.no_grad()")
        if out_dtype not in (None, out.dtype):
            raise ValueError(f"out_dtype is {out_dtype}, but out is {out.dtype}")
    return reference.concat_generated(
        raws, activation, normalize, mean, std, running_means, running_vars, training, momentum, eps, out_dtype, out, memory_format
    )


def _check(
    raws: Sequence[Tensor],
    activation: str,
    normalize: str,
    mean: Tensor | None,
    std: Tensor | None,
    running_means: Sequence[Tensor] | None,
    running_vars: Sequence[Tensor] | None,
    training: Sequence[bool] | None,
) -> None:
    if not raws:
        raise ValueError("raws is empty: at least one generator's output is needed")
    if raws[0].ndim != 4:
        raise ValueError(f"raws[0] is {tuple(raws[0].shape)}, not (B, C, H, W)")
    for index, raw in enumerate(raws):
        if raw.shape[1:] != raws[0].shape[1:]:
            raise ValueError(f"raws[{index}] is {tuple(raw.shape)}, not (B, {', '.join(map(str, raws[0].shape[1:]))})")
    if activation not in ("tanh", "sigmoid", "none"):
        raise ValueError(f"activation must be 'tanh', 'sigmoid' or 'none', not {activation!r}")
    if normalize not in ("dataset", "batch", "none"):
        raise ValueError(f"normalize must be 'dataset', 'batch' or 'none', not {normalize!r}")
    channels = raws[0].shape[1]
    for name, constant in (("mean", mean), ("std", std)):
        if (constant is not None) != (normalize == "dataset"):
            raise ValueError(f"{name} goes with normalize='dataset', and normalize is {normalize!r}")
        if constant is not None and constant.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), not {tuple(constant.shape)}")
    for name, sequence in (("running_means", running_means), ("running_vars", running_vars), ("training", training)):
        if (sequence is not None) != (normalize == "batch"):
            raise ValueError(f"{name} goes with normalize='batch', and normalize is {normalize!r}")
        if sequence is not None and len(sequence) != len(raws):
            raise ValueError(f"{name} has {len(sequence)} entries for {len(raws)} generators")
