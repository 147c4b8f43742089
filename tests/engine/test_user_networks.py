"""A training changes only the tensors of the user's networks."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dfkd_fast import Replay, Trainer
from dfkd_fast.choices import PrecisionName
from tests.engine.test_trainer import MakeTrainer
from tests.small import Networks, small_method


class Own(nn.Sequential):
    """z → images (1, 8, 8), with layers that are optimized on a CPU."""

    latent_dim = 6

    def __init__(self) -> None:
        super().__init__(
            spectral_norm(nn.Linear(6, 64)),
            nn.Unflatten(1, (16, 2, 2)),
            nn.Upsample(scale_factor=4),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 1, 3, padding=1),
            nn.Tanh(),
        )


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16 * 64, 5)
    )


def networks() -> Networks:
    torch.manual_seed(0)
    return classifier(), classifier(), Own()


def described(network: nn.Module) -> list[object]:
    """Returns name, class, mode, requires_grad flags and hooks of every module."""
    descriptions: list[object] = []
    for name, module in network.named_modules():
        learning = {key: parameter.requires_grad for key, parameter in module.named_parameters(recurse=False)}
        hooks = {key: dict(value) for key, value in vars(module).items() if "_hooks" in key and value}
        descriptions.append((name, type(module), module.training, learning, hooks))
    return descriptions


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_classes_modes_and_hooks_of_the_users_networks_do_not_change(precision: PrecisionName) -> None:
    originals = networks()
    teacher, student, generator = originals
    student[1].eval()  # type: ignore[index]
    student[1].weight.requires_grad_(False)  # type: ignore[index]
    student[0].register_forward_hook(lambda *_: None)  # type: ignore[index]
    before = list(map(described, originals))
    during: list[bool] = []
    method = small_method(replay=Replay(kind="ema_generator"), channels_last=True)
    method = replace(method, engine=replace(method.engine, precision=precision))
    trainer = Trainer(*originals, method, evaluate=lambda student: 0.0)
    trainer.on_iteration = lambda trainer: during.append(list(map(described, originals)) == before)
    trainer.fit()
    assert (trainer.teacher, trainer.student, trainer.generator) == (teacher, student, generator) and trainer.result is student
    assert during == 6 * [True] and list(map(described, originals)) == before


class Wrapped(nn.Module):
    """A network that returns its logits in another form and dtype."""

    def __init__(self, network: nn.Module, wrap: Callable[[Tensor], object], dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.wrap = network.to(dtype), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.network(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "wrap", [lambda x: (x, None), lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)], ids=["tuple", "dict", "object"]
)
def test_a_teacher_may_return_its_logits_in_any_form_and_precision(wrap: Callable[[Tensor], object], dtype: torch.dtype) -> None:
    teacher, student, generator = networks()
    rounded = copy.deepcopy(teacher).to(dtype).float()
    expected = Trainer(rounded, copy.deepcopy(student), copy.deepcopy(generator), small_method(channels_last=True))
    trainer = Trainer(Wrapped(teacher, wrap, dtype), student, generator, small_method(channels_last=True))
    for one in (expected, trainer):
        torch.manual_seed(5)
        one.fit()
    assert all(map(torch.equal, weights(trainer), weights(expected)))
    assert {parameter.dtype for parameter in trainer.teacher.parameters()} == {dtype}


class InPlace(nn.Module):
    def __init__(self, network: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.network, self.in_place = network, in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.mul_(0.5) if self.in_place else x * 0.5)


@pytest.mark.parametrize("role", [0, 1], ids=["teacher", "student"])
@pytest.mark.parametrize("fold", [False, True])
def test_a_network_that_modifies_its_input_trains_identically(role: int, fold: bool) -> None:
    finished = []
    for in_place in (False, True):
        teacher, student, generator = networks()
        teacher, student = (InPlace(teacher, in_place), student) if role == 0 else (teacher, InPlace(student, in_place))
        method = small_method(replay=Replay(kind="ema_generator"), channels_last=True, fold_teacher=fold)
        trainer = Trainer(teacher, student, generator, method)
        torch.manual_seed(5)
        trainer.fit()
        finished.append(weights(trainer))
    assert all(map(torch.equal, *finished))


class Auxiliary(nn.Module):
    """Returns a second output in training, as torchvision's googlenet does."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.auxiliary = classifier(), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> object:
        logits = self.network(x)
        return (logits, self.auxiliary(x.flatten(1))) if self.training else logits


