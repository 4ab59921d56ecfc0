"""What cuts across rules, composed with a rule once for every back end: scaling, clipping, weight decay, averages.

A piece is an expression in front of the rule or behind it, in the same pass. Its numbers are rows of the table like
the rule's own, with a neutral value for the tensors that do not use it; a piece that no tensor of a launch uses is
left out.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from schuss.engine.trace import Expr, Formula, Graph, parameters
from schuss.formula import clamp, lerp, maximum, mean, where

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
    names = parameters(rule)[2:]
    new = rule(p, g, *(states[n] if n in states else others[n] for n in names))
    new_p, *new_states = new if isinstance(new, tuple) else (new,)
    letters = [n for n in names if n in states]
    if len(new_states) != len(letters):
        raise TypeError(
            f"{rule.__qualname__} must return the new {', '.join(['p', *letters])}, got {1 + len(new_states)} values"
        )
    if pieces.cautious:
        aligned = where((p - new_p) * gradient > 0, 1.0, 0.0)
        new_p = p - (p - new_p) * (aligned / maximum(mean(aligned), SMALLEST_SHARE))
    if pieces.cautious_decay:
        new_p = where((p - new_p) * undecayed >= 0, new_p, new_p + (undecayed - p))
    result = {"p": new_p} | {n: new for n, new in zip(letters, new_states, strict=True) if states[n] is not None}
    if pieces.ema:
        result[EMA] = lerp(states[EMA], new_p, others["ema_weight"])
    return result


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
