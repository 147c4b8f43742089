"""Combinations of objective, replay and update in the trainer."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_fast import DfkdError, Method, NonFiniteLossError, Objective, Optimizer, Replay, Trainer, Update
from dfkd_fast.engine.steps import generator_step, student_step
from dfkd_fast.methods import BankSettings, MemoryBank, VaeSettings
from dfkd_fast.models import GeneratorSettings, build_generator
from tests.small import Networks, loop_and_engine, small_networks
from tests.states import assert_equal, through_a_file, without_times

MakeTrainer = Callable[..., Trainer]

SMALL_VAE = {"latent_dim": 7, "width": 2, "steps": 1}
REPLAYS = {
    "none": Replay(),
    "ema_generator": Replay(kind="ema_generator"),
    "memory_bank": Replay(kind="memory_bank", rows=3, memory_bank=BankSettings(slots=2, every=1)),
    "memory_bank, uint8": Replay(
        kind="memory_bank", rows=3, memory_bank=BankSettings(slots=2, every=1, storage="uint8", cached_logits=True)
    ),
    "memory_bank, samples": Replay(
        kind="memory_bank", rows=11, memory_bank=BankSettings(slots=2, every=1, every_unit="iterations", draw="samples", cached_logits=True)
    ),
    "vae": Replay(kind="vae", rows=3, vae=VaeSettings(**SMALL_VAE)),  # type: ignore[arg-type]
    "vae, leak": Replay(kind="vae", rows=3, vae=VaeSettings(**SMALL_VAE, leak=True)),  # type: ignore[arg-type]
}
KINDS = ["ema_generator", "memory_bank", "vae"]
EVERY_TERM = Objective(
    adversary="js", one_hot=1.0, entropy=5.0, activation=0.1, bn_moments=1.0, class_nll=1.0, embedding_norm=1.0, temperature=3.0
)


def method(
    *, replay: str | Replay = "none", update: Any = "plain", objective: Objective | None = None, generator_lr: float = 1e-3, **loop: Any
) -> Method:
    return Method(
        **loop_and_engine(**{"epochs": 2, "iterations_per_epoch": 2, "batch_size": 8, "student_steps": 2, "channels_last": False, **loop}),
        replay=REPLAYS[replay] if isinstance(replay, str) else replay,
        update=Update(kind=update, inner_lr=0.01),
        objective=objective or Objective(),
        student_optimizer=Optimizer(lr=0.01, weight_decay=5e-4, schedule="cosine"),
        generator_optimizer=Optimizer(kind="adam", lr=generator_lr),
    )


def classifier(width: int) -> nn.Module:
    """Networks with batch norm for 8×8 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))


def normalised_networks(seed: int = 0, *, conditional: bool = False) -> Networks:
    torch.manual_seed(seed)
    settings = GeneratorSettings(latent_dim=20, width=4, conditional=conditional)
    return classifier(8), classifier(4), build_generator(settings, 3, 8, num_classes=10)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("replay", KINDS)
def test_every_update_runs_with_every_replay_and_each_trains_another_student(
    make_trainer: MakeTrainer, replay: str, channels_last: bool
) -> None:
    students = []
    # Not 0.5, at which plain and pooled are the same loss for as many replayed rows as fresh ones.
    config = dataclasses.replace(REPLAYS[replay], share=0.25)
    for update in ("plain", "pooled", "first-order", "second-order"):
        trainer = make_trainer(method(replay=config, update=update, channels_last=channels_last))
        trainer.fit()
        assert [set(epoch.losses) for epoch in trainer.history] == 2 * [
            {"student", "adversarial"} | ({"vae"} if replay == "vae" else set())
        ]
        assert all(torch.tensor(value).isfinite() for epoch in trainer.history for value in epoch.losses.values())
        assert trainer.state.replay_source is not None and trainer.state.replay_source.ready
        students.append(weights(trainer.student))
    assert not any(equal(one, other) for index, one in enumerate(students) for other in students[:index])


@pytest.mark.parametrize("update", ["first-order", "second-order"])
def test_a_retain_acquire_update_is_rejected_without_replay(update: str) -> None:
    for replay in (Replay(), Replay(kind="vae", share=0.0)):
        with pytest.raises(ValidationError, match=f"update.kind = '{update}'.*needs replayed samples"):
            method(update=update, replay=replay)


