"""What `schuss list` and `schuss show` print of rules with sums and matrices, and of all others."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import cases
from schuss import describe, optim, shapes
from schuss.cli import app, main
from schuss.lab import workloads
from schuss.lookup import named

every_rule = pytest.mark.parametrize("cls", optim.RULES, ids=lambda cls: cls.__name__)


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["show", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


# --- formulas ---------------------------------------------------------------------------------------------------------


@every_rule
def test_every_formula_has_an_equation_for_each_state_and_the_parameter(cls: type[Any]) -> None:
    _, equations = describe.formulas(cls, {})
    names = [str(equation.lhs) for equation in equations]
    rule, group = describe._declared(cls, {})
    kept = [letter for letter, there in rule.letters(rule.variant(group)).items() if there]
    assert {f"{name}_t" for name in (*kept, "p")} <= {*names}
    assert names[-1] == "p_t"
    assert len(names) == len({*names})
    for text in (describe.show(cls, {}), describe.show(cls, {}, latex=True)):
        assert not re.search(r"sqrt\(|\*\*", text), "something is printed as code"


@pytest.mark.parametrize(
    ("cls", "form"),
    [(cls, form) for cls in optim.RULES for form in cases.CASES.get(cls.__name__, [{}])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_two_things_have_one_symbol(cls: type[Any], form: dict[str, Any]) -> None:
    rule, group = describe._declared(cls, form)
    formula, scalars = rule.trace(rule.variant(group), rule.pieces(rule.unpack(rule.numbers(group))))
    numbers = {name for name in rule.numeric if name not in rule.lengths}
    numbers |= {f"{describe._singular(name)}{i + 1}" for name, n in rule.lengths.items() for i in range(n)}
    names: dict[str, set[str]] = defaultdict(set)
    for name in {*numbers, *scalars, "step"}:
        names[str(describe._symbol(name))].add(name)
    for name in (*formula.inputs, *rule.scalar_states):
        names[str(describe._previous(name))].add(name)
    assert [meant for meant in names.values() if len(meant) > 1] == []


def test_muon_is_a_decomposition() -> None:
    text = shown("Muon")
    assert "U S Vᵀ = gₜ + μ⋅(-gₜ + mₜ)" in text
    assert re.search(r"max⎜1, ─+⎟", text)
    assert "pₜ = -" in text
    plain = shown("Muon", "--set", "nesterov=False", "--set", "adjust_lr_fn='match_rms_adamw'")
    assert "U S Vᵀ = mₜ" in plain
    assert "max(columns, rows)" in plain
    latex = shown("Muon", "--latex")
    assert r"U S V^T = g_{t} + \mu" in latex
    assert r"U V^T" in latex.splitlines()[-1]


def test_what_is_summed_and_used_is_written_once() -> None:
    """NorMuon's steps before and after they are divided, Adafactor's before it is clipped."""
    for cls, letters in ((optim.NorMuon, ["u_t", "w_t"]), (optim.Adafactor, ["u_t"])):
        _, equations = describe.formulas(cls, {})
        names = [str(equation.lhs) for equation in equations]
        assert [name for name in names if name in letters] == letters
    text = shown("Adafactor")
    assert "row_mean⎝gₜ ⎠" in text
    assert "column_mean⎝gₜ ⎠" in text
    latex = shown("Adafactor", "--latex")
    assert r"\operatorname{mean}_{\text{row}}\left( g_{t}^{2} \right)" in latex
    assert r"\operatorname{mean}\left( u_{t}^{2} \right)" in latex
    assert r"\left\lVert p_{t-1} \right\rVert" in shown("LAMB", "--latex")
    assert r"\operatorname{sum}_{\text{tensors}}" in shown("Prodigy", "--latex")


def test_flags_among_the_scalars_are_decided() -> None:
    assert "min⎜γ, ──⎟" in shown("Adafactor")
    warm = shown("Adafactor", "--set", "warmup_init=True")
    assert re.search(r"min⎜1\.0e-6⋅t, ──⎟", warm)
    own = shown("Adafactor", "--set", "relative_step=False", "--set", "scale_parameter=False")
    assert "√t" not in own
    assert "pₜ₋₁ ⎠" not in own


# --- kernels ----------------------------------------------------------------------------------------------------------

PASSES = {
    "AdamW": [""],
    "LAMB": ["finds sums", "updates"],
    "Muon": ["writes matrices for torch: u1 = orthogonalize(b1)", "updates"],
    "NorMuon": ["writes matrices for torch: u1 = orthogonalize(b1)", "finds sums", "finds sums", "updates"],
    "Adafactor": ["finds sums", "finds sums", "updates"],
}


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("name", PASSES)
def test_kernels_of_every_pass(name: str, backend: str) -> None:
    """In order, each with a heading that says what it does, if there are several."""
    if backend == "triton":
        pytest.importorskip("triton")
        if name in ("NorMuon", "Adafactor"):
            with pytest.raises(ValueError, match=f"^{name}: triton has no kernel for means of rows and columns; "):
                describe.kernels(getattr(optim, name), {}, backend=backend)
            return
    kernels = describe.kernels(getattr(optim, name), {}, backend=backend)
    count = len(PASSES[name])
    headings = [f"pass {k} of {count} {what}" if what else "" for k, what in enumerate(PASSES[name], start=1)]
    assert [kernel.heading for kernel in kernels] == headings
    assert [kernel.sums for kernel in kernels] == ["sums" in what for what in PASSES[name]]
    text = shown(name, "--backend", backend)
    assert re.findall(r"^# --- (.*) ---$", text, flags=re.MULTILINE) == [heading for heading in headings if heading]
    assert text.count("def kernel(") == count
    places = [text.index(kernel.source.strip()) for kernel in kernels]
    assert places == sorted(places)


@every_rule
def test_every_kernel_is_python(cls: type[Any]) -> None:
    for kernel in describe.kernels(cls, {}):
        compile(kernel.source, cls.__name__, "exec")


def test_what_is_shown_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts of a step of a matrix, in the order in which they are compiled."""
    from schuss.engine import numba

    for name in PASSES:
        cls, texts = getattr(optim, name), []
        with monkeypatch.context() as patch:
            address = numba.kernel_address
            patch.setattr(
                numba, "kernel_address", lambda label, text, to=address, of=texts: (of.append(text), to(label, text))[1]
            )
            p = torch.nn.Parameter(torch.ones(64, 64))
            p.grad = torch.ones(64, 64)
            cls([p], backend="numba").step()
        assert texts == [kernel.source for kernel in describe.kernels(cls, {})]


