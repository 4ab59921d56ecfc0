"""From a name such as `AdamW` or `torch:AdamW` to an optimizer and the learning rates to try it at."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from schuss.bounds import nearest

DEFAULT_NAMES = ("torch:AdamW", "SGD", "Adam", "AdamW", "RAdam", "NAdam", "ADOPT", "Lion")

# Plain SGD is hardly ever what one means by SGD on a neural network.
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"SGD": {"momentum": 0.9, "nesterov": True}}

# About a factor of three apart, with the best on digits in the middle. A class that is not listed gets its default lr
# and two neighbours: everyone gets three, so that nobody wins by a larger budget.
GRIDS: Mapping[str, tuple[float, ...]] = {
    "SGD": (0.03, 0.1, 0.3),
    "Adam": (0.003, 0.01, 0.03),
    "AdamW": (0.003, 0.01, 0.03),
    "NAdam": (0.003, 0.01, 0.03),
    "RAdam": (0.03, 0.1, 0.3),
    "ADOPT": (0.003, 0.01, 0.03),
    "Lion": (0.003, 0.01, 0.03),
}


@dataclass(frozen=True)
class Candidate:
    """An optimizer with the arguments it is built with and the learning rates it is tried at."""

    name: str
    build: Callable[..., torch.optim.Optimizer]
    lrs: tuple[float, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Build the optimizer for `parameters`."""
        return self.build(parameters, lr=lr, **self.arguments)


def candidates(names: Sequence[str], lrs: Sequence[float] | None = None) -> list[Candidate]:
    """Look up optimizers by name: `AdamW` in `schuss.optim`, `torch:AdamW` in `torch.optim`.

    Args:
        names: at least one name; a repeated one counts once.
        lrs: learning rates in (0, inf) for all of them, instead of each one's own grid.

    Raises:
        ValueError: for an unknown name, an lr out of range, or an empty list.
    """
    if not names:
        raise ValueError("at least one optimizer is needed")
    if lrs is not None and not lrs:
        raise ValueError("at least one learning rate is needed")
    for lr in lrs or ():
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be in (0, inf), got {lr:g}")
    known = dict(_known())
    return [_candidate(name, known, lrs) for name in dict.fromkeys(names)]


def _candidate(name: str, known: Mapping[str, type], lrs: Sequence[float] | None) -> Candidate:
    if name not in known:
        raise ValueError(f"unknown optimizer {name!r}: {nearest(name, known)}")
    cls, base = known[name], name.removeprefix("torch:")
    grid = tuple(sorted(set(lrs))) if lrs else GRIDS.get(base) or _around_default(cls)
    return Candidate(name, cls, grid, ARGUMENTS.get(base, {}))


def _around_default(cls: type) -> tuple[float, ...]:
    lr = inspect.signature(cls).parameters["lr"].default
    return tuple(float(f"{lr * factor:.1g}") for factor in (1 / 3, 1, 3))


def _known() -> Iterator[tuple[str, type]]:
    from schuss import optim

    yield from _optimizers(optim, "")
    yield from _optimizers(torch.optim, "torch:")


def _optimizers(module: ModuleType, prefix: str) -> Iterator[tuple[str, type]]:
    for name in dir(module):
        member = getattr(module, name)
        public = not name.startswith("_") and name != "Optimizer"
        if public and isinstance(member, type) and issubclass(member, torch.optim.Optimizer):
            yield prefix + name, member
