"""A launch: its tables of addresses and scalars, kept from step to step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from schuss import formula as words
from schuss.engine import numba
from schuss.engine.numba_kernel import CHUNK, kernel_source, sum_source
from schuss.engine.pieces import Pieces
from schuss.engine.stages import Domain, Level, Stages, Sums, Values, cut, is_staged
from schuss.engine.state import COMPENSATION, kept_by, keys_of
from schuss.engine.storage import Layout, Storage, compute_dtype, slots, stream, traced
from schuss.engine.trace import Expr, Formula
from schuss.engine.watch import INSIDE, OTHERS, Watched, watch
from schuss.formula import MatrixCall
from schuss.rule import Rule, Variant

if TYPE_CHECKING:
    from schuss.engine.plan import Entry
    from schuss.optimizer import Optimizer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Step:
    """What a step brings with it, beside the tensors.

    Args:
        hyper: [group, column] hyperparameters as `Rule.numbers` packs them; NaN for those that are on a device.
        live: column -> each group's hyperparameter that is a tensor on a device, or None.
        gain: what every gradient is multiplied by.
        factor: a number on a device that it is multiplied by, too.
        skip: a number on a device; if it is not 0, the step changes nothing.
    """

    hyper: Array
    live: Mapping[int, Sequence[torch.Tensor | None]]
    gain: float | torch.Tensor = 1.0
    factor: torch.Tensor | None = None
    skip: torch.Tensor | None = None


SQUARE = Sums(traced(lambda g: g, "g"), (("out", "out"),))
"""What is summed for the norm of the gradients."""


@dataclass(frozen=True)
class Made:
    """What a form of the rule is run by.

    Args:
        pieces: what is composed with it.
        scalars: the names of the numbers that are computed for each row before any pass.
        kernel: of the pass that updates.
        stages: how the formula is cut, if one pass is not enough.
        sums: the kernels of the passes that find sums; None for one that finds none.
        stores: the kernels that write what functions of matrices are given; None where there are none.
    """

    pieces: Pieces
    scalars: tuple[str, ...]
    kernel: Any
    stages: Stages | None = None
    sums: tuple[Any, ...] = ()
    stores: tuple[Any, ...] = ()


class Bucket(ABC):
    """Tensors that one launch updates: one form of the rule, stored alike, in any number of groups.

    Args:
        rule: what updates them.
        optimizer: whose tensors they are.
        entries: the tensors.
        layout: how they are stored; of g, its dtype.
        fresh: the identities of those whose state was made just now.
    """

    on_host = False
    """Whether the tensors are the host's."""
    on_device = False
    """Whether a step's numbers are computed on the tensors' device."""

    def __init__(
        self, rule: Rule, optimizer: "Optimizer", entries: "list[Entry]", layout: Layout, fresh: set[int]
    ) -> None:
        loops = numba.driver()
        self._rule, self._variant, self._loops, self._layout = rule, entries[0].variant, loops, layout
        self._title = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        self.params = [e.p for e in entries]
        self._kept = [kept_by(optimizer, p) for p in self.params]
        columns = [
            key
            for letter, storage in layout.items()
            if letter in rule.states
            for key in keys_of(rule.states[letter].name, storage)
        ]
        if layout["p"].kahan:
            columns.append(COMPENSATION)
        keys = (*columns, *rule.scalar_states)
        self._tensors = [[kept[key] for key in keys] for kept in self._kept]
        # A tensor's storage is held, not only the tensor: an address in the table is never one of freed memory.
        self._storages = [
            t.untyped_storage() for p, held in zip(self.params, self._tensors, strict=True) for t in (p, *held)
        ]
        first_grad = next((p.grad for p in self.params if p.grad is not None), None)
        grad_dtype = self.params[0].dtype if first_grad is None else first_grad.dtype

        count, states = len(self.params), len(columns)
        self._address = np.zeros((count, 2 + states), np.int64)
        self._address[:, 0] = [p.data_ptr() for p in self.params]
        marked = int(rule.marks_first)
        self._scalar_names = (*rule.scalar_states, *(("first",) if marked else ()))
        self._scalar_address = np.zeros((count, len(self._scalar_names)), np.int64)
        for t, held in enumerate(self._tensors):
            self._address[t, 2:] = [tensor.data_ptr() for tensor in held[:states]]
            self._scalar_address[t, : len(held) - states] = [tensor.data_ptr() for tensor in held[states:]]
        self._is_double = np.array(
            [t.dtype == torch.float64 for t in self._tensors[0][states:]] + [True] * marked, np.bool_
        )
        self._marks = np.array([float(id(p) in fresh) for p in self.params])  # 1 before the first update
        if marked:
            self._scalar_address[:, -1] = self._marks.ctypes.data + 8 * np.arange(count)

        self.active = np.zeros(count, np.bool_)
        self._numel = np.array([p.numel() * (2 if p.is_complex() else 1) for p in self.params], np.int64)
        self._groups = np.array([e.group for e in entries], np.int64)
        self._row_of = np.zeros(count, np.int32)
        self._rows = np.zeros((0, 0))
        self._finished = np.zeros((0, 0))  # the rows that the table of scalars was computed from
        self._table = np.zeros((0, 0))
        self._streams = np.array([stream(optimizer._options.seed, e.position) for e in entries], np.uint64)
        self._per_tensor = (self._scalar_address, self._is_double, self.active, self._row_of)
        self._made: Made | None = None
        # Gradients that can be lazy though they are dense: autograd hands on views of complex tensors as they are.
        self._lazy = [t for t, p in enumerate(self.params) if p.is_complex() or p.numel() == 1]
        self._found = 0  # passes that have found their sums
        self._values = Values({})
        self._matrices: dict[str, torch.Tensor] = {}
        self._new_beside: dict[str, torch.Tensor] = {}
        self._late: dict[str, Callable[..., Any]] = {}
        self._scalars: dict[str, Array] = {}
        self.hyper_changed = self.pieces_changed = True
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
        _resolve(grads, self._lazy)
        result = self._watch(grads)
        if result > 0 and result & INSIDE and _resolve(grads, range(len(grads))):
            result = self._watch(grads) | (result & OTHERS)
        self._grads = grads  # the addresses must outlive the launch
        if result > 0 and result & OTHERS:
            self._sizes_changed = True
        return result

    def prepare(self, step: Step) -> None:
        """Compute what a launch needs, and compile its kernel if there is none; nothing is updated yet."""
        if self._sizes_changed:
            self._plan_sizes()
        if not self._updated:
            return
        if not len(self._rows) or not self._loops.gather(*self._per_tensor, self._seen, self._rows):
            self._find_rows()
        assert isinstance(step.gain, float)
        if self.hyper_changed or step.gain != self._gain or not np.array_equal(self._rows, self._finished):
            self._finish(step.hyper, step.gain)

    def has_run(self, p: torch.Tensor) -> bool:
        """Whether a parameter is not one of these, or has been updated since its state was made."""
        for q, kept, mark in zip(self.params, self._kept, self._marks, strict=True):
            if q is p:
                return bool(kept["step"]) if self._rule.has_step else not mark
        return True

    def launch(self) -> None:
        """Update the bucket's tensors that have a gradient, as prepared."""
        if self._updated:
            assert self._made is not None
            if (stages := self._made.stages) is not None:
                for k in range(len(stages.levels)):
                    self.find(k)
                self._take(tuple(stages.between))
                self._take_outside({n: node for n, node in stages.outside.items() if n not in self._late})
            increment_version(self._updated)
            self._run(self._made.kernel)
            self._write_beside()
        self._grads, self._matrices, self._new_beside, self._late, self._values = [], {}, {}, {}, Values({})

    @torch.no_grad()
    def _write_beside(self) -> None:
        """Write the new values of states that are no elements."""
        for letter, write in self._late.items():  # first: they are computed from states
            states = zip(self._of_all(letter), self.active, strict=True)
            write(out=[state if active else None for state, active in states])
        for letter, value in self._new_beside.items():
            name = self._rule.states[letter].name
            values = value if getattr(value, "ndim", 0) else [torch.as_tensor(value)] * len(self._kept)
            there = [
                (kept[name], torch.as_tensor(new).expand_as(kept[name]))
                for kept, new, active in zip(self._kept, values, self.active, strict=True)
                if active
            ]
            torch._foreach_copy_([old for old, _ in there], [new for _, new in there])

    @property
    def sums_everywhere(self) -> int:
        """How many passes end with sums over all tensors of the optimizer; as prepared."""
        stages = None if self._made is None or not self._updated else self._made.stages
        return 0 if stages is None else stages.sums_everywhere

    def find(self, k: int) -> None:
        """Find the sums of a pass, if they have not been found."""
        assert self._made is not None
        assert self._made.stages is not None
        if not self._found <= k < len(self._made.stages.levels):
            return
        level = self._made.stages.levels[k]
        self._take(level.between)
        if level.sums is not None:
            self._values.known |= zip(level.reductions, self._sum(level, self._made.sums[k]), strict=True)
        if level.transforms:
            self._transform(level, self._made.stores[k])
        self._found = k + 1

    @torch.no_grad()
    def _transform(self, level: Level, kernel: Any) -> None:
        """Give functions of matrices what a pass writes for them. All tensors of the bucket are of one shape then."""
        p, count = self.params[0], len(self.params)
        make = torch.empty if self.active.all() else torch.zeros
        for transform in level.transforms:
            dtype = transform.node.op.dtype or compute_dtype(self._layout)
            self._matrices[transform.argument] = make(count, p.shape[0], p[:1].numel(), dtype=dtype, device=p.device)
        self._store(kernel)
        given = {name: self._matrices.pop(name) for name in {t.argument: None for t in level.transforms}}
        for transform in level.transforms:
            call = transform.node.op
            others = [self._given(call, node) for node in transform.node.args[1:]]
            value_of = partial(call.batch, given[transform.argument], *others)
            if transform.state is not None and self.on_host:
                self._late[transform.state] = value_of
                continue
            value = value_of()
            if transform.result is None:
                self._values.known[transform.node] = value
            else:
                self._matrices[transform.result] = value.contiguous()

    def _given(self, call: MatrixCall, node: Expr) -> Any:
        """An argument of a function of matrices. On the host, states are not copied for one that takes lists."""
        if self.on_host and call.listed and node.op == "name" and node.value in self._rule.states:
            return self._of_all(node.value)
        return self._values(node)

    def _of_all(self, letter: str) -> list[torch.Tensor]:
        """A state of each tensor."""
        return [kept[self._rule.states[letter].name] for kept in self._kept]

    def _stacked(self, letter: str) -> torch.Tensor:
        """A state that is no elements, of all tensors."""
        return torch.stack(self._of_all(letter))

    def _all_addresses(self) -> Array:
        """The table of addresses with columns for the matrices that are there."""
        if not self._matrices:
            return self._address
        layout = _with_matrices(self._layout, self._matrices)
        known = {slot: k for k, slot in enumerate(slots(self._layout))}
        result = np.zeros((len(self.params), len(slots(layout))), np.int64)
        for k, slot in enumerate(slots(layout)):
            if slot in known:
                result[:, k] = self._address[:, known[slot]]
            else:
                batch = self._matrices[slot[0]]
                result[:, k] = batch.data_ptr() + np.arange(len(batch)) * (batch[0].numel() * batch.element_size())
        return result

    def share(self, k: int) -> list[Any]:
        """What the tensors of the bucket give to the sums over all tensors that follow a pass."""
        level = self._level(k)
        with np.errstate(all="ignore"):
            return (
                [] if level is None else [self._over_tensors(self._values(node.args[0])) for node in level.everywhere]
            )

    def tell(self, k: int, sums: Sequence[Any]) -> None:
        """Take over the sums over all tensors."""
        if (level := self._level(k)) is not None:
            self._values.known |= zip(level.everywhere, map(self._here, sums), strict=True)

    @property
    def _stages(self) -> Stages:
        assert self._made is not None
        assert self._made.stages is not None
        return self._made.stages

    def _level(self, k: int) -> Level | None:
        stages = None if self._made is None or not self._updated else self._made.stages
        return None if stages is None or k >= len(stages.levels) else stages.levels[k]

    def square_sum(self) -> float | torch.Tensor:
        """The sum of the squares of the gradients that `compare` has found: on the host, or a tensor on the device."""
        if self._sizes_changed:
            self._plan_sizes()
        return self._square_sum() if self._updated else 0.0

    @abstractmethod
    def _square_sum(self) -> float | torch.Tensor:
        """`square_sum`, of one tensor at least."""

    @abstractmethod
    def _sum(self, level: Level, kernel: Any) -> list[Any]:
        """The sums of a pass, each with a number for every tensor."""

    @abstractmethod
    def _store(self, kernel: Any) -> None:
        """Run a kernel that writes what functions of matrices are given."""

    @abstractmethod
    def _take(self, names: Sequence[str]) -> None:
        """Put numbers that are known now where the kernels read them."""

    @abstractmethod
    def _take_outside(self, nodes: Mapping[str, Expr]) -> None:
        """Keep the new values of states that are no elements, by letter."""

    @abstractmethod
    def _over_tensors(self, numbers: Any) -> Any:
        """The sum of a number of each tensor, over those that are updated."""

    @abstractmethod
    def _here(self, number: Any) -> Any:
        """A number of all tensors where this bucket computes."""

    @abstractmethod
    def _run(self, kernel: Any) -> None:
        """Launch the kernel, and write the new per-tensor scalars."""

    @abstractmethod
    def _compile(
        self, formula: Formula, scalars: tuple[str, ...], layout: Layout, vectors: Mapping[str, Domain]
    ) -> Any:
        """The kernel of a formula."""

    @abstractmethod
    def _compile_sums(self, sums: Sums, layout: Layout) -> Any:
        """The kernel of sums."""

    def _plan_sizes(self) -> None:
        self._size = self._numel * self.active
        self._weight = weights(self._size, self.active)
        self._updated = [p for p, active in zip(self.params, self.active, strict=True) if active]
        self._elements = int(self._size.sum())
        self._sizes_changed = False

    def _find_rows(self) -> None:
        """Give tensors of a group that have equal scalars one row."""
        values = np.zeros((len(self.params), len(self._scalar_names)))
        self._loops.read(self._scalar_address, self._is_double, values)
        rows = np.column_stack([self._groups, values])
        row_of = np.arange(len(rows))
        if not self._is_staged:  # sums make every tensor's numbers its own
            rows, row_of = np.unique(rows, axis=0, return_inverse=True)
        self._row_of[:] = row_of.reshape(-1)
        self._row_group = rows[:, 0].astype(np.int64)
        self._rows = np.ascontiguousarray(rows[:, 1:])
        self._new = self._rows.copy()
        self._seen = np.zeros(len(rows), np.bool_)
        self.hyper_changed = True

    def _finish(self, hyper: Array, gain: float) -> None:
        """Compute the table of scalars and the new per-tensor scalars, in float64."""
        rule, rows = self._rule, self._rows
        if self.hyper_changed:
            self._columns = rule.unpack(hyper[self._row_group].T)
        if self.pieces_changed or gain != self._gain:
            pieces = rule.pieces(self._columns, gain)
            if self._made is None or self._made.pieces != pieces:
                self._made = self._make(pieces)
        assert self._made is not None
        kept = dict(zip(self._scalar_names, rows.T, strict=True))
        if rule.marks_first:
            kept["first"] = kept["first"] != 0
        names, stages = self._made.scalars, self._made.stages
        width = len(names) if stages is None else len(stages.scalars)
        if self._table.shape != (len(rows), width):
            kind = np.float64 if compute_dtype(self._layout) == torch.float64 else np.float32
            self._table = np.zeros((len(rows), width), kind)
        with np.errstate(all="ignore"):
            scalars = rule.finish(self._columns, kept | rule.given(self.params[0]), gain, needed=names)
            for k, name in enumerate(names):
                self._table[:, k] = scalars[name]
        for k, name in enumerate(self._scalar_names):
            self._new[:, k] = 0.0 if name == "first" else scalars[name]
        if stages is not None:
            self._scalars = {name: np.broadcast_to(scalars[name], len(rows)) for name in names}
        self._finished = rows.copy()
        self.hyper_changed, self.pieces_changed, self._gain = False, False, gain

    @cached_property
    def _is_staged(self) -> bool:
        """Whether the rule needs several passes, whatever pieces join it later."""
        options = self._rule.options
        pieces = Pieces(cautious=options is not None and options.cautious)
        return is_staged(self._rule.trace(self._variant, pieces)[0], self._rule.domains())

    def _make(self, pieces: Pieces) -> Made:
        return make(self._rule, self._variant, pieces, self._layout, self._compile, self._compile_sums)


