"""SAM and ASAM: steps with the gradient of the highest point nearby."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

import torch
from torch import nn

from schuss import bounds
from schuss.engine.process import uninterrupted
from schuss.wrappers.base import Wrapper, wide
from schuss.wrappers.outer import _params, _takes_closure

__all__ = ["ASAM", "SAM"]

Nonfinite = Literal["raise", "skip"]
NONFINITE = ("raise", "skip")
STEEPEST = 1e30
"""A gradient that is shorter than rho by this factor counts as zero: the factor itself must be a float32."""


class SAM(Wrapper):
    """SAM: any optimizer, on the gradient of the point nearby where the loss is, to first order, the highest.

    $$\\hat\\epsilon(w) = \\rho\\,\\frac{T_w^2\\,\\nabla L(w)}{\\lVert T_w\\,\\nabla L(w) \\rVert_2}, \\qquad
    w_{t+1} = w_t + A(\\nabla L(w_t + \\hat\\epsilon(w_t))), \\qquad
    T_w = 1 \\;(\\mathrm{SAM}) \\;\\text{or}\\; |w| + \\eta \\;(\\mathrm{ASAM})$$

    The norm is that of all parameters together. A step needs the gradient twice, at w and at w + ε: either by a
    closure, `optimizer.step(closure)`, or by hand:

        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        with optimizer.perturbed():
            loss_fn(model(x), y).backward()
        optimizer.step()

    It keeps nothing from one step to the next. rho, eta and adaptive are in the groups, as "sam_rho", "sam_eta" and
    "sam_adaptive", and may differ between them: T_w is multiplied by a group's rho before all are put together, so that
    a rho of 0 leaves a group in its place and out of the norm. Groups with maximize=True are moved downhill.

    Args:
        inner: any `torch.optim.Optimizer`, which does the steps.
        rho: how far away ε leads, in [0, inf). With 0 the loss is evaluated once, and parameters move as with `inner`
            alone. Default 0.05; ASAM's is some ten times larger, since weights are smaller than 1.
        model: modules whose buffers, such as the running statistics of BatchNorm, are to come from the first pass
            alone. Without it the second pass changes them, too.
        adaptive: whether T_w is |w| + η, element by element, or 1 (default).
        eta: what is added to |w| if adaptive, in [0, inf). Default 0.01.
        nonfinite: what a step does if the first gradient's norm is infinite or NaN: "raise" (default), or "skip",
            which `skipped_steps` counts. In both cases nothing has changed. A GradScaler that finds it skips first.

    Raises:
        TypeError: `inner` is no optimizer, `model` no module, or adaptive no bool.
        ValueError: rho or eta out of bounds, or an unknown nonfinite.

    Source: Foret, Kleiner, Mobahi, Neyshabur 2021, arXiv 2010.01412, Algorithm 1 and equation 2 for p = 2; Kwon, Kim,
    Park, Choi 2021, arXiv 2102.11600, Algorithm 1 for p = 2.
    """

    name = "sam"
    bounds: ClassVar[Mapping[str, str]] = {"rho": "[0, inf)", "eta": "[0, inf)"}
    _pickled = (*Wrapper._pickled, "_model", "_nonfinite")
    _stage: Literal["", "perturbed", "ready", "broken"] = ""
    """What the gradients are: of the parameters as they are, being computed, of the perturbed ones, or not finite."""
    _skipped = 0

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        model: nn.Module | None = None,
        adaptive: bool = False,
        eta: float = 0.01,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        owner = type(self).__name__
        if nonfinite not in NONFINITE:
            raise ValueError(f"{owner}: nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        if not isinstance(model, nn.Module | None):
            raise TypeError(f"{owner}: model must be a torch.nn.Module or None, got {type(model).__name__}")
        super().__init__(inner, {"rho": rho, "eta": eta, "adaptive": adaptive})
        self._model, self._nonfinite = model, nonfinite

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if not isinstance(adaptive := group.get(self._key("adaptive"), False), bool):
            raise TypeError(f"{type(self).__name__}: adaptive must be True or False, got {adaptive!r}")

    # --- the two passes ---------------------------------------------------------------------------------------------

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """The parameters at w + ε, for the second forward and backward pass.

        Needs the gradients of the first pass, and clears them. After the block the parameters are what they were, bit
        for bit, also when it raises, and so are the buffers of `model`. `step` then takes the gradients of the block.

        Raises:
            RuntimeError: no gradients, before the block or at its end; or inside another such block.
        """
        self._check_outside("leave the inner perturbed() out")
        if not self._has_gradients():
            raise RuntimeError(
                f"{type(self).__name__}: perturbed() needs the gradients of the parameters as they are; call backward "
                "before it, and once more inside"
            )
        climb = self._climb()
        with self._moved(climb):
            yield
        if not self._has_gradients():
            self._stage = ""
            raise RuntimeError(f"{type(self).__name__}: perturbed() has seen no backward pass; call backward inside")
        self._finish(climb)

    def backward(self, closure: Callable[[], float]) -> float:
        """Both passes without the step: for a GradScaler, or to clip the gradients, before `step()`.

        Args:
            closure: computes the loss, calls `backward` and returns the loss; called at w, then at w + ε. Not a second
                time if nothing is to be perturbed: with a rho of 0, or gradients that are zero or not finite.

        Returns:
            The loss at w.
        """
        self._check_outside("call backward(closure) before or after it")
        with torch.enable_grad():
            loss = closure()
            climb = self._climb()
            if climb.leads_somewhere:
                with self._moved(climb):
                    closure()
        self._finish(climb)
        return loss

    @property
    def is_perturbed(self) -> bool:
        """Whether the parameters are at w + ε: in the second pass, not in the first."""
        return self._stage == "perturbed"

    @property
    def skipped_steps(self) -> int:
        """How many steps nonfinite="skip" has left out, here and in the inner optimizer."""
        return self._skipped + super().skipped_steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the inner optimizer does."""
        super().zero_grad(set_to_none)
        if self._stage != "perturbed":
            self._stage = ""

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        self._check_outside("a step would be undone by the end of perturbed(); step after it")
        found = getattr(self, "found_inf", None)
        loss = None
        if closure is not None:
            if found is not None:
                raise RuntimeError(
                    f"{type(self).__name__}: a GradScaler cannot look at gradients that a closure is yet to compute; "
                    "write optimizer.backward(closure), then scaler.step(optimizer)"
                )
            loss = self.backward(closure)
        try:
            self._check_ready()
            if self._is_broken:
                self._skipped += 1
                return loss
            self._stage = ""
            self._step_inner(None if closure is None else self._replayed(closure, loss))
        finally:
            self._stage = ""
        return loss

    def _check_ready(self) -> None:
        self._check_outside("a step would be undone by the end of perturbed(); step after it")
        if self._is_broken and self._nonfinite == "raise":
            self._refuse()
        if not self._stage and not self._climb().is_level:
            raise RuntimeError(
                f"{type(self).__name__}: step() takes gradients of the perturbed parameters, and these are of the "
                "parameters as they are; write step(closure), or call backward once more in `with "
                "optimizer.perturbed():` before step(). A step of its inner optimizer alone is optimizer.inner.step()"
            )

    @property
    def _is_broken(self) -> bool:
        """Whether the norm of the first pass is not finite, and no GradScaler has found that already."""
        found = getattr(self, "found_inf", None)
        return self._stage == "broken" and not (found is not None and found.item())

    def _replayed(self, closure: Callable[[], float], loss: Any) -> Callable[[], float] | None:
        """A closure whose first evaluation has been made, for who makes more, as LBFGS; None for who takes none."""
        if not _takes_closure(self.inner):
            return None
        evaluated: list[float] = [loss]

        def evaluate() -> float:
            if evaluated:
                return evaluated.pop()
            again = self.backward(closure)
            if self._stage == "broken":
                self._refuse()
            return again

        return evaluate

    def _check_outside(self, what_to_do: str) -> None:
        if self._stage == "perturbed":
            raise RuntimeError(f"{type(self).__name__}: the parameters are perturbed; {what_to_do}")

    def _refuse(self) -> None:
        raise RuntimeError(
            f"{type(self).__name__}: the norm of the gradients of the first pass is not finite, and nothing was "
            "changed; nonfinite='skip' leaves such steps out"
        )

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in _params(self.inner))

    # --- where they lead --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _climb(self) -> "_Climb":
        """The way from w to w + ε."""
        groups = self.inner.param_groups
        rhos = [bounds.number(self._setting(group, "rho")) for group in groups]
        largest = max(rhos, default=0.0)
        buckets: dict[tuple[Any, ...], _Bucket] = {}
        for group, rho in zip(groups, rhos, strict=True):
            if rho == 0:
                continue
            eta = bounds.number(self._setting(group, "eta")) if self._setting(group, "adaptive") else None
            share, sign = rho / largest, -1 if group.get("maximize") else 1
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                part = _Part.of(type(self).__name__, p, p.grad)
                alike = share, sign, eta, type(part.w), part.w.dtype, part.g.dtype, p.device
                buckets.setdefault(alike, _Bucket(share, sign, eta)).parts.append(part)
        return _Climb([*buckets.values()], largest)

    @contextmanager
    def _moved(self, climb: "_Climb") -> Iterator[None]:
        buffers = _Buffers(self._model)
        kept: list[Kept] = []
        self._stage = "perturbed"
        try:
            climb.move(kept)
            self.inner.zero_grad()
            yield
        finally:
            with torch.no_grad(), uninterrupted():
                _put_back(kept)
                buffers.put_back()
            self._stage = ""

    @torch.no_grad()
    def _finish(self, climb: "_Climb") -> None:
        """Say what the gradients are. A GradScaler is to see an overflow of the first pass, too."""
        self._stage = "ready" if math.isfinite(climb.norm) else "broken"
        if self._stage == "broken":
            for p in _params(self.inner):
                if p.grad is not None:
                    p.grad = p.grad * math.nan


