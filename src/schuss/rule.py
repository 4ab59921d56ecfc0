"""What a rule says of itself, as data: its states, and what the engine derives from its functions' signatures."""

from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from schuss.bounds import check_length, number
from schuss.engine.pieces import EMA, Pieces, trace
from schuss.engine.stages import Domain, cut
from schuss.engine.trace import Formula, parameters, used
from schuss.formula import MatrixCall, minimum, where

if TYPE_CHECKING:
    from schuss.options import Settings

ENGINE_KEYS = ("maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
"""Keys of a parameter group that speak to the engine, not to the rule."""


Shape = Callable[[Mapping[str, Any], torch.Tensor], tuple[int, ...]]
"""The shape of a state, of a parameter and its group."""

_MATRIX = torch.empty(2, 2, device="meta")
_DIMENSIONS: dict[Any, int] = {"row_mean": 2, "column_mean": 2, "rows": 1, "columns": 1}
"""How many dimensions a tensor must have for a word to be about it."""
_DOMAINS = {
    "p": Domain.ELEMENTS,
    "rows": Domain.ROWS,
    "columns": Domain.COLUMNS,
    "left": Domain.MATRIX,
    "right": Domain.MATRIX,
}


@dataclass(frozen=True)
class State:
    """What a rule keeps of a parameter from step to step: a tensor like it, or a number.

    Args:
        name: its name in `optimizer.state[p]` and in checkpoints.
        init: what it starts as: a number, the name of a hyperparameter, or "p": the parameter's value.
        when: the hyperparameter that must be true or non-zero for the state to exist, or a function of the group and
            the parameter that says whether it does; None: it always exists.
        nonnegative: it is never negative, so that 8-bit codes need no sign.
        exact: 8 bits would break the rule, since small differences of the state decide what happens: True, or the name
            of the hyperparameter that makes it so.
        wide: it is stored in float32 at least, also for parameters of fewer bits; a number in float64.
        number: it is one number for the tensor; the formula returns the new one, made of sums. It always exists.
        like: what its shape is like: "p"; "rows" or "columns", one number for each row or column of the parameter's
            matrices, which are its last two dimensions; "left" or "right", a square matrix with the side of the
            parameter as one matrix, for functions of matrices; or a function of the group and the parameter that gives
            the shape of several square matrices.
    """

    name: str
    init: float | str = 0.0
    when: str | Callable[[Mapping[str, Any], torch.Tensor], bool] | None = None
    nonnegative: bool = False
    exact: bool | str = False
    wide: bool = False
    number: bool = False
    like: Literal["p", "rows", "columns", "left", "right"] | Shape = "p"

    def __post_init__(self) -> None:
        if not self.number:
            return
        given = {"like": self.like != "p", "when": self.when is not None, "init": self.init == "p"}
        for argument, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"State: {argument} of {self.name!r} has no meaning with number=True, which is one number for the "
                    f"tensor, in every form of the rule; got {getattr(self, argument)!r}, leave it out"
                )

    def exists(self, group: Mapping[str, Any], p: torch.Tensor) -> bool:
        """Whether a parameter of this group has the state."""
        if callable(self.when):
            return self.when(group, p)
        return self.when is None or bool(group[self.when])

    def may_exist(self, group: Mapping[str, Any]) -> bool:
        """Whether some parameter of this group may have the state."""
        return not isinstance(self.when, str) or bool(group[self.when])

    def shape(self, group: Mapping[str, Any], p: torch.Tensor) -> tuple[int, ...]:
        """Its shape, for a parameter of this group."""
        if callable(self.like):
            return self.like(group, p)
        if self.like == "rows":
            return (*p.shape[:-1], 1)
        if self.like == "columns":
            return (*p.shape[:-2], 1, *p.shape[-1:])
        if self.like == "p":
            return tuple(p.shape)
        side = p.shape[0] if self.like == "left" else p[:1].numel()
        return (side, side)

    def must_be_exact(self, group: Mapping[str, Any]) -> bool:
        """Whether the state of a parameter of this group cannot be stored in 8 bits."""
        return bool(group[self.exact] if isinstance(self.exact, str) else self.exact)


@dataclass(frozen=True)
class Variant:
    """The form of a rule that a parameter group chooses: which states exist, and the flags."""

    states: tuple[bool, ...]
    flags: tuple[Any, ...]


