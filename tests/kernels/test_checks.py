"""The memory-overlap and double-backward checks on their own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dfkd_fast.kernels import checks
from tests.kernels.oracles import PROPERTY


def addresses(tensor: Tensor) -> list[int]:
    """Addresses of all bytes of a tensor."""
    elements = [
        tensor.data_ptr() + sum(position * stride for position, stride in zip(index, tensor.stride(), strict=True)) * tensor.element_size()
        for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).reshape(-1, tensor.ndim).tolist()
    ]
    return [address + byte for address in elements for byte in range(tensor.element_size())]


@st.composite
def views(draw: st.DrawFn, memory: Tensor) -> Tensor:
    memory = draw(st.sampled_from([memory, memory.view(torch.float32), memory.view(torch.bfloat16)]))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    strides = draw(st.lists(st.integers(0, 6), min_size=len(shape), max_size=len(shape)))
    return memory.as_strided(shape, strides, draw(st.integers(0, 12)))


@PROPERTY
@given(data=st.data())
def test_share_memory_if_and_only_if_an_address_is_common(data: st.DataObject) -> None:
    memory = torch.zeros(400, dtype=torch.uint8)
    one, other = data.draw(views(memory)), data.draw(views(memory))
    shared = bool({*addresses(one)} & {*addresses(other)})
    assert checks.share_memory(one, other) == shared
    assert checks.overlaps_itself(one) == (len({*addresses(one)}) < one.nbytes)
    if shared:
        assert not checks.disjoint([one, other])


@PROPERTY
@given(spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=6))
def test_disjoint_if_and_only_if_no_two_ranges_overlap(spans: list[tuple[int, int]]) -> None:
    memory = torch.zeros(80)
    tensors = [memory[start : start + size] for start, size in spans]
    apart = all(not checks.share_memory(one, other) for index, one in enumerate(tensors) for other in tensors[:index])
    assert checks.disjoint(tensors) == apart


def test_tensors_without_storage_do_not_overlap() -> None:
    def look(x: Tensor) -> Tensor:
        assert checks.span(x) == (0, 0)
        assert not checks.share_memory(x, x)
        assert checks.disjoint([x, x])
        return x

    torch.vmap(look)(torch.zeros(2, 3))
    for one, other in ([torch.zeros(3, device="meta")] * 2, [torch.zeros(0)] * 2):
        assert checks.span(one) == (0, 0)
        assert not checks.share_memory(one, other)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return x * (x.detach() if linear else x)

    @staticmethod
    @checks.differentiable_once("square")
    def backward(ctx: Any, saved: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * saved[0] * (1 if ctx.linear else 2), None


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "variable"])
@pytest.mark.parametrize("by", ["grad", "backward"])
def test_double_backward_raises_for_any_upstream_gradient(constant: bool, by: str) -> None:
    x = torch.tensor([3.0], requires_grad=True)
    y = Square.apply(x, False)
    (gradient,) = torch.autograd.grad(y.sum() if constant else y.square().sum(), x, create_graph=True)
    assert gradient.item() == (6 if constant else 108)
    with pytest.raises(RuntimeError, match=r'^square: its kernels have no second derivative; call it under use_backend\("reference"\)'):
        # The sum has a derivative without the kernel's term, which would be wrong.
        torch.autograd.grad((gradient + x).sum(), x) if by == "grad" else (gradient + x).sum().backward()


def test_the_gradient_of_a_linear_function_is_a_constant() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(Square.apply(x, True).sum(), x, create_graph=True)
    assert not gradient.requires_grad
    upstream = torch.ones(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(Square.apply(x, True), x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="square: its kernels have no second derivative"):
        torch.autograd.grad(gradient, upstream)


def test_first_derivatives_are_unchanged() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(Square.apply(x, False).sum(), x)
    assert gradient.item() == 6
    assert not gradient.requires_grad
