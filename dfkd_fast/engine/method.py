"""A point on the three axes with everything else the loop is told: all of a recipe but its networks and data."""

from collections.abc import Iterator
from dataclasses import asdict, field, fields, replace
from typing import Any, Literal, TypeVar

import torch

from dfkd_fast.choices import PrecisionSetting
from dfkd_fast.methods import POLICIES, Objective, Replay, Update
from dfkd_fast.settings import Count, Flag, Fraction, PositiveInt, settings

from .optim import Optimizer
from .precision import resolve_precision

__all__ = ["Engine", "Loop", "Method", "differences", "method_to_dict", "resolved"]

AnyMethod = TypeVar("AnyMethod", bound="Method")


@settings
class Loop:
    """Recipe section ``[loop]``: an epoch is so many iterations, an iteration so many steps of each player."""

    epochs: PositiveInt = 40
    iterations_per_epoch: PositiveInt = 50
    batch_size: PositiveInt = 256
    """Fresh samples a step, of each process."""
    student_steps: PositiveInt = 5
    """Imitation steps an iteration, each on new samples; DFAD's k."""
    generator_steps: PositiveInt = 1
    generator_first: Flag = False
    """Whether an iteration begins with the generator's steps (PRE-DFKD) or ends with them (DFAD)."""
    generator_pretraining: Count = 0
    """Steps the generator takes before the first iteration, without the adversary's term (MAD)."""
    student_in_generator_step: Literal["train", "eval"] = "train"
    """Mode of the student while the generator learns: DFAD trains through its batch statistics."""
    student_ema_decay: Fraction = 0.0
    """Of an average of the student, which is then what is evaluated and kept; 0 for none."""
    drift_samples: Count = 0
    """Samples on which the student's predictions are compared between the generator's versions, epoch by epoch; 0 for
    no comparison."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations of the student; the last epoch is always evaluated."""


@settings
class Engine:
    """Recipe section ``[engine]``: how the steps are computed, one switch a pass over the networks or the loop."""

    precision: PrecisionSetting = "auto"
    """What networks compute in, under autocast; weights, averages and logits are float32 always. ``auto`` is ``bf16`` on a GPU
    that computes in it, else ``fp32``; a run keeps what it was when it began. ``fp16`` scales the losses."""
    channels_last: Flag = True
    """Memory layout of networks and images. The function is the same, the rounding is not."""
    cpu_convolutions: Flag = True
    """On a CPU, let every channels-last convolution choose its algorithm. The function is the same, the rounding is not."""
    fuse_norm_act: Flag = True
    """Compute batch norm and leaky ReLU of the generators as one kernel. The function is the same, the rounding is not."""
    fold_teacher: Flag = True
    """Fold the teacher's batch norms into its convolutions. The function is the same, the rounding is not."""
    sync_batch_norm: Flag = False
    """On several GPUs, batch norms in training see the batch of all processes (torch.nn.SyncBatchNorm)."""
    micro_batches: PositiveInt = 1
    """Pieces that a batch goes through the student and the generator in, for the memory of one. Their gradients add up to the
    whole batch's, but for batch norms in training and terms that are no means over samples (bn_moments, entropy, log_l1)."""
    compile: Flag = False
    """Compile teacher, student and generators with torch.compile, for the steps; evaluation runs them as they are."""
    capture: Flag = True
    """On a GPU, replay steps as CUDA graphs."""
    malloc_reuse: Flag = True
    """On a CPU, let the process keep the memory it frees: the system clears every page of a large block anew at every step."""


@settings
class Method:
    """What a :class:`~dfkd_fast.Trainer` needs beside the networks. The defaults are DFAD's (arXiv 1912.11006)."""

    loop: Loop = field(default_factory=Loop)
    engine: Engine = field(default_factory=Engine)
    objective: Objective = field(default_factory=Objective)
    replay: Replay = field(default_factory=Replay)
    update: Update = field(default_factory=Update)
    student_optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.1, weight_decay=5e-4))
    generator_optimizer: Optimizer = field(default_factory=lambda: Optimizer(kind="adam", lr=1e-3))

    def __post_init__(self) -> None:
        if self.update.is_retain_acquire and not self.replay.replays:
            raise ValueError(f"update.kind = {self.update.kind!r}: needs replayed samples, but replay.kind is {self.replay.kind!r}")
        policy = self.replay.policy
        if self.engine.precision == "fp16" and (
            self.update.is_retain_acquire or (self.replay.replays and policy is not None and not policy.fp16)
        ):
            kinds = " or ".join(repr(kind) for kind, policy in POLICIES.items() if not policy.fp16)
            raise ValueError(
                f"engine.precision = 'fp16': not with replay.kind {kinds} nor with first-order or second-order updates; use 'bf16'"
            )
        loop = self.loop
        steps = loop.iterations_per_epoch * max(loop.student_steps, loop.generator_steps)
        if steps > MAX_STEPS:
            raise ValueError(
                f"loop.iterations_per_epoch = {loop.iterations_per_epoch}: an epoch keeps the losses of its {steps} steps,"
                f" and can have {MAX_STEPS} of a kind; loop.epochs has no such limit"
            )
        batch_size, pieces = self.loop.batch_size, self.engine.micro_batches
        if pieces > 1 and self.update.is_retain_acquire:
            raise ValueError(
                f"engine.micro_batches = {pieces}: not with update.kind {self.update.kind!r}, which differentiates a batch twice"
            )
        least = min(batch_size, self.replay.num_rows(batch_size)) if self.replay.replays else batch_size
        if pieces > least:
            raise ValueError(f"engine.micro_batches = {pieces}: fresh or replayed samples are {least} only, and every piece needs some")
        if policy is not None:
            policy.check(self.replay.rows, batch_size)
        if self.loop.generator_pretraining and not self.objective.has_non_adversarial_terms:
            raise ValueError(
                f"loop.generator_pretraining = {self.loop.generator_pretraining}: needs a term of the objective beside the adversary's"
            )


MAX_STEPS = 10**8
"""Steps of a kind in an epoch: their losses stay on the device."""
MAY_CHANGE_ON_RESUME = {"loop.evaluate_every", "loop.drift_samples", "engine.malloc_reuse", "engine.capture"}
"""What may differ when a training goes on: it changes no weight."""


def method_to_dict(method: Method) -> dict[str, Any]:
    """The settings of a method, or of a recipe as far as it is one, as nested dictionaries."""
    return {section.name: asdict(getattr(method, section.name)) for section in fields(Method)}


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path and both values of every setting that stands in both, differs, and makes a difference."""
    for key, theirs in before.items():
        path, ours = prefix + key, after.get(key)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            yield from differences(theirs, ours, f"{path}.")
        elif key in after and ours != theirs and path not in MAY_CHANGE_ON_RESUME:
            yield path, theirs, ours


def resolved(method: AnyMethod, device: torch.device) -> AnyMethod:
    """The method, or recipe, with ``engine.precision`` as it is on a device."""
    return replace(method, engine=replace(method.engine, precision=resolve_precision(method.engine.precision, device)))
