"""What cuts across rules, composed with a rule once for every back end: scaling, clipping, weight decay, averages.

A piece is an expression in front of the rule or behind it, in the same pass. Its numbers are rows of the table like
the rule's own, with a neutral value for the tensors that do not use it; a piece that no tensor of a launch uses is
left out.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from schuss.engine.stages import Values
from schuss.engine.trace import Expr, Formula, Graph, parameters
from schuss.formula import MatrixCall, Operand, clamp, lerp, maximum, mean, sign, where

SMALLEST_SHARE = 1e-3
"""Of elements that go, by which the steps of a cautious update are divided."""
EMA = "ema"
"""The letter, and the name, of the state that averages the parameter."""


@dataclass(frozen=True)
class Pieces:
    """Which pieces a launch contains."""

    gain: bool = False
    """The gradient is multiplied: by -1 to maximize, by 1 / scale to undo a GradScaler."""
    clip_value: bool = False
    """The gradient is limited to [-clip_value, clip_value]."""
    l2: bool = False
    """weight_decay * p is added to the gradient."""
    l2_everywhere: bool = True
    """No tensor has weight_decay 0; where one has, infinite parameters must not turn its gradient into NaN."""
    decay: bool = False
    """p is multiplied by 1 - lr * weight_decay before the rule: decoupled weight decay."""
    cautious: bool = False
    """Elements whose step would not go against their gradient stay; the others' steps grow as the share that goes."""
    cautious_decay: bool = False
    """Elements whose step leads away from zero do not decay, where weight decay is decoupled."""
    ema: bool = False
    """The state "ema" moves towards the new p by ema_weight."""

    @property
    def scalars(self) -> tuple[str, ...]:
        """The names of the scalars that the pieces need."""
        scalars = {
            "gain": self.gain,
            "clip_value": self.clip_value,
            "weight_decay": self.l2,
            "decay": self.decay,
            "ema_weight": self.ema,
        }
        return tuple(name for name, there in scalars.items() if there)


