"""Which back end updates a parameter, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from schuss.engine import numba
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
        if optimizer.sparse_form(group) is None:
            raise RuntimeError(
                f"{owner} does not support sparse gradients, and {name} has one; "
                "use SGD, Adagrad or SparseAdam for it, or sparse=False in its layer"
            )
        if group.get("weight_decay"):
            raise RuntimeError(
                f"{owner}: weight_decay option is not compatible with sparse gradients, and {name} has one"
            )
    if group.get("capturable") and p.device.type != "cpu":
        raise RuntimeError(
            f"{owner}: capturable=True needs scalars on the device, which no back end has yet: a captured graph would "
            "repeat this step's bias corrections; use torch.optim for it"
        )
    if group.get("capturable"):
        raise AssertionError(
            f"{owner}: If capturable=True, params and state_steps must be on supported devices: "
            f"cuda, xpu, hpu, privateuseone, xla; {name} is on {p.device}"
        )


def route(optimizer: "Optimizer", name: str, p: torch.Tensor, group: dict[str, Any]) -> Route:
    """What updates a parameter, and why.

    Raises:
        ValueError: the back end that the user named cannot.
    """
    wish, g = optimizer._backend, p.grad
    if group.get("differentiable"):
        return Route("reference", "differentiable=True")
    if g is not None and g.layout != torch.strided:
        rows = optimizer.sparse_form(group) == "rows"
        return Route("reference", "sparse gradient, " + ("only its rows" if rows else "made dense"))
    if wish in ("reference", "foreach"):
        return Route(wish, f"backend={wish!r}")
    if wish == "auto" and group.get("foreach"):
        return Route("foreach", "foreach=True")
    obstacle = _obstacle(optimizer, p, g)
    if obstacle and wish == "numba":
        raise ValueError(
            f"{type(optimizer).__name__}: backend='numba' cannot update {name}: {obstacle[1]}; use backend='auto'"
        )
    return Route(*obstacle) if obstacle else Route("numba")


def _obstacle(optimizer: "Optimizer", p: torch.Tensor, g: torch.Tensor | None) -> tuple[str, str] | None:
    """Why the kernels cannot update a tensor, and what does instead."""
    if type(p) not in (torch.Tensor, torch.nn.Parameter):
        return "reference", f"tensor subclass {type(p).__name__}"
    if g is not None and type(g) is not torch.Tensor:
        return "reference", f"gradient is a tensor subclass, {type(g).__name__}"
    if p.device.type != "cpu":
        return "foreach", f"no compiled kernel for {p.device.type} tensors"
    if p.layout != torch.strided:
        return "reference", f"layout {str(p.layout).removeprefix('torch.')}"
    if not numba.supports(numba.real(p.dtype)):
        return "reference", f"dtype {str(p.dtype).removeprefix('torch.')}"
    if p.is_conj() or p.is_neg():
        return "reference", "lazily conjugated or negated"
    if p.is_inference():
        return "reference", "inference tensor"
    if not is_dense(p):
        return "reference", "view with gaps or overlaps"
    rule, kept = optimizer._rule, state_of(optimizer, p)
    tensors = [kept[s.name] for s in rule.states.values() if isinstance(kept.get(s.name), torch.Tensor)]
    for t, what in [(g, "gradient"), *((t, "state") for t in tensors)]:
        if t is None:
            continue
        if t.shape != p.shape or significant_strides(t) != significant_strides(p):
            return "reference", f"{what} lies in another order than the parameter"
        if t.is_complex() != p.is_complex() or not numba.supports(numba.real(t.dtype)):
            return "reference", f"{what} of dtype {str(t.dtype).removeprefix('torch.')}"
        if t.device.type != "cpu":
            return "reference", f"{what} on {t.device}"
    for name in rule.scalar_states:
        t = kept.get(name)
        if t is not None and (t.device.type != "cpu" or t.dtype not in (torch.float32, torch.float64)):
            return "reference", f"state {name!r} is not a floating CPU number"
    return None


def state_of(optimizer: "Optimizer", p: torch.Tensor) -> dict[str, Any]:
    """`optimizer.state[p]`, without making one."""
    kept: dict[str, Any] = optimizer.state.get(p, {})
    return kept


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
        (p.data_ptr(), p.data_ptr() + _extent(p) * p.element_size(), i)
        for i, p in enumerate(params)
        if p.numel() and p.layout == torch.strided and p.device.type == "cpu"
    )
    shared, end, owner = set(), 0, -1
    for start, stop, i in spans:
        if start < end:
            shared |= {owner, i}
        if stop > end:
            end, owner = stop, i
    return sorted(shared)


def _extent(tensor: torch.Tensor) -> int:
    """How many elements of memory lie between a tensor's first and last, gaps included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
