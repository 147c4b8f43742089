"""How a pretrained network wants its images: what torchvision's weights and timm's configurations say."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfkd_fast.errors import DfkdError

from .eval_transform import EvalTransform, Interpolation

__all__ = ["resolve_eval_transform"]

KNOWN = {"efficientnet_lite0": EvalTransform(256, 224, "bicubic", 3 * (127 / 255,), 3 * (128 / 255,))}


def resolve_eval_transform(model: str, weights: Path | None = None, *, log: Callable[[str], None] = lambda note: None) -> EvalTransform:
    """The preprocessing that a network by name was trained for.

    Args:
        model: a name of torchvision or timm, or of a network with weights in a package.
        weights: the file that is going to be loaded: its name tells which of torchvision's weights it holds.
        log: told, in a line each, what had to be assumed.

    Raises:
        DfkdError: nothing is known about that name.
    """
    if model in KNOWN:
        return KNOWN[model]
    import timm
    import torchvision

    library, _, name = model.rpartition(":")
    if library in ("", "torchvision") and name in torchvision.models.list_models(torchvision.models):
        return _torchvisions(name, weights, log)
    if library in ("", "timm") and timm.is_model(name):
        return _timms(name, log)
    raise DfkdError(f"model {model!r}: neither torchvision nor timm says how it sees images; set data.image_size, data.mean and data.std")


def _torchvisions(name: str, weights: Path | None, log: Callable[[str], None]) -> EvalTransform:
    import torchvision

    published = list(torchvision.models.get_model_weights(name))
    if not published:
        raise DfkdError(f"model {name!r}: torchvision has no weights for it, so nothing says how it sees images")
    named = [entry for entry in published if weights is not None and Path(entry.url).stem in weights.stem]
    if not named and len({str(entry.transforms()) for entry in published}) > 1:
        others = ", ".join(entry.name for entry in published)
        log(f"{name}: which of torchvision's weights these are ({others}) is not in the file's name; seen as {published[0].name}")
    seen = (named or published)[0].transforms()
    return EvalTransform(
        seen.resize_size[0], seen.crop_size[0], _interpolation(name, seen.interpolation.value, log), tuple(seen.mean), tuple(seen.std)
    )


def _timms(name: str, log: Callable[[str], None]) -> EvalTransform:
    import timm
    from timm.data.config import resolve_data_config

    known = timm.get_pretrained_cfg(name)
    if known is None:
        raise DfkdError(f"model {name!r}: timm has no weights for it, so nothing says how it sees images")
    seen: dict[str, Any] = resolve_data_config({}, pretrained_cfg=known.to_dict())  # type: ignore[no-untyped-call]
    _, height, width = seen["input_size"]
    if height != width or seen["crop_mode"] != "center":
        log(f"{name}: timm sees {height} x {width}, crop {seen['crop_mode']!r}; here a square from the middle, so figures may differ")
    resize = math.floor(height / seen["crop_pct"])
    return EvalTransform(resize, height, _interpolation(name, seen["interpolation"], log), tuple(seen["mean"]), tuple(seen["std"]))


def _interpolation(name: str, wanted: str, log: Callable[[str], None]) -> Interpolation:
    if wanted == "bilinear":
        return "bilinear"
    if wanted != "bicubic":
        log(f"{name}: is resized by {wanted!r}, here by 'bicubic', so figures may differ")
    return "bicubic"
