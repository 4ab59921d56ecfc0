"""The plan of a step: made once, kept until something changes.

It knows for each tensor its back end, its row of addresses and its row of scalars. A step compares the plan with what
is there, computes the few numbers that changed, and launches one kernel for all tensors of a dtype.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from schuss.engine import foreach, numba, reference
from schuss.engine.pieces import Pieces, trace
from schuss.engine.report import render
from schuss.engine.watch import CHANGED, Same, Watched, significant_strides, watch
from schuss.rule import Rule, Variant

if TYPE_CHECKING:
    from schuss.optimizer import Optimizer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Route:
    """What runs the update of a tensor, and why not the fastest."""

    backend: str
    reason: str = ""


SHARED = Route("reference", "shares memory with another parameter")


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
        make_state: whether to add the state of parameters that have a gradient; a plan that is only looked at does
            not, and is made again by the first step.
    """

    def __init__(self, optimizer: "Optimizer", *, make_state: bool = True) -> None:
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
            kept = _state_of(optimizer, e.p)
            e.state_bytes = sum(
                e.p.numel() * kept.get(state.name, e.p).element_size() for state in rule.present(e.variant)
            )

        self._only_looked_at = not make_state
        self._idle: list[torch.Tensor] = []
        self._eager: list[Entry] = []
        fresh = set()
        members: dict[Any, list[Entry]] = {}
        for e in self.entries:
            has_state = self._has_state(optimizer, e)
            if make_state and e.p.grad is not None and not has_state:
                optimizer._make_state(e.p, groups[e.group])
                fresh.add(id(e.p))
                has_state = True
            if not has_state:
                self._idle.append(e.p)
            elif e.route.backend != "numba":
                self._eager.append(e)
            elif make_state:
                members.setdefault((e.variant, self._dtypes(optimizer, e)), []).append(e)
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
                    self._check_gradient(optimizer, name, p, p.grad, group)
                route = self._route_one(optimizer, name, p, group)
                entries.append(Entry(name, p, index, self._variants[index], route))
        for e in _overlapping([e for e in entries if e.route.backend == "numba"]):
            e.route = SHARED
        return entries

    def _check_gradient(
        self, optimizer: "Optimizer", name: str, p: torch.Tensor, g: torch.Tensor, group: dict[str, Any]
    ) -> None:
        owner = self._rule.owner
        if g.shape != p.shape or g.device != p.device:
            raise RuntimeError(
                f"{owner}: the gradient of {name} must have its shape and device, {tuple(p.shape)} on {p.device}; "
                f"got {tuple(g.shape)} on {g.device}"
            )
        if g.layout != torch.strided:
            if optimizer.sparse_form(group) is None:
                raise RuntimeError(
                    f"{owner} does not support sparse gradients, and {name} has one; "
                    "use SGD, Adagrad or SparseAdam for it, or sparse=False in its layer"
                )
            if group.get("weight_decay"):
                raise RuntimeError(
                    f"{owner}: weight_decay option is not compatible with sparse gradients, and {name} has one"
                )
        if group.get("capturable") and p.device.type == "cpu":
            raise AssertionError(
                f"{owner}: If capturable=True, params and state_steps must be on supported devices: "
                f"cuda, xpu, hpu, privateuseone, xla; {name} is on {p.device}"
            )

    def _route_one(self, optimizer: "Optimizer", name: str, p: torch.Tensor, group: dict[str, Any]) -> Route:
        wish, g = optimizer._backend, p.grad
        if group.get("differentiable"):
            return Route("reference", "differentiable=True")
        if g is not None and g.layout != torch.strided:
            rows = optimizer.sparse_form(group) == "rows"
            return Route("reference", "sparse gradient, " + ("only its rows" if rows else "made dense"))
        if wish in ("reference", "foreach"):
            return Route(wish, f"backend={wish!r}")
        if wish == "auto" and group.get("foreach"):
            return Route("foreach", "foreach=True")
        obstacle = self._obstacle(optimizer, p, g)
        if obstacle and wish == "numba":
            raise ValueError(
                f"{self._rule.owner}: backend='numba' cannot update {name}: {obstacle[1]}; use backend='auto'"
            )
        return Route(*obstacle) if obstacle else Route("numba")

    def _obstacle(self, optimizer: "Optimizer", p: torch.Tensor, g: torch.Tensor | None) -> tuple[str, str] | None:
        """Why the kernels cannot update a tensor, and what does instead."""
        if type(p) not in (torch.Tensor, torch.nn.Parameter):
            return "reference", f"tensor subclass {type(p).__name__}"
        if g is not None and type(g) is not torch.Tensor:
            return "reference", f"gradient is a tensor subclass, {type(g).__name__}"
        if p.device.type != "cpu":
            return "foreach", f"no compiled kernel for {p.device.type} tensors"
        if p.layout != torch.strided:
            return "reference", f"layout {str(p.layout).removeprefix('torch.')}"
        if not numba.supports(numba.real(p.dtype)):
            return "reference", f"dtype {str(p.dtype).removeprefix('torch.')}"
        if p.is_conj() or p.is_neg():
            return "reference", "lazily conjugated or negated"
        if p.is_inference():
            return "reference", "inference tensor"
        if not is_dense(p):
            return "reference", "view with gaps or overlaps"
        kept = _state_of(optimizer, p)
        tensors = [kept[s.name] for s in self._rule.states.values() if isinstance(kept.get(s.name), torch.Tensor)]
        for t, what in [(g, "gradient"), *((t, "state") for t in tensors)]:
            if t is None:
                continue
            if t.shape != p.shape or significant_strides(t) != significant_strides(p):
                return "reference", f"{what} lies in another order than the parameter"
            if t.is_complex() != p.is_complex() or not numba.supports(numba.real(t.dtype)):
                return "reference", f"{what} of dtype {str(t.dtype).removeprefix('torch.')}"
            if t.device.type != "cpu":
                return "reference", f"{what} on {t.device}"
        for name in self._rule.scalar_states:
            t = kept.get(name)
            if t is not None and (t.device.type != "cpu" or t.dtype not in (torch.float32, torch.float64)):
                return "reference", f"state {name!r} is not a floating CPU number"
        return None

    def _has_state(self, optimizer: "Optimizer", e: Entry) -> bool:
        kept = _state_of(optimizer, e.p)
        names = [*self._rule.scalar_states, *(state.name for state in self._rule.present(e.variant))]
        return all(kept.get(name) is not None for name in names)

    def _dtypes(self, optimizer: "Optimizer", e: Entry) -> tuple[torch.dtype, ...]:
        states = [s for s in self._states(optimizer, e).values() if s is not None]
        tensors = [e.p, e.p if e.p.grad is None else e.p.grad, *states]
        return tuple(numba.real(t.dtype) for t in tensors)

    def _states(self, optimizer: "Optimizer", e: Entry) -> dict[str, torch.Tensor | None]:
        """The states of a parameter by letter."""
        kept, states = _state_of(optimizer, e.p), self._rule.states
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
        self._values, self._live = values, live
        for bucket in self._buckets:
            bucket.hyper_changed = True
        return True

    def run(self, optimizer: "Optimizer", gain: float) -> bool:
        """One step; `gain` multiplies every gradient. False, with nothing done, if the plan must be made anew."""
        for bucket in self._buckets:
            if bucket.compare(list(map(_grad, bucket.params))) == CHANGED:
                return False
        if any(p.grad is not None for p in self._idle) or not self._eager_routes_hold(optimizer):
            return False
        for bucket in self._buckets:
            bucket.run(self._hyper, gain)
        if self._eager:
            self._run_eager(optimizer, gain)
        return True

    def _eager_routes_hold(self, optimizer: "Optimizer") -> bool:
        groups = optimizer.param_groups
        for e in self._eager:
            if e.p.grad is not None:
                self._check_gradient(optimizer, e.name, e.p, e.p.grad, groups[e.group])
                if e.route != SHARED and self._route_one(optimizer, e.name, e.p, groups[e.group]) != e.route:
                    return False
        return True

    def _run_eager(self, optimizer: "Optimizer", gain: float) -> None:
        """Update the tensors that are not for kernels, one by one or as lists."""
        rule = self._rule
        lists: dict[Any, list[tuple[Entry, torch.Tensor, dict[str, Any]]]] = {}
        for e in self._eager:
            if (g := e.p.grad) is None:
                continue
            group, kept = optimizer.param_groups[e.group], _state_of(optimizer, e.p)
            before = {name: kept[name].item() for name in rule.scalar_states}
            if rule.marks_first:
                before["first"] = id(e.p) in self._first
                self._first.discard(id(e.p))
            differentiable = bool(group.get("differentiable"))
            hyper = rule.unpack(self._hyper[[e.group]].T)  # arrays of one: NumPy's numbers round powers differently
            pieces = rule.pieces(hyper, gain)
            if differentiable:  # tensors among the hyperparameters keep their graph
                hyper |= {key: group[key] for key in rule.numeric if group[key] is not None}
            with np.errstate(all="ignore"):
                scalars = {n: _item(value) for n, value in rule.finish(hyper, before, gain).items()}
            if e.route.backend == "foreach":
                key = (e.variant, self._dtypes(optimizer, e), e.p.device, pieces)
                lists.setdefault(key, []).append((e, g, scalars))
                continue
            if g.layout != torch.strided and optimizer.sparse_form(group) == "dense":
                g = g.to_dense()
            names = self._scalar_names(pieces, e.variant)
            with torch.set_grad_enabled(differentiable):
                reference.update(
                    rule.formula, pieces, e.p, g, self._states(optimizer, e), {n: scalars[n] for n in names},
                    rule.chosen(e.variant), differentiable=differentiable,
                )  # fmt: skip
            self._write_scalars(kept, scalars)
        for (variant, _, _, pieces), members in lists.items():
            entries, grads, scalars_of = zip(*members, strict=True)
            states: list[dict[str, Any]] = [self._states(optimizer, e) for e in entries]
            with torch.no_grad():
                foreach.update(
                    rule.formula, pieces, [e.p for e in entries], grads,
                    {n: [s[n] for s in states] if there else None for n, there in rule.letters(variant).items()},
                    {n: [float(s[n]) for s in scalars_of] for n in self._scalar_names(pieces, variant)},
                    rule.chosen(variant),
                )  # fmt: skip
            for e, scalars in zip(entries, scalars_of, strict=True):
                self._write_scalars(_state_of(optimizer, e.p), scalars)

    def _scalar_names(self, pieces: Pieces, variant: Variant) -> tuple[str, ...]:
        return trace(self._rule.formula, pieces, self._rule.letters(variant), self._rule.chosen(variant))[1]

    @torch.no_grad()
    def _write_scalars(self, kept: dict[str, Any], scalars: dict[str, Any]) -> None:
        for name in self._rule.scalar_states:
            kept[name].fill_(float(scalars[name]))


