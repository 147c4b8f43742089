"""DFAD and MAD as a textbook would write them: eager float32, nothing folded, fused, captured or skipped.

The oracle of the engine's tests and the baseline of its speed-ups. It shares the networks with the engine and
nothing else, and it is as wasteful as the public code: graphs are recorded and thrown away, weight gradients of
the teacher and the student are computed in the generator's step, and losses are read back at every step.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Iteration", "distil"]


class Iteration(NamedTuple):
    """Losses of one iteration."""

    student: list[float]
    generator: float


def distil(
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
    *,
    student_optimizer: torch.optim.Optimizer,
    generator_optimizer: torch.optim.Optimizer,
    schedules: Sequence[torch.optim.lr_scheduler.LRScheduler] = (),
    epochs: int,
    iterations_per_epoch: int = 50,
    batch_size: int = 256,
    latent_dim: int = 256,
    student_steps: int = 5,
    ema_decay: float | None = None,
    replay_weight: float = 1.0,
    latents: torch.Generator | None = None,
    replay_latents: torch.Generator | None = None,
) -> Iterator[Iteration]:
    """DFAD (arXiv 1912.11006, algorithm 1) with the L1 discrepancy; with ``ema_decay``, MAD's averaged generator beside it.

    The networks are trained in place. One iteration is ``student_steps`` imitation steps and one generation step.
    """
    teacher.eval()
    student.train()
    generator.train()
    ema_generator = copy.deepcopy(generator).eval()

    for _ in range(epochs):
        for _ in range(iterations_per_epoch):
            student_losses = []
            for _ in range(student_steps):
                images = generator(torch.randn(batch_size, latent_dim, generator=latents)).detach()
                if ema_decay is not None:
                    replayed = ema_generator(torch.randn(batch_size, latent_dim, generator=replay_latents)).detach()
                    images = torch.cat([images, replayed])
                student_logits, teacher_logits = student(images), teacher(images).detach()
                loss = F.l1_loss(student_logits[:batch_size], teacher_logits[:batch_size])
                if ema_decay is not None:
                    loss = loss + replay_weight * F.l1_loss(student_logits[batch_size:], teacher_logits[batch_size:])
                student_optimizer.zero_grad()
                loss.backward()
                student_optimizer.step()
                student_losses.append(loss.item())

            images = generator(torch.randn(batch_size, latent_dim, generator=latents))
            generator_loss = -F.l1_loss(student(images), teacher(images))
            generator_optimizer.zero_grad()
            generator_loss.backward()
            generator_optimizer.step()

            if ema_decay is not None:
                with torch.no_grad():
                    for average, value in zip(ema_generator.state_dict().values(), generator.state_dict().values(), strict=True):
                        if value.is_floating_point():
                            average.lerp_(value, 1 - ema_decay)
                        else:
                            average.copy_(value)
            yield Iteration(student_losses, generator_loss.item())
        for schedule in schedules:
            schedule.step()