def make(
    rule: Rule,
    variant: Variant,
    pieces: Pieces,
    layout: Layout,
    compile_kernel: Callable[[Formula, tuple[str, ...], Layout, Mapping[str, Domain]], Any],
    compile_sums: Callable[[Sums, Layout], Any],
) -> Made:
    """What a form of a rule is run by.

    Args:
        rule, variant, pieces: the form.
        layout: how its roles are stored.
        compile_kernel: makes the kernel of a formula, its scalars, a layout, and its numbers of rows and columns.
        compile_sums: makes the kernel of sums and a layout.
    """
    formula, scalars = scalars_of(rule, variant, pieces, layout)
    if not is_staged(formula, rule.domains()):
        return Made(pieces, scalars, compile_kernel(formula, scalars, layout, {}))
    stages, own = cut(formula, scalars, rule.domains()), compute_dtype(layout)

    def with_matrices(calls: Mapping[str, MatrixCall]) -> Layout:
        return {**layout, **{name: Storage(call.dtype or own) for name, call in calls.items()}}

    there: dict[str, MatrixCall] = {}
    sums, stores = [], []
    for level in stages.levels:
        sums.append(None if level.sums is None else compile_sums(level.sums, with_matrices(there)))
        given = with_matrices(there | {t.argument: t.node.op for t in level.transforms})
        stores.append(compile_kernel(level.stores, stages.scalars, given, stages.vectors) if level.transforms else None)
        there |= {t.result: t.node.op for t in level.transforms if t.result is not None}
    final = compile_kernel(stages.final, stages.scalars, with_matrices(there), stages.vectors)
    return Made(pieces, scalars, final, stages, tuple(sums), tuple(stores))


