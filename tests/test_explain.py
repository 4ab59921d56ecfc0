"""`schuss explain`: a page about each optimizer, from the rule, its docstring, a plan and the documentation."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from schuss import cli, describe, explain, optim

ROOT = Path(__file__).parents[1]
ALL = [*optim.RULES, *optim.OF_ANOTHER_KIND]
every = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)


@every
def test_a_page_is_whole(cls: type[torch.optim.Optimizer]) -> None:
    page = explain.explain(cls.__name__)
    arguments = [n for n in inspect.signature(cls).parameters if n != "params"]
    assert {h.name for h in page.hyperparameters} | set(page.shared) == set(arguments)
    assert all(h.meaning for h in page.hyperparameters), [h.name for h in page.hyperparameters if not h.meaning]
    assert {"When", "When not", "Traps"} <= set(page.advice)
    assert not any(re.search(r"\$|\]\(", text) for text in page.advice.values())  # a terminal shows no LaTeX, no links
    assert page.source == cls.source
    text = page.to_markdown()
    assert all(part in text for part in (page.summary, page.formula, *page.advice.values()))


@pytest.mark.parametrize(
    ("name", "state", "traffic"),
    [("SGD", 0, 12), ("AdamW", 8, 28), ("Lion", 4, 20), ("Muon", 4, 20 + 8), ("SparseAdam", 8, 28)],
)
def test_cost(name: str, state: float, traffic: float) -> None:
    """Bytes by hand: p, g and each state are read, p and each state written; Muon's direction goes out and in."""
    page = explain.explain(name)
    assert page.state == state
    assert page.traffic == traffic
    assert f"{state} bytes of state per float32 element, and {traffic} bytes" in page.cost


def test_the_cost_of_rows_and_columns() -> None:
    page = explain.explain("Adafactor")
    assert page.state == pytest.approx(4 * 2 / 1024, rel=0.01)  # a row and a column of numbers for 1024 x 1024


def test_meanings_of_another_class_are_looked_up() -> None:
    meanings = {h.name: h.meaning for h in explain.explain("NorMuon").hyperparameters}
    assert meanings["ns_steps"] == "iterations, in [0, 100)."


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'AdamX'"):
        explain.explain("AdamX")
    result = CliRunner().invoke(cli.app, ["explain", "AdamX"])
    assert result.exit_code == 2


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["explain", "AdamW"])
    assert result.exit_code == 0, result.output
    assert result.stdout == explain.explain("AdamW").to_markdown()
    (tmp_path / "mine.py").write_text(
        "import schuss\n\n\nclass Mine(schuss.optim.AdamW):\n"
        '    """Mine.\n\n    Args:\n        lr: how far, in [0, inf).\n    """\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = CliRunner().invoke(cli.app, ["explain", "mine:Mine"])
    assert result.exit_code == 0, result.output
    assert "how far, in [0, inf)." in result.stdout


def test_formulas_are_those_of_show() -> None:
    page = explain.explain("Lion")
    assert all(line.strip() in describe.show(optim.Lion, {}) for line in page.formula.splitlines())


def test_the_advice_is_in_the_wheel() -> None:
    """Installed, there is no docs folder beside the package."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    [(page, place)] = build["force-include"].items()
    assert (ROOT / page).is_file()
    assert place == "schuss/optimizers.md"
