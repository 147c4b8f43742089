"""Builds networks by name: those of the papers, any of torchvision or timm, or a user's ``module:function``."""

import difflib
import importlib
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.nn.parameter import is_lazy

from dfkd_fast.errors import USER_CODE_ERRORS, DfkdError, describe_exception, first_line, unknown
from dfkd_fast.out_of_memory import is_out_of_memory

from .classifiers import LENET5_HALF, LeNet5, WideResNet, cifar_resnet
from .pretrained import PRETRAINED
from .segmenters import build_segmenter, is_segmenter, segmenters

__all__ = ["build_model", "is_user_function"]

SMALL: dict[str, Callable[[int, int], nn.Module]] = {
    "lenet5": lambda classes, channels: LeNet5(classes, channels),
    "lenet5_half": lambda classes, channels: LeNet5(classes, channels, LENET5_HALF),
    "cifar_resnet18": lambda classes, channels: cifar_resnet((2, 2, 2, 2), classes, channels),
    "cifar_resnet34": lambda classes, channels: cifar_resnet((3, 4, 6, 3), classes, channels),
}


def build_model(name: str, num_classes: int, channels: int) -> nn.Module:
    """Builds a randomly initialized classifier or segmenter.

    Args:
        name: ``lenet5``, ``lenet5_half``, ``cifar_resnet18``, ``cifar_resnet34``, ``wrn<depth>_<width>``
            (``wrn40_2``), ``efficientnet_lite0`` (see :func:`~dfkd_fast.models.load_pretrained`), a
            torchvision or timm name (the prefix ``torchvision:`` or ``timm:`` selects the library), or
            ``module:function``, called as ``function(num_classes=...)``. Segmenters: torchvision's names
            (``deeplabv3_resnet50``), ``deeplabv3_mobilenet_v2``, ``small_fcn<width>`` (``small_fcn16``), and ``deeplabv3:`` or
            ``lraspp:`` followed by a timm encoder.
        num_classes: number of logits.
        channels: number of channels of the input images.

    Returns:
        A module that maps images (N, channels, H, W) to logits, (N, num_classes) for classifiers and (N, num_classes, H, W) for
        segmenters; see :func:`~dfkd_fast.surgery.get_logits` for modules that return a dict or a tuple.

    Raises:
        DfkdError: the name is unknown, or the network does not support this number of channels.
    """
    if name in SMALL:
        return SMALL[name](num_classes, channels)
    if wide := re.fullmatch(r"wrn(\d{1,4})_(\d{1,4})", name):
        depth, width = int(wide[1]), int(wide[2])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise DfkdError(f"model {name!r}: the depth of a wide ResNet must be 6n + 4 (10, 16, 22, 28, 34, 40), its width at least 1")
        return WideResNet(depth, width, num_classes, channels)

    # Importing both takes seconds, so only names that may be theirs pay for it.
    import timm
    import torchvision

    if name in PRETRAINED:
        return timm.create_model(PRETRAINED[name].timm_name, num_classes=num_classes, in_chans=channels)

    library, _, rest = name.rpartition(":")
    if is_segmenter(name):
        return build_segmenter(name.removeprefix("torchvision:"), num_classes, channels)
    if is_user_function(name):
        return _build_user_network(library, rest, num_classes)
    if library != "timm" and rest in torchvision.models.list_models(torchvision.models):
        if channels != 3:
            raise DfkdError(f"model {name!r}: torchvision's networks take 3 channels, not {channels}; timm's take any (timm:{rest})")
        return torchvision.models.get_model(rest, num_classes=num_classes)
    if library != "torchvision" and timm.is_model(rest):
        try:
            return timm.create_model(rest, num_classes=num_classes, in_chans=channels)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DfkdError(f"model {name!r}: {first_line(error)}") from error
    nearest = difflib.get_close_matches(
        rest, [*torchvision.models.list_models(torchvision.models), *segmenters(), *timm.list_models()], n=4
    )
    raise unknown("model", name, [*SMALL, *PRETRAINED, "wrn40_2", "wrn16_1", "wrn16_2", *nearest])


def is_user_function(name: str) -> bool:
    """Returns True if ``name`` is ``module:function``, which :func:`build_model` imports and calls.

    A name of this form that was read from a file must be confirmed by the user before the network is built.
    """
    return name.rpartition(":")[0] not in ("", "torchvision", "timm") and not is_segmenter(name)


def _build_user_network(module: str, function: str, num_classes: int) -> nn.Module:
    name = f"{module}:{function}"
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        importable = ".".join(re.findall(r"\w+", module.removesuffix(".py")))
        example = f"{importable or 'networks'}:{function or 'build'}"
        raise DfkdError(f"model {name!r}: must be module:function with an importable module name, such as {example}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        build = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise DfkdError(f"model {name!r}: {_import_error_message(module, str(error.name))}") from error
    except USER_CODE_ERRORS as error:
        raise DfkdError(f"model {name!r}: {describe_exception(error)}") from error
    if not callable(build) or isinstance(build, nn.Module):
        raise DfkdError(f"model {name!r} must be a function, not {type(build).__name__}")
    try:
        network = build(num_classes=num_classes)
    except USER_CODE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise DfkdError(f"model {name!r}: called as {function}(num_classes={num_classes}): {describe_exception(error)}") from error
    if not isinstance(network, nn.Module):
        raise DfkdError(f"model {name!r} must return a torch.nn.Module, not {type(network).__name__}")
    for tensor_name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
        if tensor.is_meta and not is_lazy(tensor):
            raise DfkdError(f"model {name!r}: {tensor_name} is on the meta device and has no values: build the network on the CPU")
    return network


def _import_error_message(module: str, missing: str) -> str:
    """Returns the error message for ``missing``, the module that was not found while ``module`` was imported."""
    if module.endswith(".py"):
        return f"must be an importable module name, without .py: {module.removesuffix('.py')}"
    if module == missing or module.startswith(f"{missing}."):
        return f"there is no module {missing!r}, neither in the working folder {Path.cwd()} nor among the installed packages"
    return f"it needs the module {missing!r}, which is not installed"
