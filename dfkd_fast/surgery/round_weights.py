"""Rounding of a layer's weights for a small error of its outputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantize import FLOAT, FakeQuantized, integer_range

__all__ = ["round_weights"]

DAMPING = 0.01
"""Part of the mean of the diagonal that is added to the diagonal of the second moments of a layer's inputs."""
SMALLEST_DAMPING = 1e-8
VECTORS = 2**15
"""Number of input vectors from which the second moments are computed."""
BLOCK = 128
"""Number of weights per output channel after which the others are corrected."""


@torch.no_grad()
def round_weights(layer: FakeQuantized, inputs: Tensor) -> None:
    """Rounds the weights of a quantized layer in place such that the squared error of its outputs is small, not that of the weights.

    The weights of each output channel are rounded one after the other, and those that are not rounded yet are changed to compensate for
    the error, as far as the inputs are correlated (GPTQ, Frantar et al. 2022, arXiv 2210.17323). The scales stay. Weights in float, and
    convolutions other than those of images, are not changed: they are rounded to the nearest integer.

    Args:
        layer: Convolution or linear layer.
        inputs: Inputs that the layer computes with, (N, C, H, W) or (..., C).
    """
    if layer.weight_bits == FLOAT or not isinstance(layer, nn.Linear | nn.Conv2d):
        return
    weight: Any = layer._parameters["weight"]
    vectors = _input_vectors(layer, inputs)
    moments = vectors @ vectors.mT / vectors.shape[2]  # (groups, inputs, inputs)
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal += (DAMPING * diagonal.mean(1, keepdim=True)).clamp(min=SMALLEST_DAMPING)
    factor, failed = torch.linalg.cholesky_ex(moments)
    if failed.any():  # inputs that are not finite
        return
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    groups, count = moments.shape[:2]
    rows = weight.reshape(groups, -1, count).clone()  # (groups, outputs, inputs)
    scale = layer.weight_scale.view(groups, -1)
    for start in range(0, count, BLOCK):
        block, of_block = rows[:, :, start : start + BLOCK], inverse[:, start : start + BLOCK, start : start + BLOCK]
        errors = torch.zeros_like(block)
        for index in range(block.shape[2]):
            values = block[:, :, index].clone()
            block[:, :, index] = (values / scale).round().clamp(*integer_range(layer.weight_bits)) * scale
            errors[:, :, index] = (values - block[:, :, index]) / of_block[:, index, index, None]
            block[:, :, index + 1 :] -= errors[:, :, index, None] * of_block[:, None, index, index + 1 :]
        rows[:, :, start + BLOCK :] -= errors @ inverse[:, start : start + BLOCK, start + BLOCK :]
    weight.copy_(rows.view_as(weight))


def _input_vectors(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Returns the inputs of each output as vectors, (groups, inputs, number of vectors)."""
    if isinstance(layer, nn.Linear):
        rows = inputs.float().reshape(-1, inputs.shape[-1])
        return rows[:: max(1, len(rows) // VECTORS)].T.unsqueeze(0)
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    outputs = inputs.shape[2] * inputs.shape[3] // (layer.stride[0] * layer.stride[1])
    some = inputs[:: max(1, len(inputs) * outputs // VECTORS)].float()
    patches = F.unfold(some, layer.kernel_size, layer.dilation, padding, layer.stride)  # (N, inputs, outputs)
    return patches.movedim(0, 1).reshape(layer.groups, -1, patches.shape[0] * patches.shape[2])
