"""The recipe's section, and the registry of the policies that it chooses from."""

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from functools import cache, partial
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema
from torch import Tensor, nn

from dfkd_fast.renamed import RENAMED
from dfkd_fast.settings import Count, NonNegative, settings

from .policy import Policy, ReplaySource

__all__ = ["POLICIES", "Replay", "build_replay_source", "register"]

AnyPolicy = TypeVar("AnyPolicy", bound=Policy)

POLICIES: dict[str, type[Policy]] = {}
"""Settings by kind, in the order of their tables in a recipe."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def register(kind: str) -> Callable[[type[AnyPolicy]], type[AnyPolicy]]:
    """A decorator that makes a class a section, as ``settings`` does, and the policy of a kind, with the table ``[replay.KIND]``.

    From then on :class:`Replay` takes it in Python and in TOML; of what was made before, nothing changes.

    Raises:
        ValueError: the kind is taken, or is no identifier; or a key has no default.
    """
    taken = kind in ("none", "cls") or kind in POLICIES or hasattr(Replay, kind) or f"replay.{kind}" in RENAMED
    if taken or not kind.isidentifier() or iskeyword(kind):
        raise ValueError(f"replay policy {kind!r}: must be an identifier that neither a policy nor [replay] has, or had before")

    def add(policy: type[AnyPolicy]) -> type[AnyPolicy]:
        if not issubclass(policy, Policy):
            raise ValueError(f"replay policy {kind!r}: {policy.__name__} must be a subclass of Policy")
        policy = settings(policy)
        policy()  # every Replay holds one
        POLICIES[kind] = policy
        return policy

    return add


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Recipe section ``[replay]``; the student minimises ``fresh_weight · D(fresh) + weight · D(replayed)``.

    It has a table for every policy, chosen or not, so that recipes can extend each other: ``Replay(...)`` is an instance of
    :meth:`complete`.
    """

    kind: str = "none"
    """``none``: fresh samples only (DFAD), or a registered policy's name."""
    rows: Count = 0
    """Replayed samples a step; 0 for the policy's default."""
    fresh_weight: NonNegative = 1.0
    weight: NonNegative = 1.0
    """Of the replayed samples; at 0 none are drawn, and the run equals one without replay bit for bit."""

    if TYPE_CHECKING:  # that of complete()

        def __init__(
            self, *, kind: str = ..., rows: int = ..., fresh_weight: float = ..., weight: float = ..., **tables: Policy
        ) -> None: ...

    def __new__(cls, **_: Any) -> "Replay":
        """An instance of :meth:`complete`, as ``pathlib.Path(...)`` is one of its system's class."""
        return super().__new__(cls.complete() if cls is Replay else cls)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Replay, **vars(self)), ()  # pickle would look for the class by its name, and find this one

    @staticmethod
    def complete() -> "type[Replay]":
        """This section with a table for each policy that is registered by now, and its values checked."""
        return _complete(tuple(POLICIES.items()))

    @property
    def policy(self) -> Policy | None:
        """The settings of the chosen policy; None for none."""
        return None if self.kind == "none" else getattr(self, self.kind)

    def table(self, of: type[AnyPolicy]) -> AnyPolicy:
        """The settings of a policy by their class, chosen or not."""
        return {type(table): table for table in vars(self).values()}[of]

    @property
    def replays(self) -> bool:
        """Whether anything is replayed at all."""
        return self.policy is not None and self.weight > 0

    def num_rows(self, batch_size: int) -> int:
        """Replayed samples beside so many fresh ones."""
        return 0 if self.policy is None else self.rows or self.policy.default_rows(batch_size)

    @property
    def smallest_batch(self) -> int:
        """Fresh samples a step that it needs at least."""
        return max(self.rows, 0 if self.policy is None else self.policy.smallest_batch)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Not the fields of now: a policy may be registered after the class that has this section as a field was made.
        return core_schema.no_info_plain_validator_function(_validated) if cls is Replay else handler(source)


@cache
def _complete(policies: tuple[tuple[str, type[Policy]], ...]) -> type[Replay]:
    chosen = ("kind", Literal["none", *dict(policies)], "none")
    tables = [(kind, policy, field(default_factory=policy)) for kind, policy in policies]
    return settings(cast(type[Replay], make_dataclass("Replay", [chosen, *tables], bases=(Replay,), frozen=True, kw_only=True)))


def _validated(section: Any) -> Replay:
    return section if isinstance(section, Replay) else TypeAdapter(Replay.complete()).validate_python(section)


def build_replay_source(wanted: Replay, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource | None:
    """What the student is shown again, as :meth:`Policy.build` has it; None for nothing."""
    if wanted.policy is None or not wanted.replays:
        return None
    return wanted.policy.build(wanted.num_rows(len(images)), generator, teacher, images, logits)
