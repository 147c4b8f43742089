"""Workloads: a computation on fixed inputs, with several implementations (providers).

A case is a workload in a mode:

- forward: the outputs, under ``torch.no_grad()``;
- backward: the gradients, after a forward pass that is not measured;
- full: forward and backward pass;
- update: for operations that modify their inputs in place.

A fused forward pass that computes gradients makes "backward" cheap and is included in "full", which is what a training step runs.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from dfkd_fast.kernels import dispatch
from dfkd_fast.kernels.dispatch import Backend, interpreting, unavailable_reason, use_backend

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "FunctionWorkload",
    "Mode",
    "Provider",
    "Results",
    "Trial",
    "Workload",
    "backend_context",
    "default_backends",
    "default_providers",
    "parse_shape",
]

Mode = Literal["forward", "backward", "full", "update"]
Results = dict[str, Tensor]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Provider:
    """An implementation of a workload."""

    name: str
    call: Callable[..., Any]
    """Function of the inputs; for the EMA, the function that sets it up (see ``ema.Setup``)."""
    backend: Backend | None = None
    """Backend to force during the call; for our kernels only."""
    unavailable: str | None = None
    """Why it cannot be measured here, or None."""
    omitted: tuple[str, ...] = ()
    """Name suffixes of the results that it does not compute."""
    capturable: bool = True
    """Whether it can be captured in a CUDA graph, which requires that it does not synchronize."""


@dataclass(frozen=True)
class Trial:
    """A provider prepared for repeated runs of one case, on its own inputs."""

    run: Callable[[Any], object]
    """The measured function, called with the result of ``prepare``."""
    results: Callable[[], Results]
    """Run once and return the results to be compared with the reference."""
    context: Callable[[], AbstractContextManager[None]]
    """Entered before ``prepare`` and ``run``, not measured."""
    prepare: Callable[[], Any] = lambda: None
    capturable: bool = False
    sleep_cycles: int = 0
    """Device sleep before a measured call, in clock cycles, which hides the launch overhead."""


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """A computation on fixed inputs."""

    kernel: str
    variant: str
    size: str
    dtype: torch.dtype
    layout: str
    modes: tuple[Mode, ...]
    quick: bool
    """Whether it is part of the default selection, without ``--all``."""
    rounded: tuple[str, ...] = ()
    """Results in float32 that may be computed from values that were rounded to ``dtype``."""

    @abstractmethod
    def floor_bytes(self, mode: Mode) -> int:
        """Return the minimum memory traffic in bytes: each input read once, each result written once."""

    @abstractmethod
    def providers(self, device: torch.device, backends: Sequence[Backend]) -> list[Provider]:
        """Return the providers, including our ``backends``; the first is "eager"."""

    @abstractmethod
    def trial(self, provider: Provider, mode: Mode, device: torch.device) -> Trial:
        """Return a trial of a provider on new copies of the inputs."""

    @abstractmethod
    def expected(self, mode: Mode, device: torch.device) -> Results:
        """Return the results in float64."""


@dataclass(frozen=True, kw_only=True)
class FunctionWorkload(Workload):
    """A differentiable function of tensors, which may also modify some of them in place."""

    inputs: Callable[[torch.device], dict[str, Tensor]]
    """Returns the inputs by name, in the order of the arguments; deterministic per device."""
    outputs: tuple[str, ...]
    floors: Mapping[Mode, int]
    eager: Callable[..., Any]
    ours: Callable[..., Any]
    oracle: Callable[..., Any]
    """Float64 reference."""
    differentiable: tuple[str, ...] = ()
    """Inputs that require a gradient."""
    mutated: tuple[str, ...] = ()
    """Inputs that are modified in place and compared as results."""
    peers: tuple[Provider, ...] = ()
    operation: str | None = None
    """Name in ``kernels.dispatch``, if some backend has no kernel for it."""

    def floor_bytes(self, mode: Mode) -> int:
        """See Workload; each kernel's file documents how it is counted."""
        return self.floors[mode]

    def providers(self, device: torch.device, backends: Sequence[Backend]) -> list[Provider]:
        """See Workload."""
        usual = default_providers(self.eager, self.ours, device, backends)
        if self.operation is not None:
            usual = [one for one in usual if one.backend is None or dispatch.has_kernel(self.operation, one.backend)]
        return [*usual, *self.peers]

    def expected(self, mode: Mode, device: torch.device) -> Results:
        """See Workload."""
        return self._trial(Provider("oracle", self.oracle), mode, device, torch.float64).results()

    def trial(self, provider: Provider, mode: Mode, device: torch.device) -> Trial:
        """See Workload."""
        return self._trial(provider, mode, device, None)

    def _trial(self, provider: Provider, mode: Mode, device: torch.device, dtype: torch.dtype | None) -> Trial:
        call = provider.call
        context = partial(backend_context, provider.backend, mode != "forward")
        with context():
            cotangents = [_cotangent(output) for output in _as_tuple(call(*self._fresh(device, dtype).values()))]
        inputs = self._fresh(device, dtype)
        arguments = tuple(inputs.values())
        differentiable = [inputs[name] for name in self.differentiable]

        def forward(_: object = None) -> Any:
            return call(*arguments)

        def backward(outputs: Any) -> tuple[Tensor, ...]:
            # does not accumulate into .grad
            return torch.autograd.grad(_as_tuple(outputs), differentiable, cotangents)

        def full(_: object) -> tuple[Tensor, ...]:
            outputs = _as_tuple(call(*arguments))
            return *outputs, *backward(outputs)

        gradients = tuple(f"gradient of {name}" for name in self.differentiable)
        functions: dict[Mode, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
            "forward": (forward, self.outputs),
            "backward": (backward, gradients),
            "full": (full, (*self.outputs, *gradients)),
        }
        run, names = functions[mode]
        prepare: Callable[[], Any] = forward if mode == "backward" else lambda: None

        def results() -> Results:
            with context():
                actual = dict(zip(names, _as_tuple(run(prepare())), strict=True))
            return actual | ({} if mode == "backward" else {name: inputs[name].clone() for name in self.mutated})

        # a backward pass runs on the stream of its forward pass, not on the captured one
        return Trial(run, results, context, prepare, provider.capturable and mode != "backward")

    def _fresh(self, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: tensor.to(device, dtype, copy=True).requires_grad_(name in self.differentiable)
            for name, tensor in self.inputs(device).items()
        }


