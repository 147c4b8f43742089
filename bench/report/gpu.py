"""The tables measured on GPUs: those of docs/gpu.md, with a column for each device, and extracts of them for other pages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

from ..end_to_end.contenders import is_engine
from ..end_to_end.rows import SPEEDUPS
from .cpu import USUAL_VARIANTS, command
from .markdown import EMPTY, Cell, by_device, code, marker, one_line, table
from .results import Results, grouped, is_gpu

__all__ = ["EXTRACT_NOT_MEASURED", "NOT_MEASURED", "extracts", "sections"]

Row = TypeVar("Row", bound=Mapping[str, Any])
NOT_MEASURED = "Not measured on a GPU yet: `python -m bench gpu` fills this table."
EXTRACT_NOT_MEASURED = "On a GPU: not measured yet ([GPU results](gpu.md) says how to measure)."
EXTRACT = 6  # rows of an extract
SHOWN_KERNELS = 10  # of the most expensive ones of a recipe
SHOWN_REASONS = 25  # of a device's cases that did not pass
HOST_TIME = r"\*"  # a compared time includes the host's
WITHOUT_COMPILE = "†"  # torch.compile was not timed
OURS = ("cuda", "triton", "fused_ema")
PEERS = {"compile": "torch.compile"}
NOT_A_PEER = (*OURS, "reference", "numba")
SETTINGS = {
    "memory_gib": "GPU memory (GiB)",
    "multiprocessors": "multiprocessors",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "matmul_tf32": "TF32 in float32 matrix products",
    "conv_tf32": "TF32 in float32 convolutions",
    "cores": "CPU cores",
    "python": "Python",
}
CEILINGS = {"gb_per_s": "a large copy (GB/s)", "tflops": "a bfloat16 matrix product (TFLOP/s)"}

_ALL = "commits, versions and all cases: [GPU results](gpu.md)"
METHODS_CAPTION = "On a GPU: time per iteration, the same relative to the first recipe, and peak memory:"
ENGINE_CAPTION = f"On a GPU, the engine with captured steps and its speed-up over each peer ({_ALL}):"
KERNELS_CAPTION = (
    "On a GPU, one case of each kernel: our fastest backend, its share of the bandwidth of a large copy, and its speed-up over the "
    f"fastest peer; {WITHOUT_COMPILE} where torch.compile was not timed ({_ALL}):"
)
_SUMMARIES, _MICRO, _END_TO_END = (f"bench/results/{name}" for name in ("gpu-*.json", "micro-*.csv", "end-to-end-*.csv"))
ENVIRONMENT = marker("environment", _SUMMARIES)
KERNELS = marker("kernels", _MICRO)
END_TO_END = marker("iterations", _END_TO_END)
ACCURACY = marker("accuracy", "bench/results/distill.jsonl")
PROFILE = marker("most expensive kernels", _SUMMARIES)
STAGES = marker("stages", _SUMMARIES)
METHOD_EXTRACT = marker("methods on GPUs", "bench/results/methods-*.csv")
END_TO_END_EXTRACT = marker("iterations on GPUs", _END_TO_END)
KERNEL_EXTRACT = marker("kernels on GPUs", _MICRO)


def sections(results: Results) -> dict[str, str]:
    """Every table of docs/gpu.md as Markdown, by its marker."""
    newest = results.newest
    return {
        ENVIRONMENT: environment(results.gpus),
        KERNELS: kernels(results.rows("micro", "gpu"), newest),
        END_TO_END: iterations(results.rows("end-to-end", "gpu"), newest),
        ACCURACY: accuracy([entry for entry in results.runs if is_gpu(entry["device_name"])], newest),
        PROFILE: profile(results.gpus),
        STAGES: stages(results.gpus),
    }


def extracts(results: Results) -> dict[str, str]:
    """The extracts as Markdown, by marker."""
    methods, engines, families = (
        cells(results.rows(kind, "gpu"), results.newest)
        for kind, cells in (("methods", _method_cells), ("end-to-end", _engine_cells), ("micro", _family_cells))
    )
    return {
        METHOD_EXTRACT: _extract(("recipe",), methods, METHODS_CAPTION),
        END_TO_END_EXTRACT: _extract(("recipe", "batch", "precision"), engines, ENGINE_CAPTION),
        KERNEL_EXTRACT: _extract(("kernel", "size", "dtype"), families, KERNELS_CAPTION),
    }


def environment(summaries: Sequence[dict[str, Any]]) -> str:
    """Versions, settings and ceilings."""
    cells, origins = [], []
    for summary in summaries:
        device, stage = summary["device"], _stage(summary, "environment")
        for row in stage["tables"].get("host", ()):
            mark = _stage_mark(row, summary)
            names = [name for name in row if name not in ("case", "commit")]
            cells += [Cell((SETTINGS.get(name, name),), device, _plain(row[name]) + mark) for name in names]
        for row in stage["tables"].get("ceilings", ()):
            mark = _stage_mark(row, summary)
            known = [(name, label) for name, label in CEILINGS.items() if row.get(name) is not None]
            cells += [Cell((label,), device, _figure(float(row[name])) + mark) for name, label in known]
        origins += _row_origins(device, stage, [row for name in ("host", "ceilings") for row in stage["tables"].get(name, ())])
    return _section(by_device(("setting or peak rate",), cells), origins) if cells else NOT_MEASURED


def kernels(rows: Sequence[dict[str, str]], newest: Mapping[str, str]) -> str:
    """A table for each kernel."""
    parts = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of_kernel = [row for row in rows if row["kernel"] == kernel]
        titles = ("variant", "size", "dtype", "layout", "mode")
        cells = [
            Cell(tuple(case[0][title] for title in titles), case[0]["device"], _kernel_cell(case, newest))
            for case in grouped(of_kernel, (*titles, "device"))
        ]
        parts.append(_section(f"### {one_line(kernel)}\n\n{by_device(titles, cells)}", of_kernel))
    return "\n\n".join(parts) or NOT_MEASURED


def iterations(rows: Sequence[dict[str, str]], newest: Mapping[str, str]) -> str:
    """A row for each contender."""
    titles = ("recipe", "batch", "precision", "contender", "computes in")
    cells = [
        Cell(
            (code(row["recipe"]), row["batch_size"], row["precision"], row["contender"], _computes_in(row)),
            row["device"],
            _speed(row, rows) + _memory_and_kernels(row) + _mark(row, newest),
        )
        for row in rows
    ]
    return _section(by_device(titles, cells), rows) if cells else NOT_MEASURED


def accuracy(entries: Sequence[dict[str, Any]], newest: Mapping[str, str]) -> str:
    """A row for each command: means over the seeds."""
    entries = [{**entry, "device": entry["device_name"]} for entry in entries]
    cells = []
    for alike in grouped([{**entry, "line": command(entry)} for entry in entries], ("recipe", "line", "device_name")):
        last, best, teacher = (fmean(values) for values in zip(*map(_accuracies, alike), strict=True))
        seeds = ", ".join(f"seed {entry['seed']}: {entry['retention']['last']:.2f}{_mark(entry, newest)}" for entry in alike)
        drop, seconds = max(entry["retention"]["largest_drop"] for entry in alike), fmean(entry["seconds"]["total"] for entry in alike)
        text = f"last {last:.2f} ({seeds}), best {best:.2f}, teacher {teacher:.2f}, largest drop {drop:.2f}, {seconds:.0f} s"
        labels = (alike[0]["recipe"], alike[0]["line"], alike[0].get("metric", "top-1 accuracy"))
        cells.append(Cell(labels, alike[0]["device_name"], text))
    sources = [{**entry.get("versions", {}), **entry, "command": ""} for entry in entries]
    return _section(by_device(("recipe", "command", "metric"), cells), sources) if cells else NOT_MEASURED


def profile(summaries: Sequence[dict[str, Any]]) -> str:
    """The most expensive kernels of each recipe's captured engine, a table for each device."""
    titles = ("recipe", "batch", "kernel", "calls/iteration", "µs/iteration", "share")
    parts = []
    for summary in summaries:
        stage = _stage(summary, "end-to-end")
        shown = [
            kernel
            for case in grouped(stage["tables"].get("kernels", ()), ("recipe", "batch_size"))
            for kernel in _of_engine(case)[:SHOWN_KERNELS]
        ]
        cells = [
            (
                *(code(kernel["recipe"]) + _stage_mark(kernel, summary), _plain(kernel.get("batch_size")), code(kernel["name"], 80)),
                *(_plain(kernel.get(f"{unit}_per_iteration")) for unit in ("calls", "us")),
                _percent(kernel.get("share")),
            )
            for kernel in shown
        ]
        if cells:
            title = f"### {one_line(summary['device'])}"
            parts.append(_section(f"{title}\n\n{table(titles, cells)}", _row_origins(summary["device"], stage, shown)))
    return "\n\n".join(parts) or NOT_MEASURED


