"""``batch_norm_act`` with unusual tensors and numbers: correct, or an error that names them."""

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dfkd_fast.kernels import Backend, batch_norm_act, dispatch, norm, use_backend

CPU = torch.device("cpu")
PARAMETERS = ["running_mean", "running_var", "weight", "bias"]


@pytest.fixture(autouse=True)
def small_tensors_use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MIN_NUMEL, "batch_norm_act", 0)


def images(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 6, 3, 5).to(device, dtype).to(memory_format=torch.channels_last)


def arguments(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> dict[str, Any]:
    torch.manual_seed(1)
    tensors = {name: torch.rand(6).add(0.5).to(device, dtype) for name in PARAMETERS}
    return {**tensors, "training": True, "momentum": 0.3, "eps": 1e-3, "activation": "leaky_relu", "negative_slope": 0.2}


def pytorch(x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    mean, variance, weight, bias = (kwargs[name] for name in PARAMETERS)
    normalised = F.batch_norm(x, mean, variance, weight, bias, kwargs["training"], kwargs["momentum"], kwargs["eps"])
    return F.leaky_relu(normalised, kwargs["negative_slope"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameters_of_another_dtype_use_pytorch(fused: Backend, device: torch.device, dtype: torch.dtype, training: bool) -> None:
    ours, theirs = ({**arguments(dtype, device), "training": training} for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(batch_norm_act(images(dtype, device), **ours), pytorch(images(dtype, device), theirs))
    for name in PARAMETERS:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PARAMETERS)
def test_invalid_tensors_are_named_and_nothing_is_changed(name: str, training: bool) -> None:
    for wrong, message in (
        (torch.ones(6).half(), f"{name} must be torch.float32 or have the dtype of x, torch.bfloat16, not torch.float16"),
        (torch.ones(6).double(), f"{name} must be torch.float32 or .*, not torch.float64"),
        (torch.ones(6).long(), f"{name} must be torch.float32 or .*, not torch.int64"),
        (torch.ones(6, device="meta"), f"{name} must be on the device of x, cpu, not on meta"),
        (torch.ones(6, 1), rf"{name} must be \(6,\), not \(6, 1\)"),
    ):
        kwargs = {**arguments(), "training": training, name: wrong}
        before = {other: kwargs[other].clone() for other in PARAMETERS}
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            batch_norm_act(images(torch.bfloat16), **kwargs)
        assert all(torch.equal(kwargs[other], before[other]) for other in PARAMETERS if other != name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"momentum": None}, "momentum = None, the average over all batches, requires num_batches_tracked"),
        ({"momentum": "0.1"}, "momentum must be a number from 0 to 1, not '0.1'"),
        ({"activation": "tanh"}, "activation must be one of none, relu, leaky_relu, relu6, silu, hardswish, not 'tanh'"),
        ({"activation": None}, "activation must be one of none, .*, not None"),
        ({"running_mean": None}, "running_mean and running_var must be given together"),
        ({"residual": torch.ones(4, 6, 3, 1)}, r"residual must be torch.float32 \(4, 6, 3, 5\), as x, not torch.float32 \(4, 6, 3, 1\)"),
        ({"residual": torch.ones(4, 6, 3, 5).half()}, r"residual must be torch.float32 .*, as x, not torch.float16"),
        ({"residual": torch.ones(4, 6, 3, 5, device="meta")}, "residual must be on the device of x, cpu, not on meta"),
        ({"residual": torch.ones(4, 6, 3, 5).to_sparse()}, "residual must have the layout torch.strided, not torch.sparse_coo"),
        ({"input_bias": torch.ones(5)}, r"input_bias must be \(6,\), not \(5,\)"),
        (
            {"num_batches_tracked": torch.zeros(2).long()},
            r"num_batches_tracked must be torch.int64 with one element, not torch.int64 \(2,\)",
        ),
        ({"num_batches_tracked": torch.zeros(())}, r"num_batches_tracked must be torch.int64 with one element, not torch.float32 \(\)"),
        ({"eps": 0.0}, "eps must be greater than 0 in training and at least 0 in evaluation, not 0.0"),
        ({"eps": -1e-5, "training": False}, "eps must be greater than 0 .*, not -1e-05"),
        ({"negative_slope": -0.1}, "negative_slope must be a number of at least 0, not -0.1"),
        ({"eps": 10**400}, "eps must be greater than 0 .*, not an object of the type int"),
        ({"eps": float("inf")}, "eps must be greater than 0 .*, not inf"),
        ({"negative_slope": float("inf")}, "negative_slope must be a number of at least 0, not inf"),
        ({"negative_slope": 10**400}, "negative_slope must be a number of at least 0, not an object of the type int"),
        ({"weight": torch.ones(6).to_sparse()}, "weight must have the layout torch.strided, not torch.sparse_coo"),
        ({"running_mean": torch.ones(6).to_sparse()}, "running_mean must have the layout torch.strided, not torch.sparse_coo"),
        ({"momentum": float("nan")}, "momentum must be a number from 0 to 1, not nan"),
        ({"momentum": 7}, "momentum must be a number from 0 to 1, not 7"),
        ({"eps": float("nan")}, "eps must be greater than 0 .*, not nan"),
        ({"eps": None}, "eps must be greater than 0 .*, not None"),
        ({"negative_slope": Fraction(1, 2)}, r"negative_slope must be a number of at least 0, not Fraction\(1, 2\)"),
        ({"negative_slope": torch.ones(9, 9)}, "negative_slope must be a number of at least 0, not an object of the type Tensor$"),
        ({"running_mean": torch.zeros(6, requires_grad=True)}, r"running_mean requires grad, .*: pass running_mean.detach\(\)"),
        ({"running_var": torch.ones(1).expand(6)}, r"running_var must not overlap itself: strides \(0,\) of shape \(6,\)"),
    ],
    ids=str,
)
def test_invalid_values_are_named_and_nothing_is_changed(changed: dict[str, Any], message: str) -> None:
    kwargs = {**arguments(), **changed}
    dense = [name for name in PARAMETERS if kwargs[name] is not None and kwargs[name].layout == torch.strided]
    before = {name: kwargs[name].clone() for name in dense}
    with pytest.raises(ValueError, match=message):
        batch_norm_act(images(), **kwargs)
    assert all(torch.equal(kwargs[name], value) for name, value in before.items())


def test_one_value_per_channel_is_refused_before_anything_changes(backend: Backend, device: torch.device) -> None:
    batches, kwargs = torch.zeros((), dtype=torch.int64, device=device), arguments(device=device)
    with pytest.raises(ValueError, match=r"^x must have more than 1 value per channel in training mode, not the shape \(1, 6, 1, 1\)$"):
        batch_norm_act(torch.ones(1, 6, 1, 1, device=device), num_batches_tracked=batches, **kwargs)
    assert batches.item() == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_input_bias_of_the_reference_changes_no_result_in_training(dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 5, 4).mul(0.01).to(dtype).requires_grad_()
    bias = torch.full((6,), 3.0, requires_grad=True)
    tensors = [arguments() for _ in range(2)]
    keywords: Any = {"training": training, "input_bias": bias}
    with use_backend("reference"):
        y = batch_norm_act(x, **tensors[0] | keywords)
        expected = batch_norm_act(x, **tensors[1] | {"training": training})
    of_x, of_bias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    if training:
        assert torch.equal(y, expected)
        assert torch.equal(of_x, torch.autograd.grad(expected, x, torch.ones_like(y))[0])
        assert torch.equal(of_bias, torch.zeros(6))
        torch.testing.assert_close(tensors[0]["running_mean"], tensors[1]["running_mean"] + 0.3 * 3)
    else:
        exact: Any = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments().items()}
        wide, wide_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
        right = pytorch(wide + wide_bias[:, None, None], exact | {"training": False})
        torch.testing.assert_close(y.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        of_exact = torch.autograd.grad(right, wide_bias, torch.ones_like(right))[0]
        torch.testing.assert_close(of_bias.double(), of_exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_results_have_the_strides_of_empty_like(backend: Backend, device: torch.device) -> None:
    x = images(device=device).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2).transpose(0, 1).contiguous().transpose(0, 1)
    y = batch_norm_act(x, **arguments(device=device))
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("wrong", ["no", 1, None], ids=repr)
def test_training_must_be_a_bool(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"^training must be True or False, not {wrong!r}$"):
        batch_norm_act(images(), **{**arguments(), "training": wrong})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("odd", ["x", *PARAMETERS])
def test_gradients_of_the_reference_are_right_where_those_of_pytorch_are_not(odd: str, training: bool) -> None:
    x = images()[:1].to(memory_format=torch.channels_last)
    x = (x[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None] if odd == "x" else x).requires_grad_()
    kwargs = {**arguments(), "training": training}
    if odd != "x":
        kwargs[odd] = torch.stack([kwargs[odd], torch.full((6,), 9.0)], 1)[:, 0]
    kwargs["weight"].requires_grad_()
    exact = {name: value.detach().double() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    leaves = x.detach().double().contiguous().requires_grad_(), exact["weight"].contiguous().requires_grad_()
    mean, variance = exact["running_mean"], exact["running_var"]
    if training:
        variance, mean = torch.var_mean(leaves[0], dim=(0, 2, 3), correction=0)
    scale, bias = leaves[1] / (variance + kwargs["eps"]).sqrt(), exact["bias"]
    expected = F.leaky_relu((leaves[0] - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None], kwargs["negative_slope"])
    with use_backend("reference"):
        y = batch_norm_act(x, **kwargs)
    upstream = torch.randn_like(expected)
    actual = y, *torch.autograd.grad(y, (x, kwargs["weight"]), upstream.float())
    for ours, right in zip(actual, (expected, *torch.autograd.grad(expected, leaves, upstream)), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_float64_images_may_have_float32_parameters(training: bool) -> None:
    ours, theirs = {**arguments(), "training": training}, {**arguments(torch.float64), "training": training}
    theirs |= {name: ours[name].double() for name in PARAMETERS}
    x = images(torch.float64)
    torch.testing.assert_close(batch_norm_act(x, **ours), pytorch(x, theirs))
    for name in PARAMETERS:
        torch.testing.assert_close(ours[name].double(), theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_images_without_channels_are_returned(training: bool) -> None:
    kwargs = {**arguments(), "training": training} | {name: torch.zeros(0) for name in PARAMETERS}
    assert batch_norm_act(torch.zeros(2, 0, 4, 4), **kwargs).shape == (2, 0, 4, 4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e5m2], ids=str)
def test_activations_must_be_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"x must be float64, float32, bfloat16 or float16, not {dtype}"):
        batch_norm_act(images().to(dtype), **arguments())


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def negated_twice(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


@pytest.mark.parametrize("training", [True, False])
def test_strided_tensors_and_negative_bits_are_supported(fused: Backend, device: torch.device, training: bool) -> None:
    with torch.no_grad():
        for name in ("x", *PARAMETERS):
            for view in (strided, negated_twice):
                ours, theirs = ({**arguments(device=device), "training": training} for _ in range(2))
                x = images(device=device)
                if name == "x":
                    x = view(x)
                else:
                    ours[name] = view(ours[name])
                torch.testing.assert_close(batch_norm_act(x, **ours), pytorch(images(device=device), theirs), rtol=1e-4, atol=1e-4)
                for other in PARAMETERS:
                    torch.testing.assert_close(ours[other], theirs[other], rtol=1e-5, atol=1e-5)


def test_the_negative_bit_of_the_upstream_gradient_is_resolved(fused: Backend, device: torch.device) -> None:
    x = images(device=device).requires_grad_()
    upstream = torch.randn(x.shape).to(device).to(memory_format=torch.channels_last)
    gradients = [
        torch.autograd.grad(batch_norm_act(x, **arguments(device=device)), x, gradient)[0]
        for gradient in (torch._neg_view(-upstream), upstream)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("wrt", ["x", "weight"])
def test_double_backward_that_would_lack_a_term_raises(fused: Backend, device: torch.device, wrt: str) -> None:
    x, kwargs = images(device=device).requires_grad_(), arguments(device=device)
    kwargs["weight"].requires_grad_()
    assert norm._backend(x, {name: kwargs[name] for name in PARAMETERS}, 1) == fused
    (gradient,) = torch.autograd.grad(batch_norm_act(x, **kwargs).sum(), x, create_graph=True)
    source = x if wrt == "x" else kwargs["weight"]
    with pytest.raises(RuntimeError, match=r'batch_norm_act: .* no second derivative; call it under use_backend\("reference"\)'):
        torch.autograd.grad(gradient.square().sum() + source.sum(), source)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_forward_mode_derivatives_use_pytorch(fused: Backend, device: torch.device, training: bool, graph: bool) -> None:
    tangents = []
    for function in (lambda x, kwargs: batch_norm_act(x, **kwargs), pytorch):
        with forward_ad.dual_level(), torch.set_grad_enabled(graph):
            dual = forward_ad.make_dual(images(device=device), images(device=device).flip(0))
            tangents.append(forward_ad.unpack_dual(function(dual, {**arguments(device=device), "training": training})).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("training", [True, False])
def test_torch_func_transforms_use_pytorch(fused: Backend, device: torch.device, training: bool) -> None:
    kwargs = {**arguments(device=device), "training": training}

    def ours(x: Tensor) -> Tensor:
        return (
            batch_norm_act(x, **{**kwargs, "running_mean": torch.zeros(6, device=device), "running_var": torch.ones(6, device=device)})
            .square()
            .sum()
        )

    def theirs(x: Tensor) -> Tensor:
        return (
            pytorch(x, {**kwargs, "running_mean": torch.zeros(6, device=device), "running_var": torch.ones(6, device=device)})
            .square()
            .sum()
        )

    for transform in (torch.func.grad, lambda function: lambda x: torch.func.jvp(function, (x,), (x.flip(0),))):
        torch.testing.assert_close(transform(ours)(images(device=device)), transform(theirs)(images(device=device)), rtol=1e-4, atol=1e-4)
    if not training:
        several = torch.stack([images(device=device), 2 * images(device=device)])
        with torch.no_grad():
            torch.testing.assert_close(torch.vmap(ours)(several), torch.vmap(theirs)(several))
