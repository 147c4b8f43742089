"""The documentation names every command, recipe and key, and its command lines and files exist."""

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import typer
import typer.main

from bench.__main__ import app as bench_app
from bench.provenance import ROOT
from dfkd_fast.cli import app
from dfkd_fast.recipe import load_recipe
from dfkd_fast.recipe_files import shipped_recipes

PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))} | {"README.md": (ROOT / "README.md").read_text()}
RECIPES = PAGES["recipes.md"]


def commands_of(program: typer.Typer) -> list[str]:
    return [command.name or command.callback.__name__ for command in program.registered_commands if command.callback]


def command_lines(program: str) -> list[str]:
    """Lines of code blocks, and code spans, that start with the program."""
    lines = []
    for text in PAGES.values():
        blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        shown = [line.partition(" # ")[0] for block in blocks for part in block.splitlines() for line in part.split("&&")]
        shown += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        lines += [line.strip() for line in shown if line.strip().startswith(f"{program} ")]
    return sorted(set(lines))


def is_usage(line: str) -> bool:
    """Whether a line is a synopsis, such as ``dfkd-fast show RECIPE …``."""
    return bool(re.search(r"\[|\.\.\.|…|RUN |COMMAND", line))


def keys(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Section and key, such as ("replay", "vae.kl"), of every value of a recipe."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from keys(inner, f"{prefix}{field.name}.")
        elif prefix:
            section, _, rest = f"{prefix}{field.name}".partition(".")
            yield section, rest


def test_every_command_is_documented() -> None:
    assert not [name for name in commands_of(app) if f"`dfkd-fast {name}" not in PAGES["cli.md"]]
    assert not [name for name in commands_of(bench_app) if f"`python -m bench {name}" not in PAGES["benchmarks.md"]]


def test_every_shipped_recipe_is_in_the_table_of_recipes() -> None:
    assert not [name for name in shipped_recipes() if f"`{name}`" not in RECIPES]


def test_every_key_of_a_recipe_is_documented_under_its_section() -> None:
    sections = re.split(r"^### ", RECIPES.partition("## Data sets")[0], flags=re.MULTILINE)[1:]
    for section, key in keys(load_recipe("digits")):
        texts = [text for text in sections if f"`[{section}]`" in text.splitlines()[0]]
        assert len(texts) == 1, section
        assert f"`{key}`" in texts[0], f"{section}.{key}"


PROGRAMS = {"dfkd-fast": app, "torchrun": app, "python -m bench": bench_app}
LINES = [(program, line) for program in PROGRAMS for line in command_lines(program) if not is_usage(line)]


@pytest.mark.parametrize(("program", "line"), LINES)
def test_a_command_line_of_the_documentation_parses(program: str, line: str) -> None:
    command = typer.main.get_command(PROGRAMS[program])
    start = "-m dfkd_fast " if program == "torchrun" else f"{program} "
    name, *arguments = shlex.split(line.partition(start)[2].replace("--seed N", "--seed 0"))
    if name.startswith("-"):
        command.make_context(program, [name, *arguments], resilient_parsing=True)
        return
    command.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_the_command_lines_of_the_documentation_are_found() -> None:
    assert ("dfkd-fast", "dfkd-fast distill digits") in LINES
    assert {program for program, _ in LINES} == set(PROGRAMS)
    assert len(LINES) > 25


def messages() -> list[str]:
    """Messages that the troubleshooting page quotes: code spans at the beginning of a row."""
    return re.findall(r"^\| `([^`]+)`", PAGES["troubleshooting.md"], re.MULTILINE)


@cache
def literals() -> str:
    """All text in the package's source."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "dfkd_fast").rglob("*.py")]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(texts)


@pytest.mark.parametrize("message", messages())
def test_a_message_that_the_troubleshooting_page_quotes_is_in_the_source(message: str) -> None:
    pieces = [piece.strip(" ,:;") for piece in re.split(r"…|'[^']*'|\S*\d\S*|\S+/\S+|[\w.]+ = \S+", message)]
    assert any(len(piece) >= 8 and piece in literals() for piece in pieces)


def test_the_troubleshooting_page_quotes_messages() -> None:
    assert len(messages()) > 35


def test_every_file_of_the_repository_that_a_page_links_to_exists() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\((\.\./[^)#]+)", page.read_text()):
            assert (page.parent / target).resolve().exists(), f"{page.name}: {target}"
