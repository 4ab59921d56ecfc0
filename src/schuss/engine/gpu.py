"""A launch of the Triton back end: tables that live on the device, and scalars that can.

Where the counts of steps are on the host, a step's numbers are computed there, as for the CPU, and travel in one
asynchronous copy with the addresses. Where they are on the device (capturable=True), the same functions of scalars run
there on float64 tensors, one element for each tensor: the host knows no number of the step, and a CUDA graph that
captured it computes new ones each time it is replayed.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from schuss.engine import triton
from schuss.engine.bucket import SQUARE, Array, Bucket, Step, sizes_of
from schuss.engine.process import uninterrupted
from schuss.engine.stages import Domain, Level, Sums, Values
from schuss.engine.storage import Layout, Storage, compute_dtype
from schuss.engine.trace import Expr, Formula
from schuss.rule import Rule

if TYPE_CHECKING:
    from schuss.engine.plan import Entry
    from schuss.optimizer import Optimizer


class GpuBucket(Bucket):
    """Tensors of one device that one launch updates; see `Bucket`.

    Args:
        on_device: whether step counts are on the device, and so the scalars are computed there.
    """

    def __init__(
        self,
        rule: Rule,
        optimizer: "Optimizer",
        entries: "list[Entry]",
        layout: Layout,
        fresh: set[int],
        *,
        on_device: bool,
    ) -> None:
        super().__init__(rule, optimizer, entries, layout, fresh)
        self.on_device = on_device
        device = self.params[0].device
        self._captured = optimizer._captured
        self._static, self._moving, self._addresses = (Tables(device, self._captured) for _ in range(3))
        self._numbers, self._index, self._marked = (Tables(device, self._captured) for _ in range(3))
        self._hosts, self._ends = (Tables(device, self._captured) for _ in range(2))
        self._known: dict[str, torch.Tensor] = {}
        self._factor: torch.Tensor | None = None
        self._skip: torch.Tensor | None = None
        self._columns: dict[str, Any] = {}
        self._work = self._sizes = self._stream_table = torch.empty(0)
        self._last_gain: float | torch.Tensor = 1.0
        self._first: torch.Tensor | None = None

    def prepare(self, step: Step) -> None:
        if is_capturing(self.params[0].device):
            if self._rule.scalar_states and not self.on_device:
                raise RuntimeError(
                    f"{self._rule.owner}: a CUDA graph would repeat this step's number for ever; pass capturable=True "
                    "for steps that are captured"
                )
            # Made before, read by every replay, and perhaps replaced by a later step.
            self._captured.append((self._work, self._sizes, self._stream_table, self._columns, self._first))
        if not self.on_device:
            super().prepare(step)
        else:
            if self._sizes_changed:
                self._plan_sizes()
            if self._updated:
                self._finish_on_device(step)
        self._factor = None if step.factor is None else self._here(step.factor).to(compute_dtype(self._layout))
        self._skip = None if step.skip is None else self._here(step.skip)
        self.hyper_changed = False
        if self._is_staged and self._updated:
            self._start_stages()

    def _here(self, number: Any) -> torch.Tensor:
        return torch.as_tensor(number).to(self.params[0].device, non_blocking=True)

    def _square_sum(self) -> torch.Tensor:
        (addresses,) = self._addresses.put(np.ascontiguousarray(self._address[:, 1]))
        kernel = _square_kernel(self._layout["g"].dtype)
        return triton.run_sums(kernel, 1, len(self._work), self._work, self._sizes, addresses).sum()

    # --- passes that find sums --------------------------------------------------------------------------------------

    def _compile_sums(self, sums: Sums, layout: Layout) -> Any:
        return triton.load("sum", triton.sum_source(f"Sums of {self._title}", sums, layout))

    def _start_stages(self) -> None:
        """Bring to the device what is known before the first pass."""
        stages, dtype = self._stages, compute_dtype(self._layout)
        there = self.active if self.on_device else np.ones_like(self.active)
        sizes = [sizes_of(node, self.params)[there] for node in stages.sizes]
        if self.on_device:
            known: dict[str, Any] = self._known
            there_sizes = self._hosts.put(*sizes) if sizes else []
        else:
            numbers, *there_sizes = self._hosts.put(np.array(list(self._scalars.values())), *sizes)
            known = dict(zip(self._scalars, numbers, strict=True))
            missing = len(stages.scalars) - len(numbers)
            table = [numbers.T, numbers.new_zeros(numbers.shape[1], missing)]
            self._device_table = torch.cat(table, dim=1).to(dtype)
        self._found, self._values = 0, Values(known, self._stacked)
        self._values.known |= zip(stages.sizes, there_sizes, strict=True)

    @torch.no_grad()
    def _sum(self, level: Level, kernel: Any) -> list[torch.Tensor]:
        addresses, row_of = self._moving.put(self._all_addresses(), self._row_of)
        count = len(level.reductions)
        sums = triton.run_sums(
            kernel, count, len(self._work), self._work, self._sizes, addresses, row_of, self._device_table, self._factor
        )
        chunks = -(-self._size // triton.CHUNK)
        if self.on_device:
            chunks = chunks[self.active]
        (ends,) = self._ends.put(np.cumsum(chunks))
        return list(triton.add_up(sums, ends).T)

    def _store(self, kernel: Any) -> None:
        addresses, row_of = self._moving.put(self._all_addresses(), self._row_of)
        triton.run(
            kernel, len(self._work), self._work, self._sizes, addresses, row_of, self._device_table,
            self._stream_table, self._factor, self._skip,
        )  # fmt: skip

    @torch.no_grad()
    def _take(self, names: Sequence[str]) -> None:
        for name in names:
            self._device_table[:, self._stages.scalars.index(name)] = self._values(self._stages.between[name])

    @torch.no_grad()
    def _take_outside(self, nodes: Mapping[str, Expr]) -> None:
        for letter, node in nodes.items():
            if (name := self._rule.number_states.get(letter)) is None:
                self._new_beside[letter] = self._values(node)
            else:
                k = list(self._rule.scalar_states).index(name)
                self._new_numbers[k] = self._column(self._values(node), len(self._updated))

    def _over_tensors(self, numbers: Any) -> torch.Tensor:
        if not isinstance(numbers, torch.Tensor) or not numbers.dim():
            return self._column(numbers, len(self._updated)).sum()
        values: torch.Tensor = numbers
        if not self.on_device:
            values = values[self._index.put(np.flatnonzero(self.active))[0]]
        return values.sum()

    def _plan_sizes(self) -> None:
        super()._plan_sizes()
        chunks = -(-self._size // triton.CHUNK)
        tensors = np.repeat(np.arange(len(chunks), dtype=np.int32), chunks)
        first = np.repeat(np.cumsum(chunks) - chunks, chunks)
        chunk_of = (np.arange(len(tensors)) - first).astype(np.int32)
        self._work, self._sizes, self._stream_table = self._static.put(
            np.stack([tensors, chunk_of], axis=1), self._size, self._streams.view(np.int64)
        )
        if self.on_device:
            self._row_of[self.active] = np.arange(len(self._updated))
            self._columns = {}
            self._numbers_of_tensors = [
                [kept[name] for kept, active in zip(self._kept, self.active, strict=True) if active]
                for name in self._rule.scalar_states
            ]

    def _compile(
        self, formula: Formula, scalars: tuple[str, ...], layout: Layout, vectors: Mapping[str, Domain]
    ) -> Any:
        source = triton.kernel_source(self._title, formula, scalars, layout)
        return triton.load(self._rule.owner.lower(), source)

    def _run(self, kernel: Any) -> None:
        if self.on_device or self._is_staged:
            addresses, row_of = self._moving.put(self._all_addresses(), self._row_of)
            table = self._device_table
        else:
            addresses, row_of, table = self._moving.put(self._address, self._row_of, self._table)
        with uninterrupted():  # tensors and their step counts change together
            triton.run(
                kernel, len(self._work), self._work, self._sizes, addresses, row_of, table, self._stream_table,
                self._factor, self._skip,
            )  # fmt: skip
            if self.on_device:
                self._advance_on_device()
            else:
                self._loops.advance(*self._per_tensor, self._new)

    # --- scalars on the device --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _finish_on_device(self, step: Step) -> None:
        rule = self._rule
        if self.hyper_changed or not self._columns or step.live:
            self._columns = self._columns_on_device(step)
        if self.pieces_changed or self._made is None or step.gain is not self._last_gain:
            known = rule.unpack(step.hyper[self._groups].T)
            gain = step.gain if isinstance(step.gain, float) else np.nan
            pieces = rule.pieces(known, gain)
            if self._made is None or self._made.pieces != pieces:
                self._made = self._make(pieces)
            self.pieces_changed, self._last_gain = False, step.gain
        kept = {
            name: torch.stack(numbers).to(torch.float64)
            for name, numbers in zip(rule.scalar_states, self._numbers_of_tensors, strict=True)
        }
        if rule.marks_first:
            if self._first is None:
                (self._first,) = self._marked.put(self._marks)
            (self._updated_there,) = self._index.put(np.flatnonzero(self.active))
            kept["first"] = self._first[self._updated_there] != 0
        names, stages = self._made.scalars, self._made.stages
        scalars = rule.finish(self._columns, kept | rule.given(self.params[0]), step.gain, needed=names)
        count, dtype = len(self._updated), compute_dtype(self._layout)
        columns = [self._column(scalars[name], count) for name in names]
        self._known = dict(zip(names, columns, strict=True))
        if stages is not None:
            columns += [torch.zeros(count, dtype=torch.float64, device=self.params[0].device)] * (
                len(stages.scalars) - len(names)
            )
        self._device_table = torch.stack(columns, dim=1).to(dtype) if columns else self._work.new_empty(0)
        self._new_numbers = [self._column(scalars[name], count) for name in rule.scalar_states]

    def _column(self, value: Any, count: int) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            return torch.full((count,), float(value), dtype=torch.float64, device=self.params[0].device)
        return value.to(torch.float64).expand(count)

    def _columns_on_device(self, step: Step) -> dict[str, Any]:
        """The hyperparameters by name: float64 vectors with an element for each tensor that has a gradient."""
        groups, hyper = self._groups[self.active], np.ascontiguousarray(step.hyper.T)
        index, table = self._numbers.put(groups, hyper)
        columns = list(table[:, index])
        for column, tensors in step.live.items():
            values = [
                table[column, group] if tensor is None else tensor.detach().to(table).reshape(())
                for group, tensor in enumerate(tensors)
            ]
            columns[column] = torch.stack(values)[index]
        return self._rule.unpack(columns)

    @torch.no_grad()
    def _advance_on_device(self) -> None:
        for numbers, new in zip(self._numbers_of_tensors, self._new_numbers, strict=True):
            if self._skip is not None:
                new = torch.where(self._skip != 0, torch.stack(numbers).to(new.dtype), new)
            torch._foreach_copy_(numbers, list(new.to(numbers[0].dtype).unbind()))
        if self._first is not None:  # a step that was skipped was not the first
            self._first[self._updated_there] *= 0.0 if self._skip is None else self._skip != 0


@cache
def _square_kernel(dtype: torch.dtype) -> Any:
    source = triton.sum_source("Squares of gradients", SQUARE, {"g": Storage(dtype)}, value="float64")
    return triton.load("squares", source)


class Tables:
    """Arrays of the host that lie on the device, too: they go over in one copy, and only when one has changed.

    Args:
        device: where.
        captured: takes what a CUDA graph that is being captured will use whenever it is replayed.
    """

    def __init__(self, device: torch.device, captured: list[Any]) -> None:
        self._device, self._captured = device, captured
        self._sent: list[Array] = []
        self._stream: Any = None
        self._views: list[torch.Tensor] = []

    def put(self, *arrays: Array) -> list[torch.Tensor]:
        """The arrays as tensors on the device, for work on its current stream."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        same = len(arrays) == len(self._sent) and stream == self._stream
        if not (same and all(map(_equal, arrays, self._sent))):
            self._views = self._send(arrays)
            self._sent, self._stream = [array.copy() for array in arrays], stream
        if is_capturing(self._device):
            self._captured.append(self._views)
        return self._views

    def _send(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        starts = np.cumsum([0, *(-(-array.nbytes // 16) * 16 for array in arrays)])
        cuda = self._device.type == "cuda"
        host = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=cuda)
        buffer = host.numpy()
        for start, array in zip(starts, arrays, strict=False):
            buffer[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        sent = host.to(self._device, non_blocking=True)  # the pinned memory is kept by torch until it has been read
        if is_capturing(self._device):  # a replay reads the host's memory again
            self._captured.append(host)
        return [
            sent[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]


_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def _equal(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
