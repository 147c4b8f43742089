"""The label of unlabelled pixels."""

__all__ = ["IGNORE_INDEX"]

IGNORE_INDEX = -100
"""Label of pixels that losses and metrics ignore; PyTorch's default."""
