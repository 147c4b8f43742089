"""The label that stands for none."""

__all__ = ["IGNORE_INDEX"]

IGNORE_INDEX = -100
"""Of a pixel without a label: what PyTorch's losses leave out unless told otherwise."""
