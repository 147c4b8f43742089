"""Label maps and the per-class IoU table of segmenters."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from torch import Tensor, nn

from dfkd_fast.console import print_table
from dfkd_fast.surgery import eval_mode, get_logits

__all__ = ["label_maps", "print_iou"]


def label_maps(networks: Sequence[nn.Module], images: Tensor, colours: Tensor) -> list[Tensor]:
    """Returns the predicted label maps of each network as RGB images, uint8 (N, 3, H, W).

    Args:
        networks: map images to logits (N, classes, H, W).
        images: normalized, (N, C, H, W).
        colours: of the classes, uint8 (classes, 3).
    """
    maps = []
    for network in networks:
        with eval_mode(network):
            labels = get_logits(network(images)).argmax(1)
        maps.append(colours.to(labels.device)[labels].movedim(-1, 1))
    return maps


def print_iou(console: Console, iou: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print a table of the IoU in percent by class and network; a dash for a class that occurs nowhere. Prints nothing without networks."""
    if not iou:
        return
    names = list(next(iter(iou.values())))
    rows = [(name, *("–" if by_class[name] is None else f"{by_class[name]:.2f}" for by_class in iou.values())) for name in names]
    print_table(console, ("IoU (%)", *iou), rows, figures=True)
