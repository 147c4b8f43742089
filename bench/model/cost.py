"""The kernels of an operation on a GPU, with their FLOPs and memory traffic.

Every tensor that a kernel reads or writes is counted once per kernel, as if nothing stayed in the L2 cache. The rules are those of
PyTorch's CUDA implementation for channels-last tensors: a convolution adds its bias in a kernel of its own, a batch norm in training reads
its input once for the statistics and once to normalize. Operations without a rule are one kernel that reads its inputs and writes its
outputs. Kernels that libraries add, such as cuDNN's changes of layout, are not counted.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from dfkd_fast.surgery import BatchNormAct2d

__all__ = ["KINDS", "TENSOR_CORE_KINDS", "Call", "Kernel", "kernels"]

KINDS = (
    *("convolution", "matrix product", "bias", "batch norm", "activation", "addition", "pooling", "cast and copy"),
    *("images", "moments", "loss", "optimizer", "average", "other"),
)
"""What kernels do, in the order of tables and plots."""
TENSOR_CORE_KINDS = ("convolution", "matrix product")
"""Kinds whose kernels may be limited by FLOPs."""


@dataclass(frozen=True)
class Kernel:
    """One kernel launch."""

    kind: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Call:
    """A call of an operator on fake tensors."""

    operator: Any
    arguments: Sequence[Any]
    keywords: dict[str, Any]
    result: Any
    module: type | None
    """Class of the layer that called it; None outside of the networks."""

    @property
    def name(self) -> str:
        """Name without namespace and overload, such as ``native_batch_norm``."""
        return self.operator.name().partition("::")[2].partition(".")[0]


def kernels(call: Call) -> list[Kernel]:
    """Return the kernels that a call launches; none for views and allocations."""
    if call.operator.namespace not in ("aten", "dfkd_fast") or call.name in WITHOUT_KERNELS or call.operator.is_view:
        return []
    return RULES.get(call.name, _one_kernel)(call)


WITHOUT_KERNELS = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"),
    *("_unsafe_view", "as_strided_", "squeeze_", "unsqueeze_", "t_", "detach_", "set_", "lift_fresh", "_local_scalar_dense"),
}
WRITTEN_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "concat_forward_out"}
"""Operators in place that do not read the tensor that they write."""
KIND_OF = {
    name: kind
    for kind, names in {
        "matrix product": ("mm", "addmm", "bmm", "baddbmm"),
        "batch norm": (
            *("native_batch_norm", "native_batch_norm_backward", "batch_norm_constants", "batch_norm_statistics", "batch_norm_act_forward"),
            *("batch_norm_act_sums", "batch_norm_gradients", "batch_norm_act_backward"),
        ),
        "activation": (
            *("relu", "relu_", "threshold_backward", "leaky_relu", "leaky_relu_", "leaky_relu_backward", "elu", "elu_", "prelu"),
            *("hardtanh", "hardtanh_", "hardtanh_backward", "silu", "silu_", "silu_backward", "gelu", "gelu_backward"),
            *("hardswish", "hardswish_", "hardswish_backward", "hardsigmoid", "hardsigmoid_", "hardsigmoid_backward"),
            *("sigmoid", "sigmoid_", "sigmoid_backward", "tanh", "tanh_backward"),
            *("bias_act_forward", "bias_act_moments_forward", "bias_act_backward"),
        ),
        "pooling": (
            *("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d"),
            *("_adaptive_avg_pool2d_backward", "upsample_bilinear2d", "upsample_bilinear2d_backward", "upsample_nearest2d"),
            "upsample_nearest2d_backward",
        ),
        "cast and copy": ("_to_copy", "copy_", "clone", "cat", "stack", "flip", "constant_pad_nd", "slice_backward", "select_backward"),
        "images": ("concat_forward", "concat_forward_out", "concat_backward", "concat_gradient_moments"),
        "moments": ("partial_moments", "combine_moments", "moments_backward"),
        "loss": ("l1_forward", "kl_forward", "js_forward", "scale_gradients", "scale_gradients_"),
        "optimizer": ("_fused_adam_", "_fused_adamw_", "_fused_sgd_"),
        "average": ("ema_update_",),
    }.items()
    for name in names
}
TWO_KERNELS = {"concat_gradient_moments", "slice_backward", "select_backward"}
"""Partial sums and their sum; zeros and the slice."""
ONE_LAUNCH = 8192
"""Logits up to which the discrepancies add their partial sums in the same launch."""
CHUNK, MAX_CHUNKS = 1 << 16, 320  # of ATen's multi_tensor_apply: elements per block, blocks per launch
MAX_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # tensors per launch, by the number of lists


def _kind(call: Call) -> str:
    if call.name == "partial_moments" and call.module is not None and issubclass(call.module, BatchNormAct2d):
        return "batch norm"
    if call.name in KIND_OF:
        return KIND_OF[call.name]
    if call.name in ("add", "add_") and call.module is not None:
        return "addition"
    return "other"


def _one_kernel(call: Call) -> list[Kernel]:
    kind, traffic = _kind(call), _traffic(call)
    if call.name in TWO_KERNELS:
        return [Kernel(kind, 0, traffic), Kernel(kind, 0, 0)]
    return [Kernel(kind, 0, traffic)]


def _traffic(call: Call) -> int:
    read = list(_tensors((call.arguments, call.keywords)))
    written = list(_tensors(call.result))
    if call.name in WRITTEN_ONLY:
        written, read = read[:1], read[1:]
    elif not written:  # operators that return nothing write their arguments
        written = read
    return sum(map(_bytes, itertools.chain(read, written)))


def _convolution(call: Call) -> list[Kernel]:
    images, weight, bias, _, _, _, transposed = call.arguments[:7]
    result: Tensor = call.result
    flops = conv_flop_count([*images.shape], [*weight.shape], [*result.shape], transposed=transposed)
    launched = [Kernel("convolution", flops, sum(map(_bytes, (images, weight, result))))]
    return launched if bias is None else [*launched, Kernel("bias", 0, 2 * _bytes(result))]


def _convolution_relu(call: Call) -> list[Kernel]:
    images, weight, _, residual = call.arguments[:4]
    flops = conv_flop_count([*images.shape], [*weight.shape], [*call.result.shape])
    return [Kernel("convolution", flops, sum(map(_bytes, _tensors((images, weight, residual, call.result)))))]


def _convolution_backward(call: Call) -> list[Kernel]:
    gradient, images, weight = call.arguments[:3]
    transposed, mask = call.arguments[7], call.arguments[10]
    flops = conv_flop_count([*images.shape], [*weight.shape], [*gradient.shape], transposed=transposed)
    of_images, of_weight, of_bias = mask
    # Two of them are read, the gradient of the third is written. The images may be an expanded stand-in if they are not read.
    traffic = sum(map(_bytes, (gradient, weight))) + images.numel() * images.itemsize
    return [Kernel("convolution", flops, traffic)] * (of_images + of_weight) + [Kernel("bias", 0, _bytes(gradient))] * of_bias


def _matrix_product(call: Call) -> list[Kernel]:
    factors = [tensor for tensor in _tensors(call.arguments) if tensor.ndim > 1][-2:]
    flops = 2 * call.result.numel() * factors[0].shape[-1]
    return [Kernel("matrix product", flops, _traffic(call))]


def _batch_norm(call: Call) -> list[Kernel]:
    images, training = _bytes(call.arguments[0]), call.arguments[5]
    if not training:
        return [Kernel("batch norm", 0, 2 * images)]
    # Statistics, their running averages, output.
    return [Kernel("batch norm", 0, images), Kernel("batch norm", 0, 0), Kernel("batch norm", 0, 2 * images)]


def _batch_norm_backward(call: Call) -> list[Kernel]:
    images, training = _bytes(call.arguments[1]), call.arguments[7]
    if not training:
        return [Kernel("batch norm", 0, 2 * images)]
    return [Kernel("batch norm", 0, 2 * images), Kernel("batch norm", 0, 3 * images)]


def _multi_tensor(call: Call) -> list[Kernel]:
    """One launch of PyTorch's multi-tensor kernels per 320 chunks of 65,536 elements and per limited number of tensors."""
    lists = [each for each in call.arguments if isinstance(each, list | tuple) and each and isinstance(each[0], Tensor)]
    chunks = sum(math.ceil(tensor.numel() / CHUNK) for tensor in lists[0])
    launches = max(math.ceil(chunks / MAX_CHUNKS), math.ceil(len(lists[0]) / MAX_TENSORS[min(len(lists), max(MAX_TENSORS))]))
    read = sum(map(_bytes, _tensors(lists)))
    written = read - (sum(map(_bytes, lists[1])) if call.name.startswith("_fused") else 0)  # all but the gradients
    traffic = read + (written if call.name.startswith("_fused") else sum(map(_bytes, lists[0])))
    kind = "optimizer" if call.module is None else _kind(call)
    return [Kernel(kind, 0, traffic // launches)] * launches


def _discrepancy(call: Call) -> list[Kernel]:
    one_launch = call.arguments[0].numel() <= ONE_LAUNCH
    return [Kernel("loss", 0, _traffic(call)), *([] if one_launch else [Kernel("loss", 0, 0)])]


def _average(call: Call) -> list[Kernel]:
    averages, sources, shadows = call.arguments[:3]
    return [Kernel("average", 0, sum(map(_bytes, (*averages, *averages, *sources, *shadows))))]


RULES: dict[str, Callable[[Call], list[Kernel]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "conv2d_relu": _convolution_relu,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _matrix_product),
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    **dict.fromkeys(("_foreach_add_", "_foreach_mul_", "_foreach_copy_", "_fused_adam_", "_fused_adamw_", "_fused_sgd_"), _multi_tensor),
    **dict.fromkeys(("l1_forward", "kl_forward", "js_forward"), _discrepancy),
    "ema_update_": _average,
}


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor, those of an expanded dimension counted once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.itemsize
