"""Networks: generators, classifiers and segmenters by name, the frozen teacher, and their weights on disk."""

from .catalogue import build_model, names_code
from .classifiers import CifarResNet, LeNet5, WideResNet
from .convolution import CpuConv2d, use_cpu_convolutions
from .frozen import FoldingError, Observation, Observer, fold, folded_and_checked, freeze, has_running_statistics, lower_precision
from .generators import (
    Generator,
    GeneratorA,
    GeneratorB,
    GeneratorC,
    GeneratorD,
    GeneratorSettings,
    Standardize,
    UpsampleConv2d,
    build_generator,
    conditioned,
    draw_labels,
    generate,
    sample,
)
from .heads import compute_in_float32, find_heads, in_float32
from .modes import auxiliary_outputs, dry_run, evaluating, logits_of, logits_only, untaught
from .norms import BatchNormLeakyReLU2d, fuse_leaky_relus, keep_spectral_norms_in_float32
from .pretrained import PRETRAINED, load_encoder, load_pretrained
from .segmenters import Segmenter, SmallFcn
from .sharing import frozen_copy, sharing_copy
from .vae import Vae
from .weights import load_weights, read_metadata, save_weights, sha256_of

__all__ = [
    "PRETRAINED",
    "BatchNormLeakyReLU2d",
    "CifarResNet",
    "CpuConv2d",
    "FoldingError",
    "Generator",
    "GeneratorA",
    "GeneratorB",
    "GeneratorC",
    "GeneratorD",
    "GeneratorSettings",
    "LeNet5",
    "Observation",
    "Observer",
    "Segmenter",
    "SmallFcn",
    "Standardize",
    "UpsampleConv2d",
    "Vae",
    "WideResNet",
    "auxiliary_outputs",
    "build_generator",
    "build_model",
    "compute_in_float32",
    "conditioned",
    "draw_labels",
    "dry_run",
    "evaluating",
    "find_heads",
    "fold",
    "folded_and_checked",
    "freeze",
    "frozen_copy",
    "fuse_leaky_relus",
    "generate",
    "has_running_statistics",
    "in_float32",
    "keep_spectral_norms_in_float32",
    "load_encoder",
    "load_pretrained",
    "load_weights",
    "logits_of",
    "logits_only",
    "lower_precision",
    "names_code",
    "read_metadata",
    "sample",
    "save_weights",
    "sha256_of",
    "sharing_copy",
    "untaught",
    "use_cpu_convolutions",
]
