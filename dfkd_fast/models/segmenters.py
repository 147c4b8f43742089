"""Semantic segmenters: torchvision's by name, its DeepLabv3 and LR-ASPP heads on any encoder of timm, and a small one for toys."""

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError, first_line, unknown

from .pretrained import PRETRAINED

__all__ = ["HEADS", "Segmenter", "SmallFcn", "build_segmenter", "is_segmenter", "segmenters"]

HEADS = {"deeplabv3": 8, "lraspp": 16}
"""Heads by name, and the stride of the encoder's last map that their papers give them."""
DEEPLAB_ON_MOBILENET = "deeplabv3_mobilenet_v2"
SMALL = re.compile(r"small_fcn([1-9]\d{0,3})")


def segmenters() -> list[str]:
    """Names of segmenters, but for those of the form ``HEAD:ENCODER``."""
    import torchvision

    return ["small_fcn16", DEEPLAB_ON_MOBILENET, *torchvision.models.list_models(torchvision.models.segmentation)]


class Segmenter(nn.Module):
    """An encoder of timm, a head of torchvision, and bilinear upsampling: images (B, C, H, W) → logits (B, classes, H, W).

    Args:
        head: ``deeplabv3`` (arXiv 1706.05587): atrous spatial pyramid pooling with 256 channels at output stride 8;
            ``lraspp`` (arXiv 1905.02244): two 1×1 branches at output stride 16 and a skip from stride 8.
        encoder: a name of timm's, or ``efficientnet_lite0``; with ``/4`` behind it, its first four stages only.
        num_classes: number of logits a pixel.
        channels: of the input images.

    Raises:
        DfkdError: timm has no such encoder, or it cannot be had at that stride or with so many stages.
    """

    def __init__(self, head: str, encoder: str, num_classes: int, channels: int = 3) -> None:
        import timm
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
        from torchvision.models.segmentation.lraspp import LRASPPHead

        super().__init__()
        encoder, cut, stages = encoder.partition("/")
        if cut and not (stages.isdecimal() and int(stages) > 1):
            raise DfkdError(f"encoder {encoder + cut + stages!r}: its stages must be a whole number from 2 on")
        if encoder not in PRETRAINED and not timm.is_model(encoder):
            raise unknown("encoder", encoder, timm.list_models(f"*{encoder}*")[:20] or [*PRETRAINED, "mobilenetv2_100", "resnet50"])
        name = PRETRAINED[encoder].timm_name if encoder in PRETRAINED else encoder
        try:
            wanted: dict[str, Any] = {"out_indices": tuple(range(int(stages)))} if stages else {}
            self.backbone = timm.create_model(name, features_only=True, in_chans=channels, output_stride=HEADS[head], **wanted)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AssertionError, IndexError) as error:
            stage = f" with {stages} stages" if stages else ""
            raise DfkdError(f"encoder {encoder!r} cannot be had at output stride {HEADS[head]}{stage}: {first_line(error)}") from error
        maps: Any = self.backbone.feature_info
        if stages and (last := re.match(r"blocks\.(\d+)", maps.module_name()[-1])):
            blocks: Any = self.backbone.blocks
            self.backbone.blocks = blocks[: int(last[1]) + 1]  # timm's efficient networks keep what nobody asked for
        widths, strides = maps.channels(), maps.reduction()
        self.low = max(index for index, stride in enumerate(strides) if stride <= 8 and index < len(strides) - 1)
        """The map that LR-ASPP has its skip from."""
        self.skips = head == "lraspp"
        self.classifier: nn.Module
        if self.skips:
            self.classifier = LRASPPHead(widths[self.low], widths[-1], num_classes, inter_channels=128)
        else:
            self.classifier = DeepLabHead(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone(images)
        seen: Any = {"low": maps[self.low], "high": maps[-1]} if self.skips else maps[-1]
        return F.interpolate(self.classifier(seen), size=images.shape[-2:], mode="bilinear", align_corners=False)


class SmallFcn(nn.Sequential):
    """Three convolutions with batch norm at full and half resolution, a 1×1 convolution to logits, and bilinear upsampling.

    Args:
        width: channels of the first convolution; the others have twice as many.
        num_classes: number of logits a pixel.
        channels: of the input images, whose sides are even.
    """

    def __init__(self, width: int, num_classes: int, channels: int = 3) -> None:
        def convolution(before: int, after: int, **how: Any) -> list[nn.Module]:
            return [nn.Conv2d(before, after, kernel_size=3, bias=False, **how), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

        super().__init__(
            *convolution(channels, width, padding=1),
            *convolution(width, 2 * width, padding=1, stride=2),
            *convolution(2 * width, 2 * width, padding=2, dilation=2),
            nn.Conv2d(2 * width, num_classes, kernel_size=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        )


def is_segmenter(name: str) -> bool:
    """Whether :func:`build_segmenter` knows the name, or what it begins with."""
    return name.partition(":")[0] in HEADS or SMALL.fullmatch(name) is not None or name.removeprefix("torchvision:") in segmenters()


def build_segmenter(name: str, num_classes: int, channels: int) -> nn.Module:
    """A freshly initialised segmenter by a name of :func:`segmenters`, by ``small_fcn<width>``, or by ``HEAD:ENCODER``.

    torchvision's own return a dict with the logits under ``out``.

    Raises:
        DfkdError: no such encoder, or a network that cannot have so many channels.
    """
    if small := SMALL.fullmatch(name):
        return SmallFcn(int(small[1]), num_classes, channels)
    if name == DEEPLAB_ON_MOBILENET:
        return Segmenter("deeplabv3", "mobilenetv2_100", num_classes, channels)
    head, _, encoder = name.partition(":")
    if head in HEADS:
        return Segmenter(head, encoder, num_classes, channels)
    if channels != 3:
        raise DfkdError(f"model {name!r}: torchvision's networks take 3 channels, not {channels}; HEAD:ENCODER takes any")
    import torchvision

    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
