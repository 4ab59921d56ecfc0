"""Orthogonalization by Newton-Schulz iterations, the matrix function of Muon."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["PRESETS", "Coefficients", "orthogonalize"]

Coefficients = Sequence[tuple[float, float, float]]

_JORDAN = (3.4445, -4.7750, 2.0315)
_POLAR_EXPRESS = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)
# Polar Express leaves room for rounding: its first polynomial is that of X / 1.02.
_MARGIN = 1.02

PRESETS: dict[str, Coefficients] = {
    "jordan": (_JORDAN,) * 5,
    "polar_express": (
        tuple(k / _MARGIN**power for k, power in zip(_POLAR_EXPRESS[0], (1, 3, 5), strict=True)),  # type: ignore[dict-item]
        *_POLAR_EXPRESS[1:],
    ),
}

# A run of iterations on the Gram matrix may stretch the smallest singular values by sqrt(_ROUNDING / eps of the dtype),
# 12.4 in bfloat16: rounding errors of the Gram matrix grow by the square.
_ROUNDING = 1.2
# The first run may stretch them a few times more: it begins with singular values that are all small, save a few.
_FIRST_RUN = 3
# Rounding averages out in large matrices, so that theirs may be longer.
_LARGE, _FIRST_RUN_OF_LARGE = 512, 4
# Below, rounding harms most and there is little to save.
_GRAM_SIDE = 64
# From this ratio of the sides on, the Gram form costs less. Joining one more iteration to a run saves a Gram matrix and
# a product with X, and costs a product of the small side and two symmetric ones: 1.7 ratio against 2.5 small products.
_GRAM_RATIO = 1.5
# Rows of the strips in which the CPU computes the lower triangle of a symmetric product.
_STRIP = 256
# Matrices in memory begin at multiples of so many elements.
_ALIGNED = 64
# Elements that the CPU works on at a time, few enough to stay in the cache from one product to the next.
_CHUNK = 2**21


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    coefficients: Coefficients,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    *,
    gram: bool | None = None,
) -> Tensor:
    r"""U φ(S) Vᵀ for x = U S Vᵀ, where φ moves all singular values that are not tiny close to 1.

    .. math::
        X \leftarrow x / \max(\lVert x \rVert_F, \epsilon), \qquad
        X \leftarrow a X + (b A + c A^2) X, \quad A = X X^T \quad \text{for each } (a, b, c)

    Matrices of which one side is much longer are iterated in the Gram form: several iterations on the small
    :math:`R = X X^T`, with :math:`Q \leftarrow P Q` and :math:`R \leftarrow P R P` for :math:`P = a I + b R + c R^2`,
    and then one product :math:`Q X`. In exact arithmetic it is the same; rounding errors grow with the length of such a
    run, so that it ends where they would exceed those of the plain form.

    Args:
        x: matrices of any floating point dtype, in shape [..., rows, columns]. Not modified.
        coefficients: (a, b, c) of each iteration; `PRESETS` has those of Jordan ("jordan": values above 0.001 of the
            Frobenius norm end in 0.47 to 1.21; for n steps take ``PRESETS["jordan"][:1] * n``) and of Polar Express
            ("polar_express": in 0.84 to 1.15).
        eps: the smallest Frobenius norm to divide by, in (0, inf).
        dtype: of the products.
        gram: True or False for one of the two forms; None: the one that costs less.

    Returns:
        A new tensor of x's shape and dtype. Zero for a zero matrix; NaN for a matrix with a NaN or an infinity in it.

    Raises:
        ValueError: x is no matrix, or a dtype is not of floating point.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Amsel, Persson, Musco, Gower 2025,
    arXiv:2505.16932; the Gram form and its restarts: Zhang, Amsel, Chen, Dao 2026,
    https://dao-lab.ai/blog/2026/gram-newton-schulz.
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize: x must have two dimensions or more, got shape {tuple(x.shape)}")
    for what, kind in (("x.dtype", x.dtype), ("dtype", dtype)):
        if not kind.is_floating_point:
            raise ValueError(f"orthogonalize: {what} must be of floating point, got {kind}")
    rows, columns = x.shape[-2:]
    small, large = min(rows, columns), max(rows, columns)
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return result
    if gram is None:
        gram = small >= _GRAM_SIDE and large >= _GRAM_RATIO * small
    runs = list(_runs(coefficients, small, dtype)) if gram else [[abc] for abc in coefficients]
    at_once = max(1, _CHUNK // (rows * columns)) if x.device.type == "cpu" else x.numel()
    pairs = (t.reshape(-1, rows, columns).split(at_once) for t in (x, result))
    for part, out in zip(*pairs, strict=True):
        out.copy_(_orthogonalize(part, runs, eps, dtype))
    return result


def _runs(coefficients: Coefficients, side: int, dtype: torch.dtype) -> Iterator[Coefficients]:
    """The iterations, cut where the Gram form restarts from X."""
    limit = (_ROUNDING / torch.finfo(dtype).eps) ** 0.5
    run: list[tuple[float, float, float]] = []
    room = limit * (_FIRST_RUN_OF_LARGE if side >= _LARGE else _FIRST_RUN)
    for abc in coefficients:
        stretch = max(1, abs(abc[0]))
        if run and stretch > room:
            yield run
            run, room = [], limit
        run.append(abc)
        room /= stretch
    if run:
        yield run


def _orthogonalize(x: Tensor, runs: Sequence[Coefficients], eps: float, dtype: torch.dtype) -> Tensor:
    """All iterations on matrices [batch, rows, columns], in a dtype; a run of one is the plain form."""
    tall = x.shape[-2] > x.shape[-1]
    side = min(x.shape[-2:])
    # One block of memory: given back piece by piece, malloc would return it to the system and fault it in again.
    shapes = [x.shape] * 2 + [torch.Size((x.shape[0], side, side))] * 4
    lengths = [-(-shape.numel() // _ALIGNED) * _ALIGNED for shape in shapes]
    memory = torch.empty(sum(lengths), dtype=dtype, device=x.device).split(lengths)
    pieces: list[Tensor] = [m[: shape.numel()].view(shape) for m, shape in zip(memory, shapes, strict=True)]
    y, spare, r, z, t, w = pieces

    norm = _norm(x, eps, dtype)
    # Rounded once; torch holds the quotient in x's precision before that, so that the CPU takes some rows at a time.
    rows = max(1, _CHUNK // 8 // (x.shape[0] * x.shape[-1])) if x.device.type == "cpu" else x.shape[-2]
    for part, quotient in zip(x.split(rows, -2), y.split(rows, -2), strict=True):
        torch.div(part, norm, out=quotient)
    for k, run in enumerate(runs):
        if tall:
            _symmetric(y.mT, y, out=r)
        else:
            _symmetric(y, y.mT, out=r)
        # Q is kept as shift I + w. Where most singular values are still small, w is small, and rounding it harms
        # little; later shift and w would cancel, so that w is all of Q (shift = 0) in longer runs.
        separate = k == 0 or len(run) == 1
        shift = 1.0
        for i, (a, b, c) in enumerate(run):
            _symmetric(r, r, out=z, add=r, beta=b, alpha=c)  # P = a I + z
            if i == 0:
                w.copy_(z)
                if not separate:
                    w.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                # Symmetric but for rounding, and mirroring it would cost accuracy.
                t.copy_(w)
                if separate:
                    t.diagonal(dim1=-2, dim2=-1).add_(shift)
                w.baddbmm_(z, t, beta=a)
            shift *= a
            if i < len(run) - 1:
                _symmetric(r, z, out=t, add=r, beta=a)
                _symmetric(t, z, out=r, add=t, beta=a)
        left, right = (y, w.mT) if tall else (w, y)
        torch.baddbmm(y, left, right, beta=shift if separate else 0, out=spare)
        y, spare = spare, y
    return y


def _norm(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """max(norm, eps) of each matrix, in float32 or better."""
    x = x.to(torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32))
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    # Squares overflow in float32 from 2e19 on; there an upper bound of the norm does as well.
    largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    bound = largest * (x.shape[-2] * x.shape[-1]) ** 0.5
    return torch.where(norm.isinf(), bound, norm).clamp(min=eps)


def _symmetric(
    x: Tensor, y: Tensor, *, out: Tensor, add: Tensor | None = None, beta: float = 0, alpha: float = 1
) -> None:
    """x y, or alpha x y + beta add, known to be symmetric."""
    m = x.shape[-2]
    strips = m // _STRIP if x.device.type == "cpu" else 1
    if strips < 2:
        if add is None:
            torch.bmm(x, y, out=out)
        else:
            torch.baddbmm(add, x, y, beta=beta, alpha=alpha, out=out)
        return
    # The lower triangle in strips of rows, each mirrored to the upper one; matrix by matrix, because batched products
    # are slower into a part of a tensor.
    edges = [m * i // strips for i in range(strips + 1)]
    for k in range(x.shape[0]):
        for start, end in pairwise(edges):
            left, right, strip = x[k, start:end], y[k, :, :end], out[k, start:end, :end]
            if add is None:
                torch.mm(left, right, out=strip)
            else:
                torch.addmm(add[k, start:end, :end], left, right, beta=beta, alpha=alpha, out=strip)
            out[k, :start, start:end] = strip[:, :start].mT