class _More(TypedDict, total=False):
    model: nn.Module | None
    eta: float
    nonfinite: Nonfinite


class ASAM(SAM):
    """`SAM` with adaptive=True: the neighbourhood of a weight is as wide as the weight is large.

    Where weights can be rescaled without changing what the model computes, ε is rescaled with them, up to η.

    Args:
        inner: any `torch.optim.Optimizer`, which does the steps.
        rho: as in `SAM`, in [0, inf). Default 0.5.
        model, eta, nonfinite: keyword arguments, as in `SAM`.

    Raises:
        TypeError: as `SAM`.
        ValueError: as `SAM`.

    Source: Kwon, Kim, Park, Choi 2021, arXiv 2102.11600, Algorithm 1 for p = 2, T_w element by element; defaults as in
    the authors' code.
    """

    def __init__(self, inner: torch.optim.Optimizer, rho: float = 0.5, **more: Unpack[_More]) -> None:
        super().__init__(inner, rho, adaptive=True, **more)


Rows = tuple[torch.Tensor, ...] | None
Kept = tuple[torch.Tensor, Rows, torch.Tensor]


def _put_back(kept: list[Kept]) -> None:
    together = [(p, value) for p, rows, value in kept if rows is None and type(p) in (torch.Tensor, nn.Parameter)]
    if together:
        params, there = zip(*together, strict=True)
        torch._foreach_copy_(params, there)
    for p, rows, value in kept:
        if rows is not None:
            p[rows] = value
        elif type(p) not in (torch.Tensor, nn.Parameter):
            p.copy_(value)


