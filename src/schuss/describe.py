"""What an optimizer is, read from its class: the table of all, the formula as mathematics, the kernel as text."""

import importlib
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from schuss import optim
from schuss.bounds import nearest
from schuss.engine.bucket import scalars_of
from schuss.engine.numba_kernel import NUMBERS
from schuss.engine.state import chosen, parameter_storage
from schuss.engine.storage import SMALLEST_BLOCKWISE, Layout, Storage, as_reals
from schuss.engine.trace import Expr, Graph, parameters, used
from schuss.optimizer import Optimizer
from schuss.rule import Rule

SYMBOLS = {
    "lr": "gamma",
    "eps": "epsilon",
    "weight_decay": "lambda",
    "momentum": "mu",
    "step": "t",
    "rho": "rho",
    "alpha": "alpha",
}
"""How papers write what code calls by a word."""


@dataclass(frozen=True)
class Row:
    """A line of the table of optimizers."""

    name: str
    summary: str
    state_bytes: int
    """Bytes of state per float32 element, with the default hyperparameters."""
    source: str


def table() -> list[Row]:
    """The optimizers of schuss."""
    rows = []
    for cls in optim.RULES:
        rule, group = _declared(cls, {})
        states = rule.present(rule.variant(group))
        rows.append(Row(cls.__name__, summary(cls), 4 * len(states), cls.source))
    return rows


