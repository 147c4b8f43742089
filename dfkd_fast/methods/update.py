"""Third axis: how the student's gradient comes from a batch of fresh and replayed samples."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dfkd_fast import distributed
from dfkd_fast.kernels import use_backend
from dfkd_fast.settings import NonNegative, Positive, settings

from .batch import Batch
from .objective import Objective

__all__ = ["Update"]


@settings
class Update:
    """Recipe section ``[update]``."""

    kind: Literal["plain", "pooled", "first-order", "second-order"] = "plain"
    """``plain``: the gradient of the sum of the discrepancies of fresh and replayed samples, weighted as ``[replay]`` says.
    ``pooled``: that of one discrepancy over all of them, what the public code of Learning to Retain while Acquiring
    amounts to. ``second-order``: that paper's; ``first-order``: the same without the Hessian."""
    inner_lr: Positive = 0.9
    """α of the inner step of ``first-order`` and ``second-order``."""
    inner_weight_decay: NonNegative = 0.0
    """λ of the inner step; the public code has 5e-4."""

    @property
    def is_retain_acquire(self) -> bool:
        """Whether it needs replayed samples to be what it is."""
        return self.kind in ("first-order", "second-order")

    def backward(
        self,
        student: nn.Module,
        batch: Batch,
        objective: Objective,
        *,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        micro_batches: int = 1,
    ) -> Tensor:
        """Add the gradient of the student's loss, over all processes, to its empty ``.grad``; returns this one's loss, 0-d and detached.

        Args:
            student: in training mode.
            batch: what it learns from.
            objective: which discrepancy.
            autocast: makes the context of the student's forward passes.
            scale: what the loss is multiplied by before it is differentiated; not by ``first-order`` and ``second-order``.
            micro_batches: pieces that go through the student one after the other, for the memory of one of them.
        """
        if self.is_retain_acquire and len(batch.parts) > 1:
            return self._retain(student, batch, objective, autocast)
        losses = []
        for piece in batch.chunks(micro_batches):
            with autocast():
                logits = student(piece.images)
            if self.kind == "pooled":
                loss = len(piece.images) / len(batch.images) * objective.student_loss(logits, piece.teacher_logits)
            else:
                rows = [part.rows for part in piece.parts]
                halves = zip(logits.split(rows), piece.teacher_logits.split(rows), piece.parts, strict=True)
                terms = [part.weight * objective.student_loss(answers, targets) for answers, targets, part in halves]
                loss = sum(terms[1:], start=terms[0])
            scale(loss).backward()
            losses.append(loss.detach())
        distributed.average_([parameter.grad for parameter in student.parameters() if parameter.grad is not None])
        return sum(losses[1:], start=losses[0])

    def _retain(
        self, student: nn.Module, batch: Batch, objective: Objective, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Tensor:
        """Learning to Retain while Acquiring (arXiv 2302.14290): min over θ of L_acq(θ) + L_ret(θ′), θ′ = θ − α(∇L_acq(θ) + λθ).

        With g = ∇L_acq(θ) and v = ∇L_ret(θ′) the gradient is g + (1 − αλ)v − αHv, H the Hessian of L_acq at θ: one
        product of it with a vector. First order drops that product. The forward on θ′ uses a copy of the buffers, so
        that running statistics are moved by the forward on θ alone.
        """
        fresh, replayed = batch.split()
        exact = self.kind == "second-order"
        parameters = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
        with autocast():
            acquired_logits = student(fresh.images)
        # The fused kernels can be differentiated once only.
        with use_backend("reference"):
            acquire = objective.student_loss(acquired_logits, fresh.teacher_logits)
        gradients = torch.autograd.grad(acquire, list(parameters.values()), create_graph=exact, materialize_grads=True)
        # Of all processes; the graph of the Hessian stays this one's, and its product is averaged in turn.
        acquiring = [gradient.detach().clone() if exact else gradient for gradient in gradients]
        distributed.average_(acquiring)

        decay, rate = self.inner_weight_decay, self.inner_lr
        moved = {
            name: (parameter.detach() - rate * (gradient + decay * parameter.detach())).requires_grad_()
            for (name, parameter), gradient in zip(parameters.items(), acquiring, strict=True)
        }
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        with autocast():
            retained_logits = functional_call(student, moved | buffers, (replayed.images,))
        retain = objective.student_loss(retained_logits, replayed.teacher_logits)
        retaining = torch.autograd.grad(retain, list(moved.values()), materialize_grads=True)
        distributed.average_(retaining)

        through = [(1 - rate * decay) * v for v in retaining]
        if exact:
            curvature = _hessian_product(gradients, list(parameters.values()), retaining)
            distributed.average_(curvature)
            through = [v - rate * hv for v, hv in zip(through, curvature, strict=True)]
        (_, acquired), (_, retained) = batch.parts
        with torch.no_grad():
            for parameter, g, v in zip(parameters.values(), acquiring, through, strict=True):
                total = acquired * g + retained * v
                parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
            return acquired * acquire + retained * retain


def _hessian_product(gradients: Sequence[Tensor], parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> Sequence[Tensor]:
    """H v from gradients with a graph; what is linear in the parameters has none, and no curvature."""
    curved = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
    if not curved:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return torch.autograd.grad([g for g, _ in curved], parameters, [v for _, v in curved], materialize_grads=True)
