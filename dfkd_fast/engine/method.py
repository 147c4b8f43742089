"""Configuration of a training: the three axes, the loop, the engine and the optimizers; a recipe without networks and data."""

from collections.abc import Iterator
from dataclasses import asdict, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import BeforeValidator

from dfkd_fast.choices import PrecisionSetting, Region
from dfkd_fast.errors import short_repr
from dfkd_fast.methods import POLICIES, Objective, Replay, Update
from dfkd_fast.renamed import FORMER_WEIGHTS_REPLACED, current_weights
from dfkd_fast.settings import Count, Duration, Flag, Fraction, PositiveInt, settings

from .optim import Optimizer
from .precision import resolve_precision

__all__ = ["Engine", "Loop", "Method", "differences", "method_to_dict", "resolved"]

AnyMethod = TypeVar("AnyMethod", bound="Method")
REGIONS: tuple[Region, ...] = get_args(Region)


def _check_regions(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if not isinstance(value, list | tuple) or not all(region in REGIONS for region in value):
        raise ValueError(f"{short_repr(value)} must be true, false or a list of 'teacher', 'student' and 'generator'")
    return tuple(region for region in REGIONS if region in value)


Regions = Annotated[bool | tuple[Region, ...], BeforeValidator(_check_regions)]
"""Names of regions; True for all and False for none."""


@settings
class Loop:
    """Recipe section ``[loop]``: the training schedule. An iteration consists of student steps and generator steps."""

    epochs: PositiveInt = 40
    """Number of epochs; with a ``budget`` it is computed."""
    budget: Duration = ""
    """Wall-clock time of the student's training, such as ``90s``, ``40min`` or ``2h30min``, from which the number of epochs is computed
    when a run begins (:func:`~dfkd_fast.within_budget`); empty to use ``epochs``."""
    iterations_per_epoch: PositiveInt = 50
    """Number of iterations per epoch."""
    batch_size: PositiveInt = 256
    """Number of fresh samples per step and process."""
    student_steps: PositiveInt = 5
    """Number of student steps per iteration (k in DFAD)."""
    steps_per_batch: PositiveInt = 1
    """Number of consecutive student steps of an iteration on the same fresh samples (1 in DFAD). Replayed samples are drawn in every
    step."""
    generator_steps: Count = 1
    """Number of generator steps per iteration. With 0, the generator is trained in its pretraining only."""
    generator_first: Flag = False
    """Run the generator steps before the student steps of an iteration (PRE-DFKD) instead of after them (DFAD)."""
    generator_pretraining: Count = 0
    """Number of generator steps before the first iteration, without the adversarial term (MAD)."""
    student_in_generator_step: Literal["train", "eval"] = "train"
    """Mode of the student in generator steps. With ``train`` (DFAD), gradients pass through its batch statistics."""
    student_ema_decay: Fraction = 0.0
    """Decay of the student's exponential moving average, which is evaluated and saved instead of the student; 0 disables it."""
    drift_samples: Count = 0
    """Number of samples on which the student's predictions are compared between the generators of successive epochs; 0 disables it."""
    evaluate_every: PositiveInt = 1
    """Number of epochs between evaluations of the student. The last epoch is always evaluated."""


@settings
class Engine:
    """Recipe section ``[engine]``: how the steps are computed. Each key enables one optimization.

    The optimizations are mathematically equivalent; results may differ by rounding.
    """

    precision: PrecisionSetting = "auto"
    """Autocast dtype of the networks: ``fp32``, ``bf16``, ``fp16`` (with loss scaling) or ``auto``, which is ``bf16`` on GPUs that
    support it and ``fp32`` otherwise. Weights, averages and logits are always float32. A resumed run keeps its precision."""
    channels_last: Flag = True
    """Use the channels-last memory format for networks and images."""
    cpu_convolutions: Flag = True
    """On a CPU, select the fastest algorithm for each channels-last convolution."""
    fuse_norm_act: Flag = True
    """Compute the batch norms of student and generators together with the residual and the activation that follow them."""
    fold_teacher: Flag = True
    """Fold the teacher's batch norms into its convolutions."""
    fuse_teacher: Flag = True
    """On a GPU, compute each convolution of the teacher together with the bias, residual and activation that follow it; with
    ``objective.bn_moments`` also its batch statistics. Not with ``objective.attention``, ``hint`` or ``features``."""
    sync_batch_norm: Flag = False
    """With several GPUs, compute batch statistics over all processes (:class:`torch.nn.SyncBatchNorm`)."""
    micro_batches: PositiveInt = 1
    """Number of micro-batches that a batch is split into for the student and the generator, to reduce memory. Their gradients sum to
    the gradient of the whole batch, except for batch norms in training and terms that are not means over samples (``bn_moments``,
    ``entropy``, ``log_l1``)."""
    compile: Regions = False
    """Networks to compile with :func:`torch.compile` in the steps: true for all, or a list of ``"teacher"``, ``"student"`` and
    ``"generator"``. Evaluation is not compiled."""
    capture: Flag = True
    """On a GPU, capture the steps as CUDA graphs and replay them."""
    malloc_reuse: Flag = True
    """On a CPU, make malloc keep freed memory instead of returning it to the operating system, which clears every page of a large
    block at each allocation."""

    @property
    def compiled_regions(self) -> tuple[Region, ...]:
        """Names of the networks to compile."""
        return (REGIONS if self.compile else ()) if isinstance(self.compile, bool) else self.compile


@settings
class Method:
    """Configuration of a :class:`~dfkd_fast.Trainer`. The defaults are those of DFAD (arXiv 1912.11006).

    Raises:
        pydantic.ValidationError: Settings of different sections are incompatible.
    """

    loop: Loop = field(default_factory=Loop)
    engine: Engine = field(default_factory=Engine)
    objective: Objective = field(default_factory=Objective)
    replay: Replay = field(default_factory=Replay)
    update: Update = field(default_factory=Update)
    student_optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.1, weight_decay=5e-4))
    generator_optimizer: Optimizer = field(default_factory=lambda: Optimizer(kind="adam", lr=1e-3))

    def __post_init__(self) -> None:
        self._replace_former_weights()
        if self.update.is_retain_acquire and self.replay.kind == "none":
            raise ValueError(f"update.kind = {self.update.kind!r}: needs replayed samples, but replay.kind is {self.replay.kind!r}")
        if self.update.is_retain_acquire and not self.replay.replays:
            raise ValueError(f"update.kind = {self.update.kind!r}: needs replayed samples, but replay.share is 0")
        policy = self.replay.policy
        if self.engine.precision == "fp16" and (
            self.update.is_retain_acquire or (self.replay.replays and policy is not None and not policy.fp16)
        ):
            kinds = " or ".join(repr(kind) for kind, policy in POLICIES.items() if not policy.fp16)
            raise ValueError(
                f"engine.precision = 'fp16': not supported with replay.kind {kinds} or first-order or second-order updates; use 'bf16'"
            )
        loop = self.loop
        steps = loop.iterations_per_epoch * max(loop.student_steps, loop.generator_steps)
        if steps > MAX_STEPS:
            raise ValueError(
                f"loop.iterations_per_epoch = {loop.iterations_per_epoch}: an epoch has {steps} student or generator steps,"
                f" at most {MAX_STEPS} are allowed since their losses are kept in memory; increase loop.epochs instead"
            )
        for name, optimizer in (("student_optimizer", self.student_optimizer), ("generator_optimizer", self.generator_optimizer)):
            if loop.budget and optimizer.schedule == "multistep":
                raise ValueError(
                    f"loop.budget = {loop.budget!r}: not supported with {name}.schedule 'multistep', whose milestones"
                    " are numbers of epochs; use 'cosine', or loop.epochs instead of the budget"
                )
        batch_size, micro_batches = self.loop.batch_size, self.engine.micro_batches
        if micro_batches > 1 and self.update.is_retain_acquire:
            raise ValueError(
                f"engine.micro_batches = {micro_batches}: not supported with update.kind {self.update.kind!r},"
                " which differentiates a batch twice"
            )
        min_rows = min(batch_size, self.replay.num_rows(batch_size)) if self.replay.replays else batch_size
        if micro_batches > min_rows:
            raise ValueError(
                f"engine.micro_batches = {micro_batches}: must be at most {min_rows}, the number of fresh or replayed samples per step"
            )
        if policy is not None:
            policy.check(self.replay.rows, batch_size)
        if not loop.generator_steps and not loop.generator_pretraining:
            raise ValueError(
                "loop.generator_steps = 0: the generator would never be trained; it or loop.generator_pretraining must be positive"
            )
        if self.loop.generator_pretraining and not self.objective.has_non_adversarial_terms:
            raise ValueError(f"loop.generator_pretraining = {self.loop.generator_pretraining}: needs a non-adversarial term in [objective]")

    def _replace_former_weights(self) -> None:
        former = self.replay.former_weights
        if former is None:
            return
        if self.objective.student_weight != 1:
            raise ValueError(f"{FORMER_WEIGHTS_REPLACED}, and both are given")
        factor, share = current_weights(self.replay.kind, self.update.kind, *former)
        object.__setattr__(self, "objective", replace(self.objective, student_weight=factor))
        object.__setattr__(self, "replay", self.replay.with_share(share))


MAX_STEPS = 10**8
"""Maximum number of student or generator steps per epoch. Their losses are kept on the device."""
MAY_CHANGE_ON_RESUME = {"loop.evaluate_every", "loop.drift_samples", "engine.malloc_reuse", "engine.capture"}
"""Settings that may differ when a training is resumed, because they do not affect the weights."""


def method_to_dict(method: Method) -> dict[str, Any]:
    """Returns the settings of a method, or the method part of a recipe, as nested dictionaries."""
    return {section.name: asdict(getattr(method, section.name)) for section in fields(Method)}


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted path, value before, value after) of each setting that differs and may not change on resume.

    Settings that are missing from either side are ignored.
    """
    for key, old in before.items():
        path, new = prefix + key, after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{path}.")
        elif key in after and new != old and path not in MAY_CHANGE_ON_RESUME:
            yield path, old, new


def resolved(method: AnyMethod, device: torch.device) -> AnyMethod:
    """Returns a copy of the method or recipe with ``engine.precision = "auto"`` replaced by the precision for a device."""
    return replace(method, engine=replace(method.engine, precision=resolve_precision(method.engine.precision, device)))
