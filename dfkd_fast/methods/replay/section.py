"""Recipe section ``[replay]`` and the registry of replay policies."""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, make_dataclass
from functools import cache, partial
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema
from torch import Tensor, nn

from dfkd_fast.renamed import FORMER_WEIGHTS, FORMER_WEIGHTS_REPLACED, RENAMED, warn_of_former_weights
from dfkd_fast.settings import BelowOne, Count, NonNegative, settings

from .policy import Policy, ReplaySource

__all__ = ["POLICIES", "Replay", "build_replay_source", "register"]

AnyPolicy = TypeVar("AnyPolicy", bound=Policy)

POLICIES: dict[str, type[Policy]] = {}
"""Settings class of each registered policy by kind, in the order of their tables in a recipe."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def register(kind: str) -> Callable[[type[AnyPolicy]], type[AnyPolicy]]:
    """Class decorator that registers a replay policy under a kind and turns the class into the recipe section ``[replay.KIND]``.

    :class:`Replay` accepts the policy from then on, in Python and in TOML. Existing instances do not change.

    Args:
        kind: Name of the policy, a Python identifier.

    Raises:
        ValueError: The kind is already used or is not an identifier, or the class is not a :class:`Policy` with defaults for all keys.
    """
    taken = kind in ("none", "cls") or kind in POLICIES or hasattr(Replay, kind) or f"replay.{kind}" in RENAMED
    if taken or not kind.isidentifier() or iskeyword(kind):
        raise ValueError(f"replay policy {kind!r}: must be an identifier that is not the name of a policy or of a key of [replay]")

    def add(policy: type[AnyPolicy]) -> type[AnyPolicy]:
        if not issubclass(policy, Policy):
            raise ValueError(f"replay policy {kind!r}: {policy.__name__} must be a subclass of Policy")
        policy = settings(policy)
        policy()  # raises if a key has no default: every Replay holds an instance
        POLICIES[kind] = policy
        return policy

    return add


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Recipe section ``[replay]``: samples that the student sees in addition to fresh ones.

    The student minimizes ``(1 − share) · D(fresh) + share · D(replayed)``, or D(fresh) where nothing is replayed, each times
    ``objective.student_weight``. The section has a table for every registered policy, selected or not, so that recipes can extend each
    other: ``Replay(...)`` returns an instance of :meth:`complete`.
    """

    kind: str = "none"
    """``none`` (fresh samples only, DFAD) or the name of a registered policy."""
    rows: Count = 0
    """Number of replayed samples per step; 0 selects the policy's default."""
    share: BelowOne = 0.5
    """Share of the discrepancy over replayed samples in the student's loss. With 0 none are drawn, and the run is bitwise equal to one
    without replay."""
    fresh_weight: InitVar[NonNegative | None] = None
    """Former weight of the discrepancy over fresh samples; a :class:`~dfkd_fast.engine.Method` replaces it."""
    weight: InitVar[NonNegative | None] = None
    """Former weight of the discrepancy over replayed samples."""

    if TYPE_CHECKING:  # the signature of complete()

        def __init__(
            self, *, kind: str = ..., rows: int = ..., share: float = ..., fresh_weight: float = ..., weight: float = ..., **tables: Policy
        ) -> None: ...

    def __new__(cls, **keywords: Any) -> "Replay":
        """Creates an instance of :meth:`complete`, like ``pathlib.Path(...)`` creates one of the platform's subclass."""
        former = [name for name in FORMER_WEIGHTS if keywords.get(name) is not None]
        if len(former) == 1 and "share" in keywords:  # dataclasses.replace passes every field
            raise TypeError(f"replay.{former[0]} is now replay.share and objective.student_weight, and replay.share is given as well")
        return super().__new__(cls.complete() if cls is Replay else cls)

    def __post_init__(self, fresh_weight: float | None, weight: float | None) -> None:
        if fresh_weight is None and weight is None:
            return
        if self.share != 0.5:
            raise ValueError(f"{FORMER_WEIGHTS_REPLACED}, and both are given")
        warn_of_former_weights()
        # In the instance, so that dataclasses.replace passes them on.
        for name, value in zip(FORMER_WEIGHTS, (fresh_weight, weight), strict=True):
            object.__setattr__(self, name, 1.0 if value is None else value)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Replay, **vars(self)), ()  # pickle would look up the generated class by name and find this one

    @staticmethod
    def complete() -> "type[Replay]":
        """Returns the validated subclass with a table for every policy that is currently registered."""
        return _complete(tuple(POLICIES.items()))

    @property
    def policy(self) -> Policy | None:
        """Settings of the selected policy; None for ``kind = "none"``."""
        return None if self.kind == "none" else getattr(self, self.kind)

    def table(self, policy: type[AnyPolicy]) -> AnyPolicy:
        """Returns the settings of a policy, selected or not, by their class."""
        return {type(table): table for table in vars(self).values()}[policy]

    @property
    def replays(self) -> bool:
        """Whether a policy is selected and its share is positive."""
        share = self.share if self.former_weights is None else self.former_weights[1]
        return self.policy is not None and share > 0

    @property
    def former_weights(self) -> tuple[float, float] | None:
        """``fresh_weight`` and ``weight``; None if neither was given."""
        values = vars(self)
        return (values["fresh_weight"], values["weight"]) if "weight" in values else None

    def with_share(self, share: float | None) -> "Replay":
        """Returns a copy without former weights, with the given share or, if it is None, with this one's."""
        keywords = {name: value for name, value in vars(self).items() if name not in FORMER_WEIGHTS}
        return Replay(**keywords if share is None else keywords | {"share": share})

    def num_rows(self, batch_size: int) -> int:
        """Returns the number of replayed samples per step.

        Args:
            batch_size: Number of fresh samples per step.
        """
        return 0 if self.policy is None else self.rows or self.policy.default_rows(batch_size)

    @property
    def smallest_batch(self) -> int:
        """Minimum number of fresh samples per step."""
        return max(self.rows, 0 if self.policy is None else self.policy.smallest_batch)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Resolved at validation: a policy may be registered after a class with this section as a field is defined.
        return core_schema.no_info_plain_validator_function(_validated) if cls is Replay else handler(source)


@cache
def _complete(policies: tuple[tuple[str, type[Policy]], ...]) -> type[Replay]:
    kind_field = ("kind", Literal["none", *dict(policies)], "none")
    tables = [(kind, policy, field(default_factory=policy)) for kind, policy in policies]
    return settings(cast(type[Replay], make_dataclass("Replay", [kind_field, *tables], bases=(Replay,), frozen=True, kw_only=True)))


def _validated(section: Any) -> Replay:
    return section if isinstance(section, Replay) else TypeAdapter(Replay.complete()).validate_python(section)


def build_replay_source(config: Replay, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource | None:
    """Returns the replay source of the selected policy, see :meth:`Policy.build`; None if nothing is replayed."""
    if config.policy is None or not config.replays:
        return None
    return config.policy.build(config.num_rows(len(images)), generator, teacher, images, logits)
