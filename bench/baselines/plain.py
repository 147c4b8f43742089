"""A textbook implementation of DFAD and MAD: eager float32, without folding, fusion or CUDA graphs.

It is the oracle of the engine's tests and the baseline of its speedups, and shares only the networks with the engine. Like the public
code, it does redundant work: autograd graphs are recorded and discarded, the generator step computes weight gradients of the teacher and
the student, and every step reads back its loss.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.models import UpsampleConv2d

__all__ = ["Iteration", "distill", "textbook"]


class Iteration(NamedTuple):
    """Losses of one iteration, and the host time of its student steps."""

    student: list[float]
    generator: float
    student_seconds: float


class _Textbook(nn.Module):
    def __init__(self, layer: UpsampleConv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0), self.weight, self.bias, padding=1)


def textbook(generator: nn.Module) -> nn.Module:
    """Replace each ``UpsampleConv2d`` in-place by an equivalent upsampling and convolution; returns the generator."""
    for name, layer in list(generator.named_modules()):
        if type(layer) is UpsampleConv2d:
            generator.set_submodule(name, _Textbook(layer))
    return generator


def _l1(student: Tensor, teacher: Tensor) -> Tensor:
    return F.l1_loss(student, teacher)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


DISCREPANCIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": _l1, "kl": _kl}


def distill(
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
    student_weight: float = 1.0,
    share: float = 0.5,
    discrepancy: Literal["l1", "kl"] = "l1",
    bn_moments: float = 0.0,
    student_in_generator_step: Literal["train", "eval"] = "train",
    latents: torch.Generator | None = None,
    replay_latents: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Iteration]:
    """Train a student and a generator in-place by DFAD (arXiv 1912.11006, algorithm 1); yields the losses of each iteration.

    One iteration is ``student_steps`` student steps and one generator step. With ``ema_decay`` the student also learns from images of an
    exponential moving average of the generator, as in MAD; ``share`` is their share of its loss. With ``bn_moments`` the generator also
    matches the running statistics of the teacher's batch norms, as MAD does on small images.
    """
    teacher.eval()
    student.train()
    generator.train()
    ema_generator = copy.deepcopy(generator).eval()
    compare = DISCREPANCIES[discrepancy]
    mismatch: dict[nn.Module, Tensor] = {}

    def match(norm: Any, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        mismatch[norm] = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()

    if bn_moments:
        for layer in teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_pre_hook(match)

    for _ in range(epochs):
        for _ in range(iterations_per_epoch):
            begin = time.perf_counter()
            student_losses = []
            for _ in range(student_steps):
                images = generator(torch.randn(batch_size, latent_dim, generator=latents).to(device)).detach()
                if ema_decay is not None:
                    replayed = ema_generator(torch.randn(batch_size, latent_dim, generator=replay_latents).to(device)).detach()
                    images = torch.cat([images, replayed])
                student_logits, teacher_logits = student(images), teacher(images).detach()
                loss = compare(student_logits[:batch_size], teacher_logits[:batch_size])
                if ema_decay is not None:
                    loss = (1 - share) * loss + share * compare(student_logits[batch_size:], teacher_logits[batch_size:])
                loss = student_weight * loss
                student_optimizer.zero_grad()
                loss.backward()
                student_optimizer.step()
                student_losses.append(loss.item())
            student_seconds = time.perf_counter() - begin

            images = generator(torch.randn(batch_size, latent_dim, generator=latents).to(device))
            student.train(student_in_generator_step == "train")
            generator_loss = -compare(student(images), teacher(images))
            student.train()
            if bn_moments:
                generator_loss = generator_loss + bn_moments * torch.stack(list(mismatch.values())).sum()
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
            yield Iteration(student_losses, generator_loss.item(), student_seconds)
        for schedule in schedules:
            schedule.step()
