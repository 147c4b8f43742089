import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dfkd_fast.errors import DfkdError
from dfkd_fast.surgery import frozen_copy, sharing_copy, use_cpu_convolutions


class Tied(nn.Module):
    """Has tied weights, a recurrent layer, and a buffer that every forward pass replaces."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.recurrent = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.recurrent(self.second(self.first(x)).unsqueeze(1).expand(-1, 2, -1))[0][:, -1]


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), spectral_norm(nn.Linear(6, 4)))


def scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))


NETWORKS: list[Callable[[], nn.Module]] = [Tied, normalized, scripted]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("build", NETWORKS)
def test_training_the_copy_trains_the_network(build: Callable[[], nn.Module]) -> None:
    network = build()
    working = sharing_copy(network)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    working(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    after = network.state_dict()
    assert all(not torch.equal(before[name], value) for name, value in after.items() if name in dict(network.named_parameters()))
    assert all(torch.equal(value, after[name]) for name, value in working.state_dict().items())


def test_a_buffer_that_the_copy_replaces_is_replaced_in_the_network() -> None:
    network = Tied()
    sharing_copy(network)(torch.randn(2, 4))
    assert network.count == 1


def test_classes_and_modes_of_the_copy_are_separate() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    classes = [type(layer) for layer in network.modules()]
    working = use_cpu_convolutions(sharing_copy(network)).train()
    assert [type(layer) for layer in network.modules()] == classes != [type(layer) for layer in working.modules()]
    assert not any(layer.training for layer in network.modules())


def test_hooks_registered_before_or_after_copying_run_in_both() -> None:
    network, calls = nn.Sequential(nn.Linear(4, 4)), list[str]()
    network[0].register_forward_hook(lambda *_: calls.append("before"))
    working = sharing_copy(network)
    handle = network[0].register_forward_pre_hook(lambda *_: calls.append("after"))
    working(torch.zeros(1, 4))
    assert calls == ["after", "before"]
    handle.remove()
    working(torch.zeros(1, 4))
    assert calls == ["after", "before", "before"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_frozen_copy_computes_in_the_requested_dtype_and_does_not_change_the_network(
    build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    network = build()
    network(torch.randn(8, 4))  # running statistics that differ from their initial values
    if build is not scripted:
        network.to(dtype)
    before = copy.deepcopy(network.state_dict())
    frozen = frozen_copy(network, torch.float32)
    x = torch.randn(3, 4)
    logits = frozen(x)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.training and not any(module.training for module in frozen.modules())
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in before.items() if name != "count")
    with torch.no_grad():
        torch.testing.assert_close(logits.double(), copy.deepcopy(network).double().eval()(x.double()), rtol=1e-4, atol=1e-5)


def test_a_frozen_copy_in_the_same_dtype_shares_storage() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    frozen = frozen_copy(network, torch.float32)
    for ours, theirs in zip(frozen.state_dict().values(), network.state_dict().values(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr() and ours.stride() == theirs.stride()


def test_tied_weights_stay_tied_in_a_frozen_copy() -> None:
    frozen = frozen_copy(Tied(), torch.float64)
    assert frozen.get_parameter("first.weight") is frozen.get_submodule("second").weight


def test_a_network_compiled_in_place_is_compiled_in_the_copy() -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    network[0].compile(backend="eager")
    assert sharing_copy(network)[0]._compiled_call_impl is not None  # type: ignore[index]


def patched() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = network.forward
    network.forward = lambda x: before(x) * 2  # type: ignore[method-assign, no-untyped-call]
    return network


def closing_over_itself() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4))
    network.body = lambda x: network[0](x)  # type: ignore[assignment]
    return network


@pytest.mark.parametrize("build", [patched, closing_over_itself])
def test_an_attribute_function_that_references_the_original_is_refused(build: Callable[[], nn.Module]) -> None:
    for make_copy in (sharing_copy, lambda network: frozen_copy(network, torch.float32)):
        with pytest.raises(DfkdError, match=r"the attribute '(forward|body)' of a Sequential is a function that references a module"):
            make_copy(build())


def compiled() -> nn.Module:
    network = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
    assert isinstance(network, nn.Module)
    return network


@pytest.mark.parametrize("build", [compiled, lambda: nn.DataParallel(nn.Linear(4, 4))], ids=["compiled", "parallel"])
def test_compiled_and_parallel_networks_are_copied(build: Callable[[], nn.Module]) -> None:
    network = build()
    network(torch.zeros(2, 4))
    working = sharing_copy(network)
    assert list(map(id, working.parameters())) == list(map(id, network.parameters()))
    torch.testing.assert_close(working(torch.ones(2, 4)), network(torch.ones(2, 4)))


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo: object) -> "CopiesItself":
        return CopiesItself(self.in_features, self.out_features)


def test_a_copy_that_does_not_share_its_parameters_is_refused() -> None:
    with pytest.raises(DfkdError, match=r"^the network Sequential cannot be copied: a custom __deepcopy__ copies its parameters$"):
        sharing_copy(nn.Sequential(CopiesItself(4, 4)))


def test_an_attribute_that_cannot_be_copied_is_a_one_line_error() -> None:
    network = nn.Linear(4, 4)
    network.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(DfkdError, match=r"the network Linear cannot be copied: TypeError: cannot pickle '_thread.lock' object") as caught:
        sharing_copy(network)
    assert "\n" not in str(caught.value)
