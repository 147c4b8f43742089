"""The command line: ``dfkd-fast``."""

import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TextIO

import typer
from rich.console import Console

# No module that imports PyTorch, which takes seconds: each command imports what it needs.
from .choices import DeviceName, Loader, LogLevel, PrecisionName
from .console import Terminal
from .environment import check_environment, set_wait_policy
from .errors import DfkdError, describe_os_error, describe_usage_error, first_line
from .files import expanded
from .interrupt import Interrupted, discard, interrupting_on_signals
from .out_of_memory import is_out_of_memory, one_line_message
from .renamed import RenamedKeyWarning

__all__ = ["app", "main"]

SHOW_WARNING = warnings.showwarning
COLUMNS = "[2-9][0-9]|[1-9][0-9]{2,3}"
"""Accepted widths of a terminal: 20 to 9999 columns."""

app = typer.Typer(
    help="Distill a frozen teacher into a small student, without any data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _path(text: str) -> Path:
    """Parse a path; an empty string, as an unset shell variable gives, would otherwise mean the current folder."""
    if not text:
        raise typer.BadParameter("an empty path")
    return Path(text)


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (see dfkd-fast recipes) or a TOML file.")]
Out = Annotated[
    Path | None, typer.Option(parser=_path, metavar="PATH", help="Run folder; default: runs/RECIPE, with a number if it exists.")
]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a recipe value; repeatable.")]
DataRoot = Annotated[Path | None, typer.Option(parser=_path, metavar="PATH", help="Folder of the data set; nothing is downloaded.")]
Device = Annotated[DeviceName, typer.Option(help="Device to run on.")]
Seed = Annotated[int | None, typer.Option(help="Random seed; default: the recipe's.")]
WeightsKey = Annotated[
    str, typer.Option(metavar="KEY", help="Key of the weights in a file with several state dicts, such as model_ema or state_dict.teacher.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Level = Annotated[
    LogLevel, typer.Option("--log-level", help="Least severe messages to print beside the results: progress is info, notes are warnings.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in --out from its newest checkpoint.")]


@app.command()
def distill(
    recipe: RecipeName,
    out: Out = None,
    changes: Changes = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            parser=_path,
            metavar="PATH",
            help="Weights of the teacher: a file or shipped:NAME. Default: the recipe's; without any, a teacher is trained.",
        ),
    ] = None,
    weights_key: WeightsKey = "",
    data_root: DataRoot = None,
    device: Device = "auto",
    seed: Seed = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Wall-clock time of the student's training, such as 40min; loop.epochs follows from it."),
    ] = None,
    auto_batch_size: Annotated[bool, typer.Option("--auto-batch-size", help="Use the largest loop.batch_size that fits the GPU.")] = False,
    fit: Annotated[bool, typer.Option("--fit", hidden=True)] = False,
    resume: Resume = False,
    quiet: Quiet = False,
    log_level: Level = "info",
) -> None:
    """Distill the recipe's student from its teacher."""
    passive = set_wait_policy()  # before PyTorch is imported
    from .commands import distill as command
    from .commands.device import device_context
    from .recipe import load_recipe
    from .run import open_run

    overrides = _overrides(changes, teacher=teacher, weights_key=weights_key, data_root=data_root, seed=seed)
    if budget == "":  # as an unset shell variable gives; in a recipe it means none
        raise DfkdError("--budget '': must be a duration, such as 40min")
    if budget is not None:
        overrides["loop.budget"] = budget
    with device_context(device) as compute_device, _console(quiet, log_level) as console:
        _log_wait_policy(passive, compute_device.type)
        if fit:
            warnings.warn("--fit is now called --auto-batch-size", RenamedKeyWarning, stacklevel=1)
        if auto_batch_size or fit:
            overrides["loop.batch_size"] = command.auto_batch_size(load_recipe(recipe, overrides), compute_device).loop.batch_size
        with open_run("distill", recipe, overrides, out, resume, compute_device, console) as run:
            command.distill(run)


