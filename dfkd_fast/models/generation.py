"""Sampling of latents and labels, and image batches from one or more generators."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.kernels import concat_generated
from dfkd_fast.surgery import eval_mode

from .generators import Generator
from .layers import Standardize

__all__ = ["condition_latents", "draw_labels", "generate", "sample", "sample_batches"]


def condition_latents(generator: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    """Returns the generator's input: z + e_y if the generator has an ``embedding``, otherwise z unchanged.

    The class embedding is added to z, not concatenated (MAD, arXiv 2209.10359), so any generator can be made conditional.

    Args:
        generator: any module from latent vectors to images.
        z: latent vectors (B, latent_dim).
        labels: class labels y (B,), integers.

    Returns:
        (B, latent_dim).
    """
    embedding = getattr(generator, "embedding", None)
    return z if embedding is None else z + embedding(labels)


def sample(generator: nn.Module, count: int, device: torch.device | str) -> Tensor:
    """Returns images generated in evaluation mode from fixed latents; labels cycle through the classes.

    Args:
        generator: any module with an integer attribute ``latent_dim``; its training mode is restored.
        count: number of images.
        device: device of the generator.

    Returns:
        Images (count, C, H, W) in the teacher's normalized input space.
    """
    return next(sample_batches(generator, count, count, device))


def sample_batches(generator: nn.Module, count: int, batch_size: int, device: torch.device | str) -> Iterator[Tensor]:
    """Yields the images of :func:`sample` in batches, of which the last may be smaller."""
    z = torch.randn(count, int(generator.latent_dim), generator=torch.Generator().manual_seed(0)).to(device)  # type: ignore[arg-type]
    embedding = getattr(generator, "embedding", None)
    labels = torch.arange(count, device=device) % (1 if embedding is None else embedding.num_embeddings)
    for part, part_labels in zip(z.split(batch_size), labels.split(batch_size), strict=True):
        with eval_mode(generator):
            images = generator(condition_latents(generator, part, part_labels))
        yield images


def draw_labels(labels: Tensor, classes: int, stream: torch.Generator) -> Tensor:
    """Fills ``labels`` in place with a random permutation of the classes, repeated as often as needed, and returns it.

    Every class occurs ⌊B / classes⌋ or ⌈B / classes⌉ times. The function does not synchronize with the device.

    Args:
        labels: integer tensor (B,), overwritten.
        classes: number of classes.
        stream: random number generator on the device of ``labels``.
    """
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
    """Returns one batch of images from several generators.

    Activation, normalization and concatenation run as one kernel if all generators are instances of :class:`Generator` with the
    same activation and output normalization. Otherwise every generator's ``forward`` is called, and the images are concatenated.

    Args:
        generators: modules from latent vectors to images.
        latents: one tensor (B_i, latent_dim) per generator, the result of :func:`condition_latents`.
        out: preallocated batch (ΣB_i, C, H, W); allowed only under ``torch.no_grad()``.
        memory_format: memory format of the batch if ``out`` is None.

    Returns:
        Images (ΣB_i, C, H, W).
    """
    if not _can_fuse_outputs(generators):
        images = [generator(z) for generator, z in zip(generators, latents, strict=True)]
        return concat_generated(images, activation="none", normalize="none", out=out, memory_format=memory_format)

    pre_activations = [generator.body(z) for generator, z in zip(generators, latents, strict=True)]  # type: ignore[operator]
    activation: Any = generators[0].activation
    norm: Any = generators[0].output_norm
    if norm is None:
        return concat_generated(pre_activations, activation=activation, normalize="none", out=out, memory_format=memory_format)
    if isinstance(norm, Standardize):
        return concat_generated(
            pre_activations, activation=activation, normalize="dataset", mean=norm.mean, std=norm.std, out=out, memory_format=memory_format
        )
    norms: list[Any] = [generator.output_norm for generator in generators]
    for norm in norms:
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    return concat_generated(
        pre_activations,
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


def _can_fuse_outputs(generators: Sequence[nn.Module]) -> bool:
    """Returns True if all generators have the same activation and output normalization, and ``concat_generated`` supports them."""
    outputs: set[tuple[Any, ...]] = set()
    for generator in generators:
        if not isinstance(generator, Generator) or type(generator).forward is not Generator.forward:
            return False
        norm = generator.output_norm
        if isinstance(norm, nn.BatchNorm2d):
            if norm.affine or norm.momentum is None or norm.running_mean is None:
                return False
            outputs.add((generator.activation, "batch", norm.eps, norm.momentum))
        elif isinstance(norm, Standardize):
            outputs.add((generator.activation, "dataset", norm.constants))
        elif norm is None:
            outputs.add((generator.activation, "none"))
        else:
            return False
    return len(outputs) == 1
