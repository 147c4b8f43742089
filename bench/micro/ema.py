"""Exponential moving average of a network's parameters and buffers.

Variants: "plain"; "shadow" also writes the new averages to a bfloat16 copy. Some providers take lists of tensors, collected
beforehand; AveragedModel and ModelEmaV3 take modules and collect the tensors at every update, FusedEMA only when they have changed.

Minimum memory traffic: averages are read and written, sources are read: 12 bytes per float32 parameter, plus 2 for its shadow.
Integer buffers are copied: 16 bytes.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet18, resnet34, resnet50

from dfkd_fast.kernels import FusedEMA, ema_update_
from dfkd_fast.kernels.dispatch import Backend
from dfkd_fast.models import GeneratorA, GeneratorB

from .workload import LAYOUTS, Mode, Provider, Results, Trial, Workload, backend_context, default_providers

__all__ = ["EXAMPLE", "NETWORKS", "SIZES", "workloads"]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "generator-a": partial(GeneratorA, latent_dim=256, channels=3, image_size=32),
    "generator-b": partial(GeneratorB, latent_dim=256, channels=3, image_size=128),
}
TOYS: dict[str, Callable[[], nn.Module]] = {"toy": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))}
BUILDERS = NETWORKS | TOYS
SIZES = tuple(NETWORKS)
QUICK = ("resnet18", "generator-a")
EXAMPLE = " or ".join(NETWORKS)
DECAY = 0.999
SHADOW = torch.bfloat16
INTEGERS = "num_batches_tracked"
APEX_CHUNK = 2048 * 32


class Step(NamedTuple):
    """A provider set up for a pair of networks."""

    run: Callable[[], object]
    average: nn.Module
    shadow: nn.Module | None = None


Setup = Callable[[nn.Module, nn.Module], Step]
"""Called with the network that holds the averages, which may be modified, and the source network."""


def workloads(kernel: str, size: str) -> list["EmaWorkload"]:
    """Return all cases of a network; empty if it is unknown."""
    if size not in BUILDERS:
        return []
    return [
        EmaWorkload(
            kernel=kernel,
            variant=variant,
            size=size,
            dtype=torch.float32,
            layout=layout,
            modes=("update",),
            quick=size in QUICK and variant == "plain" and layout == "contiguous",
        )
        for variant in ("plain", "shadow")
        for layout in LAYOUTS
    ]


class EmaWorkload(Workload):
    """EMA update of one network."""

    def floor_bytes(self, mode: Mode) -> int:
        """See Workload."""
        with torch.device("meta"):
            network = tensors(BUILDERS[self.size]())
        per_element = 3 * self.dtype.itemsize + (SHADOW.itemsize if self.variant == "shadow" else 0)
        return sum(tensor.numel() * (per_element if tensor.is_floating_point() else 2 * tensor.itemsize) for tensor in network)

    def providers(self, device: torch.device, backends: Sequence[Backend]) -> list[Provider]:
        """See Workload."""
        shadowed = self.variant == "shadow"
        list_providers = [
            Provider(
                provider.name,
                partial(_over_lists, provider.call, shadowed),
                provider.backend,
                provider.unavailable,
            )
            for provider in default_providers(_eager, _ours, device, backends)
        ]
        fused = Provider("fused_ema", partial(_fused_ema, shadowed))
        return [*list_providers, fused] if shadowed else [*list_providers, fused, *_peers(device)]

    def expected(self, mode: Mode, device: torch.device) -> Results:
        """See Workload."""
        average, source = self._networks(device)
        moved = {name: _average(tensor, named(source)[name]) for name, tensor in named(average).items()}
        return moved | ({f"shadow {name}": tensor for name, tensor in moved.items()} if self.variant == "shadow" else {})

    def trial(self, provider: Provider, mode: Mode, device: torch.device) -> Trial:
        """See Workload."""
        step = provider.call(*self._networks(device))

        def results() -> Results:
            with context():
                step.run()
            shadow = {} if step.shadow is None else {f"shadow {name}": tensor for name, tensor in named(step.shadow).items()}
            return {name: tensor for name, tensor in (named(step.average) | shadow).items() if not name.endswith(provider.omitted)}

        context: Callable[[], AbstractContextManager[None]] = partial(backend_context, provider.backend, False)
        return Trial(lambda _: step.run(), results, context, capturable=provider.capturable)

    def _networks(self, device: torch.device) -> list[nn.Module]:
        """Return the network that holds the averages and the source network."""
        return [copy.deepcopy(_filled(self.size, self.layout, seed, device)) for seed in (0, 1)]


def tensors(network: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, detached."""
    return list(named(network).values())


