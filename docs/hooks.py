"""MkDocs hooks: MathML at build time, the command line's reference, links to files of the repository, and Sphinx roles of docstrings."""

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PUBLISHED = ("bench/results", "dfkd_fast/recipes")
"""Folders whose files the pages link to: they are copied into the site, under repository/."""
COMMANDS = "<!-- the commands and options of dfkd_fast.cli -->"
REPOSITORY_LINK = re.compile(rf"\]\(((?:\.\./)+)((?:{'|'.join(PUBLISHED)})/[^)#]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):<code>~?([\w.]+)</code>")


def on_files(files: Any, config: Any) -> Any:
    """Add the files of the repository that pages may link to."""
    for folder in PUBLISHED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".py":
                files.append(File.generated(config, f"repository/{path.relative_to(ROOT)}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Insert the command line's reference, and turn links that work on a code host (``../bench/results/…``) into links of the site."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, _commands())
    depth = page.file.src_uri.count("/") + 1

    def inside(link: re.Match[str]) -> str:
        return f"]({'../' * (depth - 1)}repository/{link[2]}" if link[1].count("../") == depth else link[0]

    return REPOSITORY_LINK.sub(inside, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Render formulas as MathML, which browsers show without JavaScript, and roles such as ``:func:`` as code."""
    content = FORMULA.sub(_mathml, content)
    return ROLE.sub(lambda role: f"<code>{role[1].rpartition('.')[2]}</code>", content)


def _mathml(formula: re.Match[str]) -> str:
    mathml = convert(html.unescape(formula[3].strip()), display="block" if formula[2] == "[" else "inline")
    if "\\" in mathml:
        raise PluginError(f"unknown command in the formula {formula[3]!r}")
    return mathml


def _commands() -> str:
    """Every command with its options, as Markdown from typer."""
    command = [sys.executable, "-m", "typer", "dfkd_fast.cli", "utils", "docs", "--name", "dfkd-fast"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return text[text.index("## ") :]  # the page has a title and a table of commands of its own
