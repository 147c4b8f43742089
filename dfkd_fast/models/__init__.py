"""Networks: generators, classifiers by name, the frozen teacher, and their weights on disk."""

from .catalogue import build_classifier
from .classifiers import CifarResNet, LeNet5, WideResNet
from .frozen import freeze
from .generators import Generator, GeneratorA, GeneratorB, GeneratorSettings, UpsampleConv2d, build_generator, generate
from .modes import evaluating
from .weights import load_weights, read_metadata, save_weights

__all__ = [
    "CifarResNet",
    "Generator",
    "GeneratorA",
    "GeneratorB",
    "GeneratorSettings",
    "LeNet5",
    "UpsampleConv2d",
    "WideResNet",
    "build_classifier",
    "build_generator",
    "evaluating",
    "freeze",
    "generate",
    "load_weights",
    "read_metadata",
    "save_weights",
]
