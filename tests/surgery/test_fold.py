import copy
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from dfkd_fast import DfkdError
from dfkd_fast.kernels import use_backend
from dfkd_fast.methods import Objective
from dfkd_fast.models import build_model, cifar_resnet
from dfkd_fast.surgery import FoldingError, Observer, fold, fold_and_verify, freeze, has_running_statistics
from dfkd_fast.surgery.fold import FOLD_TOLERANCE


class Sequences(nn.Module):
    """Calls a BatchNorm1d on (N, C), and another one twice on (N, C, L)."""

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
    """Returns a frozen float64 teacher for images (N, 2, 5, 3) with non-trivial running statistics."""
    torch.manual_seed(0)
    network = build().double()
    for _ in range(3):
        network(1 + 2 * torch.randn(8, 2, 5, 3, dtype=torch.float64))
    return freeze(network)


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(7, 2, 5, 3, dtype=torch.float64) - 0.5


def inputs_of(network: nn.Module, kinds: tuple[type[nn.Module], ...], x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Returns the inputs of all layers of some types in call order, recorded by hooks on a copy."""
    network = copy.deepcopy(network)
    calls: list[tuple[nn.Module, Tensor]] = []
    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0].detach())))
    network(x)
    return calls


@pytest.mark.parametrize("build", NETWORKS)
def test_statistics_are_the_moments_and_running_statistics_of_each_batch_norm_call(build: Callable[[], nn.Module]) -> None:
    teacher, x = trained(build), images()
    observation = Observer(teacher, statistics=True, features=False)(x)
    calls = inputs_of(teacher, (nn.BatchNorm1d, nn.BatchNorm2d), x)
    assert observation.statistics is not None and observation.running is not None
    assert observation.statistics.shape == observation.running.shape == (2, 3, max(inputs.shape[1] for _, inputs in calls))
    for index, (layer, inputs) in enumerate(calls):
        channels = inputs.shape[1]
        rows = np.moveaxis(inputs.numpy(), 1, -1).reshape(-1, channels)
        for actual, moment in zip(observation.statistics[:, index], (rows.mean(0), rows.var(0)), strict=True):
            np.testing.assert_allclose(actual[:channels].numpy(), moment, rtol=1e-12, atol=1e-14)
        for actual, expected in zip(observation.running[:, index], (layer.running_mean, layer.running_var), strict=True):
            assert torch.equal(actual[:channels], expected)  # type: ignore[arg-type]
        for padded in (observation.statistics, observation.running):
            assert not padded[:, index, channels:].any()
    assert observation.features is None


@pytest.mark.parametrize("build", NETWORKS)
def test_features_are_the_classifiers_input(build: Callable[[], nn.Module]) -> None:
    teacher, x = trained(build), images()
    observation = Observer(teacher, statistics=False, features=True)(x)
    assert observation.features is not None
    assert torch.equal(observation.features, inputs_of(teacher, (nn.Linear,), x)[-1][1])
    assert observation.statistics is observation.running is None


def bn_moments(teacher: nn.Module, x: Tensor) -> float:
    total = 0.0
    for layer, inputs in inputs_of(teacher, (nn.BatchNorm1d, nn.BatchNorm2d), x):
        rows = np.moveaxis(inputs.numpy(), 1, -1).reshape(-1, inputs.shape[1])
        total += float(np.linalg.norm(rows.mean(0) - layer.running_mean.numpy()))  # type: ignore[operator]
        total += float(np.linalg.norm(rows.var(0) - layer.running_var.numpy()))  # type: ignore[operator]
    return total


@pytest.mark.parametrize("build", NETWORKS)
def test_the_statistics_term_and_its_gradient_equal_the_equation_and_finite_differences(build: Callable[[], nn.Module]) -> None:
    teacher, x = trained(build), images().requires_grad_()
    observation = Observer(teacher, statistics=True, features=True)(x)
    term = Objective(bn_moments=1.0).generator_terms(None, observation)["bn_moments"]
    assert term.item() == pytest.approx(bn_moments(teacher, x.detach()), rel=1e-12)

    (gradient,) = torch.autograd.grad(term, x)
    expected = torch.zeros_like(gradient)
    for index in np.ndindex(*x.shape):
        step = torch.zeros_like(gradient)
        step[index] = 1e-5
        expected[index] = (bn_moments(teacher, x.detach() + step) - bn_moments(teacher, x.detach() - step)) / 2e-5
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("statistics", "features"), [(True, True), (True, False), (False, True), (False, False)])
def test_an_observer_returns_its_teachers_exact_logits_and_shares_every_tensor_with_it(statistics: bool, features: bool) -> None:
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


def test_an_observer_does_not_change_its_teachers_classes_hooks_or_attributes() -> None:
    teacher = trained(images_network)
    before = {name: (type(module), set(vars(module))) for name, module in teacher.named_modules()}
    Observer(teacher, statistics=True, features=True)(images())
    assert {name: (type(module), set(vars(module))) for name, module in teacher.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())


def test_an_observer_holds_no_activation_between_calls() -> None:
    observer = Observer(trained(images_network), statistics=True, features=True)
    first = observer(images())
    second = observer(images())
    assert first.statistics is not None and second.statistics is not None
    assert torch.equal(second.statistics, first.statistics)
    recorded = [vars(module)["calls"] for module in observer.network.modules() if "calls" in vars(module)]
    assert recorded and not any(recorded)


def test_input_moments_of_a_folded_batch_norm_are_recovered_except_where_its_weight_is_tiny() -> None:
    teacher = trained(images_network)
    norm: Any = next(layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.3, 0.0, 1e-5]))
        norm.bias.uniform_(-3, 3)
    original, folded = (Observer(one, statistics=True, features=False)(images()) for one in (teacher, fold(teacher)))
    assert original.statistics is not None and folded.statistics is not None and folded.running is not None
    # Batch norms that are not folded come first: here the BatchNorm1d.
    ours, expected = folded.statistics[:, [1, 2, 0]], original.statistics.clone()
    expected[:, 0, 2:4] = torch.stack([norm.running_mean, norm.running_var])[:, 2:]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


class OwnNorm(nn.Module):
    """A user's batch norm with running statistics and without an attribute ``eps``."""

    def __init__(self, like: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(like, name).detach())

    def forward(self, x: Tensor) -> Tensor:
        scale, shift, mean, var = (buffer[:, None, None] for buffer in self.buffers())
        return (x - mean) * (var + 1e-5).rsqrt() * scale + shift


def torchvisions_frozen(norm: nn.BatchNorm2d) -> nn.Module:
    layer = FrozenBatchNorm2d(norm.num_features, norm.eps).double()
    layer.load_state_dict(norm.state_dict())
    return layer


@pytest.mark.parametrize("frozen_norm", [torchvisions_frozen, OwnNorm])
def test_a_frozen_batch_norm_has_the_statistics_of_batch_norm_2d(frozen_norm: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    def build(make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
        teacher: Any = trained(images_network)
        with torch.no_grad():
            teacher[1].weight.uniform_(0.5, 2)
            teacher[1].bias.uniform_(-1, 1)
        teacher[1] = make(teacher[1])
        return freeze(teacher)

    torch.manual_seed(2)
    expected = Observer(build(lambda norm: norm), statistics=True, features=False)(images())
    torch.manual_seed(2)
    teacher = build(frozen_norm)
    actual = Observer(teacher, statistics=True, features=False)(images())
    assert actual.statistics is not None and actual.running is not None
    assert expected.statistics is not None and expected.running is not None
    torch.testing.assert_close(actual.statistics, expected.statistics, rtol=1e-12, atol=1e-14)
    assert torch.equal(actual.running, expected.running)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-12, atol=1e-14)


def test_torchvisions_frozen_batch_norms_fold_and_keep_their_statistics() -> None:
    torch.manual_seed(0)
    teacher = freeze(
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1, bias=False), FrozenBatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 3, 3), FrozenBatchNorm2d(3), nn.Flatten(), nn.Linear(9, 3)),
        )
    )
    for layer in teacher.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            for buffer in layer.buffers():
                buffer.uniform_(0.5, 1.5)
    folded = fold_and_verify(teacher, images().float())
    assert {name for name, layer in folded.named_modules() if isinstance(layer, FrozenBatchNorm2d)} == {"0.folded_norm", "3.folded_norm"}
    original, ours = (Observer(one, statistics=True, features=False)(images().float()) for one in (teacher, folded))
    torch.testing.assert_close(ours.statistics, original.statistics, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running, original.running)
    torch.testing.assert_close(ours.logits, original.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.SyncBatchNorm(3), True),
        (FrozenBatchNorm2d(3), True),
        (FrozenBatchNormAct2d(3), True),
        (OwnNorm(nn.BatchNorm2d(3)), True),
        (nn.BatchNorm2d(3, track_running_stats=False), False),
        (nn.InstanceNorm2d(3, track_running_stats=True), False),
        (nn.GroupNorm(1, 3), False),
        (nn.Conv2d(3, 3, 1), False),
        (nn.Sequential(nn.BatchNorm2d(3)), False),
    ],
)
def test_layers_with_running_statistics_are_recognized(layer: nn.Module, expected: bool) -> None:
    assert has_running_statistics(layer) == expected


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_scripted_network_can_be_frozen_but_not_observed() -> None:
    teacher = freeze(torch.jit.script(images_network()))
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(DfkdError, match=r"objective\.bn_moments"):
        Observer(teacher, statistics=True, features=False)


