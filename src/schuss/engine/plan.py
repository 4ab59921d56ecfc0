"""The plan of a step: made once, kept until something changes.

It knows for each tensor its back end, its row of addresses and its row of scalars. A step compares the plan with what
is there, computes the few numbers that changed, and launches one kernel for all tensors of a dtype.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from schuss import bounds
from schuss.engine import foreach, reference
from schuss.engine.bucket import Bucket, CpuBucket, Step, add_up
from schuss.engine.clip import clip, refuse
from schuss.engine.pieces import EMA, Pieces
from schuss.engine.report import render
from schuss.engine.route import SHARED, Route, check_gradient, overlapping, route
from schuss.engine.rows import RowsBucket
from schuss.engine.state import COMPENSATION, Cell, chosen, find, kept_by, parameter_cell, parameter_storage
from schuss.engine.storage import Layout, Storage, as_reals
from schuss.engine.watch import CHANGED, Same
from schuss.rule import Variant

if TYPE_CHECKING:
    from schuss.optimizer import Optimizer


LARGEST_BATCH = 2**26
"""Elements of tensors of one shape whose rows, columns or matrices are computed with at once."""
LARGEST_BATCH_ON_HOST = 2**22
"""Of matrices on the CPU, which gains nothing by larger batches: they are copied for functions of matrices."""


@dataclass(eq=False)
class Entry:
    """One parameter in the plan."""

    name: str
    p: torch.Tensor
    group: int
    position: int
    """Among all parameters of the optimizer."""
    variant: Variant
    route: Route
    stored: dict[str, tuple[Storage, str]] = field(default_factory=dict)
    """State's name -> what it is, or will be, stored as, and why not as the user wished."""
    state_bytes: int = 0
    read_before_bytes: int = 0
    """Of what is read before the pass that updates, for sums."""

    @property
    def traffic_bytes(self) -> int:
        """Bytes that a step must move: p and state read and written, the gradient read; and what is read for sums."""
        return 3 * self.p.numel() * self.p.element_size() + 2 * self.state_bytes + self.read_before_bytes


