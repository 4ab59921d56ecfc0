"""Combined: several optimizers as one, each with parameters of its own."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from operator import is_
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch.optim.optimizer import StateDict

from schuss import bounds
from schuss.engine.clip import SkippedStep, _factor, clip, refuse
from schuss.engine.pieces import EMA
from schuss.engine.route import check_gradient
from schuss.optimizer import Optimizer
from schuss.options import Nonfinite, Settings
from schuss.roles import check_matrices, names_of, takes_matrices_only
from schuss.wrappers.outer import Outer, _chain, _needs_closure, _params

if TYPE_CHECKING:
    from schuss.engine.bucket import Bucket
    from schuss.engine.plan import Plan

__all__ = ["Combined", "Plans"]

Group = dict[str, Any]
Make = Callable[[list[Group]], torch.optim.Optimizer]
KEY = "optimizer"
"""In a group: the name of the optimizer that it is for."""
SAVED = "optimizers"
"""In a state dict: which groups are whose. torch's classes do not look at it."""


class Combined(Outer):
    """Several optimizers as one: Muon for the hidden matrices and AdamW for the rest, say.

    Each inner optimizer has parameters of its own. One `step` steps them all, one `zero_grad` clears all gradients, one
    schedule drives all groups, and one state dict, in torch's layout, holds all state.

    Groups come in the order of the inner optimizers; those that are added later come last.

    Args:
        optimizers: the inner ones: schuss's, torch's, or others round them. They go by the names of their classes, with
            a 2 for the second of a class, or by the keys of a mapping.
        max_norm: limit of the norm of the gradients of all parameters together, in (0, inf]; see `Options`. Gradients
            of optimizers that are none of schuss's are scaled in place, as by `torch.nn.utils.clip_grad_norm_`. None
            (default): no limit. An inner optimizer must have none: it would know the norm of its part only.
        nonfinite: what a step does if max_norm finds a norm that is infinite or NaN, with all inner optimizers alike:
            "propagate" (default), "skip" or "raise"; see `Options`.

    Attributes:
        optimizers: name -> inner optimizer.

    Raises:
        ValueError: no optimizers; a parameter that two of them have; max_norm out of its bounds, or given to one of
            them; Muon with parameters that are no matrices.
        TypeError: what is no optimizer, or evaluates the loss itself, as LBFGS does.
    """

    _pickled = ("optimizers", "_order", "_options", "_skipped")

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer],
        *,
        max_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        self._options = Settings.parse("Combined", {"max_norm": max_norm, "nonfinite": nonfinite}, (), ())
        named = _named(optimizers)
        _check(named)
        super().__init__()
        self.optimizers = named
        self._order: list[int] = []
        """For each group, the index of the optimizer that has it."""
        self._skipped = 0
        self._reset()

    @classmethod
    def of(
        cls,
        groups: Iterable[Mapping[str, Any]],
        *,
        max_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
        **optimizers: Make,
    ) -> Self:
        """Make the inner optimizers from groups that say for which of them they are, in a key "optimizer".

        `schuss.param_groups(model, matrices={...})` makes such groups, for "matrices" and for "others":

            Combined.of(groups, matrices=optim.Muon, others=optim.AdamW)

        Args:
            groups: each with the name of its optimizer. They stay in this order.
            max_norm: as for `Combined`.
            nonfinite: as for `Combined`.
            optimizers: name -> what makes it from a list of groups: a class, or `functools.partial` of one. One that
                no group is for starts without parameters, and may get some by `add_param_group`.

        Raises:
            ValueError: a group without a name, or for an optimizer that is not given.
            TypeError: what is no optimizer.
        """
        given = [_listed(group) for group in groups]
        names = [*optimizers]
        for i, group in enumerate(given):
            if KEY not in group:
                raise ValueError(
                    f"Combined.of: group {i} has no key {KEY!r}, which says what it is for; param_groups(model, "
                    "matrices={...}) makes groups that have"
                )
            if group[KEY] not in optimizers:
                raise ValueError(
                    f"Combined.of: group {i} is for {group[KEY]!r}, and there {_are(names)}; give "
                    f"{group[KEY]}=optim.AdamW, say"
                )
        made = {}
        for name, make in optimizers.items():
            own = [group for group in given if group[KEY] == name]
            if isinstance(kind := getattr(make, "func", make), type) and takes_matrices_only(kind):
                check_matrices(kind.__name__, own)
            made[name] = make(own or [{"params": []}])  # torch's classes refuse an empty list
            if not own and isinstance(made[name], torch.optim.Optimizer):
                made[name].param_groups.clear()
        combined = cls(made, max_norm=max_norm, nonfinite=nonfinite)
        combined._order = [names.index(group[KEY]) for group in given]
        return combined

    def _reset(self) -> None:
        self._groups: list[Group] = []
        self._seen: list[Group] = []
        """What `_groups` was when it was last looked at, to know what others have written into it."""
        self.last_grad_norm: torch.Tensor | None = None
        """With max_norm: the norm of all gradients of the last step, before clipping; on their device."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()
        super().__setstate__({})

    @property
    def _inners(self) -> tuple[torch.optim.Optimizer, ...]:
        return tuple(self.__dict__.get("optimizers", {}).values())  # there are none yet in torch's constructor

    # --- the inner optimizers' own objects --------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:
        """The groups of all: the inner optimizers' own dicts."""
        return self._synchronized()

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        if inners := self._inners:
            order = [self._owner(group) for group in groups]
            for i, inner in enumerate(inners):
                inner.param_groups[:] = [group for group, owner in zip(groups, order, strict=True) if owner == i]
            self._order, self._groups, self._seen = order, groups, [*groups]

    def _synchronized(self) -> list[Group]:
        """The list of groups, after what others have done to it was done to the optimizers, and the other way round."""
        if not (inners := self._inners):
            return []
        if not _same(self._groups, self._seen):
            self.param_groups = self._groups
        own = [inner.param_groups for inner in inners]
        order, groups, taken = [], [], [0] * len(own)
        for i in (*self._order, *(i for i, theirs in enumerate(own) for _ in theirs)):  # first those that are known
            if taken[i] < len(own[i]):
                order.append(i)
                groups.append(own[i][taken[i]])
                taken[i] += 1
        if not _same(groups, self._seen):
            self._order, self._groups[:], self._seen = order, groups, groups  # one list: who has it sees what is new
        return self._groups

    def _owner(self, group: Mapping[str, Any]) -> int:
        """The index of the optimizer that has a group, or that it is for."""
        for i, inner in enumerate(self._inners):
            if any(group is own for own in inner.param_groups):
                return i
        if KEY in group:
            return self._index(group[KEY])
        owners = {self._index_of(p) for p in group["params"]}
        if len(owners) == 1 and (owner := owners.pop()) is not None:
            return owner
        if len(self.optimizers) == 1:
            return 0
        raise ValueError(f"Combined: the group must say in its key {KEY!r} what it is for: {_choices(self.optimizers)}")

    def _index_of(self, p: Any) -> int | None:
        """The index of the optimizer that has a parameter."""
        for i, inner in enumerate(self._inners):
            if any(p is own for group in inner.param_groups for own in group["params"]):
                return i
        return None

    def _index(self, name: Any) -> int:
        """The index of the optimizer that is meant by its name, its class's name, or its index."""
        names, classes = [*self.optimizers], [type(inner).__name__ for inner in self._inners]
        if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(names):
            return name
        if name in names:
            return names.index(name)
        if classes.count(name) == 1:
            return classes.index(name)
        for i, inner in enumerate(self._inners):
            if any(isinstance(part, Combined) and name in part.optimizers for part in _chain(inner)):
                return i
        raise ValueError(f"Combined: {KEY} must be one of {_choices(self.optimizers)}, got {name!r}")

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of all; of those that several have, the first's. What is written goes to all that have it."""
        return Defaults(self._inners)

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.defaults.update(defaults)

    def defaults_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of the inner optimizer that has a group, or that it is for."""
        return self._inners[self._owner(group)].defaults

    @property
    def state(self) -> Any:
        """Parameter -> its state in the optimizer that has it; live."""
        return States(self)

    @state.setter
    def state(self, state: Any) -> None:
        if inners := self._inners:
            entries = list(state.items())
            for inner in inners:
                inner.state = defaultdict(dict)
            for p, kept in entries:
                self.state[p] = kept

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling to `step`: as soon as an inner optimizer does it in its own."""
        return any(map(_unscales, self._inners))

    # --- what schuss's optimizers have beside torch's contract ------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """How many steps nonfinite="skip" has left out, here and in inner optimizers."""
        return self._skipped + sum(int(getattr(inner, "skipped_steps", 0)) for inner in self._inners)

    def plan(self) -> "Plans":
        """What a step does: print it to see the plans of all inner optimizers."""
        return Plans(self.optimizers)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages of the inner optimizers' ema_decay in the place of the parameters.

        Raises:
            RuntimeError: one of them keeps no averages.
        """
        inners = {name: inner for name, inner in self.optimizers.items() if inner.param_groups}
        if without := [name for name, inner in inners.items() if not _keeps_averages(inner)]:
            raise RuntimeError(
                f"Combined: no averages are kept by {' and '.join(without)}, and a model with averages in a part of it "
                "is none that was ever trained; make all inner optimizers with ema_decay=0.999, say"
            )
        with ExitStack() as stack:
            for inner in inners.values():
                stack.enter_context(cast("Optimizer | Outer", inner).averaged())
            yield

    # --- torch's contract -------------------------------------------------------------------------------------------

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._synchronized()
        found = getattr(self, "found_inf", None)
        for inner in self._inners[1:]:  # the first one changes nothing if it refuses
            with _with(inner, {"found_inf": found}) if found is not None else ExitStack():
                _check_ready(inner)
        if (handed := self._prepare()) is None:
            return loss
        for i, (inner, attributes) in enumerate(zip(self._inners, handed, strict=True)):
            try:
                with _with(inner, attributes) if attributes else ExitStack():
                    inner.step()
            except BaseException as error:
                if i:
                    names = [*self.optimizers]
                    stepped = " and ".join(names[:i])
                    error.add_note(f"Combined: {stepped} made this step already, {names[i]} did not finish it")
                raise
        return loss

    def _prepare(self) -> list[dict[str, Any]] | None:
        """What each optimizer is handed for this step, as a GradScaler would hand it; None if the step is left out.

        Gradients of those that take nothing are scaled in place.
        """
        inners, max_norm = self._inners, self._options.max_norm
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is scale is max_norm is None:
            return [{}] * len(inners)
        if found is not None and (max_norm is not None or not all(map(_unscales, inners))):
            if bounds.number(found):
                return None
            found = None
        factor = None
        if max_norm is not None:
            try:
                factor = self._clip(1.0 if scale is None else scale)
            except SkippedStep:
                self._skipped += 1
                return None
        handed = []
        for inner in inners:
            own_scale = scale
            if scale is not None and not _unscales(inner):
                own_scale = None
                _scale_in_place(inner, _inverse(scale))
            if factor is not None and not _is_ours(inner):
                _scale_in_place(inner, factor)
            elif factor is not None:
                own_scale = _inverse(factor) * (1.0 if own_scale is None else _host(own_scale))
            attributes = {"grad_scale": own_scale, "found_inf": found if _unscales(inner) else None}
            handed.append({name: value for name, value in attributes.items() if value is not None})
        return handed

    def _clip(self, scale: float | torch.Tensor) -> float | torch.Tensor:
        """What all gradients are to be multiplied by, beside 1 / scale."""
        from schuss.training.clipping import _is_plain, _norm

        plain: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for p in _params(self):
            if p.grad is not None and p.grad.numel():
                (plain if _is_plain(p.grad) else others).append(p.grad)
        clipped = clip(self._options, [cast("Bucket", _Measured(_norm(plain)))], others, _inverse(scale))
        self.last_grad_norm = clipped.norm
        refuse("Combined", self._options, clipped.known)
        return (
            _factor(clipped.known, cast("float", self._options.max_norm)) if clipped.factor is None else clipped.factor
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as each inner optimizer does."""
        for inner in self._inners:
            inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to one of the inner optimizers.

        Args:
            param_group: {"params": ..., "optimizer": the name of an inner optimizer, of its class, or its index, and
                hyperparameters that differ from its defaults}.

        Raises:
            ValueError: no or another "optimizer", a hyperparameter out of its bounds, a parameter that there is
                already, or that the optimizer is not for.
        """
        if not (inners := self._inners):
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"Combined: a group must be a dict, got {type(param_group).__name__}")
        group = _listed(param_group)
        if KEY not in group and len(inners) > 1:
            raise ValueError(
                f"Combined: a new group must say in its key {KEY!r} what it is for: {_choices(self.optimizers)}"
            )
        index = self._index(group.get(KEY, 0))
        name, inner = [*self.optimizers.items()][index]
        for called, p in names_of(group, len(self.param_groups)):
            if (other := self._index_of(p)) is not None and other != index:
                _refuse_shared(called, [*self.optimizers][other], name)
        if not any(isinstance(part, Combined) for part in _chain(inner)):  # else that one checks, and chooses further
            if any(takes_matrices_only(type(part)) for part in _chain(inner)):
                check_matrices(name, [group])
            group |= {KEY: name} if KEY in group else {}
        inner.add_param_group(group)
        self._synchronized()

    def _save(self) -> StateDict:
        numbers = {p: i for i, p in enumerate(_params(self))}
        state: dict[Any, Any] = {}
        groups: list[Group] = [{} for _ in self.param_groups]
        whose: dict[str, Any] = {}
        for i, (name, inner) in enumerate(self.optimizers.items()):
            saved = dict(inner.state_dict())
            entries, theirs = saved.pop("state"), saved.pop("param_groups")
            places = [place for place, owner in enumerate(self._order) if owner == i]
            number = {
                key: numbers[p]
                for there, here in zip(theirs, inner.param_groups, strict=True)
                for key, p in zip(there["params"], here["params"], strict=True)
            }
            state |= {number.get(key, key): kept for key, kept in entries.items()}
            for place, group in zip(places, theirs, strict=True):
                groups[place] = {**group, "params": [number[key] for key in group["params"]]}
            whose[name] = {"groups": places} | ({"more": saved} if saved else {})
        return {"state": state, "param_groups": groups, SAVED: whose}

    def _restore(self, state_dict: StateDict, *, strict: bool) -> None:
        state, whose = state_dict["state"], state_dict.get(SAVED, {})
        parts = self._parts(state_dict["param_groups"], whose)
        known = {key for groups in parts for group in groups for key in group["params"]}
        # Loading gives an optimizer new state and new groups, and leaves the old ones as they are.
        before = [(part, {**vars(part)}) for inner in self._inners for part in _chain(inner)]
        try:
            for i, ((name, inner), groups) in enumerate(zip(self.optimizers.items(), parts, strict=True)):
                own = {key for group in groups for key in group["params"]}
                entries = {k: kept for k, kept in state.items() if k in own or (i == 0 and k not in known)}
                part = {**whose.get(name, {}).get("more", {}), "state": entries, "param_groups": groups}
                lenient = not strict and "strict" in signature(inner.load_state_dict).parameters
                inner.load_state_dict(part, **({"strict": False} if lenient else {}))
        except BaseException:
            for optimizer, attributes in before:
                vars(optimizer).clear()
                vars(optimizer).update(attributes)
            raise

    def _parts(self, saved: Sequence[Group], whose: Mapping[str, Mapping[str, Any]]) -> list[list[Group]]:
        """The saved groups of each optimizer: of its namesake, or in the order in which they are here."""
        here = {name: len(inner.param_groups) for name, inner in self.optimizers.items()}
        if whose and whose.keys() != here.keys():
            raise ValueError(
                f"Combined: the state dict was saved of {_choices(whose)}, and here are {_choices(here)}; name them "
                "alike, as in Combined({'name': optimizer, ...})"
            )
        if len(saved) != len(self.param_groups):
            raise ValueError(
                f"Combined: loaded state dict has a different number of parameter groups: {len(saved)} saved, "
                f"{len(self.param_groups)} here; add or leave out groups before loading"
            )
        places = (
            [[*whose[name]["groups"]] for name in here]
            if whose
            else [[place for place, owner in enumerate(self._order) if owner == i] for i in range(len(here))]
        )
        for (name, count), own in zip(here.items(), places, strict=True):
            if len(own) != count:
                raise ValueError(f"Combined: {name} was saved with {len(own)} parameter groups, and has {count}")
        return [[saved[place] for place in own] for own in places]

    def __repr__(self) -> str:
        lines = []
        order = [*enumerate(self.param_groups)]
        for i, (name, inner) in enumerate(self.optimizers.items()):
            groups = {place: group for place, group in order if self._order[place] == i}
            kind = type(inner).__name__
            lines.append(f"  {name}: {'' if kind == name else kind + ', '}{_amount(inner)}")
            for place, group in groups.items():
                settings = [f"{key}={_short(group[key])}" for key in ("lr", "weight_decay") if key in group]
                lines.append(f"    group {place}: {', '.join([*settings, _amount(group)])}")
        return "\n".join(["Combined of", *lines])


class Defaults(dict[str, Any]):
    """`defaults` of several optimizers: what is written into it, they get.

    Args:
        optimizers: a key that some of them have is theirs; a new one all of them get.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__()
        self._optimizers = optimizers
        for optimizer in reversed(optimizers):
            super().update(optimizer.defaults)

    def __setitem__(self, key: str, value: Any) -> None:
        for optimizer in [o for o in self._optimizers if key in o.defaults] or self._optimizers:
            optimizer.defaults[key] = value
        super().__setitem__(key, value)

    def update(self, *others: Any, **more: Any) -> None:
        """As of a dict."""
        for key, value in dict(*others, **more).items():
            self[key] = value

    def setdefault(self, key: str, value: Any = None) -> Any:
        """As of a dict."""
        if key not in self:
            self[key] = value
        return self[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class States(MutableMapping[Any, Any]):
    """`optimizer.state` of several optimizers: each parameter's is with its own; live."""

    def __init__(self, combined: Combined) -> None:
        self._combined, self._all = combined, [inner.state for inner in combined._inners]

    def __getitem__(self, p: Any) -> Any:
        return self._of(p)[p]

    def __setitem__(self, p: Any, kept: Any) -> None:
        self._of(p)[p] = kept

    def __delitem__(self, p: Any) -> None:
        if p not in self:
            raise KeyError(p)
        del self._of(p)[p]

    def __contains__(self, p: object) -> bool:
        return any(p in state for state in self._all)

    def get(self, p: Any, default: Any = None) -> Any:
        """A parameter's state, without making one."""
        if p in self:
            return self[p]
        return default

    def __iter__(self) -> Iterator[Any]:
        for state in self._all:
            yield from state

    def __len__(self) -> int:
        return sum(map(len, self._all))

    def __bool__(self) -> bool:
        # Who makes its state at once, as Adagrad, must not hide that the others have none yet: by this truth
        # torch.distributed.checkpoint decides whether to make state, by a step, to load into.
        if all(self._all):
            return True
        return any(
            not isinstance(kept, Mapping) or _has_stepped(kept) for state in self._all for kept in state.values()
        )

    def __repr__(self) -> str:
        return repr(dict(self))

    def _of(self, p: Any) -> Any:
        """The state that a parameter's is in, or will be in."""
        if (there := next((state for state in self._all if p in state), None)) is not None:
            return there
        return self._all[self._combined._index_of(p) or 0]  # what is of no parameter, the first one has


class Plans(Mapping[str, Any]):
    """The plans of several optimizers by their names; None for one that is none of schuss's.

    Args:
        optimizers: name -> optimizer.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self._plans: dict[str, Plan | Plans | None] = {}
        self._texts: list[str] = []
        for name, optimizer in optimizers.items():
            ours = isinstance([*_chain(optimizer)][-1], Optimizer) or isinstance(optimizer, Combined)
            plan = cast("Optimizer | Outer", optimizer).plan() if ours else None
            text = (
                f"{type(optimizer).__name__}: {_amount(optimizer)}, which its own code steps"
                if plan is None
                else f"{plan}"
            )
            self._plans[name] = plan
            self._texts.append(text if name == type(optimizer).__name__ else f"{name} = {text}")

    def __getitem__(self, name: str) -> Any:
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def __str__(self) -> str:
        return "\n\n".join(self._texts)

    @property
    def state_bytes(self) -> int:
        """Bytes of state, as far as there are plans."""
        return sum(plan.state_bytes for plan in self._plans.values() if plan is not None)

    @property
    def traffic_bytes(self) -> int:
        """Bytes that a step must move, as far as there are plans."""
        return sum(plan.traffic_bytes for plan in self._plans.values() if plan is not None)


class _Measured:
    """Gradients whose norm is known, as the engine takes them."""

    on_device = False

    def __init__(self, norm: float) -> None:
        self._norm = norm

    def square_sum(self) -> float:
        return self._norm**2


# --- what an inner optimizer is --------------------------------------------------------------------------------------


def _named(optimizers: Any) -> dict[str, torch.optim.Optimizer]:
    if isinstance(optimizers, (torch.optim.Optimizer, str, type)) or not isinstance(optimizers, Iterable):
        raise TypeError(
            f"Combined: optimizers must be a list of optimizers, or a dict of them by name, got "
            f"{getattr(optimizers, '__name__', type(optimizers).__name__)}"
        )
    given = [*optimizers.items()] if isinstance(optimizers, Mapping) else [("", inner) for inner in optimizers]
    named: dict[str, torch.optim.Optimizer] = {}
    seen: Counter[str] = Counter()
    for i, (name, inner) in enumerate(given):
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                f"Combined: optimizer {name or i} must be a torch.optim.Optimizer that has been made, got "
                f"{getattr(inner, '__name__', type(inner).__name__)}"
            )
        if not isinstance(name, str):
            raise TypeError(f"Combined: an optimizer's name must be a string, got {name!r}")
        kind = type(inner).__name__
        seen[kind] += 1
        named[name or kind + (str(seen[kind]) if seen[kind] > 1 else "")] = inner
    if not named:
        raise ValueError("Combined: there must be one optimizer at least, got none")
    return named


def _check(optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    whose: dict[int, str] = {}
    for name, inner in optimizers.items():
        for i, group in enumerate(inner.param_groups):
            for called, p in names_of(group, i):
                if whose.setdefault(id(p), name) != name:
                    _refuse_shared(called, whose[id(p)], name)
        for part in _chain(inner):
            kind = type(part).__name__
            if takes_matrices_only(type(part)):
                check_matrices(kind, part.param_groups)
            if isinstance(options := getattr(part, "_options", None), Settings) and options.max_norm is not None:
                raise ValueError(
                    f"Combined: {kind} must have no max_norm of its own, got {options.max_norm}: it would clip by the "
                    "norm of its gradients alone; give it to Combined(..., max_norm=...), which clips by that of all"
                )
        if (several := _needs_closure(inner)) is not None:
            raise TypeError(
                f"Combined: {type(several).__name__} evaluates the loss several times in a step, while the parameters "
                "of the other optimizers stand still; step it by itself"
            )


def _refuse_shared(called: str, one: str, other: str) -> None:
    raise ValueError(f"Combined: {called} is in {one} and in {other}; a parameter must be in one optimizer only")


def _is_ours(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all that step in it take any number as `grad_scale`."""
    return all(isinstance(part, (Optimizer, Outer)) for part in _chain(optimizer))


def _unscales(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _keeps_averages(optimizer: torch.optim.Optimizer) -> bool:
    leaves = [part for part in _chain(optimizer) if not isinstance(part, Outer) and part.param_groups]
    return all(isinstance(leaf, Optimizer) and EMA in leaf._rule.states for leaf in leaves)


def _has_stepped(kept: Mapping[str, Any]) -> bool:
    return bool(kept) and bounds.number(kept.get("step", 1)) != 0


def _check_ready(optimizer: torch.optim.Optimizer) -> None:
    """Raise on what an optimizer would refuse in its step, as far as can be known."""
    for leaf in _chain(optimizer):
        kind = type(leaf).__name__
        if isinstance(leaf, (Optimizer, Outer)):
            leaf._check_ready()
        if isinstance(leaf, Optimizer):
            leaf._check_gradients()
        needs_sparse = isinstance(leaf, torch.optim.SparseAdam)
        takes_sparse = isinstance(leaf, _TAKE_SPARSE) or not type(leaf).__module__.startswith("torch.optim.")
        for index, group in enumerate(() if isinstance(leaf, Outer) else leaf.param_groups):
            is_asked = needs_sparse or bool(group.get("capturable"))
            for i, p in enumerate(group["params"]):
                if (g := p.grad) is None:
                    continue
                if g.layout is torch.strided and g.shape == p.shape and not is_asked:
                    continue
                name = group["param_names"][i] if "param_names" in group else f"parameter {i} of group {index}"
                if isinstance(leaf, Optimizer):
                    check_gradient(leaf, name, p, g, group)
                elif needs_sparse if g.layout is torch.strided else not takes_sparse:
                    raise RuntimeError(
                        f"Combined: {kind} does not support {'dense' if needs_sparse else 'sparse'} gradients, and "
                        f"{name} has one; nothing was changed"
                    )


_TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)


# --- gradients -------------------------------------------------------------------------------------------------------


@contextmanager
def _with(optimizer: torch.optim.Optimizer, attributes: Mapping[str, Any]) -> Iterator[None]:
    """An optimizer with attributes for a step; a scale that it has already counts, too."""
    before = {name: getattr(optimizer, name) for name in attributes if hasattr(optimizer, name)}
    try:
        for name, value in attributes.items():
            own = before.get(name) if name == "grad_scale" else None
            setattr(optimizer, name, value if own is None else own * value)
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(optimizer, name, before[name])
            else:
                delattr(optimizer, name)


@torch.no_grad()
def _scale_in_place(optimizer: torch.optim.Optimizer, by: float | torch.Tensor) -> None:
    if isinstance(by, float) and by == 1:
        return
    grads: dict[torch.device, list[torch.Tensor]] = {}
    for p in _params(optimizer):
        if (g := p.grad) is not None:
            if g.layout is torch.strided:
                grads.setdefault(g.device, []).append(g)
            else:
                g.mul_(by)
    for device, there in grads.items():
        torch._foreach_mul_(there, by.to(device) if isinstance(by, torch.Tensor) else by)


def _host(number: float | torch.Tensor) -> float | torch.Tensor:
    """A number, or a float64 tensor if it is on a device, for which nobody waits."""
    if isinstance(number, torch.Tensor) and number.device.type != "cpu":
        return number.to(torch.float64)
    return bounds.number(number)


def _inverse(number: float | torch.Tensor) -> float | torch.Tensor:
    known = _host(number)
    if isinstance(known, float) and known == 0:
        return math.inf
    return 1.0 / known


# --- words -----------------------------------------------------------------------------------------------------------


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _listed(group: Mapping[str, Any]) -> Group:
    """A copy of a group whose parameters can be looked at more than once."""
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("Combined: params must have an order, which a set has not; give a list")
    return {**group, "params": [params] if isinstance(params, torch.Tensor) else [*params]}


def _choices(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _are(names: Sequence[str]) -> str:
    return f"are {_choices(names)}" if names else "are no optimizers"


def _amount(of: torch.optim.Optimizer | Group) -> str:
    params = _params(of) if isinstance(of, torch.optim.Optimizer) else of["params"]
    count, elements = len(params), sum(p.numel() for p in params)
    return f"{count:,} tensor{'s' * (count != 1)}, {elements:,} element{'s' * (elements != 1)}"


def _short(value: Any) -> str:
    return f"{bounds.number(value):.6g}" if isinstance(value, (int, float, torch.Tensor)) else repr(value)
