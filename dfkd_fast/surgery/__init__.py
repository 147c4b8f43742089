"""Model surgery: optimized copies of networks that share the originals' parameters.

``sharing`` makes the copies; ``fold``, ``fuse_conv_act``, ``fuse_norm_act``, ``cpu_conv`` and ``precision`` change how they compute;
``quantize`` and ``calibrate`` round to few bits; ``observe`` and ``feature_vectors`` record the inputs and outputs of layers; ``modes`` and
``outputs`` switch modes and extract logits. ``graphs`` and ``tracing`` are what the traced forward passes of several have in common.
"""

from .calibrate import calibrate, check_copy
from .cpu_conv import CpuConv2d, use_cpu_convolutions
from .feature_vectors import Call, FeatureVectors, matched_layers, shared_layers
from .fold import FoldingError, fold, fold_and_verify, has_running_statistics
from .fuse_conv_act import ConvAct2d, fuse_conv_acts
from .fuse_norm_act import BatchNormAct2d, ConvBeforeNorm, fuse_norm_acts
from .modes import deep_copy, dry_run, eval_mode, freeze, keep_running_statistics, weights_frozen
from .observe import Observation, Observer
from .outputs import extract_logits, get_logits, logits_only
from .precision import SpectralNorm, compute_in_float32, find_heads, in_float32, keep_spectral_norms_in_float32, lower_precision
from .quantize import FLOAT, FakeQuantized, FixedStatistics, left_in_float, quantize, quantize_layers, quantized_layers, restore_weights
from .round_weights import round_weights
from .sharing import frozen_copy, sharing_copy

__all__ = [
    "FLOAT",
    "BatchNormAct2d",
    "Call",
    "ConvAct2d",
    "ConvBeforeNorm",
    "CpuConv2d",
    "FakeQuantized",
    "FeatureVectors",
    "FixedStatistics",
    "FoldingError",
    "Observation",
    "Observer",
    "SpectralNorm",
    "calibrate",
    "check_copy",
    "compute_in_float32",
    "deep_copy",
    "dry_run",
    "eval_mode",
    "extract_logits",
    "find_heads",
    "fold",
    "fold_and_verify",
    "freeze",
    "frozen_copy",
    "fuse_conv_acts",
    "fuse_norm_acts",
    "get_logits",
    "has_running_statistics",
    "in_float32",
    "keep_running_statistics",
    "keep_spectral_norms_in_float32",
    "left_in_float",
    "logits_only",
    "lower_precision",
    "matched_layers",
    "quantize",
    "quantize_layers",
    "quantized_layers",
    "restore_weights",
    "round_weights",
    "shared_layers",
    "sharing_copy",
    "use_cpu_convolutions",
    "weights_frozen",
]
