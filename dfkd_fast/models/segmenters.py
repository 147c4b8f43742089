"""Semantic segmenters: torchvision's by name, and its DeepLabv3 and LR-ASPP heads on any encoder of timm."""

from typing import Any

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.lraspp import LRASPPHead

from dfkd_fast.errors import DfkdError, first_line, unknown

from .pretrained import PRETRAINED

__all__ = ["HEADS", "SEGMENTERS", "Segmenter", "build_segmenter"]

HEADS = {"deeplabv3": 8, "lraspp": 16}
"""Heads by name, and the stride of the encoder's last map that their papers give them."""
DEEPLAB_ON_MOBILENET = "deeplabv3_mobilenet_v2"
SEGMENTERS: list[str] = [DEEPLAB_ON_MOBILENET, *torchvision.models.list_models(torchvision.models.segmentation)]


class Segmenter(nn.Module):
    """An encoder of timm, a head of torchvision, and bilinear upsampling: images (B, C, H, W) → logits (B, classes, H, W).

    Args:
        head: ``deeplabv3`` (arXiv 1706.05587): atrous spatial pyramid pooling with 256 channels at output stride 8;
            ``lraspp`` (arXiv 1905.02244): two 1×1 branches at output stride 16 and a skip from stride 8.
        encoder: a name of timm's, or ``efficientnet_lite0``.
        num_classes: number of logits a pixel.
        channels: of the input images.

    Raises:
        DfkdError: timm has no such encoder, or it cannot be had at that stride.
    """

    def __init__(self, head: str, encoder: str, num_classes: int, channels: int = 3) -> None:
        import timm

        super().__init__()
        if encoder not in PRETRAINED and not timm.is_model(encoder):
            raise unknown("encoder", encoder, timm.list_models(f"*{encoder}*")[:20] or [*PRETRAINED, "mobilenetv2_100", "resnet50"])
        name = PRETRAINED[encoder].timm_name if encoder in PRETRAINED else encoder
        try:
            self.backbone = timm.create_model(name, features_only=True, in_chans=channels, output_stride=HEADS[head])
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            raise DfkdError(f"encoder {encoder!r} cannot be had at output stride {HEADS[head]}: {first_line(error)}") from error
        maps: Any = self.backbone.feature_info
        widths, strides = maps.channels(), maps.reduction()
        self.low = max(index for index, stride in enumerate(strides) if stride <= 8 and index < len(strides) - 1)
        """The map that LR-ASPP has its skip from."""
        self.classifier: nn.Module
        if head == "deeplabv3":
            self.classifier = DeepLabHead(widths[-1], num_classes)
        else:
            self.classifier = LRASPPHead(widths[self.low], widths[-1], num_classes, inter_channels=128)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone(images)
        seen: Any = {"low": maps[self.low], "high": maps[-1]} if isinstance(self.classifier, LRASPPHead) else maps[-1]
        return F.interpolate(self.classifier(seen), size=images.shape[-2:], mode="bilinear", align_corners=False)


def build_segmenter(name: str, num_classes: int, channels: int) -> nn.Module:
    """A freshly initialised segmenter by a name of :data:`SEGMENTERS`, or by ``HEAD:ENCODER``.

    torchvision's own return a dict with the logits under ``out``.

    Raises:
        DfkdError: no such encoder, or a network that cannot have so many channels.
    """
    if name == DEEPLAB_ON_MOBILENET:
        return Segmenter("deeplabv3", "mobilenetv2_100", num_classes, channels)
    head, _, encoder = name.partition(":")
    if head in HEADS:
        return Segmenter(head, encoder, num_classes, channels)
    if channels != 3:
        raise DfkdError(f"model {name!r}: torchvision's networks take 3 channels, not {channels}; HEAD:ENCODER takes any")
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