@dataclass
class _Part:
    """A parameter, or the rows of one that a sparse gradient is of.

    Attributes:
        w: the parameter's own memory, or a copy of the rows.
        g: the gradient there.
    """

    p: torch.Tensor
    rows: Rows
    w: torch.Tensor
    g: torch.Tensor

    @classmethod
    def of(cls, owner: str, p: torch.Tensor, g: torch.Tensor) -> Self:
        if g.layout == torch.strided:
            return cls(p, None, p.detach(), g)
        if g.layout != torch.sparse_coo:
            raise RuntimeError(
                f"{owner}: a gradient must be dense, or sparse of layout torch.sparse_coo, got {g.layout}"
            )
        g = g.coalesce()
        rows = tuple(g.indices())
        return cls(p, rows, p.detach()[rows], g.values())


@dataclass
class _Bucket:
    """Parameters that `torch._foreach_*` takes together.

    Attributes:
        share: their rho over the largest one.
        sign: 1 to climb, -1 to descend.
        eta: for T = |w| + eta; None for T = 1.
        lifted: T g.
    """

    share: float
    sign: int
    eta: float | None
    parts: list[_Part] = field(default_factory=list)
    lifted: list[torch.Tensor] = field(default_factory=list)

    def norms(self) -> Iterator[torch.Tensor]:
        """The norm of T g of each tensor, in float32 at least."""
        grads = [part.g for part in self.parts]
        self.lifted = grads if self.eta is None else [*torch._foreach_mul(self._width(), grads)]
        dtype = wide(self.lifted[0])
        for norm in torch._foreach_norm(self.lifted, 2, dtype=None if dtype == self.lifted[0].dtype else dtype):
            yield norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a tensor in shards

    def _width(self) -> tuple[torch.Tensor, ...]:
        """T, in float32 at least."""
        assert self.eta is not None
        width = torch._foreach_abs([part.w.to(wide(part.w)) for part in self.parts])
        torch._foreach_add_(width, self.eta)
        return width

    def move(self, scale: float, kept: list[Kept]) -> None:
        """Add scale · T² g."""
        if self.eta is not None:
            torch._foreach_mul_(self.lifted, self._width())
        kept += [(part.p, part.rows, part.w.clone()) for part in self.parts]
        by, dtype = self.lifted, wide(self.lifted[0])
        if by[0].dtype != dtype:
            by = [lifted.to(dtype) for lifted in by]  # so that w + ε is rounded once
        torch._foreach_add_([part.w for part in self.parts], by, alpha=self.sign * self.share**2 * scale)
        for part in self.parts:
            if part.rows is not None:
                part.p[part.rows] = part.w


