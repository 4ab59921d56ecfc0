"""Cutting a formula into passes: where it needs a sum over a whole tensor, one pass finds it and the next one uses it.

Every node of a formula has a domain: it has a value for each element of the tensor, for each row or column, or one for
the tensor. Nodes of elements are computed by kernels. All others are computed between the passes, from sums that a
pass has found, in float64 and by the words that the rule was written with; the kernels that need them read them like
the rule's other numbers.
"""

import dataclasses as dc
import operator
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any

from schuss import formula as words
from schuss.engine.trace import Expr, Formula, used

REDUCTIONS = ("dot", "total", "row_mean", "column_mean")
_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow,
    "neg": operator.neg, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip


class Domain(IntEnum):
    """What a node has a value for."""

    NUMBER = 0
    """The tensor."""
    BATCH = 1
    """Each matrix of it."""
    ROWS = 2
    """Each row."""
    COLUMNS = 3
    """Each column."""
    ELEMENTS = 4

    @staticmethod
    def join(domains: Iterable["Domain"]) -> "Domain":
        """The domain of what is computed element by element from these."""
        found = {*domains}
        return Domain.ELEMENTS if {Domain.ROWS, Domain.COLUMNS} <= found else max(found, default=Domain.NUMBER)


@dc.dataclass(frozen=True)
class Sums:
    """Sums over the elements of a tensor that one pass finds.

    Args:
        formula: what is summed, as outputs.
        terms: for each sum, the outputs whose product is summed, multiplied in float64.
        scalars: the numbers that the formula reads.
    """

    formula: Formula
    terms: tuple[tuple[str, ...], ...]
    scalars: tuple[str, ...] = ()


@dc.dataclass(frozen=True)
class Level:
    """What a pass finds, and what is summed over all tensors before the next one.

    Args:
        between: the names of the numbers that the pass reads.
        sums: what is summed; None if nothing.
        reductions: the nodes that the sums are, in their order.
        everywhere: nodes that are sums over all tensors of numbers which are known now.
    """

    between: tuple[str, ...]
    sums: Sums | None
    reductions: tuple[Expr, ...]
    everywhere: tuple[Expr, ...]


@dc.dataclass(frozen=True)
class Stages:
    """A formula, cut.

    Args:
        levels: the passes that find sums, in order.
        final: the outputs that are computed for each element.
        scalars: what the kernels read: the formula's own, then the numbers of `between`.
        between: name in the kernels -> node, of the numbers that are computed between passes.
        numbers: outputs that are one number for the tensor, by letter.
        sizes: nodes that are known before any pass: how many elements the tensor has.
    """

    levels: tuple[Level, ...]
    final: Formula
    scalars: tuple[str, ...]
    between: Mapping[str, Expr]
    numbers: Mapping[str, Expr]
    sizes: tuple[Expr, ...]

    @property
    def sums_everywhere(self) -> int:
        """How many passes must be over before all sums over all tensors are known."""
        return max((k + 1 for k, level in enumerate(self.levels) if level.everywhere), default=0)


class Values:
    """The values of nodes: of numbers, as they are computed between passes, or of tensors.

    Args:
        names: input -> value.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names
        self.known: dict[Expr, Any] = {}

    def __call__(self, node: Expr) -> Any:
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: Expr) -> Any:
        if node.op == "name":
            return self._names[node.value]
        if node.op == "const":
            return node.value
        args = [self(arg) for arg in node.args]
        return (_OPERATORS.get(node.op) or getattr(words, node.op))(*args)


@dc.dataclass
class _Cut:
    """Numbers that kernels read, by name: found while formulas are cut at them."""

    domains: Mapping[Expr, Domain]
    staged: set[Expr]
    taken: set[str]
    names: dict[Expr, str] = dc.field(default_factory=dict)

    def __call__(self, node: Expr) -> Expr:
        """The node with what is computed between passes replaced by its name."""
        if node in self.staged and self.domains[node] != Domain.ELEMENTS:
            if node not in self.names:
                number = len(self.names) + 1
                while f"s{number}" in self.taken:
                    number += 1
                self.names[node] = f"s{number}"
                self.taken.add(self.names[node])
            return node.graph.name(self.names[node])
        return node.graph.node(node.op, *map(self, node.args)) if node.args else node


def is_staged(formula: Formula) -> bool:
    """Whether a formula needs more than one pass."""
    return any(node.op in (*REDUCTIONS, "size", "everywhere") for node in used(formula.outputs.values()))


def cut(formula: Formula, scalars: tuple[str, ...]) -> Stages:
    """Cut a formula into passes.

    Args:
        formula: the traced rule with its pieces; its inputs are tensors.
        scalars: the names of the numbers that it reads.

    Raises:
        TypeError: a sum of something that is no tensor.
    """
    domains: dict[Expr, Domain] = {}
    levels: dict[Expr, int] = {}
    staged: set[Expr] = set()
    reductions: list[Expr] = []
    everywhere: list[Expr] = []
    for node in used(formula.outputs.values()):  # arguments come before their users
        of = [domains[arg] for arg in node.args]
        level = max((levels[arg] for arg in node.args), default=0)
        if node.op == "name":
            domain = Domain.ELEMENTS if node.value in formula.inputs else Domain.NUMBER
        elif node.op in REDUCTIONS or node.op == "size":
            if Domain.join(of) != Domain.ELEMENTS:
                raise TypeError(f"{node.op}() is about tensors; the rule gives it a number")
            domain = Domain.NUMBER
            staged.add(node)
            if node.op != "size":
                level += 1
                reductions.append(node)
        elif node.op == "everywhere":
            if Domain.join(of) != Domain.NUMBER:
                raise TypeError(
                    "everywhere() sums a number of each tensor, such as a dot(); the rule gives it a tensor"
                )
            domain, level = Domain.NUMBER, max(level, 1)
            staged.add(node)
            everywhere.append(node)
        else:
            domain = Domain.join(of)
            if any(arg in staged for arg in node.args):
                staged.add(node)
        domains[node], levels[node] = domain, level
    replace = _Cut(domains, staged, {*formula.inputs, *scalars})
    passes = []
    for k in range(max(levels.values(), default=0)):
        found = tuple(node for node in reductions if levels[node] == k + 1)
        outputs = {f"x{i}_{j}": replace(arg) for i, node in enumerate(found) for j, arg in enumerate(node.args)}
        sums = Sums(
            Formula(formula.inputs, outputs),
            tuple(tuple(f"x{i}_{j}" for j in range(len(node.args))) for i, node in enumerate(found)),
        )
        over_all = tuple(node for node in everywhere if levels[node] == k + 1)
        passes.append(Level(tuple(replace.names.values()), sums if found else None, found, over_all))
    numbers = {
        letter: node for letter, node in formula if domains[node] == Domain.NUMBER and letter not in formula.inputs
    }
    final = Formula(formula.inputs, {letter: replace(node) for letter, node in formula if letter not in numbers})
    between = {name: node for node, name in replace.names.items()}
    complete = (*scalars, *between)
    passes = [
        level if level.sums is None else dc.replace(level, sums=dc.replace(level.sums, scalars=complete))
        for level in passes
    ]
    sizes = tuple(node for node in domains if node.op == "size")
    return Stages(tuple(passes), final, complete, between, numbers, sizes)