@dataclass(frozen=True)
class _Eager:
    """The step of a tensor that is not for kernels.

    Args:
        entry, g, pieces, scalars: what is computed.
        update: by eager torch on its own; None: in a list.
    """

    entry: Entry
    g: torch.Tensor
    pieces: Pieces
    scalars: Mapping[str, Any]
    update: reference.Update | None = None


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
        self._on_device = self._find_on_device(groups)
        self._hyper = np.array([rule.numbers(group) for group in groups], np.float64)
        self._same_params = Same(chain.from_iterable(map(_params, groups)))
        self.entries = self._route(optimizer)

        self._named_dtypes = bool(optimizer._options.state_dtype)

        read: dict[Any, tuple[str, ...]] = {}
        for e in self.entries:
            kept = kept_by(optimizer, e.p)
            for state in rule.present(e.variant):
                cell = find(kept, state.name)
                storage, why = chosen(optimizer, e.p, state)
                e.stored[state.name] = (storage, why) if cell is None else (cell.storage, why)
            if (storage := parameter_storage(optimizer, e.p)).kahan:
                e.stored[COMPENSATION] = Storage(storage.dtype), ""
            shapes = {state.name: state.shape(groups[e.group], e.p) for state in rule.present(e.variant)}
            bytes_of = {name: s.bytes(math.prod(shapes.get(name, e.p.shape))) for name, (s, _) in e.stored.items()}
            e.state_bytes = sum(bytes_of.values())
            pieces = rule.pieces(rule.unpack(self._hyper[[e.group]].T))
            if (e.variant, pieces) not in read:
                read[e.variant, pieces] = rule.read_before(e.variant, pieces)
            own = e.p.numel() * e.p.element_size()
            for letter in read[e.variant, pieces]:
                e.read_before_bytes += own if letter in ("p", "g") else bytes_of[rule.states[letter].name]

        self._only_looked_at = made is None
        self._idle: list[torch.Tensor] = []
        self._eager: list[Entry] = []
        fresh: set[int] = set()
        members: dict[Any, list[Entry]] = {}
        sizes: dict[Any, int] = {}
        for e in self.entries:
            has_state = self._has_state(optimizer, e)
            if made is not None and e.p.grad is not None and not has_state:
                before = kept_by(optimizer, e.p)
                made.append((e.p, set(before)))
                if not any(find(before, state.name) for state in rule.present(e.variant)):
                    fresh.add(id(e.p))
                optimizer._make_state(e.p, groups[e.group])
                has_state = True
            if not has_state:
                self._idle.append(e.p)
            elif e.route.backend not in ("numba", "triton"):
                self._eager.append(e)
            elif made is not None:
                kept, capturable = kept_by(optimizer, e.p), self._counts_on_device(optimizer, e)
                if capturable:
                    optimizer._place_scalars(e.p)
                scalars = tuple((kept[name].dtype, kept[name].device) for name in rule.scalar_states)
                layout = self._layout(optimizer, e)
                key = (e.route.backend, e.p.device, capturable, e.variant, e.p.is_complex(), *layout.items(), scalars)
                if needs := rule.needs(e.variant):  # of one shape, and not too many at once
                    on_host = "matrices" in needs and e.p.device.type == "cpu"
                    most = min(LARGEST_BATCH, LARGEST_BATCH_ON_HOST) if on_host else LARGEST_BATCH
                    alike = sizes[key, e.p.shape] = sizes.get((key, e.p.shape), 0) + e.p.numel()
                    key = (*key, e.p.shape, (alike - 1) // most)
                members.setdefault(key, []).append(e)
        self._first = {id(e.p) for e in self._eager} & fresh
        self._state = optimizer.state
        self._same_state_keys = Same(optimizer.state)
        self._same_state_values = Same(optimizer.state.values())
        self._buckets = [self._bucket(optimizer, entries, fresh) for entries in members.values()]

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
        return render(self._rule.owner, self.entries, self.state_bytes, self.traffic_bytes, storage=self._named_dtypes)

    # --- routing ----------------------------------------------------------------------------------------------------

    def _route(self, optimizer: "Optimizer") -> list[Entry]:
        """An entry per parameter. Raises, before anything is changed, on what no back end can do."""
        entries: list[Entry] = []
        for index, group in enumerate(optimizer.param_groups):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = names[i] if names else f"parameter {i} of group {index}"
                if p.grad is not None:
                    check_gradient(optimizer, name, p, p.grad, group)
                way = route(optimizer, name, p, group)
                entries.append(Entry(name, p, index, len(entries), self._rule.variant(group, p), way))
        for i in overlapping([e.p for e in entries]):
            if entries[i].route.backend in ("numba", "triton"):
                entries[i].route = SHARED
        return entries

    def _has_state(self, optimizer: "Optimizer", e: Entry) -> bool:
        kept = kept_by(optimizer, e.p)
        numbers = [*self._rule.scalar_states, *([COMPENSATION] if parameter_storage(optimizer, e.p).kahan else [])]
        states = [find(kept, state.name) for state in self._rule.present(e.variant)]
        return all(kept.get(name) is not None for name in numbers) and None not in states

    def _layout(self, optimizer: "Optimizer", e: Entry) -> Layout:
        """How the roles of a parameter's update are stored, by letter."""
        g = e.p if e.p.grad is None else e.p.grad
        cells, states_of = self._states(optimizer, e), self._rule.states
        states = {n: c.storage for n, c in cells.items() if c is not None and states_of[n].like == "p"}
        return as_reals({"p": parameter_storage(optimizer, e.p), "g": Storage(g.dtype), **states})

    def _bucket(self, optimizer: "Optimizer", entries: list[Entry], fresh: set[int]) -> Bucket:
        """The launch of tensors that are alike."""
        e, rule = entries[0], self._rule
        layout = self._layout(optimizer, e)
        if e.route.backend == "numba" and "vectors" in rule.needs(e.variant):
            return RowsBucket(rule, optimizer, entries, layout, fresh)
        if e.route.backend == "numba":
            return CpuBucket(rule, optimizer, entries, layout, fresh)
        from schuss.engine.gpu import GpuBucket

        numbers = [kept_by(optimizer, e.p)[name] for name in rule.scalar_states]
        on_device = self._counts_on_device(optimizer, e) or any(number.device.type != "cpu" for number in numbers)
        return GpuBucket(
            rule, optimizer, entries, layout, fresh, on_device=on_device or (not numbers and bool(self._on_device))
        )

    def _counts_on_device(self, optimizer: "Optimizer", e: Entry) -> bool:
        """Whether a parameter's numbers are to be where it is: where the host must not, or need not, know them."""
        capturable = bool(optimizer.param_groups[e.group].get("capturable"))
        return e.route.backend == "triton" and (capturable or bool(self._rule.number_states))

    def _find_on_device(self, groups: Sequence[dict[str, Any]]) -> dict[int, list[torch.Tensor | None]]:
        """Column -> each group's hyperparameter that is a tensor on a device."""
        found: dict[int, list[torch.Tensor | None]] = {}
        if self._live:
            for key, columns in self._rule.columns.items():
                for k, column in enumerate(range(columns.start, columns.stop)):
                    values = [group[key][k] if key in self._rule.lengths else group[key] for group in groups]
                    tensors = [v if isinstance(v, torch.Tensor) and v.device.type != "cpu" else None for v in values]
                    if any(tensor is not None for tensor in tensors):
                        found[column] = tensors
        return found

    def _states(self, optimizer: "Optimizer", e: Entry) -> dict[str, Cell | None]:
        """The states of a parameter by letter."""
        kept, states = kept_by(optimizer, e.p), self._rule.states
        return {n: find(kept, states[n].name) if there else None for n, there in self._rule.letters(e.variant).items()}

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
            and self._take_over(list(map(self._getter, groups)), groups)
        )

    def _take_over(self, values: list[tuple[Any, ...]], groups: Sequence[dict[str, Any]]) -> bool:
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
            if (
                old != new
                if key in rule.choices
                else rule.chooses(key) and list(map(bool, old)) != list(map(bool, new))
            ):
                return False
            if (column := rule.columns.get(key)) is not None:
                self._hyper[:, column] = [rule.numbers_of(key, value) for value in new]
                for bucket in self._buckets:
                    bucket.hyper_changed = True
                    bucket.pieces_changed |= key == "weight_decay"
        self._values, self._live = values, live
        self._on_device = self._find_on_device(groups) if live else {}
        return True

    def run(self, optimizer: "Optimizer", gain: float | torch.Tensor = 1.0, skip: torch.Tensor | None = None) -> bool:
        """One step. False, with nothing done, if the plan must be made anew.

        Args:
            optimizer: whose step.
            gain: what every gradient is multiplied by.
            skip: a number on a device; if it is not 0, the step changes nothing.
        """
        for bucket in self._buckets:
            if bucket.compare(list(map(_grad, bucket.params))) == CHANGED:
                return False
        if any(p.grad is not None for p in self._idle) or not self._eager_routes_hold(optimizer):
            return False
        options, factor = optimizer._options, None
        if options.max_norm is not None:
            rest = [e.p.grad for e in self._eager if e.p.grad is not None]
            clipped = clip(options, self._buckets, rest, gain)
            optimizer.last_grad_norm, gain, factor = clipped.norm, clipped.gain, clipped.factor
            refuse(self._rule.owner, options, clipped.known)
            if clipped.broken is not None:
                optimizer._count_skip(clipped.broken)
                skip = clipped.broken.float() if skip is None else skip.to(clipped.broken.device) + clipped.broken
        here = self._read_device() if self._on_device else self._hyper
        host_gain = gain
        if factor is not None and (self._eager or any(bucket.on_host for bucket in self._buckets)):
            host_gain = gain * factor.item()
        for bucket in self._buckets:
            if bucket.on_host:
                bucket.prepare(Step(here, {}, host_gain))
            else:
                hyper = self._hyper if bucket.on_device else here
                bucket.prepare(Step(hyper, self._on_device, gain, factor, skip))
        eager = self._eager_updates(optimizer, here, bounds.number(host_gain)) if self._eager else []
        sharing: list[Bucket | reference.Update] = [*self._buckets]
        sharing += [one.update for one in eager if one.update is not None]
        for k in range(max((unit.sums_everywhere for unit in sharing), default=0)):
            _sum_everywhere([unit for unit in sharing if unit.sums_everywhere], k)
        for bucket in self._buckets:
            bucket.launch()
        self._run_eager(optimizer, eager)
        if optimizer.after_step is not None:
            with torch.no_grad():
                optimizer.after_step([e.p for e in self.entries if e.p.grad is not None])
        return True

    def _read_device(self) -> np.ndarray[Any, Any]:
        """The hyperparameters, those on a device, too, if the host must know them: it waits for the device then."""
        if all(bucket.on_device for bucket in self._buckets) and not self._eager:
            return self._hyper
        hyper = self._hyper.copy()
        for column, tensors in self._on_device.items():
            for group, tensor in enumerate(tensors):
                hyper[group, column] = self._hyper[group, column] if tensor is None else tensor.item()
        for bucket in self._buckets:
            bucket.hyper_changed = True
        return hyper

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

    def _eager_updates(self, optimizer: "Optimizer", hyper_of: np.ndarray[Any, Any], gain: float) -> list["_Eager"]:
        """The updates of the tensors that are not for kernels; nothing is updated yet."""
        rule, updates = self._rule, []
        finished: dict[Any, tuple[Pieces, dict[str, Any]]] = {}  # scalars of tensors that have stepped alike
        for e in self._eager:
            if (g := e.p.grad) is None:
                continue
            group, kept = optimizer.param_groups[e.group], kept_by(optimizer, e.p)
            before = {name: kept[name].item() for name in rule.scalar_states} | rule.given(e.p)
            if rule.marks_first:
                before["first"] = id(e.p) in self._first
            differentiable = bool(group.get("differentiable"))
            row = (e.group, *before.values())
            if row not in finished:
                hyper = rule.unpack(hyper_of[[e.group]].T)  # arrays of one: NumPy's numbers round powers differently
                pieces = rule.pieces(hyper, gain)
                if differentiable:  # tensors among the hyperparameters keep their graph
                    hyper = rule.unpack(hyper_of[e.group].tolist())
                    hyper |= {key: group[key] for key in rule.numeric if group[key] is not None}
                with np.errstate(all="ignore"):
                    scalars = rule.finish(hyper, before, gain, needed=rule.trace(e.variant, pieces)[1])
                    finished[row] = pieces, {n: _item(v) for n, v in scalars.items()}
            pieces, scalars = finished[row]
            if e.route.backend == "foreach" and not rule.sums_everywhere(e.variant):
                updates.append(_Eager(e, g, pieces, scalars))
                continue
            if g.layout != torch.strided and (optimizer.sparse_form(group) == "dense" or EMA in rule.states):
                g = g.to_dense()  # a buffer, or an average, moves where there is no gradient, too
            names = rule.trace(e.variant, pieces)[1]
            cell, states = self._cell(optimizer, e, scalars), self._states(optimizer, e)
            read = {n: scalars[n] for n in names}
            update = reference.Update(rule, e.variant, pieces, cell, g, states, read, differentiable)
            updates.append(_Eager(e, g, pieces, scalars, update))
        return updates

    def _run_eager(self, optimizer: "Optimizer", updates: Sequence["_Eager"]) -> None:
        """Update the tensors that are not for kernels, one by one or as lists."""
        rule = self._rule
        lists: dict[Any, list[_Eager]] = {}
        for one in updates:
            e = one.entry
            if one.update is None:
                key = (e.variant, tuple(self._layout(optimizer, e).items()), e.p.device, one.pieces)
                lists.setdefault(key, []).append(one)
                continue
            with torch.set_grad_enabled(one.update.differentiable):
                self._write_scalars(e.p, kept_by(optimizer, e.p), one.scalars, one.update.finish())
        for (variant, _, _, pieces), members in lists.items():
            entries = [one.entry for one in members]
            states: list[dict[str, Any]] = [self._states(optimizer, e) for e in entries]
            cells = [self._cell(optimizer, one.entry, one.scalars) for one in members]
            with torch.no_grad():
                numbers = foreach.update(
                    rule, pieces, cells, [one.g for one in members],
                    {n: [s[n] for s in states] if there else None for n, there in rule.letters(variant).items()},
                    {n: [float(one.scalars[n]) for one in members] for n in rule.trace(variant, pieces)[1]},
                    rule.chosen(variant),
                )  # fmt: skip
            for k, one in enumerate(members):
                new = {letter: values[k] for letter, values in numbers.items()}
                self._write_scalars(one.entry.p, kept_by(optimizer, one.entry.p), one.scalars, new)

    @staticmethod
    def _cell(optimizer: "Optimizer", e: Entry, scalars: Mapping[str, Any]) -> Cell:
        return parameter_cell(optimizer, e.p, e.position, scalars.get("step", 0))

    @torch.no_grad()
    def _write_scalars(
        self, p: torch.Tensor, kept: dict[str, Any], scalars: Mapping[str, Any], numbers: Mapping[str, Any]
    ) -> None:
        new = {**scalars, **{name: numbers[letter] for letter, name in self._rule.number_states.items()}}
        for name in self._rule.scalar_states:
            kept[name].fill_(float(new[name]))
        self._first.discard(id(p))


def _sum_everywhere(units: "Sequence[Bucket | reference.Update]", k: int) -> None:
    """Sum, over all tensors, what each has found in a pass."""
    for unit in units:
        if isinstance(unit, Bucket):
            unit.find(k)
    shares = list(zip(*(unit.share(k) for unit in units), strict=True))
    device = next((s.device for share in shares for s in share if _on_device(s)), torch.device("cpu"))
    sums: list[Any] = []
    for share in shares:
        if device.type == "cpu" and not any(isinstance(s, torch.Tensor) and s.requires_grad for s in share):
            sums.append(add_up([float(part) for part in share]))
        else:
            sums.append(torch.stack([torch.as_tensor(s, dtype=torch.float64).to(device) for s in share]).sum())
    for unit in units:
        unit.tell(k, sums)


def _on_device(number: Any) -> bool:
    return isinstance(number, torch.Tensor) and number.device.type != "cpu"


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