def test_a_student_with_auxiliary_outputs_in_training_learns_by_its_logits() -> None:
    teacher, _, generator = networks()
    trainer = Trainer(teacher, Auxiliary(), generator, small_method(channels_last=True))
    (note,) = trainer.notes
    assert note.startswith("the student returns tuple in training mode: element 0 is used as logits, not element 1")
    before = [parameter.clone() for parameter in trainer.student.network.parameters()]  # type: ignore[union-attr]
    trainer.fit()
    assert not any(map(torch.equal, before, trainer.student.network.parameters()))  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_finished_student_can_be_scripted_and_its_pickle_needs_no_package_of_ours(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(small_method(channels_last=True), networks=networks())
    student = trainer.fit()
    assert b"dfkd" not in pickle.dumps(student)
    images = torch.randn(2, 1, 8, 8)
    student.eval()
    torch.testing.assert_close(torch.jit.script(student)(images), student(images))


def weights(trainer: Trainer) -> list[Tensor]:
    return [tensor for network in (trainer.student, trainer.generator) for tensor in network.state_dict().values()]


def leaves_everything_switched_off(student: nn.Module) -> float:
    student.eval()
    torch.randn(7)
    torch.set_grad_enabled(False)
    return 0.0


def freezes(student: nn.Module) -> float:
    student.requires_grad_(False)
    return 0.0


def enters_autocast(student: nn.Module) -> float:
    torch.autocast("cpu", torch.bfloat16).__enter__()
    return 0.0


def trains_the_average(student: nn.Module) -> float:
    student.train()
    return 0.0


@pytest.mark.parametrize("average", [0.0, 0.5])
@pytest.mark.parametrize("evaluate", [leaves_everything_switched_off, trains_the_average, freezes, enters_autocast])
def test_side_effects_of_callbacks_are_undone(make_trainer: MakeTrainer, evaluate: Callable[[nn.Module], float], average: float) -> None:
    method = small_method(epochs=3, channels_last=True)
    method = replace(method, loop=replace(method.loop, student_ema_decay=average))

    def careless(trainer: Trainer) -> None:
        for network in (trainer.student, trainer.generator, trainer.result):
            evaluate(network)

    undisturbed = make_trainer(method, networks=networks())
    torch.manual_seed(5)
    undisturbed.fit()
    trainer = make_trainer(method, networks=networks(), evaluate=evaluate)
    trainer.on_iteration = careless
    torch.manual_seed(5)
    try:
        trainer.fit()
    finally:
        torch.set_autocast_enabled("cpu", False)
    assert torch.is_grad_enabled()
    assert all(map(torch.equal, weights(trainer), weights(undisturbed)))
    if average:
        assert not trainer.result.training
        assert all(map(torch.equal, trainer.result.state_dict().values(), undisturbed.result.state_dict().values()))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_callback_cannot_change_the_mode_of_a_scripted_student(make_trainer: MakeTrainer) -> None:
    def scripted() -> Networks:
        teacher, student, generator = networks()
        return teacher, torch.jit.script(student), generator

    undisturbed = Trainer(*scripted(), small_method(channels_last=True))
    trainer = Trainer(*scripted(), small_method(channels_last=True), evaluate=leaves_everything_switched_off)
    for one in (undisturbed, trainer):
        torch.manual_seed(5)
        one.fit()
    assert all(map(torch.equal, weights(trainer), weights(undisturbed)))


def test_a_state_dict_changes_nothing(make_trainer: MakeTrainer) -> None:
    trainer, undisturbed = (make_trainer(small_method(channels_last=True), networks=networks()) for _ in range(2))
    trainer.on_iteration = lambda trainer: trainer.state_dict().clear()
    for one in (trainer, undisturbed):
        torch.manual_seed(5)
        one.fit()
    assert all(map(torch.equal, weights(trainer), weights(undisturbed)))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_networks_with_older_norms_that_were_trained_before_are_distilled_and_averaged(norm: Callable[[nn.Module], nn.Module]) -> None:
    originals = networks()
    with warnings.catch_warnings(action="ignore"):  # deprecation warnings
        for layer in (originals[0][0], originals[1][0], originals[2][3]):  # type: ignore[index]
            norm(layer)
    for network, x in zip(originals, (torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.randn(2, 6)), strict=True):
        network(x).sum().backward()  # the norm keeps a tensor with a graph, which copy.deepcopy does not support
    method = small_method(replay=Replay(kind="ema_generator"))
    method = replace(method, loop=replace(method.loop, student_ema_decay=0.5), objective=replace(method.objective, bn_moments=1.0))
    trainer = Trainer(*originals, method)
    average = trainer.fit()
    assert average is not trainer.student and average(torch.zeros(1, 1, 8, 8)).isfinite().all()
    assert not any("cannot be" in note for note in trainer.notes)


class WithoutResult(nn.Sequential):
    """Its train() returns None, as in some networks that freeze their batch norms."""

    latent_dim = 6

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_network_whose_train_returns_nothing_is_distilled(make_trainer: MakeTrainer) -> None:
    originals = networks()
    wrapped = tuple(WithoutResult(network) for network in originals)
    students = []
    for each in (originals, wrapped):
        trainer = make_trainer(small_method(), networks=each)
        torch.manual_seed(0)  # for dropout
        students.append(list(trainer.fit().parameters()))
    assert all(torch.equal(*pair) for pair in zip(*students, strict=True))
