"""Third axis of a method, the update: the gradient of the student for a batch of fresh and replayed samples."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dfkd_fast import distributed
from dfkd_fast.kernels import use_backend
from dfkd_fast.settings import NonNegative, Positive, settings

from .batch import Batch, Part
from .objective import Objective, feature_loss

__all__ = ["Update"]


@settings
class Update:
    """Recipe section ``[update]``: how the student's gradient is computed."""

    kind: Literal["plain", "pooled", "first-order", "second-order"] = "plain"
    """Gradient of the student. ``plain``: of the weighted sum of the discrepancies over fresh and over replayed samples, see
    ``replay.share``. ``pooled``: of ``objective.student_weight`` times one discrepancy over all samples, which is what the public code
    of Learning to Retain while Acquiring computes. ``second-order``: the bilevel update of that paper (arXiv 2302.14290).
    ``first-order``: the same without the Hessian-vector product."""
    inner_lr: Positive = 0.9
    """Learning rate α of the inner step of ``first-order`` and ``second-order``."""
    inner_weight_decay: NonNegative = 0.0
    """Weight decay λ of the inner step; 5e-4 in the paper's public code."""

    @property
    def is_retain_acquire(self) -> bool:
        """Whether the update is ``first-order`` or ``second-order``, which require replayed samples."""
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
        feature_vectors: nn.Module | None = None,
    ) -> Tensor:
        """Computes the gradient of the student's loss, averaged over processes, in ``.grad``, which must be empty.

        Args:
            student: Student in training mode; not called if there are ``feature_vectors``.
            batch: Training batch.
            objective: Provides the student's loss.
            autocast: Returns the context manager for the student's forward passes.
            scale: Applied to the loss before the backward pass; ignored by ``first-order`` and ``second-order``.
            micro_batches: Number of micro-batches that the batch is split into, to reduce memory.
            feature_vectors: Module that maps images to the student's logits and feature vectors; required to compare these with the
                batch's. It has the student's parameters, and possibly others that are trained with them.

        Returns:
            The loss of this process, 0-d and detached.
        """
        network = student if feature_vectors is None else feature_vectors
        if self.is_retain_acquire and len(batch.parts) > 1:
            return self._retain_acquire(network, batch, objective, autocast)
        losses = []
        for chunk in batch.chunks(micro_batches):
            with autocast():
                logits, features = _outputs(network(chunk.images))
            terms = self._terms(objective.student_loss, logits, chunk.teacher_logits, chunk.parts, len(batch.images), objective)
            if features is not None and chunk.teacher_features is not None:
                vectors = features[: len(chunk.teacher_features)], chunk.teacher_features
                terms += self._terms(feature_loss, *vectors, chunk.feature_parts, len(batch.images), objective)
            loss = sum(terms[1:], start=terms[0])
            scale(loss).backward()
            losses.append(loss.detach())
        distributed.average_([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
        return sum(losses[1:], start=losses[0])

    def _terms(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        student: Tensor,
        teacher: Tensor,
        parts: Sequence[Part],
        batch_size: int,
        objective: Objective,
    ) -> list[Tensor]:
        """Returns the weighted loss of each part, or of all rows if the update is ``pooled``.

        Args:
            loss: Maps outputs of student and teacher to a mean over samples.
            student: Outputs of the student for a micro-batch.
            teacher: Outputs of the teacher for the same rows.
            parts: Parts of the micro-batch.
            batch_size: Number of rows of all micro-batches.
            objective: Provides the weight of ``pooled``.
        """
        if self.kind == "pooled":
            return [objective.student_weight * len(teacher) / batch_size * loss(student, teacher)]
        rows = [part.rows for part in parts]
        slices = zip(student.split(rows), teacher.split(rows), parts, strict=True)
        return [part.weight * loss(student_rows, teacher_rows) for student_rows, teacher_rows, part in slices]

    def _retain_acquire(
        self, network: nn.Module, batch: Batch, objective: Objective, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Tensor:
        """Computes the gradient of Learning to Retain while Acquiring (arXiv 2302.14290); returns the loss.

        The objective is min over θ of L_acq(θ) + L_ret(θ′) with θ′ = θ − α(∇L_acq(θ) + λθ). With g = ∇L_acq(θ) and v = ∇L_ret(θ′) its
        gradient is g + (1 − αλ)v − αHv, where H is the Hessian of L_acq at θ. ``first-order`` omits the Hessian-vector product.
        The forward pass at θ′ uses a copy of the buffers, so that only the forward pass at θ updates running statistics.
        """
        fresh, replayed = batch.split()
        second_order = self.kind == "second-order"
        parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        with autocast():
            acquired = network(fresh.images)
        # The fused kernels do not support double backward.
        with use_backend("reference"):
            acquire_loss = _loss(acquired, fresh, objective)
        gradients = torch.autograd.grad(acquire_loss, list(parameters.values()), create_graph=second_order, materialize_grads=True)
        # Averaged over processes; the graph for the Hessian remains local, and its product is averaged below.
        acquire_gradients = [gradient.detach().clone() if second_order else gradient for gradient in gradients]
        distributed.average_(acquire_gradients)

        decay, rate = self.inner_weight_decay, self.inner_lr
        inner_parameters = {
            name: (parameter.detach() - rate * (gradient + decay * parameter.detach())).requires_grad_()
            for (name, parameter), gradient in zip(parameters.items(), acquire_gradients, strict=True)
        }
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        with autocast():
            retained = functional_call(network, inner_parameters | buffers, (replayed.images,))
        retain_loss = _loss(retained, replayed, objective)
        retain_gradients = torch.autograd.grad(retain_loss, list(inner_parameters.values()), materialize_grads=True)
        distributed.average_(retain_gradients)

        outer_gradients = [(1 - rate * decay) * v for v in retain_gradients]
        if second_order:
            products = _hessian_vector_product(gradients, list(parameters.values()), retain_gradients)
            distributed.average_(products)
            outer_gradients = [v - rate * hv for v, hv in zip(outer_gradients, products, strict=True)]
        (_, acquire_weight), (_, retain_weight) = batch.parts
        with torch.no_grad():
            for parameter, g, v in zip(parameters.values(), acquire_gradients, outer_gradients, strict=True):
                total = acquire_weight * g + retain_weight * v
                parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
            return acquire_weight * acquire_loss + retain_weight * retain_loss


def _outputs(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Returns the logits and the feature vectors, None without, of the output of a student or of a module of feature vectors."""
    return (output, None) if isinstance(output, Tensor) else output


def _loss(output: Tensor | tuple[Tensor, Tensor], batch: Batch, objective: Objective) -> Tensor:
    """Returns the unweighted loss of an output for a batch of one part."""
    logits, features = _outputs(output)
    loss = objective.student_loss(logits, batch.teacher_logits)
    if features is not None and batch.teacher_features is not None:
        loss = loss + feature_loss(features, batch.teacher_features)
    return loss


def _hessian_vector_product(gradients: Sequence[Tensor], parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns H v from gradients with a graph. Gradients without a graph do not depend on the parameters and contribute 0."""
    differentiable = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
    if not differentiable:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return torch.autograd.grad([g for g, _ in differentiable], parameters, [v for _, v in differentiable], materialize_grads=True)
