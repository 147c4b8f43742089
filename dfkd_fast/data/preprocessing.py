"""Preprocessing of pretrained networks, from the metadata of torchvision's weights and timm's configurations."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfkd_fast.errors import DfkdError

from .eval_transform import EvalTransform, Interpolation

__all__ = ["resolve_eval_transform"]

PACKAGED = {"efficientnet_lite0": EvalTransform(256, 224, "bicubic", 3 * (127 / 255,), 3 * (128 / 255,))}


def resolve_eval_transform(model: str, weights: Path | None = None, *, log: Callable[[str], None] = lambda note: None) -> EvalTransform:
    """Returns the evaluation preprocessing of a pretrained network.

    Args:
        model: a torchvision or timm name, or a key of :data:`~dfkd_fast.models.PRETRAINED`.
        weights: the weights file, whose name identifies one of torchvision's weights.
        log: called with one line for each assumption.

    Raises:
        DfkdError: the preprocessing of the network is unknown.
    """
    if model in PACKAGED:
        return PACKAGED[model]
    import timm
    import torchvision

    library, _, name = model.rpartition(":")
    if library in ("", "torchvision") and name in torchvision.models.list_models(torchvision.models):
        return _from_torchvision(name, weights, log)
    if library in ("", "timm") and timm.is_model(name):
        return _from_timm(name, log)
    raise DfkdError(
        f"model {model!r}: neither torchvision nor timm specifies its preprocessing; set data.image_size, data.mean and data.std"
    )


def _from_torchvision(name: str, weights: Path | None, log: Callable[[str], None]) -> EvalTransform:
    import torchvision

    published = list(torchvision.models.get_model_weights(name))
    if not published:
        raise DfkdError(f"model {name!r}: torchvision has no weights for it, which would specify its preprocessing")
    matching = [entry for entry in published if weights is not None and Path(entry.url).stem in weights.stem]
    if not matching and len({str(entry.transforms()) for entry in published}) > 1:
        names = ", ".join(entry.name for entry in published)
        log(f"{name}: the file name matches none of torchvision's weights ({names}); uses the preprocessing of {published[0].name}")
    preset = (matching or published)[0].transforms()
    interpolation = _interpolation(name, preset.interpolation.value, log)
    return EvalTransform(preset.resize_size[0], preset.crop_size[0], interpolation, tuple(preset.mean), tuple(preset.std))


def _from_timm(name: str, log: Callable[[str], None]) -> EvalTransform:
    import timm
    from timm.data.config import resolve_data_config

    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is None:
        raise DfkdError(f"model {name!r}: timm has no weights for it, which would specify its preprocessing")
    config: dict[str, Any] = resolve_data_config({}, pretrained_cfg=pretrained_cfg.to_dict())  # type: ignore[no-untyped-call]
    _, height, width = config["input_size"]
    if height != width or config["crop_mode"] != "center":
        log(f"{name}: timm uses {height} x {width}, crop {config['crop_mode']!r}; a square center crop is used, so metrics may differ")
    resize = math.floor(height / config["crop_pct"])
    return EvalTransform(resize, height, _interpolation(name, config["interpolation"], log), tuple(config["mean"]), tuple(config["std"]))


def _interpolation(name: str, interpolation: str, log: Callable[[str], None]) -> Interpolation:
    if interpolation == "bilinear":
        return "bilinear"
    if interpolation != "bicubic":
        log(f"{name}: 'bicubic' interpolation is used instead of {interpolation!r}, so metrics may differ")
    return "bicubic"
