"""A user-defined replay policy: a settings class and a replay source, without changes to the package."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from typing_extensions import override

from dfkd_fast import DfkdError, Engine, Loop, Method, Replay, Trainer, load_recipe
from dfkd_fast.methods import POLICIES, BankSettings, Batch, Policy, ReplaySource, VaeSettings, register
from dfkd_fast.recipe import recipe_from_toml, recipe_to_toml
from dfkd_fast.settings import Fraction
from tests.small import small_method, small_networks
from tests.states import assert_equal, through_a_file, without_times

MakeTrainer = Callable[..., Trainer]


class LastBatch(ReplaySource):
    """Replays the last batch of the previous epoch."""

    per_rank = stores_fresh = True
    steps = 1
    losses = ("distance",)

    def __init__(self, images: Tensor, share: float) -> None:
        self.rows, self.images, self.share, self.filled = len(images), torch.zeros_like(images), share, False

    @property
    @override
    def ready(self) -> bool:
        return self.filled

    @override
    def recall(self, images: Tensor, stream: torch.Generator) -> Tensor | None:
        images.copy_(self.share * self.images)
        return None

    @override
    def learn(
        self, batch: Batch, step: int, stream: torch.Generator, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> dict[str, Tensor]:
        return {"distance": (batch.images[: self.rows] - self.images).square().mean()} if step < self.steps else {}

    @override
    def end_epoch(self, epoch: int, fresh: Batch) -> None:
        self.images.copy_(fresh.images[: self.rows])
        self.filled = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "filled": self.filled}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images.copy_(state["images"])
        self.filled = state["filled"]


@pytest.fixture
def settings() -> Iterator[type[Policy]]:
    @register("last_batch")
    class LastBatchSettings(Policy):
        fp16 = False
        share: Fraction = 1.0
        minimum: int = 4

        @property
        @override
        def smallest_batch(self) -> int:
            return self.minimum

        @override
        def default_rows(self, batch_size: int) -> int:
            return batch_size // 2

        @override
        def check(self, rows: int, batch_size: int) -> None:
            if max(rows, self.minimum) > batch_size:
                raise ValueError(f"replay.last_batch.minimum = {self.minimum}: a batch has {batch_size} rows")

        @override
        def build(self, rows: int, generator: nn.Module, teacher: nn.Module, images: Tensor, logits: Tensor) -> ReplaySource:
            return LastBatch(images[:rows], self.share)

    yield LastBatchSettings
    del POLICIES["last_batch"]


def test_a_run_with_it_replays_and_resumes_bit_for_bit_from_every_iteration(settings: type[Policy], make_trainer: MakeTrainer) -> None:
    method = small_method(replay=Replay(kind="last_batch", share=0.25))
    whole = make_trainer(method)
    rows: list[int] = []
    whole.student.register_forward_pre_hook(lambda _, inputs: None if inputs[0].requires_grad else rows.append(len(inputs[0])))
    states: list[dict[str, Any]] = []
    whole.on_iteration = lambda trainer: states.append(through_a_file(trainer.state_dict()))
    whole.fit()
    assert rows == [*6 * [8], *6 * [8 + 4]]
    assert ["distance" in epoch.losses for epoch in whole.history] == [False, True]
    assert whole.state.losses.values["distance"].shape == (3, 1)  # in the first student step of each iteration

    assert len(states) == 6
    for state in states:
        resumed = make_trainer(method, seed=50, networks=(small_networks()[0], *small_networks(seed=7)[1:]))
        resumed.load_state_dict(state)
        resumed.fit()
        assert_equal(without_times(resumed.state_dict()), without_times(whole.state_dict()))


def test_a_state_of_other_values_of_its_is_rejected(settings: type[Policy], make_trainer: MakeTrainer) -> None:
    other, trainer = (
        make_trainer(small_method(replay=Replay(kind="last_batch", last_batch=settings(share=share))))  # type: ignore[call-arg]
        for share in (0.25, 0.5)
    )
    with pytest.raises(DfkdError, match=r"^replay\.last_batch\.share = 0\.5: the state is of a run with 0\.25$"):
        trainer.load_state_dict(other.state_dict())


def test_a_recipe_file_names_it_and_is_printed_with_its_table(settings: type[Policy], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits-vae"\n[replay]\nkind = "last_batch"\n[replay.last_batch]\nshare = 0.5\n')
    recipe = load_recipe(str(path), {"replay.last_batch.minimum": 7})
    expected = load_recipe("digits-vae").replay
    assert recipe.replay == dataclasses.replace(expected, kind="last_batch", last_batch=settings(share=0.5, minimum=7))  # type: ignore[call-arg]
    assert recipe.replay.table(VaeSettings) == expected.table(VaeSettings) != VaeSettings()
    assert (recipe.replay.num_rows(48), recipe.replay.smallest_batch) == (16, 16)  # the rows of recipe digits-vae
    text = recipe_to_toml(recipe)
    assert "[replay.last_batch]\nshare = 0.5\nminimum = 7\n" in text
    assert recipe_from_toml(text, "it") == recipe


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("replay.last_batch.share", 1.5, "replay.last_batch.share = 1.5: must be a number ≥ 0 and ≤ 1"),
        ("replay.last_batch.shared", 1, "unknown key 'replay.last_batch.shared': did you mean 'replay.last_batch.share'?"),
        ("replay.last_batch", 3, "replay.last_batch = 3: must be a section"),
        ("replay.last_batch.minimum", 999, "replay.last_batch.minimum = 999: a batch has 48 rows"),
        ("replay.kind", "last_bach", "replay.kind = 'last_bach': unknown choice 'last_bach': did you mean 'last_batch'?"),
        ("replay.vae.lr", 0.0, "replay.vae.lr = 0.0: must be a number ≥ 1e-38"),
        ("replay.bank", {}, "unknown key 'replay.bank'"),
        ("replay", 3, "replay = 3: must be a section"),
        ("engine.precision", "fp16", "engine.precision = 'fp16': not supported with replay.kind 'vae' or 'last_batch' or"),
    ],
)
def test_invalid_values_are_rejected_with_one_line(settings: type[Policy], path: str, value: Any, message: str) -> None:
    with pytest.raises(DfkdError) as caught:
        load_recipe("digits-vae", {"replay.kind": "last_batch", path: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_is_unknown_before_it_is_registered() -> None:
    with pytest.raises(DfkdError, match="unknown choice 'last_batch': must be one of ema_generator, memory_bank, none, vae"):
        load_recipe("digits", {"replay.kind": "last_batch"})
    with pytest.raises(DfkdError, match=r"unknown key 'replay\.last_batch': .* must be one of replay\.ema_generator, .*replay\.share"):
        load_recipe("digits", {"replay.last_batch": {}})
    with pytest.raises(ValidationError, match="kind"):
        Replay(kind="last_batch")


@pytest.mark.parametrize("kind", ["vae", "none", "rows", "replays", "ema_decay", "cls", "last-batch", "class", ""])
def test_a_kind_must_be_an_unused_identifier(kind: str) -> None:
    with pytest.raises(ValueError, match=f"replay policy '{kind}': must be an identifier that"):
        register(kind)
    assert list(POLICIES) == ["ema_generator", "memory_bank", "vae"]


def test_a_policy_has_a_default_for_every_key() -> None:
    with pytest.raises(ValidationError, match="share"):

        @register("last_batch")
        class WithoutDefault(Policy):
            share: Fraction

    assert "last_batch" not in POLICIES


def test_sections_are_compared_hashed_copied_and_pickled_by_their_values() -> None:
    one = Replay(kind="memory_bank", rows=3, memory_bank=BankSettings(slots=2))
    same, other = Replay(kind="memory_bank", rows=3, memory_bank=BankSettings(slots=2)), Replay(kind="memory_bank", rows=3)
    assert one == same != other
    assert hash(one) == hash(same)
    assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == dataclasses.replace(other, memory_bank=BankSettings(slots=2)) == one  # type: ignore[call-arg]
    expected = {"slots": 2, "every": 5, "every_unit": "epochs", "draw": "batch", "storage": "half", "cached_logits": False}
    assert dataclasses.asdict(one)["memory_bank"] == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rows = 4  # type: ignore[misc]
    method = Method(loop=Loop(batch_size=8), engine=Engine(precision="fp32"), replay=one)
    assert method.replay is one
    assert pickle.loads(pickle.dumps(method)) == method


def test_without_a_policy_nothing_is_replayed() -> None:
    replay = Replay()
    assert (replay.policy, replay.replays, replay.num_rows(64), replay.smallest_batch) == (None, False, 0, 0)


def test_a_class_that_is_not_a_policy_is_rejected() -> None:
    with pytest.raises(ValueError, match="replay policy 'numbers': int must be a subclass of Policy"):
        register("numbers")(int)  # type: ignore[type-var]
    assert "numbers" not in POLICIES
