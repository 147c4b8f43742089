"""Concatenation of generated images in plain PyTorch: the reference for the other backends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import transforming
from ..norm.reference import batch_norm


def concat_generated(
    raws: Sequence[Tensor],
    activation: str,
    normalize: str,
    mean: Tensor | None,
    std: Tensor | None,
    running_means: Sequence[Tensor] | None,
    running_vars: Sequence[Tensor] | None,
    training: Sequence[bool] | None,
    momentum: float,
    eps: float,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    memory_format: torch.memory_format,
) -> Tensor:
    images = [_activate(raw if raw.dtype == torch.float64 else raw.float(), activation) for raw in raws]
    if mean is not None and std is not None:
        images = [(image - mean[:, None, None]) / std[:, None, None] for image in images]
    if running_means is not None and running_vars is not None and training is not None:
        images = [
            batch_norm(image, running_mean, running_var, None, None, batch_statistics, momentum, eps)
            for image, running_mean, running_var, batch_statistics in zip(images, running_means, running_vars, training, strict=True)
        ]
    if out is not None:
        return torch.cat(images, out=out) if out.dtype == images[0].dtype else out.copy_(torch.cat(images))
    if transforming():  # vmap does not support channels-last, because of its hidden batch dimension
        memory_format = torch.preserve_format
    return torch.cat(images).to(out_dtype or raws[0].dtype, memory_format=memory_format)


def _activate(raw: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return raw.tanh()
    return raw.sigmoid() if activation == "sigmoid" else raw