def test_without_replay_the_pooled_update_is_the_plain_one(make_trainer: MakeTrainer) -> None:
    plain, pooled = (make_trainer(method(update=update)) for update in ("plain", "pooled"))
    assert equal(weights(plain.fit()), weights(pooled.fit()))


@pytest.mark.parametrize("replay", KINDS)
@pytest.mark.parametrize("update", ["plain", "pooled"])
def test_replay_of_share_zero_equals_none_bit_for_bit(make_trainer: MakeTrainer, replay: str, update: str) -> None:
    plain = make_trainer(method(update=update))
    weightless = make_trainer(method(update=update, replay=dataclasses.replace(REPLAYS[replay], share=0.0)))
    plain.fit()
    weightless.fit()
    states = [without_times(trainer.state_dict()) | {"method": None} for trainer in (weightless, plain)]
    assert_equal(*states)


@pytest.mark.parametrize("replay", ["ema_generator", "memory_bank", "vae"])
def test_replayed_samples_are_drawn_from_a_separate_stream(make_trainer: MakeTrainer, replay: str) -> None:
    plain, replaying = (make_trainer(method(replay=kind)) for kind in ("none", replay))
    before = replaying.state.replay_stream.get_state()
    plain.fit()
    replaying.fit()
    assert torch.equal(replaying.state.fresh_stream.get_state(), plain.state.fresh_stream.get_state())
    assert not torch.equal(replaying.state.replay_stream.get_state(), before)


def test_cached_logits_are_the_targets_instead_of_the_teachers_logits_for_rounded_images(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method(replay="memory_bank, uint8"))
    next(iter(trainer))
    student_step(trainer.state)
    assert isinstance(trainer.state.replay_source, MemoryBank) and trainer.state.replay_source.logits is not None
    images, logits = trainer.state.images[8:], trainer.state.logits[8:]
    assert torch.equal(logits, trainer.state.replay_source.logits[0])
    with torch.no_grad():
        answers = trainer.teacher(images)
    torch.testing.assert_close(logits, answers, rtol=0.1, atol=0.1)
    assert not torch.allclose(logits, answers, rtol=1e-4, atol=1e-5)


def test_a_bank_affects_the_training_only_once_it_holds_a_batch(make_trainer: MakeTrainer) -> None:
    plain, banked = (make_trainer(method(replay=replay, epochs=3)) for replay in ("none", "memory_bank"))
    same = [one.losses == other.losses for one, other in zip(plain, banked, strict=True)]
    assert same == [True, False, False]


def test_a_bank_stores_the_first_rows_of_the_last_student_steps_fresh_batch(make_trainer: MakeTrainer) -> None:
    replay = dataclasses.replace(REPLAYS["memory_bank"], memory_bank=BankSettings(slots=2, every=1, storage="float32"))  # type: ignore[call-arg]
    trainer = make_trainer(method(replay=replay, epochs=1))
    recorded: list[Tensor] = []
    trainer.student.register_forward_pre_hook(lambda _, inputs: None if inputs[0].requires_grad else recorded.append(inputs[0].clone()))
    trainer.fit()
    assert isinstance(trainer.state.replay_source, MemoryBank)
    assert torch.equal(trainer.state.replay_source.images[0], recorded[-1][:3])
    assert not trainer.state.replay_source.images[1].any()


def test_a_bank_of_samples_stores_the_whole_fresh_batch_of_every_nth_iteration_of_the_run(make_trainer: MakeTrainer) -> None:
    settings = BankSettings(slots=3, every=2, every_unit="iterations", draw="samples", storage="float32")
    trainer = make_trainer(method(replay=Replay(kind="memory_bank", rows=11, memory_bank=settings), iterations_per_epoch=3))
    fresh: list[Tensor] = []
    trainer.on_iteration = lambda trainer: fresh.append(trainer.state.fresh_batch.images.clone())
    trainer.fit()
    source = trainer.state.replay_source
    assert isinstance(source, MemoryBank) and source.stored == 3
    assert torch.equal(source.images, torch.stack(fresh[1::2]))
    assert len(trainer.state.images) == 8 + 11


@pytest.mark.parametrize(
    "replay",
    [
        Replay(kind="memory_bank", rows=9, memory_bank=BankSettings(every=1)),
        Replay(kind="vae", vae=VaeSettings(latent_dim=7, width=2, fresh_rows=9)),
    ],
    ids=["memory_bank.rows", "vae.fresh_rows"],
)
def test_more_rows_than_the_batch_size_are_rejected_before_the_run(make_trainer: MakeTrainer, replay: Replay) -> None:
    with pytest.raises((ValidationError, DfkdError), match="rows"):
        make_trainer(method(replay=replay))


