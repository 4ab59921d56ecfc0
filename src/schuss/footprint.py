"""Memory and bytes moved of a training, before there is one: from the optimizer's own plan of tensors without memory.

What `schuss plan` prints. Activations are not in it, nor a module's buffers.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from schuss.engine.report import _bytes as size
from schuss.engine.state import COMPENSATION, HALF
from schuss.engine.storage import Rounding
from schuss.optimizer import Optimizer
from schuss.options import STATE_DTYPES


@dataclass(frozen=True)
class Row:
    """What a training takes with one storage of the state.

    Args:
        state_dtype: as the optimizer takes it; None is like the parameter.
        rounding: how bfloat16 and float16 parameters are rounded.
        parameters: how many numbers there are, in all tensors.
        trained: how many of them are not frozen.
        weights: bytes of all parameters.
        gradients: bytes of the gradients of those that are trained.
        state: bytes of their state; None if the optimizer refuses this storage.
        moved: bytes that a step must read and write; None likewise.
        remarks: which tensors are stored otherwise and why, or why the optimizer refuses.
    """

    state_dtype: Any
    rounding: Rounding
    parameters: int
    trained: int
    weights: int
    gradients: int
    state: int | None = None
    moved: int | None = None
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The storage in words."""
        if self.state_dtype is None:
            return "like the parameter"
        if isinstance(self.state_dtype, Mapping):
            return ", ".join(f"{state} {_dtype_name(dtype)}" for state, dtype in self.state_dtype.items())
        return _dtype_name(self.state_dtype)

    @property
    def total(self) -> int | None:
        """Bytes of weights, gradients and state."""
        return None if self.state is None else self.weights + self.gradients + self.state

    def seconds(self, bandwidth: float) -> float | None:
        """How long a step takes that waits for memory alone, and not for arithmetic.

        Args:
            bandwidth: of the memory, in bytes per second.
        """
        return None if self.moved is None else self.moved / bandwidth


def footprint(
    params: Iterable[torch.Tensor],
    optimizer: type[Optimizer],
    settings: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Row]:
    """What training these parameters takes, with each storage of the state.

    The numbers are those of `optimizer.plan()`. Neither tensors' memory nor their values are looked at, so tensors on
    the meta device do.

    Args:
        params: what the optimizer will be given. Parameters that need no gradient count as weights only.
        optimizer: a class of `schuss.optim`, or a subclass of `schuss.Optimizer`.
        settings: its hyperparameters and options. A `state_dtype` by name among them gets a row of its own.
        dtype: of the floating-point parameters; None is as they are.

    Returns:
        A row for state like the parameter, in float32, bfloat16 and int8; and, if parameters are bfloat16 or float16
        and `settings` has no `rounding`, one for state like the parameter with rounding="kahan".

    Raises:
        ValueError: a hyperparameter out of its bounds, no parameter that is trained, or the same one twice.
        TypeError: a hyperparameter that the optimizer does not have.
    """
    settings, given = dict(settings or {}), list(params)
    if len({id(p) for p in given}) != len(given):
        raise ValueError("a parameter appears twice")
    shapes = [_without_memory(p, dtype) for p in given]
    trained = [s for p, s in zip(given, shapes, strict=True) if p.requires_grad or not isinstance(p, nn.Parameter)]
    if not trained:
        raise ValueError("no parameter is trained: " + ("all are frozen" if given else "there are none"))
    optimizer(trained, **settings)  # what is wrong for all rows is an error

    wishes: list[Any] = [None, *STATE_DTYPES]
    if isinstance(own := settings.get("state_dtype"), Mapping):
        wishes.append(own)
    rounding: Rounding = settings.get("rounding", "nearest")
    forms = [(wish, rounding) for wish in wishes]
    if "rounding" not in settings and any(s.dtype in HALF for s in trained):
        forms.append((None, "kahan"))
    counts = (_elements(shapes), _elements(trained), _bytes(shapes), _bytes(trained))
    rows = []
    for state_dtype, rounded in forms:
        # Every back end stores the same. The eager one can be planned on any device.
        changed = settings | {"state_dtype": state_dtype, "rounding": rounded, "backend": "reference"}
        try:
            plan = optimizer(trained, **changed).plan()
        except ValueError as error:
            rows.append(Row(state_dtype, rounded, *counts, remarks=(str(error),)))
            continue
        otherwise = Counter(
            [
                (f"{storage}", why)
                for e in plan.entries
                for storage, why in {stored for name, stored in e.stored.items() if name != COMPENSATION}
                if why
            ]
        )
        remarks = tuple(
            f"{kept} for {count:,} of {len(trained):,} tensors ({why})" for (kept, why), count in otherwise.items()
        )
        rows.append(Row(state_dtype, rounded, *counts, plan.state_bytes, plan.traffic_bytes, remarks))
    return rows


