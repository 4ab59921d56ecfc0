"""torch.optim.lr_scheduler, name for name, on the functions of `schuss.schedules`.

Each class is a subclass of its namesake: same constructor, attributes and state_dict, and `isinstance` holds. What
changes is how a learning rate is computed: from the step, in closed form, not from the one before. What is right here
and wrong in torch is listed in docs/schedules.md.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as theirs
from torch.optim.lr_scheduler import LRScheduler as LRScheduler

from schuss import schedules
from schuss.bounds import nearest
from schuss.schedules import Function
from schuss.schedules.drive import unshare

__all__ = [
    "ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR",
    "LRScheduler", "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR", "OneCycleLR", "PolynomialLR",
    "ReduceLROnPlateau", "SequentialLR", "StepLR",
]  # fmt: skip

Rate = float | Tensor


def __getattr__(name: str) -> Any:
    """What else torch's module has."""
    if hasattr(theirs, name):
        return getattr(theirs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {nearest(name, __all__)}")


class Closed(LRScheduler):
    """A scheduler whose learning rate is low + (base - low) f(step), with a function f of `schuss.schedules`."""

    chains = True
    """Whether a change of the learning rate by somebody else is kept: it is moved by the ratio of f then."""

    def function(self) -> Function:
        """What the attributes say; they may change."""
        raise NotImplementedError

    def factors(self, step: int) -> Sequence[float]:
        """f(step) for each group."""
        return [self.function()(step)] * len(self.optimizer.param_groups)

    def get_lr(self) -> list[Rate]:
        """The learning rates of this step."""
        theirs._warn_get_lr_called_within_step(self)
        if self._is_initial:
            unshare(self.optimizer.param_groups, "lr")
        resumes = self._is_initial and self.last_epoch > 0
        return self.rates(after=None if resumes or not self.chains else self.last_epoch - 1)

    def _get_closed_form_lr(self) -> list[Rate]:
        return self.rates(after=None)

    def rates(self, *, after: int | None) -> list[Rate]:
        """The learning rates of this step, given those of step `after` (-1: none yet), or whatever they are (None)."""
        groups, known = self.optimizer.param_groups, self.grow()
        low, now = getattr(self, "eta_min", 0.0), self.factors(self.last_epoch)
        if after is None:
            return [low + (base - low) * f for base, f, _ in zip(self.base_lrs, now, groups, strict=False)]
        before = self.factors(after) if after >= 0 else [1.0] * len(groups)
        return [
            _moved(group["lr"], base, low, before[i] if i < known else 1.0, now[i])
            for i, (group, base) in enumerate(zip(groups, self.base_lrs, strict=False))
        ]

    def grow(self) -> int:
        """Take in groups that were added after the scheduler, and tell how many there were before."""
        known = len(self.base_lrs)
        if len(self.optimizer.param_groups) > known:
            unshare(self.optimizer.param_groups, "lr")
        self.base_lrs = [*self.base_lrs, *map(self.adopt, self.optimizer.param_groups[known:])]
        return known

    def adopt(self, group: dict[str, Any]) -> Rate:
        """The base of a new group."""
        return cast(Rate, _initial(group))

    def seek(self, step: int) -> None:
        """Go to a step, from groups that have their initial learning rates."""
        self.last_epoch, self._step_count = step, 1
        with theirs._enable_get_lr_call(self):
            values = self.rates(after=-1 if self.chains else None)
        _write(self, values)

    def made(self, kind: Callable[..., Function], *args: Hashable, **named: Hashable) -> Function:
        """A schedule; its complaints name this class too."""
        try:
            return _made(kind, *args, **named)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{type(self).__name__}: {error}") from None


class Lambdas(Closed):
    """A scheduler with a function for each group."""

    lr_lambdas: list[Callable[[int], float]]

    def adopt(self, group: dict[str, Any]) -> Rate:
        self.lr_lambdas = [*self.lr_lambdas, _common(self, "lr_lambda", self.lr_lambdas)]
        return super().adopt(group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, which saves the attributes of callable objects; schedules have nothing to save."""
        state = super().state_dict()
        pairs = zip(state["lr_lambdas"], self.lr_lambdas, strict=True)
        return state | {"lr_lambdas": [None if isinstance(f, Function) else saved for saved, f in pairs]}


class LambdaLR(Lambdas, theirs.LambdaLR):
    """Initial learning rate × lr_lambda(step); a schedule is an lr_lambda."""

    chains = False

    def factors(self, step: int) -> Sequence[float]:
        return [f(step) for f in self.lr_lambdas]


class MultiplicativeLR(Lambdas, theirs.MultiplicativeLR):
    """Learning rate × lr_lambda(step) at each step from 1 on."""

    def factors(self, step: int) -> Sequence[float]:
        return [math.prod(map(f, range(1, step + 1))) for f in self.lr_lambdas]

    def rates(self, *, after: int | None) -> list[Rate]:
        groups, known = self.optimizer.param_groups, len(self.base_lrs)
        if after is None or after < 0 or len(groups) > known:
            return super().rates(after=after)
        return [group["lr"] * f(self.last_epoch) for group, f in zip(groups, self.lr_lambdas, strict=False)]


class StepLR(Closed, theirs.StepLR):
    """× gamma every step_size steps."""

    def function(self) -> Function:
        return self.made(schedules.step, self.step_size, self.gamma)


class MultiStepLR(Closed, theirs.MultiStepLR):
    """× gamma at each milestone."""

    def function(self) -> Function:
        return self.made(schedules.multi_step, tuple(sorted(self.milestones.elements())), self.gamma)


class ConstantLR(Closed, theirs.ConstantLR):
    """× factor for total_iters steps."""

    def function(self) -> Function:
        return self.made(_held, self.factor, self.total_iters)


class LinearLR(Closed, theirs.LinearLR):
    """× a factor that goes from start_factor to end_factor in total_iters steps."""

    def function(self) -> Function:
        if self.total_iters == 0:
            return self.made(schedules.constant, self.end_factor)
        return self.made(schedules.linear, self.total_iters, self.start_factor, self.end_factor)


class ExponentialLR(Closed, theirs.ExponentialLR):
    """× gamma at each step."""

    def function(self) -> Function:
        return self.made(schedules.exponential, self.gamma)


class PolynomialLR(Closed, theirs.PolynomialLR):
    """× (1 - step / total_iters)^power, down to 0."""

    def function(self) -> Function:
        return self.made(schedules.polynomial, self.total_iters, power=self.power)


class CosineAnnealingLR(Closed, theirs.CosineAnnealingLR):
    """Half a cosine down to eta_min in T_max steps, and up again in the next T_max, as torch's does."""

    def factors(self, step: int) -> Sequence[float]:
        folded = self.T_max - abs(step % (2 * self.T_max) - self.T_max) if self.T_max else step
        return [self.made(schedules.cosine, self.T_max)(folded)] * len(self.optimizer.param_groups)


class CosineAnnealingWarmRestarts(Closed, theirs.CosineAnnealingWarmRestarts):
    """Half a cosine down to eta_min, again and again, in T_0, T_0 T_mult, T_0 T_mult^2, ... steps."""

    chains = False

    def factors(self, step: int) -> Sequence[float]:
        return [self.made(schedules.cosine, self.T_i)(self.T_cur)] * len(self.optimizer.param_groups)

    def step(self, epoch: float | None = None) -> None:
        """Go to the next step, or to `epoch`, which may be a fraction."""
        self._move(max(self.last_epoch + 1, 0) if epoch is None else epoch)

    def seek(self, step: int) -> None:
        self._move(step)

    def _move(self, epoch: float) -> None:
        if epoch < 0:
            raise ValueError(f"{type(self).__name__}: epoch must be in [0, inf), got {epoch}")
        self.T_cur, self.T_i = cast(Any, schedules.cosine_restarts(self.T_0, self.T_mult).position(epoch))
        self.last_epoch = math.floor(epoch)
        with theirs._enable_get_lr_call(self):
            values = self.rates(after=None)
        _write(self, values)


class CyclicLR(Closed, theirs.CyclicLR):
    """From base_lr to max_lr and back, again and again; the momentum goes the other way."""

    chains = False

    def rates(self, *, after: int | None) -> list[Rate]:
        self.grow()
        groups, up = self.optimizer.param_groups, round(self.total_size * self.step_ratio, 9)
        curve = cast(schedules.cyclical, self.made(schedules.cyclical, up, self.total_size - up))
        triangle, cycles = curve.position(self.last_epoch)
        w = triangle * self.scale_fn(int(1 + cycles) if self.scale_mode == "cycle" else self.last_epoch)
        if self.cycle_momentum:
            for group, base, high in zip(groups, self.base_momentums, self.max_momentums, strict=False):
                _set_momentum(group, high - (high - base) * w, is_beta=self.use_beta1)
        # torch sets base_lrs after the first step; until then they are those of a scheduler made before.
        lows = _lrs(self.optimizer) if self._is_initial and self.last_epoch == 0 else self.base_lrs
        return [low + (high - low) * w for _, low, high in zip(groups, lows, self.max_lrs, strict=False)]

    def adopt(self, group: dict[str, Any]) -> Rate:
        bounds = ["max_lr", *(["base_momentum", "max_momentum"] if self.cycle_momentum else [])]
        for name in bounds:
            values = getattr(self, f"{name}s")
            setattr(self, f"{name}s", [*values, group[name] if name in group else _common(self, name, values)])
        base = group["base_lr"] if "base_lr" in group else _common(self, "base_lr", self.base_lrs)
        group.setdefault("initial_lr", _copy(base))
        return cast(Rate, _copy(base))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which takes something out of the dict it is given."""
        super().load_state_dict(dict(state_dict))


class OneCycleLR(Closed, theirs.OneCycleLR):
    """Up to max_lr and down to next to nothing, once; the momentum goes the other way."""

    chains = False

    def rates(self, *, after: int | None) -> list[Rate]:
        self.grow()
        groups = self.optimizer.param_groups
        first = float(self._schedule_phases[0]["end_step"])
        by = {"cos": schedules.cosine, "linear": schedules.linear}[self._anneal_func_type]
        curve = self.made(
            schedules.one_cycle, self.total_steps, min((first + 1) / self.total_steps, 1.0), by=by,
            three_phase=len(self._schedule_phases) == 3,
        )  # fmt: skip
        start, peak, end = cast(schedules.one_cycle, curve).weights(self.last_epoch)
        if self.cycle_momentum:
            for group in groups:
                m = (start + end) * group["max_momentum"] + peak * group["base_momentum"]
                _set_momentum(group, m, is_beta=self.use_beta1)
        return [start * g["initial_lr"] + peak * g["max_lr"] + end * g["min_lr"] for g in groups]

    def adopt(self, group: dict[str, Any]) -> Rate:
        known = self.optimizer.param_groups[: len(self.base_lrs)]
        names = ["max_lr", *(["base_momentum", "max_momentum"] if self.cycle_momentum else [])]
        for name in names:
            if name not in group:
                group[name] = _copy(_common(self, name, [other[name] for other in known]))
        first = known[0]
        group["initial_lr"] = group["max_lr"] * (first["initial_lr"] / first["max_lr"])
        group["min_lr"] = group["max_lr"] * (first["min_lr"] / first["max_lr"])
        return cast(Rate, _copy(group["initial_lr"]))


class ReduceLROnPlateau(theirs.ReduceLROnPlateau):
    """× factor when a metric has not improved for a while; right for negative metrics too."""

    def _is_better(self, a: float, best: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        if self.threshold_mode == "abs":
            bar = best + sign * self.threshold
        else:  # a part of the size of the best, on its better side
            bar = best * (1 + self.threshold if (sign > 0) == (best >= 0) else 1 - self.threshold)
        return bool(a * sign > bar * sign)


class SequentialLR(theirs.SequentialLR):
    """One scheduler after another; each counts its steps from its milestone and starts from the initial rates.

    Among them may be sequences, chains and `ReduceLROnPlateau`, for which `step` takes the metric.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: list[LRScheduler],
        milestones: list[int],
        last_epoch: int = -1,
    ) -> None:
        _check_parts(self, schedulers, optimizer)
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(
                f"SequentialLR: there must be one more scheduler than milestones, got {len(schedulers)} and "
                f"{len(milestones)}"
            )
        if any(a > b for a, b in pairwise(milestones)) or any(m < 0 for m in milestones):
            raise ValueError(f"SequentialLR: milestones must be in [0, inf) and increase, got {milestones}")
        self._schedulers = schedulers
        self._milestones = milestones
        self.optimizer = optimizer
        for scheduler in schedulers:
            _rewind(scheduler)
        self._update_lr(last_epoch + 1)

    def step(self, metrics: Any = None) -> None:
        """Go to the next step; a `ReduceLROnPlateau` that is running needs the metric."""
        i, since = self._running(self.last_epoch + 1)
        scheduler = self._schedulers[i]
        if since == 0:
            self._update_lr(self.last_epoch + 1)
            _settle(scheduler)
            return
        if isinstance(scheduler, (Closed, SequentialLR)):
            scheduler.last_epoch = since - 1  # torch saves others for nested sequences
        _step(self, scheduler, metrics)
        self.last_epoch += 1
        self._last_lr = scheduler.get_last_lr()

    def seek(self, step: int) -> None:
        self.last_epoch = step
        i, since = self._running(step)
        _seek(self._schedulers[i], since)
        self._last_lr = self._schedulers[i].get_last_lr()

    def _update_lr(self, epoch: int | None = None) -> None:
        _reset(self.optimizer)
        self.seek(epoch or 0)

    def _running(self, step: int) -> tuple[int, int]:
        """Which scheduler runs, and for how many steps it has."""
        i = bisect_right(self._milestones, step)
        return i, step - self._milestones[i - 1] if i else step


class ChainedScheduler(theirs.ChainedScheduler):
    """Several schedulers at once: their factors multiply.

    Among them may be sequences and `ReduceLROnPlateau`, for which `step` takes the metric.
    """

    def __init__(self, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None = None) -> None:
        _check_parts(self, schedulers, optimizer)
        self._schedulers = schedulers
        self.optimizer = optimizer or schedulers[0].optimizer
        self._last_lr = _lrs(self.optimizer)
        begins = {getattr(s, "last_epoch", 0) if getattr(s, "_step_count", 0) <= 1 else 0 for s in schedulers}
        if len(begins) == 1 and (begin := begins.pop()) > 0:  # all were made with last_epoch, each for itself
            self._update_lr(begin)

    def step(self, metrics: Any = None) -> None:
        """Go to the next step; a `ReduceLROnPlateau` needs the metric."""
        for scheduler in self._schedulers:
            _step(self, scheduler, metrics)
        self._last_lr = _lrs(self.optimizer)

    def seek(self, step: int) -> None:
        for scheduler in self._schedulers:
            _seek(scheduler, step)
        self._last_lr = _lrs(self.optimizer)

    def _update_lr(self, epoch: int | None = None) -> None:
        _reset(self.optimizer)
        self.seek(epoch or 0)


@lru_cache(maxsize=512)
def _made(kind: Callable[..., Function], *args: Hashable, **named: Hashable) -> Function:
    return kind(*args, **named)


def _held(factor: float, steps: float) -> Function:
    return schedules.join([schedules.constant(factor), schedules.constant()], [steps])


def _moved(lr: Any, base: Any, low: float, before: float, now: float) -> Any:
    """The rate after `lr`: the closed form, unless `lr` is not what it was at the step before."""
    closed, expected = low + (base - low) * now, low + (base - low) * before
    if type(lr) is float and lr == expected:  # as nearly always
        return closed
    chained = low + (lr - low) * (now / before) if before else lr + (base - low) * now
    rounding = 4 * torch.finfo(lr.dtype).eps if isinstance(lr, Tensor) and lr.is_floating_point() else 1e-9
    same = abs(lr - expected) <= rounding * abs(expected)
    if isinstance(same, Tensor):  # without asking the device
        return torch.where(same, closed, chained)
    return closed if same else chained


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _lrs(optimizer: Optimizer) -> list[Rate]:
    return [_copy(group["lr"]) for group in optimizer.param_groups]


def _initial(group: dict[str, Any]) -> Any:
    return _copy(group.setdefault("initial_lr", _copy(group["lr"])))


def _set(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr.squeeze() if isinstance(lr, Tensor) else lr)
    else:
        group["lr"] = lr


def _write(scheduler: LRScheduler, values: Iterable[Any]) -> None:
    for group, lr in zip(scheduler.optimizer.param_groups, values, strict=False):
        _set(group, lr)
    scheduler._last_lr = _lrs(scheduler.optimizer)


def _set_momentum(group: dict[str, Any], value: float, *, is_beta: bool) -> None:
    if is_beta:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group["momentum"] = value


def _common(scheduler: LRScheduler, name: str, values: Sequence[Any]) -> Any:
    """What all groups have, for one that was added later."""
    if any(value != values[0] for value in values):
        hint = f'as in add_param_group({{"params": ..., "{name}": ...}})'
        if name == "lr_lambda":
            hint = "append it to lr_lambdas, and the group's learning rate to base_lrs"
        raise ValueError(
            f"{type(scheduler).__name__}: a group was added, and the others differ in {name}; give it one, {hint}"
        )
    return values[0]


def _check_parts(whole: LRScheduler, schedulers: Sequence[LRScheduler], optimizer: Optimizer | None) -> None:
    owner = type(whole).__name__
    if len(schedulers) < 1:
        raise ValueError(f"{owner}: expects at least one scheduler")
    for i, scheduler in enumerate(schedulers):
        if not hasattr(scheduler, "optimizer"):
            raise TypeError(f"{owner}: schedulers[{i}] should have `optimizer` as its attribute")
        if scheduler.optimizer is not (optimizer or schedulers[0].optimizer):
            raise ValueError(f"{owner}: all schedulers must belong to the same optimizer, but schedulers[{i}] does not")


def _reset(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        _set(group, _initial(group))


def _rewind(scheduler: LRScheduler) -> None:
    """Before the first step."""
    for part in getattr(scheduler, "_schedulers", ()):
        _rewind(part)
    if hasattr(scheduler, "last_epoch") and not isinstance(scheduler, theirs.ReduceLROnPlateau):
        scheduler.last_epoch = -1


def _settle(scheduler: LRScheduler) -> None:
    """Let torch not warn about the order of the first steps, which are long gone."""
    for part in getattr(scheduler, "_schedulers", ()):
        _settle(part)
    if hasattr(scheduler, "_step_count"):
        scheduler._step_count = max(scheduler._step_count, 2)


def _seek(scheduler: LRScheduler, step: int) -> None:
    """Go to a step, from groups that have their initial learning rates, or those that a chain made of them."""
    if isinstance(scheduler, (Closed, SequentialLR, ChainedScheduler)):
        scheduler.seek(step)
    elif isinstance(scheduler, theirs.ReduceLROnPlateau):
        scheduler._reset()
        scheduler.last_epoch = step
        scheduler._last_lr = _lrs(scheduler.optimizer)
    elif step == 0:
        _rewind(scheduler)
        scheduler._initial_step()
    else:
        scheduler._update_lr(step)


def _step(whole: LRScheduler, scheduler: LRScheduler, metrics: Any) -> None:
    if isinstance(scheduler, theirs.ReduceLROnPlateau):
        if metrics is None:
            raise TypeError(f"{type(whole).__name__}: ReduceLROnPlateau is running, so step(metric) needs the metric")
        scheduler.step(metrics)
    elif isinstance(scheduler, (SequentialLR, ChainedScheduler)):
        scheduler.step(metrics)
    else:
        scheduler.step()