@app.command()
def compress(
    network: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A model name, your MODULE:FUNCTION, or a recipe, whose teacher is compressed.")
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            parser=_path, metavar="PATH", help="Weights of the network: a file or shipped:NAME; default: the recipe's or a package's."
        ),
    ] = None,
    weights_key: WeightsKey = "",
    bits: Annotated[
        str | None, typer.Option(metavar="wXaY", help="Bits of weights (3, 4, 8) and activations (4, 8); 32 for float. Default: w4a8.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Wall-clock time of the recovery; default: 30min. loop.epochs follows from it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SET", help="Data set in --data-root; default: imagenet for 1,000 classes, or folder.")
    ] = None,
    data_root: DataRoot = None,
    out: Out = None,
    changes: Changes = None,
    device: Device = "auto",
    seed: Seed = None,
    resume: Resume = False,
    quiet: Quiet = False,
    log_level: Level = "info",
) -> None:
    """Quantize a network and let it recover without data."""
    passive = set_wait_policy()  # before PyTorch is imported
    from .commands import compress as command
    from .commands.device import device_context
    from .run import open_run

    overrides = _overrides(changes, teacher=weights, weights_key=weights_key, data_root=data_root, seed=seed)
    request = command.CompressRequest(network, bits, budget, data, overrides, resume)
    with device_context(device) as compute_device, _console(quiet, log_level) as console:
        _log_wait_policy(passive, compute_device.type)
        recipe, overrides = command.compression_overrides(request)
        with open_run("compress", recipe, overrides, out, resume, compute_device, console) as run:
            command.compress(run)


@app.command()
def teach(
    recipe: RecipeName,
    out: Out = None,
    changes: Changes = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    seed: Seed = None,
    resume: Resume = False,
    quiet: Quiet = False,
    log_level: Level = "info",
) -> None:
    """Train the recipe's teacher and save its weights; where the recipe uses a shipped teacher, train it anew."""
    passive = set_wait_policy()  # before PyTorch is imported
    from .commands import teach as command
    from .commands.device import device_context
    from .models import is_shipped
    from .recipe import load_recipe
    from .run import open_run

    overrides = _overrides(changes, data_root=data_root, seed=seed)
    if "teacher.weights" not in overrides and is_shipped(load_recipe(recipe, overrides).teacher.weights):
        overrides["teacher.weights"] = ""
    with (
        device_context(device) as compute_device,
        _console(quiet, log_level) as console,
        open_run("teach", recipe, overrides, out, resume, compute_device, console) as run,
    ):
        _log_wait_policy(passive, compute_device.type)
        command.teach(run)


@app.command()
def evaluate(
    targets: Annotated[
        list[Path] | None, typer.Argument(parser=_path, metavar="[RUN_OR_WEIGHTS]...", help="Run folders or weight files.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SET", help="Data set of image files in --data-root: imagenet, places365, folder or list.")
    ] = None,
    data_root: DataRoot = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Network of a weight file without metadata, or efficientnet_lite0, whose weights a package holds; repeatable."),
    ] = None,
    loader: Annotated[Loader | None, typer.Option(help="Decoder of image files; auto: DALI if installed.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch size.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Workers that decode image files; default with --data: one per core.")] = None,
    strict: Annotated[bool | None, typer.Option(help="Fail on a file that cannot be decoded, or skip it.")] = None,
    precision: Annotated[PrecisionName, typer.Option(help="Precision of the forward passes.")] = "fp32",
    recipe: Annotated[str | None, typer.Option(help="Recipe of a weight file without metadata: its network and data.")] = None,
    role: Annotated[Literal["teacher", "student"] | None, typer.Option(help="Role of a weight file without metadata.")] = None,
    weights_key: WeightsKey = "",
    changes: Changes = None,
    device: Device = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=_path, metavar="PATH", help="Also write the metrics to this file.")
    ] = None,
    quiet: Quiet = False,
    log_level: Level = "info",
) -> None:
    """Evaluate students and teachers on labelled images: accuracy, and agreement with the teacher."""
    passive = set_wait_policy()  # before PyTorch is imported
    from .commands import evaluate as command
    from .commands.candidates import EvaluationRequest
    from .commands.device import device_context
    from .recipe import load_recipe

    if data is not None:
        command.check_image_files(data)
        batch_size, workers = batch_size or 64, os.cpu_count() if workers is None else workers
    chosen = {"data.loader": loader, "data.batch_size": batch_size, "data.workers": workers, "data.strict": strict}
    overrides = {path: value for path, value in chosen.items() if value is not None} | _overrides(changes, data_root=data_root)
    named = load_recipe(recipe, ({"data.name": data} if data else {}) | overrides) if recipe else None
    request = EvaluationRequest(targets or [], data, model or [], named, role, overrides, precision, weights_key)
    with device_context(device) as compute_device, _console(quiet, log_level) as console:
        _log_wait_policy(passive, compute_device.type)
        command.evaluate_and_print(request, compute_device, console, json_file)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(parser=_path, metavar="RUN...", help="Folders of finished runs.")],
    plot: Annotated[Path, typer.Option("--out", parser=_path, metavar="PATH", help="File of the plot.")] = Path("compare.png"),
    minutes: Annotated[bool, typer.Option("--minutes", help="Plot the accuracy over minutes instead of epochs.")] = False,
) -> None:
    """Compare finished runs: accuracy and retention in one table and one plot."""
    from .commands.compare import compare_runs

    compare_runs(runs, plot, Console(), over_minutes=minutes)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from .commands.recipes import print_recipes

    print_recipes(Console())


