import copy

import pytest
import torch
from torch import nn

from dfkd_fast.kernels import dispatch, use_backend
from dfkd_fast.models import GeneratorA, build_model
from dfkd_fast.surgery import BatchNormLeakyReLU2d, fuse_leaky_relus


@pytest.fixture(autouse=True)
def small_tensors_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MIN_NUMEL, "batch_norm_leaky_relu", 0)


@pytest.mark.parametrize(("every_norm", "fused"), [(False, 2), (True, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_fusion_keeps_a_generators_outputs_gradients_and_state_dict(training: bool, every_norm: bool, fused: int) -> None:
    torch.manual_seed(0)
    ours = GeneratorA(5, 3, 16, width=8).to(memory_format=torch.channels_last).train(training)
    other = copy.deepcopy(ours)
    fuse_leaky_relus(ours, every_norm=every_norm)
    assert sum(isinstance(layer, BatchNormLeakyReLU2d) for layer in ours.modules()) == fused
    z = torch.randn(6, 5)
    images, expected = ours(z), other(z)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(images)
    images.backward(gradient)
    expected.backward(gradient)
    assert ours.state_dict().keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for parameter, expected_parameter in zip(ours.parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and expected_parameter.grad is not None
        # The gradients of biases before a batch norm are rounding errors.
        torch.testing.assert_close(parameter.grad, expected_parameter.grad, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_fusion_keeps_a_students_logits_and_gradients(frozen: bool) -> None:
    torch.manual_seed(0)
    ours = build_model("wrn10_1", num_classes=10, channels=3).to(memory_format=torch.channels_last)
    other = copy.deepcopy(ours).double()  # an independent and more precise result
    fuse_leaky_relus(ours)
    fused = [layer for layer in ours.modules() if isinstance(layer, BatchNormLeakyReLU2d)]
    assert len(fused) == 7 and all(layer.negative_slope == 0 for layer in fused)
    for network in (ours, other):
        network.requires_grad_(not frozen)
    images = torch.randn(6, 3, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    exact = images.detach().double().requires_grad_()
    logits, expected = ours(images), other(exact)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(logits)
    logits.backward(gradient)
    expected.backward(gradient.double())
    pairs = [(images, exact), *([] if frozen else zip(ours.parameters(), other.parameters(), strict=True))]
    for tensor, reference in pairs:
        assert tensor.grad is not None and reference.grad is not None
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-3, atol=1e-3)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name].double(), value.double(), rtol=1e-4, atol=1e-5)


def test_only_an_activation_directly_after_a_batch_norm_is_fused() -> None:
    network = nn.Sequential(
        *(nn.LeakyReLU(), nn.BatchNorm2d(2), nn.ReLU6()),
        *(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.LeakyReLU()),
        *(nn.BatchNorm2d(2, momentum=None), nn.LeakyReLU(-0.5)),
        *(nn.BatchNorm2d(2, track_running_stats=False), nn.LeakyReLU()),
    )
    before = [type(layer) for layer in network]
    fuse_leaky_relus(network)
    assert [type(layer) for layer in network] == before


def test_a_leaky_relu_that_is_shared_or_has_hooks_is_not_fused() -> None:
    shared, hooked = nn.LeakyReLU(), nn.LeakyReLU()
    hooked.register_forward_hook(lambda *_: None)
    network = nn.Sequential(nn.BatchNorm2d(2), shared, nn.Conv2d(2, 2, 1), shared, nn.BatchNorm2d(2), hooked).eval()
    images = torch.randn(2, 2, 3, 3)
    expected = network(images)
    fuse_leaky_relus(network)
    assert type(shared) is type(hooked) is nn.LeakyReLU
    assert torch.equal(network(images), expected)


def test_batch_norms_without_activation_are_fused_with_every_norm_unless_they_are_shared_or_have_hooks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x).relu()

    shared, hooked, block = nn.BatchNorm2d(2), nn.BatchNorm2d(2), Block()
    hooked.register_forward_pre_hook(lambda *_: None)
    fused = nn.BatchNorm2d(2)
    network = nn.Sequential(block, shared, nn.Tanh(), shared, hooked, nn.BatchNorm2d(2, momentum=None), fused, nn.LeakyReLU(0.1))
    fuse_leaky_relus(network, every_norm=True)
    assert [type(layer) for layer in network] == [
        *(Block, nn.BatchNorm2d, nn.Tanh, nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d, BatchNormLeakyReLU2d, nn.Identity)
    ]
    assert [layer.negative_slope for layer in network.modules() if isinstance(layer, BatchNormLeakyReLU2d)] == [1, 0.1]
    assert isinstance(block.norm, BatchNormLeakyReLU2d)


@pytest.mark.parametrize("every_norm", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_forced_backend_without_the_kernel_uses_pytorchs_layers(
    training: bool, every_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch._UNAVAILABLE, "cuda", None)  # as if installed
    ours = GeneratorA(5, 3, 16, width=8).to(memory_format=torch.channels_last).train(training)
    other = copy.deepcopy(ours)
    fuse_leaky_relus(ours, every_norm=every_norm)
    z = torch.randn(6, 5)
    with use_backend("cuda"):
        assert torch.equal(ours(z), other(z))
    for name, value in other.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