class Bucket:
    """Tensors that one launch updates: one form of the rule, one set of dtypes, any number of groups."""

    def __init__(self, rule: Rule, optimizer: "Optimizer", entries: list[Entry], fresh: set[int]) -> None:
        loops = numba.driver()
        self._rule, self._variant, self._loops = rule, entries[0].variant, loops
        self._title = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        self.params = [e.p for e in entries]
        self._kept = [_state_of(optimizer, p) for p in self.params]
        letters = [n for n, there in rule.letters(self._variant).items() if there]
        names = [rule.states[n].name for n in letters]
        keys = (*names, *rule.scalar_states)
        self._tensors = [[kept[key] for key in keys] for kept in self._kept]
        # A tensor's storage is held, not only the tensor: an address in the table is never one of freed memory.
        self._storages = [
            t.untyped_storage() for p, held in zip(self.params, self._tensors, strict=True) for t in (p, *held)
        ]
        first_grad = next((p.grad for p in self.params if p.grad is not None), None)
        grad_dtype = self.params[0].dtype if first_grad is None else first_grad.dtype
        self._dtypes = {"p": self.params[0].dtype, "g": grad_dtype} | {
            n: t.dtype for n, t in zip(letters, self._tensors[0], strict=False)
        }
        self._dtypes = {n: numba.real(d) for n, d in self._dtypes.items()}

        count, states = len(self.params), len(names)
        self._address = np.zeros((count, 2 + states), np.int64)
        self._address[:, 0] = [p.data_ptr() for p in self.params]
        marked = int(rule.marks_first)
        self._scalar_names = (*rule.scalar_states, *(("first",) if marked else ()))
        self._scalar_address = np.zeros((count, len(self._scalar_names)), np.int64)
        for t, held in enumerate(self._tensors):
            self._address[t, 2:] = [tensor.data_ptr() for tensor in held[:states]]
            self._scalar_address[t, : len(held) - states] = [tensor.data_ptr() for tensor in held[states:]]
        # All scalars of one name have one dtype in practice; float64 ones are told apart per name.
        self._is_double = np.array(
            [t.dtype == torch.float64 for t in self._tensors[0][states:]] + [True] * marked, np.bool_
        )
        if marked:
            self._marks = np.array([float(id(p) in fresh) for p in self.params])
            self._scalar_address[:, -1] = self._marks.ctypes.data + 8 * np.arange(count)

        self.active = np.zeros(count, np.bool_)
        self._numel = np.array([p.numel() * (2 if p.is_complex() else 1) for p in self.params], np.int64)
        self._groups = np.array([e.group for e in entries], np.int64)
        self._row_of = np.zeros(count, np.int32)
        self._rows: Array | None = None
        self._table = np.zeros((0, 0))
        self._context = np.zeros(3, np.int64)
        self._kernel: tuple[Pieces, int, tuple[str, ...]] | None = None
        self._lazy = [t for t, p in enumerate(self.params) if p.is_complex() or p.numel() == 1]
        self.hyper_changed = True
        self._gain = 1.0
        self._watch = watch(
            Watched(
                self.params,
                self._kept,
                keys,
                self._tensors,
                self._address,
                np.ascontiguousarray(self._scalar_address[:, : len(keys) - states]),
                self.active,
                grad_dtype,
            )
        )
        self._sizes_changed = True
        self._grads: list[torch.Tensor | None] = []

    def compare(self, grads: list[torch.Tensor | None]) -> int:
        """Compare the table with what is there, and take over the gradients' addresses."""
        for t in self._lazy:
            g = grads[t]
            if g is not None and g.layout == torch.strided and (g.is_conj() or g.is_neg()):
                grads[t] = g.resolve_conj().resolve_neg()
        result = self._watch(grads)
        self._grads = grads  # the addresses must outlive the launch
        if result == 1:
            self._sizes_changed = True
        return result

    def run(self, hyper: Array, gain: float) -> None:
        """Update the bucket's tensors that have a gradient."""
        if self._sizes_changed:
            self._plan_sizes()
        if not self._parts:
            return
        arguments = (self._scalar_address, self._is_double, self.active, self._row_of)
        loops = self._loops
        if self._rows is None or not loops.gather(*arguments, self._seen, self._rows):
            self._find_rows()
        if len(self._scalar_names) or self.hyper_changed or gain != self._gain:
            self._finish(hyper, gain)
        assert self._kernel is not None
        increment_version(self._updated)
        numba.launch(
            self._parts, self._kernel[1], self._context.ctypes.data, self._size, self._weight, *arguments, self._new
        )
        self._grads = []

    def _plan_sizes(self) -> None:
        from schuss.engine.numba import driver

        self._size = self._numel * self.active
        self._weight = np.zeros(len(self._size) + 1, np.int64)
        np.cumsum((self._size + driver().OVERHEAD) * self.active, out=self._weight[1:])
        self._updated = [p for p, active in zip(self.params, self.active, strict=True) if active]
        self._parts = numba.parts(int(self._size.sum())) if self._updated else 0
        self._sizes_changed = False

    def _find_rows(self) -> None:
        """Give tensors of a group that have equal scalars one row."""
        values = np.zeros((len(self.params), len(self._scalar_names)))
        self._loops.read(self._scalar_address, self._is_double, values)
        rows, row_of = np.unique(np.column_stack([self._groups, values]), axis=0, return_inverse=True)
        self._row_of[:] = row_of.reshape(-1)
        self._row_group = rows[:, 0].astype(np.int64)
        self._rows = np.ascontiguousarray(rows[:, 1:])
        self._new = self._rows.copy()
        self._seen = np.zeros(len(rows), np.bool_)
        self.hyper_changed = True

    def _finish(self, hyper: Array, gain: float) -> None:
        """Compute the table of scalars and the new per-tensor scalars, in float64."""
        rule, rows = self._rule, self._rows
        assert rows is not None
        if self.hyper_changed:
            self._columns = rule.unpack(hyper[self._row_group].T)
        if self.hyper_changed or gain != self._gain:
            pieces = rule.pieces(self._columns, gain)
            if self._kernel is None or self._kernel[0] != pieces:
                self._kernel = (pieces, *self._compile(pieces))
        assert self._kernel is not None
        kept = dict(zip(self._scalar_names, rows.T, strict=True))
        if rule.marks_first:
            kept["first"] = kept["first"] != 0
        names = self._kernel[2]
        if self._table.shape != (len(rows), len(names)):
            kind = numba.compute_dtype(tuple(self._dtypes.values()))
            self._table = np.zeros((len(rows), len(names)), np.float64 if kind == torch.float64 else np.float32)
            self._context[:] = self._address.ctypes.data, self._row_of.ctypes.data, self._table.ctypes.data
        with np.errstate(all="ignore"):
            scalars = rule.finish(self._columns, kept, gain)
            for k, name in enumerate(names):
                self._table[:, k] = scalars[name]
        for k, name in enumerate(self._scalar_names):
            self._new[:, k] = 0.0 if name == "first" else scalars[name]
        self.hyper_changed, self._gain = False, gain

    def _compile(self, pieces: Pieces) -> tuple[int, tuple[str, ...]]:
        source, scalars = kernel_of(self._title, self._rule, self._variant, pieces, self._dtypes)
        return numba.kernel_address(self._rule.owner.lower(), source), scalars