def test_a_storage_without_kernels_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "NorMuon", "--backend", "numba", "--set", "state_dtype='int8'"])
    printed = capsys.readouterr()
    assert "NorMuon: numba has no kernel for means of rows beside 8-bit states" in printed.err
    assert printed.err.count("\n") == 1


# --- the list ---------------------------------------------------------------------------------------------------------


def test_what_is_beside_the_elements_is_named() -> None:
    states = {row.name: row.state for row in describe.table()}
    named = {name: state for name, state in states.items() if not state.isdigit()}
    assert named == {
        "Adafactor": "0 + rows", "NorMuon": "4 + rows", "SOAP": "8 + squares", "Shampoo": "8 + squares",
    }  # fmt: skip
    assert (states["Muon"], states["AdamW"], states["LBFGS"]) == ("4", "8", "808")


@every_rule
def test_the_bytes_of_the_list_are_those_of_the_plan(cls: type[Any]) -> None:
    """A square matrix has all of it: squares make 16 bytes more per element, rows next to nothing."""
    side = 512
    row = next(row for row in describe.table() if row.name == cls.__name__)
    elements = cls([torch.empty(side, side, device="meta")]).plan().state_bytes / side**2
    more = {(): 0.0, ("rows",): 4 / side, ("squares",): 16.0}[row.beside]
    assert elements == row.state_bytes + more * (2 if cls is optim.Adafactor else 1)


def test_all_of_torch_optim_is_schuss_s_own() -> None:
    assert optim.FROM_TORCH == ("Optimizer", "swa_utils")
    named = {name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)} - {"Optimizer"}
    assert named <= {cls.__name__ for cls in (*optim.RULES, *optim.OF_ANOTHER_KIND)}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("find", [describe.find, shapes.find, workloads.find, named], ids=lambda find: find.__module__)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module:Thing",
            "cannot import 'no_such_module': ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (":Thing", "cannot import '': ValueError: Empty module name"),
        ("broken_here:Thing", "cannot import 'broken_here': RuntimeError: first line"),
        ("module_here:Thinf", "module 'module_here' has no 'Thinf': did you mean 'Thing'?"),
        ("module_here:", "module 'module_here' has no '': choose from Thing"),
    ],
)
def test_whatever_is_looked_up_the_same_mistake_is_told_alike(
    find: Callable[[str], Any], name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_here.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    (tmp_path / "module_here.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find(name)
