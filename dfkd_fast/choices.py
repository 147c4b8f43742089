"""Values of options and recipe keys, for the command line, which shows them before PyTorch is imported."""

from typing import Literal

__all__ = ["DeviceName", "Loader", "LogLevel", "PrecisionName", "PrecisionSetting", "Region"]

DeviceName = Literal["auto", "cpu", "cuda"]
Loader = Literal["auto", "dali", "torchvision"]
LogLevel = Literal["debug", "info", "warning", "error"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
PrecisionSetting = Literal["auto", "fp32", "bf16", "fp16"]
Region = Literal["teacher", "student", "generator"]
