"""A launch of the CPU back end: its tables of addresses and scalars, kept from step to step."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from schuss.engine import numba
from schuss.engine.pieces import Pieces
from schuss.engine.route import state_of
from schuss.engine.watch import INSIDE, OTHERS, Watched, watch
from schuss.rule import Rule, Variant

if TYPE_CHECKING:
    from schuss.engine.plan import Entry
    from schuss.optimizer import Optimizer

Array = np.ndarray[Any, Any]


class Bucket:
    """Tensors that one launch updates: one form of the rule, one set of dtypes, any number of groups."""

    def __init__(self, rule: Rule, optimizer: "Optimizer", entries: "list[Entry]", fresh: set[int]) -> None:
        loops = numba.driver()
        self._rule, self._variant, self._loops = rule, entries[0].variant, loops
        self._title = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        self.params = [e.p for e in entries]
        self._kept = [state_of(optimizer, p) for p in self.params]
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
        state_dtypes = [tensor.dtype for tensor in self._tensors[0][: len(letters)]]
        dtypes = zip(("p", "g", *letters), (self.params[0].dtype, grad_dtype, *state_dtypes), strict=True)
        self._dtypes = {letter: numba.real(dtype) for letter, dtype in dtypes}

        count, states = len(self.params), len(names)
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
        self._context = np.zeros(3, np.int64)
        self._context_address = self._context.ctypes.data
        self._per_tensor = (self._scalar_address, self._is_double, self.active, self._row_of)
        self._kernel: tuple[Pieces, int, tuple[str, ...]] | None = None
        # Gradients that can be lazy though they are dense: autograd hands on views of complex tensors as they are.
        self._lazy = [t for t, p in enumerate(self.params) if p.is_complex() or p.numel() == 1]
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

    def prepare(self, hyper: Array, gain: float) -> None:
        """Compute what a launch needs, and compile its kernel if there is none; nothing is updated yet."""
        if self._sizes_changed:
            self._plan_sizes()
        if not self._updated:
            return
        if not len(self._rows) or not self._loops.gather(*self._per_tensor, self._seen, self._rows):
            self._find_rows()
        if self.hyper_changed or gain != self._gain or not np.array_equal(self._rows, self._finished):
            self._finish(hyper, gain)

    def has_run(self, p: torch.Tensor) -> bool:
        """Whether a parameter is not one of these, or has been updated since its state was made."""
        for q, kept, mark in zip(self.params, self._kept, self._marks, strict=True):
            if q is p:
                return bool(kept["step"]) if self._rule.has_step else not mark
        return True

    def launch(self) -> None:
        """Update the bucket's tensors that have a gradient, as prepared."""
        if self._updated:
            assert self._kernel is not None
            increment_version(self._updated)
            address, context = self._kernel[1], self._context_address
            numba.launch(
                numba.parts(self._elements), address, context, self._size, self._weight, *self._per_tensor, self._new
            )
        self._grads = []

    def _plan_sizes(self) -> None:
        self._size = self._numel * self.active
        self._weight = np.zeros(len(self._size) + 1, np.int64)
        np.cumsum((self._size + self._loops.OVERHEAD) * self.active, out=self._weight[1:])
        self._updated = [p for p, active in zip(self.params, self.active, strict=True) if active]
        self._elements = int(self._size.sum())
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
        if self.hyper_changed:
            self._columns = rule.unpack(hyper[self._row_group].T)
        if self.pieces_changed or gain != self._gain:
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
            scalars = rule.finish(self._columns, kept, gain, needed=names)
            for k, name in enumerate(names):
                self._table[:, k] = scalars[name]
        for k, name in enumerate(self._scalar_names):
            self._new[:, k] = 0.0 if name == "first" else scalars[name]
        self._finished = rows.copy()
        self.hyper_changed, self.pieces_changed, self._gain = False, False, gain

    def _compile(self, pieces: Pieces) -> tuple[int, tuple[str, ...]]:
        source, scalars = kernel_of(self._title, self._rule, self._variant, pieces, self._dtypes)
        return numba.kernel_address(self._rule.owner.lower(), source), scalars


def _resolve(grads: list[torch.Tensor | None], which: Iterable[int]) -> bool:
    """Write out lazily conjugated and negated gradients: their memory does not hold their values."""
    found = False
    for t in which:
        g = grads[t]
        if g is not None and g.layout == torch.strided and (g.is_conj() or g.is_neg()):
            grads[t], found = g.resolve_conj().resolve_neg(), True
    return found


def kernel_of(
    title: str, rule: Rule, variant: Variant, pieces: Pieces, dtypes: Mapping[str, torch.dtype]
) -> tuple[str, tuple[str, ...]]:
    """The text of the kernel of a form of a rule, and the scalars that it reads."""
    formula, scalars = rule.trace(variant, pieces)
    return numba.kernel_source(title, formula, scalars, dtypes), scalars