def stop_at(trainer: Trainer, iterations: int) -> list[dict[str, Any]]:
    """Expected progress after an iteration: after the last one of an epoch, the epoch is not ended yet."""
    states: list[dict[str, Any]] = []

    def stop(trainer: Trainer) -> None:
        if trainer.iterations_done == iterations:
            trainer.stop()
            states.append(through_a_file(trainer.state_dict()))

    trainer.on_iteration = stop
    return states


def stop_in_pretraining(trainer: Trainer, step: int) -> list[dict[str, Any]]:
    steps = iter(range(1, 100))
    assert isinstance(trainer.generator.body, nn.Module)
    trainer.generator.body.register_forward_hook(lambda *_: trainer.stop() if next(steps) == step else None)
    return []


@pytest.mark.parametrize("replay", ["ema_generator", "memory_bank", "memory_bank, uint8", "memory_bank, samples", "vae", "vae, leak"])
def test_a_run_with_everything_on_that_was_interrupted_anywhere_equals_one_that_was_not(make_trainer: MakeTrainer, replay: str) -> None:
    everything = method(
        replay=replay,
        update="second-order",
        objective=EVERY_TERM,
        generator_pretraining=3,
        generator_first=True,
        student_steps=3,
        steps_per_batch=2,
        student_ema_decay=0.7,
        drift_samples=4,
    )
    networks = normalised_networks(conditional=True)
    whole = make_trainer(everything, networks=networks)
    whole.fit()
    assert set(whole.history[1].drift) == {"generator"} | ({"replay"} if replay.startswith(("ema", "vae")) else set())
    expected = without_times(whole.state_dict())

    stops: list[tuple[Callable[[Trainer, int], list[dict[str, Any]]], int]] = [(stop_in_pretraining, step) for step in (1, 3)]
    stops += [(stop_at, iterations) for iterations in (2, 3)]
    for stop, when in stops:
        stopped = make_trainer(everything, networks=networks)
        states = stop(stopped, when)
        stopped.fit()
        assert (stopped.state.pretrained, stopped.iterations_done) == ((when, 0) if stop is stop_in_pretraining else (3, when))
        for state in (*states, through_a_file(stopped.state_dict())):
            resumed = make_trainer(everything, seed=50, networks=(networks[0], *normalised_networks(seed=7, conditional=True)[1:]))
            resumed.load_state_dict(state)
            resumed.fit()
            assert_equal(without_times(resumed.state_dict()), expected)


@pytest.mark.parametrize(
    ("replay", "update"),
    [("none", "plain"), ("ema_generator", "plain"), ("memory_bank, samples", "plain"), ("memory_bank", "second-order")],
)
def test_a_run_that_compares_features_and_was_interrupted_equals_one_that_was_not(
    make_trainer: MakeTrainer, replay: str, update: str
) -> None:
    config = method(replay=replay, update=update, objective=Objective(attention=250.0, hint=3.0), student_steps=3, steps_per_batch=2)
    networks = normalised_networks()
    whole = make_trainer(config, networks=networks)
    whole.fit()
    stopped = make_trainer(config, networks=networks)
    states = stop_at(stopped, 3)
    stopped.fit()
    resumed = make_trainer(config, seed=50, networks=(networks[0], *normalised_networks(seed=7)[1:]))
    resumed.load_state_dict(states[0])
    resumed.fit()
    assert_equal(without_times(resumed.state_dict()), without_times(whole.state_dict()))


@pytest.mark.parametrize("replay", ["ema_generator", "memory_bank, uint8", "vae"])
def test_every_update_compares_features_and_trains_the_projection(make_trainer: MakeTrainer, replay: str) -> None:
    students = []
    config = dataclasses.replace(REPLAYS[replay], share=0.25)
    for objective in (Objective(), Objective(attention=250.0, hint=3.0)):
        for update in ("plain", "pooled", "first-order", "second-order"):
            trainer = make_trainer(method(replay=config, update=update, objective=objective), networks=normalised_networks())
            features = trainer.state.features
            projection = {} if features is None else weights(features.student.projection)  # type: ignore[arg-type]
            trainer.fit()
            assert all(torch.tensor(value).isfinite() for epoch in trainer.history for value in epoch.losses.values())
            assert features is None or not equal(weights(features.student.projection), projection)  # type: ignore[arg-type]
            students.append(weights(trainer.student))
    assert not any(equal(one, other) for index, one in enumerate(students) for other in students[:index])


