"""Clipping of gradients as a function, for optimizers that cannot do it in their step."""

from collections.abc import Iterable
from itertools import groupby

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from schuss.bounds import check
from schuss.engine import numba
from schuss.engine.bucket import square_sum, weights
from schuss.engine.route import is_dense

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale gradients in place so that the norm of all of them together is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, with its values; on the CPU the 2-norm is one pass over them, summed in
    float64. `max_norm=` of an optimizer of schuss needs no second pass to scale them, and leaves them as they are.

    Args:
        parameters: tensors, or one; those without a gradient do not count.
        max_norm: in (0, inf].
        norm_type: of the norm; inf for the largest element.
        error_if_nonfinite: raise if the norm is infinite or NaN, with the gradients as they were.
        foreach: as in torch.

    Returns:
        The norm of the gradients before, a tensor without dimensions.

    Raises:
        ValueError: max_norm out of its bounds.
        RuntimeError: the norm is not finite, and that is an error.
    """
    check("clip_grad_norm_", "max_norm", max_norm, "(0, inf]")
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]  # torch has no maximum of none
    if norm_type == 2.0 and grads and all(map(_is_plain, grads)):
        norm = torch.tensor(_norm(grads), dtype=torch.promote_types(grads[0].dtype.to_real(), torch.float32))
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"clip_grad_norm_: the norm of the gradients is {norm.item()}, and nothing was changed; "
                "error_if_nonfinite=False clips with it all the same"
            )
    else:
        norm = get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


def _is_plain(g: torch.Tensor) -> bool:
    return (
        type(g) is torch.Tensor
        and g.device.type == "cpu"
        and g.layout == torch.strided
        and numba.supports(g.dtype.to_real())
        and (g.is_contiguous() or is_dense(g))
    )


def _norm(grads: list[torch.Tensor]) -> float:
    total = 0.0
    for dtype, members in groupby(sorted(grads, key=lambda g: str(g.dtype)), key=lambda g: g.dtype):
        tensors = list(members)
        address = np.array([g.data_ptr() for g in tensors], np.int64)
        size = np.array([g.numel() * (2 if g.is_complex() else 1) for g in tensors], np.int64)
        total += square_sum(dtype.to_real(), address, size, weights(size, size > 0))
    return float(total**0.5)