@app.command()
def show(recipe: RecipeName, changes: Changes = None) -> None:
    """Print a recipe with every value resolved."""
    from .recipe import load_recipe, recipe_to_toml

    shown_recipe = recipe_to_toml(load_recipe(recipe, _overrides(changes)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # TOML is, whatever the terminal has
    typer.echo(shown_recipe, nl=False)


@app.command()
def doctor(
    teacher: Annotated[str | None, typer.Option(metavar="RECIPE", help="Check this recipe's teacher instead of the machine.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            parser=_path, metavar="PATH", help="Weights of the teacher: a file or shipped:NAME; default: the recipe's teacher.weights."
        ),
    ] = None,
    weights_key: WeightsKey = "",
    data_root: DataRoot = None,
    changes: Changes = None,
    device: Device = "auto",
) -> None:
    """Check the machine (devices, packages, kernel backends), or with --teacher a teacher against its recipe."""
    from .commands import doctor as command
    from .commands.device import device_context
    from .recipe import load_recipe

    if teacher is None:
        values = {"--weights": weights, "--weights-key": weights_key, "--data-root": data_root, "--set": changes}
        if unused := [option for option, value in values.items() if value]:
            raise DfkdError(f"{unused[0]}: requires --teacher RECIPE")
        command.print_machine(Console())
        return
    overrides = _overrides(changes, teacher=weights, weights_key=weights_key, data_root=data_root)
    with device_context(device) as compute_device, _console(False, "info") as console:
        command.print_teacher(load_recipe(teacher, overrides), compute_device, console)


@app.command()
def build(verbose: Annotated[bool, typer.Option("--verbose", help="Print the compiler's commands and output.")] = False) -> None:
    """Compile the CUDA kernels, once per installation; needs nvcc, but no GPU."""
    from .kernels.build import BuildError, compile_extension
    from .kernels.extension import BINARY

    try:
        compile_extension(BINARY, verbose)
    except BuildError as error:
        raise DfkdError(first_line(error)) from error
    typer.echo(f"built {BINARY}")


def main() -> NoReturn:
    """Run the command line; an error that the user can fix is one line on standard error and exit code 2."""
    warnings.showwarning = _show_warnings_once()
    _prepare_terminal()
    try:
        check_environment()
        with interrupting_on_signals():
            sys.exit(app(standalone_mode=False))
    except DfkdError as error:
        _fail(_with_options(str(error)), 2)
    except Interrupted as interrupted:
        _fail(str(interrupted), interrupted.exit_code)
    except BrokenPipeError:
        discard(sys.stdout.fileno())  # the reader has closed the pipe
        sys.exit(1)
    except OSError as error:
        _fail(describe_os_error(error), 2)
    except Exception as error:
        if is_out_of_memory(error):
            _fail(one_line_message(error), 2)
        # typer's usage errors, whose class moved between its versions
        if not hasattr(error, "format_message"):
            if _is_one_of_several() and _failed_elsewhere():
                sys.exit(1)
            raise
        _fail(describe_usage_error(error), 2)


def _prepare_terminal() -> None:
    """Replace characters that the output's encoding lacks, and drop environment variables that would break rich or matplotlib."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if not re.fullmatch(COLUMNS, os.environ.get("COLUMNS", "")):
        os.environ.pop("COLUMNS", None)
    os.environ.pop("MPLBACKEND", None)  # plots are drawn without a window; matplotlib fails to import with a backend that it does not know


@contextmanager
def _console(quiet: bool, level: LogLevel) -> Iterator[Console]:
    """The console of results and log messages, silent in all processes but the first."""
    from .log import log_to_console

    console = Terminal(quiet=quiet or _rank() > 0)
    with log_to_console(console, level):
        yield console


def _log_wait_policy(passive: bool, device: str) -> None:
    """Say that the command found a busy machine, and what is faster than its remedy."""
    from .log import LOGGER

    if passive and device == "cpu":
        LOGGER.info(
            "other programs use this machine's cores: OMP_WAIT_POLICY=passive was set, so that waiting threads leave them free;"
            " for two runs side by side, OMP_NUM_THREADS=%d for each is faster",
            max(1, (os.cpu_count() or 1) // 2),
        )


def _is_one_of_several() -> bool:
    """Whether this process is one of several of a launcher."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _reports_exit() -> bool:
    """Whether this process is the one that reports why the command ends."""
    from . import distributed

    return distributed.reports_exit()


def _failed_elsewhere() -> bool:
    """Whether an error of this process follows from that of another one, which reports it."""
    from . import distributed

    return distributed.failed_elsewhere(wait=4 * distributed.REPORT_GRACE)


def _rank() -> int:
    """Rank of this process, from 0."""
    from . import distributed

    return distributed.rank()


def _show_warnings_once() -> Callable[..., None]:
    """A ``warnings.showwarning`` that prints the package's own warnings as one line, once per command, in the first process."""
    shown: set[str] = set()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        if category.__module__.partition(".")[0] != __package__:
            SHOW_WARNING(message, category, filename, lineno, file, line)
        elif str(message) not in shown and _rank() == 0:
            shown.add(str(message))
            typer.echo(f"dfkd-fast: {message}", err=True)

    return show


OPTIONS = {
    "loop.budget": ("--budget",),
    "data.root": ("--data-root",),
    "data.loader = 'torchvision'": ("--loader torchvision",),
    "data.strict = false": ("--no-strict",),
    "teacher.weights": ("--weights", "--teacher"),  # doctor has both, and its --teacher takes a recipe
    "teacher.weights_key": ("--weights-key",),
    "use 'cpu'": ("--device cpu",),
}
"""Recipe fields that error messages name, and the options that set them, of which the first that the command has is shown."""


def _with_options(message: str) -> str:
    """Returns the error message with each recipe field followed by the option of the current command that sets it."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    parsed = getattr(typer.main.get_command(app), "commands", {}).get(command)
    available = {name for parameter in parsed.params for name in (*parameter.opts, *parameter.secondary_opts)} if parsed else set()
    for field, options in OPTIONS.items():
        option = next((option for option in options if option.split()[0] in available), None)
        if option is not None:
            # A key in quotes is a suggestion, and one after a comma is in a list of all keys: both are to be typed as they are.
            message = re.sub(rf"(?<!\S)(?<!, ){re.escape(field)}(?!\w)", f"{field} ({option})", message, count=1)
    return message


def _fail(message: str, code: int) -> NoReturn:
    if _is_one_of_several():
        if not _reports_exit():
            sys.exit(code)
        if (number := os.environ.get("RANK", "0")) != "0":
            message = f"process {number}: {message}"
    # Names from files may hold control characters, or bytes that cannot be encoded.
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
    typer.echo(f"dfkd-fast: {line}", err=True)
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout.fileno())  # Python would flush again at exit, and fail again
    sys.exit(code)


def _overrides(
    changes: list[str] | None,
    *,
    teacher: Path | None = None,
    weights_key: str = "",
    data_root: Path | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Recipe overrides of the options, by dotted path."""
    from .recipe_files import parse_overrides

    overrides = parse_overrides(changes or [])
    for path, value in (("teacher.weights", teacher), ("data.root", data_root)):
        if value is not None:
            is_name = str(value) == "package" or str(value).startswith("shipped:")
            overrides[path] = str(value) if is_name else os.path.realpath(expanded(value))
    if weights_key:
        overrides["teacher.weights_key"] = weights_key
    if seed is not None:
        overrides["seed"] = seed
    return overrides