def test_pretraining_leaves_the_student_alone_and_the_average_starts_where_it_ended(make_trainer: MakeTrainer) -> None:
    config = method(replay="ema_generator", objective=EVERY_TERM, generator_pretraining=4, generator_lr=0.05)
    trainer = make_trainer(config, networks=normalised_networks(conditional=True))
    student, generator = weights(trainer.student), weights(trainer.generator)
    stop_in_pretraining(trainer, 4)
    trainer.fit()
    assert equal(weights(trainer.student), student)
    assert trainer.state.replay_source is not None and trainer.state.replay_source.generator is not None
    assert equal(weights(trainer.state.replay_source.generator), weights(trainer.generator))
    changed = {name for name, tensor in trainer.generator.named_parameters() if not torch.equal(tensor, generator[name])}
    assert changed >= {name for name in generator if name.endswith("weight")}  # biases before batch norms have no gradient
    assert trainer.state.losses.values == {}
    # The training itself does not restart.
    trainer.fit()
    assert not equal(weights(trainer.state.replay_source.generator), weights(trainer.generator))


def test_pretraining_steps_equal_those_of_a_training_without_adversarial_term(make_trainer: MakeTrainer) -> None:
    objective, alone = (Objective(one_hot=1.0, bn_moments=0.5, adversarial=adversarial) for adversarial in (1.0, 0.0))
    trainer = make_trainer(method(objective=objective, generator_pretraining=3), networks=normalised_networks())
    stop_in_pretraining(trainer, 3)
    trainer.fit()
    other = make_trainer(method(objective=alone), networks=normalised_networks())
    for _ in range(3):
        generator_step(other.state)
    assert equal(weights(trainer.generator), weights(other.generator))


def test_a_non_finite_loss_in_pretraining_is_reported(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method(objective=Objective(one_hot=1.0), generator_pretraining=2), networks=normalised_networks())
    with torch.no_grad():
        next(trainer.generator.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="'one_hot' is nan after 2 pretraining steps"):
        trainer.fit()


@pytest.mark.parametrize("generator_first", [False, True])
def test_an_iteration_starts_with_the_network_that_generator_first_selects(make_trainer: MakeTrainer, generator_first: bool) -> None:
    trainer = make_trainer(method(epochs=1, iterations_per_epoch=1, generator_steps=2, generator_first=generator_first))
    trainer.fit()
    twin = make_trainer(method(epochs=1))
    turns: list[Callable[[], Any]] = [lambda: [student_step(twin.state, step) for step in range(2)]]
    turns.insert(0 if generator_first else 1, lambda: [generator_step(twin.state) for _ in range(2)])
    for turn in turns:
        turn()
    assert equal(weights(trainer.student), weights(twin.student))
    assert equal(weights(trainer.generator), weights(twin.generator))


@pytest.mark.parametrize(("generator_first", "first"), [(False, "student step 1"), (True, "generator step 1")])
def test_the_first_of_several_non_finite_losses_is_named(make_trainer: MakeTrainer, generator_first: bool, first: str) -> None:
    trainer = make_trainer(method(generator_first=generator_first))
    with torch.no_grad():
        next(trainer.student.parameters()).fill_(float("nan"))  # a trainer would reject it before the first step
    with pytest.raises(NonFiniteLossError, match=f"at {first} of iteration 1, epoch 1"):
        trainer.fit()


def test_the_result_is_the_students_average_which_is_evaluated_beside_it(make_trainer: MakeTrainer) -> None:
    evaluated: list[nn.Module] = []
    trainer = make_trainer(
        method(student_steps=1, student_ema_decay=0.8, student_in_generator_step="eval"),
        networks=normalised_networks(),
        evaluate=lambda network: evaluated.append(network) or float(len(evaluated)),  # type: ignore[func-returns-value]
    )
    past = [weights(trainer.student)]
    trainer.on_iteration = lambda trainer: past.append(weights(trainer.student))
    result = trainer.fit()
    assert result is trainer.result is not trainer.student
    assert evaluated == [result, trainer.student, result, trainer.student]
    assert [(epoch.student_accuracy, epoch.unaveraged_accuracy) for epoch in trainer.history] == [(1.0, 2.0), (3.0, 4.0)]
    shares = [0.8**4, *(0.2 * 0.8 ** (3 - age) for age in range(4))]
    for name, tensor in result.state_dict().items():
        if tensor.is_floating_point():
            expected = sum(share * state[name].double() for share, state in zip(shares, past, strict=True))
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert tensor.item() == 4
    assert not torch.allclose(next(result.parameters()), next(trainer.student.parameters()), rtol=1e-4)


