import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfkd_fast import DfkdError, Epoch, GeneratorA, Method, NonFiniteLossError, Objective, Optimizer, Replay, Trainer
from dfkd_fast.methods import BankSettings
from dfkd_fast.models import build_model
from tests.small import small_method, small_networks
from tests.states import assert_equal, through_a_file, without_times

MakeTrainer = Callable[..., Trainer]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 8], ids=["first epoch", "epoch's end", "second epoch", "last epoch"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_trainer: MakeTrainer, stop_after: int, channels_last: bool) -> None:
    method = small_method(replay=Replay(kind="ema_generator"), epochs=3, iterations=3, channels_last=channels_last)
    networks = small_networks(teacher="wrn10_1", student="wrn10_1", channels=3)
    # Dropout draws from the global random number generator, which has to be restored as well.
    networks = (networks[0], nn.Sequential(networks[1], nn.Dropout(0.2)), networks[2])
    torch.manual_seed(5)
    whole = make_trainer(method, networks=networks)
    whole.fit()

    torch.manual_seed(5)
    stopped = make_trainer(method, networks=networks)
    stopped.on_iteration = lambda trainer: trainer.stop() if trainer.iterations_done == stop_after else None
    stopped.fit()
    assert not stopped.finished
    state = through_a_file(stopped.state_dict())

    torch.manual_seed(99)
    other = small_networks(seed=7, teacher="wrn10_1", student="wrn10_1", channels=3)
    resumed = make_trainer(method, seed=50, networks=(networks[0], nn.Sequential(other[1], nn.Dropout(0.2)), other[2]))
    resumed.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.fit()
    assert resumed.finished
    assert_equal(without_times(resumed.state_dict()), without_times(whole.state_dict()))


def test_epochs_can_be_taken_one_at_a_time(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method(epochs=3))
    assert next(iter(trainer)).number == 1
    assert [epoch.number for epoch in trainer] == [2, 3]
    assert trainer.finished
    assert list(trainer) == []


def test_student_is_evaluated_when_asked_and_always_at_the_end(make_trainer: MakeTrainer) -> None:
    method = small_method(epochs=5)
    method = Method(loop=type(method.loop)(**{**vars(method.loop), "evaluate_every": 2}))
    trainer = make_trainer(method, evaluate=lambda student: 42.0)
    assert [epoch.student_accuracy for epoch in trainer] == [None, 42.0, None, 42.0, 42.0]


