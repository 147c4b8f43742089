"""What ``ema_update_`` does of lists and numbers that are not the usual ones: right, or an error that names them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_fast.kernels import Backend, BackendError, FusedEMA, ema_multi_avg_fn, ema_update_

LISTS = Callable[[], tuple[list[Tensor], list[Tensor], list[Tensor] | None]]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("size", [3, 200_000])
def test_complex_numbers_are_averaged(dtype: torch.dtype, size: int) -> None:
    average, source = torch.full((size,), 2 + 4j, dtype=dtype), torch.full((size,), 4 - 4j, dtype=dtype)
    shadow = torch.zeros_like(average)
    ema_update_([average], [source], 0.75, shadows=[shadow])
    assert torch.equal(average, torch.full_like(average, 2.5 + 2j))
    assert torch.equal(shadow, average)


def test_a_forced_kernel_raises_for_complex_numbers(fused: Backend, device: torch.device) -> None:
    average = torch.zeros(3, dtype=torch.complex64, device=device)
    with pytest.raises(BackendError, match=f"{fused} is forced, but supports .* not torch.complex64"):
        ema_update_([average], [average + 1], 0.5)


def test_half_precision_complex_averages_raise() -> None:
    with pytest.raises(ValueError, match=r"pair 0: an average must be float32 or float64, not torch\.complex32"):
        ema_update_([torch.zeros(3, dtype=torch.complex32)], [torch.zeros(3, dtype=torch.complex32)], 0.5)


@pytest.mark.parametrize("alias", [lambda tensor: tensor, Tensor.detach, Tensor.view_as], ids=["same", "detached", "view"])
def test_a_tied_weight_is_updated_once(backend: Backend, device: torch.device, alias: Callable[..., Tensor]) -> None:
    def twice(tensor: Tensor) -> list[Tensor]:
        return [tensor, torch.zeros(2, device=device), alias(tensor, tensor) if alias is Tensor.view_as else alias(tensor)]

    average, source, shadow = torch.zeros(5, device=device), torch.ones(5, device=device), torch.zeros(5, device=device)
    ema_update_(twice(average), twice(source), 0.75, shadows=twice(shadow))
    assert torch.equal(average, torch.full_like(average, 0.25))
    assert torch.equal(shadow, average)


def memory(size: int = 9) -> Tensor:
    return torch.arange(float(size))


def tied_to_two() -> Any:
    shared = memory()
    return [shared, shared], [memory(), memory()], None


def overlapping_averages() -> Any:
    shared = memory()
    return [shared[:6], shared[3:]], [memory(6), memory(6)], None


def shifted_source() -> Any:
    shared = memory()
    return [shared[:6]], [shared[3:]], None


def swapped() -> Any:
    one, other = memory(), memory()
    return [one, other], [other, one], None


def overlapping_shadows() -> Any:
    shared = memory()
    return [memory(6), memory(6)], [memory(6), memory(6)], [shared[:6], shared[3:]]


def shadow_over_a_later_source() -> Any:
    shared = memory()
    return [memory(), memory()], [memory(), shared], [shared, memory()]


def another_dtype_of_the_same_memory() -> Any:
    shared = memory(6)
    return [shared], [memory(6)], [shared.view(torch.bfloat16)[:6]]


OVERLAPPING: dict[Callable[[], Any], str] = {
    tied_to_two: r"averages\[0\] and averages\[1\] share memory",
    overlapping_averages: r"averages\[0\] and averages\[1\] share memory",
    shifted_source: r"averages\[0\] and sources\[0\] share memory",
    swapped: r"share memory",
    overlapping_shadows: r"shadows\[0\] and shadows\[1\] share memory",
    shadow_over_a_later_source: r"s\[\d\] and s\w+\[\d\] share memory",
    another_dtype_of_the_same_memory: r"averages\[0\] and shadows\[0\] share memory",
}


@pytest.mark.parametrize("make", OVERLAPPING, ids=lambda make: make.__name__)
def test_overlap_that_depends_on_the_order_raises_and_nothing_is_changed(make: Callable[[], Any]) -> None:
    averages, sources, shadows = make()
    tensors = [*averages, *sources, *(shadows or ())]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=OVERLAPPING[make]):
        ema_update_(averages, sources, 0.5, shadows=shadows)
    assert all(map(torch.equal, tensors, before))


def test_harmless_overlap_is_supported(backend: Backend, device: torch.device) -> None:
    one, other, source, arena = (torch.zeros(6, device=device) for _ in range(4))
    source += 1
    views = [arena[:2], arena[2:4], arena[4:]]  # neighbours
    averages = [one, other, *views, torch.zeros(0, device=device), torch.zeros(0, device=device)]
    # Two averages of one source, an average of itself, and shadows that are the averages.
    ema_update_(averages, [source, source, *(torch.ones_like(view) for view in views), *averages[5:]], 0.75, shadows=averages)
    assert all(torch.equal(tensor, torch.full_like(tensor, 0.25)) for tensor in (one, other, arena))
    ema_update_([one], [one], 0.5)
    assert torch.equal(one, torch.full_like(one, 0.25))


def test_interleaved_slices_do_not_overlap() -> None:
    whole = torch.zeros(4, 6)
    ema_update_([whole[:, ::2], whole[:, 1::2]], [torch.ones(4, 6)[:, ::2], torch.ones(4, 6)[:, 1::2]], 0.5)
    assert torch.equal(whole, torch.full_like(whole, 0.5))


@pytest.mark.parametrize("size", [3, 200_000])
@pytest.mark.parametrize("name", ["averages", "shadows"])
def test_an_expanded_average_or_shadow_raises(size: int, name: str) -> None:
    dense, expanded = torch.zeros(size, 2), torch.zeros(1, 2).expand(size, 2)
    strided = [torch.zeros(size, 2).as_strided((size, 2), (0, 1)) for _ in range(2)]
    shadows = [expanded, torch.zeros(3)] if name == "shadows" else None
    with pytest.raises(ValueError, match=rf"averages\[0\] must not overlap itself: strides \(0, 1\) of shape \({size}, 2\)"):
        ema_update_([strided[0], torch.zeros(3)], [strided[1], torch.zeros(3)], 0.5, shadows=shadows)
    assert not dense.any()


def test_sparse_layouts_are_named() -> None:
    sparse = torch.zeros(3).to_sparse()
    with pytest.raises(ValueError, match=r"averages\[1\] must have the layout torch.strided, not torch.sparse_coo"):
        ema_update_([torch.zeros(3), sparse], [torch.zeros(3), sparse], 0.5)


@pytest.mark.parametrize("size", [3, 200_000])
def test_the_negative_bit_is_resolved(size: int) -> None:
    average = torch.zeros(size)
    ema_update_([average], [torch._neg_view(torch.ones(size))], 0.75)
    assert torch.equal(average, torch.full_like(average, -0.25))


def test_a_forced_kernel_raises_for_a_negative_bit(fused: Backend, device: torch.device) -> None:
    with pytest.raises(BackendError, match="resolve_neg"):
        ema_update_([torch.zeros(3, device=device)], [torch._neg_view(torch.ones(3, device=device))], 0.5)


@pytest.mark.parametrize("decay", [1.5, -0.1, float("nan"), float("inf")])
def test_the_range_of_a_decay_tensor_on_the_cpu_is_checked(decay: float) -> None:
    average = torch.zeros(3)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], not "):
        ema_update_([average], [torch.ones(3)], torch.tensor(decay))
    assert not average.any()


@pytest.mark.parametrize("decay", ["0.5", None, [0.5], 1.5, torch.tensor(-1.0)], ids=repr)
def test_an_averaging_function_checks_its_decay_when_it_is_made(decay: Any) -> None:
    with pytest.raises(ValueError, match="decay must be "):
        ema_multi_avg_fn(decay)


@pytest.mark.parametrize("decay", ["0.5", None, [0.5]], ids=repr)
def test_an_invalid_decay_is_named(decay: Any) -> None:
    with pytest.raises(ValueError, match="decay must be a float or a 0-d float32 or float64 tensor, not "):
        ema_update_([torch.zeros(1)], [torch.ones(1)], decay)


def test_leaf_and_non_leaf_tensors_that_require_grad_are_updated(backend: Backend, device: torch.device) -> None:
    leaf = torch.zeros(3, device=device, requires_grad=True)
    for average in (leaf, torch.zeros(3, device=device, requires_grad=True) * 1):
        ema_update_([average], [torch.ones(3, device=device, requires_grad=True) * 2], 0.75)
        assert torch.equal(average.detach(), torch.full_like(average, 0.5))
    assert leaf.is_leaf


def test_an_average_follows_a_model_to_channels_last_and_back(backend: Backend, device: torch.device) -> None:
    model = nn.Conv2d(3, 4, 3).to(device)
    ema = FusedEMA(model, 0.5, shadow_dtype=torch.bfloat16)
    average, shadow = (next(module.parameters()) for module in (ema.module, ema.shadow) if module is not None)
    exact = average.double()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        model.to(memory_format=memory_format)
        nn.init.normal_(model.weight)
        ema.update(model)
        exact = exact.lerp(model.weight.detach().double(), 0.5)
        assert average.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(average.double(), exact, rtol=1e-6, atol=1e-7)
        assert torch.equal(shadow, average.bfloat16())
