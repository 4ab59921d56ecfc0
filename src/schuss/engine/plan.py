"""The plan of a step: made once, kept until something changes.

It knows for each tensor its back end, its row of addresses and its row of scalars. A step compares the plan with what
is there, computes the few numbers that changed, and launches one kernel for all tensors of a dtype.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from schuss.engine import foreach, numba, reference
from schuss.engine.bucket import Bucket
from schuss.engine.pieces import Pieces
from schuss.engine.report import render
from schuss.engine.route import SHARED, Route, check_gradient, overlapping, route, state_of
from schuss.engine.watch import CHANGED, Same
from schuss.rule import Variant

if TYPE_CHECKING:
    from schuss.optimizer import Optimizer


@dataclass(eq=False)
class Entry:
    """One parameter in the plan."""

    name: str
    p: torch.Tensor
    group: int
    variant: Variant
    route: Route
    state_bytes: int = 0

    @property
    def traffic_bytes(self) -> int:
        """Bytes that a step must move: p and state read and written, the gradient read."""
        return 3 * self.p.numel() * self.p.element_size() + 2 * self.state_bytes


class Plan:
    """How one optimizer's step runs.

    Args:
        optimizer: whose step. The plan keeps no reference to it, so that dropping an optimizer frees its state at once.
        made: takes down the parameters that get state, and the names of what they had. Without it no state is made:
            such a plan is only looked at, and made again by the first step.
    """

    def __init__(self, optimizer: "Optimizer", made: list[tuple[torch.Tensor, set[str]]] | None = None) -> None:
        rule = self._rule = optimizer._rule
        groups = optimizer.param_groups
        self._getter = _items(rule.keys)
        self._values: list[tuple[Any, ...]] = [self._getter(group) for group in groups]
        self._live = _any_tensor(self._values)
        self._variants = [rule.variant(group) for group in groups]
        self._hyper = np.array([rule.numbers(group) for group in groups], np.float64)
        self._same_params = Same(chain.from_iterable(map(_params, groups)))
        self.entries = self._route(optimizer)

        for e in self.entries:
            kept = state_of(optimizer, e.p)
            e.state_bytes = sum(
                e.p.numel() * (e.p if kept.get(state.name) is None else kept[state.name]).element_size()
                for state in rule.present(e.variant)
            )

        self._only_looked_at = made is None
        self._idle: list[torch.Tensor] = []
        self._eager: list[Entry] = []
        fresh: set[int] = set()
        members: dict[Any, list[Entry]] = {}
        for e in self.entries:
            has_state = self._has_state(optimizer, e)
            if made is not None and e.p.grad is not None and not has_state:
                made.append((e.p, set(state_of(optimizer, e.p))))
                optimizer._make_state(e.p, groups[e.group])
                fresh.add(id(e.p))
                has_state = True
            if not has_state:
                self._idle.append(e.p)
            elif e.route.backend != "numba":
                self._eager.append(e)
            elif made is not None:
                kept = state_of(optimizer, e.p)
                scalar_dtypes = tuple(kept[name].dtype for name in rule.scalar_states)
                key = (e.variant, e.p.is_complex(), self._dtypes(optimizer, e), scalar_dtypes)
                members.setdefault(key, []).append(e)
        self._first = {id(e.p) for e in self._eager} & fresh
        self._state = optimizer.state
        self._same_state_keys = Same(optimizer.state)
        self._same_state_values = Same(optimizer.state.values())
        self._buckets = [Bucket(rule, optimizer, entries, fresh) for entries in members.values()]

    # --- looking at it ----------------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """Bytes of state, of all parameters (numbers kept per parameter left out)."""
        return sum(e.state_bytes for e in self.entries)

    @property
    def traffic_bytes(self) -> int:
        """Bytes that a step must move when every parameter has a gradient: all read once, all but gradients written."""
        return sum(e.traffic_bytes for e in self.entries)

    def __str__(self) -> str:
        return render(self._rule.owner, self.entries, self.state_bytes, self.traffic_bytes)

    # --- routing ----------------------------------------------------------------------------------------------------

    def _route(self, optimizer: "Optimizer") -> list[Entry]:
        """An entry per parameter. Raises, before anything is changed, on what no back end can do."""
        entries = []
        for index, group in enumerate(optimizer.param_groups):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = names[i] if names else f"parameter {i} of group {index}"
                if p.grad is not None:
                    check_gradient(optimizer, name, p, p.grad, group)
                entries.append(Entry(name, p, index, self._variants[index], route(optimizer, name, p, group)))
        for i in overlapping([e.p for e in entries]):
            if entries[i].route.backend == "numba":
                entries[i].route = SHARED
        return entries

    def _has_state(self, optimizer: "Optimizer", e: Entry) -> bool:
        kept = state_of(optimizer, e.p)
        names = [*self._rule.scalar_states, *(state.name for state in self._rule.present(e.variant))]
        return all(kept.get(name) is not None for name in names)

    def _dtypes(self, optimizer: "Optimizer", e: Entry) -> tuple[torch.dtype, ...]:
        states = [s for s in self._states(optimizer, e).values() if s is not None]
        tensors = [e.p, e.p if e.p.grad is None else e.p.grad, *states]
        return tuple(numba.real(t.dtype) for t in tensors)

    def _states(self, optimizer: "Optimizer", e: Entry) -> dict[str, torch.Tensor | None]:
        """The states of a parameter by letter."""
        kept, states = state_of(optimizer, e.p), self._rule.states
        return {n: kept[states[n].name] if there else None for n, there in self._rule.letters(e.variant).items()}

    # --- a step -----------------------------------------------------------------------------------------------------

    def is_current(self, optimizer: "Optimizer") -> bool:
        """Whether everything but gradients and tensors' memory is as it was when the plan was made."""
        groups, state = optimizer.param_groups, optimizer.state
        return (
            not self._only_looked_at
            and len(groups) == len(self._values)
            and state is self._state
            and self._same_params(list(chain.from_iterable(map(_params, groups))))
            and self._same_state_keys(list(state))
            and self._same_state_values(list(state.values()))
            and self._take_over(list(map(self._getter, groups)))
        )

    def _take_over(self, values: list[tuple[Any, ...]]) -> bool:
        """Take over new hyperparameters; False if they choose another form of the rule or another back end."""
        try:
            if not self._live and values == self._values:
                return True
        except RuntimeError:  # a tensor took the place of a number
            pass
        live, rule = _any_tensor(values), self._rule
        for key, old, new in zip(rule.keys, zip(*self._values, strict=True), zip(*values, strict=True), strict=True):
            if not (live or self._live) and old == new:
                continue
            if rule.chooses(key) and list(map(bool, old)) != list(map(bool, new)):
                return False
            if (column := rule.columns.get(key)) is not None:
                self._hyper[:, column] = [rule.numbers_of(key, value) for value in new]
                for bucket in self._buckets:
                    bucket.hyper_changed = True
                    bucket.pieces_changed |= key == "weight_decay"
        self._values, self._live = values, live
        return True

    def run(self, optimizer: "Optimizer", gain: float) -> bool:
        """One step; `gain` multiplies every gradient. False, with nothing done, if the plan must be made anew."""
        for bucket in self._buckets:
            if bucket.compare(list(map(_grad, bucket.params))) == CHANGED:
                return False
        if any(p.grad is not None for p in self._idle) or not self._eager_routes_hold(optimizer):
            return False
        for bucket in self._buckets:
            bucket.prepare(self._hyper, gain)
        for bucket in self._buckets:
            bucket.launch()
        if self._eager:
            self._run_eager(optimizer, gain)
        return True

    def has_run(self, p: torch.Tensor) -> bool:
        """Whether a parameter whose state this plan has made has been updated since."""
        return id(p) not in self._first and all(bucket.has_run(p) for bucket in self._buckets)

    def _eager_routes_hold(self, optimizer: "Optimizer") -> bool:
        groups = optimizer.param_groups
        for e in self._eager:
            if e.p.grad is not None:
                check_gradient(optimizer, e.name, e.p, e.p.grad, groups[e.group])
                if e.route != SHARED and route(optimizer, e.name, e.p, groups[e.group]) != e.route:
                    return False
        return True

    def _run_eager(self, optimizer: "Optimizer", gain: float) -> None:
        """Update the tensors that are not for kernels, one by one or as lists."""
        rule = self._rule
        lists: dict[Any, list[tuple[Entry, torch.Tensor, dict[str, Any]]]] = {}
        finished: dict[Any, tuple[Pieces, dict[str, Any]]] = {}  # scalars of tensors that have stepped alike
        for e in self._eager:
            if (g := e.p.grad) is None:
                continue
            group, kept = optimizer.param_groups[e.group], state_of(optimizer, e.p)
            before = {name: kept[name].item() for name in rule.scalar_states}
            if rule.marks_first:
                before["first"] = id(e.p) in self._first
            differentiable = bool(group.get("differentiable"))
            row = (e.group, *before.values())
            if row not in finished:
                hyper = rule.unpack(self._hyper[[e.group]].T)  # arrays of one: NumPy's numbers round powers differently
                pieces = rule.pieces(hyper, gain)
                if differentiable:  # tensors among the hyperparameters keep their graph
                    hyper = rule.unpack(self._hyper[e.group].tolist())
                    hyper |= {key: group[key] for key in rule.numeric if group[key] is not None}
                with np.errstate(all="ignore"):
                    scalars = rule.finish(hyper, before, gain, needed=rule.trace(e.variant, pieces)[1])
                    finished[row] = pieces, {n: _item(v) for n, v in scalars.items()}
            pieces, scalars = finished[row]
            if e.route.backend == "foreach":
                key = (e.variant, self._dtypes(optimizer, e), e.p.device, pieces)
                lists.setdefault(key, []).append((e, g, scalars))
                continue
            if g.layout != torch.strided and optimizer.sparse_form(group) == "dense":
                g = g.to_dense()
            names = rule.trace(e.variant, pieces)[1]
            with torch.set_grad_enabled(differentiable):
                reference.update(
                    rule.formula, pieces, e.p, g, self._states(optimizer, e), {n: scalars[n] for n in names},
                    rule.chosen(e.variant), differentiable=differentiable,
                )  # fmt: skip
            self._write_scalars(e.p, kept, scalars)
        for (variant, _, _, pieces), members in lists.items():
            entries, grads, scalars_of = zip(*members, strict=True)
            states: list[dict[str, Any]] = [self._states(optimizer, e) for e in entries]
            with torch.no_grad():
                foreach.update(
                    rule.formula, pieces, [e.p for e in entries], grads,
                    {n: [s[n] for s in states] if there else None for n, there in rule.letters(variant).items()},
                    {n: [float(s[n]) for s in scalars_of] for n in rule.trace(variant, pieces)[1]},
                    rule.chosen(variant),
                )  # fmt: skip
            for e, scalars in zip(entries, scalars_of, strict=True):
                self._write_scalars(e.p, state_of(optimizer, e.p), scalars)

    @torch.no_grad()
    def _write_scalars(self, p: torch.Tensor, kept: dict[str, Any], scalars: dict[str, Any]) -> None:
        for name in self._rule.scalar_states:
            kept[name].fill_(float(scalars[name]))
        self._first.discard(id(p))


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


_grad = attrgetter("grad")
_params = itemgetter("params")


def _items(keys: Sequence[str]) -> Any:
    """`itemgetter` that returns a tuple for one key, too."""
    return itemgetter(*keys) if len(keys) > 1 else lambda group: tuple(group[key] for key in keys)


def _any_tensor(values: Iterable[tuple[Any, ...]]) -> bool:
    """Whether a hyperparameter is a tensor, whose value can change while it stays the same object."""
    return any(
        isinstance(item, torch.Tensor)
        for value in chain.from_iterable(values)
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    )