def stages(summaries: Sequence[dict[str, Any]]) -> str:
    """The status of every stage, and the reasons of cases that did not pass."""
    ended = [(summary, name, stage) for summary in summaries for name, stage in summary["stages"].items()]
    cells = [Cell((name,), summary["device"], _stage_cell(stage) + _stage_mark(stage["origin"], summary)) for summary, name, stage in ended]
    origins = [{"device": summary["device"], **stage["origin"]} for summary, _, stage in ended]
    parts = [_section(by_device(("stage",), cells), origins)] if cells else []
    for summary in summaries:
        reasons = [(name, reason) for name, stage in summary["stages"].items() for reason in stage["reasons"]]
        reasons.sort(key=lambda one: (one[1]["status"] not in ("wrong", "failed"), -one[1]["count"]))
        rows = [
            (name, reason["status"], str(reason["count"]), code(reason["text"] or "no reason given"), code(", ".join(reason["cases"]), 60))
            for name, reason in reasons[:SHOWN_REASONS]
        ]
        if rows:
            parts.append(
                f"### Not passed on {one_line(summary['device'])}\n\n{table(('stage', 'status', 'cases', 'reason', 'for example'), rows)}"
            )
        if len(reasons) > SHOWN_REASONS:
            parts.append(f"{len(reasons) - SHOWN_REASONS} more reasons are in bench/results.")
        notes = [f"- {one_line(name)}: {code(note, 200)}" for name, stage in summary["stages"].items() for note in stage["notes"]]
        if notes:
            parts.append("\n".join([f"### Noted on {one_line(summary['device'])}", "", *notes]))
    return "\n\n".join(parts) or NOT_MEASURED


def _stage(summary: dict[str, Any], name: str) -> dict[str, Any]:
    stage: dict[str, Any] = summary["stages"].get(name, {"tables": {}})
    return stage


def _mark(row: Mapping[str, Any], newest: Mapping[str, str]) -> str:
    """The commit of a value, if the newest results of its device are of another commit; else empty."""
    commit = row["commit"]
    return "" if newest.get(row["device"], commit) == commit else f" ({code(commit, 40)})"


def _stage_mark(row: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    return _mark({"device": summary["device"], "commit": row["commit"]}, {summary["device"]: summary["commit"]})


def _stage_cell(stage: dict[str, Any]) -> str:
    words = {"ok": "passed"}
    counts = [
        f"{stage['counts'][status]} {words.get(status, status)}"
        for status in ("ok", "wrong", "failed", "skipped", "left")
        if stage["counts"].get(status)
    ]
    if stage["status"] != "ok":
        counts.append(f"{stage['status']}: {code(stage['text'])}" if stage["text"] else stage["status"])
    if stage["seconds"] is not None:
        counts.append(f"{stage['seconds']:.0f} s")
    return ", ".join(counts)


def _kernel_cell(case: Sequence[dict[str, str]], newest: Mapping[str, str]) -> str:
    """Each commit's results of a case, the newest first; times of two commits are not compared."""
    commits = sorted(grouped(case, ("commit",)), key=lambda rows: bool(_mark(rows[0], newest)))
    return "; ".join(text + _mark(rows[0], newest) for rows in commits if (text := _compared(rows))) or EMPTY


def _compared(case: Sequence[dict[str, str]]) -> str:
    """Our fastest backend: its time, share of the copy bandwidth and factor over the fastest peer; and those that failed."""
    timed = {row["provider"]: row for row in case if row["median_us"]}
    red = [f"{row['provider']} {row['status'].partition(':')[0]}" for row in case if row["status"].startswith(("wrong", "failed"))]
    # A peer that leaves something out says so behind its "ok", and is not compared with.
    peers = [name for name, row in timed.items() if name not in NOT_A_PEER and row["status"] == "ok"]
    ours, peer = _fastest(timed, OURS), _fastest(timed, peers)
    if ours is None:
        return ", ".join(red)
    text = [f"{ours['provider']} {_figure(float(ours['median_us']))} µs"]
    if ours["share_of_copy"]:
        text.append(_percent(ours["share_of_copy"]))
    if peer is not None:
        name = PEERS.get(peer["provider"], peer["provider"])
        marks = HOST_TIME if any(row["timed"].startswith("with the host's time") for row in (ours, peer)) else ""
        marks += "" if "compile" in peers else WITHOUT_COMPILE
        text.append(f"{float(peer['median_us']) / float(ours['median_us']):.2f} × {name}{marks}")
    return ", ".join([*text, *red])


def _fastest(timed: Mapping[str, dict[str, str]], names: Iterable[str]) -> dict[str, str] | None:
    return min((timed[name] for name in names if name in timed), key=lambda row: float(row["median_us"]), default=None)


def _family_cells(rows: Sequence[dict[str, str]], newest: Mapping[str, str]) -> Iterator[Cell]:
    """Of each kernel the first whole call, which is the most important one."""
    first: dict[str, tuple[str, ...]] = {}
    for case in grouped(rows, ("kernel", "variant", "size", "dtype", "layout", "mode", "device")):
        row = case[0]
        kernel = row["kernel"] if row["variant"] in USUAL_VARIANTS else f"{row['kernel']} {row['variant']}"
        labels = (kernel, row["size"], row["dtype"])
        if row["mode"] in ("full", "update") and first.setdefault(row["kernel"], _case(row)) == _case(row):
            yield Cell(labels, row["device"], _kernel_cell(case, newest))


def _case(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("variant", "size", "dtype", "layout", "mode"))


def _speed(row: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """Time of a contender, and factors over the peers among the rows."""
    text = [f"{float(row['seconds_per_iteration']):.4g} s/iteration"]
    for peer in ("plain", "plain compiled"):
        factor = _factor(row, peer, rows)
        if factor is not None and row["contender"] != peer:
            text.append(f"{factor:.2f} × {peer}")
    return ", ".join(text)


def _memory_and_kernels(row: Mapping[str, str]) -> str:
    names = {"peak_memory_mib": "MiB", "reserved_mib": "MiB reserved", "kernels_per_iteration": "kernels"}
    text = "".join(f", {float(row[name]):.0f} {unit}" for name, unit in names.items() if row.get(name))
    return text + (f" of {float(row['kernel_seconds']):.4g} s" if row.get("kernel_seconds") else "")


def _computes_in(row: Mapping[str, str]) -> str:
    tf32 = row.get("tf32") or "nowhere"
    return (row.get("autocast") or EMPTY) + ("" if tf32 == "nowhere" else f", TF32 in {tf32}")


def _factor(row: Mapping[str, str], peer: str, rows: Iterable[Mapping[str, str]]) -> float | None:
    """How many times as fast as a peer: as measured, or the ratio of the medians at the same commit on the same device."""
    if row.get(SPEEDUPS[peer]):
        return float(row[SPEEDUPS[peer]])
    same = ("device", "commit", "recipe", "batch_size")
    peers = [other for other in rows if other["contender"] == peer and all(other[name] == row[name] for name in same)]
    return float(peers[0]["seconds_per_iteration"]) / float(row["seconds_per_iteration"]) if peers else None


def _engine_cells(rows: Sequence[dict[str, str]], newest: Mapping[str, str]) -> Iterator[Cell]:
    for row in _of_engine(rows):
        yield Cell((code(row["recipe"]), row["batch_size"], row["precision"]), row["device"], _speed(row, rows) + _mark(row, newest))


def _of_engine(rows: Sequence[Row]) -> list[Row]:
    """Those of the engine with everything on, whose steps are captured on a GPU."""
    return [row for row in rows if is_engine(row["contender"])]


def _method_cells(rows: Sequence[dict[str, str]], newest: Mapping[str, str]) -> Iterator[Cell]:
    for row in rows:
        text = f"{float(row['iteration_ms']):.2f} ms/iteration, {float(row['times_first']):.2f} ×, {float(row['peak_memory_mib']):.0f} MiB"
        yield Cell((code(row["recipe"]),), row["device"], text + _mark(row, newest))


def _extract(titles: Sequence[str], cells: Iterable[Cell], caption: str) -> str:
    """The first rows of a table, below a caption."""
    listed = list(cells)
    rows = list(dict.fromkeys(cell.labels for cell in listed))[:EXTRACT]
    shown = [cell for cell in listed if cell.labels in rows]
    return f"{caption}\n\n{by_device(titles, shown)}" if shown else EXTRACT_NOT_MEASURED


def _row_origins(device: str, stage: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where rows of a stage come from."""
    return [{"device": device, **stage["origins"][row["commit"]]} for row in rows]


def _section(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, and the commit, versions and commands of each device's values."""
    groups = grouped(rows, ("device", "commit", "torch", "triton", "numba"))
    lines = []
    for group in sorted(groups, key=lambda group: str(group[0]["device"])):
        first = group[0]
        commit = f"commit {code(str(first['commit']))}{' (with uncommitted changes)' if str(first['commit']).endswith('-dirty') else ''}"
        versions = [f"{name} {first[name]}" for name in ("torch", "triton", "numba") if first.get(name)]
        commands = [code(one, 300) for one in dict.fromkeys(str(row["command"]) for row in group) if one]
        part = f" ({len(group)} of its rows)" if sum(other[0]["device"] == first["device"] for other in groups) > 1 else ""
        lines.append(one_line(f"- {first['device']}{part}: {', '.join([commit, *versions, *commands])}"))
    return "\n".join([text, "", *lines])


def _accuracies(entry: Mapping[str, Any]) -> tuple[float, float, float]:
    """Of the last epoch, of the best one, and of the teacher."""
    return entry["retention"]["last"], entry["retention"]["best"], entry["teacher_accuracy"]


def _plain(value: object) -> str:
    if value is None or value == "":
        return EMPTY
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _figure(value) if isinstance(value, float) else str(value)


def _percent(share: object) -> str:
    return EMPTY if share is None else f"{100 * float(str(share)):.0f} %"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