class Rule:
    """A rule's formula, scalars and states, read once from the class that declares them.

    Args:
        owner: the class's name, for messages.
        formula: `rule(p, g, <states>, <scalars and flags>)`, returns the new p and the new states in that order.
        scalars: float64 function of `step` (counted from 1), `first` (the state is new), scalar states and
            hyperparameters, by name; returns finished scalars, and new scalar states, by name.
        states: letter in the formula -> state.
        scalar_states: name -> initial value (a number, or the name of a hyperparameter) of numbers kept per parameter.
        has_step: whether a `step` is kept per parameter.
        decay: what `weight_decay` means.
        defaults: the group's keys with their default values.
        choices: hyperparameters that choose a form of the formula, which is given them as they are.
        flags: those that choose one by being true or not, whatever they are in `defaults`; beside those that are bools
            there.
    """

    def __init__(
        self,
        owner: str,
        formula: Callable[..., Any],
        scalars: Callable[..., Mapping[str, Any]],
        states: Mapping[str, State],
        scalar_states: Mapping[str, float | str],
        has_step: bool,
        decay: str | None,
        defaults: Mapping[str, Any],
        choices: Collection[str] = (),
        flags: Collection[str] = (),
    ) -> None:
        self.owner, self.formula, self.scalars = owner, formula, scalars
        self.states = {letter: state for letter, state in states.items() if not state.number}
        self.number_states = {letter: state.name for letter, state in states.items() if state.number}
        """The letters of states that are one number for a tensor, and the names of these."""
        self.has_step, self.decay = has_step, decay
        step: dict[str, float | str] = {"step": 0.0} if has_step else {}
        self.scalar_states = step | dict(scalar_states) | {s.name: s.init for s in states.values() if s.number}
        self.wide_numbers = frozenset(s.name for s in states.values() if s.number and s.wide)
        """The names of numbers that are stored in float64, whatever torch's default is."""
        self.options: Settings | None = None
        self._traced: dict[tuple[Variant, Pieces], tuple[Formula, tuple[str, ...]]] = {}
        self._needs: dict[Variant, frozenset[str]] = {}
        self._smallest: dict[Variant, tuple[int, str]] = {}
        arguments = parameters(formula)
        if arguments[:2] != ("p", "g"):
            raise TypeError(f"{owner}.rule must take p and g first, got ({', '.join(arguments)})")
        known = {"step", "first", "gain", "decoupled", "dtype_eps", *self.scalar_states, *defaults}
        if unknown := [name for name in parameters(scalars) if name not in known]:
            raise TypeError(
                f"{owner}.scalars takes {unknown[0]!r}, which is no hyperparameter and no scalar state; it may take "
                f"{', '.join(sorted(known))}"
            )
        if missing := [letter for letter in states if letter not in arguments]:
            raise TypeError(f"{owner}.rule does not take its state {missing[0]!r}")
        self.choices = tuple(choices)
        self.flags = tuple(a for a in arguments[2:] if isinstance(defaults.get(a), bool) or a in (*flags, *choices))
        """Hyperparameters that are Python values inside the formula."""
        self.keys = tuple(defaults)
        """The keys of a group that can change what a step does."""
        wanted = {*parameters(scalars), *arguments, "lr", "weight_decay"}
        self.numeric = tuple(
            key
            for key in defaults
            if key in wanted and key not in self.flags and key not in ENGINE_KEYS and key not in choices
        )
        """The hyperparameters that are numbers, or tuples of numbers, for the scalars and the formula."""
        self.lengths = {k: len(value) for k in self.numeric if isinstance(value := defaults[k], (tuple, list))}
        """How many numbers those have that are tuples."""
        self.columns: dict[str, slice] = {}
        """Where each of them lies in a row of numbers."""
        start = 0
        for key in self.numeric:
            self.columns[key] = slice(start, start := start + self.lengths.get(key, 1))

    def with_options(self, options: "Settings") -> "Rule":
        """This rule with what an optimizer's options add to it: an average, and a `step` for what is keyed by it."""
        rule = copy(self)
        rule.options, rule._traced, rule._needs, rule._smallest = options, {}, {}, {}
        if options.ema_decay is not None:
            rule.states = {**self.states, EMA: State(EMA, init="p", wide=True, exact=True)}
        if options.needs_step and not self.has_step:
            rule.has_step, rule.scalar_states = True, {"step": 0.0, **self.scalar_states}
        return rule

    @cached_property
    def _scalar_arguments(self) -> tuple[str, ...]:
        return parameters(self.scalars)

    def given(self, p: torch.Tensor) -> dict[str, float]:
        """What the scalars want to know of a parameter: the epsilon of its dtype."""
        return {"dtype_eps": torch.finfo(p.dtype).eps} if "dtype_eps" in self._scalar_arguments else {}

    @property
    def marks_first(self) -> bool:
        """Whether the first step is told by a mark of the plan, since no step is kept."""
        return not self.has_step and bool(self.states)

    def variant(self, group: Mapping[str, Any], p: torch.Tensor = _MATRIX) -> Variant:
        """The form that a parameter group chooses, for a parameter or for any matrix."""
        return Variant(
            tuple(state.exists(group, p) for state in self.states.values()),
            tuple(_value(group[flag]) if flag in self.choices else bool(group[flag]) for flag in self.flags),
        )

    def present(self, variant: Variant) -> list[State]:
        """The states that exist."""
        return [state for state, there in zip(self.states.values(), variant.states, strict=True) if there]

    def letters(self, variant: Variant) -> dict[str, bool]:
        """The letters of all states, and whether each exists."""
        return dict(zip(self.states, variant.states, strict=True))

    def chosen(self, variant: Variant) -> dict[str, bool]:
        """The flags by name."""
        return dict(zip(self.flags, variant.flags, strict=True))

    def is_decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether weight decay multiplies the parameter instead of joining the gradient."""
        return bool(group.get("decoupled_weight_decay", self.decay == "decoupled"))

    def trace(self, variant: Variant, pieces: Pieces) -> tuple[Formula, tuple[str, ...]]:
        """The formula of a form of the rule with its pieces, and the scalars that it reads, in order."""
        if (variant, pieces) not in self._traced:
            numbers, flags = self.number_states, self.chosen(variant)
            letters = self.letters(variant) | dict.fromkeys(numbers, True)
            self._traced[variant, pieces] = trace(self.formula, pieces, letters, flags, numbers)
        return self._traced[variant, pieces]

    def sums_everywhere(self, variant: Variant) -> bool:
        """Whether a form of the rule needs sums over all tensors of the optimizer."""
        return any(node.op == "everywhere" for node in used(self.trace(variant, Pieces())[0].outputs.values()))

    def needs(self, variant: Variant) -> frozenset[str]:
        """What else than elements a form of the rule computes with: "vectors" of rows and columns, and "matrices"."""
        if variant not in self._needs:
            nodes = used(self.trace(variant, Pieces())[0].outputs.values())
            vectors = any(node.op in ("row_mean", "column_mean") for node in nodes)
            vectors |= any(state.like in ("rows", "columns") for state in self.present(variant))
            matrices = any(isinstance(node.op, MatrixCall) for node in nodes)
            self._needs[variant] = frozenset(["vectors"] * vectors + ["matrices"] * matrices)
        return self._needs[variant]

    def smallest(self, variant: Variant) -> tuple[int, str]:
        """How many dimensions a parameter must have for a form of the rule, and what in the rule asks for them."""
        if variant not in self._smallest:
            asked = []
            for node in used(self.trace(variant, Pieces())[0].outputs.values()):
                if isinstance(node.op, MatrixCall):
                    asked.append((1, f"{node.op.function.__name__}()"))
                elif node.op in _DIMENSIONS:
                    asked.append((_DIMENSIONS[node.op], f"{node.op}()"))
            for state in self.present(variant):
                if isinstance(state.like, str) and state.like != "p":
                    least = 2 if state.like in ("rows", "columns") else 1
                    asked.append((least, f"the state {state.name!r} with like={state.like!r}"))
            self._smallest[variant] = max(asked, key=itemgetter(0), default=(0, ""))
        return self._smallest[variant]

    def read_before(self, variant: Variant, pieces: Pieces) -> tuple[str, ...]:
        """The letters of the tensors that are read before the pass that updates, once for each time."""
        formula, scalars = self.trace(variant, pieces)
        return tuple(letter for level in cut(formula, scalars, self.domains()).levels for letter in level.reads)

    def chooses(self, key: str) -> bool:
        """Whether the truth of a hyperparameter chooses the form of the rule or the back end."""
        return key in self.flags or key in ENGINE_KEYS or any(state.when == key for state in self.states.values())

    def domains(self) -> dict[str, Domain]:
        """What p, g and the states have a value for, by letter."""
        return {"p": Domain.ELEMENTS, "g": Domain.ELEMENTS} | {
            n: Domain.MATRIX if callable(s.like) else _DOMAINS[s.like] for n, s in self.states.items()
        }

    def numbers_of(self, key: str, value: Any) -> list[float]:
        """A numeric hyperparameter as float64 numbers: all of a tuple. NaN for None, and for what is on a device."""
        if key not in self.lengths:
            return [_known(value)]
        check_length(self.owner, key, value, self.lengths[key])
        return [_known(v) for v in value]

    def numbers(self, group: Mapping[str, Any]) -> list[float]:
        """A group's numeric hyperparameters, and what the engine needs of it, as one row of float64."""
        row = [n for key in self.numeric for n in self.numbers_of(key, group[key])]
        return [*row, -1.0 if group.get("maximize") else 1.0, float(self.is_decoupled(group))]

    def unpack(self, columns: Any) -> dict[str, Any]:
        """Name -> value of what `numbers` packed, from columns (one row or many)."""
        values: dict[str, Any] = {
            key: tuple(columns[place]) if key in self.lengths else columns[place.start]
            for key, place in self.columns.items()
        }
        return values | {"gain": columns[-2], "decoupled": columns[-1]}

    def finish(
        self, hyper: Mapping[str, Any], kept: Mapping[str, Any], gain: Any = 1.0, needed: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """All scalars of a step by name: the rule's own, the pieces', and the new scalar states.

        Args:
            hyper: what `unpack` returned (floats, float64 arrays with one element per row, or tensors).
            kept: the scalar states before the step, "first" where the plan marks it, and what `given` returned.
            gain: what the gradient is multiplied by, beside the sign.
            needed: the scalars that the formula reads.

        Raises:
            TypeError: one of them is nowhere.
        """
        values = dict(hyper) | dict(kept)
        if self.has_step:
            values["step"] = values["step"] + 1
            values["first"] = values["step"] == 1
        result = values | dict(self.scalars(**{name: values[name] for name in self._scalar_arguments}))
        result |= {letter: values[name] for letter, name in self.number_states.items()}
        weight_decay, decoupled = values.get("weight_decay", 0.0), values["decoupled"]
        if "decay" not in result:  # a rule may say that a step does not decay
            result["decay"] = 1 - values["lr"] * weight_decay * decoupled if "lr" in values else 1.0
        if self.decay is not None:  # else it is the rule's own
            result["weight_decay"] = weight_decay * (1 - decoupled)
        result["gain"] = values["gain"] * gain
        if (options := self.options) is not None:
            if options.clip_value is not None:
                result["clip_value"] = options.clip_value
            if options.ema_decay is not None:
                warm = (1 + values["step"]) / (10 + values["step"])
                decay = minimum(warm, options.ema_decay) if options.ema_warmup else options.ema_decay
                result["ema_weight"] = where(values["first"], 1.0, 1 - decay)
        for name in needed:
            if name not in result:
                raise TypeError(
                    f"{self.owner}.rule takes {name!r}, which is no state, no hyperparameter, and none of what its "
                    "scalars return"
                )
        return result

    def pieces(self, hyper: Mapping[str, Any], gain: float = 1.0) -> Pieces:
        """The pieces that these hyperparameters call for, of one tensor or of many."""
        weight_decay = _array(hyper.get("weight_decay", 0.0))
        used = (weight_decay != 0) if self.decay is not None else np.zeros_like(weight_decay, bool)
        decoupled = _array(hyper["decoupled"]) != 0
        options = self.options
        clips = options is not None and options.max_norm is not None
        return Pieces(
            gain=clips or bool(np.any(_array(hyper["gain"]) * gain != 1)),
            clip_value=options is not None and options.clip_value is not None,
            l2=bool(np.any(used & ~decoupled)),
            l2_everywhere=bool(np.all(used & ~decoupled & (weight_decay == weight_decay))),
            decay=bool(np.any(used & decoupled)),
            cautious=options is not None and options.cautious,
            cautious_decay=options is not None and options.cautious_decay and bool(np.any(used & decoupled)),
            ema=options is not None and options.ema_decay is not None,
        )


def _value(choice: Any) -> Any:
    """A choice as something that can be compared and hashed: a loaded checkpoint may hold a list."""
    if isinstance(choice, np.generic):
        return choice.item()
    return tuple(map(_value, choice)) if isinstance(choice, (list, tuple)) else choice


def _known(value: Any) -> float:
    """A number that can be read without waiting for a device."""
    unknown = value is None or (isinstance(value, torch.Tensor) and value.device.type != "cpu")
    return np.nan if unknown else number(value)


def _array(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(number(value) if isinstance(value, torch.Tensor) else value)
