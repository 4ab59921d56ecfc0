"""The reference back end: a rule run by eager torch on one tensor. The definition of correct, and the torch path."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from schuss.engine.numba import compute_dtype, real
from schuss.engine.pieces import Pieces, apply


def update(
    rule: Callable[..., Any],
    pieces: Pieces,
    p: torch.Tensor,
    g: torch.Tensor,
    states: Mapping[str, torch.Tensor | None],
    scalars: Mapping[str, Any],
    flags: Mapping[str, bool],
    *,
    differentiable: bool = False,
) -> None:
    """Write the new parameter and states into `p` and `states`.

    Half types are computed in float32 and rounded once; complex tensors through their real view; of a sparse gradient
    only the rows that it has are touched.
    """
    if g.layout != torch.strided:
        g = g.coalesce()
        rows = tuple(g.indices())
        part = p[rows]
        parts = {n: None if s is None else s[rows] for n, s in states.items()}
        update(rule, pieces, part, g.values(), parts, scalars, flags)
        p.index_put_(rows, part)
        for name, state in states.items():
            if state is not None and (new := parts[name]) is not None:
                state.index_put_(rows, new)
        return
    there = {n: s for n, s in states.items() if s is not None}
    dtype = compute_dtype(tuple(real(t.dtype) for t in (p, g, *there.values())))

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        # autograd keeps what it multiplies: it must be a copy where the original is about to be written
        tensor = tensor.clone() if differentiable else tensor
        return real_view(tensor).to(dtype)

    # Scalars as tensors of the computation's dtype: they round, and promote, as in a kernel.
    others: dict[str, Any] = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype, device=p.device)
        for name, value in scalars.items()
    }
    wide = {n: None if s is None else widen(s) for n, s in states.items()}
    updated = apply(rule, pieces, widen(p), widen(g), wide, others | dict(flags))
    write(p, updated.pop("p"))
    for name, value in updated.items():
        write(there[name], value)


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as reals, for reading; any other tensor itself."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write reals into a tensor, which may be complex, and lazily conjugated."""
    if tensor.is_conj():
        tensor.copy_(torch.view_as_complex(value.contiguous()))
    else:
        real_view(tensor).copy_(value)
