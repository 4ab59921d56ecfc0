"""What a schedule is: a pure function of the step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from schuss.bounds import check, number


@dataclass(frozen=True, repr=False)
class Function(ABC):
    """A schedule: called with a step, 0 being the first, it returns a factor, or a value, in float64.

    Schedules have no state. They compare and hash by their arguments, can be pickled, and print as what made them. A
    new one is a frozen dataclass with a method `at`::

        @dataclass(frozen=True, repr=False)
        class halving(Function):
            steps: float
            bounds: ClassVar = {"steps": "[1, inf)"}

            def at(self, t: float) -> float:
                return 0.5 ** (t / self.steps)

    Args:
        step: how many steps are done, in [0, inf), fractions allowed; an array gives an array.

    Raises:
        ValueError: a negative step, or an argument out of its bounds.
    """

    bounds: ClassVar[Mapping[str, str]] = {}
    """Argument -> interval, as in `schuss.Optimizer`."""

    def __post_init__(self) -> None:
        for name, bound in self.bounds.items():
            value = getattr(self, name)
            check(type(self).__name__, name, value, bound)
            if value is not None and type(value) not in (int, float):  # of NumPy or torch
                object.__setattr__(self, name, number(value))

    @abstractmethod
    def at(self, t: float) -> float:
        """The value at step t, which is not negative."""

    @overload
    def __call__(self, step: float) -> float: ...

    @overload
    def __call__(self, step: NDArray[Any]) -> NDArray[np.float64]: ...

    def __call__(self, step: float | NDArray[Any]) -> float | NDArray[np.float64]:
        if isinstance(step, np.ndarray):
            return np.array([self(t) for t in step.ravel().tolist()], dtype=np.float64).reshape(step.shape)
        if not step >= 0:
            raise ValueError(f"{type(self).__name__}: step must be in [0, inf), got {step!r}")
        return float(self.at(step))

    def __repr__(self) -> str:
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING:
                words.append(written(value))
            elif value != field.default:
                words.append(f"{field.name}={written(value)}")
        return f"{type(self).__name__}({', '.join(words)})"


Shape = Callable[[float], Function]
"""Makes, from a number of steps, a schedule that falls from 1 to 0 over them: `linear`, `cosine`, `one_minus_sqrt`."""


def written(value: object) -> str:
    """An argument as one would type it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(written, value))}]"
    return getattr(value, "__name__", None) or repr(value)


def check_schedule(owner: str, name: str, value: object) -> None:
    """Raise unless `value` is a schedule."""
    if not isinstance(value, Function):
        hint = "; it needs its arguments" if isinstance(value, type) and issubclass(value, Function) else ""
        raise TypeError(f"{owner}: {name} must be a schedule, got {written(value)} ({type(value).__name__}){hint}")


def check_shape(owner: str, by: Shape, steps: float) -> Function:
    """The fall of shape `by`, or raise."""
    fall = by(steps) if callable(by) else None
    if not isinstance(fall, Function) or abs(fall(0) - 1) > 1e-9 or abs(fall(steps)) > 1e-9:
        raise ValueError(
            f"{owner}: by must make a schedule that falls from 1 to 0 over its steps, as linear, cosine and "
            f"one_minus_sqrt do, got {written(by)}"
        )
    return fall