class CpuBucket(Bucket):
    """A launch of the Numba back end."""

    on_host = True

    def prepare(self, step: Step) -> None:
        super().prepare(step)
        if self._is_staged and self._updated:
            self._start_stages()

    def _start_stages(self) -> None:
        """Take up what is known before the first pass."""
        self._found, self._values = 0, Values(self._scalars, self._stacked)
        self._values.known |= {node: sizes_of(node, self.params) for node in self._stages.sizes}

    def _compile(
        self, formula: Formula, scalars: tuple[str, ...], layout: Layout, vectors: Mapping[str, Domain]
    ) -> int:
        source = kernel_source(self._title, formula, scalars, layout)
        return numba.kernel_address(self._rule.owner.lower(), source)

    def _compile_sums(self, sums: Sums, layout: Layout) -> int:
        return numba.kernel_address("sum", sum_source(f"Sums of {self._title}", sums, layout))

    def _store(self, kernel: int) -> None:
        tables = (self._all_addresses(), self._row_of, self._table, self._streams)
        context = np.array([table.ctypes.data for table in tables], np.int64)
        numba.sweep(numba.parts(self._elements), kernel, context.ctypes.data, self._size, self._weight)

    def _square_sum(self) -> float:
        return square_sum(self._layout["g"].dtype, self._address[:, 1], self._size, self._weight)

    def _sum(self, level: Level, kernel: int) -> list[Any]:
        tables = (self._all_addresses(), self._row_of, self._table)
        return list(sums_of(kernel, len(level.reductions), tables, self._size, self._weight).T)

    def _take(self, names: Sequence[str]) -> None:
        with np.errstate(all="ignore"):
            for name in names:
                self._table[:, self._stages.scalars.index(name)] = self._values(self._stages.between[name])

    def _take_outside(self, nodes: Mapping[str, Expr]) -> None:
        with np.errstate(all="ignore"):
            for letter, node in nodes.items():
                if (name := self._rule.number_states.get(letter)) is None:
                    self._new_beside[letter] = self._values(node)
                else:
                    self._new[:, self._scalar_names.index(name)] = self._values(node)

    def _over_tensors(self, numbers: Any) -> float:
        return add_up(np.broadcast_to(numbers, len(self.params))[self.active].tolist())

    def _here(self, number: Any) -> Any:
        return np.float64(number)  # divides by zero, as an array does

    def _run(self, kernel: int) -> None:
        tables = (self._all_addresses(), self._row_of, self._table, self._streams)
        context = np.array([table.ctypes.data for table in tables], np.int64)
        numba.launch(
            numba.parts(self._elements), kernel, context.ctypes.data, self._size, self._weight, *self._per_tensor,
            self._new,
        )  # fmt: skip


