"""The norm of all gradients of a step, and what it makes of the step: a factor, or no step at all."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from schuss.engine.bucket import Bucket
    from schuss.options import Settings

SMALL = 1e-6
"""Added to the norm before it divides, as torch does."""


class SkippedStep(Exception):
    """The norm is not finite, and the optimizer is to change nothing then."""


@dataclass(frozen=True)
class Clipped:
    """What a step does after its gradients were measured.

    Args:
        norm: of all gradients, after unscaling and before clipping.
        gain: what the host multiplies every gradient by.
        factor: what the device multiplies it by, too.
        broken: whether the norm is infinite or NaN and the step must change nothing, as the device knows.
        known: the norm, where the host must know it.
    """

    norm: torch.Tensor
    gain: float | torch.Tensor
    factor: torch.Tensor | None = None
    broken: torch.Tensor | None = None
    known: float = 0.0


@torch.no_grad()
def clip(
    options: "Settings",
    buckets: "Sequence[Bucket]",
    eager: Iterable[torch.Tensor],
    gain: float | torch.Tensor,
) -> Clipped:
    """Measure the gradients of a step.

    Args:
        options: max_norm and nonfinite.
        buckets: launches that have found their gradients.
        eager: the gradients of tensors that are in none.
        gain: what undoes a GradScaler.
    """
    squares = [bucket.square_sum() for bucket in buckets]
    skips_there = all(bucket.on_device for bucket in buckets) and bool(buckets)
    for g in eager:
        squares.append(_square_sum(g))
        skips_there = False  # nothing but kernels can leave a step out that the host does not know of
    here = [square for square in squares if isinstance(square, float)]
    pending = [square for square in squares if isinstance(square, torch.Tensor)]
    max_norm = options.max_norm
    assert max_norm is not None
    if not pending and isinstance(gain, float):
        norm = math.sqrt(math.fsum(here)) * abs(gain) if math.isfinite(sum(here)) else sum(here)
        return Clipped(torch.tensor(norm, dtype=torch.float32), gain * _factor(norm, max_norm), known=norm)
    device = next((t.device for t in pending if t.device.type != "cpu"), torch.device("cpu"))
    total = torch.full((), sum(here), dtype=torch.float64, device=device)
    for square in pending:
        total = total + square.to(device, torch.float64)
    norm_there = total.sqrt() * (gain.to(device).abs() if isinstance(gain, torch.Tensor) else abs(gain))
    factor = (max_norm / (norm_there + SMALL)).clamp(max=1.0)
    broken, known = None, 0.0
    if options.nonfinite == "skip" and skips_there:
        broken = ~norm_there.isfinite()
    elif options.nonfinite != "propagate":
        known = norm_there.item()
    return Clipped(norm_there.float(), gain, factor, broken, known)


def refuse(owner: str, options: "Settings", norm: float) -> None:
    """Stop a step whose norm is not finite, if the options say so.

    Raises:
        SkippedStep: nonfinite="skip".
        RuntimeError: nonfinite="raise".
    """
    if math.isfinite(norm) or options.nonfinite == "propagate":
        return
    if options.nonfinite == "skip":
        raise SkippedStep
    raise RuntimeError(
        f"{owner}: the norm of the gradients is {norm}, and nothing was changed; nonfinite='skip' leaves such steps "
        "out, nonfinite='propagate' takes them"
    )


def _factor(norm: float, max_norm: float) -> float:
    factor = max_norm / (norm + SMALL) if not math.isnan(norm) else norm
    return min(factor, 1.0)


def _square_sum(g: torch.Tensor) -> torch.Tensor | float:
    """Of a gradient that no kernel reads: sparse, sharded, or on a device without kernels."""
    if g.layout != torch.strided:
        g = g.coalesce().values()
    norm = torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
    if hasattr(norm, "full_tensor"):  # of a DTensor: over all its shards
        norm = norm.full_tensor()
    square = norm.detach().to(torch.float64) ** 2
    return float(square) if square.device.type == "cpu" else square