def named(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, detached."""
    return {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}


@lru_cache(maxsize=2)
def _filled(size: str, layout: str, seed: int, device: torch.device) -> nn.Module:
    """Return a network with random values, without its own initialization."""
    with torch.device("meta"):
        network = BUILDERS[size]()
    network = network.to_empty(device=device).to(memory_format=LAYOUTS[layout])
    random = torch.Generator(device).manual_seed(seed)
    for tensor in tensors(network):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=random, device=device))
        else:
            tensor.fill_(seed)
    return network


def _average(average: Tensor, source: Tensor) -> Tensor:
    return average.double() * DECAY + source.double() * (1 - DECAY) if average.is_floating_point() else source


def _over_lists(update: Callable[..., None], shadowed: bool, average: nn.Module, source: nn.Module) -> Step:
    shadow = copy.deepcopy(average).to(SHADOW) if shadowed else None
    shadows = None if shadow is None else tensors(shadow)
    return Step(partial(update, tensors(average), tensors(source), shadows), average, shadow)


def _eager(averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor] | None) -> None:
    for average, source in zip(averages, sources, strict=True):
        if average.is_floating_point():
            average.lerp_(source, 1 - DECAY)
        else:
            average.copy_(source)
    if shadows is not None:
        for shadow, average in zip(shadows, averages, strict=True):
            shadow.copy_(average)


def _ours(averages: Sequence[Tensor], sources: Sequence[Tensor], shadows: Sequence[Tensor] | None) -> None:
    ema_update_(averages, sources, DECAY, shadows=shadows)


def _fused_ema(shadowed: bool, average: nn.Module, source: nn.Module) -> Step:
    ema = FusedEMA(average, DECAY, shadow_dtype=SHADOW if shadowed else None)
    return Step(lambda: ema.update(source), ema.module, ema.shadow)


def _peers(device: torch.device) -> list[Provider]:
    # AveragedModel reads its number of updates on the host, and averages integers instead of copying them.
    return [
        Provider("averaged_model", _averaged_model, omitted=(INTEGERS,), capturable=False),
        Provider("model_ema_v3", _model_ema_v3),
        Provider("foreach_lerp", _foreach_lerp),
        Provider("flat_lerp", _flat_lerp, omitted=(INTEGERS,)),
        Provider("apex", _apex, unavailable=_apex_unavailable_reason(device)),
    ]


def _averaged_model(average: nn.Module, source: nn.Module) -> Step:
    averaged = AveragedModel(average, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    averaged.n_averaged.fill_(1)  # the first update copies
    return Step(lambda: averaged.update_parameters(source), averaged.module)


def _model_ema_v3(average: nn.Module, source: nn.Module) -> Step:
    from timm.utils.model_ema import ModelEmaV3  # most processes that import this module do not measure it

    ema = ModelEmaV3(average, decay=DECAY)
    return Step(lambda: ema.update(source), ema.module)


def _foreach_lerp(average: nn.Module, source: nn.Module) -> Step:
    averages, sources = _floating(average), _floating(source)
    counts, new_counts = _integers(average), _integers(source)

    def run() -> None:
        torch._foreach_lerp_(averages, sources, 1 - DECAY)
        if counts:
            torch._foreach_copy_(counts, new_counts)

    return Step(run, average)


def _flat_lerp(average: nn.Module, source: nn.Module) -> Step:
    """A lower bound: all tensors are views of one, which is not the case in most networks."""
    averages, sources = _flatten(average), _flatten(source)
    return Step(lambda: averages.lerp_(sources, 1 - DECAY), average)


def _flatten(network: nn.Module) -> Tensor:
    """Make a network's floating-point tensors views of one tensor, with the same strides; they must be dense."""
    floating = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
    arena = floating[0].new_empty(sum(tensor.numel() for tensor in floating))
    offset = 0
    for tensor in floating:
        view = arena.detach().as_strided(tensor.shape, tensor.stride(), offset)
        view.copy_(tensor.detach())
        tensor.data = view
        offset += tensor.numel()
    return arena


def _apex_unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "apex needs a GPU"
    # PyPI's apex is a different project; NVIDIA's has this compiled module
    return None if find_spec("amp_C") else "NVIDIA's apex with its CUDA extensions is not installed"


def _apex(average: nn.Module, source: nn.Module) -> Step:
    multi_tensor_axpby = import_module("amp_C").multi_tensor_axpby
    averages, sources = _floating(average), _floating(source)
    counts, new_counts = _integers(average), _integers(source)
    overflow = torch.zeros(1, dtype=torch.int32, device=averages[0].device)

    def run() -> None:
        # averages ← DECAY · averages + (1 − DECAY) · sources; 2: no check for infinities
        multi_tensor_axpby(APEX_CHUNK, overflow, [averages, sources, averages], DECAY, 1 - DECAY, 2)
        if counts:
            torch._foreach_copy_(counts, new_counts)

    return Step(run, average)


def _floating(network: nn.Module) -> list[Tensor]:
    return [tensor for tensor in tensors(network) if tensor.is_floating_point()]


def _integers(network: nn.Module) -> list[Tensor]:
    return [tensor for tensor in tensors(network) if not tensor.is_floating_point()]
