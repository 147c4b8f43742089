import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfkd_fast import DfkdError
from dfkd_fast.methods import Objective
from dfkd_fast.models import CifarResNet, FoldingError, Observer, build_model, fold, folded_and_checked, freeze, frozen
from dfkd_fast.models.frozen import FOLDED_WITHIN


class Sequences(nn.Module):
    """A 1-d batch norm over (N, C, L), twice, behind one over (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.flat = nn.Linear(2 * 5 * 3, 12), nn.BatchNorm1d(12)
        self.again = nn.BatchNorm1d(4)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.flat(self.project(x.flatten(1))).unflatten(1, (4, 3))
        return self.head(self.again(self.again(hidden).tanh()).flatten(1))


def images_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Conv2d(4, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3, affine=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 5 * 3, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    )


NETWORKS = [images_network, Sequences]


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    """A frozen teacher whose running statistics are neither 0 nor 1, in float64; it takes (N, 2, 5, 3)."""
    torch.manual_seed(0)
    network = build().double()
    for _ in range(3):
        network(1 + 2 * torch.randn(8, 2, 5, 3, dtype=torch.float64))
    return freeze(network)


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(7, 2, 5, 3, dtype=torch.float64) - 0.5


def inputs_of(network: nn.Module, kinds: tuple[type[nn.Module], ...], x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """What the layers of some kinds are given, call by call, as hooks on a copy see it."""
    network = copy.deepcopy(network)
    seen: list[tuple[nn.Module, Tensor]] = []
    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(lambda layer, given: seen.append((layer, given[0].detach())))
    network(x)
    return seen


@pytest.mark.parametrize("build", NETWORKS)
def test_statistics_are_the_moments_of_each_batch_norms_input_beside_its_running_ones(build: Callable[[], nn.Module]) -> None:
    teacher, x = trained(build), images()
    observation = Observer(teacher, statistics=True, features=False)(x)
    seen = inputs_of(teacher, (nn.BatchNorm1d, nn.BatchNorm2d), x)
    assert len(observation.statistics) == len(observation.running) == 2 * len(seen) == 6
    for index, (layer, given) in enumerate(seen):
        rows = np.moveaxis(given.numpy(), 1, -1).reshape(-1, given.shape[1])
        for offset, moment in enumerate((rows.mean(0), rows.var(0))):
            np.testing.assert_allclose(observation.statistics[2 * index + offset].numpy(), moment, rtol=1e-12, atol=1e-14)
        assert torch.equal(observation.running[2 * index], layer.running_mean)  # type: ignore[arg-type]
        assert torch.equal(observation.running[2 * index + 1], layer.running_var)  # type: ignore[arg-type]
    assert observation.features is None


@pytest.mark.parametrize("build", NETWORKS)
def test_features_are_what_the_classifier_is_given(build: Callable[[], nn.Module]) -> None:
    teacher, x = trained(build), images()
    observation = Observer(teacher, statistics=False, features=True)(x)
    assert observation.features is not None
    assert torch.equal(observation.features, inputs_of(teacher, (nn.Linear,), x)[-1][1])
    assert observation.statistics == observation.running == ()


def bn_moments(teacher: nn.Module, x: Tensor) -> float:
    total = 0.0
    for layer, given in inputs_of(teacher, (nn.BatchNorm1d, nn.BatchNorm2d), x):
        rows = np.moveaxis(given.numpy(), 1, -1).reshape(-1, given.shape[1])
        total += float(np.linalg.norm(rows.mean(0) - layer.running_mean.numpy()))  # type: ignore[operator]
        total += float(np.linalg.norm(rows.var(0) - layer.running_var.numpy()))  # type: ignore[operator]
    return total


@pytest.mark.parametrize("build", NETWORKS)
def test_the_statistics_term_and_its_gradient_to_the_images_are_the_equations(build: Callable[[], nn.Module]) -> None:
    teacher, x = trained(build), images().requires_grad_()
    observation = Observer(teacher, statistics=True, features=True)(x)
    term = Objective(bn_moments=1.0).generator_terms(None, observation)["bn_moments"]
    assert term.item() == pytest.approx(bn_moments(teacher, x.detach()), rel=1e-12)

    (gradient,) = torch.autograd.grad(term, x)
    expected = torch.zeros_like(gradient)
    for place in np.ndindex(*x.shape):
        step = torch.zeros_like(gradient)
        step[place] = 1e-5
        expected[place] = (bn_moments(teacher, x.detach() + step) - bn_moments(teacher, x.detach() - step)) / 2e-5
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("statistics", "features"), [(True, True), (True, False), (False, True), (False, False)])
def test_an_observer_answers_to_the_bit_as_its_teacher_and_shares_every_tensor_with_it(statistics: bool, features: bool) -> None:
    torch.manual_seed(0)
    teacher = build_model("wrn10_1", 10, 3)
    teacher(torch.randn(8, 3, 16, 16))
    freeze(teacher)
    observer, x = Observer(teacher, statistics=statistics, features=features), torch.randn(5, 3, 16, 16)
    assert torch.equal(observer(x).logits, teacher(x))
    ours, theirs = observer.network.state_dict(), teacher.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    with torch.no_grad():
        next(teacher.parameters()).mul_(2)
    assert torch.equal(observer(x).logits, teacher(x))


def test_the_teacher_keeps_its_classes_and_has_neither_hooks_nor_inputs() -> None:
    teacher = trained(images_network)
    before = {name: (type(module), set(vars(module))) for name, module in teacher.named_modules()}
    Observer(teacher, statistics=True, features=True)(images())
    assert {name: (type(module), set(vars(module))) for name, module in teacher.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())


def test_an_observer_holds_no_activation_between_calls() -> None:
    observer = Observer(trained(images_network), statistics=True, features=True)
    first = observer(images())
    second = observer(images())
    assert len(second.statistics) == len(first.statistics)
    held = [value for module in observer.network.modules() for value in vars(module).get("inputs", [])]
    assert held == []


@pytest.mark.parametrize(
    ("teacher", "wanted", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(30, 3)), {"statistics": True, "features": False}, "objective.bn_moments.*Sequential"),
        (
            nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Linear(30, 3)),
            {"statistics": True, "features": True},
            "objective.bn_moments",
        ),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()), {"statistics": True, "features": True}, "objective.activation.*Sequential"),
    ],
)
def test_a_teacher_without_such_a_layer_is_refused_by_the_name_of_the_term(
    teacher: nn.Module, wanted: dict[str, bool], message: str
) -> None:
    with pytest.raises(DfkdError, match=message):
        Observer(freeze(teacher), **wanted)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Float32 with the 10 explicit bits of mantissa that a GPU's tensor cores read in TF32; other dtypes as they are."""
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as a GPU computes them by PyTorch's default."""
    convolve = nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda layer, x, weight, bias: convolve(layer, rounded_to_tf32(x), rounded_to_tf32(weight), bias)
    )


