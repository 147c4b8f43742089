"""Concatenation of generated images in plain PyTorch: the reference for the other backends."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import transforming


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
            _batch_norm(image, running_mean, running_var, batch_statistics, momentum, eps)
            for image, running_mean, running_var, batch_statistics in zip(images, running_means, running_vars, training, strict=True)
        ]
    if out is not None:
        return torch.cat(images, out=out) if out.dtype == images[0].dtype else out.copy_(torch.cat(images))
    if transforming():  # vmap does not support channels-last, because of its hidden batch dimension
        memory_format = torch.preserve_format
    return torch.cat(images).to(out_dtype or raws[0].dtype, memory_format=memory_format)


def _batch_norm(image: Tensor, running_mean: Tensor, running_var: Tensor, training: bool, momentum: float, eps: float) -> Tensor:
    """``F.batch_norm`` with running statistics of any dtype; PyTorch requires the dtype of the input."""
    statistics = running_mean.to(image.dtype), running_var.to(image.dtype)
    result = F.batch_norm(image, *statistics, training=training, momentum=momentum, eps=eps)
    if training:
        for running, updated in zip((running_mean, running_var), statistics, strict=True):
            if running is not updated:
                running.copy_(updated)
    return result


def _activate(raw: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return raw.tanh()
    return raw.sigmoid() if activation == "sigmoid" else raw
