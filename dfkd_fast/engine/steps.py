"""One student step and one generator step, as functions over static buffers.

Nothing here waits for the device, reads a number back, or can reach a data set.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd_fast.methods import Batch, EmaGenerator, Part
from dfkd_fast.models import generate

from .method import Method

__all__ = ["Game", "generator_step", "student_step"]


@dataclass
class Game:
    """The players of the two-player game and the buffers they play on, all on one device."""

    teacher: nn.Module
    student: nn.Module
    generator: nn.Module
    ema_generator: EmaGenerator | None
    method: Method
    student_optimizer: torch.optim.Optimizer
    generator_optimizer: torch.optim.Optimizer
    latents: Tensor
    """(B, latent_dim), overwritten with new z ~ N(0, I) before every use."""
    replay_latents: Tensor
    """The same for the replayed samples, drawn from a stream of their own."""
    images: Tensor
    """(ΣB_i, C, H, W): the batch of the student step, fresh rows first."""
    fresh_stream: torch.Generator
    replay_stream: torch.Generator


def student_step(game: Game) -> Tensor:
    """Draw a batch, ask the teacher, take one step of the student; returns the loss, 0-d and detached.

    The samples carry no graph: only the student is differentiated (DFAD, arXiv 1912.11006, imitation stage).
    """
    replay, batch_size = game.method.replay, len(game.latents)
    with torch.no_grad():
        generators, latents = [game.generator], [game.latents.normal_(generator=game.fresh_stream)]
        parts = [Part(batch_size, replay.fresh_weight)]
        if game.ema_generator is not None and replay.weight > 0:
            generators.append(game.ema_generator.network)
            latents.append(game.replay_latents.normal_(generator=game.replay_stream))
            parts.append(Part(batch_size, replay.weight))
        images = generate(generators, latents, out=game.images)
        batch = Batch(images, game.teacher(images), parts)
    game.student_optimizer.zero_grad()
    loss = game.method.update.backward(game.student, batch, game.method.objective)
    game.student_optimizer.step()
    return loss


def generator_step(game: Game) -> dict[str, Tensor]:
    """Draw a batch, take one step of the generator, let its average follow; returns its loss terms, 0-d and detached.

    The gradient flows through the teacher and the student to the images; no weight gradient of either is
    computed (DFAD, arXiv 1912.11006, generation stage).
    """
    latents = game.latents.normal_(generator=game.fresh_stream)
    images = generate([game.generator], [latents], memory_format=_layout(game.method))
    game.student.train(game.method.loop.student_in_generator_step == "train")
    terms = game.method.objective.generator_terms(game.student(images), game.teacher(images))
    game.student.train()
    game.generator_optimizer.zero_grad()
    torch.stack(list(terms.values())).sum().backward(inputs=list(game.generator.parameters()))
    game.generator_optimizer.step()
    if game.ema_generator is not None:
        game.ema_generator.follow(game.generator)
    return {name: term.detach() for name, term in terms.items()}


def _layout(method: Method) -> torch.memory_format:
    return torch.channels_last if method.loop.channels_last else torch.contiguous_format
