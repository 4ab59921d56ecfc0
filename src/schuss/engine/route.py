"""Which back end updates a parameter, and why."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from schuss.engine import numba
from schuss.engine.numba_kernel import NUMBERS
from schuss.engine.pieces import EMA
from schuss.engine.state import COMPENSATION, blocks, chosen, find, kept_by
from schuss.engine.storage import MAPS, Storage, real
from schuss.engine.watch import significant_strides

if TYPE_CHECKING:
    from schuss.optimizer import Optimizer


@dataclass(frozen=True)
class Route:
    """What runs the update of a tensor, and why not the fastest."""

    backend: str
    reason: str = ""


SHARED = Route("reference", "shares memory with another parameter")


def check_gradient(optimizer: "Optimizer", name: str, p: torch.Tensor, g: torch.Tensor, group: dict[str, Any]) -> None:
    """Raise on a gradient that no back end can use for this parameter."""
    owner = type(optimizer).__name__
    if g.shape != p.shape or g.device != p.device:
        raise RuntimeError(
            f"{owner}: the gradient of {name} must have its shape and device, {tuple(p.shape)} on {p.device}; "
            f"got {tuple(g.shape)} on {g.device}"
        )
    if g.layout != torch.strided:
        if (form := optimizer.sparse_form(group)) is None:
            raise RuntimeError(
                f"{owner} does not support sparse gradients, and {name} has one; "
                "use SGD, Adagrad or SparseAdam for it, or sparse=False in its layer"
            )
        if group.get("weight_decay") and not optimizer._rule.is_decoupled(group):
            raise RuntimeError(
                f"{owner}: weight_decay option is not compatible with sparse gradients, and {name} has one"
            )
        if EMA in optimizer._rule.states and (form == "rows" or (form == "either" and optimizer._options.cautious)):
            counted = ", and counted by cautious" if form == "either" else ""
            raise RuntimeError(
                f"{owner}: {name} has a sparse gradient, of which only the rows are updated{counted}; ema_decay would "
                "need all rows at each step. Leave it out and use torch.optim.swa_utils.AveragedModel, or sparse=False "
                "in the layer"
            )
    if group.get("capturable") and (way := route(optimizer, name, p, group)).backend != "triton":
        if p.device.type == "cpu":
            raise AssertionError(
                f"{owner}: If capturable=True, params and state_steps must be on supported devices: "
                f"cuda, xpu, hpu, privateuseone, xla; {name} is on {p.device}"
            )
        raise RuntimeError(
            f"{owner}: capturable=True needs the triton back end, which computes a step's numbers on the device; "
            f"{name} would be updated by {way.backend} ({way.reason})"
        )


def route(optimizer: "Optimizer", name: str, p: torch.Tensor, group: dict[str, Any]) -> Route:
    """What updates a parameter, and why.

    Raises:
        ValueError: the back end that the user named cannot; or the rule is about rows, columns or matrices, and the
            parameter has too few dimensions.
    """
    _check_dimensions(optimizer, name, p, group)
    wish, g = optimizer._options.backend, p.grad
    if group.get("differentiable"):
        return Route("reference", "differentiable=True")
    if g is not None and g.layout != torch.strided:
        if optimizer.sparse_form(group) == "dense":
            return Route("reference", "sparse gradient, made dense")
        averaged = EMA in optimizer._rule.states
        return Route("reference", "sparse gradient, " + ("made dense for the average" if averaged else "only its rows"))
    if wish in ("reference", "foreach"):
        return Route(wish, f"backend={wish!r}")
    if wish == "auto" and group.get("foreach"):
        return Route("foreach", "foreach=True")
    compiler = wish if wish != "auto" else "numba" if p.device.type == "cpu" else "triton"
    obstacle = _obstacle(optimizer, p, g, group, compiler)
    if obstacle and wish == compiler:
        raise ValueError(
            f"{type(optimizer).__name__}: backend={wish!r} cannot update {name}: {obstacle[1]}; use backend='auto'"
        )
    return Route(*obstacle) if obstacle else Route(compiler)


def _check_dimensions(optimizer: "Optimizer", name: str, p: torch.Tensor, group: dict[str, Any]) -> None:
    """Raise on a parameter that has no rows or columns for a rule that computes with them."""
    if p.dim() >= 2:
        return
    rule = optimizer._rule
    least, word = rule.smallest(rule.variant(group, p))
    if p.dim() < least:
        allowed = "two dimensions" if least == 2 else "one dimension"
        raise ValueError(
            f"{type(optimizer).__name__}: {name} must have {allowed} or more for {word} in the rule, got the shape "
            f"{tuple(p.shape)}; give it to another optimizer, or let the rule do without {word} where a "
            f'State(when=function) does not exist. With dimensions = "[{least}, inf)" in the class such parameters are '
            "refused when it is made"
        )


def _obstacle(
    optimizer: "Optimizer", p: torch.Tensor, g: torch.Tensor | None, group: dict[str, Any], compiler: str
) -> tuple[str, str] | None:
    """Why the kernels of a compiler cannot update a tensor, and what does instead."""
    if type(p) not in (torch.Tensor, torch.nn.Parameter):
        return "reference", f"tensor subclass {type(p).__name__}"
    if g is not None and type(g) is not torch.Tensor:
        return "reference", f"gradient is a tensor subclass, {type(g).__name__}"
    if missing := _missing(compiler, p.device):
        return "reference" if p.device.type == "cpu" else "foreach", missing
    supports = numba.supports if compiler == "numba" else NUMBERS.__contains__
    if p.layout != torch.strided:
        return "reference", f"layout {str(p.layout).removeprefix('torch.')}"
    if not supports(real(p.dtype)):
        return "reference", f"dtype {str(p.dtype).removeprefix('torch.')}"
    if p.is_conj() or p.is_neg():
        return "reference", "lazily conjugated or negated"
    if p.is_inference():
        return "reference", "inference tensor"
    if not is_dense(p):
        return "reference", "view with gaps or overlaps"
    rule, kept = optimizer._rule, kept_by(optimizer, p)
    storages = [
        chosen(optimizer, p, s)[0] if (cell := find(kept, s.name)) is None else cell.storage
        for s in rule.states.values()
        if s.like == "p" and s.exists(group, p)
    ]
    if (why := missing_form(rule.needs(rule.variant(group, p)), compiler, p, storages)) is not None:
        return "reference", why
    cells = [cell for s in rule.states.values() if s.like == "p" and (cell := find(kept, s.name)) is not None]
    tensors = [*(cell.values for cell in cells), *([kept[COMPENSATION]] if COMPENSATION in kept else [])]
    for t, what in [(g, "gradient"), *((t, "state") for t in tensors)]:
        if t is None:
            continue
        if t.shape != p.shape or significant_strides(t) != significant_strides(p):
            return "reference", f"{what} lies in another order than the parameter"
        if t.is_complex() != p.is_complex() or not (supports(real(t.dtype)) or (what == "state" and t.dtype in MAPS)):
            return "reference", f"{what} of dtype {str(t.dtype).removeprefix('torch.')}"
        if t.device != p.device:
            return "reference", f"{what} on {t.device}"
    for absmax in (cell.beside for cell in cells if cell.beside is not None):
        if not absmax.is_contiguous() or absmax.numel() != blocks(p) or absmax.dtype != torch.float32:
            return "reference", "absmax is not a float32 for each block, one after the other"
        if absmax.device != p.device:
            return "reference", f"absmax on {absmax.device}"
    for name in rule.scalar_states:
        t = kept.get(name)
        if t is not None and (t.device.type not in {"cpu", p.device.type} or t.dtype not in _NUMBERS):
            return "reference", f"state {name!r} is no float32 or float64 number on the CPU or the parameter's device"
    return None


def missing_form(needs: Collection[str], compiler: str, p: torch.Tensor, storages: Iterable[Storage]) -> str | None:
    """Why a compiler has no kernel for a formula, given the parameter, and what its states are stored as."""
    if "vectors" in needs and compiler == "triton":
        return "means of rows and columns"
    if needs and not p.is_contiguous():
        return "rows and columns of a tensor whose rows do not lie one after the other"
    if needs and p.is_complex():
        return "rows and columns of a complex tensor"
    if "vectors" in needs and any(storage.blockwise for storage in storages):
        return "means of rows beside 8-bit states, whose blocks do not end where rows do"
    return None


_NUMBERS = (torch.float32, torch.float64)


def _missing(compiler: str, device: torch.device) -> str | None:
    """Why a compiler makes nothing for a device."""
    if compiler == "numba":
        return None if device.type == "cpu" else f"no compiled kernel for {device.type} tensors"
    if device.type not in ("cuda", "cpu"):
        return f"no compiled kernel for {device.type} tensors"
    from schuss.engine import triton

    if (obstacle := triton.obstacle()) is not None:
        return obstacle
    if device.type == "cpu" and not triton.interpreted():
        return "Triton updates CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    return None


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each place once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for n, st in zip(tensor.shape, tensor.stride(), strict=True) if n != 1):
        if stride != expected and tensor.numel():
            return False
        expected *= size
    return True


def overlapping(params: Sequence[torch.Tensor]) -> list[int]:
    """The indices of parameters that share memory with another one."""
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + _extent(p) * p.element_size(), i)
        for i, p in enumerate(params)
        if p.numel() and p.layout == torch.strided and p.device.type in ("cpu", "cuda")
    )
    shared, end, owner, place = set(), 0, -1, ""
    for device, start, stop, i in spans:
        if device != place:
            end, owner, place = 0, -1, device
        if start < end:
            shared |= {owner, i}
        if stop > end:
            end, owner = stop, i
    return sorted(shared)


def _extent(tensor: torch.Tensor) -> int:
    """How many elements of memory lie between a tensor's first and last, gaps included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
