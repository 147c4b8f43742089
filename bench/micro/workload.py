"""What is measured. A workload is a task on given inputs; its providers do that task, each in its own way.

A case is a workload in a mode:

- forward: the values alone, no gradient recorded;
- backward: the gradients alone, of a forward pass recorded before the clock starts;
- full: a recorded forward pass and its gradients;
- update: for what changes its inputs in place.

What a fused forward pass saves for its backward pass is charged to "full", and makes "backward" cheap: "full" is the mode
in which a training step meets a kernel.
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
    "around",
    "parse_shape",
    "usual_backends",
    "usual_providers",
]

Mode = Literal["forward", "backward", "full", "update"]
Results = dict[str, Tensor]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Provider:
    """One way to do a workload's task."""

    name: str
    call: Callable[..., Any]
    """A function of the inputs; of an average, what sets it up (see ``ema.Setup``)."""
    backend: Backend | None = None
    """Forced around the call: ours only."""
    absent: str | None = None
    """Why it cannot be measured here."""
    lacks: tuple[str, ...] = ()
    """Endings of the names of the results that it does not compute."""
    capturable: bool = True
    """Whether a CUDA graph can hold it: what waits for the device cannot be captured."""


@dataclass(frozen=True)
class Trial:
    """A provider ready to do one case again and again, on inputs of its own."""

    run: Callable[[Any], object]
    """What the clock sees, of what ``prepare`` returned."""
    results: Callable[[], Results]
    """Do it once, and return all that must agree with the oracle."""
    context: Callable[[], AbstractContextManager[None]]
    """Entered around prepare and run, before the clock starts."""
    prepare: Callable[[], Any] = lambda: None
    capturable: bool = False
    sleep_cycles: int = 0
    """How long a GPU sleeps before a call that is measured, so that the host is ahead of it."""


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """A task on given inputs."""

    kernel: str
    variant: str
    size: str
    dtype: torch.dtype
    layout: str
    modes: tuple[Mode, ...]
    quick: bool
    """Whether a run without ``--all`` measures it."""

    @abstractmethod
    def floor_bytes(self, mode: Mode) -> int:
        """The fewest bytes a case must move: each input read once, each result written once."""

    @abstractmethod
    def providers(self, device: torch.device, backends: Sequence[Backend]) -> list[Provider]:
        """Who does the task, our ``backends`` among them; the first is "eager"."""

    @abstractmethod
    def trial(self, provider: Provider, mode: Mode, device: torch.device) -> Trial:
        """A provider on fresh copies of the inputs, which are the same for all."""

    @abstractmethod
    def expected(self, mode: Mode, device: torch.device) -> Results:
        """The results in float64."""