def summary(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def find(name: str) -> type[Optimizer]:
    """The optimizer called `name`, of schuss or, as `module:Class`, of anybody.

    Raises:
        ValueError: there is none, or it is no schuss optimizer.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot find {name}: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise ValueError(f"{name} is not a subclass of schuss.Optimizer")
        return cls
    known = {cls.__name__: cls for cls in optim.RULES}
    if name not in known:
        raise ValueError(f"unknown optimizer {name!r}: {nearest(name, known)}")
    return known[name]


@dataclass(frozen=True)
class Kernel:
    """A kernel as text, and what it was made from."""

    label: str
    source: str
    layout: Layout


def kernel(
    cls: type[Optimizer],
    settings: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "numba",
) -> Kernel:
    """The kernel of an optimizer for tensors large enough for every storage.

    Args:
        cls: the optimizer.
        settings: hyperparameters and options: state_dtype and rounding choose what it loads and stores.
        dtype: of the parameters and gradients.
        backend: "numba" or "triton".
    """
    p = torch.empty(SMALLEST_BLOCKWISE, dtype=dtype, device="meta")
    optimizer = cls([p], **settings)
    rule, group = optimizer._rule, optimizer.param_groups[0]
    variant = rule.variant(group)
    pieces = rule.pieces(rule.unpack(rule.numbers(group)))
    states = {n: chosen(optimizer, p, rule.states[n])[0] for n, there in rule.letters(variant).items() if there}
    layout = as_reals({"p": parameter_storage(optimizer, p), "g": Storage(p.dtype), **states})
    formula, scalars = scalars_of(rule, variant, pieces, layout)
    if backend == "triton":
        from schuss.engine.triton import kernel_source
    else:
        from schuss.engine.numba_kernel import kernel_source
    source = kernel_source(f"{cls.__module__}.{cls.__name__}", formula, scalars, layout)
    return Kernel(cls.__name__.lower(), source, layout)


def show(
    cls: type[Optimizer],
    settings: Mapping[str, Any],
    *,
    backend: str | None = None,
    dtype: str = "float32",
    latex: bool = False,
    ptx: str | None = None,
) -> str:
    """What `schuss show` prints: an optimizer's formula, its rule as Python (reference), or its kernel.

    Args:
        cls, settings: the optimizer, with hyperparameters and options.
        backend: "reference", or "numba" or "triton" for the kernel of that compiler.
        dtype: of the parameters, for a kernel.
        latex: print the formula as LaTeX.
        ptx: an architecture such as "sm_90": the triton kernel compiled for it.

    Raises:
        ValueError: a dtype that no kernel is generated for, or a hyperparameter out of its bounds.
        TypeError: a hyperparameter that the optimizer does not have.
        RuntimeError: triton cannot compile here.
    """
    if backend in ("numba", "triton"):
        known = (*NUMBERS, torch.complex64, torch.complex128)
        kinds = {str(d).removeprefix("torch."): d for d in known}
        if dtype not in kinds:
            raise ValueError(f"no kernel for dtype {dtype!r}: {nearest(dtype, kinds)}")
        made = kernel(cls, settings, kinds[dtype], backend=backend)
        if ptx is None:
            return made.source.rstrip()
        from schuss.engine.triton import compiled

        return compiled(made.label, made.source, made.layout, ptx).ptx.rstrip()
    if backend == "reference":
        parts = (
            [cls.scalars, cls.rule] if "scalars" in vars(cls) or cls.scalars is not Optimizer.scalars else [cls.rule]
        )
        return "\n".join(textwrap.dedent(inspect.getsource(part)) for part in parts).rstrip()
    longer, equations = formulas(cls, settings)
    if latex:
        return "\n".join(rf"{sympy.latex(e)} \\" for e in (*longer, *equations))
    written = [
        "\n".join("  " + line for line in sympy.pretty(e, use_unicode=True, wrap_line=False).splitlines())
        for e in (*longer, *equations)
    ]
    return "\n\n".join([f"{cls.__name__}: {summary(cls)}", *written, f"Source: {cls.source}"])


def formulas(cls: type[Optimizer], settings: Mapping[str, Any]) -> tuple[list[sympy.Eq], list[sympy.Eq]]:
    """An optimizer's formula as equations: of the step's longer scalars, and of the states and the parameter.

    The rule and its scalars are run on symbols; short scalars are put in where they are used.
    """
    rule, group = _declared(cls, settings)
    variant = rule.variant(group)
    pieces = rule.pieces(rule.unpack(rule.numbers(group)))
    scalars = _scalars(rule, group)
    formula, names = rule.trace(variant, pieces)
    written = {str(name): _previous(str(name)) for name in formula.inputs} | {"g": sympy.Symbol("g_t")}
    longer = []
    read = {node.value for node in used(formula.outputs.values()) if node.op == "name"}
    for name in (n for n in names if n in read):
        value = scalars.get(name, _symbol(name))
        if value.has(sympy.Piecewise) or value.count_ops() > 5:
            longer.append(sympy.Eq(_symbol(name), value, evaluate=False))
            value = _symbol(name)
        written[name] = value
    convert = _Converter(written)
    equations = []
    for name, node in sorted(formula, key=lambda pair: pair[0] == "p"):
        current = sympy.Symbol(f"{name}_t")
        equations.append(sympy.Eq(current, convert(node), evaluate=False))
        if node.op != "name":
            convert.known[node] = current
    return longer, equations


def _declared(cls: type[Optimizer], settings: Mapping[str, Any]) -> tuple[Rule, dict[str, Any]]:
    optimizer = cls([torch.zeros(1)], **settings)
    return optimizer._rule, optimizer.param_groups[0]


def _scalars(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> mathematics of every scalar of a step."""
    graph = Graph()
    pairs = {
        k: (graph.name(_singular(k) + "1"), graph.name(_singular(k) + "2")) for k in rule.numeric if k in rule.pairs
    }
    hyper: dict[str, Any] = {k: pairs.get(k, graph.name(k)) for k in rule.numeric}
    constants = {"gain": -1 if group.get("maximize") else 1, "decoupled": int(rule.is_decoupled(group))}
    kept = {n: graph.name(n) for n in (*rule.scalar_states, "step", "first")}
    wanted = parameters(rule.scalars)
    values = dict(rule.scalars(**{n: (hyper | constants | kept)[n] for n in wanted}))
    values.setdefault("decay", 1 - hyper["lr"] * hyper["weight_decay"] if "weight_decay" in hyper else 1)
    values.setdefault("gain", constants["gain"])
    first = sympy.Eq(sympy.Symbol("t"), 1) if rule.has_step else sympy.Symbol("first")
    known = {n: _previous(n) for n in rule.scalar_states if n != "step"} | {"first": first}
    convert = _Converter(known)
    return {n: convert(v) if isinstance(v, Expr) else _number(v) for n, v in values.items()}


class _Converter:
    """Expressions of a rule as sympy's, with names written as papers write them."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names
        self.known: dict[Expr, Any] = {}

    def __call__(self, node: Expr) -> Any:
        if node not in self.known:
            self.known[node] = self._convert(node)
        return self.known[node]

    def _convert(self, node: Expr) -> Any:
        if node.op == "name":
            return self.names.get(node.value, _symbol(node.value))
        if node.op == "const":
            return _number(node.value)
        return _SYMPY[node.op](*map(self, node.args))


_SYMPY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lerp": lambda a, b, weight: a + weight * (b - a),
    "logical_and": sympy.And,
    "sqrt": sympy.sqrt,
    "absolute": sympy.Abs,
    "sign": sympy.sign,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
    "where": lambda condition, yes, no: sympy.Piecewise((yes, condition), (no, True)),
}


def _number(value: float) -> Any:
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value, 3)


def _singular(name: str) -> str:
    return name.removesuffix("s")


def _symbol(name: str) -> sympy.Symbol:
    name = SYMBOLS.get(name, name)
    return sympy.Symbol(f"{name[:-1]}_{name[-1]}" if name[-1:].isdigit() else name, real=True)


def _previous(name: str) -> sympy.Symbol:
    return sympy.Symbol(f"{name}_t-1", real=True)
