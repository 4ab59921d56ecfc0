"""The elementary schedules."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from schuss.bounds import check, number
from schuss.schedules.function import Function, Shape, check_shape

ANY = "(-inf, inf)"
NOT_NEGATIVE = "[0, inf)"
HORIZON = "[1, inf)"


@dataclass(frozen=True, repr=False)
class constant(Function):
    """The same value at every step: f(t) = value.

    Args:
        value: in (-inf, inf).

    Raises:
        ValueError: an argument out of its bounds.
    """

    value: float = 1.0

    bounds: ClassVar = {"value": ANY}

    def at(self, t: float) -> float:
        return self.value


@dataclass(frozen=True, repr=False)
class Fall(Function):
    """From one value to another: f(t) = start w + end (1 - w), where w goes from 1 to 0 in `steps` steps."""

    steps: float
    start: float = 1.0
    end: float = 0.0

    bounds: ClassVar = {"steps": HORIZON, "start": ANY, "end": ANY}

    def at(self, t: float) -> float:
        w = self.weight(min(t, self.steps))
        return self.start * w + self.end * (1 - w)

    def weight(self, t: float) -> float:
        """w, for t in [0, steps]."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class linear(Fall):
    """A straight line: w = 1 - t / steps.

    The last of `steps` steps is t = steps - 1; `end` is reached at t = steps and kept.

    Args:
        steps: length, in [1, inf).
        start: value at step 0, in (-inf, inf).
        end: value from step `steps` on, in (-inf, inf).

    Raises:
        ValueError: an argument out of its bounds.
    """

    def weight(self, t: float) -> float:
        return (self.steps - t) / self.steps


@dataclass(frozen=True, repr=False)
class cosine(Fall):
    """Half a cosine: w = (1 + cos(π t / steps)) / 2.

    Args:
        steps: length, in [1, inf).
        start: value at step 0, in (-inf, inf).
        end: value from step `steps` on, in (-inf, inf).

    Raises:
        ValueError: an argument out of its bounds.

    Source: Loshchilov, Hutter 2016, arXiv:1608.03983.
    """

    def weight(self, t: float) -> float:
        return (1 + math.cos(math.pi * t / self.steps)) / 2


@dataclass(frozen=True, repr=False)
class one_minus_sqrt(Fall):
    """Steep first, then flatter: w = 1 - sqrt(t / steps). A cooldown.

    Args:
        steps: length, in [1, inf).
        start: value at step 0, in (-inf, inf).
        end: value from step `steps` on, in (-inf, inf).

    Raises:
        ValueError: an argument out of its bounds.

    Source: Hägele et al. 2024, arXiv:2405.18392.
    """

    def weight(self, t: float) -> float:
        return 1 - math.sqrt(t / self.steps)


@dataclass(frozen=True, repr=False)
class polynomial(Fall):
    """A power of a straight line: w = (1 - t / steps)^power.

    Args:
        steps: length, in [1, inf).
        start: value at step 0, in (-inf, inf).
        end: value from step `steps` on, in (-inf, inf).
        power: in (0, inf); 1 is `linear`.

    Raises:
        ValueError: an argument out of its bounds.
    """

    power: float = 1.0

    bounds: ClassVar = {**Fall.bounds, "power": "(0, inf)"}

    def weight(self, t: float) -> float:
        return float(((self.steps - t) / self.steps) ** self.power)


@dataclass(frozen=True, repr=False)
class exponential(Function):
    """The same factor at each step: f(t) = gamma^t.

    Args:
        gamma: in [0, inf).

    Raises:
        ValueError: an argument out of its bounds.
    """

    gamma: float

    bounds: ClassVar = {"gamma": NOT_NEGATIVE}

    def at(self, t: float) -> float:
        return float(self.gamma**t)


