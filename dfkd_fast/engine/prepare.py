"""Preparation of a training: an ordered list of passes optimizes copies of the networks. Most passes have a key in ``[engine]``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd_fast import distributed
from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.kernels import FusedEMA
from dfkd_fast.kernels.conv import cases_without_kernel
from dfkd_fast.methods import Objective, build_replay_source
from dfkd_fast.models import sample, state_dict_sha256
from dfkd_fast.out_of_memory import is_out_of_memory
from dfkd_fast.surgery import (
    Call,
    FeatureVectors,
    FoldingError,
    Observer,
    check_copy,
    deep_copy,
    extract_logits,
    fold_and_verify,
    frozen_copy,
    fuse_conv_acts,
    fuse_norm_acts,
    get_logits,
    has_running_statistics,
    keep_spectral_norms_in_float32,
    lower_precision,
    matched_layers,
    quantized_layers,
    shared_layers,
    sharing_copy,
    use_cpu_convolutions,
)

from .clock import Clock
from .compatibility import check_initialized, check_networks, check_objective, check_smallest_batches
from .device import reuse_freed_memory
from .drift import Drift
from .equality import difference_in_training
from .losses import LossLog
from .method import Engine, Method
from .optim import build_optimizer, build_schedule
from .precision import Precision, emulation_note
from .state import Features, TrainState
from .streams import random_stream

__all__ = ["prepare", "prepare_teacher_training"]

SAMPLES = 4
"""Batch size of the example images that passes run networks on in training mode."""
EVALUATED = 2
"""Batch size in evaluation mode, where images do not affect each other."""
FUSION_TOLERANCE = 0.05
"""Largest difference between the logits of a fused and the original teacher, relative to the largest logit.

In half precision the original rounds two or three times per layer more often."""
GRADIENT_TOLERANCE = 0.8
"""Largest norm of the difference between their input gradients, relative to the gradient's norm.

It is 0.3 for an untrained ResNet-50 in bfloat16, where rounding changes signs in every layer, and 1.4 for unrelated gradients."""


@dataclass
class Context:
    """Inputs of a pass other than the network."""

    role: str
    """Role of the network: "teacher", "student" or "generator"."""
    engine: Engine
    precision: Precision
    device: torch.device
    images: Tensor
    """Example images (SAMPLES, C, H, W) of the generator; empty while the generator is prepared."""
    notes: list[str]
    """Passes append a line for each optimization that they could not apply."""
    second_order: bool = False
    """Whether the student is differentiated twice."""
    on_gpu: bool = False
    """Whether the optimizations for GPUs are applied, those for CPUs otherwise."""
    compares_features: bool = False
    """Whether student steps compare feature maps."""

    @property
    def evaluated(self) -> Tensor:
        """Example images for passes in evaluation mode."""
        return self.images[:EVALUATED]


def note_emulation(context: Context) -> None:
    """Adds a note if the device emulates the precision of the run."""
    if (note := emulation_note(context.precision.name, context.device)) is not None:
        context.notes.append(note)


def share(network: nn.Module, context: Context) -> nn.Module:
    """Copies the modules, sharing parameters, buffers and hooks, and sets training mode."""
    copied = sharing_copy(network)
    copied.train()  # not chained: a user's train() may return None
    return copied


def take_logits(network: nn.Module, context: Context) -> nn.Module:
    """Reduces the network's output to logits if it returns auxiliary outputs."""
    logits_network, others = extract_logits(network, context.images)
    if others is not None:
        context.notes.append(f"the {context.role} {others}")
    return logits_network


def fold(network: nn.Module, context: Context) -> nn.Module:
    """Folds batch norms into convolutions if the outputs remain equal up to rounding."""
    if not context.engine.fold_teacher or not any(map(has_running_statistics, network.modules())):
        return network
    try:
        return fold_and_verify(network, context.evaluated)
    except FoldingError as error:
        context.notes.append(f"the teacher's batch norms are not folded: {error}")
        return network


def to_device(network: nn.Module, context: Context) -> nn.Module:
    """Moves the network in place to the device and the memory format of the run."""
    network.to(context.device)
    return network.to(memory_format=torch.channels_last) if context.engine.channels_last else network


def spectral_norms_in_float32(network: nn.Module, context: Context) -> nn.Module:
    """Keeps the power iterations of spectral norms in float32."""
    keep_spectral_norms_in_float32(network)
    return network


