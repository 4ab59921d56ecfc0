"""From a name such as `AdamW` or `torch:AdamW` to an optimizer and the learning rates to try it at."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from schuss import bounds
from schuss.lab.recipes import ARGUMENTS, RECIPES
from schuss.lookup import named
from schuss.wrappers.outer import _chain, _needs_closure
from schuss.wrappers.sam import SAM

DEFAULT_NAMES = ("torch:AdamW", "SGD", "Adam", "AdamW", "RAdam", "NAdam", "ADOPT", "Lion")

CENTRES: Mapping[str, float] = {
    "SGD": 0.1, "Adagrad": 0.03, "Adadelta": 1.0, "RMSprop": 0.003, "Adam": 0.01, "AMSGrad": 0.01, "AdamW": 0.01,
    "NAdam": 0.01, "RAdam": 0.1, "Adamax": 0.01, "ASGD": 0.3, "Rprop": 0.001, "ADOPT": 0.01, "Lion": 0.01,
    "NAdamW": 0.01, "AdaBelief": 0.01, "Adan": 0.01, "AdEMAMix": 0.01, "LaProp": 0.01, "Signum": 0.003,
    "ScheduleFreeSGD": 1.0, "ScheduleFreeAdamW": 0.01, "ScheduleFreeRAdam": 0.03, "LARS": 3.0, "LAMB": 0.03,
    "StableAdamW": 0.01, "MARS": 0.01, "Prodigy": 0.3, "Adafactor": 0.1, "SOAP": 0.01, "Shampoo": 0.01,
    "Muon+AdamW": 0.01, "NorMuon+AdamW": 0.01, "Lookahead+AdamW": 0.01, "Cautious+AdamW": 0.01, "SparseAdam": 0.03,
}  # fmt: skip
"""The best learning rate on digits and two small networks more, to the next 1 or 3; elsewhere it is another one."""


@dataclass(frozen=True)
class Candidate:
    """An optimizer with the arguments it is built with and the learning rates it is tried at.

    Args:
        name: in tables.
        build: `build(parameters, lr=..., **arguments)`, or `build(model, lr=..., **arguments)` if its first parameter
            is called `model`.
        lrs: learning rates, rising.
        arguments: the same in every run.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    lrs: tuple[float, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def built(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Build the optimizer for a model.

        Raises:
            TypeError: what was built is no optimizer.
        """
        # A list, for a function of somebody's may go through them twice.
        made: object = self.build(model if self._takes_model else [*model.parameters()], lr=lr, **self.arguments)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"{self.name} must build a torch.optim.Optimizer, got {type(made).__name__}")
        return made

    def for_model(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Build the optimizer for a model that is trained a gradient a step.

        Raises:
            TypeError: what was built is no optimizer, or one that needs a closure.
        """
        made = self.built(model, lr)
        several = next((one for one in _chain(made) if isinstance(one, SAM)), None) or _needs_closure(made)
        if several is not None:
            raise TypeError(
                f"{type(several).__name__} needs a closure, for it evaluates the loss several times in a step: its "
                "budget would not be that of the others"
            )
        return made

    @property
    def _takes_model(self) -> bool:
        return next(iter(_parameters(self.build)), None) == "model"


def candidates(
    optimizers: Sequence[str | Candidate | Callable[..., torch.optim.Optimizer]], lrs: Sequence[float] | None = None
) -> list[Candidate]:
    """Look up optimizers: `AdamW` is schuss's, `torch:AdamW` torch's, `module:Class` anybody's, `AMSGrad` a recipe.

    Args:
        optimizers: at least one; names, classes or functions (see `Candidate.build`), and candidates as they are. A
            repeated one counts once.
        lrs: learning rates in (0, inf) for all of them, instead of each one's own grid.

    Raises:
        ValueError: for an unknown name, an lr out of range, none where there is no default, two optimizers of one
            name, or an empty list.
    """
    if not optimizers:
        raise ValueError("at least one optimizer is needed")
    grid = None if lrs is None else _grid(lrs)
    known = dict(_known())
    found: dict[str, Candidate] = {}
    for one in optimizers:
        made = _candidate(one, known, grid)
        if found.setdefault(made.name, made) != made:
            raise ValueError(f"two optimizers are called {made.name!r}: give one of them another name, as a Candidate")
    return list(found.values())


def _grid(lrs: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(lrs, Iterable):
        raise ValueError(f"lrs must be several learning rates, got {lrs!r}")
    if not lrs:
        raise ValueError("at least one learning rate is needed")
    for lr in lrs:
        if not isinstance(lr, (int, float)):
            raise ValueError(f"lr must be a number in (0, inf), got {lr!r}")
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be in (0, inf), got {lr:g}")
    return tuple(sorted(set(map(float, lrs))))


def _candidate(
    one: str | Candidate | Callable[..., torch.optim.Optimizer],
    known: Mapping[str, Callable[..., torch.optim.Optimizer]],
    grid: tuple[float, ...] | None,
) -> Candidate:
    if isinstance(one, Candidate):
        return replace(one, lrs=_grid(one.lrs) if grid is None else grid)
    if isinstance(one, str):
        name, build = one, _found(one, known)
    else:
        known_as = [name for name, cls in known.items() if cls is one]
        name, build = known_as[0] if known_as else getattr(one, "__name__", type(one).__name__), one
    base = name.removeprefix("torch:")
    if grid is None:
        grid = around(CENTRES[base] if base in CENTRES else _default(name, build))
    return Candidate(name, build, grid, ARGUMENTS.get(base, {}))


def _found(name: str, known: Mapping[str, Any]) -> Any:
    if name in known:
        return known[name]
    module, colon, _ = name.partition(":")
    if not colon or module == "torch":
        raise ValueError(f"unknown optimizer {name!r}: {bounds.nearest(name, known)}")
    build = named(name)
    if not callable(build):
        raise ValueError(f"{name} must be an optimizer's class or a function, got {type(build).__name__}")
    return build


def around(centre: float, count: Literal[1, 3, 5] = 3) -> tuple[float, ...]:
    """So many learning rates, about a factor of three apart. Everyone gets as many: none is to win by its budget."""
    factors = (0.1, 1 / 3, 1, 3, 10)[(5 - count) // 2 : (5 + count) // 2]
    return tuple(float(f"{centre * factor:.1g}") for factor in factors)


def _default(name: str, build: Callable[..., Any]) -> float:
    lr = getattr(_parameters(build).get("lr"), "default", None)
    try:
        default = bounds.number(lr)
        if not (default > 0 and math.isfinite(default)):
            raise ValueError
    except (TypeError, ValueError):  # none, or none that is a number
        raise ValueError(
            f"{name} has no default learning rate: give its lr one, or some for all, as in --lrs 0.001,0.003,0.01"
        ) from None
    return default


def _parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(build).parameters
    except (TypeError, ValueError):  # written in C
        return {}


def _known() -> Iterator[tuple[str, Callable[..., Any]]]:
    from schuss import optim

    yield from _optimizers(optim, "")
    yield from _optimizers(torch.optim, "torch:")
    yield from RECIPES.items()


def _optimizers(module: ModuleType, prefix: str) -> Iterator[tuple[str, type]]:
    for name in dir(module):
        member = getattr(module, name)
        public = not name.startswith("_") and name != "Optimizer"
        if public and isinstance(member, type) and issubclass(member, torch.optim.Optimizer):
            yield prefix + name, member