@dataclass(frozen=True, repr=False)
class step(Function):
    """The same factor every so many steps: f(t) = gamma^floor(t / every).

    Args:
        every: length of a stair in steps, in [1, inf).
        gamma: in [0, inf).

    Raises:
        ValueError: an argument out of its bounds.
    """

    every: float
    gamma: float = 0.1

    bounds: ClassVar = {"every": HORIZON, "gamma": NOT_NEGATIVE}

    def at(self, t: float) -> float:
        return float(self.gamma ** (t // self.every))


@dataclass(frozen=True, repr=False)
class multi_step(Function):
    """A factor at each milestone: f(t) = gamma^(number of milestones that are at most t).

    Args:
        milestones: steps in [0, inf), none before the one it follows; a repeated one counts twice.
        gamma: in [0, inf).

    Raises:
        ValueError: an argument out of its bounds, or milestones out of order.
    """

    milestones: Sequence[float]
    gamma: float = 0.1

    bounds: ClassVar = {"gamma": NOT_NEGATIVE}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "milestones", checked_milestones("multi_step", self.milestones))

    def at(self, t: float) -> float:
        return float(self.gamma ** bisect_right(self.milestones, t))


@dataclass(frozen=True, repr=False)
class inverse_sqrt(Function):
    """The inverse root of the step: f(t) = sqrt(steps / (steps + t)).

    After a warm-up as long, `warmup(inverse_sqrt(n), n)`, it is the schedule of the Transformer, scaled to a peak of 1.

    Args:
        steps: time scale, in [1, inf): the value is halved at t = 3 steps.

    Raises:
        ValueError: an argument out of its bounds.

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    steps: float

    bounds: ClassVar = {"steps": HORIZON}

    def at(self, t: float) -> float:
        return math.sqrt(self.steps / (self.steps + t))


@dataclass(frozen=True, repr=False)
class cosine_restarts(Function):
    """Half a cosine again and again: f(t) = end + (1 - end) (1 + cos(π since / length)) / 2.

    `since` counts from the last restart, and the lengths of the cycles are steps, steps mult, steps mult^2, ...

    Args:
        steps: length of the first cycle, in [1, inf).
        mult: ratio of the lengths of two cycles, in [1, inf).
        end: what each cycle falls to, in (-inf, inf).

    Raises:
        ValueError: an argument out of its bounds.

    Source: Loshchilov, Hutter 2016, arXiv:1608.03983.
    """

    steps: float
    mult: float = 1
    end: float = 0.0

    bounds: ClassVar = {"steps": HORIZON, "mult": "[1, inf)", "end": ANY}

    def position(self, t: float) -> tuple[float, float]:
        """Steps since the last restart, and the length of the cycle. By subtraction: a logarithm misses restarts."""
        since, length = t, self.steps
        if self.mult == 1:
            return since % length, length
        while since >= length:
            since -= length
            length *= self.mult
        return since, length

    def at(self, t: float) -> float:
        since, length = self.position(t)
        w = (1 + math.cos(math.pi * since / length)) / 2
        return w + self.end * (1 - w)


@dataclass(frozen=True, repr=False)
class one_cycle(Function):
    """Up to 1 and down again, once: from `start` at step 0 through the peak to `end` at step steps - 1.

    The peak is at step peak * steps - 1, or at step 0 if that is negative. With three phases the rate comes back to
    `start` in as many steps as it rose, and then falls to `end`. From step steps - 1 on it stays there.

    Args:
        steps: length, in [1, inf).
        peak: fraction of the steps spent rising, in [0, 1].
        start: value at step 0, in [0, inf).
        end: value at the last step, in [0, inf).
        by: shape of the phases, `cosine` or `linear`.
        three_phase: whether there are three phases.

    Raises:
        ValueError: an argument out of its bounds.

    Source: Smith, Topin 2017, arXiv:1708.07120; in two phases: fastai.
    """

    steps: float
    peak: float = 0.3
    start: float = 1 / 25
    end: float = 1 / 25e4
    by: Shape = cosine
    three_phase: bool = False

    bounds: ClassVar = {"steps": HORIZON, "peak": "[0, 1]", "start": NOT_NEGATIVE, "end": NOT_NEGATIVE}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape("one_cycle", self.by, 1)

    @cached_property
    def _fall(self) -> Function:
        return self.by(1)

    def weights(self, t: float) -> tuple[float, float, float]:
        """Shares of start, peak and end in the value at step t. They add up to 1."""
        last = self.steps - 1
        rise = max(self.peak * self.steps - 1, 0)
        ends = (rise, max(2 * self.peak * self.steps - 2, 0), last) if self.three_phase else (rise, last)
        t = min(t, last)
        phase = next((i for i, end in enumerate(ends) if t <= end), len(ends) - 1)
        begin, length = (ends[phase - 1], ends[phase] - ends[phase - 1]) if phase else (0, rise)
        w = self._fall((t - begin) / length) if length > 0 else 0.0
        if phase == 0:
            return w, 1 - w, 0.0
        if len(ends) == 2:
            return 0.0, w, 1 - w
        return (1 - w, w, 0.0) if phase == 1 else (w, 0.0, 1 - w)

    def at(self, t: float) -> float:
        start, peak, end = self.weights(t)
        return start * self.start + peak + end * self.end


@dataclass(frozen=True, repr=False)
class cyclical(Function):
    """Up and down in straight lines, again and again, between `low` and 1.

    f(t) = low + (1 - low) triangle(t) scale(t), where scale is 1 (triangular), 2^-(cycles done) (triangular2) or
    gamma^t (exp_range).

    Args:
        up: steps from low to high, in [1, inf).
        down: steps from high to low, in [0, inf). Default: as many as up.
        low: in (-inf, inf).
        mode: "triangular", "triangular2" or "exp_range".
        gamma: for exp_range, in [0, inf).

    Raises:
        ValueError: an argument out of its bounds.

    Source: Smith 2015, arXiv:1506.01186.
    """

    up: float
    down: float | None = None
    low: float = 0.0
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0

    bounds: ClassVar = {"up": HORIZON, "down": f"None or {NOT_NEGATIVE}", "low": ANY, "gamma": NOT_NEGATIVE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("triangular", "triangular2", "exp_range"):
            raise ValueError(f"cyclical: mode must be triangular, triangular2 or exp_range, got {self.mode!r}")

    def position(self, t: float) -> tuple[float, float]:
        """The triangle in [0, 1], and how many cycles are done."""
        down = self.up if self.down is None else self.down
        cycles, since = divmod(t, self.up + down)
        return since / self.up if since <= self.up else (self.up + down - since) / down, cycles

    def at(self, t: float) -> float:
        triangle, cycles = self.position(t)
        scale = {"triangular": 1.0, "triangular2": 0.5**cycles}.get(self.mode)
        return self.low + (1 - self.low) * triangle * (float(self.gamma**t) if scale is None else scale)


def checked_milestones(owner: str, milestones: Sequence[float], *, apart: bool = False) -> tuple[float, ...]:
    """Milestones as a tuple, or raise: they are steps, in order, no two the same if they must be apart."""
    if not isinstance(milestones, Sequence) or isinstance(milestones, str):
        raise TypeError(f"{owner}: milestones must be a list of steps, got {milestones!r}")
    for i, milestone in enumerate(milestones):
        check(owner, f"milestones[{i}]", milestone, NOT_NEGATIVE)
        if i and (milestone < milestones[i - 1] or (apart and milestone == milestones[i - 1])):
            raise ValueError(f"{owner}: milestones must increase, got {list(milestones)}")
    return tuple(m if type(m) in (int, float) else number(m) for m in milestones)
