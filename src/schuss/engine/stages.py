"""Cutting a formula into passes: where it needs a sum over a whole tensor, one pass finds it and the next one uses it.

Every node of a formula has a domain: it has a value for each element of the tensor, for each row or column, or one for
the tensor. Nodes of elements are computed by kernels. All others are computed between the passes, from sums that a
pass has found, in float64 and by the words that the rule was written with; the kernels that need them read them like
the rule's other numbers. A function of matrices also stands between two passes: one writes what it is given, and the
next one reads its value.
"""

import dataclasses as dc
import operator
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any

import torch

from schuss import formula as words
from schuss.engine.trace import Expr, Formula, used
from schuss.formula import MatrixCall

SIZES = ("size", "rows", "columns")
SUMS = ("dot", "total")
MEANS = ("row_mean", "column_mean")
_OPERATORS: dict[Any, Callable[..., Any]] = {
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
    MATRIX = 5
    """Each element of a square matrix beside it."""

    @staticmethod
    def join(domains: Iterable["Domain"]) -> "Domain":
        """The domain of what is computed element by element from these."""
        found = {*domains}
        return Domain.ELEMENTS if {Domain.ROWS, Domain.COLUMNS} <= found else max(found, default=Domain.NUMBER)

    @property
    def is_vector(self) -> bool:
        """Whether there are several values, but fewer than elements."""
        return self in (Domain.BATCH, Domain.ROWS, Domain.COLUMNS)


@dc.dataclass(frozen=True)
class Sums:
    """Sums over the elements of a tensor that one pass finds.

    Args:
        formula: what is summed, as outputs.
        terms: for each sum, the outputs whose product is summed, multiplied in float64.
        scalars: the numbers that the formula reads.
        rows, columns: the outputs that are summed over each row, and over each column.
        vectors: numbers among the scalars that are one for each row or column.
    """

    formula: Formula
    terms: tuple[tuple[str, ...], ...]
    scalars: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    vectors: Mapping[str, Domain] = dc.field(default_factory=dict)


@dc.dataclass(frozen=True)
class Transform:
    """A function of matrices between two passes.

    Args:
        node: the call.
        argument: the output of the level's stores that it is given.
        result: the input of later passes that its value is; None for a square matrix, which no kernel reads.
        state: the state that may be overwritten with its value after all else, by letter: nothing else needs either.
    """

    node: Expr
    argument: str
    result: str | None
    state: str | None = None


@dc.dataclass(frozen=True)
class Level:
    """What a pass finds, and what is summed over all tensors before the next one.

    Args:
        between: the names of the numbers that the pass reads.
        sums: what is summed; None if nothing.
        reductions: the nodes that the sums are: of its terms, of rows, of columns.
        everywhere: nodes that are sums over all tensors of numbers which are known now.
        stores: what functions of matrices are given.
        transforms: these functions.
    """

    between: tuple[str, ...]
    sums: Sums | None
    reductions: tuple[Expr, ...]
    everywhere: tuple[Expr, ...]
    stores: Formula
    transforms: tuple[Transform, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The inputs that its passes read, once for each time."""
        formulas = [self.stores] if self.sums is None else [self.sums.formula, self.stores]
        return tuple(
            str(node.value)
            for formula in formulas
            for node in used(formula.outputs.values())
            if node.op == "name" and node.value in formula.inputs
        )


@dc.dataclass(frozen=True)
class Stages:
    """A formula, cut.

    Args:
        levels: the passes that find sums, in order.
        final: the outputs that are computed for each element.
        scalars: what the kernels read: the formula's own, then those of `between`.
        between: name in the kernels -> node, of the numbers that are computed between passes.
        vectors: those of them that are one for each row or column.
        outside: outputs that are no elements: numbers, and states of rows and columns, by letter.
        sizes: nodes that are known before any pass: how many elements, rows or columns the tensor has.
    """

    levels: tuple[Level, ...]
    final: Formula
    scalars: tuple[str, ...]
    between: Mapping[str, Expr]
    vectors: Mapping[str, Domain]
    outside: Mapping[str, Expr]
    sizes: tuple[Expr, ...]

    @property
    def sums_everywhere(self) -> int:
        """How many passes must be over before all sums over all tensors are known."""
        return max((k + 1 for k, level in enumerate(self.levels) if level.everywhere), default=0)

    @property
    def results(self) -> dict[str, MatrixCall]:
        """The inputs of kernels that are values of functions of matrices."""
        return {t.result: t.node.op for level in self.levels for t in level.transforms if t.result is not None}


class Values:
    """The values of nodes: of numbers, as they are computed between passes, or of tensors.

    Args:
        names: input -> value.
        missing: computes the value of any other input, once it is wanted.
    """

    def __init__(self, names: Mapping[str, Any], missing: Callable[[str], Any] | None = None) -> None:
        self._names, self._missing = names, missing
        self.known: dict[Expr, Any] = {}

    def __call__(self, node: Expr) -> Any:
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: Expr) -> Any:
        if node.op == "name":
            if self._missing is not None and node.value not in self._names:
                return self._missing(node.value)
            return self._names[node.value]
        if node.op == "const":
            return node.value
        args = _aligned([self(arg) for arg in node.args])
        if isinstance(node.op, MatrixCall):
            return node.op(*args)
        return (_OPERATORS.get(node.op) or getattr(words, node.op))(*args)


def _aligned(args: list[Any]) -> list[Any]:
    """Values to compute with: numbers of tensors [tensor] get the dimensions of the tensors' matrices beside them."""
    largest = max(args, key=lambda arg: getattr(arg, "ndim", 0), default=0.0)
    dimensions = getattr(largest, "ndim", 0)
    if dimensions < 2 or not isinstance(largest, torch.Tensor):
        return args
    return [
        torch.as_tensor(arg).to(largest).view(-1, *[1] * (dimensions - 1)) if getattr(arg, "ndim", 0) == 1 else arg
        for arg in args
    ]


@dc.dataclass
class _Cut:
    """What kernels read instead of nodes that are computed between passes: found while formulas are cut at them."""

    domains: Mapping[Expr, Domain]
    staged: set[Expr]
    taken: set[str]
    numbers: dict[Expr, str] = dc.field(default_factory=dict)
    results: dict[Expr, str] = dc.field(default_factory=dict)

    def __call__(self, node: Expr) -> Expr:
        """The node with what is computed between passes replaced by its name."""
        if node in self.results:
            return node.graph.name(self.results[node])
        if node in self.staged and self.domains[node] != Domain.ELEMENTS:
            if node not in self.numbers:
                self.numbers[node] = self.new("s")
            return node.graph.name(self.numbers[node])
        return node.graph.node(node.op, *map(self, node.args)) if node.args else node

    def new(self, letter: str) -> str:
        """A name that nothing has yet."""
        number = 1
        while f"{letter}{number}" in self.taken:
            number += 1
        self.taken.add(f"{letter}{number}")
        return f"{letter}{number}"


def is_staged(formula: Formula, domains: Mapping[str, Domain] | None = None) -> bool:
    """Whether a formula is more than one pass over elements.

    It needs several passes, or numbers of the tensor's shape, or has new ones that it keeps, or inputs that have no
    value for each element: `domains` has what they have one for, all that are not there have one for each.
    """
    found = (*SUMS, *MEANS, *SIZES, "everywhere")
    beside = {name for name, domain in (domains or {}).items() if domain != Domain.ELEMENTS}
    return bool({*formula.outputs} - {*formula.inputs} or beside & {*formula.inputs}) or any(
        node.op in found or isinstance(node.op, MatrixCall) for node in used(formula.outputs.values())
    )


def cut(formula: Formula, scalars: tuple[str, ...], domains_of: Mapping[str, Domain] | None = None) -> Stages:
    """Cut a formula into passes.

    Args:
        formula: the traced rule with its pieces; its inputs are tensors.
        scalars: the names of the numbers that it reads.
        domains_of: what the inputs have a value for; None: all of them for each element.

    Raises:
        TypeError: a sum of something that is no tensor, or a new state that has more values than the state.
    """
    inputs = {name: Domain.ELEMENTS for name in formula.inputs} | dict(domains_of or {})
    domains: dict[Expr, Domain] = {}
    levels: dict[Expr, int] = {}
    summed: dict[Expr, int] = {}  # the last pass that sums over all tensors follow
    staged: set[Expr] = set()
    for node in used(formula.outputs.values()):  # arguments come before their users
        of = Domain.join(domains[arg] for arg in node.args)
        domain, level, is_sum = of, max((levels[arg] for arg in node.args), default=0), node.op in (*SUMS, *MEANS)
        summed[node] = max((summed[arg] for arg in node.args), default=0)
        if node.op == "name":
            domain = inputs.get(node.value, Domain.NUMBER)
        elif is_sum or node.op in SIZES:
            if of == Domain.NUMBER:
                raise TypeError(f"{node.op}() is about tensors; the rule gives it a number")
            if of.is_vector and node.op not in MEANS:
                raise TypeError(
                    f"{node.op}() is about tensors; use row_mean() or column_mean() of numbers of columns or rows"
                )
            domain = _MEANS[node.op](of) if node.op in MEANS else Domain.NUMBER
            level += is_sum and of == Domain.ELEMENTS
        elif isinstance(node.op, MatrixCall):
            domain, level = Domain.MATRIX if node.op.square else Domain.ELEMENTS, level + 1
        elif node.op == "everywhere":
            if of != Domain.NUMBER:
                raise TypeError("everywhere() is about a number of each tensor, such as a dot(); it got a tensor")
            level = summed[node] = max(level, summed[node] + 1)
        elif of == Domain.MATRIX and any(domains[arg] not in (of, Domain.NUMBER) for arg in node.args):
            raise TypeError("square matrices beside a parameter are computed with numbers and each other alone")
        if is_sum or node.op in (*SIZES, "everywhere") or domain.is_vector or any(arg in staged for arg in node.args):
            staged.add(node)
        domains[node], levels[node] = domain, level
    replace = _Cut(domains, staged, {*formula.inputs, *scalars})
    nodes = list(domains)
    for node in nodes:
        if isinstance(node.op, MatrixCall) and not node.op.square:
            replace.results[node] = replace.new("u")

    overwritten = _overwritten(formula, inputs)
    passes = []
    for k in range(max(levels.values(), default=0)):
        found = [n for n in nodes if levels[n] == k + 1 and n.op in (*SUMS, *MEANS) and levels[n.args[0]] <= k]
        found = [n for n in found if domains[n.args[0]] == Domain.ELEMENTS]
        found.sort(key=lambda n: ("row_mean", "column_mean").index(n.op) if n.op in MEANS else -1)
        outputs = {f"x{i}_{j}": replace(arg) for i, n in enumerate(found) for j, arg in enumerate(n.args)}
        of_op = {op: tuple(f"x{i}_0" for i, n in enumerate(found) if n.op == op) for op in MEANS}
        terms = tuple(tuple(f"x{i}_{j}" for j in range(len(n.args))) for i, n in enumerate(found) if n.op in SUMS)
        sums = Sums(Formula(formula.inputs, outputs), terms, (), of_op["row_mean"], of_op["column_mean"])
        transforms: list[Transform] = []
        stores: dict[str, Expr] = {}
        for node in nodes:
            if isinstance(node.op, MatrixCall) and levels[node] == k + 1:
                given = replace(node.args[0])
                alike = [name for name, other in stores.items() if other is given]
                name = alike[0] if alike else replace.new("b")
                stores[name] = given
                transforms.append(Transform(node, name, replace.results.get(node), overwritten.get(node)))
        over_all = tuple(node for node in nodes if node.op == "everywhere" and levels[node] == k + 1)
        passes.append(
            Level(
                tuple(replace.numbers.values()),
                sums if found else None,
                tuple(found),
                over_all,
                Formula(formula.inputs, stores),
                tuple(transforms),
            )
        )
    elements = {letter for letter, domain in inputs.items() if domain == Domain.ELEMENTS}
    final = Formula(formula.inputs, {letter: replace(node) for letter, node in formula if letter in elements})
    between = {name: node for node, name in replace.numbers.items()}
    vectors = {name: domains[node] for name, node in between.items() if domains[node].is_vector}
    complete = (*scalars, *(name for name in between if name not in vectors))
    passes = [
        dc.replace(level, sums=level.sums and dc.replace(level.sums, scalars=complete, vectors=vectors))
        for level in passes
    ]
    outside = {
        letter: node
        for letter, node in formula
        if letter not in elements and not (node.op == "name" and node.value == letter)
    }
    for letter, node in outside.items():
        own = inputs.get(letter, Domain.NUMBER)
        if domains[node] not in _FITS.get(own, (own, Domain.NUMBER)):
            raise TypeError(f"the new {letter} has a value for {_EACH[domains[node]]}; the state has {_HAS[own]}")
    sizes = tuple(node for node in nodes if node.op in SIZES and domains[node.args[0]] == Domain.ELEMENTS)
    return Stages(tuple(passes), final, complete, between, vectors, outside, sizes)


def _overwritten(formula: Formula, domains: Mapping[str, Domain]) -> dict[Expr, str]:
    """Square values that are a state's new value and nothing else, where no other of them needs its old one.

    Args:
        formula: what is cut.
        domains: what the inputs have a value for.

    Returns:
        Node -> the state.
    """
    uses = used(formula.outputs.values())
    found = {
        node: letter
        for letter, node in formula
        if isinstance(node.op, MatrixCall) and node.op.square and node.op.listed and uses[node] == 1
    }

    def is_needed(letter: str, but_for: Expr) -> bool:
        others = (node for node in found if node is not but_for)
        return any(arg.op == "name" and arg.value == letter for node in others for arg in node.args)

    return {
        node: letter
        for node, letter in found.items()
        if domains.get(letter) == Domain.MATRIX and not is_needed(letter, node)
    }


def _row_mean(of: Domain) -> Domain:
    return {Domain.ELEMENTS: Domain.ROWS, Domain.COLUMNS: Domain.BATCH}.get(of, of)


def _column_mean(of: Domain) -> Domain:
    return {Domain.ELEMENTS: Domain.COLUMNS, Domain.ROWS: Domain.BATCH}.get(of, of)


_FITS = {side: (side, Domain.BATCH, Domain.NUMBER) for side in (Domain.ROWS, Domain.COLUMNS)}
_EACH = {
    Domain.BATCH: "each matrix",
    Domain.ROWS: "each row",
    Domain.COLUMNS: "each column",
    Domain.ELEMENTS: "each element",
    Domain.MATRIX: "each element of a square matrix",
}
_HAS = {
    Domain.NUMBER: "one for the tensor",
    Domain.ROWS: "one for each row",
    Domain.COLUMNS: "one for each column",
    Domain.MATRIX: "those of a square matrix",
}
_MEANS = {"row_mean": _row_mean, "column_mean": _column_mean}