def kernel_of(
    title: str, rule: Rule, variant: Variant, pieces: Pieces, dtypes: Mapping[str, torch.dtype]
) -> tuple[str, tuple[str, ...]]:
    """The text of the kernel of a form of a rule, and the scalars that it reads."""
    formula, scalars = trace(rule.formula, pieces, rule.letters(variant), rule.chosen(variant))
    return numba.kernel_source(title, formula, scalars, dtypes), scalars


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


def _state_of(optimizer: "Optimizer", p: torch.Tensor) -> dict[str, Any]:
    """`optimizer.state[p]`, without making one."""
    kept: dict[str, Any] = optimizer.state.get(p, {})
    return kept


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each place once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for n, st in zip(tensor.shape, tensor.stride(), strict=True) if n != 1):
        if stride != expected and tensor.numel():
            return False
        expected *= size
    return True


def _overlapping(entries: list[Entry]) -> list[Entry]:
    """The entries whose parameters share memory with another entry's."""
    spans = sorted(
        (e.p.data_ptr(), e.p.data_ptr() + e.p.numel() * e.p.element_size(), i)
        for i, e in enumerate(entries)
        if e.p.numel()
    )
    shared, end, owner = set(), 0, -1
    for start, stop, i in spans:
        if start < end:
            shared |= {owner, i}
        if stop > end:
            end, owner = stop, i
    return [entries[i] for i in sorted(shared)]