@dataclass(frozen=True, kw_only=True)
class FunctionWorkload(Workload):
    """A differentiable function of tensors, some of which it may also change in place."""

    inputs: Callable[[torch.device], dict[str, Tensor]]
    """The inputs by name, in the order of the arguments; the same at every call on a device."""
    outputs: tuple[str, ...]
    floors: Mapping[Mode, int]
    textbook: Callable[..., Any]
    ours: Callable[..., Any]
    oracle: Callable[..., Any]
    """Of inputs in float64."""
    differentiable: tuple[str, ...] = ()
    """Inputs that require a gradient."""
    mutated: tuple[str, ...] = ()
    """Inputs that change, and are results as well."""
    peers: tuple[Provider, ...] = ()
    operation: str | None = None
    """The name under which ``kernels.dispatch`` knows it, if some backend has no kernel for it."""

    def floor_bytes(self, mode: Mode) -> int:
        """As of Workload; each kernel's file says how it is counted."""
        return self.floors[mode]

    def providers(self, device: torch.device, backends: Sequence[Backend]) -> list[Provider]:
        """As of Workload."""
        usual = usual_providers(self.textbook, self.ours, device, backends)
        if self.operation is not None:
            usual = [one for one in usual if one.backend is None or dispatch.has_kernel(self.operation, one.backend)]
        return [*usual, *self.peers]

    def expected(self, mode: Mode, device: torch.device) -> Results:
        """As of Workload."""
        return self._trial(Provider("oracle", self.oracle), mode, device, torch.float64).results()

    def trial(self, provider: Provider, mode: Mode, device: torch.device) -> Trial:
        """As of Workload."""
        return self._trial(provider, mode, device, None)

    def _trial(self, provider: Provider, mode: Mode, device: torch.device, dtype: torch.dtype | None) -> Trial:
        call = provider.call
        context = partial(around, provider.backend, mode != "forward")
        with context():
            cotangents = [_cotangent(output) for output in _as_tuple(call(*self._fresh(device, dtype).values()))]
        inputs = self._fresh(device, dtype)
        arguments = tuple(inputs.values())
        wanted = [inputs[name] for name in self.differentiable]

        def forward(_: object = None) -> Any:
            return call(*arguments)

        def backward(outputs: Any) -> tuple[Tensor, ...]:
            # .grad is never written, so that there is nothing to add to from one call to the next
            return torch.autograd.grad(_as_tuple(outputs), wanted, cotangents)

        def full(_: object) -> tuple[Tensor, ...]:
            outputs = _as_tuple(call(*arguments))
            return *outputs, *backward(outputs)

        gradients = tuple(f"gradient of {name}" for name in self.differentiable)
        does: dict[Mode, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
            "forward": (forward, self.outputs),
            "backward": (backward, gradients),
            "full": (full, (*self.outputs, *gradients)),
        }
        run, names = does[mode]
        prepare: Callable[[], Any] = forward if mode == "backward" else lambda: None

        def results() -> Results:
            with context():
                found = dict(zip(names, _as_tuple(run(prepare())), strict=True))
            return found | ({} if mode == "backward" else {name: inputs[name].clone() for name in self.mutated})

        # a backward pass runs on the stream of its forward pass, which is not the one that is captured
        return Trial(run, results, context, prepare, provider.capturable and mode != "backward")

    def _fresh(self, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: tensor.to(device, dtype, copy=True).requires_grad_(name in self.differentiable)
            for name, tensor in self.inputs(device).items()
        }


def usual_backends(device: torch.device) -> tuple[Backend, ...]:
    """Ours that are made for a device."""
    return ("reference", "triton", "cuda") if device.type == "cuda" else ("reference", "numba")


def usual_providers(
    textbook: Callable[..., Any], ours: Callable[..., Any], device: torch.device, backends: Sequence[Backend]
) -> list[Provider]:
    """Plain PyTorch, the same compiled, and our backends."""
    # static shapes: a size is a case, and dynamic ones would be slower; a graph break is an error, not a slower time
    compiled = torch.compile(textbook, fullgraph=True, dynamic=False)
    return [
        Provider("eager", textbook),
        Provider("compile", compiled, absent=_no_compiler(device)),
        *(Provider(backend, ours, backend, absent=_unavailable_reason(backend, device)) for backend in backends),
    ]


def parse_shape(size: str, *lengths: int) -> tuple[int, ...] | None:
    """The shape written as 256x1000; None if it is none, or of none of these lengths."""
    parts = size.split("x")
    if len(parts) not in lengths or not all(part.isdecimal() and int(part) > 0 for part in parts):
        return None
    return tuple(map(int, parts))


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return unavailable_reason("triton")
    found = any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))
    return None if found else "no C++ compiler"


def _unavailable_reason(backend: Backend, device: torch.device) -> str | None:
    if (reason := unavailable_reason(backend)) is not None:
        return reason
    if backend not in dispatch.backends(device):
        return f"it does not serve {device.type} tensors here"
    if backend == "triton" and device.type == "cuda" and interpreting():
        return "Triton's interpreter runs it (TRITON_INTERPRET)"
    return None


@contextmanager
def around(backend: Backend | None, recording: bool) -> Iterator[None]:
    """A backend is forced, and gradients are recorded or not: what is no part of a call's time."""
    with use_backend(backend), torch.set_grad_enabled(recording):
        yield


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _cotangent(output: Tensor) -> Tensor:
    """A gradient to send back, laid out as the output; the same in every dtype."""
    return torch.empty_like(output).copy_(_coarse(output.shape, output.device))


@lru_cache(maxsize=2)
def _coarse(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