def test_a_teacher_may_return_more_than_its_logits() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = trained(images_network)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.network(x), x

    teacher = freeze(Both())
    observation = Observer(teacher, statistics=True, features=False)(images())
    assert torch.equal(observation.logits, teacher(images())[0])


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns)
        if func.namespace in ("aten", "dfkd_fast") and not views and "empty" not in str(func):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def launches(teacher: nn.Module, statistics: bool) -> Counter[str]:
    """Returns the kernel launches of a forward and backward pass through a teacher, with or without the BN term, after a warm-up."""
    observer = Observer(teacher, statistics=statistics, features=False)
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend("numba"):
        for _ in range(1 + statistics):
            with Launches() as counted:
                observation = observer(torch.empty(4, 3, 32, 32, requires_grad=True))
                loss = observation.logits.sum()
                if statistics:
                    loss = loss + Objective(bn_moments=1.0).generator_terms(None, observation)["bn_moments"]
                loss.backward()
    return counted.counts


@pytest.mark.parametrize("folded", [False, True])
def test_the_statistics_term_adds_few_kernel_launches_apart_from_the_moments(folded: bool) -> None:
    pytest.importorskip("numba", reason="the moments are a single operator only in the numba backend")
    teacher = freeze(build_model("resnet34", 10, 3))  # cifar10-mad's
    if folded:
        teacher = fold(teacher)
    added = launches(teacher, True) - launches(teacher, False)
    moments = [name for name in added if "moments" in name]
    assert sorted(added.pop(name) for name in moments) == [1, 36, 36]
    additions = added.pop("aten.add.Tensor")  # of the gradients of each layer's output
    assert additions <= 37
    assert added.total() <= 12, added


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
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
def test_a_teacher_without_the_required_layers_is_refused_with_the_name_of_the_term(
    teacher: nn.Module, options: dict[str, bool], message: str
) -> None:
    with pytest.raises(DfkdError, match=message):
        Observer(freeze(teacher), **options)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Returns float32 tensors rounded to TF32's 10 explicit mantissa bits; other dtypes unchanged."""
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in TF32, PyTorch's default on GPUs."""
    convolve = nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda layer, x, weight, bias: convolve(layer, rounded_to_tf32(x), rounded_to_tf32(weight), bias)
    )


