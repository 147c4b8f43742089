"""The tables of README.md and docs/, generated from the files in bench/results.

``python -m bench report``                      regenerate the tables
``python -m bench report SOURCE [SOURCE ...]``  first import these sources: run folders, run at the commit checked out, and
                                                what ``python -m bench gpu`` wrote on a GPU

``importing.py`` reads the sources, ``checks.py`` validates them, and ``summaries.py`` writes what a GPU reported beside its rows;
``results.py`` loads the files. ``readme.py`` makes the README's table, ``methods.py`` those of the methods' pages, ``cpu.py`` the tables
measured on CPUs, ``gpu.py`` those measured on GPUs, ``replays.py`` that of the replays on CIFAR-10, ``calibration.py`` those of calibrated
copies, ``compressed.py`` that of compressed networks, ``predictions.py`` that of predicted steps, and ``teachers.py`` that of the shipped
teachers; ``markdown.py`` formats a table and replaces it in a document.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import replacing

from ..provenance import ROOT
from . import calibration, compressed, cpu, gpu, methods, predictions, readme, replays, teachers
from .cpu import end_to_end_table
from .importing import Importer
from .markdown import fill
from .results import Results

__all__ = ["documents", "end_to_end_table", "main"]


def main(sources: Iterable[Path] = (), root: Path = ROOT) -> list[str]:
    """Import the sources, then regenerate the tables of all documents; nothing is written if a source is refused.

    Args:
        sources: folders of runs; the ``--out`` folders of ``python -m bench gpu``, or their ``results.jsonl``.
        root: the folder that holds README.md, docs and bench/results.

    Returns:
        One line for each run or device that was imported.

    Raises:
        DfkdError: a source is not one of these, or holds something that may not be published, or a document lacks a table's marker.
    """
    importer = Importer()
    for source in sources:
        importer.read(source)
    results = root / "bench" / "results"
    # Whatever goes wrong, also in a table, goes wrong in the copy.
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in _files(results):
            shutil.copyfile(path, copy / path.name)
        lines = importer.write(copy)
        contents = {results / path.name: path.read_bytes() for path in _files(copy)}
        contents |= {root / name: fill(root / name, sections).encode() for name, sections in _rendered(copy).items()}
    for path, content in contents.items():
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(content)
    return lines


def documents(results: Results) -> dict[str, dict[str, str]]:
    """Every table as Markdown, by the path of its document and by its marker there."""
    tables = cpu.sections(results) | gpu.extracts(results)
    return {
        "README.md": readme.sections(results),
        "docs/results.md": {cpu.RUNS: tables[cpu.RUNS]},
        "docs/segmentation.md": {cpu.SEGMENTATION: tables[cpu.SEGMENTATION]},
        "docs/benchmarks.md": {
            marker: tables[marker] for marker in (cpu.END_TO_END, gpu.END_TO_END_EXTRACT, cpu.METHODS, gpu.METHOD_EXTRACT)
        },
        "docs/kernels.md": {marker: tables[marker] for marker in (cpu.KERNELS, gpu.KERNEL_EXTRACT)},
        "docs/evaluation.md": {cpu.EVALUATION: tables[cpu.EVALUATION]},
        "docs/cifar10.md": {replays.REPLAYS: replays.replay_table()},
        "docs/compress.md": {compressed.COMPRESSED: compressed.compressed_table(), **calibration.sections(results)},
        "docs/gpu.md": gpu.sections(results) | {predictions.PREDICTIONS: predictions.prediction_table(results)},
        "docs/weights.md": {teachers.TEACHERS: teachers.teacher_table()},
        **methods.sections(results),
    }


def _files(results: Path) -> list[Path]:
    return [path for path in sorted(results.glob("*")) if path.suffix in (".csv", ".json", ".jsonl")]


def _rendered(results: Path) -> dict[str, dict[str, str]]:
    try:
        return documents(Results(results))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DfkdError(f"no tables can be made of these results: {type(error).__name__}: {first_line(error)}") from error
