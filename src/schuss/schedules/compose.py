"""Schedules made of schedules."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from schuss.bounds import check
from schuss.schedules.curves import ANY, HORIZON, NOT_NEGATIVE, checked_milestones, linear
from schuss.schedules.function import Function, Shape, check_schedule, check_shape


@dataclass(frozen=True, repr=False)
class join(Function):
    """One after the other: f(t) = schedules[i](t - milestones[i - 1]), i being how many milestones are at most t.

    Args:
        schedules: one more than milestones. Each counts its steps from its own milestone.
        milestones: the steps at which the next one takes over, in [0, inf), increasing.

    Raises:
        ValueError: milestones out of order or of another number.
        TypeError: something that is no schedule.
    """

    schedules: Sequence[Function]
    milestones: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", checked_milestones("join", self.milestones, apart=True))
        if not isinstance(self.schedules, Sequence):
            raise TypeError(f"join: schedules must be a list, got {self.schedules!r}")
        object.__setattr__(self, "schedules", tuple(self.schedules))
        for i, schedule in enumerate(self.schedules):
            check_schedule("join", f"schedules[{i}]", schedule)
        if len(self.schedules) != len(self.milestones) + 1:
            raise ValueError(
                f"join: there must be one more schedule than milestones, got {len(self.schedules)} and "
                f"{len(self.milestones)}"
            )

    def at(self, t: float) -> float:
        i = bisect_right(self.milestones, t)
        return self.schedules[i].at(t - self.milestones[i - 1] if i else t)


@dataclass(frozen=True, repr=False)
class scale(Function):
    """A product: f(t) = factor schedule(t).

    Args:
        schedule: a schedule.
        factor: a number in (-inf, inf), or a schedule.

    Raises:
        ValueError: an argument out of its bounds.
        TypeError: something that is no schedule.
    """

    schedule: Function
    factor: float | Function

    def __post_init__(self) -> None:
        check_schedule("scale", "schedule", self.schedule)
        if not isinstance(self.factor, Function):
            check("scale", "factor", self.factor, ANY)

    def at(self, t: float) -> float:
        factor = self.factor.at(t) if isinstance(self.factor, Function) else self.factor
        return factor * self.schedule.at(t)


@dataclass(frozen=True, repr=False)
class warmup(Function):
    """A rise to a schedule's first value s(0), then the schedule: f(t) = s(0) (t + 1) / steps, then s(t - steps).

    The first step is not lost: its factor is 1 / steps, not 0. The schedule begins when the warm-up has ended, so
    `warmup(cosine(900), 100)` takes 1000 steps.

    Args:
        schedule: what follows.
        steps: length of the rise, in [0, inf).
        by: shape of the rise, a fall backwards in time: `linear`, `cosine`, ...

    Raises:
        ValueError: an argument out of its bounds.
        TypeError: something that is no schedule.
    """

    schedule: Function
    steps: float
    by: Shape = linear

    bounds: ClassVar = {"steps": NOT_NEGATIVE}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("warmup", "schedule", self.schedule)
        check_shape("warmup", self.by, max(self.steps, 1))

    @cached_property
    def _fall(self) -> Function:
        return self.by(max(self.steps, 1))

    def at(self, t: float) -> float:
        if t < self.steps:
            return self._fall.at(max(self.steps - t - 1, 0)) * self.schedule.at(0)
        return self.schedule.at(t - self.steps)


@dataclass(frozen=True, repr=False)
class wsd(Function):
    """Warm-up, stable, decay: (t + 1) / warmup, then 1, then down to `end` in the last `cooldown` steps.

    The cooldown begins at step steps - cooldown, where the value is still 1, and would be at `end` at step `steps`: the
    last step that is done, steps - 1, is not lost.

    Args:
        steps: all three together, in [1, inf).
        warmup: steps of the linear rise, in [0, inf).
        cooldown: steps of the fall, in [0, inf).
        end: value from step `steps` on, in (-inf, inf).
        by: shape of the fall: `linear`, `cosine` or `one_minus_sqrt`.

    Raises:
        ValueError: an argument out of its bounds, or more warm-up and cooldown than steps.

    Source: Hu et al. 2024, arXiv:2404.06395; shapes: Hägele et al. 2024, arXiv:2405.18392.
    """

    steps: float
    warmup: float
    cooldown: float
    end: float = 0.0
    by: Shape = linear

    bounds: ClassVar = {"steps": HORIZON, "warmup": NOT_NEGATIVE, "cooldown": NOT_NEGATIVE, "end": ANY}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape("wsd", self.by, max(self.cooldown, 1))
        if self.warmup + self.cooldown > self.steps:
            raise ValueError(
                f"wsd: warmup + cooldown must be in [0, steps], got {self.warmup} + {self.cooldown} of {self.steps}"
            )

    @cached_property
    def _fall(self) -> Function:
        return self.by(max(self.cooldown, 1))

    def at(self, t: float) -> float:
        if t < self.warmup:
            return min(t + 1, self.warmup) / self.warmup
        if t >= self.steps:
            return self.end
        w = self._fall.at(max(t - (self.steps - self.cooldown), 0))
        return w + self.end * (1 - w)


@dataclass(frozen=True, repr=False)
class absolute(Function):
    """A schedule of values: `schuss.Schedule` takes them as they are, not as factors of the initial value.

    Args:
        schedule: a schedule.

    Raises:
        TypeError: something that is no schedule.
    """

    schedule: Function

    def __post_init__(self) -> None:
        check_schedule("absolute", "schedule", self.schedule)

    def at(self, t: float) -> float:
        return self.schedule.at(t)
