"""How generators are called: latents, classes, and one batch from several of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.kernels import concat_generated
from dfkd_fast.surgery import eval_mode

from .generators import Generator
from .layers import Standardize

__all__ = ["condition_latents", "draw_labels", "generate", "sample"]


def condition_latents(generator: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    """What a generator is called with: z + e_y if it has an ``embedding``, else z.

    The condition is a sum, not a concatenation (MAD, arXiv 2209.10359), so any generator can be made conditional.

    Args:
        generator: any module from latent vectors to images.
        z: (B, latent_dim).
        labels: y, (B,).
    """
    embedding = getattr(generator, "embedding", None)
    return z if embedding is None else z + embedding(labels)


def sample(generator: nn.Module, count: int, device: torch.device | str) -> Tensor:
    """Images (count, C, H, W) of a generator in evaluation mode, always from the same latents, and from the classes in turn.

    Args:
        generator: any module with an integer ``latent_dim``; as before afterwards.
        count: how many.
        device: where it is.
    """
    z = torch.randn(count, int(generator.latent_dim), generator=torch.Generator().manual_seed(0)).to(device)  # type: ignore[arg-type]
    embedding = getattr(generator, "embedding", None)
    labels = torch.arange(count, device=device) % (1 if embedding is None else embedding.num_embeddings)
    with eval_mode(generator):
        return generator(condition_latents(generator, z, labels))


def draw_labels(labels: Tensor, classes: int, stream: torch.Generator) -> Tensor:
    """Fill labels (B,) with classes as evenly as B allows, in random order: none comes twice before all came once. Waits for no device."""
    rounds = -(-len(labels) // classes)
    order = torch.rand(rounds, classes, device=labels.device, generator=stream).argsort(dim=1)
    return labels.copy_(order.flatten()[: len(labels)])


def generate(
    generators: Sequence[nn.Module],
    latents: Sequence[Tensor],
    *,
    out: Tensor | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """One batch from several generators: their bodies, then activation, normalisation and concatenation in one go.

    Args:
        generators: :class:`Generator` that end alike are fused; any other modules from z to images are called.
        latents: one (B_i, latent_dim) tensor a generator, already :func:`condition_latents`.
        out: a preallocated batch (ΣB_i, C, H, W); only under ``torch.no_grad()``.
        memory_format: layout of a batch allocated here.

    Returns:
        Images (ΣB_i, C, H, W).
    """
    if not _end_alike(generators):
        finished = [generator(z) for generator, z in zip(generators, latents, strict=True)]
        return concat_generated(finished, activation="none", normalize="none", out=out, memory_format=memory_format)

    raws = [generator.body(z) for generator, z in zip(generators, latents, strict=True)]  # type: ignore[operator]
    activation: Any = generators[0].activation
    norm: Any = generators[0].output_norm
    if norm is None:
        return concat_generated(raws, activation=activation, normalize="none", out=out, memory_format=memory_format)
    if isinstance(norm, Standardize):
        return concat_generated(
            raws, activation=activation, normalize="dataset", mean=norm.mean, std=norm.std, out=out, memory_format=memory_format
        )
    norms: list[Any] = [generator.output_norm for generator in generators]
    for norm in norms:
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    return concat_generated(
        raws,
        activation=activation,
        normalize="batch",
        running_means=[norm.running_mean for norm in norms],
        running_vars=[norm.running_var for norm in norms],
        training=[norm.training for norm in norms],
        momentum=norms[0].momentum,
        eps=norms[0].eps,
        out=out,
        memory_format=memory_format,
    )


def _end_alike(generators: Sequence[nn.Module]) -> bool:
    """Whether these generators end alike, and as ``concat_generated`` can."""
    endings: set[tuple[Any, ...]] = set()
    for generator in generators:
        if not isinstance(generator, Generator) or type(generator).forward is not Generator.forward:
            return False
        norm = generator.output_norm
        if isinstance(norm, nn.BatchNorm2d):
            if norm.affine or norm.momentum is None or norm.running_mean is None:
                return False
            endings.add((generator.activation, "batch", norm.eps, norm.momentum))
        elif isinstance(norm, Standardize):
            endings.add((generator.activation, "dataset", norm.constants))
        elif norm is None:
            endings.add((generator.activation, "none"))
        else:
            return False
    return len(endings) == 1
