"""Functions of matrices with a square matrix on either side: what SOAP and Shampoo keep of rows and of columns.

Those that are words of rules take a batch, and go through it matrix by matrix on the CPU: so a matrix's result has the
same bits whatever stands beside it. Long sides are cut into blocks of one length, the last one filled up with zeros; a
matrix then has a grid of blocks, row by row, and each of them has square matrices of its own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schuss.matrices.newton_schulz import _STRIP, _symmetric

__all__ = [
    "cut", "eigenbasis", "grid", "inverse_root", "left_moment", "next_basis", "right_moment", "rotate", "rotate_back",
    "surround", "turn",
]  # fmt: skip


def cut(side: int, block: int | None) -> tuple[int, int]:
    """How many blocks a side is cut into, and their length.

    Args:
        side: its length.
        block: the greatest length of a block; None: whatever the side is.
    """
    count = 1 if block is None else max(1, -(-side // block))
    return count, -(-side // count)


def grid(x: Tensor, block: int | None) -> Tensor:
    """The blocks of matrices [batch, rows, columns]: [batch, blocks, rows of one, columns of one]."""
    (down, height), (across, width) = (cut(side, block) for side in x.shape[-2:])
    missing = (0, across * width - x.shape[-1], 0, down * height - x.shape[-2])
    if any(missing):
        x = torch.nn.functional.pad(x, missing)
    return x.reshape(-1, down, height, across, width).transpose(2, 3).reshape(-1, down * across, height, width)


def _joined(parts: Tensor, like: Tensor, block: int | None) -> Tensor:
    """The matrices whose `grid` the parts are."""
    (down, height), (across, width) = (cut(side, block) for side in like.shape[-2:])
    whole = parts.view(-1, down, across, height, width).transpose(2, 3).reshape(-1, down * height, across * width)
    return whole[:, : like.shape[-2], : like.shape[-1]]


# --- words ------------------------------------------------------------------------------------------------------------

Squares = Tensor | Sequence[Tensor]
"""Square matrices of each matrix of a batch: [batch, side, side] or [batch, blocks, side, side], or a list over it."""


def left_moment(
    x: Tensor,
    moment: Squares,
    keep: Any,
    weight: Any,
    *,
    block: int | None = None,
    out: Sequence[Tensor | None] | None = None,
) -> Tensor | None:
    """keep L + weight x xᵀ, the moment of the rows.

    Args:
        x: [batch, rows, columns]. In bfloat16 the product is rounded to it before it is added.
        moment: L.
        keep, weight: a number for each matrix. Where weight is 0 and keep is 1 nothing is computed.
        block: the greatest side of a block.
        out: where each value goes, perhaps to L itself; None: nowhere.

    Returns:
        A batch; None if the values were written to out.
    """
    return _moment(grid(x, block), moment, keep, weight, out)


def right_moment(
    x: Tensor,
    moment: Squares,
    keep: Any,
    weight: Any,
    *,
    block: int | None = None,
    out: Sequence[Tensor | None] | None = None,
) -> Tensor | None:
    """keep R + weight xᵀ x, the moment of the columns; as `left_moment`."""
    return _moment(grid(x, block).mT, moment, keep, weight, out)


def _moment(
    parts: Tensor, moment: Squares, keep: Any, weight: Any, out: Sequence[Tensor | None] | None
) -> Tensor | None:
    if out is None:
        batch = moment[0].new_empty(len(moment), *moment[0].shape)
        _moment(parts, moment, keep, weight, list(batch))
        return batch
    numbers = zip(_floats(keep, parts), _floats(weight, parts), strict=True)
    for x, before, after, (kept, added) in zip(parts, moment, out, numbers, strict=True):
        if after is None:
            continue
        a, result = (t.view(len(x), *t.shape[-2:]) for t in (before, after))
        if added == 0 and kept == 1:
            result.copy_(a)
        elif x.dtype == a.dtype:
            _symmetric(x, x.mT, out=result, add=a, beta=kept, alpha=added)
        else:
            product = torch.empty(a.shape, dtype=x.dtype, device=x.device)
            _symmetric(x, x.mT, out=product)
            torch.mul(a, kept, out=result).add_(product.to(a.dtype), alpha=added)
    return None


def _floats(numbers: Any, like: Tensor) -> list[float]:
    """A number for each matrix, rounded as tensors round them: back ends give them in more digits, or in fewer."""
    given = numbers.tolist() if isinstance(numbers, (Tensor, np.ndarray)) else [float(numbers)]
    rounded = np.asarray(given, np.float64 if like.dtype == torch.float64 else np.float32)
    return [float(number) for number in np.broadcast_to(rounded, len(like))]


def rotate(x: Tensor, left: Squares | None, right: Squares | None) -> Tensor:
    """Qₗᵀ x Qᵣ: matrices [batch, rows, columns] in the bases of their sides; None: that side stays."""
    return surround(x, _transposed(left), right)


def rotate_back(x: Tensor, left: Squares | None, right: Squares | None) -> Tensor:
    """Qₗ x Qᵣᵀ, the inverse of `rotate`."""
    return surround(x, left, _transposed(right))


def _transposed(squares: Squares | None) -> Squares | None:
    return squares.mT if isinstance(squares, Tensor) else squares and [square.mT for square in squares]


def surround(x: Tensor, left: Squares | None, right: Squares | None, *, block: int | None = None) -> Tensor:
    """A x B, in x's dtype; of each block its own.

    Args:
        x: [batch, rows, columns].
        left, right: A and B. None: that side stays.
        block: the greatest side of a block.
    """
    parts = grid(x, block)
    if x.device.type != "cpu":
        a, b = (None if f is None else _batch(f, parts) for f in (left, right))
        y = parts if a is None else a @ parts
        return _joined(y if b is None else y @ b, x, block)
    result = torch.empty_like(parts)
    for k, (part, to) in enumerate(zip(parts, result, strict=True)):
        a, b = (None if f is None else f[k].to(x.dtype).reshape(-1, *f[k].shape[-2:]) for f in (left, right))
        _surround(part, a, b, to)
    return _joined(result, x, block)


def _batch(squares: Squares, like: Tensor) -> Tensor:
    """[batch, blocks, side, side], in another's dtype."""
    batch = squares if isinstance(squares, Tensor) else torch.stack(list(squares))
    return batch.to(like.dtype).reshape(*like.shape[:2], *batch.shape[-2:])


