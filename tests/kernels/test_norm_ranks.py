"""``batch_norm_act`` with a process group: the statistics and gradients of two ranks are those of all their images together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch._C._distributed_c10d import HashStore
from torch.multiprocessing.spawn import spawn

from dfkd_fast.kernels import batch_norm_act, use_backend
from dfkd_fast.kernels.dispatch import unavailable_reason

EPS, MOMENTUM = 1e-3, 0.3

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="PyTorch was built without torch.distributed")


def images(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, residual, upstream = (torch.randn(7, 5, 4, 6).to(dtype).to(memory_format=torch.channels_last) for _ in range(3))
    return x * 2 + 30, residual, upstream


def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand(5, dtype=dtype) + 0.5 for name in ("running_mean", "running_var", "weight", "bias")}


def results(rows: slice, dtype: torch.dtype, group: Any) -> list[Tensor]:
    x, residual, upstream = (tensor[rows].clone(memory_format=torch.channels_last) for tensor in images(dtype))
    tensors = parameters(dtype)
    leaves = x.requires_grad_(), residual.requires_grad_(), tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
    keywords: Any = {**tensors, "training": True, "momentum": MOMENTUM, "eps": EPS, "activation": "leaky_relu", "group": group}
    y = batch_norm_act(x, residual=residual, **keywords)
    gradients = torch.autograd.grad(y, leaves, upstream)
    return [each.detach() for each in (y, *gradients, tensors["running_mean"], tensors["running_var"])]


SHARES = {"2 and 5 images": (slice(0, 2), slice(2, 7)), "none and 7": (slice(0, 0), slice(0, 7))}
BACKENDS = [
    ("reference", torch.float32),
    ("reference", torch.float64),
    *([] if unavailable_reason("numba") else [("numba", torch.float32)]),
]
CASES = {f"{backend}, {dtype}, {name}": (backend, dtype, rows) for backend, dtype in BACKENDS for name, rows in SHARES.items()}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, (backend, dtype, rows) in CASES.items():
        with use_backend(backend):  # type: ignore[arg-type]
            found[name] = results(rows[rank], dtype, distributed.group.WORLD)
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()  # a process that exits would close the connections of the other
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """The results of all cases in both processes."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_normalize_by_the_statistics_of_all_images(name: str, ranks: list[dict[str, list[Tensor]]]) -> None:
    dtype = CASES[name][1]
    x, residual, upstream = (tensor.double() for tensor in images(dtype))
    tensors = {name: tensor.double() for name, tensor in parameters(dtype).items()}
    leaves = x.requires_grad_(), residual.requires_grad_(), tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
    constants: Any = tensors
    normalized = F.batch_norm(x, **constants, training=True, momentum=MOMENTUM, eps=EPS)
    y = F.leaky_relu(normalized + residual, 0.01)
    expected = [y, *torch.autograd.grad(y, leaves, upstream), tensors["running_mean"], tensors["running_var"]]
    first, second = (rank[name] for rank in ranks)
    for index in range(3):  # output, and the gradients of x and of the residual, of the images of each rank
        together = torch.cat([first[index], second[index]])
        torch.testing.assert_close(together.double(), expected[index], rtol=1e-4, atol=1e-4)
    for index in (3, 4):  # the gradients of weight and bias are those of the rank
        torch.testing.assert_close((first[index] + second[index]).double(), expected[index], rtol=1e-4, atol=1e-4)
    for rank in (first, second):
        torch.testing.assert_close([rank[5].double(), rank[6].double()], expected[5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, "default", object()], ids=type)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_a_process_group_is_named_and_nothing_is_changed(group: Any, training: bool) -> None:
    tensors: Any = parameters(torch.float32)
    before = tensors["running_mean"].clone()
    keywords: Any = {"training": training, "momentum": MOMENTUM, "eps": EPS, "activation": "none", "group": group}
    with pytest.raises(TypeError, match=r"^group must be a torch.distributed.ProcessGroup of which this process is a member, not "):
        batch_norm_act(images(torch.float32)[0], **tensors, **keywords)
    assert torch.equal(tensors["running_mean"], before)


def test_evaluation_does_not_communicate() -> None:
    tensors: Any = parameters(torch.float32)
    keywords: Any = {
        "training": False,
        "momentum": MOMENTUM,
        "eps": EPS,
        "activation": "none",
        "group": distributed.ProcessGroup(HashStore(), 0, 2),
    }
    x = images(torch.float32)[0]
    torch.testing.assert_close(batch_norm_act(x, **tensors, **keywords), F.batch_norm(x, **tensors, eps=EPS))