def sizes_of(node: Expr, params: Sequence[torch.Tensor]) -> Array:
    """How many elements, rows or columns tensors have; reals, for complex ones."""
    ask = getattr(words, node.op)
    return np.array([ask(torch.view_as_real(p) if p.is_complex() else p) for p in params], np.float64)


def _with_matrices(layout: Layout, matrices: Mapping[str, torch.Tensor]) -> Layout:
    return {**layout, **{name: Storage(batch.dtype) for name, batch in matrices.items()}}


def weights(size: Array, active: Array) -> Array:
    """Prefix sums of what updating each tensor costs, by which threads share the work."""
    result = np.zeros(len(size) + 1, np.int64)
    np.cumsum((size + numba.driver().OVERHEAD) * active, out=result[1:])
    return result


@cache
def _square_kernel(dtype: torch.dtype) -> int:
    return numba.kernel_address(
        "squares", sum_source("Squares of gradients", SQUARE, {"g": Storage(dtype)}, value="float64")
    )


def square_sum(dtype: torch.dtype, address: Array, size: Array, weight: Array) -> float:
    """The sum of the squares of all elements of tensors on the CPU.

    Args:
        dtype: of the tensors.
        address: their data pointers.
        size: elements of each.
        weight: what `weights` returned.
    """
    nothing = np.zeros(1)
    tables = (np.ascontiguousarray(address), nothing, nothing)
    return add_up(sums_of(_square_kernel(dtype), 1, tables, size, weight)[:, 0].tolist())