def apply(
    rule: Callable[..., Any],
    pieces: Pieces,
    p: Any,
    g: Any,
    states: Mapping[str, Any],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """The new parameter "p" and the new states by letter, computed on whatever the arguments are.

    Args:
        rule: the formula.
        pieces: what is composed with it.
        p, g: parameter and gradient.
        states: the states by the rule's letter; None for one that does not exist.
        others: scalars and flags by name.
    """
    if pieces.gain:
        g = g * others["gain"]
    if pieces.clip_value:
        g = clamp(g, -others["clip_value"], others["clip_value"])
    gradient = g
    if pieces.l2:
        decayed = g + others["weight_decay"] * p
        g = decayed if pieces.l2_everywhere else where(others["weight_decay"] != 0, decayed, g)
    undecayed = p
    if pieces.decay:
        p = others["decay"] * p
    given = {n: states[n] if n in states else others[n] for n in parameters(rule)[2:]}
    letters = [n for n in given if n in states]
    if pieces.cautious or pieces.cautious_decay:
        (new_p, *new_states), u = _with_step(rule, p, g, given, letters)
    else:
        new_p, *new_states = _run(rule, p, g, given, letters)
    if pieces.cautious:
        aligned = where(sign(u) * gradient > 0, 1.0, 0.0)  # u * gradient may underflow
        u = u * (aligned / maximum(mean(aligned), SMALLEST_SHARE))
        new_p = p - u
    if pieces.cautious_decay:
        new_p = where(sign(u) * undecayed >= 0, new_p, new_p + (undecayed - p))
    result = {"p": new_p} | {n: new for n, new in zip(letters, new_states, strict=True) if states[n] is not None}
    if pieces.ema:
        result[EMA] = lerp(states[EMA], new_p, others["ema_weight"])
    return result


def _run(
    rule: Callable[..., Any], p: Any, g: Any, given: Mapping[str, Any], letters: Collection[str]
) -> tuple[Any, ...]:
    """The new p and the new states of a rule alone."""
    new = rule(p, g, *given.values())
    new = new if isinstance(new, tuple) else (new,)
    if len(new) != 1 + len(letters):
        raise TypeError(f"{rule.__qualname__} must return the new {', '.join(['p', *letters])}, got {len(new)} values")
    return new


def _with_step(
    rule: Callable[..., Any], p: Any, g: Any, given: Mapping[str, Any], letters: Collection[str]
) -> tuple[tuple[Any, ...], Any]:
    """What `_run` returns, and what the rule subtracts from p.

    p minus the new p would be it, but for steps under half of p's last bit: these would have no sign.
    """
    if isinstance(p, Expr):
        new = _run(rule, p, g, given, letters)
        step = _subtracted(new[0], p)
        return new, p - new[0] if step is None or isinstance(step, float) else step
    values = {"p": p, "g": g} | {n: v for n, v in given.items() if isinstance(v, (torch.Tensor, Operand))}
    graph = Graph()
    symbols = {n: graph.name(n) for n in values}
    traced, step = _with_step(
        rule, symbols["p"], symbols["g"], {n: symbols.get(n, v) for n, v in given.items()}, letters
    )
    evaluate = _Eager(values)
    return tuple(evaluate(new) if isinstance(new, Expr) else new for new in traced), evaluate(step)


class _Eager(Values):
    """The values of a rule's nodes on tensors, or on lists of them."""

    def _compute(self, node: Expr) -> Any:
        if isinstance(node.op, MatrixCall):
            args = tuple(map(self, node.args))
            return args[0].__formula__(node.op, args) if isinstance(args[0], Operand) else node.op(*args)
        return super()._compute(node)


def _subtracted(new_p: Any, p: Expr) -> Any:
    """What an expression subtracts from p; None if it is no such expression."""
    if new_p is p:
        return 0.0
    if not isinstance(new_p, Expr):
        return None
    if new_p.op == "where":
        condition, *branches = new_p.args
        yes, no = (_subtracted(branch, p) for branch in branches)
        return None if yes is None or no is None else where(condition, yes, no)
    if new_p.op not in ("sub", "add", "mul"):
        return None
    for one, other in (new_p.args,) if new_p.op == "sub" else (new_p.args, new_p.args[::-1]):
        if (before := _subtracted(one, p)) is None:
            continue
        if new_p.op == "mul":
            shrunk = p - other * p
            return shrunk if isinstance(before, float) else shrunk + other * before
        if isinstance(before, float):
            return other if new_p.op == "sub" else -other
        return before + other if new_p.op == "sub" else before - other
    return None


def trace(
    rule: Callable[..., Any],
    pieces: Pieces,
    states: Mapping[str, bool],
    flags: Mapping[str, bool],
    numbers: Collection[str] = (),
) -> tuple[Formula, tuple[str, ...]]:
    """The formula of a rule with its pieces, and the names of the scalars that it reads, in order.

    Args:
        rule: the formula.
        pieces: what is composed before it.
        states: the letters of all its states, and whether each exists.
        flags: Python booleans that choose between forms of the rule.
        numbers: the letters of states that are one number for a tensor; a formula reads them as scalars.
    """
    graph = Graph()
    own = [n for n in parameters(rule)[2:] if (n not in states or n in numbers) and n not in flags]
    scalars = (*pieces.scalars, *(n for n in own if n not in pieces.scalars))
    symbols = {n: graph.name(n) for n in scalars}
    present = {n: graph.name(n) if there else None for n, there in states.items()}
    new = apply(rule, pieces, graph.name("p"), graph.name("g"), present, symbols | dict(flags))
    outputs = {n: value if isinstance(value, Expr) else graph.constant(value) for n, value in new.items()}
    return Formula(("p", "g", *(n for n, there in states.items() if there and n not in numbers)), outputs), scalars
