import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.surgery import FLOAT, FakeQuantized, calibrate, fold, quantize, quantized_layers
from tests.surgery.test_fold import OwnNorm
from tests.surgery.test_quantize import CANDIDATES, rounded_inputs


def teacher() -> Any:
    """Network with in-place ReLUs and running statistics that are not those of :func:`images`."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True)]
    network: Any = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))
    for _ in range(20):
        network(2 * torch.randn(16, 2, 6, 6) + 1)
    for norm in (network[1], network[4]):
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    return network


def images() -> Tensor:
    return torch.randn(32, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def copied(network: nn.Module, weight_bits: int = 3, activation_bits: int = FLOAT, end_bits: int = 4) -> Any:
    student = copy.deepcopy(network)
    quantize(student, images()[:2], weight_bits=weight_bits, activation_bits=activation_bits, end_bits=end_bits)
    return student


def outputs(network: nn.Module, names: list[str]) -> list[Tensor]:
    """Returns the outputs of the first calls of layers in evaluation mode, (C, ·)."""
    network = copy.deepcopy(network).eval()
    recorded: dict[str, Tensor] = {}
    for name in names:

        def record(layer: nn.Module, inputs: Any, y: Tensor, name: str = name) -> None:
            recorded.setdefault(name, y.detach().clone())  # a ReLU may modify it

        network.get_submodule(name).register_forward_hook(record)
    network(images())
    return [recorded[name].movedim(1, 0).flatten(1) for name in names]


def test_outputs_of_batch_norms_have_the_means_and_variances_of_the_teachers() -> None:
    original = teacher()
    student, names = copied(original), ["1", "4", "10"]
    before = outputs(student, names)
    calibrate(student, original, images())
    for ours, theirs, uncalibrated in zip(outputs(student, names), outputs(original, names), before, strict=True):
        torch.testing.assert_close(ours.mean(1), theirs.mean(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.var(1), theirs.var(1), rtol=1e-3, atol=1e-5)
        assert ((uncalibrated.var(1) / theirs.var(1)).log().abs().max()) > 0.01


@pytest.mark.parametrize("activation_bits", [4, FLOAT])
def test_outputs_of_layers_with_a_bias_have_the_means_of_the_teachers(activation_bits: int) -> None:
    original = fold(teacher().eval())  # every layer has one
    student = copied(original, activation_bits=activation_bits)
    names = list(quantized_layers(student))
    assert len(names) == 5
    calibrate(student, original, images())
    for ours, theirs in zip(outputs(student, names), outputs(original, names), strict=True):
        torch.testing.assert_close(ours.mean(1), theirs.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "tolerance"), [(FLOAT, 1e-5), (8, 0.02)])
def test_a_student_that_rounds_hardly_anything_hardly_moves(bits: int, tolerance: float) -> None:
    original = teacher()
    student = copied(original, weight_bits=bits, activation_bits=bits, end_bits=8)
    calibrate(student, original, images())
    state = student.state_dict()
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=tolerance, atol=tolerance)


def test_calibrating_again_gives_the_same_bits_whatever_the_modes() -> None:
    original = teacher()
    student = copied(original, activation_bits=4)
    once = copy.deepcopy(student)
    calibrate(once, original, images())
    again = copy.deepcopy(once).eval()
    calibrate(again, original.train(), images())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in once.state_dict().items())
    assert any(not torch.equal(tensor, student.state_dict()[name]) for name, tensor in once.state_dict().items())


def test_teacher_images_and_modes_do_not_change_and_of_the_student_only_what_is_calibrated() -> None:
    original, x = nn.Sequential(nn.ReLU(inplace=True), *teacher()), images()
    original[2].eval()
    student = copied(original)
    before = [copy.deepcopy(network.state_dict()) for network in (original, student)]
    modes = [layer.training for network in (original, student) for layer in network.modules()]
    calibrate(student, original, x)
    assert torch.equal(x, images())
    assert modes == [layer.training for network in (original, student) for layer in network.modules()]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in original.state_dict().items())
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        if torch.equal(parameter, before[1][name]):
            continue
        layer = student.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, FakeQuantized)
        assert name.endswith("bias") or torch.equal(layer.weight, parameter)


def test_input_ranges_cut_outliers_off_where_that_makes_the_error_smaller() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(2, 3, 1))
    student, x = copied(original, activation_bits=4), 20 * torch.randn(64, 2, 9, 9)
    x[0, 0, 0, 0] = 150
    calibrate(student, original, x)
    ends = torch.stack([x.min(), x.max()])
    errors = [float((rounded_inputs(x, fraction * ends, 4) - x).square().sum()) for fraction in CANDIDATES]
    ours = float((rounded_inputs(x, student[0].input_range, 4) - x).square().sum())
    assert ours == pytest.approx(min(errors), rel=1e-4)
    assert ours < 0.8 * errors[-1]


def test_channels_that_do_not_vary_on_the_images_keep_finite_statistics() -> None:
    original = teacher()
    with torch.no_grad():
        original[0].weight[2] = 0
        original[3].weight[1] = 0
        original[6].weight.zero_()
    student = copied(original, activation_bits=4)
    calibrate(student, original, images())
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert torch.equal(student[1].running_var[2], original[1].running_var[2])
    assert student(images()).isfinite().all()


class Repeated(nn.Module):
    """Calls a convolution and a batch norm twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = self.norm(self.conv(x)).relu_()
        return self.head(x.mean((2, 3)))


def test_a_layer_that_is_called_twice_is_calibrated_for_its_first_call() -> None:
    torch.manual_seed(0)
    original = Repeated()
    student = copied(original, activation_bits=4)
    calibrate(student, original, images())
    once, names = copy.deepcopy(student), ["stem", "conv", "norm"]
    for ours, theirs in zip(outputs(student, names), outputs(original, names), strict=True):
        torch.testing.assert_close(ours.mean(1), theirs.mean(1), rtol=1e-4, atol=1e-4)
    calibrate(student, original, images())
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in student.state_dict().items())


def test_a_users_batch_norm_without_eps_is_calibrated() -> None:
    norm = nn.BatchNorm2d(4)
    norm(3 * torch.randn(16, 4, 2, 2) + 1)
    original = nn.Sequential(nn.Conv2d(2, 4, 3), OwnNorm(norm), nn.Flatten(), nn.Linear(64, 3))
    student = copied(original)
    calibrate(student, original, images())
    ours, theirs = (outputs(network, ["1"])[0] for network in (student, original))
    torch.testing.assert_close(ours.std(1), theirs.std(1), rtol=1e-3, atol=1e-4)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


@pytest.mark.parametrize("broken", ["neither", "teacher", "student"])
def test_hooks_are_removed_and_modes_restored_also_after_an_exception(broken: str) -> None:
    original = teacher()
    networks = {"teacher": original, "student": copied(original)}
    if broken != "neither":
        networks[broken][5] = Broken()
        with pytest.raises(RuntimeError, match="broken"):
            calibrate(networks["student"], networks["teacher"], images())
    else:
        calibrate(networks["student"], networks["teacher"], images())
    for network in networks.values():
        assert network.training and network[2].training
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())