class Still(nn.Module):
    """A generator without running statistics, which does not change at a learning rate of 0."""

    latent_dim = 20

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 192), nn.Unflatten(1, (3, 8, 8)), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z)
        return images


@pytest.mark.parametrize(("lr", "moves"), [(1e-30, False), (1e-2, True)])
def test_drift_grows_with_the_generators_update(make_trainer: MakeTrainer, lr: float, moves: bool) -> None:
    teacher, student, _ = normalised_networks()
    trainer = make_trainer(method(replay="ema_generator", epochs=3, drift_samples=6, generator_lr=lr), networks=(teacher, student, Still()))
    first, *others = trainer
    assert first.drift == {}
    for epoch in others:
        assert set(epoch.drift) == {"generator", "replay"}
        assert all((value > 1e-7) is moves for value in epoch.drift.values())


def test_drift_is_not_measured_by_default(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method())
    trainer.fit()
    assert [epoch.drift for epoch in trainer.history] == [{}, {}]


@pytest.mark.parametrize("replay", ["ema_generator", "vae"])
def test_measuring_drift_leaves_the_trajectory_alone(make_trainer: MakeTrainer, replay: str) -> None:
    states = []
    for samples in (0, 4):
        trainer = make_trainer(method(replay=replay, drift_samples=samples), networks=normalised_networks())
        trainer.fit()
        states.append([trainer.state_dict()[name] for name in ("networks", "memory", "processes")])
    assert_equal(*states)


def test_predictions_drift_less_with_the_averaged_generator_than_with_the_generator(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        method(replay="ema_generator", epochs=8, iterations_per_epoch=6, batch_size=16, drift_samples=64, generator_lr=5e-3),
        networks=normalised_networks(),
    )
    drifts = [epoch.drift for epoch in trainer][1:]
    # Both have changed: a constant average would have no drift.
    assert 0 < sum(drift["replay"] for drift in drifts) < sum(drift["generator"] for drift in drifts)
    assert all(drift["replay"] > 1e-6 for drift in drifts)


def test_pretraining_with_only_the_adversarial_term_is_rejected() -> None:
    for objective in (Objective(), Objective(embedding_norm=1.0)):
        with pytest.raises(ValidationError, match="generator_pretraining = 5: needs a non-adversarial term"):
            method(objective=objective, generator_pretraining=5)


@pytest.mark.parametrize("term", ["class_nll", "embedding_norm"])
def test_a_class_term_is_rejected_with_an_unconditional_generator(make_trainer: MakeTrainer, term: str) -> None:
    config = method(objective=Objective(**{term: 1.0}))  # type: ignore[arg-type]
    with pytest.raises(DfkdError, match=f"objective.{term}.*generator.conditional = true"):
        make_trainer(config, networks=normalised_networks())
    make_trainer(config, networks=normalised_networks(conditional=True)).fit()


def test_embeddings_of_a_conditional_generator_are_trained_and_used_without_conditional_terms(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method(epochs=1), networks=normalised_networks(conditional=True))
    assert trainer.generator.embedding is not None
    before = weights(trainer.generator)
    trainer.fit()
    moved = (trainer.generator.state_dict()["embedding.weight"] != before["embedding.weight"]).any(1)
    assert moved.sum() >= 5  # two batches of eight contain most of the ten classes


def test_a_teacher_without_batch_norm_is_rejected_by_the_terms_name(make_trainer: MakeTrainer) -> None:
    with pytest.raises(DfkdError, match=r"objective\.bn_moments.*LeNet5"):
        make_trainer(method(objective=Objective(bn_moments=1.0)))


def test_the_autoencoder_is_the_same_whatever_was_drawn_before(make_trainer: MakeTrainer) -> None:
    trainers = []
    for seed in (1, 2):
        networks = small_networks()
        torch.manual_seed(seed)
        trainers.append(make_trainer(method(replay="vae"), networks=networks))
        assert torch.initial_seed() == seed
    assert_equal(*(trainer.state_dict()["memory"]["vae"] for trainer in trainers))
    other = make_trainer(method(replay="vae"), seed=4)
    assert not equal(other.state_dict()["memory"]["vae"], trainers[0].state_dict()["memory"]["vae"])
