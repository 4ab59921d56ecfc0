"""Functions of matrices with a square matrix on either side: what SOAP and Shampoo keep of rows and of columns.

Those that are words of rules take a batch, and go through it matrix by matrix on the CPU: so a matrix's result has the
same bits whatever stands beside it. Long sides are cut into blocks of one length, the last one filled up with zeros; a
matrix then has a grid of blocks, row by row, and each of them has square matrices of its own.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from schuss.matrices.newton_schulz import _symmetric

__all__ = [
    "cut", "eigenbasis", "grid", "inverse_root", "left_moment", "next_basis", "right_moment", "rotate", "rotate_back",
    "surround",
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


def left_moment(x: Tensor, moment: Tensor, keep: Any, weight: Any, *, block: int | None = None) -> Tensor:
    """keep L + weight x xᵀ, the moment of the rows.

    Args:
        x: [batch, rows, columns]. In bfloat16 the product is rounded to it before it is added.
        moment: L, [batch, rows, rows], or [batch, blocks, rows of one, rows of one].
        keep, weight: a number for each matrix. Where weight is 0 and keep is 1 nothing is computed.
        block: the greatest side of a block.
    """
    return _moment(grid(x, block), moment, keep, weight)


def right_moment(x: Tensor, moment: Tensor, keep: Any, weight: Any, *, block: int | None = None) -> Tensor:
    """keep R + weight xᵀ x, the moment of the columns; as `left_moment`."""
    return _moment(grid(x, block).mT, moment, keep, weight)


def _moment(parts: Tensor, moment: Tensor, keep: Any, weight: Any) -> Tensor:
    before = moment.view(*parts.shape[:2], *moment.shape[-2:])
    after = torch.empty_like(before)
    for k, (kept, added) in enumerate(zip(_floats(keep, parts), _floats(weight, parts), strict=True)):
        x, a, result = parts[k], before[k], after[k]
        if added == 0 and kept == 1:
            result.copy_(a)
        elif x.dtype == a.dtype:
            _symmetric(x, x.mT, out=result, add=a, beta=kept, alpha=added)
        else:
            product = torch.empty(a.shape, dtype=x.dtype, device=x.device)
            _symmetric(x, x.mT, out=product)
            torch.mul(a, kept, out=result).add_(product.to(a.dtype), alpha=added)
    return after.view(moment.shape)


def _floats(numbers: Any, like: Tensor) -> list[float]:
    """A number for each matrix, rounded as tensors round them: back ends give them in more digits, or in fewer."""
    given = numbers.tolist() if isinstance(numbers, (Tensor, np.ndarray)) else [float(numbers)]
    rounded = np.asarray(given, np.float64 if like.dtype == torch.float64 else np.float32)
    return [float(number) for number in np.broadcast_to(rounded, len(like))]


def rotate(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Qₗᵀ x Qᵣ: matrices [batch, rows, columns] in the bases of their sides; None: that side stays."""
    return surround(x, None if left is None else left.mT, right)


def rotate_back(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Qₗ x Qᵣᵀ, the inverse of `rotate`."""
    return surround(x, left, None if right is None else right.mT)


def surround(x: Tensor, left: Tensor | None, right: Tensor | None, *, block: int | None = None) -> Tensor:
    """A x B, in x's dtype; of each block its own.

    Args:
        x: [batch, rows, columns].
        left, right: A and B: [batch, rows, rows], or [batch, blocks, rows of one, rows of one], and so for columns.
            None: that side stays.
        block: the greatest side of a block.
    """
    parts = grid(x, block)
    a, b = (None if f is None else f.to(x.dtype).reshape(*parts.shape[:2], *f.shape[-2:]) for f in (left, right))
    if x.device.type != "cpu":
        return _joined(_surround(parts, a, b), x, block)
    result = torch.empty_like(parts)
    for k, part in enumerate(parts):
        result[k] = _surround(part, None if a is None else a[k], None if b is None else b[k])
    return _joined(result, x, block)


def _surround(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    x = x if left is None else _product(left, x)
    return x if right is None else _product(x, right)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a[0], b[0])[None] if len(a) == 1 and a.ndim == 3 else torch.matmul(a, b)


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
    eigenvalues = (basis * product).sum(dim=0)
    if not eigenvalues.isfinite().all():
        return None
    order = eigenvalues.argsort(descending=True, stable=True)
    new = torch.linalg.qr(product[:, order]).Q
    return (new, order) if bool(new.isfinite().all()) else None


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
