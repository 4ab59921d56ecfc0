"""What a parameter's state is stored as, and reading and writing it with eager torch.

`optimizer.state[p]` holds plain tensors: a state under its own name, or, in 8 bits, its codes under "<name>_codes" and
its blocks' absmax under "<name>_absmax". An optimizer that knows no codes then misses the state, which is an error; it
does not take codes for values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from schuss.engine.storage import (
    BLOCK,
    SMALLEST_ABSMAX,
    SMALLEST_BLOCKWISE,
    Storage,
    keys,
    random_bits,
    stream,
)

if TYPE_CHECKING:
    from schuss.optimizer import Optimizer
    from schuss.rule import State

COMPENSATION = "compensation"
"""The key of what rounding="kahan" keeps."""
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cell:
    """The tensors that hold one role of one parameter.

    Args:
        storage: how they hold it.
        values: the elements, or their codes.
        beside: the blocks' absmax, or what Kahan's rounding keeps.
        key: of the random bits, for stochastic rounding.
    """

    storage: Storage
    values: torch.Tensor
    beside: torch.Tensor | None = None
    key: tuple[int, int] = (0, 0)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors, in the order of `slots`."""
        return [self.values] if self.beside is None else [self.values, self.beside]

    @property
    def is_plain(self) -> bool:
        """Whether one tensor holds the values themselves, and rounds them to the nearest."""
        return self.beside is None and not self.storage.stochastic

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The values, of a complex tensor as pairs of reals, in `dtype`; a plain cell of that dtype itself."""
        if (map_ := self.storage.blockwise) is not None:
            assert self.beside is not None
            shares = map_.decode(_by_blocks(self.values).to(torch.float32))
            return _from_blocks(shares * self.beside[:, None], self.values).to(dtype)
        values = real_view(self.values).to(dtype)
        return values if self.beside is None else values + self.beside.to(dtype)

    def write(self, value: torch.Tensor) -> None:
        """Store new values, computed in float32 or float64."""
        if self.storage.blockwise:
            self._encode(value)
        elif self.storage.kahan:
            assert self.beside is not None
            self.values.copy_(value)
            stored = self.values.to(value.dtype)
            self.beside.copy_(torch.where(stored.isfinite(), value - stored, 0))
        elif self.storage.stochastic:
            bits = random_bits(_positions(self.values), self.key)
            self.values.copy_(_ROUND[self.values.dtype](value.to(torch.float32), bits))
        else:
            write(self.values, value)

    def _encode(self, value: torch.Tensor) -> None:
        map_ = self.storage.blockwise
        assert map_ is not None
        assert self.beside is not None
        rows = _by_blocks(torch.empty_like(self.values, dtype=torch.float32).copy_(value))
        absmax = rows.abs().amax(dim=1)  # torch's maximum hands on NaN
        absmax = torch.where(absmax < SMALLEST_ABSMAX, 0, absmax)
        inverse = torch.where(absmax == 0, 0, 1 / absmax)
        code = map_.encode(rows * inverse[:, None]).to(torch.float32)
        self.beside.copy_(absmax)
        flat(self.values).copy_(code.trunc().to(self.values.dtype).reshape(-1)[: self.values.numel()])


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as reals, for reading; any other tensor itself."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write reals into a tensor, which may be complex, and lazily conjugated."""
    if tensor.is_conj():
        tensor.copy_(torch.view_as_complex(value.contiguous()))
    else:
        real_view(tensor).copy_(value)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def blocks(tensor: torch.Tensor) -> int:
    """How many blocks of 8-bit codes a tensor has."""
    return -(-tensor.numel() // BLOCK)


def _by_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """[block, element], the last block filled up with zeros."""
    missing = -tensor.numel() % BLOCK
    return torch.nn.functional.pad(flat(tensor), (0, missing)).view(-1, BLOCK)


def _from_blocks(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(like, dtype=rows.dtype)
    flat(result).copy_(rows.reshape(-1)[: like.numel()])
    return result


def _positions(tensor: torch.Tensor) -> torch.Tensor:
    """Each element's position in memory, counted in elements; in a view with gaps, gaps left out."""
    result = torch.empty_like(tensor, dtype=torch.int64)
    flat(result).copy_(torch.arange(tensor.numel(), device=tensor.device))
    return result


def _stochastic_bfloat16(value: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    raised = (value.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + (bits >> 16)
    cut = (raised & 0xFFFF0000).to(torch.uint32).view(torch.float32)
    return torch.where(value.isnan(), value, cut)


def _stochastic_float16(value: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    exponent = (value.view(torch.int32) >> 23 & 0xFF).clamp(min=113)
    unit = (exponent - 10 << 23).view(torch.float32)
    per_unit = (264 - exponent << 23).view(torch.float32)
    whole = (value.abs() * per_unit + (bits >> 19).to(torch.float32) * 2.0**-13).trunc()
    return torch.where(value.isfinite(), (whole * unit).copysign(value), value)


_ROUND = {torch.bfloat16: _stochastic_bfloat16, torch.float16: _stochastic_float16}


# --- an optimizer's states -------------------------------------------------------------------------------------------


def kept_by(optimizer: "Optimizer", p: torch.Tensor) -> dict[str, Any]:
    """`optimizer.state[p]`, without making one."""
    kept: dict[str, Any] = optimizer.state.get(p, {})
    return kept


def chosen(optimizer: "Optimizer", p: torch.Tensor, state: "State") -> tuple[Storage, str]:
    """What a new state of a parameter is stored as, and why not as `state_dtype` says."""
    wish = optimizer._options.state_dtype.get(state.name)
    if wish == torch.int8 and state.like != "p":
        return Storage(torch.float32), ""
    if wish is not None and state.like not in ("p", "rows", "columns"):  # bases and roots are found in these digits
        return Storage(torch.promote_types(wish, torch.float32)), ""
    if wish is None:
        return Storage(torch.promote_types(p.dtype, torch.float32) if state.wide else p.dtype), ""
    if p.is_complex():
        return Storage(p.dtype), "complex"
    if wish != torch.int8:
        return Storage(wish), ""
    if p.numel() < SMALLEST_BLOCKWISE:
        return Storage(torch.float32), f"under {SMALLEST_BLOCKWISE:,} elements"
    if type(p) not in (torch.Tensor, torch.nn.Parameter):
        return Storage(torch.float32), f"tensor subclass {type(p).__name__}"
    return Storage(torch.uint8 if state.nonnegative else torch.int8), ""


def parameter_storage(optimizer: "Optimizer", p: torch.Tensor) -> Storage:
    """How a parameter is rounded."""
    plain = type(p) in (torch.Tensor, torch.nn.Parameter)
    return Storage(p.dtype, optimizer._options.rounding if p.dtype in HALF and plain else "nearest")


def keys_of(name: str, storage: Storage) -> tuple[str, ...]:
    """The keys of `optimizer.state[p]` under which the tensors of a state lie."""
    return (f"{name}_codes", f"{name}_absmax") if storage.blockwise else (name,)


def find(kept: Mapping[str, Any], name: str) -> Cell | None:
    """The cell of a state, if it is there."""
    values, codes, absmax = (kept.get(key) for key in (name, f"{name}_codes", f"{name}_absmax"))
    if values is None and codes is not None and absmax is not None:
        return Cell(Storage(codes.dtype), codes, absmax)
    return None if values is None else Cell(Storage(values.dtype), values)


def make(
    name: str, storage: Storage, p: torch.Tensor, shape: tuple[int, ...] | None = None
) -> tuple[Cell, dict[str, torch.Tensor]]:
    """An unwritten cell for a state of a parameter, and its tensors as `optimizer.state[p]` names them.

    Args:
        name: the state's.
        storage: how it is stored.
        p: the parameter.
        shape: the state's; None or the parameter's: it lies in memory as the parameter does.
    """
    if shape is None or shape == tuple(p.shape):
        values = torch.empty_like(p, dtype=storage.dtype, memory_format=torch.preserve_format).detach()
    else:
        values = torch.empty(shape, dtype=storage.dtype, device=p.device)
    absmax = torch.empty(blocks(p), dtype=torch.float32, device=p.device) if storage.blockwise else None
    cell = Cell(storage, values, absmax)
    return cell, dict(zip(keys_of(name, storage), cell.tensors, strict=True))


def parameter_cell(optimizer: "Optimizer", p: torch.Tensor, position: int, step: float) -> Cell:
    """The cell of a parameter, about to take its step number `step`.

    Args:
        optimizer: whose parameter.
        p: the parameter.
        position: its place among all of the optimizer's.
        step: counted from 1.
    """
    storage = parameter_storage(optimizer, p)
    if storage.kahan:
        return Cell(storage, p, kept_by(optimizer, p)[COMPENSATION])
    key = keys(stream(optimizer._options.seed, position), int(step)) if storage.stochastic else (0, 0)
    return Cell(storage, p, key=key)
