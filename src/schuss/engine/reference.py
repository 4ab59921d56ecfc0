"""The reference back end: a rule run by eager torch on one tensor. The definition of correct, and the torch path."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from schuss.engine.pieces import Pieces, apply
from schuss.engine.state import Cell, real_view
from schuss.engine.storage import Storage, compute_dtype, real


def update(
    rule: Callable[..., Any],
    pieces: Pieces,
    p: Cell,
    g: torch.Tensor,
    states: Mapping[str, Cell | None],
    scalars: Mapping[str, Any],
    flags: Mapping[str, bool],
    *,
    differentiable: bool = False,
) -> None:
    """Write the new parameter and states into their cells.

    Half types are computed in float32 and rounded once; complex tensors through their real view; of a sparse gradient
    only the rows that it has are touched.
    """
    if g.layout != torch.strided:
        _update_rows(rule, pieces, p, g.coalesce(), states, scalars, flags)
        return
    there = {"p": p, **{n: s for n, s in states.items() if s is not None}}
    dtype = computed_in([g, *(cell.values for cell in there.values())])

    def widen(cell: Cell) -> torch.Tensor:
        # autograd keeps what it multiplies: it must be a copy where the original is about to be written
        return cell.read(dtype).clone() if differentiable else cell.read(dtype)

    # Scalars as tensors of the computation's dtype: they round, and promote, as in a kernel.
    others: dict[str, Any] = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype, device=g.device)
        for name, value in scalars.items()
    }
    wide = {n: None if s is None else widen(s) for n, s in states.items()}
    updated = apply(rule, pieces, widen(p), real_view(g).to(dtype), wide, others | dict(flags))
    for name, value in updated.items():
        there[name].write(value)


def computed_in(tensors: list[torch.Tensor]) -> torch.dtype:
    """The dtype in which a rule computes on these tensors."""
    return compute_dtype({str(i): Storage(real(t.dtype)) for i, t in enumerate(tensors)})


def _update_rows(
    rule: Callable[..., Any],
    pieces: Pieces,
    p: Cell,
    g: torch.Tensor,
    states: Mapping[str, Cell | None],
    scalars: Mapping[str, Any],
    flags: Mapping[str, bool],
) -> None:
    rows = tuple(g.indices())
    wholes: dict[str, tuple[Cell, torch.Tensor]] = {}

    def part(name: str, cell: Cell) -> Cell:
        # Blocks are read and written whole; values that have not changed get the codes that they had.
        whole = cell.values if cell.is_plain else cell.read(torch.float32)
        wholes[name] = (cell, whole)
        taken = whole[rows]
        return Cell(Storage(taken.dtype), taken)

    of_p = part("p", p)
    parts = {n: None if s is None else part(n, s) for n, s in states.items()}
    update(rule, pieces, of_p, g.values(), parts, scalars, flags)
    new = {"p": of_p, **parts}
    for name, (cell, whole) in wholes.items():
        taken = new[name]
        assert taken is not None
        whole.index_put_(rows, taken.values)
        if not cell.is_plain:
            cell.write(whole)