def cpu_convolutions(network: nn.Module, context: Context) -> nn.Module:
    """Selects the algorithm of each convolution on a CPU."""
    return use_cpu_convolutions(network) if context.engine.cpu_convolutions and not context.on_gpu else network


def sync_batch_norm(network: nn.Module, context: Context) -> nn.Module:
    """Replaces batch norms by :class:`torch.nn.SyncBatchNorm`."""
    if not context.engine.sync_batch_norm or distributed.world_size() == 1:
        return network
    if quantized_layers(network):  # its batch norms have fixed statistics
        return network
    if context.device.type != "cuda":
        raise DfkdError("engine.sync_batch_norm = true: PyTorch's SyncBatchNorm requires a GPU")
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def fuse_norm_act(network: nn.Module, context: Context) -> nn.Module:
    """Fuses batch norms with the residual and the activation that follow them, if the network computes the same up to rounding.

    Biases of convolutions before fused batch norms are not computed. On a GPU all other batch norms use the kernel, too. A student that
    is differentiated twice, or whose feature maps are compared, is not fused.
    """
    is_student = context.role != "generator"
    # Fused forward passes do not call all blocks of the student, whose outputs hooks would observe.
    if not context.engine.fuse_norm_act or (is_student and (context.second_order or context.compares_features)):
        return network
    fused = sharing_copy(network)
    if not fuse_norm_acts(fused, every_norm=context.on_gpu, skip_biases=True):
        return network
    shape = context.images[:SAMPLES].shape if is_student else (SAMPLES, int(network.latent_dim))  # type: ignore[arg-type]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(context.device)
    problem = difference_in_training(network, fused, inputs)
    if problem is None:
        return fused
    context.notes.append(f"engine.fuse_norm_act: the {context.role}'s batch norms are not fused with what follows them: {problem}")
    return network


def cast_weights(network: nn.Module, context: Context) -> nn.Module:
    """Casts the teacher's weights to the precision of the run."""
    return network if context.precision.dtype is None else lower_precision(deep_copy(network), context.precision.dtype, context.evaluated)


def fuse_teacher(network: nn.Module, context: Context) -> nn.Module:
    """Fuses the teacher's convolutions with what follows them, if logits and input gradients remain equal up to rounding."""
    if not context.engine.fuse_teacher or not context.on_gpu or context.compares_features:
        return network
    cases_without_kernel.clear()  # those of earlier trainers, which this one would not note
    try:
        with context.precision.autocast():
            fused, count = fuse_conv_acts(network, context.evaluated)
            problem = _difference_of_fused(network, fused, context.evaluated) if count else None
    except Exception as error:  # runs the user's code
        if is_out_of_memory(error):
            raise
        problem = first_line(error)
    if problem is not None:
        context.notes.append(f"engine.fuse_teacher: the teacher's convolutions are not fused with what follows them: {problem}")
        return network
    if missing := list(cases_without_kernel.items()):
        context.notes.append(
            f"engine.fuse_teacher: cuDNN has no fused kernel for {len(missing)} of {count} convolutions, such as {': '.join(missing[0])}"
        )
    return fused if count else network


def _difference_of_fused(network: nn.Module, fused: nn.Module, images: Tensor) -> str | None:
    """Returns how logits and input gradients of a fused teacher differ from the original's by more than rounding; None if they do not."""
    results = []
    for each in (network, fused):
        x = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = get_logits(each(x))
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), x)
        results.append((logits.detach().float(), gradient.float()))
    (expected, expected_gradient), (actual, gradient) = results
    if not (actual - expected).abs().max() <= FUSION_TOLERANCE * expected.abs().max():
        return "its logits would change"
    if not (gradient - expected_gradient).norm() <= GRADIENT_TOLERANCE * expected_gradient.norm():
        return "its input gradient would change"
    return None


def logits_in_float32(network: nn.Module, context: Context) -> nn.Module:
    """Keeps the layers that compute logits in float32."""
    context.precision.keep_logits_in_float32(network, context.evaluated)
    return network


def note_rounded_logits(network: nn.Module, context: Context) -> nn.Module:
    """Adds a note if logits are rounded to the precision of the run."""
    if context.precision.rounds_logits(network, context.evaluated):
        context.notes.append(
            f"engine.precision: the {context.role}'s logits are rounded to {context.precision.name}: "
            "its forward computes them outside of a layer"
        )
    return network


