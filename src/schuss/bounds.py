"""Hyperparameters with their bounds as data, and the one form of error message about them."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any

import torch

_INTERVAL = re.compile(r"([\[(])\s*([^,\s]+)\s*,\s*([^,\s\])]+)\s*([\])])")
_COUNTS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Interval:
    """An interval of numbers, as one writes it: `Interval.parse("[0, 1)")`."""

    low: float
    high: float
    closed_low: bool
    closed_high: bool
    text: str

    @staticmethod
    def parse(text: str) -> "Interval":
        """Read "[0, 1)", "(0, inf)" and their like."""
        if (match := _INTERVAL.fullmatch(text.strip())) is None:
            raise ValueError(f"not an interval such as '[0, 1)': {text!r}")
        opening, low, high, closing = match.groups()
        return Interval(float(low), float(high), opening == "[", closing == "]", text)

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.closed_low else value > self.low
        below = value <= self.high if self.closed_high else value < self.high
        return bool(above and below and (abs(value) != inf or (self.closed_high and value == inf)))


def number(value: Any) -> float:
    """The value of a number or of a one-element tensor."""
    return float(value.item() if isinstance(value, torch.Tensor) else value)


def check(owner: str, name: str, value: Any, bound: str | tuple[str, ...]) -> None:
    """Raise unless `value`, or each element of it, lies in `bound`.

    Args:
        owner: the class that the message names.
        name: the argument that the message names.
        value: a number, a tensor of one element, or a tuple of them.
        bound: an interval, or a tuple of one for each element; "None or ..." admits None.

    Raises:
        TypeError: it is not a number.
        ValueError: it lies outside, or is not a tuple of as many numbers as there are intervals.
    """
    if isinstance(bound, tuple):
        check_length(owner, name, value, len(bound))
        for i, (item, its_bound) in enumerate(zip(value, bound, strict=True)):
            check(owner, f"{name}[{i}]", item, its_bound)
        return
    optional = bound.startswith("None or ")
    interval = Interval.parse(bound.removeprefix("None or "))
    if value is None and optional:
        return
    allowed = f"None or in {interval.text}" if optional else f"in {interval.text}"
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{owner}: Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{owner}: {name} must be {allowed.replace('in ', 'a number in ')}, got {value!r} ({type(value).__name__})"
        )
    if number(value) not in interval:
        raise ValueError(f"{owner}: {name} must be {allowed}, got {value!r}")


def check_length(owner: str, name: str, value: Any, count: int) -> None:
    """Raise ValueError unless `value` is a tuple, or list, of `count` elements."""
    if not isinstance(value, (tuple, list)) or len(value) != count:
        raise ValueError(f"{owner}: {name} must be {_COUNTS.get(count, count)} numbers, got {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Help with an unknown name: the nearest known one, whatever its case, or all of them."""
    lowercase = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lowercase, 1)
    return f"did you mean {lowercase[close[0]]!r}?" if close else f"choose from {', '.join(lowercase.values())}"
