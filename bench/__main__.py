"""The command line ``python -m bench``: everything on a GPU, single benchmarks, and the documents made from their results."""

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
from dfkd_fast.console import print_table
from dfkd_fast.engine.device import device_name, pick_device
from dfkd_fast.engine.precision import resolve_precision
from dfkd_fast.errors import DfkdError
from dfkd_fast.files import check_output, replacing
from dfkd_fast.recipe import load_recipe

from . import end_to_end, evaluation, host, provenance, report, table
from . import methods as costs
from . import micro as cases
from . import plot as pictures
from .gpu import rehearsal, schedule
from .gpu.folder import Folder, check_out
from .gpu.stages import STAGES
from .kills import running, trials
from .micro import rows, runner, timing
from .micro.workload import Mode

app = typer.Typer(help="Benchmarks of dfkd_fast.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
BUSY = 0.25  # of the cores, wanted before this process wants one
RESULTS = provenance.ROOT / "bench" / "results"

METHODS = ("digits-dfad", "digits-mad", "digits-bank", "digits-vae", "digits-retain-first-order", "digits-retain")

Names = list[str] | None


@app.command(name="gpu")
def run_gpu(
    stage: Annotated[
        Names, typer.Option(help=f"Of {', '.join(one.name for one in STAGES)}; may be repeated. What is not done by default.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="For all of it; what does not fit is left for the next call.")] = 9.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; by default .bench-gpu/out.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder with MNIST, for the accuracy stage.")] = None,
    commit: Annotated[str | None, typer.Option(help="What is measured, where git cannot tell.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="On a CPU, at toy size: Triton interpreted, the CUDA kernels compiled for it.")
    ] = False,
) -> None:
    """Check and measure everything on a GPU in the minutes that one is there; a second call goes on."""
    chosen = _known("--stage", stage, [one.name for one in STAGES])
    if not 0 < minutes < math.inf:
        raise DfkdError(f"--minutes {minutes:g}: must be above 0")
    if data_root is not None and not data_root.is_dir():
        raise DfkdError(f"--data-root {data_root}: is not a folder")
    if commit is not None and not re.fullmatch(r"[\w.-]+", commit):
        raise DfkdError(f"--commit {commit!r}: must be letters, digits, '.', '_' and '-'")
    if not rehearse and not torch.cuda.is_available():
        raise DfkdError("PyTorch sees no GPU here; --rehearse runs everything at toy size on a CPU")
    device = torch.device("cpu" if rehearse else "cuda")
    target = out or schedule.STATE / ("rehearsal" if rehearse else "out")
    if out is not None:
        check_out(out)
    schedule.STATE.mkdir(exist_ok=True)
    with (
        schedule.alone(),
        tempfile.TemporaryDirectory() as temporary,  # a rehearsal has no next call
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
            _echo("the commit is unknown here: --commit names it")
        _echo(f"results: {target}")
        for line in campaign.run(minutes, chosen):
            _echo(line)
    if campaign.failed:
        sys.exit(1)


@app.command()
def micro(
    kernel: Annotated[Names, typer.Option(help=f"Of {', '.join(cases.KERNELS)}; may be repeated. All by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    mode: Annotated[Names, typer.Option(help=f"Of {', '.join(get_args(Mode))}; may be repeated. All by default.")] = None,
    size: Annotated[Names, typer.Option(help="Such as resnet18, 256x1000, 2x256x3x32x32; any; may be repeated. A few by default.")] = None,
    provider: Annotated[Names, typer.Option(help=f"Of {', '.join(cases.PROVIDERS)}; may be repeated. All by default.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch and numba; PyTorch's choice by default.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Measured calls; about a second a case by default.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All sizes, dtypes, layouts and variants.")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV that takes the rows in; by default bench/results/micro-DEVICE.csv.")] = None,
    commit: Annotated[str | None, typer.Option(help="What was measured, where git cannot tell.")] = None,
) -> None:
    """Time the kernels against plain PyTorch, torch.compile and the field's; whoever computes something else gets no time."""
    kernels = _known("--kernel", kernel, cases.KERNELS)
    modes, providers = _known("--mode", mode, get_args(Mode)), _known("--provider", provider, cases.PROVIDERS)
    workloads = cases.select(kernels or list(cases.KERNELS), size or [], everything)
    for option, number in (("--threads", threads), ("--repeats", repeats)):
        if number is not None and number < 1:
            raise DfkdError(f"{option} {number}: must be a whole number ≥ 1")
    place = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    turn = timing.turn_on(place)
    run = runner.Run(
        device=place,
        modes=modes,
        providers=providers,
        repeats=repeats,
        turn=turn,
        copy_bandwidth=timing.copy_bandwidth(turn, place),
        provenance=provenance.measured_on(place, _command(), commit),
    )
    target = out or RESULTS / f"micro-{provenance.file_name(place)}.csv"
    console, count, red = Console(), 0, 0
    console.print(f"{device_name(place)}: a large copy moves {run.copy_bandwidth / 1e9:.3g} GB/s", highlight=False)
    if (load := run.provenance.load) > BUSY * (os.cpu_count() or 1):
        console.print(f"this machine is busy (load {load}): nothing measured now is worth publishing", highlight=False)
    for workload in workloads:
        measured = [row for case in run.rows(workload) for row in case]
        if not measured:
            continue
        rows.write(target, map(table.cells, measured))
        title = " ".join(filter(None, (workload.kernel, workload.variant, workload.size, measured[0].dtype, workload.layout)))
        print_table(console, *rows.printed(measured), title=f"\n{title}")
        count += len(measured)
        red += sum(row.red for row in measured)
    if not count:
        raise DfkdError(f"--mode {', '.join(modes) or 'all'}, --provider {', '.join(providers) or 'all'}: no chosen case has both")
    console.print(f"\n{target}", highlight=False, soft_wrap=True)
    if red:
        _fail(f"{red} of {count} rows have no time: they are wrong or failed", 1)


@app.command(name="host")
def run_host(
    network: Annotated[Names, typer.Option(help=f"Of {', '.join(cases.ema.NETWORKS)}; may be repeated. The ResNets by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="By default bench/results/host-DEVICE.csv.")] = None,
) -> None:
    """Time what the update of an average costs the host, its kernel replaced by nothing."""
    place = pick_device(device)
    chosen = _known("--network", network or list(host.NETWORKS), list(cases.ema.NETWORKS))
    measured = host.measure(chosen, place, _command())
    target = out or RESULTS / f"host-{provenance.file_name(place)}.csv"
    table.write_anew(target, measured)
    header = ("network", "tensors", "call", "median µs", "20–80 %")
    cells = [(row.network, str(row.tensors), row.call, f"{row.median_us:.1f}", f"{row.q20_us:.1f}–{row.q80_us:.1f}") for row in measured]
    print_table(Console(), header, cells)
    typer.echo(target)


@app.command()
def methods(
    recipe: Annotated[Names, typer.Option(help="The first is what the others are set against; repeated. The digits' by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of PyTorch and numba; PyTorch's choice by default.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Measured iterations of each.")] = 15,
    out: Annotated[Path | None, typer.Option(help="By default bench/results/methods-DEVICE.csv.")] = None,
) -> None:
    """Time and memory of an iteration of each method, relative to the first recipe's."""
    place = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    rows_ = costs.measure(recipe or list(METHODS), place, turns, _command())
    target = out or RESULTS / f"methods-{provenance.file_name(place)}.csv"
    table.write_anew(target, rows_)
    header = ("recipe", "fresh + replayed", "ms an iteration", "× first", "peak MiB", "over first")
    cells = [
        (
            *(row.recipe, f"{row.fresh_rows} + {row.replayed_rows}", f"{row.iteration_ms:.1f}", f"{row.times_first:.2f}"),
            *(f"{row.peak_memory_mib:.0f}", f"{row.memory_over_first_mib:+.0f}"),
        )
        for row in rows_
    ]
    print_table(Console(), header, cells)
    typer.echo(target)


@app.command(name="end-to-end")
def run_end_to_end(
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a TOML file.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="Of the engine and of the compiled plain loop: fp32, bf16, fp16, or auto, as a run has it on the device.")
    ] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Fresh samples a step; the recipe's by default.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Not read: the networks are untrained.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch and numba; PyTorch's choice by default.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Measured iterations of each contender, interleaved on a CPU.")] = 7,
    compiled_engine: Annotated[bool, typer.Option("--compiled-engine", help="Time the engine under torch.compile, too.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write a section a contender to this file, too.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV that takes the rows in; by default bench/results/end-to-end-DEVICE.csv.")] = None,
) -> None:
    """Time whole iterations: plain eager, plain compiled with autocast and channels-last, and the engine feature by feature."""
    for option, file in (("--json", json_file), ("--out", out)):
        if file is not None:
            check_output(option, file)
    place = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    setting = _known("--precision", [precision], get_args(PrecisionSetting))[0]
    chosen = resolve_precision(cast(PrecisionSetting, setting), place)
    overrides: dict[str, object] = {"data.root": str(data_root)} if data_root else {}
    if batch_size is not None:
        overrides["loop.batch_size"] = batch_size
    target = out or RESULTS / f"end-to-end-{provenance.file_name(place)}.csv"
    found: list[end_to_end.Row] = []
    failures: list[str] = []
    for found in end_to_end.measure(
        load_recipe(recipe, overrides),
        place,
        chosen,
        turns,
        _command(),
        compiled_engine=compiled_engine,
        failed=failures.append,
    ):
        end_to_end.write(target, found)  # a later contender's failure must not cost what is known
    if not found:
        _fail("; ".join(failures), 1)
    end_to_end.draw(table.read(target), target.with_suffix(".png"))
    if json_file is not None:
        with replacing(json_file) as part:
            part.write_text(json.dumps({row.contender: table.cells(row) for row in found}, indent=2) + "\n")
    header = ("contender", "s", "student", "generator", "images/s", "× plain", "× compiled", "MiB", "student MiB")
    cells = [
        (
            *(row.contender, f"{row.seconds_per_iteration:.4f}", f"{row.student_seconds:.4f}", f"{row.generator_seconds:.4f}"),
            f"{row.images_per_second:.1f}",
            *("" if speedup is None else f"{speedup:.2f}" for speedup in (row.speedup_over_plain, row.speedup_over_plain_compiled)),
            *("" if memory is None else f"{memory:.0f}" for memory in (row.peak_memory_mib, row.imitation_memory_mib)),
        )
        for row in found
    ]
    title = f"{found[0].recipe}, batch {found[0].batch_size}, {chosen}, {found[0].provenance.device}"
    print_table(Console(), header, cells, figures=True, title=title)
    typer.echo(target)
    if failures:
        _fail("; ".join(failures), 1)


@app.command(name="evaluation")
def run_evaluation(
    data_root: Annotated[Path, typer.Option(help="ImageNet's validation images, or some of every class.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes of torchvision's loader, threads of DALI's.")] = 2,
    images: Annotated[int, typer.Option(min=1, help="Of a turn; files are repeated if there are fewer.")] = 200,
    turns: Annotated[int, typer.Option(min=1, help="Measured passes of each loader, interleaved.")] = 7,
    out: Annotated[Path | None, typer.Option(help="By default bench/results/evaluation-DEVICE.csv.")] = None,
) -> None:
    """Time the loaders of image files on a CPU, alone and with EfficientNet-Lite0 behind them."""
    torch.set_num_threads(workers)
    found = evaluation.measure(data_root, workers, images, turns, _command())
    target = out or RESULTS / f"evaluation-{provenance.file_name(torch.device('cpu'))}.csv"
    table.write_anew(target, found)
    header = ("stage", "loader", "images/s", "× torchvision", "quartiles")
    cells = [
        (row.stage, row.loader, f"{row.images_per_second:.1f}", f"{row.times_torchvision:.2f}", f"{row.lower:.2f} to {row.upper:.2f}")
        for row in found
    ]
    print_table(Console(), header, cells)
    typer.echo(target)


@app.command(name="kills")
def run_kills(
    count: Annotated[int, typer.Option(min=1, help="Trials; half of them aim at writes and at the teacher's training.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the points at which runs are killed.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for kills.json and kills.csv; by default bench/results/kills-cpu, and none with --trial.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, of one thread each.")] = 2,
    trial: Annotated[list[int] | None, typer.Option(min=0, help="The number of a trial to run alone; may be repeated.")] = None,
) -> None:
    """Kill small runs on a CPU and resume them: each must end bit-identical to one that was not killed, or refuse in one line."""
    if not sys.platform.startswith("linux"):
        raise DfkdError(f"kills: needs Linux, and this is {sys.platform}")
    target = out or (None if trial else RESULTS / "kills-cpu")
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)  # now, not after the trials
    torch.set_num_threads(1)  # as the runs have it, and the device's name says
    runs, console = Path(tempfile.mkdtemp(prefix="kills-")), Console()
    results: list[trials.Result] = []
    origin = provenance.measured_on(torch.device("cpu"), _command()).columns(provenance.KERNELS)

    def tell(result: trials.Result) -> None:
        results.append(result)
        if target is not None:
            trials.write(target, origin | {"seed": seed}, results)  # at each, so that an interrupted call keeps what is known
        _echo(f"{len(results)}/{len(chosen)}: {result}")

    try:
        done = running.references(runs)
        chosen = [trials.draw(seed, number, done) for number in sorted(set(trial or range(count)))]
        running.run_all(chosen, done, runs, jobs, tell)
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
    files: Annotated[list[Path] | None, typer.Argument(metavar="[CSV]...", help="By default those in bench/results.")] = None,
) -> None:
    """Draw the speed-ups over eager, one picture a kernel, next to each CSV."""
    found = files or sorted(RESULTS.glob("micro-*.csv"))
    if not found:
        raise DfkdError(f"{RESULTS} has no micro-*.csv: run python -m bench micro first, or name a CSV")
    for path in found:
        for picture in pictures.draw(path):
            typer.echo(picture)


@app.command(name="report")
def write_report(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN_OR_RESULTS]...", help="Folders of runs, and --out folders of python -m bench gpu, to take in first."),
    ] = None,
) -> None:
    """Write the tables of README.md and docs/gpu.md anew from the files in bench/results."""
    for line in report.main(sources or []):
        typer.echo(line)


def main() -> NoReturn:
    """Run the command line; what a user can mend is one line on standard error and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except (DfkdError, OSError) as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; the rows so far are written", 130)
    except Exception as error:
        # typer's own complaints about the command line, whose class moved between its versions
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)


def _known(option: str, given: Names, known: Sequence[str] | dict[str, cases.Kernel]) -> list[str]:
    for name in given or []:
        if name not in known:
            raise DfkdError(f"{option} {name!r}: must be one of {', '.join(known)}")
    return given or []


def _command() -> str:
    return f"python -m bench {' '.join(sys.argv[1:])}"


def _echo(line: str) -> None:
    with suppress(OSError):  # a terminal that is gone must not cost the stages
        typer.echo(line)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"bench: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