def default_backends(device: torch.device) -> tuple[Backend, ...]:
    """Return our backends that are intended for a device."""
    return ("reference", "triton", "cuda") if device.type == "cuda" else ("reference", "numba")


def default_providers(
    eager: Callable[..., Any], ours: Callable[..., Any], device: torch.device, backends: Sequence[Backend]
) -> list[Provider]:
    """Return eager PyTorch, torch.compile and our backends."""
    # static shapes, which are faster; fullgraph, so that a graph break is an error
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    return [
        Provider("eager", eager),
        Provider("compile", compiled, unavailable=_no_compiler(device)),
        *(Provider(backend, ours, backend, unavailable=_unavailable_reason(backend, device)) for backend in backends),
    ]


def parse_shape(size: str, *lengths: int) -> tuple[int, ...] | None:
    """Parse a shape such as 256x1000; None if it is invalid or its length is not one of ``lengths``."""
    parts = size.split("x")
    if len(parts) not in lengths or not all(part.isdecimal() and int(part) > 0 for part in parts):
        return None
    return tuple(map(int, parts))


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return unavailable_reason("triton")
    compiler = any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))
    return None if compiler else "no C++ compiler"


def _unavailable_reason(backend: Backend, device: torch.device) -> str | None:
    if (reason := unavailable_reason(backend)) is not None:
        return reason
    if backend not in dispatch.backends(device):
        return f"it does not support {device.type} tensors here"
    if backend == "triton" and device.type == "cuda" and interpreting():
        return "Triton's interpreter runs it (TRITON_INTERPRET)"
    return None


@contextmanager
def backend_context(backend: Backend | None, recording: bool) -> Iterator[None]:
    """Context of a call: the forced backend and whether gradients are recorded."""
    with use_backend(backend), torch.set_grad_enabled(recording):
        yield


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _cotangent(output: Tensor) -> Tensor:
    """Return an upstream gradient with the strides of the output; equal values for every dtype."""
    return torch.empty_like(output).copy_(_coarse(output.shape, output.device))


@lru_cache(maxsize=2)
def _coarse(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
