"""What has a state that a checkpoint can keep: objects with `state_dict`, generators of random numbers, loaders."""

import inspect
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""The classes of generators of random numbers."""
_PROTOCOL = ("state_dict", "load_state_dict")


def has_state(of: Any) -> bool:
    """Whether it is a generator, or saves and loads its state itself."""
    return isinstance(of, RANDOM) or all(callable(getattr(of, name, None)) for name in _PROTOCOL)


def state_of(of: Any) -> Any:
    """The state, in values that `encode` takes."""
    if isinstance(of, torch.Generator):
        return of.get_state()
    if isinstance(of, np.random.Generator):
        return of.bit_generator.state
    if isinstance(of, np.random.RandomState):
        return of.get_state(legacy=False)
    if isinstance(of, random.Random):
        version, numbers, gauss = of.getstate()
        return {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss}
    return of.state_dict()


def remembered(of: Any) -> Callable[[], object]:
    """What puts back the state of a generator as it is now; `state_of` is for what is written down, and slower."""
    if isinstance(of, random.Random):
        return partial(of.setstate, of.getstate())
    return partial(restore, of, state_of(of), strict=True)


def restore(of: Any, state: Any, *, strict: bool) -> None:
    """Give something the state that `state_of` has returned; `strict` is for those that know it."""
    if isinstance(of, torch.Generator):
        of.set_state(state.cpu())  # map_location may have moved it
    elif isinstance(of, np.random.Generator):
        of.bit_generator.state = state
    elif isinstance(of, np.random.RandomState):
        of.set_state(state)
    elif isinstance(of, random.Random):
        of.setstate((state["version"], tuple(state["numbers"].tolist()), state["gauss"]))
    elif "strict" in inspect.signature(of.load_state_dict).parameters:
        of.load_state_dict(state, strict=strict)
    else:
        of.load_state_dict(state)


def generators_here() -> dict[str, Any]:
    """The generators that nobody has to name."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return {
        "python": _owner(random.getstate),
        "numpy": _owner(np.random.get_state),
        "torch": torch.default_generator,
        **{f"cuda:{i}": generator for i, generator in enumerate(cuda)},
    }


def _owner(method: Any) -> Any:
    return method.__self__


class Loader:
    """A DataLoader: its own state if it has one, as torchdata's StatefulDataLoader has, else what in it has one."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader if has_state(loader) else None
        self.pieces: dict[str, Any] = {}
        inside = {"sampler": loader.sampler, "batch_sampler": loader.batch_sampler, "dataset": loader.dataset}
        for name, owner in {"loader": loader, **({} if self._loader else inside)}.items():
            if owner is not loader and has_state(owner):
                self.pieces[name] = owner
            elif isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                self.pieces[f"{name}.generator"] = generator

    def state_dict(self) -> dict[str, Any]:
        position = {} if self._loader is None else {"position": state_of(self._loader)}
        return position | {name: state_of(piece) for name, piece in self.pieces.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        if self._loader is not None and "position" in state_dict:
            restore(self._loader, state_dict["position"], strict=strict)
            # It makes its iterator now and draws a seed, not in the run, after the generators are restored.
            self._loader.state_dict()  # type: ignore[attr-defined]
        here, there = {*self.pieces}, {*state_dict} - {"position"}
        if strict and here != there:
            saved, own = (", ".join(sorted(names)) or "nothing" for names in (there, here))
            raise ValueError(f"saved of the loader: {saved}; to load here: {own}")
        for name, piece in self.pieces.items():
            if name in state_dict:
                restore(piece, state_dict[name], strict=strict)
