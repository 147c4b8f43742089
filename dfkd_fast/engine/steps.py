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

__all__ = ["generator_step", "student_step", "train_student"]


def student_step(state: TrainState, step: int = 0) -> dict[str, Tensor]:
    """Draws a batch with the teacher's logits and takes one optimizer step of the student (DFAD, arXiv 1912.11006, imitation stage).

    The samples are generated without a graph: only the student is differentiated.

    Args:
        state: State of the training, modified in place.
        step: Index of the step in the iteration, from 0. It decides whether fresh samples are drawn, and is passed to the replay source.

    Returns:
        Losses by name, each 0-d and detached.
    """
    return train_student(state, _draw_batch(state, fresh=step % state.method.loop.steps_per_batch == 0), step)


def train_student(state: TrainState, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    """Takes one optimizer step of the student on a batch.

    Args:
        state: State of the training, modified in place.
        batch: Images with the outputs of ``state.teacher``, and with those of ``state.features`` if features are compared.
        step: Index of the step in the iteration, from 0, which is passed to the replay source.

    Returns:
        Losses by name, each 0-d and detached.
    """
    state.student_optimizer.zero_grad()
    precision = state.precision
    loss = state.method.update.backward(
        state.student,
        batch,
        state.method.objective,
        autocast=precision.autocast,
        scale=lambda loss: precision.scale("student", loss),
        micro_batches=state.method.engine.micro_batches,
        feature_vectors=None if state.features is None else state.features.student,
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
def _draw_batch(state: TrainState, *, fresh: bool) -> Batch:
    """Returns fresh and replayed images with the teacher's logits and feature vectors, as views of the state's buffers.

    If ``fresh`` is False, the fresh rows remain those of the previous student step.
    """
    factor, share = state.method.objective.student_weight, state.method.replay.share
    source, features, fresh_rows = state.replay_source, state.features, len(state.latents)
    parts = [Part(fresh_rows, factor)]
    generators, latents, stored_logits = [], [], None
    if fresh:
        generators.append(state.generator)
        latents.append(condition_latents(state.generator, _draw_latents(state), state.labels))
    first, generated = 0 if fresh else fresh_rows, fresh_rows
    with state.precision.autocast():
        if source is not None and source.ready:
            parts = [Part(fresh_rows, factor * (1 - share)), Part(source.rows, factor * share)]
            if source.generator is not None:
                generators.append(source.generator)
                latents.append(source.latents(state.replay_stream))  # may run the teacher
                generated += source.rows
        total = sum(part.rows for part in parts)
        images, logits = state.images[:total], state.logits[:total]
        if generators:
            generate(generators, latents, out=images[first:generated])
        if source is not None and generated < total:
            stored_logits = source.recall(images[generated:], state.replay_stream)
        labelled = total if stored_logits is None else generated
        if first < labelled:
            rows = slice(first, labelled)
            if features is None:
                logits[rows] = state.teacher(images[rows])
            else:
                logits[rows], features.vectors[rows] = features.teacher(images[rows])
    if stored_logits is not None:
        logits[generated:] = stored_logits
    return Batch(images, logits, parts, None if features is None else features.vectors[:labelled])


def _draw_latents(state: TrainState) -> Tensor:
    """Returns new latents z (B, latent_dim); for a conditional generator, also draws class labels into ``state.labels``."""
    embedding = getattr(state.generator, "embedding", None)
    if embedding is not None:
        draw_labels(state.labels, embedding.num_embeddings, state.fresh_stream)
    return state.latents.normal_(generator=state.fresh_stream)


def _layout(method: Method) -> torch.memory_format:
    return torch.channels_last if method.engine.channels_last else torch.contiguous_format
