"""What `schuss` and `schuss.optim` promise to have: lists, imports for type checkers, and imports that wait, agree."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import schuss
from schuss import optim


def imported(node: ast.AST) -> list[tuple[str, str]]:
    """(name, module) of every public name that the statements inside a node import, in order."""
    found = []
    for statement in ast.walk(node):
        if isinstance(statement, ast.ImportFrom):
            found += [(a.asname or a.name, statement.module or "") for a in statement.names]
    return [(name, module) for name, module in found if not name.startswith("_") and module.startswith("schuss")]


def parsed(module: str) -> tuple[ast.Module, ast.If]:
    """A module, and its block for type checkers."""
    tree = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8"))
    [block] = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return tree, block


@pytest.mark.parametrize("module", [schuss, optim, schuss.schedules], ids=lambda module: module.__name__)
def test_every_promised_name_is_there(module: object) -> None:
    names = module.__all__  # type: ignore[attr-defined]
    assert len(names) == len({*names})
    assert [name for name in names if not hasattr(module, name)] == []


def test_type_checkers_see_what_is_loaded_later() -> None:
    """Each once, as the object that is loaded, and all that is public."""
    tree, block = parsed("schuss")
    later = imported(block)
    assert len(later) == len(dict(later))
    assert {name for name, _ in later} == {*schuss._LATER}
    for name, module in later:
        if name != "schedules":
            assert getattr(importlib.import_module(module), name) is getattr(schuss, name), name
    at_once = [one for node in tree.body if node is not block for one in imported(node)]
    assert {name for name, _ in (*at_once, *later)} == {*schuss.__all__}


def test_optim_lists_every_optimizer_that_it_imports() -> None:
    tree, block = parsed("schuss.optim")
    at_once = {name for node in tree.body if node is not block for name, _ in imported(node)}
    assert at_once == {cls.__name__ for cls in (*optim.RULES, *optim.OF_ANOTHER_KIND)}
    assert at_once | {name for name, _ in imported(block)} <= {*optim.__all__}
    assert len({*optim.RULES, *optim.OF_ANOTHER_KIND}) == len(optim.RULES) + len(optim.OF_ANOTHER_KIND)


def test_the_readme_names_every_optimizer() -> None:
    classes = {cls.__name__ for cls in (*optim.RULES, *optim.OF_ANOTHER_KIND)}
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    [(count, names)] = re.findall(r"^\| \[(\d+) optimizers\]\(docs/optimizers\.md\) \| (.*) \|$", readme, re.MULTILINE)
    assert classes - {*re.findall(r"\w+", names)} == set()
    assert int(count) == len(classes)
