"""The documentation: its code runs and prints what it says, its links resolve, its commands parse, nothing is left out.

A fence that opens with `python` runs, those of one page one after the other; `python no-run` does not. A `text` fence
is part of what the `python` block or the lone command right before it prints.
"""

import ast
import contextlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from schuss import describe, optim
from schuss.cli import app
from schuss.rule import ENGINE_KEYS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SHARED = {*ENGINE_KEYS} - {"decoupled_weight_decay"}
"""Arguments that the head of docs/optimizers.md explains once."""

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    """A fenced block: what follows its opening fence, its text, the line on which it opens, and where it ends."""

    info: str
    text: str
    line: int
    last: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found, opened, kept = [], None, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if opened is None:
                opened, kept = (line[3:].strip(), number), []
            else:
                found.append(Block(opened[0], "\n".join(kept), opened[1], number))
                opened = None
        elif opened is not None:
            kept.append(line)
    assert opened is None, f"{page.name}: the block of line {opened} does not end"
    return found


def outputs(page: Path) -> dict[int, str]:
    """What a block is said to print, by the line on which it opens."""
    shown = {}
    for block, after in pairwise(blocks(page)):
        if after.info == "text":
            assert block.info in ("python", "sh"), f"{page.name}, line {after.line}: nothing prints this"
            assert after.line == block.last + 2, (
                f"{page.name}, line {after.line}: belongs right after line {block.last}"
            )
            shown[block.line] = after.text
    return shown


@pytest.fixture
def settings() -> Iterator[None]:
    """What an example may change."""
    threads, dtype, random = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_rng_state(random)


@pytest.mark.usefixtures("settings")
@page_of
def test_examples_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a module of its own, so that its classes can be pickled, and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"docs_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    shown = outputs(page)
    for block in blocks(page):
        if block.info != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * block.line + block.text, str(page), "exec"), module.__dict__)
        assert shown.get(block.line, "") in printed.getvalue(), f"line {block.line} prints:\n{printed.getvalue()}"


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@page_of
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", prose(file), flags=re.MULTILINE)), target


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [
        p.name for p in PAGES if p.parent.name == "docs" and p.name != "index.md" and f"]({p.name})" not in index
    ] == []


def commands() -> Iterator[object]:
    """Every command line that is shown: the page, its words, and what is said to be printed."""
    for page in PAGES:
        shown = outputs(page)
        for block in blocks(page):
            lines = block.text.replace("\\\n", " ").splitlines()
            for line in lines if block.info == "sh" else ():
                yield pytest.param(line, shown.get(block.line, ""), id=f"{page.name}: {line}")


@pytest.mark.parametrize(("line", "output"), [*commands()])
def test_commands_parse(line: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`schuss list` and `show` run, other subcommands are asked for help; targets of make and scripts exist."""
    words = shlex.split(line, comments=True)
    while words and (assignment := re.fullmatch(r"(\w+)=(.*)", words[0])):
        if assignment[1] == "PYTHONPATH":
            monkeypatch.syspath_prepend(str(ROOT / assignment[2]))
        words.pop(0)
    match words:
        case ["schuss", *arguments]:
            runs = arguments[:1] in (["list"], ["show"])
            result = CliRunner().invoke(app, arguments if runs else [*arguments, "--help"])
            assert result.exit_code == 0, result.output
            assert output in result.output
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in targets:
                assert "=" in target or re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).exists()


def sections() -> dict[str, str]:
    """The sections of docs/optimizers.md by heading."""
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    parts = text.split("\n## ")[1:]
    found = {part.partition("\n")[0]: part for part in parts}
    assert len(found) == len(parts), "a heading is there twice"
    return found


@pytest.mark.parametrize("cls", [*optim.RULES, *optim.OF_ANOTHER_KIND], ids=lambda cls: cls.__name__)
def test_every_optimizer_has_a_section_with_its_hyperparameters(cls: type[torch.optim.Optimizer]) -> None:
    """Each with the default that the constructor has and the bounds that it enforces; and with the bytes of state."""
    section = sections()[cls.__name__]
    table = {}
    for row in re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|", section, flags=re.MULTILINE):
        table[row[0]] = row[1:]
    arguments = inspect.signature(cls).parameters
    names = [name for name in arguments if name not in {"params", "options", *SHARED}]
    assert list(table) == names
    for name, (default, bounds) in table.items():
        assert ast.literal_eval(default.replace("inf", "1e999")) == arguments[name].default, name
        declared = cls.bounds.get(name, "-")
        assert bounds == (", ".join(dict.fromkeys(declared)) if isinstance(declared, tuple) else declared), name
    row = next(row for row in describe.table() if row.name == cls.__name__)
    assert re.search(
        rf"^State: .*\b{row.state_bytes} bytes per float32 element", section, flags=re.MULTILINE | re.DOTALL
    )
    assert all(source.strip() in " ".join(section.split()) for source in row.source.split(";"))


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.name)
def test_scripts_run(script: Path, tmp_path: Path) -> None:
    search = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": search}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
