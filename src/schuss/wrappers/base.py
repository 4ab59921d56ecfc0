"""What every optimizer round another one shares: it is a `torch.optim.Optimizer` itself, and keeps its whole contract.

Groups and defaults are the inner optimizer's own objects, asked for at each use. The wrapper's state is kept apart from
the inner one's, because optimizers take a parameter for stepped as soon as it has any state; they are one in
`optimizer.state` and in `state_dict()`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch.optim.optimizer import StateDict

from schuss import bounds
from schuss.optimizer import Optimizer
from schuss.wrappers.outer import Outer
from schuss.wrappers.outer import _chain as _chain
from schuss.wrappers.outer import _params as _params

if TYPE_CHECKING:
    from schuss.engine.plan import Plan
    from schuss.wrappers.combined import Plans

Own = dict[torch.Tensor, dict[str, Any]]


class Wrapper(Outer):
    """Base of optimizers that hold another one and let it step.

    A subclass says what it keeps per parameter (in `self._own[p]`, under `self._key(name)`), and writes `_step`, using
    `_step_inner`. Saving, loading, copying, hooks, gradient scaling, schedulers and nesting are done here.

    The inner optimizer's class can load its state dict, too; what is the wrapper's, it carries along unused. And it
    loads what the inner optimizer's class has saved: then the wrapper starts anew.

    Attributes:
        name: what its keys in groups and state begin with: "lookahead" makes "lookahead_slow", and "lookahead2_slow"
            for one that holds another of the same name.
        bounds: setting -> interval such as "[0, 1]".

    Args:
        inner: the optimizer to wrap: schuss's, torch's, or another wrapper.
        settings: hyperparameters; kept in every group as `self._key(name)`, where a scheduler may drive them.

    Raises:
        TypeError: `inner` is no optimizer, or a setting no number.
        ValueError: a setting out of its bounds.
    """

    name: ClassVar[str]
    bounds: ClassVar[Mapping[str, str]] = {}
    _pickled: ClassVar[tuple[str, ...]] = ("inner", "_own", "_prefix", "_settings")

    def __init__(self, inner: torch.optim.Optimizer, settings: Mapping[str, Any]) -> None:
        if not isinstance(inner, torch.optim.Optimizer):
            owner = type(self).__name__
            raise TypeError(
                f"{owner}: the inner optimizer must be a torch.optim.Optimizer that has been made, got "
                f"{getattr(inner, '__name__', type(inner).__name__)}; write {owner}(optim.SGD(parameters, lr=0.1))"
            )
        super().__init__()
        self.inner = inner
        alike = sum(other.name == self.name for other in _chain(inner) if isinstance(other, Wrapper))
        self._prefix = f"{self.name}{alike + 1 if alike else ''}_"
        self._settings = {self._key(name): value for name, value in settings.items()}
        self._own: Own = {}
        self._check(self._settings)
        for group in (self.defaults, *self.param_groups):  # new groups get them whoever they are added by
            group.update(self._settings)

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _of_wrapper(self, kept: Mapping[Any, Any]) -> dict[str, Any]:
        return {key: value for key, value in kept.items() if str(key).startswith(self._prefix)}

    def _setting(self, group: Mapping[str, Any], name: str) -> Any:
        key = self._prefix + name
        return group.get(key, self._settings[key])  # a checkpoint loaded by the inner optimizer has none

    def _check(self, group: Mapping[str, Any]) -> None:
        for name, bound in self.bounds.items():
            if (key := self._key(name)) in group:
                bounds.check(type(self).__name__, name, group[key], bound)

    @property
    def _inners(self) -> tuple[torch.optim.Optimizer, ...]:
        return (self.inner,)

    # --- the inner optimizer's own objects --------------------------------------------------------------------------
    # Setters let torch's constructor pass, which runs before there is an inner optimizer.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups: the inner optimizer's list itself."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "inner" in self.__dict__:
            self.inner.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if "inner" in self.__dict__:
            self.inner.defaults = defaults

    @property
    def state(self) -> Any:
        """Parameter -> its state, the wrapper's and the inner optimizer's as one; live."""
        return States(self._own, self.inner.state, self._prefix)

    @state.setter
    def state(self, state: Any) -> None:
        if "inner" in self.__dict__:
            entries = list(state.items())
            self._own, self.inner.state = {}, defaultdict(dict)
            for p, kept in entries:
                self.state[p] = kept

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling to `step`."""
        return bool(getattr(self.inner, "_step_supports_amp_scaling", False))

    @property
    def grad_scale(self) -> Any:
        """What gradients are to be divided by; handed to the inner optimizer. AttributeError if it is not set."""
        return self.inner.grad_scale  # type: ignore[attr-defined]

    @grad_scale.setter
    def grad_scale(self, scale: Any) -> None:
        self.inner.grad_scale = scale  # type: ignore[attr-defined]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self.inner.grad_scale  # type: ignore[attr-defined]

    @property
    def found_inf(self) -> Any:
        """Whether the step is to be skipped; handed to the inner optimizer. AttributeError if it is not set."""
        return self.inner.found_inf  # type: ignore[attr-defined]

    @found_inf.setter
    def found_inf(self, found: Any) -> None:
        self.inner.found_inf = found  # type: ignore[attr-defined]

    @found_inf.deleter
    def found_inf(self) -> None:
        del self.inner.found_inf  # type: ignore[attr-defined]

    # --- what schuss's optimizers have beside torch's contract ------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """How many steps the inner optimizer's nonfinite="skip" has left out; 0 if it has no such thing."""
        return int(getattr(self.inner, "skipped_steps", 0))

    @property
    def last_grad_norm(self) -> torch.Tensor | None:
        """The norm of all gradients that the inner optimizer's max_norm found; None if it has no such thing."""
        norm: torch.Tensor | None = getattr(self.inner, "last_grad_norm", None)
        return norm

    def plan(self) -> "Plan | Plans":
        """What a step of the inner optimizer does; AttributeError if it is none of schuss's."""
        return self._ours("plan()").plan()

    def averaged(self) -> AbstractContextManager[None]:
        """The averages of the inner optimizer's ema_decay in the place of the parameters.

        Raises:
            AttributeError: it is none of schuss's.
            RuntimeError: it keeps no averages.
        """
        return self._ours("averaged()").averaged()

    def _ours(self, what: str) -> Optimizer | Outer:
        if not isinstance(self.inner, (Optimizer, Outer)):
            cls = type(self.inner)
            raise AttributeError(
                f"{type(self).__name__}: {what} is of schuss's optimizers; {cls.__qualname__} has none"
            )
        return self.inner

    # --- torch's contract -------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the inner optimizer does."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the inner optimizer, and so to this one.

        Args:
            param_group: {"params": ..., and hyperparameters that differ from the defaults}.

        Raises:
            ValueError: a hyperparameter out of its bounds, or a parameter that the optimizer has already.
        """
        if "inner" not in self.__dict__:
            return
        if isinstance(param_group, dict):
            self._check(param_group)
        self.inner.add_param_group(param_group)

    def _save(self) -> StateDict:
        state_dict: StateDict = dict(self.inner.state_dict())
        entries = dict(state_dict["state"])
        numbered = [*enumerate(_params(self.inner))]
        # Who counts the steps of each parameter has no state of one that has made none, and, as torch.optim.Adam,
        # takes no other to load; and neither has the wrapper anything to say of it.
        made = [kept for index, _ in numbered if (kept := entries.get(index))]
        counts = bool(made) and all("step" in kept for kept in made)
        for index, p in numbered:
            kept = entries.get(index, {})
            left_over = self._of_wrapper(kept)  # of another wrapper, which it was before
            own = self._saved(p) if kept or not counts else {}
            if left_over or own:
                entries[index] = {k: v for k, v in kept.items() if k not in left_over} | own
        state_dict["state"] = entries
        return state_dict

    def _restore(self, state_dict: StateDict, *, strict: bool) -> None:
        # Which saved entry is whose, by order or by name, is the inner optimizer's to know: what is the wrapper's
        # passes through it as one object that it does not look into.
        parcel = self._prefix.rstrip("_")
        entries = dict(state_dict["state"])
        for index, kept in entries.items():
            if isinstance(kept, Mapping) and (own := self._of_wrapper(kept)):
                entries[index] = {key: kept[key] for key in kept if key not in own} | {parcel: Parcel(own)}
        more = {} if strict else {"strict": False}
        self.inner.load_state_dict({**state_dict, "state": entries}, **more)
        parcels = {}
        for p in _params(self.inner):
            if p in self.inner.state and parcel in (kept := self.inner.state[p]):
                parcels[p] = kept[parcel].content
                del kept[parcel]
                if not kept:
                    del self.inner.state[p]
        found = {p: {key: self._copied(value, key, p) for key, value in own.items()} for p, own in parcels.items()}
        for group in self.param_groups:
            for key, value in self._settings.items():
                group.setdefault(key, value)
        self._load(found)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.inner!r}"

    # --- what subclasses use, and may override ----------------------------------------------------------------------

    def _step_inner(self, closure: Callable[[], float] | None) -> tuple[float | None, bool]:
        """Let the inner optimizer step; the loss, and whether it has stepped or skipped non-finite gradients."""
        inner = self.inner
        before = getattr(inner, "skipped_steps", 0)
        loss = inner.step() if closure is None else inner.step(closure)
        found = getattr(inner, "found_inf", None)
        return loss, getattr(inner, "skipped_steps", 0) == before and not (found is not None and found.item())

    def _saved(self, p: torch.Tensor) -> dict[str, Any]:
        """What `state_dict` has of a parameter beside the inner optimizer's state."""
        return self._own.get(p, {})

    def _load(self, found: Own) -> None:
        """Take over what was loaded; nothing, if it was the inner optimizer's own checkpoint."""
        self._own = self._own | found if found else {}

    def _copied(self, value: Any, key: str, p: torch.Tensor) -> Any:
        """A loaded value as this wrapper keeps it: what is one number per element, as `wide(p)` and laid out like p."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() == 0 and p.dim() != 0:
            return value.detach().clone()
        if value.shape != p.shape:
            number = [q is p for q in _params(self.inner)].index(True)
            raise ValueError(
                f"{type(self).__name__}: {key!r} of parameter {number} has the shape {tuple(value.shape)} in the "
                f"loaded state dict, its parameter has {tuple(p.shape)}"
            )
        return torch.empty_like(p, dtype=wide(p)).detach().copy_(value.detach())


def wide(p: torch.Tensor) -> torch.dtype:
    """The dtype of what is kept of a parameter over many steps: its own, but float32 at least."""
    return torch.promote_types(p.dtype, torch.float32)


class Parcel:
    """What passes through the inner optimizer's `load_state_dict` as it is."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class States(MutableMapping[Any, Any]):
    """`optimizer.state` of a wrapper: its own state and the inner optimizer's, both live.

    Args:
        own: parameter -> what is the wrapper's.
        inner: the inner optimizer's `state`.
        prefix: what the wrapper's keys begin with.
    """

    def __init__(self, own: Own, inner: MutableMapping[Any, Any], prefix: str) -> None:
        self._own, self._inner, self._prefix = own, inner, prefix

    def __getitem__(self, p: Any) -> Any:
        entry = self._inner[p]
        return Entry(self._own[p], entry) if p in self._own else entry

    def __setitem__(self, p: Any, kept: Any) -> None:
        if isinstance(kept, Mapping):
            own = {key: value for key, value in kept.items() if str(key).startswith(self._prefix)}
            if own:
                self._own[p] = own
                kept = {key: value for key, value in kept.items() if key not in own}
        self._inner[p] = kept

    def __delitem__(self, p: Any) -> None:
        if p not in self:
            raise KeyError(p)
        self._own.pop(p, None)
        self._inner.pop(p, None)

    def __contains__(self, p: object) -> bool:
        return p in self._inner or p in self._own

    def get(self, p: Any, default: Any = None) -> Any:
        """A parameter's state, without making one."""
        if p in self:
            return self[p]
        return default

    def __iter__(self) -> Iterator[Any]:
        yield from dict.fromkeys([*self._inner, *self._own])

    def __len__(self) -> int:
        return len({*self._inner, *self._own})

    def __repr__(self) -> str:
        return repr(dict(self))


class Entry(MutableMapping[str, Any]):
    """A parameter's state in a wrapper: what is written goes where the key is, a new one to the inner optimizer."""

    def __init__(self, own: dict[str, Any], inner: MutableMapping[str, Any]) -> None:
        self._own, self._inner = own, inner

    def __getitem__(self, key: str) -> Any:
        return self._own[key] if key in self._own else self._inner[key]

    def __setitem__(self, key: str, value: Any) -> None:
        (self._own if key in self._own else self._inner)[key] = value

    def __delitem__(self, key: str) -> None:
        del (self._own if key in self._own else self._inner)[key]

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._inner, *self._own])

    def __len__(self) -> int:
        return len({*self._inner, *self._own})

    def __repr__(self) -> str:
        return repr(dict(self))
