"""One student step and one generator step, as functions over static buffers.

Nothing here waits for the device, reads a number back, or can reach a data set.
"""

import torch
from torch import Tensor

from dfkd_fast import distributed
from dfkd_fast.methods import Batch, Part
from dfkd_fast.models import condition_latents, draw_labels, generate
from dfkd_fast.surgery import weights_frozen

from .method import Method
from .state import TrainState

__all__ = ["generator_step", "student_step"]


def student_step(state: TrainState, step: int = 0) -> dict[str, Tensor]:
    """Draw a batch, ask the teacher, take one step of the student; returns losses by name, 0-d and detached.

    The samples carry no graph: only the student is differentiated (DFAD, arXiv 1912.11006, imitation stage).

    Args:
        state: of the training.
        step: its number in the iteration, which a memory that learns beside the student may heed.
    """
    batch = _draw_batch(state)
    state.student_optimizer.zero_grad()
    precision = state.precision
    loss = state.method.update.backward(
        state.student,
        batch,
        state.method.objective,
        autocast=precision.autocast,
        scale=lambda loss: precision.scale("student", loss),
        micro_batches=state.method.engine.micro_batches,
    )
    precision.step("student", state.student_optimizer)
    if state.average is not None:
        state.average.update(state.student)
    learnt = {}
    if state.replay_source is not None and state.replay_source.ready and step < state.replay_source.steps:
        learnt = state.replay_source.learn(batch, step, state.replay_stream, precision.autocast)
    return {"student": loss, **learnt}


def generator_step(state: TrainState, *, adversarial: bool = True) -> dict[str, Tensor]:
    """Draw a batch, take one step of the generator, let the memory follow; returns its loss terms, 0-d and detached.

    The gradient flows through the teacher and the student to the images; no weight gradient of either is
    computed (DFAD, arXiv 1912.11006, generation stage).

    Args:
        state: of the training.
        adversarial: False for a step of the pretraining, which leaves the student alone.
    """
    pieces, precision = state.method.engine.micro_batches, state.precision
    z = _draw_latents(state)
    weights = list(state.generator.parameters())
    state.generator_optimizer.zero_grad()
    totals: dict[str, Tensor] = {}
    for piece, labels in zip(z.tensor_split(pieces), state.labels.tensor_split(pieces), strict=True):
        terms = {name: len(piece) / len(z) * term for name, term in _generator_terms(state, piece, labels, adversarial).items()}
        precision.scale("generator", torch.stack(list(terms.values())).sum()).backward()
        for name, term in terms.items():
            totals[name] = totals.get(name, 0) + term.detach()
    distributed.average_([weight.grad for weight in weights if weight.grad is not None])
    precision.step("generator", state.generator_optimizer)
    distributed.average_([buffer for buffer in state.generator.buffers() if buffer.is_floating_point()])
    if state.replay_source is not None and adversarial:
        state.replay_source.follow(state.generator)
    return totals


def _generator_terms(state: TrainState, z: Tensor, labels: Tensor, adversarial: bool) -> dict[str, Tensor]:
    objective = state.method.objective
    answers = None
    with state.precision.autocast():
        images = generate([state.generator], [condition_latents(state.generator, z, labels)], memory_format=_layout(state.method))
        if adversarial and objective.adversarial:
            state.student.train(state.method.loop.student_in_generator_step == "train")
            with weights_frozen(state.student):
                answers = state.student(images)
            state.student.train()
        observed = state.observer(images)
    embeddings = state.generator.embedding(labels) if objective.embedding_norm else None  # type: ignore[operator]
    return objective.generator_terms(answers, observed, labels, embeddings)


@torch.no_grad()
def _draw_batch(state: TrainState) -> Batch:
    """Fresh and replayed images in the state's buffers, with the teacher's logits."""
    replay, replay_source, fresh = state.method.replay, state.replay_source, len(state.latents)
    z = _draw_latents(state)
    generators, latents = [state.generator], [condition_latents(state.generator, z, state.labels)]
    parts = [Part(fresh, replay.fresh_weight)]
    images, kept = state.images[:fresh], None
    with state.precision.autocast():
        if replay_source is not None and replay_source.ready:
            parts.append(Part(replay_source.rows, replay.weight))
            if replay_source.generator is not None:
                generators.append(replay_source.generator)
                latents.append(replay_source.latents(state.replay_stream))
                images = state.images
        generate(generators, latents, out=images)
        if len(parts) > len(generators) and replay_source is not None:
            images = state.images
            kept = replay_source.recall(images[fresh:], state.replay_stream)
        asked = images if kept is None else images[:fresh]
        logits = state.logits[: len(images)]
        logits[: len(asked)] = state.teacher(asked)
        if kept is not None:
            logits[fresh:] = kept
    return Batch(images, logits, parts)


def _draw_latents(state: TrainState) -> Tensor:
    """New z, and, for a conditional generator, new classes in ``state.labels``."""
    embedding = getattr(state.generator, "embedding", None)
    if embedding is not None:
        draw_labels(state.labels, embedding.num_embeddings, state.fresh_stream)
    return state.latents.normal_(generator=state.fresh_stream)


def _layout(method: Method) -> torch.memory_format:
    return torch.channels_last if method.engine.channels_last else torch.contiguous_format
