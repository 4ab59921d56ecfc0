"""An optimizer's state, saved and loaded.

Loading checks all before anything is changed, matches by name where there are names, and stores each state as the
optimizer's `state_dtype` says, whatever it was saved as.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import StateDict

from schuss.engine.pieces import EMA
from schuss.engine.state import COMPENSATION, blocks, chosen, find, keys_of, make, parameter_storage
from schuss.engine.storage import MAPS
from schuss.engine.watch import significant_strides

if TYPE_CHECKING:
    from schuss.optimizer import Optimizer


def load(optimizer: "Optimizer", state_dict: StateDict, *, strict: bool) -> None:
    """`Optimizer.load_state_dict`; see there."""
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        if (replaced := pre_hook(optimizer, state_dict)) is not None:
            state_dict = replaced
    owner = type(optimizer).__name__
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"{owner}: loaded state dict has a different number of parameter groups: {len(saved_groups)} saved, "
            f"{len(groups)} here; add or leave out groups before loading"
        )
    named = all("param_names" in g for g in (*saved_groups, *groups)) and bool(groups)
    source = _by_name(owner, saved_groups, groups, strict=strict) if named else _by_order(owner, saved_groups, groups)
    for saved, group in zip(saved_groups, groups, strict=True):
        optimizer._check({**optimizer.defaults, **group, **saved})
    saved_state: Mapping[Any, Any] = state_dict["state"]
    of = {
        p: {**optimizer.defaults, **group, **saved}
        for saved, group in zip(saved_groups, groups, strict=True)
        for p in group["params"]
    }
    for name, p, index in source:
        if index in saved_state:
            _check(optimizer, name, p, of[p], saved_state[index])

    state: defaultdict[Any, Any] = defaultdict(dict)
    known = set()
    for _, p, index in source:
        known.add(index)
        if index in saved_state:
            state[p] = _stored(optimizer, p, of[p], saved_state[index])
    for key, value in saved_state.items():
        if key not in known and not isinstance(key, int):
            state[key] = deepcopy(value)
    loaded_groups = []
    for saved, group in zip(saved_groups, groups, strict=True):
        new = {k: deepcopy(v) for k, v in saved.items() if k not in ("params", "param_names")}
        new["params"] = group["params"]
        if "param_names" in group or "param_names" in saved:
            new["param_names"] = group["param_names"] if named else saved.get("param_names", group.get("param_names"))
        loaded_groups.append({**{k: v for k, v in optimizer.defaults.items() if k not in new}, **new})
    if not strict:  # parameters without a namesake keep what they have
        for _, p, index in source:
            if index is None and p in optimizer.state:
                state[p] = optimizer.state[p]
    optimizer.__setstate__({"state": state, "param_groups": loaded_groups})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _by_order(owner: str, saved: Any, groups: Any) -> list[tuple[str, torch.Tensor, int | None]]:
    for i, (s, g) in enumerate(zip(saved, groups, strict=True)):
        if len(s["params"]) != len(g["params"]):
            raise ValueError(
                f"{owner}: loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: group {i} has {len(s['params'])} parameters saved, {len(g['params'])} here"
            )
    return [
        (f"parameter {i} of group {index}", p, key)
        for index, (s, g) in enumerate(zip(saved, groups, strict=True))
        for i, (key, p) in enumerate(zip(s["params"], g["params"], strict=True))
    ]


def _by_name(owner: str, saved: Any, groups: Any, *, strict: bool) -> list[tuple[str, torch.Tensor, int | None]]:
    def names(groups: Any) -> Iterator[tuple[str, Any]]:
        for group in groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    there, here = dict(names(saved)), dict(names(groups))
    complaints = [
        f"{what}: {', '.join(sorted(missing)[:10])}{', ...' if len(missing) > 10 else ''}"
        for what, missing in (
            ("not in the state dict", here.keys() - there.keys()),
            ("only in the state dict", there.keys() - here.keys()),
        )
        if missing
    ]
    if complaints and strict:
        raise ValueError(f"{owner}: parameter names do not match: {'; '.join(complaints)}; strict=False loads the rest")
    if complaints:
        warnings.warn(f"{owner}: loaded only what has the same name; {'; '.join(complaints)}", stacklevel=4)
    return [(name, p, there.get(name)) for name, p in here.items()]


def _check(
    optimizer: "Optimizer", name: str, p: torch.Tensor, group: Mapping[str, Any], kept: Mapping[str, Any]
) -> None:
    owner = type(optimizer).__name__

    def check(key: str, shape: tuple[int, ...]) -> None:
        value = kept.get(key)
        if isinstance(value, torch.Tensor) and value.shape != shape:
            raise ValueError(
                f"{owner}: {key!r} of {name} has the shape {tuple(value.shape)} in the loaded state dict, "
                f"its parameter, {tuple(p.shape)}, needs {tuple(shape)}"
            )

    for state in optimizer._rule.states.values():
        codes, absmax = f"{state.name}_codes", f"{state.name}_absmax"
        if state.name in kept:
            check(state.name, state.shape(group, p))
        value = kept.get(state.name)
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
            raise ValueError(f"{owner}: {state.name!r} of {name} must be floating-point, got {value.dtype}")
        check(codes, p.shape)
        check(absmax, (blocks(p),))
        if codes in kept and (dtype := getattr(kept[codes], "dtype", None)) not in MAPS:
            raise ValueError(f"{owner}: {codes!r} of {name} must be int8 or uint8, got {dtype}, in the loaded state")
        if (codes in kept) != (absmax in kept):
            there, missing = (codes, absmax) if codes in kept else (absmax, codes)
            raise ValueError(f"{owner}: the loaded state dict has {there!r} of {name}, but no {missing!r}")


@torch.no_grad()
def _stored(
    optimizer: "Optimizer", p: torch.Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """A parameter's saved state, copied, as this optimizer stores it."""
    kept = {key: _copy(value, key, p) for key, value in saved.items()}
    for key in (f"{state.name}_absmax" for state in optimizer._rule.states.values()):
        if key in kept:  # a checkpoint may have been cast as a whole
            kept[key] = kept[key].to(torch.float32)
    if not parameter_storage(optimizer, p).kahan:
        kept.pop(COMPENSATION, None)
    for state in optimizer._rule.states.values():
        cell = find(saved, state.name)
        if cell is None:
            continue
        storage, _ = chosen(optimizer, p, state)
        if state.name not in optimizer._options.state_dtype:
            storage = cell.storage
        moved = storage.blockwise and significant_strides(cell.values) != significant_strides(p)
        if cell.storage != storage or moved:  # blocks are of neighbours in memory, which may be others here
            new, tensors = make(state.name, storage, p, state.shape(group, p))
            new.write(cell.read(torch.float32 if storage.dtype != torch.float64 else torch.float64).to(p.device))
            for key in keys_of(state.name, cell.storage):
                del kept[key]
            kept |= tensors
    return kept


