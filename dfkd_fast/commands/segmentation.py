"""What is told of networks that label every pixel, beside their mIoU."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from torch import Tensor, nn

from dfkd_fast.console import print_table
from dfkd_fast.surgery import eval_mode, get_logits

__all__ = ["label_maps", "print_iou"]


def label_maps(networks: Sequence[nn.Module], images: Tensor, colours: Tensor) -> list[Tensor]:
    """What networks see in images (N, C, H, W), painted in the classes' colours: uint8 (N, 3, H, W) each.

    Args:
        networks: images → logits (N, classes, H, W).
        images: in the networks' normalised space.
        colours: uint8 (classes, 3).
    """
    maps = []
    for network in networks:
        with eval_mode(network):
            labels = get_logits(network(images)).argmax(1)
        maps.append(colours.to(labels.device)[labels].movedim(-1, 1))
    return maps


def print_iou(console: Console, iou: Mapping[str, Mapping[str, float | None]]) -> None:
    """A table of the IoU in percent by network and class; a class that occurs nowhere has none. Of no network, nothing."""
    if not iou:
        return
    names = list(next(iter(iou.values())))
    rows = [(name, *("–" if found[name] is None else f"{found[name]:.2f}" for found in iou.values())) for name in names]
    print_table(console, ("IoU (%)", *iou), rows, figures=True)
