"""The tables of README.md and docs/gpu.md, from the files in bench/results.

``python -m bench report``                      write the tables anew
``python -m bench report SOURCE [SOURCE ...]``  first take in these sources: folders of runs, run at the commit checked out, and
                                                what ``python -m bench gpu`` wrote on a GPU

``taking.py`` reads the sources and writes the files, ``figures.py`` reads the files. ``readme.py`` makes the README's tables of a
CPU and ``gpu.py`` those of GPUs; ``markdown.py`` puts a table together and replaces it in a document.
"""

from collections.abc import Iterable
from pathlib import Path

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
        DfkdError: a source is none of these or has nothing that may be published, or a document has no place for a table.
    """
    results = root / "bench" / "results"
    for name, sections in documents(Figures(results)).items():
        fill(root / name, sections)  # a document without a place for its table must not be found after the results have changed
    intake = Intake()
    for source in sources:
        intake.read(source)
    lines = intake.write(results)
    for name, sections in documents(Figures(results)).items():
        text = fill(root / name, sections)
        with replacing(root / name) as part:
            part.write_text(text)
    return lines


def documents(figures: Figures) -> dict[str, dict[str, str]]:
    """Every table, by its document's path and the line it stands under."""
    return {"README.md": readme.sections(figures) | gpu.readme_sections(figures), "docs/gpu.md": gpu.sections(figures)}
