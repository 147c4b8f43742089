import copy

import pytest
import torch
from torch import nn

from dfkd_fast.kernels import dispatch, use_backend
from dfkd_fast.models import GeneratorA
from dfkd_fast.surgery import BatchNormLeakyReLU2d, fuse_leaky_relus


@pytest.fixture(autouse=True)
def small_tensors_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MIN_NUMEL, "batch_norm_leaky_relu", 0)


@pytest.mark.parametrize(("every_norm", "fused"), [(False, 2), (True, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_a_generator_with_fused_relus_is_the_same_function_with_the_same_state(training: bool, every_norm: bool, fused: int) -> None:
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
    for mine, theirs in zip(ours.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        # Biases in front of a batch norm have no gradient but rounding.
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=2e-3)


def test_only_a_leaky_relu_right_behind_a_batch_norm_is_fused() -> None:
    network = nn.Sequential(
        *(nn.LeakyReLU(), nn.BatchNorm2d(2), nn.ReLU()),
        *(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.LeakyReLU()),
        *(nn.BatchNorm2d(2, momentum=None), nn.LeakyReLU(-0.5)),
        *(nn.BatchNorm2d(2, track_running_stats=False), nn.LeakyReLU()),
    )
    before = [type(layer) for layer in network]
    fuse_leaky_relus(network)
    assert [type(layer) for layer in network] == before


def test_a_relu_that_stands_in_several_places_or_is_watched_is_left_alone() -> None:
    shared, watched = nn.LeakyReLU(), nn.LeakyReLU()
    watched.register_forward_hook(lambda *_: None)
    network = nn.Sequential(nn.BatchNorm2d(2), shared, nn.Conv2d(2, 2, 1), shared, nn.BatchNorm2d(2), watched).eval()
    images = torch.randn(2, 2, 3, 3)
    expected = network(images)
    fuse_leaky_relus(network)
    assert type(shared) is type(watched) is nn.LeakyReLU
    assert torch.equal(network(images), expected)


def test_batch_norms_alone_are_fused_on_request_unless_they_are_watched_or_stand_in_several_places() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x).relu()

    shared, watched, block = nn.BatchNorm2d(2), nn.BatchNorm2d(2), Block()
    watched.register_forward_pre_hook(lambda *_: None)
    fused = nn.BatchNorm2d(2)
    network = nn.Sequential(block, shared, nn.Tanh(), shared, watched, nn.BatchNorm2d(2, momentum=None), fused, nn.LeakyReLU(0.1))
    fuse_leaky_relus(network, every_norm=True)
    assert [type(layer) for layer in network] == [
        *(Block, nn.BatchNorm2d, nn.Tanh, nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d, BatchNormLeakyReLU2d, nn.Identity)
    ]
    assert [layer.negative_slope for layer in network.modules() if isinstance(layer, BatchNormLeakyReLU2d)] == [1, 0.1]
    assert isinstance(block.norm, BatchNormLeakyReLU2d)


@pytest.mark.parametrize("every_norm", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_under_a_forced_backend_without_kernels_for_them_the_layers_are_pytorchs(
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