def small_resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    teacher = CifarResNet((1, 1, 1, 1))
    for _ in range(2):
        teacher(2 * torch.randn(4, 3, 16, 16))
    return freeze(teacher), torch.randn(4, 3, 16, 16)


def answer_apart(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The largest difference of logits, over the largest logit."""
    with torch.no_grad():
        expected = other(x)
        return ((one(x) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.usefixtures("in_tf32")
def test_a_right_fold_is_recognised_where_convolutions_round_to_tf32() -> None:
    teacher, x = small_resnet()
    assert answer_apart(fold(teacher), teacher, x) > FOLDED_WITHIN  # in float32 it would not be
    folded = folded_and_checked(teacher, x)
    assert answer_apart(folded.double(), teacher.double(), x.double()) < 1e-5


@pytest.mark.usefixtures("in_tf32")
def test_a_wrong_fold_is_refused_where_convolutions_round_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
        fused = fuse_conv_bn_eval(conv, norm)
        fused.weight.mul_(1.01)
        return fused

    monkeypatch.setattr(frozen, "fuse_conv_bn_eval", wrong)
    with pytest.raises(FoldingError, match="CifarResNet answers otherwise once folded"):
        folded_and_checked(*small_resnet())


def test_a_network_that_computes_in_float32_only_is_not_folded_and_keeps_its_weights() -> None:
    class Float32Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.float())

    teacher = freeze(Float32Only())
    with pytest.raises(FoldingError, match="Float32Only does not run in float64"):
        folded_and_checked(teacher, images().float())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
