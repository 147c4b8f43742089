"""Selection of the fastest convolution algorithm on a CPU by measurement. Measurements are kept on disk."""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_fast.files import replacing
from dfkd_fast.kernels import dispatch, winograd_conv2d
from dfkd_fast.kernels.conv import col2im_conv2d, im2col_conv2d, output_size
from dfkd_fast.log import LOGGER

__all__ = ["Convolution", "fastest_algorithm", "measuring"]

MIN_MULTIPLICATIONS = 1 << 23
"""Smaller convolutions are not measured: their time is that of the calls."""
MAX_PATCHES_BYTES = 1 << 27
"""Largest matrix of patches for which im2col is measured."""
MAX_PIXELS_PER_CHANNEL = 8
"""Output pixels of a batch per output channel up to which im2col is measured. With more, reordering the weights, which it saves, takes
little of the time of PyTorch's convolutions."""
MAX_FEW_CHANNELS = 16
"""Output channels up to which col2im is measured."""
MIN_WINOGRAD_CHANNELS = 32
"""Input and output channels from which Winograd's algorithm is measured; with fewer, its transforms take longer than it saves."""
MARGIN = 0.9
"""Fraction of the time of PyTorch's convolution that another algorithm may take at most to be chosen, because measurements are noisy."""
ROUNDS, SECONDS = 7, 0.3
"""Number of rounds in which all algorithms are timed, and the time after which no further round begins."""


class Convolution(NamedTuple):
    """What the time of a convolution without groups depends on."""

    x: tuple[int, ...]
    """Shape (N, C_in, H, W) of the input."""
    weight: tuple[int, ...]
    """Shape (C_out, C_in, kh, kw) of the filters."""
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype
    """Type in which it is computed."""
    of_x: bool
    """Whether the gradient with respect to the input is computed."""
    of_weight: bool
    """Whether the gradient with respect to the filters is computed."""
    cached_weight: bool
    """Whether the filters are frozen, so that transformed ones are kept."""

    def __str__(self) -> str:
        gradients = "".join(f" d{name}" for name, needed in (("x", self.of_x), ("w", self.of_weight)) if needed)
        shapes = " ".join("x".join(map(str, shape)) for shape in (self.x, self.weight))
        numbers = " ".join(",".join(map(str, pair)) for pair in (self.stride, self.padding, self.dilation))
        return f"{shapes} {numbers} {str(self.dtype).removeprefix('torch.')}{gradients}{' frozen' if self.cached_weight else ''}"

    @property
    def algorithms(self) -> list[str]:
        """Names of the algorithms that may be faster than PyTorch's for this convolution."""
        pixels, (channels, rows, columns) = self.x[0] * math.prod(self._output_size), (self.weight[0], *self.weight[2:])
        if pixels * math.prod(self.weight) < MIN_MULTIPLICATIONS:
            return []
        single_steps = self.stride == self.dilation == (1, 1)
        found = []
        patches = pixels * math.prod(self.weight[1:]) * self.dtype.itemsize
        if pixels <= MAX_PIXELS_PER_CHANNEL * channels and patches <= MAX_PATCHES_BYTES:
            found.append("im2col")
        # In half precision every partial sum would be rounded. With larger padding, some output pixels depend on no input pixel.
        small_padding = self.padding[0] < rows and self.padding[1] < columns
        if channels <= MAX_FEW_CHANNELS and self.dtype.itemsize >= 4 and single_steps and small_padding and rows * columns > 1:
            found.append("col2im")
        has_kernels = dispatch.unavailable_reason("numba") is None and dispatch.forced() in (None, "numba")
        supported = self.dtype == torch.float32 and has_kernels
        if (rows, columns) == (3, 3) and single_steps and min(self.weight[:2]) >= MIN_WINOGRAD_CHANNELS and supported:
            found.append("winograd")
        return found

    @property
    def _output_size(self) -> tuple[int, int]:
        x, weight = (torch.empty(shape, device="meta") for shape in (self.x, self.weight))
        height, width = output_size(x, weight, self.stride, self.padding, self.dilation)
        return max(height, 0), max(width, 0)

    def compute(self, algorithm: str, x: Tensor, weight: Tensor) -> Tensor:
        """Return the output without bias, computed with an algorithm; both tensors are channels-last and of the type :attr:`dtype`."""
        match algorithm:
            case "im2col":
                return im2col_conv2d(x, weight, self.stride, self.padding, self.dilation)
            case "col2im":
                return col2im_conv2d(x, weight, self.padding)
            case "winograd":
                return winograd_conv2d(x, weight, None, self.padding, cache_weight=self.cached_weight)
            case _:
                return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)


