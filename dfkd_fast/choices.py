"""Names that options and recipes choose from, without what they name: the command line shows them before PyTorch is imported."""

from typing import Literal

__all__ = ["DeviceName", "Loader", "PrecisionName", "PrecisionSetting"]

DeviceName = Literal["auto", "cpu", "cuda"]
Loader = Literal["auto", "dali", "torchvision"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
PrecisionSetting = Literal["auto", "fp32", "bf16", "fp16"]
