"""The names in the texts of kernels: a rule may call its letters and scalars whatever it likes."""

import ast
import builtins
import inspect
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from schuss import describe, optim
from schuss.engine import numba_kernel, numba_rows, text
from schuss.optimizer import Optimizer

FORMS: tuple[tuple[type[Optimizer], dict[str, Any], torch.dtype], ...] = (
    (optim.AdamW, {"amsgrad": True, "maximize": True, "clip_value": 1.0, "ema_decay": 0.9}, torch.float32),
    (optim.AdamW, {"state_dtype": "int8", "maximize": True}, torch.float32),
    (optim.AdamW, {"state_dtype": "int8", "rounding": "stochastic"}, torch.bfloat16),
    (optim.RAdam, {"state_dtype": "int8", "rounding": "kahan"}, torch.bfloat16),
    (optim.Adam, {"state_dtype": "bfloat16", "weight_decay": 0.1, "max_norm": 1.0, "cautious": True}, torch.float16),
    (optim.Adan, {"cautious": True, "state_dtype": "int8"}, torch.float64),
    (optim.LAMB, {"weight_decay": 0.1, "maximize": True, "state_dtype": "int8"}, torch.float32),
    (optim.Prodigy, {"rounding": "stochastic"}, torch.bfloat16),
    (optim.Muon, {"weight_decay": 0.1}, torch.float32),
    (optim.Adafactor, {"weight_decay": 0.1, "max_norm": 1.0}, torch.float32),
    (optim.Adafactor, {"beta1": 0.9, "rounding": "stochastic"}, torch.bfloat16),
    (optim.Adafactor, {"beta1": 0.9, "rounding": "kahan"}, torch.bfloat16),
)
IDS = [f"{cls.__name__}-{'-'.join(settings)}" for cls, settings, _ in FORMS]


def makers(backend: str) -> tuple[list[ModuleType], set[str]]:
    """The modules that write the texts of a back end, and the names that they know to be their own."""
    if backend == "numba":
        return [numba_kernel, numba_rows], numba_kernel.taken()
    pytest.importorskip("triton")
    from schuss.engine import triton

    return [triton], triton.taken()


def names(source: str) -> Iterator[str]:
    """Everything that the kernel of a text, and what it calls with the rule's names, takes, reads and assigns."""
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and function.name in ("kernel", "update"):
            for node in ast.walk(function):
                if isinstance(node, ast.Name):
                    yield node.id
                elif isinstance(node, ast.arg):
                    yield node.arg


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize(("cls", "settings", "dtype"), FORMS, ids=IDS)
def test_every_name_is_the_rules_or_known_to_be_the_kernels(
    cls: type[Optimizer],
    settings: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules, own = makers(backend)
    of_rule: set[str] = set()

    def safe_names(given: Any, taken: Collection[str]) -> dict[str, str]:
        safe = text.safe_names(given, taken)
        of_rule.update(safe.values())
        return safe

    for module in modules:
        monkeypatch.setattr(module, "safe_names", safe_names)
    if backend == "triton" and cls is optim.Adafactor:
        pytest.skip("its kernels are torch's")
    kernels = describe.kernels(cls, settings, dtype, backend=backend)
    found = {name for kernel in kernels for name in names(kernel.source)}
    assert {"p", "g"} <= found & of_rule
    assert {name for name in found - of_rule - own if not text._PARTS.fullmatch(name)} == set()


def renamed(own: Collection[str]) -> type[Optimizer]:
    """An optimizer whose numbers have these names: p - g (1 a + 2 b + ...)."""
    used = sorted(own)
    space: dict[str, Any] = {}
    total = " + ".join(f"{k} * {name}" for k, name in enumerate(used, start=1))
    exec(f"def rule(p, g, m_, {', '.join(used)}): return p - g * ({total}) * 1e-4, m_ + g", space)

    def __init__(self: Any, params: Any, **options: Any) -> None:
        Optimizer.__init__(self, params, dict.fromkeys(used, 0.5), **options)

    members = {"__init__": __init__, "rule": staticmethod(space["rule"]), "states": {"m_": "m"}}
    return type("Renamed", (Optimizer,), members)


def test_a_rule_may_use_every_name_that_a_kernel_has() -> None:
    own = {n for n in makers("numba")[1] if n.isidentifier() and not n.startswith("_") and n not in dir(builtins)}
    own |= {"t1", "t2_", "p_", "p_new", "g_rest", "range", "min"}
    cls = renamed(own)
    assert len(inspect.signature(cls.rule).parameters) > 60
    after = {}
    for backend in ("numba", "reference"):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 1000, dtype=torch.float64))
        p.grad = torch.linspace(1, 2, 1000, dtype=torch.float64)
        optimizer = cls([p], backend=backend)
        optimizer.step()
        after[backend] = p.detach(), optimizer.state[p]["m"]
    for one, other in zip(*after.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