def small_resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    teacher = cifar_resnet((1, 1, 1, 1))
    for _ in range(2):
        teacher(2 * torch.randn(4, 3, 16, 16))
    return freeze(teacher), torch.randn(4, 3, 16, 16)


def relative_difference(network: nn.Module, reference: nn.Module, x: Tensor) -> float:
    """Returns the largest difference of the logits relative to the largest logit."""
    with torch.no_grad():
        expected = reference(x)
        return ((network(x) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.usefixtures("in_tf32")
def test_a_correct_fold_is_accepted_where_convolutions_round_to_tf32() -> None:
    teacher, x = small_resnet()
    assert relative_difference(fold(teacher), teacher, x) > FOLD_TOLERANCE  # a check in float32 would reject it
    folded = fold_and_verify(teacher, x)
    assert relative_difference(folded.double(), teacher.double(), x.double()) < 1e-5


@pytest.mark.usefixtures("in_tf32")
def test_a_wrong_fold_is_refused_where_convolutions_round_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
        fused = fuse_conv_bn_eval(conv, norm)
        fused.weight.mul_(1.01)
        return fused

    monkeypatch.setattr(import_module("dfkd_fast.surgery.fold"), "fuse_conv_bn_eval", wrong)  # the package has a function called fold
    with pytest.raises(FoldingError, match="folding changes the outputs of ResNet"):
        fold_and_verify(*small_resnet())


def test_a_network_that_computes_in_float32_only_is_not_folded_and_keeps_its_weights() -> None:
    class Float32Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.float())

    teacher = freeze(Float32Only())
    with pytest.raises(FoldingError, match="Float32Only does not run in float64"):
        fold_and_verify(teacher, images().float())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
