"""Unfreezing: parameters that join a training later."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from schuss import bounds
from schuss.schedules import Schedule
from schuss.training.groups import Groups, check_settings, numbered
from schuss.training.parameters import Match, select
from schuss.wrappers.combined import Combined
from schuss.wrappers.outer import _chain

__all__ = ["unfreeze"]


def unfreeze(
    optimizer: torch.optim.Optimizer,
    groups: Groups,
    match: Match | None = None,
    *,
    scheduler: LRScheduler | Iterable[LRScheduler] | None = None,
    like: int = 0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train frozen parameters from now on, with what `param_groups` decided for them.

    Sets `requires_grad`, adds groups to the optimizer, whose other state stays, and enlarges the schedulers: a new
    group's learning rate is to that of the group `like` what it would be, had both been there from the start.

    To resume from a checkpoint that was saved after this, make model, groups, optimizer and schedulers as then, call
    this as then, and load.

    Args:
        optimizer: made from `groups`.
        groups: enlarged too, so that `print(groups)` and `len(groups)` stay true.
        match: which of the frozen parameters; None: all.
        scheduler: the one or those that the optimizer has, or an empty tuple to leave them out.
        like: index of the group whose schedule the new ones follow with schedulers of torch. A `Schedule` decides
            itself which groups it drives.
        settings: for these parameters, instead of what `param_groups` decided.

    Returns:
        The optimizer's new groups.

    Raises:
        ValueError: no frozen parameter is meant; the optimizer has other groups than `groups`; it has a scheduler,
            and none was given; a setting out of its bounds.
    """
    check_settings("unfreeze", settings, owner="unfreeze")
    waiting = [a for a in groups.assignments if a.group is None]
    if not waiting:
        raise ValueError("unfreeze: no parameter of these groups is frozen")
    if match is not None:
        waiting = select(match, waiting, "match", owner="unfreeze")
    before = len(groups)
    if len(optimizer.param_groups) != before:
        raise ValueError(f"unfreeze: the optimizer has {len(optimizer.param_groups)} groups, not these {before}")
    for i, (live, group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        if [id(p) for p in live["params"]] != [id(p) for _, p in group["params"]]:
            raise ValueError(f"unfreeze: group {i} of the optimizer has other parameters than that of groups")
    if scheduler is None and any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError("unfreeze: the optimizer has a scheduler; pass scheduler=, or scheduler=() if it is done with")
    schedulers = [*(scheduler or ())] if scheduler is None or isinstance(scheduler, Iterable) else [scheduler]
    theirs = [s for s in schedulers if not isinstance(s, Schedule)]
    thawed = {a.names for a in waiting}
    enlarged = Groups(
        numbered(
            [replace(a, settings={**a.settings, **settings}) if a.names in thawed else a for a in groups.assignments],
            thawed,
        )
    )
    declared = [bounds.number(group.get("lr", _default(optimizer, groups, group))) for group in enlarged]
    if theirs and declared[like] == 0 and any(declared[before:]):
        raise ValueError(
            f"unfreeze: the learning rate of group {like} is 0 and scales to no other; choose another like"
        )
    try:
        for group in enlarged[before:]:
            optimizer.add_param_group(group)
    except BaseException:
        del optimizer.param_groups[before:]
        raise
    if theirs:
        for i in range(before, len(enlarged)):
            _join(optimizer, theirs, i, like, declared[i], declared[like])
    for ours in schedulers:
        if isinstance(ours, Schedule):
            ours.load_state_dict(ours.state_dict())  # to the step at which it is, of which the new groups take note
    for a in waiting:
        a.parameter.requires_grad_(True)
    groups._assignments = enlarged.assignments
    return optimizer.param_groups[before:]


def _default(optimizer: torch.optim.Optimizer, groups: Groups, group: Mapping[str, Any]) -> Any:
    """The learning rate with which a group starts that has none of its own."""
    combined = next((part for part in _chain(optimizer) if isinstance(part, Combined)), None)

    def defaults_of(group: Mapping[str, Any]) -> dict[str, Any]:
        return optimizer.defaults if combined is None else combined.defaults_of(group)

    defaults = defaults_of(group)
    default = defaults.get("lr", 0.0)
    if isinstance(default, torch.Tensor):  # schedulers write into it: groups without their own have this very tensor
        lives = [live for live, old in zip(optimizer.param_groups, groups, strict=True) if "lr" not in old]
        sharing = (live["initial_lr"] for live in lives if "initial_lr" in live and defaults_of(live) is defaults)
        return next(sharing, default)
    return default


# --- schedulers -------------------------------------------------------------------------------------------------------


def _join(
    optimizer: torch.optim.Optimizer, schedulers: Iterable[LRScheduler], new: int, like: int, lr: float, base: float
) -> None:
    """Let a new group follow the schedule of group `like`.

    torch's schedulers keep a value per group in lists and in the groups. All make a group's learning rate from its
    first one by an affine function: times a factor, or towards `eta_min`.
    """
    group, model = optimizer.param_groups[new], optimizer.param_groups[like]

    def scaled(value: Any) -> Any:
        if lr == base:
            return value
        return lr if bounds.number(value) == base else bounds.number(value) * (lr / base)

    floor = sum(_floor(scheduler) for scheduler in schedulers)
    first, now = bounds.number(model.get("initial_lr", base)), bounds.number(model["lr"])
    if lr != base:
        now = floor + (now - floor) * (scaled(first) - floor) / (first - floor) if first != floor else scaled(now)
    group["lr"] = torch.full_like(model["lr"], now) if isinstance(model["lr"], torch.Tensor) else now
    for key in ("initial_lr", "max_lr", "min_lr", "swa_lr"):
        if key in model:
            group[key] = scaled(model[key])
    for key in ("max_momentum", "base_momentum"):
        if key in model:
            group[key] = model[key]
            group |= {name: model[name] for name in ("momentum", "betas") if name in model}
    for part in _parts(schedulers):
        for name in ("base_lrs", "max_lrs", "_last_lr", "lr_lambdas", "min_lrs", "base_momentums", "max_momentums"):
            values = getattr(part, name, None)
            if isinstance(values, list) and len(values) == new:
                value = values[like]
                if name in ("base_lrs", "max_lrs"):
                    value = scaled(value)
                setattr(part, name, [*values, group["lr"] if name == "_last_lr" else value])


def _parts(schedulers: Iterable[LRScheduler]) -> Iterator[LRScheduler]:
    """The schedulers, and those that they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from _parts(getattr(scheduler, "_schedulers", ()))


def _floor(scheduler: LRScheduler) -> float:
    """The learning rate that every group tends to at present."""
    if isinstance(scheduler, SequentialLR):
        return _floor(scheduler._schedulers[bisect_right(scheduler._milestones, scheduler.last_epoch)])
    return float(getattr(scheduler, "eta_min", 0.0))
