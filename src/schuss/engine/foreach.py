"""The foreach back end: the rule on lists of tensors, one `torch._foreach_*` call per operation.

For devices without a compiler of ours. It allocates temporaries, as torch's own foreach optimizers do.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from schuss import formula
from schuss.engine.pieces import Pieces, apply
from schuss.engine.reference import computed_in
from schuss.engine.state import Cell, real_view
from schuss.formula import MatrixCall, Operand
from schuss.rule import Rule

_FOREACH: dict[str, Callable[..., Any]] = {
    "add": torch._foreach_add,
    "sub": torch._foreach_sub,
    "mul": torch._foreach_mul,
    "div": torch._foreach_div,
    "pow": torch._foreach_pow,
    "maximum": torch._foreach_maximum,
    "minimum": torch._foreach_minimum,
}
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": torch._foreach_neg,
    "sqrt": torch._foreach_sqrt,
    "exp": torch._foreach_exp,
    "log": torch._foreach_log,
    "absolute": torch._foreach_abs,
    "sign": torch._foreach_sign,
}
_ONE_BY_ONE: dict[str, Callable[..., Any]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "logical_and": lambda a, b: a & b,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "sqrt": formula.sqrt,
    "exp": formula.exp,
    "log": formula.log,
    "absolute": formula.absolute,
    "sign": formula.sign,
    "maximum": formula.maximum,
    "minimum": formula.minimum,
    "lerp": formula.lerp,
    "dot": formula.dot,
    "total": formula.total,
    "row_mean": formula.row_mean,
    "column_mean": formula.column_mean,
}


class Numbers(Operand):
    """One number per tensor: a scalar of the rule."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = [np.float64(value) for value in values]  # divides by zero, as an array does

    def __formula__(self, word: Any, args: tuple[Any, ...]) -> Any:
        return _apply(word, args)


class Stack(Operand):
    """A list of tensors that a rule computes with as if it were one.

    Args:
        tensors: the list.
        dtype: what the rule computes in; conditions are booleans, but what is chosen by them is not.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = list(tensors), dtype

    def __formula__(self, word: Any, args: tuple[Any, ...]) -> Any:
        return _apply(word, args)


def _apply(word: Any, args: Sequence[Any]) -> "Stack | Numbers":
    stacks = [arg for arg in args if isinstance(arg, Stack)]
    count = len(stacks[0].tensors) if stacks else len(next(a for a in args if isinstance(a, Numbers)).values)
    # A sum is one float64 number for its tensor: what it is computed with keeps its dtype.
    dtype = min((stack.dtype for stack in stacks), key=lambda kind: kind.itemsize, default=torch.float64)
    if word in ("size", "rows", "columns"):
        count_of = getattr(formula, word)
        counts: list[float] = [float(count_of(tensor)) for tensor in stacks[0].tensors]
        return Numbers(counts)
    if word in _UNARY and stacks:
        return Stack(_UNARY[word](stacks[0].tensors), dtype)
    if word in _FOREACH and stacks and args[0] is stacks[0]:
        other = args[1]
        if isinstance(other, Stack):
            return Stack(_FOREACH[word](stacks[0].tensors, other.tensors), dtype)
        return Stack(_FOREACH[word](stacks[0].tensors, _floats(other)), dtype)
    if word in ("add", "mul", "maximum", "minimum") and stacks:
        return _apply(word, (args[1], args[0]))

    def item(arg: Any, i: int) -> Any:
        return arg.tensors[i] if isinstance(arg, Stack) else arg.values[i] if isinstance(arg, Numbers) else arg

    rows = [[item(arg, i) for arg in args] for i in range(count)]
    if word == "where":
        if not stacks:
            return Numbers([yes if condition else no for condition, yes, no in rows])
        return Stack([_where(dtype, *row) for row in rows], dtype)
    with np.errstate(all="ignore"):
        results: list[Any] = [(word if isinstance(word, MatrixCall) else _ONE_BY_ONE[word])(*row) for row in rows]
    if word in ("dot", "total"):
        dtype = torch.float64
    return Stack(results, dtype) if stacks else Numbers(results)


def _floats(other: Any) -> Any:
    return list(map(float, other.values)) if isinstance(other, Numbers) else other


def _where(dtype: torch.dtype, condition: Any, yes: Any, no: Any) -> torch.Tensor:
    if isinstance(condition, torch.Tensor):
        chosen: torch.Tensor = formula.where(condition, yes, no)
        # Of two numbers torch makes float64; the computation has float32 or float64, and so have numbers in it.
        both_numbers = not isinstance(yes, torch.Tensor) and not isinstance(no, torch.Tensor)
        return chosen.to(dtype) if both_numbers else chosen
    this, other = (yes, no) if condition else (no, yes)
    return this if isinstance(this, torch.Tensor) else torch.full_like(other, this)


def update(
    rule: Rule,
    pieces: Pieces,
    params: Sequence[Cell],
    grads: Sequence[torch.Tensor],
    states: Mapping[str, Sequence[Cell] | None],
    scalars: Mapping[str, Sequence[float]],
    flags: Mapping[str, bool],
) -> dict[str, list[Any]]:
    """Write the new parameters and states of tensors of one device that are stored alike; returns the new numbers."""
    there = {"p": params, **{n: s for n, s in states.items() if s is not None}}
    dtype = computed_in([grads[0], *(cells[0].values for cells in there.values())])

    def wide(cells: Sequence[Cell]) -> Stack:
        return Stack([cell.read(dtype) for cell in cells], dtype)

    others: dict[str, Any] = {n: Numbers(v) for n, v in scalars.items()}
    stacks: dict[str, Any] = {n: None if s is None else wide(s) for n, s in states.items()}
    stacks |= {letter: others[letter] for letter in rule.number_states}
    gradients = Stack([real_view(g).to(dtype) for g in grads], dtype)
    values = wide(params)
    new = apply(rule.formula, pieces, values, gradients, stacks, others | dict(flags))
    own = {id(values): "p"} | {id(stacks[letter]): letter for letter in there if letter != "p"}
    for name in there:
        if own.get(id(new[name]), name) != name:  # what was another role's value must outlive the writing of that role
            new[name] = Stack([t.clone() for t in new[name].tensors], dtype)
    for name, cells in there.items():
        result = new[name]
        if not isinstance(result, Stack):  # the same number for all elements
            like = zip([cell.read(dtype) for cell in cells], _of_each(result, len(cells)), strict=True)
            result = Stack([torch.full_like(t, float(v)) for t, v in like], dtype)
        if all(cell.is_plain and not cell.values.is_conj() for cell in cells):
            torch._foreach_copy_([real_view(cell.values) for cell in cells], result.tensors)
            continue
        for cell, value in zip(cells, result.tensors, strict=True):
            cell.write(value)
    return {n: _of_each(new[n], len(params)) for n in rule.number_states}


def _of_each(numbers: Any, count: int) -> list[Any]:
    """A number of each tensor, as a list."""
    if isinstance(numbers, Stack):
        return numbers.tensors
    return numbers.values if isinstance(numbers, Numbers) else [numbers] * count