def _surround(x: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor) -> None:
    """A x B of blocks [block, rows, columns]."""
    if left is not None and right is not None:
        _product(_product(left, x), right, out)
    elif left is not None:
        _product(left, x, out)
    elif right is not None:
        _product(x, right, out)
    else:
        out.copy_(x)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if len(a) == 1:  # mm takes factors as they lie
        return torch.mm(a[0], b[0], out=None if out is None else out[0])[None]
    return torch.bmm(a, b, out=out)


# --- what is computed now and then ------------------------------------------------------------------------------------


def eigenbasis(a: Tensor) -> Tensor | None:
    """The eigenvectors of a symmetric matrix as columns, those of large eigenvalues first.

    Returns:
        The basis; None if the matrix is not finite, or its eigenvectors are not found.
    """
    found = _eigh(a)
    return None if found is None else found[1].flip(-1)


def next_basis(a: Tensor, basis: Tensor) -> tuple[Tensor, Tensor] | None:
    """A basis closer to the eigenvectors of a symmetric matrix: one power iteration, made orthogonal again.

    Args:
        a: the matrix.
        basis: the basis before, as columns.

    Returns:
        The new basis, and for each of its columns the place of the old one that it was made of: they are put in the
        order of their estimated eigenvalues first. None if the matrix is not finite.
    """
    product = a @ basis
    strips = zip(basis.split(_STRIP), product.split(_STRIP), strict=True)  # products that stay in the cache
    eigenvalues = torch.stack([(b * p).sum(dim=0) for b, p in strips]).sum(dim=0)
    if not eigenvalues.isfinite().all():
        return None
    order = eigenvalues.argsort(descending=True, stable=True)
    new = torch.linalg.householder_product(*torch.geqrf(product.index_select(1, order)))  # Q alone
    return (new, order) if bool(new.sum().isfinite()) else None  # no element exceeds 1


def turn(
    x: Tensor,
    left: tuple[Tensor, Tensor] | None,
    right: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A matrix in new bases, by the fewest operations: of a long side back and forth, of a short one by a single turn.

    Args:
        x: [rows, columns], in the old bases.
        left, right: of a side the old basis and the new one; None: it stays.
        dtype: of the products; None: x's.
    """
    factors = [x]
    if left is not None:
        factors = [left[1].mT, left[0], *factors]
    if right is not None:
        factors = [*factors, right[0].mT, right[1]]
    if len(factors) == 1:
        return x
    product: Tensor = torch.linalg.multi_dot([factor.to(dtype or x.dtype) for factor in factors])
    return product.to(x.dtype)


def inverse_root(a: Tensor, exponent: float, eps: float) -> Tensor | None:
    """A power -exponent of symmetric matrices of no negative eigenvalue.

    Args:
        a: [matrices, side, side].
        exponent: in (0, inf).
        eps: added to the eigenvalues, times the largest one of each matrix.

    Returns:
        The powers, 0 of a matrix that is 0; None if one is not finite, or its eigenvectors are not found.
    """
    found = _eigh(a)
    if found is None:
        return None
    values, vectors = found
    values = values.clamp(min=0)  # rounding makes zeros negative
    largest = values[..., -1:]
    powers = torch.where(largest > 0, (values + eps * largest) ** -exponent, 0)
    root = (vectors * powers[..., None, :]) @ vectors.mT
    return root if bool(root.isfinite().all()) else None


def _eigh(a: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues in rising order, and eigenvectors, in a's dtype; tried in float64, too."""
    if not bool(a.isfinite().all()):
        return None
    for dtype in (a.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(a.to(dtype))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what LAPACK, or its like, complains of
            continue
        if bool(vectors.isfinite().all()):
            return values.to(a.dtype), vectors.to(a.dtype)
    return None