@torch.no_grad()
def portable(optimizer: "Optimizer", state_dict: StateDict) -> StateDict:
    """`state_dict` as torch.optim's namesake loads it: values instead of codes, and no state that only schuss has."""
    rule, entries = optimizer._rule, {}
    for index, kept in state_dict["state"].items():
        plain = {key: value for key, value in kept.items() if key not in (COMPENSATION, EMA)}
        if not optimizer.has_step:
            plain.pop("step", None)
        for state in rule.states.values():
            cell = find(kept, state.name)
            if cell is not None and cell.storage.blockwise:
                for key in keys_of(state.name, cell.storage):
                    del plain[key]
                plain[state.name] = cell.read(torch.float32)
        if plain:
            entries[index] = plain
    return {**state_dict, "state": entries}


def _copy(value: Any, key: str, p: torch.Tensor) -> Any:
    """A copy on the parameter's device, in the dtype it was saved with; numbers per parameter stay where they are."""
    if not isinstance(value, torch.Tensor):
        return deepcopy(value)
    if key == "step" or (value.dim() == 0 and p.dim() != 0):
        return value.detach().clone()
    copied = value.detach().to(p.device)
    if copied.layout != torch.strided and p.layout == torch.strided:  # torch's SGD has sparse buffers
        copied = copied.to_dense()
    like = torch.empty_like(p, dtype=copied.dtype) if copied.shape == p.shape else torch.empty_like(copied)
    return like.copy_(copied).detach()
