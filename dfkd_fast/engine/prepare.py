"""From networks as they are given to a state that is ready to step: passes over the networks, in order, each with its switch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError
from dfkd_fast.kernels import FusedEMA
from dfkd_fast.methods import build_replay_source
from dfkd_fast.models import sample, state_dict_sha256
from dfkd_fast.surgery import (
    FoldingError,
    Observer,
    auxiliary_outputs,
    deep_copy,
    fold_and_verify,
    frozen_copy,
    fuse_leaky_relus,
    has_running_statistics,
    keep_spectral_norms_in_float32,
    logits_only,
    lower_precision,
    sharing_copy,
    use_cpu_convolutions,
)

from .clock import Clock
from .compatibility import check_initialized, check_networks, check_objective, check_smallest_batches
from .device import reuse_freed_memory
from .drift import Drift
from .losses import LossLog
from .method import Engine, Method
from .optim import build_optimizer, build_schedule
from .precision import Precision
from .state import TrainState
from .streams import random_stream

__all__ = ["prepare"]

SAMPLES = 4
"""Images that passes try a network on."""


@dataclass
class Context:
    """What a pass over a network may look at."""

    role: str
    """Of the network: "teacher", "student" or "generator"."""
    engine: Engine
    precision: Precision
    device: torch.device
    images: Tensor
    """A few of the generator's, (SAMPLES, C, H, W); none yet when the generator is prepared."""
    notes: list[str]


def share(network: nn.Module, context: Context) -> nn.Module:
    """A copy of the modules in training mode, with the network's own parameters, buffers and hooks."""
    copied = sharing_copy(network)
    copied.train()  # whose result a user's own may lack
    return copied


def take_logits(network: nn.Module, context: Context) -> nn.Module:
    """Only the logits, where a network returns more."""
    if (outputs := auxiliary_outputs(network, context.images)) is not None:
        context.notes.append(f"the {context.role} {outputs}")
    return logits_only(network, context.images)


def fold(network: nn.Module, context: Context) -> nn.Module:
    """Batch norms folded into convolutions, where that changes nothing."""
    if not context.engine.fold_teacher or not any(map(has_running_statistics, network.modules())):
        return network
    try:
        return fold_and_verify(network, context.images)
    except FoldingError as error:
        context.notes.append(f"the teacher's batch norms are not folded: {error}")
        return network


def place(network: nn.Module, context: Context) -> nn.Module:
    """The network itself, on the device, in the memory format of the run."""
    network.to(context.device)
    return network.to(memory_format=torch.channels_last) if context.engine.channels_last else network


def spectral_norms_in_float32(network: nn.Module, context: Context) -> nn.Module:
    """A spectral norm's power iteration is not rounded to a lower precision."""
    keep_spectral_norms_in_float32(network)
    return network


def cpu_convolutions(network: nn.Module, context: Context) -> nn.Module:
    """On a CPU, every convolution chooses its algorithm."""
    return use_cpu_convolutions(network) if context.engine.cpu_convolutions and context.device.type == "cpu" else network


def sync_batch_norm(network: nn.Module, context: Context) -> nn.Module:
    """Batch norms in training see the batch of all processes."""
    if not context.engine.sync_batch_norm or distributed.world_size() == 1:
        return network
    if context.device.type != "cuda":
        raise DfkdError("engine.sync_batch_norm = true: PyTorch's SyncBatchNorm works on GPUs only")
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def fuse_norm_act(network: nn.Module, context: Context) -> nn.Module:
    """Batch norm and leaky ReLU in one kernel; on a GPU also batch norms alone."""
    if context.engine.fuse_norm_act:
        fuse_leaky_relus(network, every_norm=context.device.type == "cuda")
    return network


def lower(network: nn.Module, context: Context) -> nn.Module:
    """The teacher's weights in the precision of the run."""
    return network if context.precision.dtype is None else lower_precision(deep_copy(network), context.precision.dtype, context.images)


def logits_in_float32(network: nn.Module, context: Context) -> nn.Module:
    """The layers that logits come out of compute in float32."""
    context.precision.keep_logits(network, context.images)
    return network


def tell_rounded_logits(network: nn.Module, context: Context) -> nn.Module:
    """A line where logits are rounded all the same."""
    if context.precision.rounds_logits(network, context.images):
        context.notes.append(
            f"engine.precision: the {context.role}'s logits are rounded to {context.precision.name}: its forward makes them, not a layer"
        )
    return network


PASSES: dict[str, Sequence[Callable[[nn.Module, Context], nn.Module]]] = {
    "generator": (share, spectral_norms_in_float32, cpu_convolutions, sync_batch_norm, fuse_norm_act),
    "teacher": (take_logits, fold, place, spectral_norms_in_float32, cpu_convolutions, lower, tell_rounded_logits),
    "student": (share, spectral_norms_in_float32, cpu_convolutions, sync_batch_norm, take_logits, logits_in_float32, tell_rounded_logits),
}