def add_up(numbers: Sequence[float]) -> float:
    """The sum, whatever their order; `math.fsum` raises on infinities of both signs, and on sums beyond float64."""
    try:
        return math.fsum(numbers)
    except (ValueError, OverflowError):
        return sum(numbers)


def sums_of(kernel: int, count: int, tables: Sequence[Array], size: Array, weight: Array) -> Array:
    """Sums over tensors on the CPU: [tensor, sum].

    Args:
        kernel: of `numba_kernel.sum_source`.
        count: how many sums it finds.
        tables: [tensor, column] data pointers, each tensor's row, and the rows of scalars.
        size: elements of each tensor.
        weight: what `weights` returned.
    """
    chunks = -(-size // CHUNK)
    first, sums = np.cumsum(chunks) - chunks, np.zeros((int(chunks.sum()), count))
    context = np.array([table.ctypes.data for table in (*tables, sums, first)], np.int64)
    numba.sweep(numba.parts(int(size.sum())), kernel, context.ctypes.data, size, weight)
    result = np.zeros((len(size), count))
    there = chunks > 0
    if there.any():
        result[there] = np.add.reduceat(sums, first[there], axis=0)
    return result


def _resolve(grads: list[torch.Tensor | None], which: Iterable[int]) -> bool:
    """Write out lazily conjugated and negated gradients: their memory does not hold their values."""
    found = False
    for t in which:
        g = grads[t]
        if g is not None and g.layout == torch.strided and (g.is_conj() or g.is_neg()):
            grads[t], found = g.resolve_conj().resolve_neg(), True
    return found


def scalars_of(rule: Rule, variant: Variant, pieces: Pieces, layout: Layout) -> tuple[Formula, tuple[str, ...]]:
    """The formula of a kernel, and the scalars that it reads: random bits are keyed by the step."""
    formula, scalars = rule.trace(variant, pieces)
    return formula, (*scalars, "step") if layout["p"].stochastic and "step" not in scalars else scalars
