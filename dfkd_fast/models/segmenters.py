"""Semantic segmentation networks: torchvision's, its DeepLabv3 and LR-ASPP heads on any timm encoder, and a small FCN."""

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.errors import DfkdError, first_line, unknown

from .pretrained import PRETRAINED

__all__ = ["HEADS", "Segmenter", "SmallFcn", "build_segmenter", "is_segmenter", "segmenters"]

HEADS = {"deeplabv3": 8, "lraspp": 16}
"""Output stride of the encoder by head, as in the papers."""
DEEPLAB_ON_MOBILENET = "deeplabv3_mobilenet_v2"
SMALL = re.compile(r"small_fcn([1-9]\d{0,3})")


def segmenters() -> list[str]:
    """Returns the names that :func:`build_segmenter` accepts, except those of the form ``HEAD:ENCODER``."""
    import torchvision

    return ["small_fcn16", DEEPLAB_ON_MOBILENET, *torchvision.models.list_models(torchvision.models.segmentation)]


class Segmenter(nn.Module):
    """A timm encoder, a torchvision segmentation head, and bilinear upsampling to the size of the images.

    Shape: (B, channels, H, W) → (B, num_classes, H, W).

    Args:
        head: ``deeplabv3`` (arXiv 1706.05587): atrous spatial pyramid pooling with 256 channels at output stride 8;
            ``lraspp`` (arXiv 1905.02244): two 1×1 branches at output stride 16 and a skip connection from stride 8.
        encoder: a timm name, or ``efficientnet_lite0``; the suffix ``/4`` keeps only its first four stages.
        num_classes: number of logits per pixel.
        channels: number of channels of the input images.

    Raises:
        DfkdError: timm has no encoder of this name, or the encoder does not support the output stride or the number of stages.
    """

    def __init__(self, head: str, encoder: str, num_classes: int, channels: int = 3) -> None:
        import timm
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
        from torchvision.models.segmentation.lraspp import LRASPPHead

        super().__init__()
        encoder, cut, stages = encoder.partition("/")
        if cut and not (stages.isdecimal() and int(stages) > 1):
            raise DfkdError(f"encoder {encoder + cut + stages!r}: the number of stages must be an integer ≥ 2")
        if encoder not in PRETRAINED and not timm.is_model(encoder):
            raise unknown("encoder", encoder, timm.list_models(f"*{encoder}*")[:20] or [*PRETRAINED, "mobilenetv2_100", "resnet50"])
        name = PRETRAINED[encoder].timm_name if encoder in PRETRAINED else encoder
        try:
            options: dict[str, Any] = {"out_indices": tuple(range(int(stages)))} if stages else {}
            self.backbone = timm.create_model(name, features_only=True, in_chans=channels, output_stride=HEADS[head], **options)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AssertionError, IndexError) as error:
            stage = f" with {stages} stages" if stages else ""
            raise DfkdError(f"encoder {encoder!r} does not support output stride {HEADS[head]}{stage}: {first_line(error)}") from error
        info: Any = self.backbone.feature_info
        if stages and (last := re.match(r"blocks\.(\d+)", info.module_name()[-1])):
            blocks: Any = self.backbone.blocks
            self.backbone.blocks = blocks[: int(last[1]) + 1]  # timm's efficient networks keep the blocks after the last output
        widths, strides = info.channels(), info.reduction()
        self.low = max(index for index, stride in enumerate(strides) if stride <= 8 and index < len(strides) - 1)
        """Index of the feature map that the skip connection of LR-ASPP uses."""
        self.has_skip = head == "lraspp"
        self.classifier: nn.Module
        if self.has_skip:
            self.classifier = LRASPPHead(widths[self.low], widths[-1], num_classes, inter_channels=128)
        else:
            self.classifier = DeepLabHead(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        head_input: Any = {"low": features[self.low], "high": features[-1]} if self.has_skip else features[-1]
        return F.interpolate(self.classifier(head_input), size=images.shape[-2:], mode="bilinear", align_corners=False)


class SmallFcn(nn.Sequential):
    """Three convolutions with batch norm at full and half resolution, a 1×1 convolution to logits, and bilinear upsampling.

    Shape: (B, channels, H, W) with even H and W → (B, num_classes, H, W).

    Args:
        width: output channels of the first convolution; the others have twice as many.
        num_classes: number of logits per pixel.
        channels: number of channels of the input images.
    """

    def __init__(self, width: int, num_classes: int, channels: int = 3) -> None:
        def conv_bn_relu(in_channels: int, out_channels: int, **options: Any) -> list[nn.Module]:
            return [
                nn.Conv2d(in_channels, out_channels, kernel_size=3, bias=False, **options),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]

        super().__init__(
            *conv_bn_relu(channels, width, padding=1),
            *conv_bn_relu(width, 2 * width, padding=1, stride=2),
            *conv_bn_relu(2 * width, 2 * width, padding=2, dilation=2),
            nn.Conv2d(2 * width, num_classes, kernel_size=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        )


def is_segmenter(name: str) -> bool:
    """Returns True if :func:`build_segmenter` accepts the name; the encoder in ``HEAD:ENCODER`` is not checked."""
    return name.partition(":")[0] in HEADS or SMALL.fullmatch(name) is not None or name.removeprefix("torchvision:") in segmenters()


def build_segmenter(name: str, num_classes: int, channels: int) -> nn.Module:
    """Builds a randomly initialized segmentation network.

    Args:
        name: one of :func:`segmenters`, ``small_fcn<width>``, or ``HEAD:ENCODER`` (see :class:`Segmenter`).
        num_classes: number of logits per pixel.
        channels: number of channels of the input images.

    Returns:
        A module from images (B, channels, H, W) to logits (B, num_classes, H, W); torchvision's networks return a dict with the
        logits under ``out``.

    Raises:
        DfkdError: the encoder is unknown, or the network does not support this number of channels.
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
