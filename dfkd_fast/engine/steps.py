"""The student step and the generator step, as functions over static buffers.

No function synchronizes the device or has access to a data set.
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
    """Draws a batch, computes the teacher's logits and takes one optimizer step of the student (DFAD, arXiv 1912.11006, imitation stage).

    The samples are generated without a graph: only the student is differentiated.

    Args:
        state: State of the training, modified in place.
        step: Index of the step in the iteration, from 0; passed to the replay source.

    Returns:
        Losses by name, each 0-d and detached.
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
    replay_losses = {}
    if state.replay_source is not None and state.replay_source.ready and step < state.replay_source.steps:
        replay_losses = state.replay_source.learn(batch, step, state.replay_stream, precision.autocast)
    return {"student": loss, **replay_losses}


def generator_step(state: TrainState, *, adversarial: bool = True) -> dict[str, Tensor]:
    """Draws latents and takes one optimizer step of the generator (DFAD, arXiv 1912.11006, generation stage).

    Gradients flow through the teacher and the student to the images; their weight gradients are not computed.

    Args:
        state: State of the training, modified in place.
        adversarial: False in pretraining, which does not use the student and does not update the replay source.

    Returns:
        Loss terms by name, each 0-d and detached.
    """
    micro_batches, precision = state.method.engine.micro_batches, state.precision
    z = _draw_latents(state)
    weights = list(state.generator.parameters())
    state.generator_optimizer.zero_grad()
    totals: dict[str, Tensor] = {}
    for chunk, labels in zip(z.tensor_split(micro_batches), state.labels.tensor_split(micro_batches), strict=True):
        terms = {name: len(chunk) / len(z) * term for name, term in _generator_terms(state, chunk, labels, adversarial).items()}
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
    student_logits = None
    with state.precision.autocast():
        images = generate([state.generator], [condition_latents(state.generator, z, labels)], memory_format=_layout(state.method))
        if adversarial and objective.adversarial:
            state.student.train(state.method.loop.student_in_generator_step == "train")
            with weights_frozen(state.student):
                student_logits = state.student(images)
            state.student.train()
        observation = state.observer(images)
    embeddings = state.generator.embedding(labels) if objective.embedding_norm else None  # type: ignore[operator]
    return objective.generator_terms(student_logits, observation, labels, embeddings)


@torch.no_grad()
def _draw_batch(state: TrainState) -> Batch:
    """Returns fresh and replayed images with the teacher's logits, as views of the state's buffers."""
    factor, share = state.method.objective.student_weight, state.method.replay.share
    replay_source, fresh = state.replay_source, len(state.latents)
    z = _draw_latents(state)
    generators, latents = [state.generator], [condition_latents(state.generator, z, state.labels)]
    parts = [Part(fresh, factor)]
    images, stored_logits = state.images[:fresh], None
    with state.precision.autocast():
        if replay_source is not None and replay_source.ready:
            parts = [Part(fresh, factor * (1 - share)), Part(replay_source.rows, factor * share)]
            if replay_source.generator is not None:
                generators.append(replay_source.generator)
                latents.append(replay_source.latents(state.replay_stream))
                images = state.images
        generate(generators, latents, out=images)
        if len(parts) > len(generators) and replay_source is not None:
            images = state.images
            stored_logits = replay_source.recall(images[fresh:], state.replay_stream)
        unlabelled = images if stored_logits is None else images[:fresh]
        logits = state.logits[: len(images)]
        logits[: len(unlabelled)] = state.teacher(unlabelled)
        if stored_logits is not None:
            logits[fresh:] = stored_logits
    return Batch(images, logits, parts)


def _draw_latents(state: TrainState) -> Tensor:
    """Returns new latents z (B, latent_dim); for a conditional generator, also draws class labels into ``state.labels``."""
    embedding = getattr(state.generator, "embedding", None)
    if embedding is not None:
        draw_labels(state.labels, embedding.num_embeddings, state.fresh_stream)
    return state.latents.normal_(generator=state.fresh_stream)


def _layout(method: Method) -> torch.memory_format:
    return torch.channels_last if method.engine.channels_last else torch.contiguous_format
