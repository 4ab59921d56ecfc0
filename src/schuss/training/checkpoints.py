"""Checkpoints of a whole run: one file with all that it needs to go on as if it had never stopped."""

import operator
import os
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from schuss import bounds
from schuss.training.encoding import encode, encode_key
from schuss.training.files import (
    FORMAT,
    CheckpointError,
    find,
    keep,
    make_folder,
    remove_leftovers,
    replacing,
    write,
)
from schuss.training.stateful import RANDOM, Loader, generators_here, has_state, restore, state_of

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` has loaded.

    Attributes:
        step, epoch, loss: as they were given to `save_checkpoint`, or None.
        extra: plain values as they were given; the states of objects that have not been loaded.
        path: the file.
    """

    step: int | None
    epoch: int | None
    loss: float | None
    extra: dict[str, Any]
    path: Path


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    schedule: Any = None,
    scaler: Any = None,
    data: Any = None,
    step: int | None = None,
    epoch: int | None = None,
    loss: float | torch.Tensor | None = None,
    extra: Mapping[str, Any] | None = None,
    keep_last: int | None = 3,
) -> Path:
    """Save all that a run needs to go on, in one file that is there whole or not at all.

    The random numbers of Python, NumPy, torch and its CUDA devices are saved too. Save between two steps; gradients
    are not in a checkpoint. Of several processes of `torch.distributed` the first one writes, and the others only
    return.

    Args:
        path: a folder, for a file step-00001234.schuss in it, or a file, whose name ends in .schuss.
        model, optimizer, schedule, scaler: objects with `state_dict` and `load_state_dict`, or dicts of them by name.
        data: the same, a loader with a position of its own for one. Of torch's DataLoader its generator, its sampler
            and its dataset are saved, as far as they have a state.
        step: steps taken, in [0, inf); it names the file in a folder.
        epoch: yours to count, in [0, inf).
        loss: any number.
        extra: by name: objects with `state_dict`; generators of torch, NumPy and Python; plain values: numbers,
            strings, bytes, tensors, arrays, and lists, tuples, dicts and sets of them.
        keep_last: how many checkpoints of a folder stay, in [1, inf): this one and those of the steps before it. None:
            all.

    Returns:
        The file.

    Raises:
        TypeError: something that no checkpoint holds; the message names it. Nothing has been written then.
        ValueError: an argument out of its bounds; a folder and no step.
        RuntimeError: inside `optimizer.averaged()`.
        OSError: the disk is full, say. Earlier checkpoints stay, and the file that was begun is removed.
    """
    owner = "save_checkpoint"
    step, epoch = _count(owner, "step", step), _count(owner, "epoch", epoch)
    if keep_last is not None and _count(owner, "keep_last", keep_last) == 0:
        raise ValueError(f"{owner}: keep_last must be None or in [1, inf), got 0")
    path = Path(path)
    into_folder = path.is_dir() or path.suffix != ".schuss"
    if into_folder and path.exists() and not path.is_dir():
        raise ValueError(f"{owner}: {path} is a file whose name does not end in .schuss; name a folder or such a file")
    if into_folder and step is None:
        raise ValueError(f"{owner}: step is needed to name a file in {path}; give it, or a file that ends in .schuss")
    target = path / f"step-{step:08d}.schuss" if into_folder else path
    given = _given(owner, model=model, optimizer=optimizer, schedule=schedule, scaler=scaler, data=data)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return target
    payload: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "epoch": epoch,
        "loss": None if loss is None else bounds.number(loss),
        "parts": {key: _saved(f"{owner}: {_label(*key)}", of) for key, of in given.items()},
        "extra": {
            encode_key(name, f"{owner}: extra"): _saved(f"{owner}: {_label('extra', name)}", value)
            if has_state(value)
            else {"value": encode(value, f"{owner}: {_label('extra', name)}")}
            for name, value in (extra or {}).items()
        },
    }
    # Last: a loader may draw a seed when it is asked for its state.
    payload["rng"] = {name: encode(state_of(of), name) for name, of in generators_here().items()}
    make_folder(target.parent)
    remove_leftovers(target.parent)
    try:
        with replacing(target) as file:
            write(payload, file)
    except OSError as error:
        error.add_note(f"while saving {target}; earlier checkpoints are as they were")
        raise
    if into_folder:
        assert step is not None
        keep(path, step, keep_last)
    return target


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    schedule: Any = None,
    scaler: Any = None,
    data: Any = None,
    extra: Mapping[str, Any] | None = None,
    map_location: Any = None,
    strict: bool = True,
    rng: bool = True,
) -> Checkpoint:
    """Load what `save_checkpoint` has saved, all of what is asked for or nothing.

    The whole file is checked before anything is changed, and no code in it is run. Make the objects first, as at the
    start of the run, a schedule after its optimizer.

    Args:
        path: a file, or a folder, for its newest file that is not damaged.
        model, optimizer, schedule, scaler, data: what to load into, as it was given to `save_checkpoint`. What is left
            out is not loaded.
        extra: by name, objects and generators to load into.
        map_location: as in `torch.load`: where the file's tensors are put before they are copied. None: where they
            were.
        strict: whether it is an error if something is asked for that is not in the file; if an optimizer or a schedule
            is of another class than it was; if an optimizer is loaded, but not all else that the file holds beside
            `extra`; and if a model or optimizer has other names. Else it is a warning, or as
            `load_state_dict(..., strict=False)` has it.
        rng: whether to restore the random numbers of Python, NumPy, torch and CUDA.

    Returns:
        Step, epoch, loss, extra values, and the file.

    Raises:
        FileNotFoundError: no such file, or no checkpoint in the folder.
        CheckpointError: a file that is damaged, that holds what only running code could load, or that does not fit.
            Nothing has been changed then.
        TypeError: something to load into that has no `load_state_dict`.
        RuntimeError: inside `optimizer.averaged()`.
    """
    owner = "load_checkpoint"
    given = _given(owner, model=model, optimizer=optimizer, schedule=schedule, scaler=scaler, data=data)
    for name, target in (extra or {}).items():
        if not has_state(target):
            raise TypeError(
                f"{owner}: {_label('extra', name)} must have state_dict and load_state_dict, or be a generator, got "
                f"{type(target).__name__}; plain values are in what load_checkpoint returns"
            )
    file, payload = find(Path(path), map_location)
    parts: Mapping[tuple[str, str], Any] = payload["parts"]
    saved = {**parts, **{("extra", name): kept for name, kept in payload["extra"].items()}}
    wanted = {**given, **{("extra", name): target for name, target in (extra or {}).items()}}
    _check_names(file, saved, wanted, strict=strict)
    plan = [
        _Part(_label(*key), wanted[key], saved[key]["state"], saved[key]["type"])
        for kind in ("optimizer", "schedule", "scaler", "model", "extra", "data")
        for key in wanted
        if key[0] == kind and "state" in saved.get(key, ())
    ]
    for part in plan:
        _check(file, part, strict=strict)
    generators = _restorable(file, payload["rng"]) if rng else []
    generators += [part for part in plan if isinstance(part.target, RANDOM)]
    _apply(file, plan, generators, strict=strict)
    values = {
        name: kept["value" if "value" in kept else "state"]
        for name, kept in payload["extra"].items()
        if ("extra", name) not in wanted
    }
    return Checkpoint(payload["step"], payload["epoch"], payload["loss"], values, file)


# --- what is given ----------------------------------------------------------------------------------------------------


def _count(owner: str, name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be an integer, got {value!r} ({type(value).__name__})") from None
    bounds.check(owner, name, number, "[0, inf)")
    return number


def _given(owner: str, **kinds: Any) -> dict[tuple[str, str], Any]:
    """(kind, name) -> object; a lone one has the name ""."""
    found = {}
    for kind, value in kinds.items():
        if value is None:
            continue
        for name, item in ({"": value} if has_state(value) or not isinstance(value, Mapping) else value).items():
            if kind == "data" and isinstance(item, DataLoader):
                item = Loader(item)
            elif not has_state(item):
                raise TypeError(
                    f"{owner}: {_label(kind, name)} must have state_dict and load_state_dict, or be a dict of what has "
                    f"them, got {type(item).__name__}"
                )
            if getattr(item, "_is_averaged", False):
                raise RuntimeError(f"{owner}: {_label(kind, name)} is inside averaged(); save and load outside of it")
            if isinstance(item, nn.Module):
                item = _unwrapped(item)
                if _is_sharded(item):
                    raise TypeError(
                        f"{owner}: {_label(kind, name)} is sharded over processes; use torch.distributed.checkpoint"
                    )
            found[kind, name] = item
    return found


def _label(kind: str, name: str) -> str:
    return f"{kind}[{name!r}]" if name else kind


def _unwrapped(module: nn.Module) -> nn.Module:
    """Without what torch.compile and data parallelism put round it, so that its names are the same with and without."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def _is_sharded(module: nn.Module) -> bool:
    """By name, since their modules need not have been imported."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in module.modules()) or any(
        type(p).__name__ == "DTensor" for p in module.parameters()
    )


def _saved(where: str, of: Any) -> dict[str, Any]:
    return {"type": type(of).__name__, "state": encode(state_of(of), where)}


# --- loading ----------------------------------------------------------------------------------------------------------


_NOTHING = "Nothing has been changed"


@dataclass(frozen=True)
class _Part:
    """An object, and the state to load into it."""

    label: str
    target: Any
    state: Any
    saved_of: str = ""


def _check_names(
    file: Path, saved: Mapping[tuple[str, str], Any], wanted: Mapping[tuple[str, str], Any], *, strict: bool
) -> None:
    missing = [_label(*key) for key in wanted if "state" not in saved.get(key, ())]
    resumes = any(kind == "optimizer" for kind, _ in wanted)
    forgotten = [_label(*key) for key in saved if resumes and key not in wanted and key[0] != "extra"]
    there = ", ".join(_label(*key) for key in saved) or "nothing"
    problems = []
    if missing:
        problems.append(f"{', '.join(missing)} cannot be loaded, for the file holds {there}")
    if forgotten:
        problems.append(f"{', '.join(forgotten)} of the file has no object to load into; give it")
    if problems and strict:
        raise CheckpointError(f"{file}: {'; '.join(problems)}; strict=False leaves it out. {_NOTHING}")
    if problems:
        warnings.warn(f"load_checkpoint: {file.name}: {'; '.join(problems)}; left out", stacklevel=3)


def _check(file: Path, part: _Part, *, strict: bool) -> None:
    """Raise if a state does not fit an object, as far as one can tell without loading it."""
    try:
        problem = _problem(part.target, part.state, strict=strict)
    except Exception as error:
        problem = f"it is not such a state: {error!r}"
    is_named = part.label.startswith(("optimizer", "schedule"))
    if not problem and strict and is_named and part.saved_of != type(part.target).__name__:
        problem = f"it was saved of {part.saved_of}, this is {type(part.target).__name__}; strict=False loads it anyway"
    if problem:
        raise CheckpointError(f"{file}: {part.label} cannot be loaded: {problem}. {_NOTHING}")


def _problem(target: Any, state: Any, *, strict: bool) -> str:
    if isinstance(target, nn.Module) and not _loads_its_own_way(target):
        return _model_problem(target, state, strict=strict)
    if isinstance(target, Optimizer):
        return _optimizer_problem(target, state)
    here = getattr(target, "base_lrs", None)
    there = state.get("base_lrs") if isinstance(state, dict) else None
    if here is not None and there is not None and len(here) != len(there):
        return f"it was saved for {len(there)} parameter groups, and there are {len(here)}"
    return ""


def _loads_its_own_way(model: nn.Module) -> bool:
    return any(
        m._load_state_dict_pre_hooks or type(m)._load_from_state_dict is not nn.Module._load_from_state_dict
        for m in model.modules()
    )


def _model_problem(model: nn.Module, saved: Any, *, strict: bool) -> str:
    own = model.state_dict()
    shapes = [
        f"{name} has shape {tuple(saved[name].shape)} in the file, {tuple(own[name].shape)} here"
        for name in own
        if isinstance(own[name], torch.Tensor) and name in saved and saved[name].shape != own[name].shape
    ]
    names = [
        f"{what}: {', '.join(there)}"
        for what, there in (
            ("only in the file", [name for name in saved if name not in own]),
            ("not in the file", [name for name in own if name not in saved]),
        )
        if there and strict
    ]
    found = shapes + names
    return "; ".join(found[:10]) + "; ..." * (len(found) > 10)


def _optimizer_problem(optimizer: Optimizer, state: Any) -> str:
    groups, saved = optimizer.param_groups, state.get("param_groups", ())
    if len(groups) != len(saved):
        return f"it was saved with {len(saved)} parameter groups, and there are {len(groups)}"
    if all("param_names" in group for group in (*groups, *saved)):
        from schuss.optimizer import Optimizer as Ours

        different = [i for i in range(len(groups)) if groups[i]["param_names"] != saved[i]["param_names"]]
        if isinstance(optimizer, Ours) or not different:
            return ""  # matches by name, and says what does not
        return f"the parameters of group {different[0]} have other names, or another order"
    for i, (there, here) in enumerate(zip(saved, groups, strict=True)):
        if len(there["params"]) != len(here["params"]):
            return f"group {i} was saved with {len(there['params'])} parameters, and has {len(here['params'])}"
    return ""


def _restorable(file: Path, saved: Mapping[str, Any]) -> list[_Part]:
    """The generators of this process that have a state in the file."""
    if dist.is_available() and dist.is_initialized() and (rank := dist.get_rank()) != 0:
        warnings.warn(
            f"load_checkpoint: {file.name} has the random numbers of process 0, not of process {rank}, whose "
            "generators stay as they are; seed them, and give rng=False",
            stacklevel=3,
        )
        return []
    if any(name.startswith("cuda") for name in saved) and torch.cuda.is_available():
        torch.cuda.init()
    here = generators_here()
    if lost := [name for name in saved if name not in here]:
        warnings.warn(
            f"load_checkpoint: {file.name} has random numbers of {', '.join(lost)}, which this machine lacks; with "
            "rng=False none are restored",
            stacklevel=3,
        )
    return [_Part(name, here[name], state) for name, state in saved.items() if name in here]


def _apply(file: Path, plan: list[_Part], generators: list[_Part], *, strict: bool) -> None:
    """Load all, or change nothing."""
    undo = [(part.label, _undo(part.target)) for part in (*plan, *generators)]
    part = None
    try:
        # Generators twice: first to see that they can be, last since what is loaded may draw numbers.
        for part in (*generators, *plan):
            restore(part.target, part.state, strict=strict)
        for part in generators:
            restore(part.target, part.state, strict=strict)
    except BaseException as error:
        stuck = []
        for label, put_back in reversed(undo):
            try:
                put_back()
            except Exception:
                stuck.append(label)
        if not isinstance(error, Exception) or part is None:
            raise
        rest = f"{', '.join(stuck)} cannot be put back either; all else is as it was" if stuck else _NOTHING
        raise CheckpointError(f"{file}: {part.label} cannot be loaded: {str(error).rstrip('.')}. {rest}") from error


def _undo(target: Any) -> Callable[[], None]:
    """What brings an object back to what it is now."""
    from schuss.optimizer import Optimizer as Ours

    if isinstance(target, Optimizer) and type(target).load_state_dict in (
        Optimizer.load_state_dict,
        Ours.load_state_dict,
    ):
        before = dict(vars(target))  # they make new state and new groups, and leave these as they are

        def put_back() -> None:
            vars(target).clear()
            vars(target).update(before)

        return put_back
    if isinstance(target, Loader):  # not its position: asking would start workers
        before = {name: deepcopy(state_of(piece)) for name, piece in target.pieces.items()}
        return lambda: target.load_state_dict(before)
    state = deepcopy(state_of(target))
    return lambda: restore(target, state, strict=True)
