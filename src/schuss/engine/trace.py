"""Running a rule on symbols: the expression graph from which kernels are generated and formulas printed."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from schuss.formula import Operand

# How the operators of a graph read in Python source, with their precedence (higher binds tighter).
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
INFIX = {
    "lt": (3, "<"),
    "le": (3, "<="),
    "gt": (3, ">"),
    "ge": (3, ">="),
    "eq": (3, "=="),
    "ne": (3, "!="),
    "add": (5, "+"),
    "sub": (5, "-"),
    "mul": (6, "*"),
    "div": (6, "/"),
    "pow": (8, "**"),
}
NEGATION = 7
ATOM = 9


class Expr(Operand):
    """A node of a traced formula: `op` applied to `args`, or a named input ("name"), or a number ("const").

    Nodes are interned in their `Graph`, so the same subexpression is the same object and is computed once.
    """

    __slots__ = ("args", "graph", "op", "value")

    def __init__(self, graph: "Graph", op: Any, args: tuple["Expr", ...], value: Any = None) -> None:
        self.graph, self.op, self.args, self.value = graph, op, args, value

    def __formula__(self, word: Any, args: tuple[Any, ...]) -> "Expr":
        return self.graph.node(word, *args)


class Graph:
    """The nodes of one traced formula."""

    def __init__(self) -> None:
        self._nodes: dict[Any, Expr] = {}

    def name(self, name: str) -> Expr:
        """The input called `name`."""
        return self._intern(("name", name), "name", (), name)

    def node(self, op: Any, *args: Any) -> Expr:
        """`op`, a word or a `MatrixCall`, applied to `args`; numbers among them become constants."""
        nodes = tuple(arg if isinstance(arg, Expr) else self.constant(arg) for arg in args)
        return self._intern((op, *(id(n) for n in nodes)), op, nodes)

    def constant(self, value: Any) -> Expr:
        """A number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"a rule computes with arrays and numbers, got {type(value).__name__}: {value!r}")
        return self._intern(("const", type(value), repr(value)), "const", (), value)

    def _intern(self, key: Any, op: Any, args: tuple[Expr, ...], value: Any = None) -> Expr:
        if (node := self._nodes.get(key)) is None:
            node = self._nodes[key] = Expr(self, op, args, value)
        return node


@dataclass(frozen=True)
class Formula:
    """A traced rule: the inputs it reads, in order, and the new values it returns by name."""

    inputs: tuple[str, ...]
    outputs: dict[str, Expr] = field(repr=False)

    def __iter__(self) -> Iterator[tuple[str, Expr]]:
        return iter(self.outputs.items())


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters, in order."""
    return tuple(inspect.signature(function).parameters)


def used(roots: Iterable[Expr]) -> dict[Expr, int]:
    """How often each node is used below `roots`, in an order in which arguments come before their users."""
    counts: dict[Expr, int] = {}

    def visit(node: Expr) -> None:
        if node in counts:
            counts[node] += 1
            return
        for arg in node.args:
            visit(arg)
        counts[node] = 1

    for root in roots:
        visit(root)
    return counts


def to_source(
    formula: Formula,
    word: Callable[[str, list[str]], str],
    constant: Callable[[float], str],
    names: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The formula as lines of Python, and what each new value is called there.

    There is a line for each new value, `<name>_new`, and for each subexpression that is used twice, `t1` and so on.
    `word` writes a call of the vocabulary, `constant` a number; `names` says how inputs are called that need another
    name there.
    """
    names = names or {}
    outputs = {
        node: f"{names.get(n, n)}_new" for n, node in formula.outputs.items() if node.op not in ("name", "const")
    }
    counts = used(formula.outputs.values())
    written: dict[Expr, str] = {}
    lines: list[str] = []

    def text(node: Expr, level: int = 0) -> str:
        """As an operand of something that binds as tightly as `level`."""
        if node in written:
            return written[node]
        source, own = expression(node)
        return f"({source})" if own < level else source

    def expression(node: Expr) -> tuple[str, int]:
        if node.op == "name":
            return names.get(node.value, node.value), ATOM
        if node.op == "const":
            return constant(node.value), ATOM
        if node.op == "neg":
            return f"-{text(node.args[0], NEGATION + 1)}", NEGATION
        if node.op == "pow" and node.args[1].op == "const" and isinstance(node.args[1].value, int):
            return _power(text(node.args[0], ATOM), node.args[1].value, constant)
        if node.op in INFIX:
            level, symbol = INFIX[node.op]
            # a - (b - c) needs its parentheses, (a - b) - c does not; powers go the other way, comparisons chain
            left = text(node.args[0], level + (node.op == "pow" or node.op in COMPARISONS))
            return f"{left} {symbol} {text(node.args[1], level + (node.op != 'pow'))}", level
        return word(node.op, [text(arg) for arg in node.args]), ATOM

    temporaries = 0
    for node in counts:
        if node.op in ("name", "const"):
            continue
        if node in outputs:
            name = outputs[node]
        elif counts[node] > 1:
            temporaries += 1
            name = f"t{temporaries}"
        else:
            continue
        lines.append(f"{name} = {text(node)}")
        written[node] = name
    return lines, {name: text(node) for name, node in formula.outputs.items()}


def _power(base: str, exponent: int, constant: Callable[[float], str]) -> tuple[str, int]:
    """A whole power. A negative one is a quotient: zero to it is infinite, not an error."""
    if exponent >= 0:
        return f"{base} ** {exponent}", INFIX["pow"][0]
    return f"{constant(1.0)} / {base} ** {-exponent}", INFIX["div"][0]
