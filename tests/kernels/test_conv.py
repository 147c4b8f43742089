"""im2col and col2im convolutions, and the direct convolution that all algorithms are compared with."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.kernels import winograd_conv2d
from dfkd_fast.kernels.conv import col2im_conv2d, im2col_conv2d, reference

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
GEOMETRIES: list[Geometry] = [
    ((1, 1), (0, 0), (1, 1)),
    ((2, 1), (1, 0), (1, 1)),
    ((1, 3), (2, 1), (1, 2)),
    ((2, 2), (0, 3), (2, 1)),
]
KERNELS = [(1, 1), (3, 3), (2, 3), (4, 1)]


def case(kernel: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 9, 7, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 5, *kernel, dtype=dtype).to(memory_format=torch.channels_last)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize(("kernel", "geometry"), list(itertools.product(KERNELS, GEOMETRIES)), ids=str)
def test_reference_matches_pytorch_in_values_and_gradients(kernel: tuple[int, int], geometry: Geometry) -> None:
    x, weight = case(kernel)
    expected = F.conv2d(x, weight, None, *geometry)
    torch.testing.assert_close(reference.conv2d(x, weight, *geometry), expected)
    gradient = torch.randn_like(expected)
    ours = reference.conv2d_backward(gradient, x.detach(), weight.detach(), *geometry)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (x, weight), gradient))


@pytest.mark.parametrize(("kernel", "geometry"), list(itertools.product(KERNELS, GEOMETRIES)), ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_im2col_matches_the_reference_in_values_and_gradients(
    kernel: tuple[int, int], geometry: Geometry, layout: torch.memory_format
) -> None:
    x, weight = (tensor.detach().contiguous(memory_format=layout).requires_grad_() for tensor in case(kernel))
    output = im2col_conv2d(x, weight, *geometry)
    gradient = torch.randn_like(output)
    torch.testing.assert_close(output, reference.conv2d(x, weight, *geometry))
    expected = reference.conv2d_backward(gradient, x.detach(), weight.detach(), *geometry)
    torch.testing.assert_close(torch.autograd.grad(output, (x, weight), gradient), expected)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (0, 2), (3, 2)], ids=str)
def test_col2im_matches_the_reference_in_values_and_gradients(kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    x, weight = case(kernel)
    if any(pad >= size for pad, size in zip(padding, kernel, strict=True)):
        with pytest.raises(ValueError, match=r"padding must be less than the kernel's \(\d, \d\), not \(\d, \d\)"):
            col2im_conv2d(x, weight, padding)
        return
    output = col2im_conv2d(x, weight, padding)
    gradient = torch.randn_like(output)
    torch.testing.assert_close(output, reference.conv2d(x, weight, (1, 1), padding))
    expected = reference.conv2d_backward(gradient, x.detach(), weight.detach(), (1, 1), padding)
    torch.testing.assert_close(torch.autograd.grad(output, (x, weight), gradient), expected)


def test_winograd_matches_the_reference_within_float32_precision() -> None:
    x, weight = (tensor.detach().requires_grad_() for tensor in case((3, 3), torch.float32))
    output = winograd_conv2d(x, weight, padding=(2, 1))
    gradient = torch.randn_like(output)
    wide = x.detach().double(), weight.detach().double()
    torch.testing.assert_close(output.double(), reference.conv2d(*wide, padding=(2, 1)), rtol=1e-4, atol=1e-4)
    expected = reference.conv2d_backward(gradient.double(), *wide, padding=(2, 1))
    for ours, theirs in zip(torch.autograd.grad(output, (x, weight), gradient), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("conv2d", [im2col_conv2d, col2im_conv2d])
@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((5, 9, 7), (4, 5, 3, 3), r"x must be \(N, C_in, H, W\) and weight \(C_out, C_in, kh, kw\), not \(5, 9, 7\) and \(4, 5, 3, 3\)"),
        ((1, 5, 9, 7), (4, 3, 3, 3), r"not \(1, 5, 9, 7\) and \(4, 3, 3, 3\)"),
        ((1, 5, 2, 7), (4, 5, 3, 3), r"the output is empty: input \(2, 7\), kernel \(3, 3\), padding \(0, 0\)"),
    ],
)
def test_invalid_shapes_raise_one_line(conv2d: Callable[..., Tensor], x: tuple[int, ...], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv2d(torch.zeros(x), torch.zeros(weight))


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"stride": (0, 1)}, r"stride must be two integers of at least 1, not \(0, 1\)"),
        ({"dilation": (1, 0)}, r"dilation must be two integers of at least 1, not \(1, 0\)"),
        ({"padding": (-1, 0)}, r"padding must be two integers of at least 0, not \(-1, 0\)"),
        ({"padding": "same"}, r"padding must be two integers of at least 0, not 'same'"),
    ],
)
def test_an_invalid_stride_padding_or_dilation_raises_one_line(geometry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        im2col_conv2d(*case((3, 3)), **geometry)


@pytest.mark.parametrize("conv2d", [im2col_conv2d, col2im_conv2d])
def test_vmap_uses_pytorchs_convolution(conv2d: Callable[..., Tensor]) -> None:
    x, weight = case((3, 3))
    mapped = torch.func.vmap(lambda image: conv2d(image[None], weight)[0])(x)
    torch.testing.assert_close(mapped, F.conv2d(x, weight))


def test_a_weight_of_another_dtype_raises_one_line() -> None:
    x, weight = case((3, 3))
    with pytest.raises(ValueError, match=r"weight must have the dtype of x, torch\.float64, not torch\.float32"):
        col2im_conv2d(x, weight.float())
