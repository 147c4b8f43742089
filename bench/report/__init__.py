"""The tables of README.md and docs/gpu.md, from the files in bench/results.

``python -m bench report``                      write the tables anew
``python -m bench report SOURCE [SOURCE ...]``  first take in these sources: folders of runs, run at the commit checked out, and
                                                what ``python -m bench gpu`` wrote on a GPU

``taking.py`` reads the sources, which ``checks.py`` checks, and writes the files of rows, ``summaries.py`` those of what GPUs found beside
them; ``figures.py`` reads the files. ``readme.py`` makes the README's tables of a CPU and ``gpu.py`` those of GPUs; ``markdown.py`` puts a
table together and replaces it in a document.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from dfkd_fast.errors import DfkdError, first_line
from dfkd_fast.files import replacing

from ..provenance import ROOT
from . import gpu, readme
from .figures import Figures
from .markdown import fill
from .readme import end_to_end_table
from .taking import Intake

__all__ = ["documents", "end_to_end_table", "main"]


def main(sources: Iterable[Path] = (), root: Path = ROOT) -> list[str]:
    """Take in the sources, then write the tables of all documents; nothing is written where a source is refused.

    Args:
        sources: folders of runs; the ``--out`` folders of ``python -m bench gpu``, or their ``results.jsonl``.
        root: the folder that holds README.md, docs and bench/results.

    Returns:
        What was taken in, in lines.

    Raises:
        DfkdError: a source is not one of these, or has something that may not be published, or a document has no place for a table.
    """
    intake = Intake()
    for source in sources:
        intake.read(source)
    results = root / "bench" / "results"
    # Whatever goes wrong, also in a table, goes wrong in the copy.
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in _files(results):
            shutil.copyfile(path, copy / path.name)
        lines = intake.write(copy)
        contents = {results / path.name: path.read_bytes() for path in _files(copy)}
        contents |= {root / name: fill(root / name, sections).encode() for name, sections in _rendered(copy).items()}
    for path, content in contents.items():
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(content)
    return lines


def documents(figures: Figures) -> dict[str, dict[str, str]]:
    """Every table, by its document's path and the line it stands under."""
    return {"README.md": readme.sections(figures) | gpu.readme_sections(figures), "docs/gpu.md": gpu.sections(figures)}


def _files(results: Path) -> list[Path]:
    return [path for path in sorted(results.glob("*")) if path.suffix in (".csv", ".json", ".jsonl")]


def _rendered(results: Path) -> dict[str, dict[str, str]]:
    try:
        return documents(Figures(results))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DfkdError(f"no tables can be made of these results: {type(error).__name__}: {first_line(error)}") from error