def test_evaluation_and_sampling_leave_the_trajectory_alone(make_trainer: MakeTrainer) -> None:
    def nosy(student: nn.Module) -> float:
        student.eval()
        student(torch.randn(2, 1, 32, 32))
        student.train()
        return 0.0

    undisturbed = make_trainer(small_method())
    undisturbed.fit()
    trainer = make_trainer(small_method(), evaluate=nosy)
    for _ in trainer:
        trainer.sample(4)
    for ours, theirs in zip(trainer.student.parameters(), undisturbed.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert trainer.generator.training


def test_losses_of_an_epoch_are_means_over_its_steps(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method(epochs=1))
    rows: list[Tensor] = []
    trainer.on_iteration = lambda trainer: rows.append(trainer.state.losses.values["student"][trainer.state.iteration - 1].clone())
    (epoch,) = list(trainer)
    assert epoch.losses["student"] == pytest.approx(torch.stack(rows).double().mean().item(), rel=1e-6)
    assert (torch.stack(rows) > 0).all()


class BreaksAtStep(nn.Module):
    """A student whose logits become NaN in its n-th forward pass in training mode."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.inner = small_networks()[1]
        self.step = step
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += self.training
        logits: Tensor = self.inner(x)
        return logits * float("nan") if self.forwards == self.step else logits


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (2, "student's loss term 'student' is nan at student step 2 of iteration 1, epoch 1"),
        (6, "generator's loss term 'adversarial' is nan at generator step 1 of iteration 2, epoch 1"),
        (11, "student's loss term 'student' is nan at student step 2 of iteration 1, epoch 2"),
    ],
)
def test_nan_loss_stops_the_run_naming_step_and_term(make_trainer: MakeTrainer, step: int, where: str) -> None:
    teacher, _, generator = small_networks()
    trainer = make_trainer(small_method(), networks=(teacher, BreaksAtStep(step), generator))
    with pytest.raises(NonFiniteLossError, match=where):
        trainer.fit()


def test_nan_raises_before_a_stopped_run_is_saved(make_trainer: MakeTrainer) -> None:
    teacher, _, generator = small_networks()
    trainer = make_trainer(small_method(), networks=(teacher, BreaksAtStep(1), generator))
    trainer.on_iteration = lambda trainer: trainer.stop()
    with pytest.raises(NonFiniteLossError):
        trainer.fit()


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (lambda t, s, g: (t, build_model("lenet5_half", 7, 1), g), r"must return logits of the same shape.*\(10,\).*\(7,\)"),
        (lambda t, s, g: (t, s, GeneratorA(20, 1, 28, width=4)), r"teacher cannot take the generator's 1×28×28 images"),
        (lambda t, s, g: (t, s, GeneratorA(20, 3, 32, width=4)), r"teacher cannot take the generator's 3×32×32 images"),
        (lambda t, s, g: (t, nn.Sequential(nn.Flatten(), nn.Linear(3, 10)), g), r"student cannot take"),
        (lambda t, s, g: (t, s, nn.Linear(20, 10)), r"attribute latent_dim"),
    ],
)
def test_incompatible_networks_are_rejected_with_one_line(make_trainer: MakeTrainer, networks: Any, message: str) -> None:
    with pytest.raises(DfkdError, match=message) as caught:
        make_trainer(small_method(), networks=networks(*small_networks()))
    assert "\n" not in str(caught.value)


def test_state_of_another_network_is_rejected(make_trainer: MakeTrainer) -> None:
    state = make_trainer(small_method()).state_dict()
    teacher, student, _ = small_networks()
    other = make_trainer(small_method(), networks=(teacher, student, GeneratorA(20, 1, 32, width=8)))
    with pytest.raises(DfkdError, match="does not match the networks"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("done", "asked", "message"),
    [
        ({"epochs": 3}, {"epochs": 2}, "loop.epochs = 2: the state has already completed 3 epochs and 0 iterations"),
        ({"epochs": 3, "stop_after": 7}, {"epochs": 2}, "loop.epochs = 2: the state has already completed 2 epochs and 1 iterations"),
        ({"stop_after": 3}, {"iterations": 2}, "loop.iterations_per_epoch = 2: the state is of a run with another number of iterations"),
        ({"stop_after": 1}, {"iterations": 4}, "loop.iterations_per_epoch = 4: the state is of a run with another number of iterations"),
    ],
)
def test_a_state_of_another_schedule_without_a_recorded_method_is_rejected_and_changes_nothing(
    make_trainer: MakeTrainer, done: dict[str, int], asked: dict[str, int], message: str
) -> None:
    done = dict(done)
    stop_after = done.pop("stop_after", None)
    one = make_trainer(small_method(**done))  # type: ignore[arg-type]
    one.on_iteration = lambda trainer: trainer.stop() if trainer.iterations_done == stop_after else None
    one.fit()
    other = make_trainer(small_method(**asked))  # type: ignore[arg-type]
    before = through_a_file(other.state_dict())
    state = one.state_dict()
    del state["method"]  # as in earlier versions
    with pytest.raises(DfkdError, match=f"^{message}$"):
        other.load_state_dict(state)
    assert_equal(without_times(other.state_dict()), without_times(before))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loop.epochs", 3),
        ("loop.student_steps", 1),
        ("loop.batch_size", 7),
        ("loop.student_ema_decay", 0.9),
        ("objective.discrepancy", "kl"),
        ("replay.kind", "none"),
        ("student_optimizer.lr", 0.5),
        ("student_optimizer.kind", "adam"),
    ],
)
def test_a_state_of_another_method_is_rejected_by_the_setting_and_changes_nothing(make_trainer: MakeTrainer, path: str, value: Any) -> None:
    method = small_method(replay=Replay(kind="ema_generator"))
    one = make_trainer(method)
    one.fit()
    section, key = path.split(".")
    theirs = getattr(getattr(method, section), key)
    other = make_trainer(replace(method, **{section: replace(getattr(method, section), **{key: value})}))
    before = other.state_dict()
    with pytest.raises(DfkdError, match=f"^{path} = {value!r}: the state is of a run with {theirs!r}$"):
        other.load_state_dict(one.state_dict())
    assert_equal(without_times(other.state_dict()), without_times(before))


def test_evaluation_settings_may_change_on_resume(make_trainer: MakeTrainer) -> None:
    method = small_method()
    one, other = make_trainer(method), make_trainer(replace(method, loop=replace(method.loop, evaluate_every=2, drift_samples=4)))
    next(iter(one))
    other.load_state_dict(one.state_dict())
    assert len(other.history) == 1


@pytest.mark.parametrize("key", ["networks", "optimizers", "precision", "losses", "drift", "history", "memory", "schedules"])
@pytest.mark.parametrize("wrong", [None, 3, [1], {"x": 1}])
def test_an_invalid_state_is_rejected_with_one_line_and_changes_nothing(make_trainer: MakeTrainer, key: str, wrong: Any) -> None:
    method = small_method(replay=Replay(kind="ema_generator"))
    one, other = make_trainer(method), make_trainer(method, seed=8)
    one.fit()
    before = other.state_dict()
    with pytest.raises(DfkdError) as caught:
        other.load_state_dict({**one.state_dict(), key: wrong})
    assert "\n" not in str(caught.value)
    assert_equal(without_times(other.state_dict()), without_times(before))


def test_a_state_is_a_copy_that_further_training_does_not_change(make_trainer: MakeTrainer) -> None:
    method = small_method(replay=Replay(kind="ema_generator"), epochs=3)
    trainer = make_trainer(method)
    running = iter(trainer)
    next(running)
    state = trainer.state_dict()
    then = through_a_file(state)
    trainer.fit()
    assert_equal(state, then)
    finished = trainer.state_dict()
    trainer.load_state_dict(state)
    trainer.fit()
    assert_equal(without_times(trainer.state_dict()), without_times(finished))


@pytest.mark.parametrize("kind", ["none", "ema_generator", "memory_bank"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_continuing_after_an_evaluation_that_raised_gives_the_same_student(
    make_trainer: MakeTrainer, kind: Any, error: type[BaseException]
) -> None:
    method = small_method(replay=Replay(kind=kind, rows=4, memory_bank=BankSettings(every=1)), epochs=4)
    calls = count(1)

    def evaluate(_: nn.Module) -> float:
        if next(calls) == 2:
            raise error
        return 0.0

    whole, broken = make_trainer(method, evaluate=lambda _: 0.0), make_trainer(method, evaluate=evaluate)
    whole.fit()
    with pytest.raises(error):
        broken.fit()
    broken.fit()
    assert_equal(without_times(broken.state_dict()), without_times(whole.state_dict()))


def test_an_accuracy_of_numpy_or_in_a_tensor_is_kept_as_a_number(make_trainer: MakeTrainer) -> None:
    for value in (np.float64(3.5), torch.tensor(3.5)):
        trainer = make_trainer(small_method(), evaluate=lambda _, value=value: value)
        trainer.fit()
        assert [epoch.student_accuracy for epoch in trainer.history] == [3.5, 3.5]
        assert_equal(through_a_file(trainer.state_dict()), trainer.state_dict())


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no_grad", "inference", "autocast"]
)
def test_an_ambient_mode_does_not_reach_the_steps(make_trainer: MakeTrainer, around: Any) -> None:
    method = small_method(replay=Replay(kind="ema_generator"))
    alone, surrounded = make_trainer(method), make_trainer(method)
    alone.fit()
    with around():
        surrounded.fit()
    assert_equal(without_times(surrounded.state_dict()), without_times(alone.state_dict()))


def test_a_finished_state_of_the_same_schedule_is_finished(make_trainer: MakeTrainer) -> None:
    one, other = make_trainer(small_method()), make_trainer(small_method())
    one.fit()
    other.load_state_dict(through_a_file(one.state_dict()))
    assert other.finished and list(other) == []


def test_a_state_of_another_teacher_is_rejected_and_memory_formats_do_not_matter(make_trainer: MakeTrainer) -> None:
    teacher, student, generator = small_networks()
    state = through_a_file(make_trainer(small_method()).state_dict())
    otherwise = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    make_trainer(small_method(), networks=(otherwise, student, generator)).load_state_dict(state)
    with torch.no_grad():
        next(teacher.parameters())[0] += 1e-3
    with pytest.raises(
        DfkdError, match=r"^the state is of a run with another teacher: its SHA-256 is \w{12}, that of this teacher \w{12}$"
    ):
        make_trainer(small_method(), networks=(teacher, student, generator)).load_state_dict(state)


def test_a_state_without_a_recorded_teacher_is_loaded_with_a_note(make_trainer: MakeTrainer) -> None:
    state = make_trainer(small_method()).state_dict()
    del state["teacher"]
    trainer = make_trainer(small_method())
    trainer.load_state_dict(state)
    assert trainer.notes == ["the checkpoint does not record its teacher: whether it matches this one was not checked"]


def test_a_users_own_generator_needs_only_latent_dim(make_trainer: MakeTrainer) -> None:
    class Own(nn.Module):
        latent_dim = 5

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 32 * 32)

        def forward(self, z: Tensor) -> Tensor:
            return self.layer(z).view(-1, 1, 32, 32)

    teacher, student, _ = small_networks()
    own = Own()
    before = own.layer.weight.detach().clone()
    trainer = make_trainer(small_method(replay=Replay(kind="ema_generator")), networks=(teacher, student, own))
    trainer.fit()
    assert not torch.equal(trainer.generator.layer.weight, before)  # type: ignore[union-attr, arg-type]


def test_different_seeds_draw_different_latents(make_trainer: MakeTrainer) -> None:
    losses = [make_trainer(small_method(), seed=seed) for seed in (0, 1)]
    for trainer in losses:
        trainer.fit()
    assert losses[0].history[0].losses != losses[1].history[0].losses


@pytest.mark.parametrize("schedule", ["constant", "cosine", "multistep"])
def test_a_resumed_run_follows_its_schedule(make_trainer: MakeTrainer, schedule: Any) -> None:
    scheduled = Optimizer(lr=0.01, schedule=schedule, milestones=(2, 3) if schedule == "multistep" else ())
    method = replace(small_method(epochs=4, iterations=1, student_steps=1), student_optimizer=scheduled, generator_optimizer=scheduled)
    whole = make_trainer(method)
    rates = [whole.state.student_optimizer.param_groups[0]["lr"] for _ in whole]
    stopped, resumed = make_trainer(method), make_trainer(method)
    next(iter(stopped))
    saved = through_a_file(stopped.state_dict())
    if schedule == "multistep":  # as in earlier checkpoints
        assert saved["schedules"][0]["milestones"] == {2: 1, 3: 1}
        saved["schedules"][1]["milestones"] = Counter({(2, 1): 1, (3, 1): 1})
    resumed.load_state_dict(saved)
    assert [resumed.state.student_optimizer.param_groups[0]["lr"] for _ in resumed] == rates[1:]
    assert_equal(without_times(resumed.state_dict()), without_times(whole.state_dict()))


@pytest.mark.gpu
def test_a_gpu_run_is_saved_and_resumed_on_the_gpu(make_trainer: MakeTrainer) -> None:
    method = small_method(replay=Replay(kind="ema_generator"), epochs=3, channels_last=True)
    stopped = make_trainer(method, device="cuda")
    next(iter(stopped))
    resumed = make_trainer(method, device="cuda")
    resumed.load_state_dict(through_a_file(stopped.state_dict()))
    assert [epoch.number for epoch in resumed] == [2, 3]
    assert all(tensor.is_cuda for tensor in resumed.student.state_dict().values())
    assert resumed.sample(4).is_cuda
    assert set(resumed.state.clock.read()) == {"student", "generator", "evaluation"}


def test_loading_a_state_leaves_the_state_alone(make_trainer: MakeTrainer) -> None:
    first = make_trainer(small_method(epochs=3))
    next(iter(first))
    state = first.state_dict()
    before = through_a_file(state)
    second = make_trainer(small_method(epochs=3))
    second.load_state_dict(state)
    second.fit()
    assert_equal(before["losses"], state["losses"])


def test_callbacks_are_called_in_order_with_a_state_that_can_be_saved(make_trainer: MakeTrainer) -> None:
    events: list[Any] = []
    trainer = make_trainer(
        small_method(epochs=2, iterations=2),
        on_iteration=lambda trainer: events.append(("iteration", trainer.iterations_done)),
        on_epoch=lambda trainer, epoch: events.append(("epoch", epoch.number, trainer.history[-1] is epoch)),
        on_checkpoint=lambda trainer: events.append(("checkpoint", trainer.state_dict()["iteration"])),
    )
    trainer.fit()
    first = [("iteration", 1), ("iteration", 2), ("epoch", 1, True), ("checkpoint", 0)]
    assert events == [*first, ("iteration", 3), ("iteration", 4), ("epoch", 2, True), ("checkpoint", 0)]


def test_a_pretraining_callback_gets_every_step_and_changes_neither_random_states_nor_modes(make_trainer: MakeTrainer) -> None:
    reported: list[tuple[int, list[str]]] = []

    def disturb(trainer: Trainer, losses: dict[str, Tensor]) -> None:
        reported.append((trainer.state.pretrained, [name for name, loss in losses.items() if loss.isfinite()]))
        torch.manual_seed(99)
        trainer.generator.eval().requires_grad_(False)

    method = replace(small_method(), objective=Objective(one_hot=1.0))
    method = replace(method, loop=replace(method.loop, generator_pretraining=3))
    undisturbed, disturbed = make_trainer(method), make_trainer(method, on_pretraining=disturb)
    for trainer in (undisturbed, disturbed):
        trainer.fit()
    assert reported == [(1, ["one_hot"]), (2, ["one_hot"]), (3, ["one_hot"])]
    assert_equal(without_times(disturbed.state_dict()), without_times(undisturbed.state_dict()))


def test_a_stopped_loop_offers_a_checkpoint_that_resumes_to_the_uninterrupted_result(make_trainer: MakeTrainer) -> None:
    whole = make_trainer(small_method(epochs=2, iterations=3))
    whole.fit()
    saved: list[dict[str, Any]] = []
    stopped = make_trainer(
        small_method(epochs=2, iterations=3),
        on_iteration=lambda trainer: trainer.stop() if trainer.iterations_done == 2 else None,
        on_checkpoint=lambda trainer: saved.append(trainer.state_dict()),
    )
    stopped.fit()
    assert [state["iteration"] for state in saved] == [2]
    resumed = make_trainer(small_method(epochs=2, iterations=3))
    resumed.load_state_dict(saved[0])
    resumed.fit()
    assert_equal(without_times(resumed.state_dict()), without_times(whole.state_dict()))


def test_an_epoch_callback_changes_neither_random_states_nor_modes(make_trainer: MakeTrainer) -> None:
    def disturb(trainer: Trainer, epoch: Epoch) -> None:
        torch.manual_seed(99)
        trainer.student.eval().requires_grad_(False)

    undisturbed, disturbed = make_trainer(small_method()), make_trainer(small_method(), on_epoch=disturb)
    for trainer in (undisturbed, disturbed):
        trainer.fit()
    assert_equal(without_times(disturbed.state_dict()), without_times(undisturbed.state_dict()))


def test_manual_iterations_equal_those_of_the_loop_and_end_with_the_epoch(make_trainer: MakeTrainer) -> None:
    pretrained = replace(small_method(epochs=2, iterations=3), objective=Objective(one_hot=1.0))
    pretrained = replace(pretrained, loop=replace(pretrained.loop, generator_pretraining=2))
    whole, stepped = make_trainer(pretrained), make_trainer(pretrained)
    whole.fit()
    for _ in range(3):
        stepped.iterate()
    assert stepped.state.pretrained == 2
    before = stepped.state_dict()
    with pytest.raises(DfkdError, match="all iterations of this epoch are done"):
        stepped.iterate()
    assert_equal(stepped.state_dict(), before)
    stepped.fit()
    assert_equal(without_times(stepped.state_dict()), without_times(whole.state_dict()))
    with pytest.raises(DfkdError, match="all iterations of this epoch are done"):
        stepped.iterate()