PASSES: dict[str, Sequence[Callable[[nn.Module, Context], nn.Module]]] = {
    "generator": (share, spectral_norms_in_float32, cpu_convolutions, sync_batch_norm, fuse_norm_act),
    "teacher": (
        *(take_logits, fold, to_device, spectral_norms_in_float32, cpu_convolutions),
        *(cast_weights, fuse_teacher, note_rounded_logits),
    ),
    "student": (
        *(share, spectral_norms_in_float32, cpu_convolutions, sync_batch_norm, fuse_norm_act),
        *(take_logits, logits_in_float32, note_rounded_logits),
    ),
}
TEACHER_TRAINING_PASSES = (
    *(share, spectral_norms_in_float32, cpu_convolutions, fuse_norm_act),
    *(take_logits, logits_in_float32, note_rounded_logits),
)
"""Those of the student, except that every process trains the teacher alone."""


def prepare(
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
    method: Method,
    *,
    seed: int,
    device: torch.device,
    teacher_trained: bool = True,
    optimize_for: Literal["cpu", "cuda"] | None = None,
) -> TrainState:
    """Returns the state of a training before its first step.

    Args:
        teacher: Teacher, moved to the device in place. Other changes are made to copies of the modules only.
        student: Student, moved to the device in place.
        generator: Generator, moved to the device in place.
        method: Configuration with a resolved ``engine.precision``.
        seed: Seed of the latents.
        device: Device of the training.
        teacher_trained: False if the teacher's weights are not trained yet, for checks before its training.
        optimize_for: Type of device whose optimizations are applied, by default that of ``device``. With "cuda" on a CPU the steps call
            the operations of a GPU, which can be counted there.

    Raises:
        DfkdError: The networks are incompatible with each other, the method or its batch sizes, or cannot be copied.
    """
    loop, engine, objective = method.loop, method.engine, method.objective
    if engine.malloc_reuse and device.type == "cpu":
        reuse_freed_memory()
    networks = {"teacher": teacher, "student": student, "generator": generator}
    for role, network in networks.items():
        check_initialized(role, network)

    second_order = method.update.kind == "second-order"
    context = Context(
        "teacher",
        engine,
        Precision(engine.precision, device),
        device,
        torch.empty(0, device=device),
        [],
        second_order,
        on_gpu=(optimize_for or device.type) == "cuda",
        compares_features=objective.compares_features,
    )
    note_emulation(context)
    for network in networks.values():
        to_device(network, context)
    distributed.broadcast_([tensor for network in networks.values() for tensor in network.state_dict().values()])
    frozen = frozen_copy(teacher, torch.get_default_dtype())
    is_adversarial = objective.adversarial > 0 and loop.generator_steps > 0
    image_shape, logits_shape = check_networks(
        frozen, student, generator, device, teacher_trained=teacher_trained, adversarial=is_adversarial
    )
    check_objective(objective, generator, logits_shape)
    check_copy(student, teacher)
    if objective.adversarial and not loop.generator_steps:
        context.notes.append(f"objective.adversarial = {objective.adversarial:g} has no effect, because loop.generator_steps is 0")
    if engine.micro_batches > 1 and any(isinstance(layer, _BatchNorm) for layer in [*student.modules(), *generator.modules()]):
        context.notes.append(
            "engine.micro_batches: batch norms in training use the statistics of a micro-batch, so gradients differ from the whole batch's"
        )

    optimized = _apply_passes(networks | {"teacher": frozen}, context)
    images, logits = _static_batch(method, image_shape, logits_shape, context)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # initial weights of a replay source depend on the seed only
        fresh = slice(loop.batch_size)
        replay_source = build_replay_source(method.replay, optimized["generator"], optimized["teacher"], images[fresh], logits[fresh])
    fresh_only = replay_source is None or not replay_source.ready  # in the first steps
    check_smallest_batches(method, student, generator, device, fresh_only=fresh_only)
    observer = Observer(optimized["teacher"], statistics=objective.bn_moments > 0, features=objective.activation > 0)
    with torch.no_grad(), context.precision.autocast():
        observer(context.evaluated)  # raises now, not in the first step, if it cannot observe a layer
    features = None
    if objective.compares_features:
        features = _features(optimized["teacher"], optimized["student"], objective, len(images), seed, context)
    projection = None if features is None else features.student.projection
    average = FusedEMA(student, loop.student_ema_decay) if loop.student_ema_decay else None
    trained = [*student.parameters(), *([] if projection is None else projection.parameters())]
    student_optimizer = build_optimizer(method.student_optimizer, trained, device, on_gpu=context.on_gpu)
    generator_optimizer = build_optimizer(method.generator_optimizer, generator.parameters(), device, on_gpu=context.on_gpu)
    return TrainState(
        device=device,
        method=method,
        precision=context.precision,
        teacher=optimized["teacher"],
        observer=observer,
        student=optimized["student"],
        generator=optimized["generator"],
        features=features,
        replay_source=replay_source,
        average=average,
        saved_networks={"student": student, "generator": generator}
        | ({} if average is None else {"average": average})
        | ({} if projection is None else {"projection": projection}),
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


def prepare_teacher_training(
    teacher: nn.Module, engine: Engine, precision: Precision, device: torch.device, images: Tensor
) -> tuple[nn.Module, list[str]]:
    """Prepares a teacher for its supervised training as :func:`prepare` prepares a student.

    Args:
        teacher: Teacher, moved to the device in place. Other changes are made to a copy of its modules only.
        engine: Optimizations to apply.
        precision: Precision of the forward passes.
        device: Device of the training.
        images: Example images (B, C, H, W) on the device; only the shape matters.

    Returns:
        The optimized copy, which shares the teacher's parameters and buffers, and a note for each optimization that could not be applied.
    """
    if engine.malloc_reuse and device.type == "cpu":
        reuse_freed_memory()
    context = Context("teacher", engine, precision, device, images, [], on_gpu=device.type == "cuda")
    note_emulation(context)
    network = to_device(teacher, context)
    for apply in TEACHER_TRAINING_PASSES:
        network = apply(network, context)
    return network, context.notes


def _apply_passes(networks: dict[str, nn.Module], context: Context) -> dict[str, nn.Module]:
    """Applies all passes to the networks; returns the optimized networks by role."""
    optimized = {}
    for role, passes in PASSES.items():
        context.role, network = role, networks[role]
        for apply in passes:
            network = apply(network, context)
        optimized[role] = network
        if role == "generator":
            context.images = sample(network, SAMPLES, context.device)
    return optimized


def _features(teacher: nn.Module, student: nn.Module, objective: Objective, rows: int, seed: int, context: Context) -> Features:
    """Builds the feature vectors of teacher and student, with a buffer for a batch of ``rows`` samples."""
    projection = None
    with context.precision.autocast():
        teacher_calls: list[Call] = []
        student_calls: list[Call] = []
        if objective.attention or objective.hint:
            teacher_calls, student_calls = matched_layers(teacher, student, context.images)
        layers = shared_layers(teacher, student, context.images) if objective.features else []
        if objective.hint:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # initial weights depend on the seed only
                projection = nn.Conv2d(student_calls[-1].channels, teacher_calls[-1].channels, kernel_size=1).to(context.device)
        weights = objective.attention, objective.hint
        of_teacher = FeatureVectors(teacher, teacher_calls, *weights, layers=layers, features=objective.features)
        of_student = FeatureVectors(student, student_calls, *weights, projection, layers=layers, features=objective.features)
        with torch.no_grad():
            dimension = of_teacher(context.evaluated)[1].shape[1]
    return Features(of_teacher, of_student, torch.zeros(rows, dimension, device=context.device))


def _static_batch(method: Method, image_shape: torch.Size, logits_shape: torch.Size, context: Context) -> tuple[Tensor, Tensor]:
    """Allocates the buffers of a student step's images and teacher logits, in the memory format of the run."""
    layout = torch.channels_last if method.engine.channels_last else torch.contiguous_format
    fresh = method.loop.batch_size
    rows = fresh + (method.replay.num_rows(fresh) if method.replay.replays else 0)
    images = torch.zeros(rows, *image_shape, device=context.device, dtype=context.precision.image_dtype).to(memory_format=layout)
    logits = torch.empty(rows, *logits_shape, device=context.device)
    return images, logits.to(memory_format=layout) if logits.ndim == 4 else logits