def prepare(
    teacher: nn.Module, student: nn.Module, generator: nn.Module, method: Method, *, seed: int, device: torch.device, trained: bool = True
) -> TrainState:
    """The state of a training before its first step.

    Args:
        teacher, student, generator: moved to the device, in place; what else is done is done to copies of their modules.
        method: its ``precision`` resolved.
        seed: of the latent vectors.
        device: of the training.
        trained: False for a teacher without its weights yet, to find out what would be refused before they are trained.

    Raises:
        DfkdError: the networks do not fit each other, the method or its batches, or cannot be copied.
    """
    loop, engine, objective = method.loop, method.engine, method.objective
    if engine.malloc_reuse and device.type == "cpu":
        reuse_freed_memory()
    given = {"teacher": teacher, "student": student, "generator": generator}
    for role, network in given.items():
        check_initialized(role, network)

    context = Context("teacher", engine, Precision(engine.precision, device), device, torch.empty(0, device=device), [])
    for network in given.values():
        place(network, context)
    distributed.broadcast_([tensor for network in given.values() for tensor in network.state_dict().values()])
    frozen = frozen_copy(teacher, torch.get_default_dtype())
    image_shape, logits_shape = check_networks(frozen, student, generator, device, trained=trained, adversarial=objective.adversarial > 0)
    check_objective(objective, generator, logits_shape)
    if engine.micro_batches > 1 and any(isinstance(layer, _BatchNorm) for layer in [*student.modules(), *generator.modules()]):
        context.notes.append(
            "engine.micro_batches: batch norms in training see a piece of the batch, so gradients are not quite the whole's"
        )

    working = _pass_over(given | {"teacher": frozen}, context)
    images, logits = _static_batch(method, image_shape, logits_shape, context)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # the same autoencoder whatever was drawn before
        fresh = slice(loop.batch_size)
        replay_source = build_replay_source(method.replay, working["generator"], working["teacher"], images[fresh], logits[fresh])
    alone = replay_source is None or not replay_source.ready  # the first steps have fresh samples only
    check_smallest_batches(method, student, generator, device, alone=alone)
    observer = Observer(working["teacher"], statistics=objective.bn_moments > 0, features=objective.activation > 0)
    with torch.no_grad(), context.precision.autocast():
        observer(context.images)  # what it does not get to see is said now, not by the first step
    average = FusedEMA(student, loop.student_ema_decay) if loop.student_ema_decay else None
    student_optimizer = build_optimizer(method.student_optimizer, student.parameters(), device)
    generator_optimizer = build_optimizer(method.generator_optimizer, generator.parameters(), device)
    return TrainState(
        device=device,
        method=method,
        precision=context.precision,
        teacher=working["teacher"],
        observer=observer,
        student=working["student"],
        generator=working["generator"],
        replay_source=replay_source,
        average=average,
        trained={"student": student, "generator": generator} | ({} if average is None else {"average": average}),
        teacher_sha256=state_dict_sha256(teacher.state_dict()),
        student_optimizer=student_optimizer,
        generator_optimizer=generator_optimizer,
        schedules=[
            build_schedule(method.student_optimizer, student_optimizer, loop.epochs),
            build_schedule(method.generator_optimizer, generator_optimizer, loop.epochs),
        ],
        latents=torch.empty(loop.batch_size, int(generator.latent_dim), device=device),  # type: ignore[arg-type]
        labels=torch.empty(loop.batch_size, dtype=torch.long, device=device),
        images=images,
        logits=logits,
        fresh_stream=random_stream(seed, "fresh", device),
        replay_stream=random_stream(seed, "replay", device),
        losses=LossLog(loop, {} if replay_source is None else dict.fromkeys(replay_source.losses, replay_source.steps), device),
        drift=Drift(loop.drift_samples),
        clock=Clock(device),
        notes=context.notes,
    )


def _pass_over(networks: dict[str, nn.Module], context: Context) -> dict[str, nn.Module]:
    """The networks as the steps call them, by role, once every pass was over them."""
    working = {}
    for role, passes in PASSES.items():
        context.role, network = role, networks[role]
        for each in passes:
            network = each(network, context)
        working[role] = network
        if role == "generator":
            context.images = sample(network, SAMPLES, context.device)
    return working


def _static_batch(method: Method, image_shape: torch.Size, logits_shape: torch.Size, context: Context) -> tuple[Tensor, Tensor]:
    """Images and logits of a student step, fresh and replayed, in the memory format of the run."""
    layout = torch.channels_last if method.engine.channels_last else torch.contiguous_format
    fresh = method.loop.batch_size
    rows = fresh + (method.replay.rows_of(fresh) if method.replay.replays else 0)
    images = torch.zeros(rows, *image_shape, device=context.device, dtype=context.precision.images).to(memory_format=layout)
    logits = torch.empty(rows, *logits_shape, device=context.device)
    return images, logits.to(memory_format=layout) if logits.ndim == 4 else logits
