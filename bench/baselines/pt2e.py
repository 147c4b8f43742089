"""PyTorch's own post-training quantization of an exported network: PT2E in the package torchao, with its quantizer for x86 CPUs."""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["quantized", "supports"]

BATCH_SIZE = 32


def supports(weight_bits: int, activation_bits: int) -> bool:
    """Returns whether a network can be quantized to these bits.

    The observers search the best range for 256 steps, and float activations need none, nor images.
    """
    return weight_bits <= 8 and activation_bits == 8


@torch.no_grad()
def quantized(network: nn.Module, images: Tensor, evaluated: Tensor, weight_bits: Mapping[str, int]) -> nn.Module:
    """Returns a quantized copy of a network, which computes in float with rounded values.

    Batch norms are folded, weights have one scale per output channel, and activations of 8 bits one range, which an observer chooses.

    Args:
        network: Network in evaluation mode, images → logits; not changed.
        images: What the observers see, (N, C, H, W) with N ≥ 2.
        evaluated: At least two images of the size that the copy is called with.
        weight_bits: Bits of the weights of every layer that is quantized, by name.
    """
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    observing = _with_observers(network, images, weight_bits)
    for batch in images.split(BATCH_SIZE):
        observing(batch)
    prepared = _with_observers(network, evaluated, weight_bits)  # again, since an exported network has one size of images
    prepared.load_state_dict(observing.state_dict())
    return allow_exported_model_train_eval(convert_pt2e(prepared))


def _with_observers(network: nn.Module, images: Tensor, weight_bits: Mapping[str, int]) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    # strict: otherwise the quantizer does not find convolutions of subclasses, such as timm's Conv2dSame
    exported = torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=True)
    most = statistics.mode(weight_bits.values())
    quantizer = X86InductorQuantizer().set_global(_configuration(most))
    for name, bits in weight_bits.items():
        if bits != most:  # a layer that is configured by its name is not fused with what follows it
            quantizer.set_module_name_qconfig(name, _configuration(bits))
    return prepare_pt2e(exported.module(), quantizer)


def _configuration(weight_bits: int) -> Any:
    """Returns the quantizer's default, with weights of some number of bits."""
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config

    default = get_default_x86_inductor_quantization_config()
    largest = 2 ** (weight_bits - 1) - 1
    return replace(default, weight=replace(default.weight, quant_min=-largest - 1, quant_max=largest))