class _Climb:
    """The way from w to w + ε.

    Attributes:
        rho: the largest of all groups.
        norm: of T g, each with its share of rho.
    """

    def __init__(self, buckets: list[_Bucket], rho: float) -> None:
        self._buckets, self.rho = buckets, rho
        found: dict[tuple[torch.device, torch.dtype], list[tuple[float, torch.Tensor]]] = {}
        for bucket in buckets:
            for norm in bucket.norms():
                found.setdefault((norm.device, norm.dtype), []).append((bucket.share, norm))
        lengths: list[float] = []
        for members in found.values():
            shares, norms = zip(*members, strict=True)
            there = torch.stack(norms).tolist()  # waits for the device, once for each
            lengths += [share * norm for share, norm in zip(shares, there, strict=True)]
        self.norm = math.hypot(*lengths)

    @property
    def is_level(self) -> bool:
        """Whether w + ε is w: no direction leads up."""
        return self.norm <= self.rho / STEEPEST

    @property
    def leads_somewhere(self) -> bool:
        """Whether there is a direction that leads up, and it can be told."""
        return math.isfinite(self.norm) and not self.is_level

    @torch.no_grad()
    def move(self, kept: list[Kept]) -> None:
        """Go there, if anywhere; what is in `kept` leads back. Done once, for it lets go of the gradients."""
        while self._buckets:
            bucket = self._buckets.pop()
            if self.leads_somewhere:
                bucket.move(self.rho / self.norm, kept)


class _Buffers:
    """The buffers of modules, as they are now."""

    def __init__(self, model: nn.Module | None) -> None:
        modules: Iterable[nn.Module] = () if model is None else model.modules()
        self._kept = [
            (module._buffers, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def put_back(self) -> None:
        for buffers, name, buffer, value in self._kept:
            buffer.copy_(value)
            buffers[name] = buffer