def _without_memory(p: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor on the meta device, of the same type: the type decides what state is stored as."""
    wanted = dtype if dtype is not None and p.is_floating_point() else p.dtype
    shape = torch.empty_like(p.detach(), dtype=wanted, device="meta")
    return shape if type(p) in (type(shape), nn.Parameter) else shape.as_subclass(type(p))


def _elements(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# --- bandwidth -------------------------------------------------------------------------------------------------------

_ARRAY = 2**28
"""Bytes. Two of them are more than caches hold, and a pass over them is long beside a time slice of a busy machine."""
_PASSES = 10


@dataclass(frozen=True)
class Bandwidth:
    """How fast memory is.

    Args:
        rate: bytes per second, read and written ones together.
        source: how it is known.
    """

    rate: float
    source: str


def measure() -> Bandwidth:
    """The bandwidth of this machine, in about a second: of its CUDA device if there is one, or else of its CPU.

    On the CPU it is that of `a += s * b` in place, with torch's threads; on a device that of a copy. The best of ten
    passes, so that what else runs there counts little.
    """
    if torch.cuda.is_available():
        return _measure_copy()
    a, b = (torch.ones(_ARRAY // 4) for _ in range(2))
    times = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        a.add_(b, alpha=0.5)
        times.append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    where = f"on the CPU with {threads} thread{'' if threads == 1 else 's'}"
    return Bandwidth(3 * _ARRAY / min(times), f"measured by a += s * b {where}")


def _measure_copy() -> Bandwidth:
    count = min(4 * _ARRAY, torch.cuda.mem_get_info()[0] // 4)
    a, b = (torch.ones(count, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = []
    for _ in range(_PASSES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a.copy_(b)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return Bandwidth(2 * count / min(times), f"measured by a copy on {torch.cuda.get_device_name()}")


# --- what is printed -------------------------------------------------------------------------------------------------

HEADER = ("", "bytes per\nparameter", "in all", "total with\nthis state", "moved\nper step", "ms\nper step")


def table(rows: Sequence[Row], bandwidth: float) -> list[tuple[str, ...]]:
    """The cells under `HEADER`: weights, gradients, and every row of `footprint`.

    Args:
        rows: what it returned.
        bandwidth: of the memory, in bytes per second.
    """
    first = rows[0]

    def amount(number: int) -> tuple[str, str]:
        return f"{number / max(first.parameters, 1):.2f}", size(number)

    cells: list[tuple[str, ...]] = [
        (name, *amount(number), "", "", "")
        for name, number in (("weights", first.weights), ("gradients", first.gradients))
    ]
    for row in rows:
        if row.state is None or row.total is None or row.moved is None:
            cells.append((f"state {row.name}", *["-"] * 5))
        elif row.rounding != first.rounding:  # what it adds, whatever the storage
            assert first.state is not None
            assert first.moved is not None
            state, moved = row.state - first.state, row.moved - first.moved
            added = (*amount(state), size(state), size(moved), _milliseconds(moved / bandwidth))
            cells.append((f'rounding="{row.rounding}" adds', *added))
        else:
            taken = (*amount(row.state), size(row.total), size(row.moved), _milliseconds(row.moved / bandwidth))
            cells.append((f"state {row.name}", *taken))
    return cells


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the table does not say, one sentence each."""
    return [f"{row.name}: {remark}" for row in rows if row.rounding == rows[0].rounding for remark in row.remarks]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds >= 1e-3 else 4}f}"