_measuring = False


@contextmanager
def measuring() -> Iterator[None]:
    """Context manager in which :func:`fastest_algorithm` selects algorithms, and measures what was not measured before."""
    global _measuring
    previous, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = previous


def fastest_algorithm(convolution: Convolution) -> str:
    """Return the name of the fastest algorithm for a convolution on this CPU; outside of :func:`measuring` always "pytorch".

    A convolution that was never measured on this machine with this number of threads is measured now, forward and backward, and the
    result is kept in the user's cache folder. Other algorithms are chosen only if they are clearly faster.
    """
    if not _measuring:
        return "pytorch"
    key = torch.get_num_threads(), convolution
    if key not in _chosen:
        _chosen[key] = _find(convolution)
    return _chosen[key]


_chosen: dict[tuple[int, Convolution], str] = {}


def _find(convolution: Convolution) -> str:
    """Return the fastest algorithm from the file of measurements, or measure it and add it to the file."""
    candidates = convolution.algorithms
    if not candidates:
        return "pytorch"
    path = _file(torch.get_num_threads())
    with _locked(path):  # another process would disturb the measurement, and must choose the same
        seconds = _read(path).get(str(convolution), {})
        if not seconds.keys() >= {"pytorch", *candidates}:
            seconds = _measure(convolution, ["pytorch", *candidates])
            LOGGER.debug("measured %s: %s", convolution, ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items()))
            if path is not None:
                with suppress(OSError), replacing(path) as part:
                    part.write_text(json.dumps(_read(path) | {str(convolution): seconds}, indent=1) + "\n")
    fastest = min(candidates, key=seconds.__getitem__)
    return fastest if seconds[fastest] <= MARGIN * seconds["pytorch"] else "pytorch"


def _measure(convolution: Convolution, algorithms: list[str]) -> dict[str, float]:
    """Return the shortest time of each algorithm in seconds, forward and backward. Random number generators are not used."""
    # Values do not affect the time, except that subnormal numbers are slow.
    layout: Any = {"dtype": convolution.dtype, "memory_format": torch.channels_last}
    x, weight = (torch.empty(shape, **layout).fill_(0.5) for shape in (convolution.x, convolution.weight))
    inputs = [tensor for tensor, needed in ((x, convolution.of_x), (weight, convolution.of_weight)) if needed]
    for tensor in inputs:
        tensor.requires_grad_()

    def run(algorithm: str) -> None:
        y = convolution.compute(algorithm, x, weight)
        if inputs:
            torch.autograd.grad(y, inputs, gradient)

    with torch.set_grad_enabled(bool(inputs)), torch.autocast("cpu", enabled=False):
        gradient = torch.ones_like(convolution.compute("pytorch", x, weight), memory_format=torch.channels_last)
        for algorithm in algorithms:
            run(algorithm)
        seconds = dict.fromkeys(algorithms, math.inf)
        start = time.perf_counter()
        for _ in range(ROUNDS):
            for algorithm in algorithms:
                seconds[algorithm] = min(seconds[algorithm], _seconds(lambda algorithm=algorithm: run(algorithm)))  # type: ignore[misc]
            if time.perf_counter() - start > SECONDS:
                break
    return {name: round(value, 7) for name, value in seconds.items()}


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@functools.cache
def _file(threads: int) -> Path | None:
    """Return the file of measurements for this CPU, number of threads and version of PyTorch; None if it cannot be written."""
    with suppress(RuntimeError, OSError):  # RuntimeError: no home directory
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfkd_fast" / "convolutions"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder / f"{_cpu()}-{threads}-threads-torch-{torch.__version__}.json"
    return None


def _cpu() -> str:
    with suppress(ImportError):
        from llvmlite import binding

        return str(binding.get_host_cpu_name())
    return torch.backends.cpu.get_cpu_capability()


def _read(path: Path | None) -> dict[str, dict[str, float]]:
    """Return the measurements of a file in seconds, by convolution and algorithm; damaged ones are left out, and so measured again."""
    try:
        content = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(key): value for key, value in content.items() if _is_measurement(value)} if isinstance(content, dict) else {}


def _is_measurement(value: Any) -> bool:
    return isinstance(value, dict) and all(type(seconds) is float and 0 < seconds < math.inf for seconds in value.values())


@contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    """Context manager that holds an exclusive lock beside a file, where the system supports it."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl

            if path is not None:
                fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield
