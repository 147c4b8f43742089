"""The command line ``python -m bench``: the GPU campaign, single benchmarks, and the documents generated from their results."""

import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn, cast, get_args

import torch
import typer
from rich.console import Console

from dfkd_fast.choices import PrecisionSetting
from dfkd_fast.commands.compress import CompressRequest, compression_overrides
from dfkd_fast.console import print_table
from dfkd_fast.engine.device import device_name, pick_device
from dfkd_fast.engine.precision import resolve_precision
from dfkd_fast.errors import DfkdError, describe_usage_error
from dfkd_fast.files import check_output, replacing
from dfkd_fast.recipe import load_recipe
from dfkd_fast.recipe_files import parse_overrides

from . import calibration, end_to_end, evaluation, host, model, provenance, report, ship, table, with_data
from . import methods as method_costs
from . import micro as cases
from . import plot as plots
from .end_to_end import plots as end_to_end_plots
from .end_to_end.rows import SPEEDUPS
from .gpu import rehearsal, schedule
from .gpu.folder import Folder, check_out
from .gpu.stages import STAGES
from .kills import running, trials
from .micro import rows as micro_rows
from .micro import runner, timing
from .micro.workload import Mode

app = typer.Typer(help="Benchmarks of dfkd_fast.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
BUSY = 0.25  # load average per core above which timings are unreliable
RESULTS = provenance.ROOT / "bench" / "results"
HEADLINE = provenance.ROOT / "docs" / "images" / "speed.svg"
METHODS = ("digits-dfad", "digits-mad", "digits-bank", "digits-vae", "digits-retain-first-order", "digits-retain")

Names = list[str] | None


@app.command(name="gpu")
def run_gpu(
    stage: Annotated[
        Names, typer.Option(help=f"One of {', '.join(one.name for one in STAGES)}; may be repeated. By default all that are not done.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time limit; the next call continues with the rest.")] = 9.0,
    out: Annotated[Path | None, typer.Option(help="Output folder; by default .bench-gpu/out.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder with MNIST, for the accuracy stage.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit that is measured, if this is not a git checkout.")] = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Run at toy size on a CPU: Triton interpreted, the CUDA kernels compiled for the CPU."),
    ] = False,
) -> None:
    """Check and measure everything that needs a GPU within a time limit; a second call resumes."""
    chosen = _known("--stage", stage, [one.name for one in STAGES])
    if not 0 < minutes < math.inf:
        raise DfkdError(f"--minutes {minutes:g}: must be above 0")
    if data_root is not None and not data_root.is_dir():
        raise DfkdError(f"--data-root {data_root}: is not a folder")
    if commit is not None and not re.fullmatch(r"[\w.-]+", commit):
        raise DfkdError(f"--commit {commit!r}: must be letters, digits, '.', '_' and '-'")
    if not rehearse and not torch.cuda.is_available():
        raise DfkdError("PyTorch finds no GPU; --rehearse runs everything at toy size on a CPU")
    device = torch.device("cpu" if rehearse else "cuda")
    target = out or schedule.STATE / ("rehearsal" if rehearse else "out")
    if out is not None:
        check_out(out)
    schedule.STATE.mkdir(exist_ok=True)
    with (
        schedule.alone(),
        tempfile.TemporaryDirectory() as temporary,  # a rehearsal is not resumed
    ):
        campaign = schedule.Campaign(
            stages=STAGES,
            files=Folder(Path(temporary) if rehearse else schedule.folder_of(device_name(device)), target),
            origin=provenance.measured_on(device, _command(), commit).columns(provenance.KERNELS) | {"rehearsal": rehearse},
            data_root=data_root and data_root.resolve(),
            rehearse=rehearse,
            variables=rehearsal.environment() if rehearse else {},
            log=_echo,
        )
        if campaign.origin["commit"] == "unknown":
            _echo("the commit is unknown: pass it with --commit")
        _echo(f"results: {target}")
        for line in campaign.run(minutes, chosen):
            _echo(line)
    if campaign.failed:
        sys.exit(1)


@app.command()
def micro(
    kernel: Annotated[Names, typer.Option(help=f"One of {', '.join(cases.KERNELS)}; may be repeated. All by default.")] = None,
    device: Annotated[str, typer.Option(help="One of auto, cpu, cuda.")] = "auto",
    mode: Annotated[Names, typer.Option(help=f"One of {', '.join(get_args(Mode))}; may be repeated. All by default.")] = None,
    size: Annotated[Names, typer.Option(help="For example resnet18, 256x1000 or 2x256x3x32x32; may be repeated. A few by default.")] = None,
    provider: Annotated[Names, typer.Option(help=f"One of {', '.join(cases.PROVIDERS)}; may be repeated. All by default.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch and numba; PyTorch's default if not set.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed calls; by default as many as take about one second per case.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run all sizes, dtypes, layouts and variants.")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV to add the rows to; by default bench/results/micro-DEVICE.csv.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit that is measured, if this is not a git checkout.")] = None,
) -> None:
    """Time the kernels against eager PyTorch, torch.compile and other libraries; a provider with wrong results is not timed."""
    kernels = _known("--kernel", kernel, cases.KERNELS)
    modes, providers = _known("--mode", mode, get_args(Mode)), _known("--provider", provider, cases.PROVIDERS)
    workloads = cases.select(kernels or list(cases.KERNELS), size or [], everything)
    for option, number in (("--threads", threads), ("--repeats", repeats)):
        if number is not None and number < 1:
            raise DfkdError(f"{option} {number}: must be a whole number ≥ 1")
    torch_device = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    target = _csv("micro", torch_device, out)
    timer = timing.timer_for(torch_device)
    run = runner.Run(
        device=torch_device,
        modes=modes,
        providers=providers,
        repeats=repeats,
        timer=timer,
        copy_bandwidth=timing.copy_bandwidth(timer, torch_device),
        provenance=provenance.measured_on(torch_device, _command(), commit),
    )
    console, count, without_time = Console(), 0, 0
    console.print(f"{device_name(torch_device)}: a large copy moves {run.copy_bandwidth / 1e9:.3g} GB/s", highlight=False)
    if (load := run.provenance.load) > BUSY * (os.cpu_count() or 1):
        console.print(f"this machine is busy (load average {load}): do not publish these timings", highlight=False)
    for workload in workloads:
        measured = [row for case in run.rows(workload) for row in case]
        if not measured:
            continue
        micro_rows.write(target, map(table.cells, measured))
        title = " ".join(filter(None, (workload.kernel, workload.variant, workload.size, measured[0].dtype, workload.layout)))
        print_table(console, *micro_rows.printed(measured), title=f"\n{title}")
        count += len(measured)
        without_time += sum(row.failed for row in measured)
    if not count:
        raise DfkdError(f"--mode {', '.join(modes) or 'all'}, --provider {', '.join(providers) or 'all'}: no selected case has both")
    console.print(f"\n{target}", highlight=False, soft_wrap=True)
    if without_time:
        _fail(f"{without_time} of {count} rows have no time: the result was wrong, or the call failed", 1)


@app.command(name="host")
def run_host(
    network: Annotated[
        Names, typer.Option(help=f"One of {', '.join(cases.ema.NETWORKS)}; may be repeated. The ResNets by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="One of auto, cpu, cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="CSV to write; by default bench/results/host-DEVICE.csv.")] = None,
) -> None:
    """Time the host overhead of an EMA update, without its kernel."""
    torch_device = pick_device(device)
    chosen = _known("--network", network or list(host.NETWORKS), list(cases.ema.NETWORKS))
    target = _csv("host", torch_device, out)
    measured = host.measure(chosen, torch_device, _command())
    table.write_anew(target, measured)
    header = ("network", "tensors", "call", "median µs", "20–80 %")
    cells = [(row.network, str(row.tensors), row.call, f"{row.median_us:.1f}", f"{row.q20_us:.1f}–{row.q80_us:.1f}") for row in measured]
    print_table(Console(), header, cells)
    typer.echo(target)


@app.command()
def methods(
    recipe: Annotated[Names, typer.Option(help="May be repeated; the first is the baseline. By default the digits recipes.")] = None,
    device: Annotated[str, typer.Option(help="One of auto, cpu, cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch and numba; PyTorch's default if not set.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Timed iterations of each recipe.")] = 15,
    out: Annotated[Path | None, typer.Option(help="CSV to write; by default bench/results/methods-DEVICE.csv.")] = None,
) -> None:
    """Measure time and memory of an iteration of each recipe, relative to the first recipe."""
    torch_device = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    target = _csv("methods", torch_device, out)
    measured = method_costs.measure(recipe or list(METHODS), torch_device, turns, _command())
    table.write_anew(target, measured)
    header = ("recipe", "fresh + replayed", "ms/iteration", "× first", "peak MiB", "MiB over first")
    cells = [
        (
            *(row.recipe, f"{row.fresh_rows} + {row.replayed_rows}", f"{row.iteration_ms:.1f}", f"{row.times_first:.2f}"),
            *(f"{row.peak_memory_mib:.0f}", f"{row.memory_over_first_mib:+.0f}"),
        )
        for row in measured
    ]
    print_table(Console(), header, cells)
    typer.echo(target)


@app.command(name="end-to-end")
def run_end_to_end(
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a TOML file.")],
    device: Annotated[str, typer.Option(help="One of auto, cpu, cuda.")] = "auto",
    precision: Annotated[
        str,
        typer.Option(help="Of the engine and of the compiled plain loop: fp32, bf16, fp16 or auto, as in dfkd-fast distill."),
    ] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Fresh samples per step; by default the recipe's.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Ignored: the networks are untrained.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch and numba; PyTorch's default if not set.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Timed iterations of each contender, interleaved on a CPU.")] = 7,
    compiled_engine: Annotated[
        bool, typer.Option("--compiled-engine", help="Also time the engine with each network under torch.compile, and with all.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write this JSON file, with one section per contender.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="CSV to add the rows to, plotted as a PNG; by default bench/results/end-to-end-DEVICE.csv."),
    ] = None,
) -> None:
    """Time whole iterations: the plain loop, eager and compiled, with and without malloc reuse; and the engine, feature by feature."""
    if json_file is not None:
        check_output("--json", json_file)
    torch_device = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    setting = _known("--precision", [precision], get_args(PrecisionSetting))[0]
    chosen = resolve_precision(cast(PrecisionSetting, setting), torch_device)
    overrides: dict[str, object] = {"data.root": str(data_root)} if data_root else {}
    if batch_size is not None:
        overrides["loop.batch_size"] = batch_size
    target = _csv("end-to-end", torch_device, out)
    rows: list[end_to_end.Row] = []
    failures: list[str] = []
    for rows in end_to_end.measure(
        load_recipe(recipe, overrides),
        torch_device,
        chosen,
        turns,
        _command(),
        compiled_engine=compiled_engine,
        on_failure=failures.append,
    ):
        end_to_end.write(target, rows)  # at each measurement, so that a later failure does not lose the earlier ones
    if not rows:
        _fail("; ".join(failures), 1)
    end_to_end_plots.plot(end_to_end.read(target), target.with_suffix(".png"))
    if json_file is not None:
        with replacing(json_file) as part:
            part.write_text(json.dumps({row.contender: table.cells(row) for row in rows}, indent=2) + "\n")
    header = ("contender", "s/iteration", "student", "generator", "images/s", *(f"× {peer}" for peer in SPEEDUPS), "MiB", "student MiB")
    cells = [
        (
            *(row.contender, f"{row.seconds_per_iteration:.4f}", f"{row.student_seconds:.4f}", f"{row.generator_seconds:.4f}"),
            f"{row.images_per_second:.1f}",
            *("" if speedup is None else f"{speedup:.2f}" for speedup in (getattr(row, column) for column in SPEEDUPS.values())),
            *("" if memory is None else f"{memory:.0f}" for memory in (row.peak_memory_mib, row.imitation_memory_mib)),
        )
        for row in rows
    ]
    title = f"{rows[0].recipe}, batch size {rows[0].batch_size}, {chosen}, {rows[0].provenance.device}"
    print_table(Console(), header, cells, figures=True, title=title)
    typer.echo(target)
    if failures:
        _fail("; ".join(failures), 1)


@app.command(name="model")
def run_model(
    recipe: Annotated[list[str], typer.Option(help="A shipped recipe or a TOML file; may be repeated.")],
    device: Annotated[str, typer.Option(help=f"One of {', '.join(model.DEVICES)}.")] = "h200",
    changes: Annotated[Names, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a recipe value; repeatable.")] = None,
    layers: Annotated[int, typer.Option(min=0, help="Print as many of the layers that take longest.")] = 0,
    by_layer: Annotated[Path | None, typer.Option(help="Also write this CSV, with the kernels of every layer of the last recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV to add to, plotted as a PNG; by default bench/results/model-DEVICE.csv.")] = None,
) -> None:
    """Predict the kernels of an iteration on a GPU, and their time at the device's rates; needs no GPU."""
    chosen = _known("--device", [device], list(model.DEVICES))[0]
    for option, path in (("--by-layer", by_layer), ("--out", out)):
        if path is not None:
            check_output(option, path)
    target = out or RESULTS / f"model-{chosen}.csv"
    if target.suffix == ".png":
        raise DfkdError(f"--out {target}: must not end in .png, which is the name of the plot beside it")
    if by_layer is not None and by_layer.resolve() == target.resolve():
        raise DfkdError(f"--by-layer {by_layer}: must be another file than --out")
    columns = table.names(model.Row)
    if target.exists() and table.header(target) != columns:
        raise DfkdError(f"--out {target}: has other columns than a table of this benchmark")
    settings = parse_overrides(changes or [])
    for name in recipe:
        model.load(name, settings)  # so that a mistake in the last one fails before the first is predicted
    for name in recipe:
        rows = model.predict_recipe(name, settings, chosen, _command())
        console = Console()
        print_table(console, *model.total_table(rows), figures=True, title=f"{name}, batch size {rows[0].batch_size}, {chosen}")
        print_table(console, *model.kind_table(rows), title="\nby kind of kernel and network", figures=True)
        if layers:
            print_table(console, *model.layer_table(rows, layers), title="\nthe layers that take longest in an iteration", figures=True)
        picture = model.write(target, rows)
        if by_layer is not None:
            model.write_layers(by_layer, rows)
    typer.echo(f"{target}\n{picture}")


@app.command(name="evaluation")
def run_evaluation(
    data_root: Annotated[Path, typer.Option(help="ImageNet's validation folder, or a subset of it.")],
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of the torchvision loader and threads of DALI.")] = 2,
    images: Annotated[int, typer.Option(min=1, help="Images per pass; files are repeated if there are fewer.")] = 200,
    turns: Annotated[int, typer.Option(min=1, help="Timed passes of each loader, interleaved.")] = 7,
    out: Annotated[Path | None, typer.Option(help="CSV to write; by default bench/results/evaluation-DEVICE.csv.")] = None,
) -> None:
    """Time the image loaders on a CPU, alone and followed by EfficientNet-Lite0."""
    torch.set_num_threads(workers)
    target = _csv("evaluation", torch.device("cpu"), out)
    measured = evaluation.measure(data_root, workers, images, turns, _command())
    table.write_anew(target, measured)
    header = ("stage", "loader", "images/s", "× torchvision", "quartiles")
    cells = [
        (row.stage, row.loader, f"{row.images_per_second:.1f}", f"{row.times_torchvision:.2f}", f"{row.lower:.2f} to {row.upper:.2f}")
        for row in measured
    ]
    print_table(Console(), header, cells)
    typer.echo(target)


@app.command(name="with-data")
def run_with_data(
    data_root: Annotated[Path, typer.Option(help="The data, as data.root.")],
    recipe: Annotated[str, typer.Option(help="Recipe without replay, name or file.")] = "cifar10-cpu",
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the run; by default the recipe's.")] = None,
    device: Annotated[str, typer.Option(help="One of auto, cpu, cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch and numba; PyTorch's default if not set.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV to write; by default bench/results/with-data-DEVICE.csv.")] = None,
) -> None:
    """Distill a recipe's student on real training images instead of generated ones, without their labels."""
    torch_device = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    target = _csv("with-data", torch_device, out)
    columns = table.names(with_data.Row)
    if target.exists() and table.header(target) != columns:
        raise DfkdError(f"--out {target}: has other columns than a table of this benchmark")
    chosen = load_recipe(recipe, {"data.root": str(data_root)} | ({} if seed is None else {"seed": seed}))
    row = with_data.measure(chosen, torch_device, _command(), _echo)
    header = ("recipe", "metric", "teacher", "student", "student samples", "seconds")
    accuracies = (f"{row.teacher_accuracy:.2f} %", f"{row.student_accuracy:.2f} %")
    print_table(Console(), header, [(row.recipe, row.metric, *accuracies, f"{row.student_samples:,}", f"{row.seconds:.0f}")])
    table.replace(target, columns, [table.cells(row)], ("recipe", "seed", "augment", "metric"))
    typer.echo(target)


@app.command(name="calibration")
def run_calibration(
    data_root: Annotated[Path, typer.Option(help="The data, as data.root.")],
    network: Annotated[str, typer.Option(help="Network or recipe, as for dfkd-fast compress.")] = "efficientnet_lite0",
    bits: Annotated[Names, typer.Option(help="Bits such as w4a8; may be repeated. By default w8a8, w4, w4a8, w4a4 and w3.")] = None,
    correction: Annotated[
        Names, typer.Option(help=f"One of {', '.join(calibration.CORRECTIONS)}; may be repeated. All by default.")
    ] = None,
    pretraining: Annotated[int | None, typer.Option(min=0, help="Steps of the generator; by default those of compress.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generator.")] = 0,
    device: Annotated[str, typer.Option(help="One of auto, cpu, cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch and numba; PyTorch's default if not set.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV to write; by default bench/results/calibration-DEVICE.csv.")] = None,
) -> None:
    """Accuracy of quantized copies of a network that are calibrated on generated images, noise or real images, and not trained."""
    corrections = _known("--correction", correction, calibration.CORRECTIONS)
    torch_device = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    target = _csv("calibration", torch_device, out)
    columns = table.names(calibration.Row)
    if target.exists() and table.header(target) != columns:
        raise DfkdError(f"--out {target}: has other columns than a table of this benchmark")
    changes = {"data.root": os.path.realpath(data_root), "loop.epochs": 1, "seed": seed, "data.loader": "torchvision"}
    if pretraining is not None:
        changes |= {"loop.generator_pretraining": pretraining, "loop.generator_steps": 1}  # no iteration follows
    recipe, overrides = compression_overrides(CompressRequest(network, overrides=changes))
    rows = calibration.measure(
        load_recipe(recipe, overrides),
        bits or ["w8a8", "w4", "w4a8", "w4a4", "w3"],
        torch_device,
        _command(),
        _echo,
        corrections,
    )
    for row in rows:
        _echo(f"{row.bits}  {row.correction}, {row.images} images: {row.metric} {row.accuracy:.2f} %, agreement {row.agreement:.2f} %")
        table.replace(target, columns, [table.cells(row)], ("network", "seed", "bits", "correction", "images", "pretraining"))
    typer.echo(target)


@app.command(name="kills")
def run_kills(
    count: Annotated[int, typer.Option(min=1, help="Number of trials; half of them target file writes and the teacher's training.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the points at which runs are killed.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for kills.json and kills.csv; by default bench/results/kills-cpu, with --trial none."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of concurrent runs, with one thread each.")] = 2,
    trial: Annotated[list[int] | None, typer.Option(min=0, help="Run only the trial with this number; may be repeated.")] = None,
) -> None:
    """Kill small runs on a CPU and resume them: each must end bit-identical to an uninterrupted run, or refuse with one line."""
    if not sys.platform.startswith("linux"):
        raise DfkdError(f"kills: requires Linux; this is {sys.platform}")
    target = out or (None if trial else RESULTS / "kills-cpu")
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)  # so that a bad path fails before the trials
    torch.set_num_threads(1)  # as in the runs; the device's name includes it
    runs, console = Path(tempfile.mkdtemp(prefix="kills-")), Console()
    results: list[trials.Result] = []
    origin = provenance.measured_on(torch.device("cpu"), _command()).columns(provenance.KERNELS)

    def on_result(result: trials.Result) -> None:
        results.append(result)
        if target is not None:
            trials.write(target, origin | {"seed": seed}, results)  # after each, so that an interrupted call keeps the results so far
        _echo(f"{len(results)}/{len(chosen)}: {result}")

    try:
        done = running.references(runs)
        chosen = [trials.draw(seed, number, done) for number in sorted(set(trial or range(count)))]
        running.run_all(chosen, done, runs, jobs, on_result)
        table_ = trials.rows(results)
        print_table(console, table.names(trials.Row), [tuple(map(str, table.cells(row).values())) for row in table_], figures=True)
        if target is not None:
            typer.echo(target)
        if failed := table_[-1].failed:
            _fail(f"{failed} of {len(results)} trials failed; their runs are in {runs}", 1)
    finally:
        if all(result.verdict.outcome != "FAILED" for result in results):
            shutil.rmtree(runs, ignore_errors=True)


@app.command()
def plot(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[CSV]...", help="By default micro-*.csv in bench/results, or end-to-end-*.csv."),
    ] = None,
    headline: Annotated[bool, typer.Option("--headline", help="Plot the engine's end-to-end speed beside its peers, as one SVG.")] = False,
    out: Annotated[Path | None, typer.Option(help="SVG of --headline; by default docs/images/speed.svg.")] = None,
) -> None:
    """Plot the kernels' speedup over eager, as one PNG per kernel beside each CSV; or the end-to-end headline figure."""
    kind = "end-to-end" if headline else "micro"
    if out is not None and not headline:
        raise DfkdError(f"--out {out}: must come with --headline; the other plots are written beside each CSV")
    csvs = files or sorted(RESULTS.glob(f"{kind}-*.csv"))
    if not csvs:
        raise DfkdError(f"{RESULTS} has no {kind}-*.csv: run python -m bench {kind} first, or name a CSV")
    if headline:
        typer.echo(_plot_headline(csvs, out or HEADLINE))
        return
    for path in csvs:
        for written in plots.plot(path):
            typer.echo(written)


def _plot_headline(csvs: Sequence[Path], target: Path) -> Path:
    rows = [row for path in csvs for row in end_to_end.read(path)]
    if not end_to_end_plots.headline_cases(rows):
        names = ", ".join(map(str, csvs))
        raise DfkdError(f"{names}: must have the engine and its peers with malloc reuse; python -m bench end-to-end measures them")
    target.parent.mkdir(parents=True, exist_ok=True)
    end_to_end_plots.plot_headline(rows, target)
    return target


@app.command(name="report")
def write_report(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN_OR_RESULTS]...", help="Run folders, and --out folders of python -m bench gpu, to add first."),
    ] = None,
) -> None:
    """Regenerate the tables of the documents from the files in bench/results."""
    for line in report.main(sources or []):
        typer.echo(line)


@app.command(name="ship")
def ship_teacher(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished dfkd-fast teach.")],
    name: Annotated[str, typer.Argument(help="Name of the teacher: shipped:NAME in recipes.")],
    data_root: Annotated[Path, typer.Option(help="Data set with the test images of the accuracy that is stored.")],
    note: Annotated[str, typer.Option(help="One sentence about the data that the teacher was trained on.")],
    commit: Annotated[str | None, typer.Option(help="Commit that trained it, if not the one that is checked out.")] = None,
) -> None:
    """Make a teacher of the package from a trained one: bfloat16, with its recipe, accuracy and log."""
    target = ship.FOLDER / f"{name}.safetensors"
    accuracy = ship.ship(run, data_root, note, target, commit or provenance.commit())
    typer.echo(f"{target}: {accuracy:.2f} %, {target.stat().st_size:,} bytes")


def main() -> NoReturn:
    """Run the command line; an error that the user can fix is one line on standard error and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except (DfkdError, OSError) as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; only rows that were already written are kept", 130)
    except Exception as error:
        # typer's usage errors, whose class differs between its versions
        if not hasattr(error, "format_message"):
            raise
        _fail(describe_usage_error(error), 2)


def _known(option: str, names: Names, known: Sequence[str] | dict[str, cases.Kernel]) -> list[str]:
    for name in names or []:
        if name not in known:
            raise DfkdError(f"{option} {name!r}: must be one of {', '.join(known)}")
    return names or []


def _csv(kind: str, device: torch.device, out: Path | None) -> Path:
    """Return the CSV of a benchmark, after a check that a file of the user's choice can be written."""
    if out is not None:
        check_output("--out", out)
    return out or RESULTS / f"{kind}-{provenance.file_name(device)}.csv"


def _command() -> str:
    return f"python -m bench {' '.join(sys.argv[1:])}"


def _echo(line: str) -> None:
    with suppress(OSError):  # a closed terminal must not end the stages
        typer.echo(line)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"bench: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
