"""`Schedule`: hyperparameters of an optimizer that follow schedules."""

from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from schuss.bounds import nearest, number
from schuss.schedules.compose import absolute
from schuss.schedules.function import Function

Value = Callable[[int], float]
"""A schedule, or any function of the step."""
Groups = int | Collection[int] | Callable[[Mapping[str, Any]], bool] | None


class Schedule(LRScheduler):
    """Drives any hyperparameter of any parameter groups: value at step t = initial value of the group × f(t).

    The values of step 0 are set at once, those of step t by the t-th call of `step()`. All state is t. What a group
    had when it was first seen is its initial value, kept in the group as `initial_lr` and so on, also of a group that
    is added later. Tensors are filled in place. Of two schedules of the same hyperparameter the last to step wins.

    It is an `LRScheduler`, so frameworks accept it.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        groups: which groups: None for all, an index or indices, or a function of a group that returns a bool, asked
            once per group, of its initial values.
        follow: count the steps of the optimizer by a hook, instead of calls of `step()`. A step that a GradScaler
            skips does not count.
        hyperparameters: name -> schedule of factors, or `absolute(schedule)` of values. A pair such as betas takes a
            pair of them; None leaves a place as it is.

    Raises:
        TypeError: a hyperparameter that the optimizer, or a chosen group, does not have, or something that is no
            schedule. For a group that is added later the error comes with the next step.
        ValueError: an index without a group, or a pair where there is none.
    """

    def __init__(
        self, optimizer: Optimizer, *, groups: Groups = None, follow: bool = False, **hyperparameters: Any
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Schedule: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not hyperparameters:
            raise TypeError("Schedule: no hyperparameter is given, as in Schedule(optimizer, lr=cosine(1000))")
        for name, schedule in hyperparameters.items():
            _check_parts(name, schedule)
            if not any(name in _numeric(optimizer, group) for group in optimizer.param_groups):
                known = {key: None for group in optimizer.param_groups for key in _numeric(optimizer, group)}
                owner = type(optimizer).__name__
                raise TypeError(f"Schedule: {owner} has no hyperparameter {name!r}; {nearest(name, known)}")
        self.optimizer = optimizer
        self.schedules: dict[str, Any] = {
            name: tuple(s) if isinstance(s, (tuple, list)) else s for name, s in hyperparameters.items()
        }
        self.groups = (groups,) if isinstance(groups, int) else groups
        self.follow = follow
        self.last_epoch = 0
        """How many steps are done."""
        self._step_count = 1  # accelerate adds to it
        self._initial: list[dict[str, Any]] = []  # of each group seen, in case the group loses it
        self._chosen: list[int] = []
        if self.groups is not None and not callable(self.groups):
            for i in self.groups:
                if not isinstance(i, int) or not 0 <= i < len(optimizer.param_groups):
                    raise ValueError(f"Schedule: groups must be in [0, {len(optimizer.param_groups)}), got {i!r}")
        self._attach()
        self._write(0)

    def step(self, epoch: int | None = None) -> None:
        """Count one step and set the values for the next; call it after `optimizer.step()`.

        Args:
            epoch: go to this step instead.

        Raises:
            RuntimeError: the schedule follows its optimizer.
        """
        if self.follow:
            raise RuntimeError("Schedule: it follows its optimizer (follow=True), so step() is not called by hand")
        self._go(self.last_epoch + 1 if epoch is None else epoch)

    def values(self, step: int | None = None) -> list[dict[str, Any]]:
        """Hyperparameter -> value of each driven group, as they are, or as they will be at a step."""
        if step is None:
            return [{name: _copy(group[name]) for name in self.schedules} for group in self._groups()]
        return [
            {name: self._value(group, name, schedule, step) for name, schedule in self.schedules.items()}
            for group in self._groups()
        ]

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates of all groups, as they are."""
        return [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The step, and the schedules as text."""
        return {"step": self.last_epoch, "schedules": {n: _text(s) for n, s in self.schedules.items()}}

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Go to the step that was saved. The order with `optimizer.load_state_dict` does not matter.

        Args:
            state_dict: what `state_dict` returned.
            strict: whether other schedules than these are an error.

        Raises:
            ValueError: it was saved with other schedules.
        """
        saved, own = state_dict["schedules"], self.state_dict()["schedules"]
        for name in saved | own if strict else ():
            if saved.get(name) != own.get(name):
                raise ValueError(
                    f"Schedule: saved with {name}={saved.get(name)}, this one has {name}={own.get(name)}; "
                    "load_state_dict(..., strict=False) goes on with this one"
                )
        self._go(state_dict["step"])

    def __repr__(self) -> str:
        words = [f"{name}={_text(schedule)}" for name, schedule in self.schedules.items()]
        words += [f"groups={self.groups!r}"] * (self.groups is not None) + ["follow=True"] * self.follow
        return f"Schedule({type(self.optimizer).__name__}, {', '.join(words)}) at step {self.last_epoch}"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def _attach(self) -> None:
        if self.follow:
            self._skipped = getattr(self.optimizer, "skipped_steps", 0)
            self._handle = self.optimizer.register_step_post_hook(self._after)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Optimizers that unscale gradients themselves are called for a skipped step too, and told by `found_inf`; ours
        # may leave out a step whose gradients have no norm, and count it.
        found_inf = getattr(optimizer, "found_inf", None)
        before, self._skipped = self._skipped, getattr(optimizer, "skipped_steps", 0)
        if self._skipped <= before and (found_inf is None or not number(found_inf)):
            self._go(self.last_epoch + 1)

    def _go(self, step: int) -> None:
        self._write(step)
        self.last_epoch = step
        self._step_count = step + 1

    def _groups(self) -> list[dict[str, Any]]:
        """The driven groups, each with its initial values."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._initial):
            self._adopt(groups)
        return groups if self.groups is None else [groups[i] for i in self._chosen]

    def _adopt(self, groups: list[dict[str, Any]]) -> None:
        """Remember the initial values of new groups, and put them back where they are lost."""
        chosen, known = self.groups, min(len(self._initial), len(groups))
        new = [
            i
            for i, group in enumerate(groups)
            if i >= known and (chosen(_at_first(group)) if callable(chosen) else chosen is None or i in chosen)
        ]
        for name, schedule in self.schedules.items():
            for i in new:
                _check_group(self.optimizer, i, name, schedule)
        for name in self.schedules:
            unshare(groups, name)
        self._chosen = [i for i in self._chosen if i < known] + new
        self._initial = self._initial[:known] + [{} for _ in groups[known:]]
        for i, group in enumerate(groups):
            for name in self.schedules if i in self._chosen else ():
                key = f"initial_{name}"
                if key not in group:
                    group[key] = self._initial[i].get(name, _copy(group[name]))
                self._initial[i][name] = _copy(group[key])

    def _write(self, step: int) -> None:
        groups = self._groups()
        try:
            for name, schedule in self.schedules.items():
                self._set(groups, name, schedule, step)
        except KeyError:  # a checkpoint dropped the initial values, as torch.distributed.checkpoint does
            self._adopt(self.optimizer.param_groups)
            for name, schedule in self.schedules.items():
                self._set(groups, name, schedule, step)

    def _set(self, groups: list[dict[str, Any]], name: str, schedule: Any, step: int) -> None:
        if isinstance(schedule, (tuple, absolute)):
            for group in groups:
                _assign(group, name, self._value(group, name, schedule, step))
            return
        factor, initial = schedule(step), f"initial_{name}"
        for group in groups:  # the loop of every step
            if type(group[name]) is float:
                group[name] = group[initial] * factor
            else:
                _assign(group, name, group[initial] * factor)

    def _value(self, group: Mapping[str, Any], name: str, schedule: Any, step: int) -> Any:
        if isinstance(schedule, tuple):
            places = zip(schedule, group[f"initial_{name}"], group[name], strict=True)
            return tuple(_copy(now) if f is None else _scaled(f, initial, step) for f, initial, now in places)
        return _scaled(schedule, group[f"initial_{name}"], step)


def _at_first(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its initial values, which a choice should go by: it is the same after a resume then."""
    return {**group, **{key.removeprefix("initial_"): v for key, v in group.items() if key.startswith("initial_")}}


def unshare(groups: list[dict[str, Any]], name: str) -> None:
    """Give each group a tensor of its own: a default that is a tensor is one tensor for all of them."""
    seen: set[int] = set()
    for group in groups:
        if name not in group:  # of another optimizer than the group that has it
            continue
        value = group[name]
        if any(isinstance(v, Tensor) and id(v) in seen for v in (value if isinstance(value, tuple) else (value,))):
            value = group[name] = _copy(value)
        seen.update(map(id, value if isinstance(value, tuple) else (value,)))


def _scaled(schedule: Value, initial: Any, step: int) -> Any:
    return schedule(step) if isinstance(schedule, absolute) else initial * schedule(step)


def _assign(group: dict[str, Any], name: str, value: Any) -> None:
    """Tensors keep their memory, which a compiled or captured step reads."""
    old = group[name]
    if isinstance(old, tuple):
        for place, new in zip(old, value, strict=True):
            if isinstance(place, Tensor):
                _fill(place, new)
        group[name] = tuple(place if isinstance(place, Tensor) else new for place, new in zip(old, value, strict=True))
    elif isinstance(old, Tensor):
        _fill(old, value)
    else:
        group[name] = value


@torch.no_grad()
def _fill(tensor: Tensor, value: Any) -> None:
    if isinstance(value, Tensor):
        tensor.copy_(value)
    else:
        tensor.fill_(value)


def _copy(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_copy, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, Real) and not isinstance(value, bool))


def _numeric(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group that are numbers, or tuples of them."""
    return {
        key: value
        for key, value in group.items()
        if key in optimizer.defaults
        and (_is_number(value) or (isinstance(value, (tuple, list)) and all(map(_is_number, value))))
    }


def _check_group(optimizer: Optimizer, index: int, name: str, schedule: Any) -> None:
    """Raise unless a group has the hyperparameter, and `schedule` fits it."""
    groups, owner = optimizer.param_groups, type(optimizer).__name__
    numeric = _numeric(optimizer, groups[index])
    if name not in numeric:
        having = [i for i, group in enumerate(groups) if name in _numeric(optimizer, group)]
        raise TypeError(
            f"Schedule: group {index} of {owner} has no hyperparameter {name!r}; choose those that have: "
            f"groups={having}"
        )
    places = len(numeric[name]) if isinstance(numeric[name], (tuple, list)) else None
    if places != (len(schedule) if isinstance(schedule, (tuple, list)) else None):
        takes = "one schedule" if places is None else f"{places} schedules, some may be None"
        of = owner if len(groups) == 1 else f"group {index} of {owner}"
        raise ValueError(f"Schedule: {name} of {of} takes {takes}, got {_text(schedule)}")


def _check_parts(name: str, schedule: Any) -> None:
    """Raise unless it is a schedule, or a pair of them."""
    is_pair = isinstance(schedule, (tuple, list))
    for part in schedule if is_pair else (schedule,):
        is_class = isinstance(part, type) and issubclass(part, Function)
        if is_class or not (callable(part) or (part is None and is_pair)):
            raise TypeError(f"Schedule: {name} must be a schedule such as cosine(1000), got {_text(part)}")


def _text(schedule: Any) -> str:
    """A schedule as text that is the same in the next process, as the repr of a function is not."""
    if isinstance(schedule, (tuple, list)):
        return f"({', '.join(map(_text, schedule))})"
    if isinstance(schedule, (Function, Real)) or schedule is None:
        return repr(schedule)
    return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))
