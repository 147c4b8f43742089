"""Generators, classifiers and segmenters, built by name, and loading and saving of their weights."""

from .catalogue import build_model, is_user_function
from .classifiers import LeNet5, WideResNet, cifar_resnet
from .generation import condition_latents, draw_labels, generate, sample, sample_batches
from .generators import Generator, GeneratorA, GeneratorB, GeneratorC, GeneratorD, GeneratorSettings, build_generator
from .layers import Standardize, UpsampleConv2d
from .pretrained import PRETRAINED, load_encoder, load_pretrained
from .quantized_files import load_quantized, save_quantized
from .segmenters import Segmenter, SmallFcn
from .shipped import is_shipped, shipped_teachers, weights_path
from .vae import Vae
from .weights import load_weights, read_metadata, save_weights, state_dict_sha256

__all__ = [
    "PRETRAINED",
    "Generator",
    "GeneratorA",
    "GeneratorB",
    "GeneratorC",
    "GeneratorD",
    "GeneratorSettings",
    "LeNet5",
    "Segmenter",
    "SmallFcn",
    "Standardize",
    "UpsampleConv2d",
    "Vae",
    "WideResNet",
    "build_generator",
    "build_model",
    "cifar_resnet",
    "condition_latents",
    "draw_labels",
    "generate",
    "is_shipped",
    "is_user_function",
    "load_encoder",
    "load_pretrained",
    "load_quantized",
    "load_weights",
    "read_metadata",
    "sample",
    "sample_batches",
    "save_quantized",
    "save_weights",
    "shipped_teachers",
    "state_dict_sha256",
    "weights_path",
]
