"""One student step and one generator step, as functions over static buffers.

Nothing here waits for the device, reads a number back, or can reach a data set.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd_fast import distributed
from dfkd_fast.kernels import FusedEMA
from dfkd_fast.methods import Batch, Memory, Part
from dfkd_fast.models import Observer, conditioned, draw_labels, generate, untaught

from .method import Method
from .precision import Precision

__all__ = ["Game", "generator_step", "student_step"]


@dataclass
class Game:
    """The players of the two-player game and the buffers they play on, all on one device."""

    teacher: nn.Module
    """As it is called: folded, in the precision of the run."""
    observer: Observer
    """The same as the generator sees it."""
    student: nn.Module
    generator: nn.Module
    memory: Memory | None
    average: FusedEMA | None
    """Of the student."""
    method: Method
    precision: Precision
    student_optimizer: torch.optim.Optimizer
    generator_optimizer: torch.optim.Optimizer
    latents: Tensor
    """(B, latent_dim), overwritten with new z ~ N(0, I) before every use."""
    labels: Tensor
    """(B,), likewise, with classes for a conditional generator."""
    images: Tensor
    """(ΣB_i, C, H, W): the batch of the student step, fresh rows first."""
    logits: Tensor
    """(ΣB_i, classes) or (ΣB_i, classes, H, W): the teacher's for them."""
    fresh_stream: torch.Generator
    replay_stream: torch.Generator

    @property
    def fresh(self) -> Batch:
        """The fresh rows of the last student step."""
        rows = len(self.latents)
        return Batch(self.images[:rows], self.logits[:rows], [Part(rows, 1.0)])


def student_step(game: Game, step: int = 0) -> dict[str, Tensor]:
    """Draw a batch, ask the teacher, take one step of the student; returns losses by name, 0-d and detached.

    The samples carry no graph: only the student is differentiated (DFAD, arXiv 1912.11006, imitation stage).

    Args:
        game: who plays.
        step: its number in the iteration, which a memory that learns beside the student may heed.
    """
    batch = _draw_batch(game)
    game.student_optimizer.zero_grad()
    precision = game.precision
    loss = game.method.update.backward(
        game.student,
        batch,
        game.method.objective,
        autocast=precision.autocast,
        scale=lambda loss: precision.scale("student", loss),
        micro_batches=game.method.engine.micro_batches,
    )
    precision.step("student", game.student_optimizer)
    if game.average is not None:
        game.average.update(game.student)
    learnt = {}
    if game.memory is not None and game.memory.ready:
        learnt = game.memory.learn(batch, step, game.replay_stream, precision.autocast)
    return {"student": loss, **learnt}


def generator_step(game: Game, *, adversarial: bool = True) -> dict[str, Tensor]:
    """Draw a batch, take one step of the generator, let the memory follow; returns its loss terms, 0-d and detached.

    The gradient flows through the teacher and the student to the images; no weight gradient of either is
    computed (DFAD, arXiv 1912.11006, generation stage).

    Args:
        game: who plays.
        adversarial: False for a step of the pretraining, which leaves the student alone.
    """
    pieces, precision = game.method.engine.micro_batches, game.precision
    z = _draw_latents(game)
    weights = list(game.generator.parameters())
    game.generator_optimizer.zero_grad()
    totals: dict[str, Tensor] = {}
    for piece, labels in zip(z.tensor_split(pieces), game.labels.tensor_split(pieces), strict=True):
        terms = {name: len(piece) / len(z) * term for name, term in _generator_terms(game, piece, labels, adversarial).items()}
        precision.scale("generator", torch.stack(list(terms.values())).sum()).backward()
        for name, term in terms.items():
            totals[name] = totals.get(name, 0) + term.detach()
    distributed.average_([weight.grad for weight in weights if weight.grad is not None])
    precision.step("generator", game.generator_optimizer)
    distributed.average_([buffer for buffer in game.generator.buffers() if buffer.is_floating_point()])
    if game.memory is not None and adversarial:
        game.memory.follow(game.generator)
    return totals


def _generator_terms(game: Game, z: Tensor, labels: Tensor, adversarial: bool) -> dict[str, Tensor]:
    objective = game.method.objective
    answers = None
    with game.precision.autocast():
        images = generate([game.generator], [conditioned(game.generator, z, labels)], memory_format=_layout(game.method))
        if adversarial and objective.adversarial:
            game.student.train(game.method.loop.student_in_generator_step == "train")
            with untaught(game.student):
                answers = game.student(images)
            game.student.train()
        observed = game.observer(images)
    embeddings = game.generator.embedding(labels) if objective.embedding_norm else None  # type: ignore[operator]
    return objective.generator_terms(answers, observed, labels, embeddings)


@torch.no_grad()
def _draw_batch(game: Game) -> Batch:
    """Fresh and replayed images in the game's buffers, with the teacher's logits."""
    replay, memory, fresh = game.method.replay, game.memory, len(game.latents)
    z = _draw_latents(game)
    generators, latents, parts = [game.generator], [conditioned(game.generator, z, game.labels)], [Part(fresh, replay.fresh_weight)]
    images, kept = game.images[:fresh], None
    with game.precision.autocast():
        if memory is not None and memory.ready:
            parts.append(Part(memory.rows, replay.weight))
            if memory.generator is not None:
                generators.append(memory.generator)
                latents.append(memory.latents(game.replay_stream))
                images = game.images
        generate(generators, latents, out=images)
        if len(parts) > len(generators) and memory is not None:
            images = game.images
            kept = memory.recall(images[fresh:], game.replay_stream)
        asked = images if kept is None else images[:fresh]
        logits = game.logits[: len(images)]
        logits[: len(asked)] = game.teacher(asked)
        if kept is not None:
            logits[fresh:] = kept
    return Batch(images, logits, parts)


def _draw_latents(game: Game) -> Tensor:
    """New z, and, for a conditional generator, new classes in ``game.labels``."""
    embedding = getattr(game.generator, "embedding", None)
    if embedding is not None:
        draw_labels(game.labels, embedding.num_embeddings, game.fresh_stream)
    return game.latents.normal_(generator=game.fresh_stream)


def _layout(method: Method) -> torch.memory_format:
    return torch.channels_last if method.engine.channels_last else torch.contiguous_format
