"""Predicted times, as rows of a CSV and as tables."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..provenance import LOOPS, Provenance
from .cost import TENSOR_CORE_KINDS, Kernel
from .rates import Rates
from .trace import Layer, Phase

__all__ = ["CASE", "Row", "Total", "kind_table", "layer_table", "over_layers", "predict", "total", "total_table"]

Cells = tuple[str, ...]
CASE = ("recipe", "settings", "batch_size", "precision", "device")
"""Columns that identify a prediction; it replaces an earlier one."""
OUTSIDE = "–"


@dataclass(frozen=True)
class Row:
    """The kernels of one kind in one layer, in the forward or the backward passes of all steps of one kind in an iteration."""

    recipe: str
    settings: str
    """Settings of ``--set`` that differ from the recipe's."""
    batch_size: int
    precision: str
    phase: str
    steps: int
    """Number of such steps in an iteration."""
    network: str
    """Role of the network; empty outside of the networks."""
    layer: str
    """Name of the module; empty in a sum over layers."""
    direction: str
    """"forward" or "backward"; empty in a sum over both."""
    kind: str
    kernels: int
    gflop: float
    mbyte: float
    ms: float
    peak_gb: float
    """Peak memory of the tensors that a step of the phase allocates, in 10⁹ bytes; the same in all rows of the phase."""
    resident_gb: float
    """Memory of weights, averages, optimizer states and static buffers."""
    provenance: Provenance = field(kw_only=True, metadata={"columns": LOOPS})


def predict(phases: Sequence[Phase], rates: Rates, case: Mapping[str, object], provenance: Provenance) -> list[Row]:
    """Return the rows of an iteration, in the order of the first launch of each.

    A kernel takes the longest of three times: its FLOPs and its bytes at the rates of the device, and the device's shortest kernel.

    Args:
        phases: kernels of the iteration.
        rates: rates of the device.
        case: values of :data:`CASE` except the device.
        provenance: commit and versions.
    """
    rows = []
    for phase in phases:
        groups: dict[tuple[Layer, bool, str], list[Kernel]] = {}
        for launch in phase.launches:
            groups.setdefault((launch.layer, launch.backward, launch.kernel.kind), []).append(launch.kernel)
        for (layer, backward, kind), launched in groups.items():
            rows.append(
                Row(
                    **case,  # type: ignore[arg-type]
                    phase=phase.name,
                    steps=phase.steps,
                    network=layer.network,
                    layer=layer.name,
                    direction="backward" if backward else "forward",
                    kind=kind,
                    kernels=len(launched),
                    gflop=round(sum(kernel.flops for kernel in launched) / 1e9, 6),
                    mbyte=round(sum(kernel.bytes for kernel in launched) / 1e6, 6),
                    ms=round(1e3 * sum(_seconds(kernel, rates) for kernel in launched), 6),
                    peak_gb=round(phase.peak_bytes / 1e9, 6),
                    resident_gb=round(phase.resident_bytes / 1e9, 6),
                    provenance=provenance,
                )
            )
    return rows


def _seconds(kernel: Kernel, rates: Rates) -> float:
    return max(kernel.flops / rates.flops, kernel.bytes / rates.bandwidth, rates.kernel_seconds)


def over_layers(rows: Iterable[Row]) -> list[Row]:
    """Return rows summed over layers and directions."""
    summed = []
    for alike in _by(rows, "phase", "network", "kind").values():
        sums = {name: round(sum(getattr(row, name) for row in alike), 6) for name in ("kernels", "gflop", "mbyte", "ms")}
        summed.append(dataclasses.replace(alike[0], layer="", direction="", **sums))
    return summed


@dataclass(frozen=True)
class Total:
    """Sums over rows."""

    kernels: float
    gflop: float
    gbyte: float
    ms: float
    tensor_core_ms: float
    """Time of the convolutions and matrix products."""
    memory_gb: float
    """Resident memory, and the largest peak of a step."""

    @property
    def rest_ms(self) -> float:
        """Time of all other kernels."""
        return self.ms - self.tensor_core_ms


def total(rows: Iterable[Row], *, per_step: bool = False) -> Total:
    """Return the sums over rows, for all steps or for one."""
    scaled = [(row, 1 / row.steps if per_step else 1.0) for row in rows]
    return Total(
        kernels=sum(scale * row.kernels for row, scale in scaled),
        gflop=sum(scale * row.gflop for row, scale in scaled),
        gbyte=sum(scale * row.mbyte / 1e3 for row, scale in scaled),
        ms=sum(scale * row.ms for row, scale in scaled),
        tensor_core_ms=sum(scale * row.ms for row, scale in scaled if row.kind in TENSOR_CORE_KINDS),
        memory_gb=max((row.peak_gb + row.resident_gb for row, _ in scaled), default=0.0),
    )


def total_table(rows: Sequence[Row]) -> tuple[Cells, list[Cells]]:
    """Return header and cells of a table with a line for one step of each kind, and one for the iteration."""
    header = ("", "steps", "kernels", "GFLOP", "GB", "ms", "convolutions", "rest", "rest ÷ convolutions", "memory, GB")
    lines = [(phase, str(of[0].steps), total(of, per_step=True)) for (phase,), of in _by(rows, "phase").items()]
    return header, [_total_line(*line) for line in (*lines, ("iteration", "", total(rows)))]


def _total_line(name: str, steps: str, sums: Total) -> Cells:
    numbers = (f"{sums.kernels:.0f}", f"{sums.gflop:.1f}", f"{sums.gbyte:.3f}", f"{sums.ms:.3f}", f"{sums.tensor_core_ms:.3f}")
    return name, steps, *numbers, f"{sums.rest_ms:.3f}", f"{100 * sums.rest_ms / sums.tensor_core_ms:.0f} %", f"{sums.memory_gb:.2f}"


def kind_table(rows: Sequence[Row]) -> tuple[Cells, list[Cells]]:
    """Return header and cells of a table of one step of each kind: kernels and ms by kind of kernel and network."""
    phases = [phase for (phase,) in _by(rows, "phase")]
    header = ("kind", "network", *(f"{column}, {phase}" for phase in phases for column in ("kernels", "ms")))
    lines: list[Cells] = []
    for (kind, network), alike in sorted(_by(rows, "kind", "network").items(), key=lambda item: -total(item[1]).ms):
        sums = [total((row for row in alike if row.phase == phase), per_step=True) for phase in phases]
        lines.append((kind, network or OUTSIDE, *(cell for each in sums for cell in (f"{each.kernels:.0f}", f"{each.ms:.3f}"))))
    return header, lines


def layer_table(rows: Sequence[Row], count: int) -> tuple[Cells, list[Cells]]:
    """Return header and cells of a table of the layers that take longest in an iteration."""
    header = ("phase", "network", "layer", "pass", "kernels", "GFLOP", "GB", "ms", "convolutions", "rest")
    layers = sorted(_by(rows, "phase", "network", "layer", "direction").items(), key=lambda item: -total(item[1]).ms)
    lines: list[Cells] = []
    for (phase, network, layer, direction), alike in layers[:count]:
        sums = total(alike)
        numbers = (f"{sums.gflop:.1f}", f"{sums.gbyte:.3f}", f"{sums.ms:.3f}", f"{sums.tensor_core_ms:.3f}", f"{sums.rest_ms:.3f}")
        lines.append((phase, network or OUTSIDE, layer or OUTSIDE, direction, f"{sums.kernels:.0f}", *numbers))
    return header, lines


def _by(rows: Iterable[Row], *names: str) -> dict[Cells, list[Row]]:
    groups: dict[Cells, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return groups
