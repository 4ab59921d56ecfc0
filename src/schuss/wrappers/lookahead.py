"""Lookahead: slow weights that follow the inner optimizer's fast ones."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch

from schuss import bounds
from schuss.engine.state import COMPENSATION, HALF, Cell, find
from schuss.optimizer import Optimizer
from schuss.wrappers.base import Own, Wrapper, _chain, _params, wide

__all__ = ["Lookahead", "Pullback"]

Pullback = Literal["none", "reset", "interpolate"]
PULLBACKS = ("none", "reset", "interpolate")
MOMENTA = ("momentum_buffer", "exp_avg")
"""Names under which optimizers keep their momentum."""


class Lookahead(Wrapper):
    """Lookahead: after every k steps of any optimizer, go back to a point between where they began and where they led.

    $$\\theta_{t,0} = \\phi_{t-1}, \\qquad \\theta_{t,i} = \\theta_{t,i-1} + A(\\theta_{t,i-1}) \\quad (i = 1 \\dots k),
    \\qquad \\phi_t = \\phi_{t-1} + \\alpha\\,(\\theta_{t,k} - \\phi_{t-1})$$

    A step that is skipped, because a GradScaler or nonfinite="skip" has found gradients that are not finite, does not
    count.

    The parameters are the fast weights θ; the slow weights φ are one state more, "lookahead_slow", in float32 at least.
    They start where the parameters are when the first step begins. k and alpha are in the groups, as "lookahead_k"
    and "lookahead_alpha": alpha may differ between groups and follow a schedule, k is the first group's for all.

    Args:
        inner: any `torch.optim.Optimizer`, which does the k steps.
        k: steps from one synchronization to the next, an integer in [1, inf). Default 5.
        alpha: how far the slow weights follow, in [0, 1]. With 1 the parameters move as with `inner` alone; the slow
            weights then stay where it was at the last synchronization. Default 0.5.
        pullback: what becomes of the inner optimizer's momentum ("momentum_buffer" or "exp_avg") at a
            synchronization: "none" (default) leaves it, "reset" makes it 0, "interpolate" does with it what is done
            with the weights. Numbers such as `step` go on in any case.

    Raises:
        TypeError: `inner` is no optimizer, or a Schedule-Free one, which averages by itself.
        ValueError: k or alpha out of bounds, or an unknown pullback.

    Source: Zhang, Lucas, Hinton, Ba 2019, arXiv 1907.08610, Algorithm 1; section 2 on the inner state.
    """

    name = "lookahead"
    bounds: ClassVar[Mapping[str, str]] = {"k": "[1, inf)", "alpha": "[0, 1]"}
    _pickled = (*Wrapper._pickled, "_pullback", "_counter", "_is_fresh", "_groups_seen")
    _is_swapped = False

    def __init__(
        self, inner: torch.optim.Optimizer, k: int = 5, alpha: float = 0.5, *, pullback: Pullback = "none"
    ) -> None:
        if pullback not in PULLBACKS:
            raise ValueError(f"Lookahead: pullback must be one of {', '.join(PULLBACKS)}, got {pullback!r}")
        for one in _chain(inner):
            if callable(getattr(one, "eval", None)):
                raise TypeError(
                    f"Lookahead: {type(one).__name__} keeps an average from which it knows where its parameters are; "
                    "going back would move them away from it; use it without Lookahead"
                )
        super().__init__(inner, {"k": k, "alpha": alpha})
        self._pullback = pullback
        self._count_in(torch.zeros((), dtype=torch.int64, device="cpu"))
        self._groups_seen = 0
        self._is_fresh = True
        # Who makes its state at once, as Adagrad, shows it at once: checkpoints that are loaded by the keys of
        # `state` must find ours among them. It is taken anew by the first step.
        for p in _params(inner):
            if inner.state.get(p):
                self._begin(p)

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if (key := self._key("k")) not in group:
            return
        k, others = group[key], self._setting(self.param_groups[0], "k")
        if not isinstance(k, Integral):
            raise ValueError(f"Lookahead: k must be an integer in [1, inf), got {k!r}")
        if "params" in group and k != others:
            raise ValueError(f"Lookahead: k must be that of the other groups, {others}; got {k!r}")

    def _count_in(self, counter: torch.Tensor) -> None:
        """Count the steps since the last synchronization in a tensor that every parameter's state shares."""
        self._counter, self._count = counter, counter.numpy()  # NumPy adds in the same memory, for 0.1 us

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._count_in(self._counter)

    # --- stepping ---------------------------------------------------------------------------------------------------

    def _check_ready(self) -> None:
        if self._is_swapped:
            raise RuntimeError(
                "Lookahead: a step inside slow_weights() would be undone by its end; step before or after it"
            )
        is_capturable = any(group.get("capturable") for group in self.inner.param_groups[:1])
        if is_capturable and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("Lookahead: a step cannot be captured in a graph, since the host counts to k")

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        self._check_ready()
        groups = self.inner.param_groups
        is_new = self._is_fresh or self._groups_seen != len(groups)
        if is_new:
            self._begin_all()
        loss, has_stepped = self._step_inner(closure)
        if has_stepped:
            if is_new:
                self._has_begun()
            self._count[()] += 1
            if self._count.item() >= self._setting(groups[0], "k"):
                with torch.profiler.record_function("Lookahead.synchronize"):
                    self._synchronize()
                self._count[()] = 0
        return loss

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """The slow weights in the place of the parameters, to evaluate or save the model.

        After the block the parameters are what they were, bit for bit, also when it raises.

        Raises:
            RuntimeError: inside another such block; or a step inside the block.
        """
        if self._is_swapped:
            raise RuntimeError("Lookahead: the slow weights are in place already; leave the inner slow_weights() out")
        slow = [] if self._is_fresh else [(p, self._own[p][self._key("slow")]) for p in self._own]
        kept = [p.detach().clone() for p, _ in slow]
        try:
            self._is_swapped = True
            with torch.no_grad():
                for p, value in slow:
                    p.copy_(value)
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(slow, kept, strict=True):
                    p.copy_(value)
            self._is_swapped = False

    def _begin_all(self) -> None:
        if self._is_fresh:
            self._own.clear()
        for p in _params(self.inner):
            if p not in self._own:
                self._begin(p)
        self._groups_seen = len(self.inner.param_groups)

    def _has_begun(self) -> None:
        self._is_fresh = False
        if self._pullback == "interpolate":  # momenta that the step has made
            for p in self._own:
                for name, _ in self._momenta(p):
                    self._kept_momentum(p, name)

    @torch.no_grad()
    def _begin(self, p: torch.Tensor) -> dict[str, Any]:
        """Slow weights where the parameter is."""
        own: dict[str, Any] = {self._key("slow"): _like(p, _value(p, self._compensation(p)))}
        if self._pullback == "interpolate":
            for name, cell in self._momenta(p):
                own[self._key(name)] = _like(p, cell.read(wide(p)) if not cell.is_plain else cell.values)
        own[self._key("step")] = self._counter
        self._own[p] = own
        return own

    @torch.no_grad()
    def _synchronize(self) -> None:
        if self._pullback != "none":
            self._pull_back()
        for group in self.inner.param_groups:
            alpha = bounds.number(self._setting(group, "alpha"))
            slows, fasts = [], []
            for p in group["params"]:
                slow = (self._own.get(p) or self._begin(p))[self._key("slow")]
                if slow.dtype != p.dtype:
                    _follow(slow, p, self._compensation(p), alpha)
                elif type(p) in (torch.Tensor, torch.nn.Parameter):
                    slows.append(slow)
                    fasts.append(p)
                else:
                    p.copy_(slow.lerp_(p, alpha))
            if slows:
                torch._foreach_lerp_(slows, fasts, alpha)
                torch._foreach_copy_(fasts, slows)

    def _pull_back(self) -> None:
        found = False
        for group in self.inner.param_groups:
            alpha = bounds.number(self._setting(group, "alpha"))
            for p in group["params"]:
                for name, cell in self._momenta(p):
                    found = True
                    if self._pullback == "reset":
                        for tensor in cell.tensors:
                            tensor.zero_()
                        continue
                    kept = self._kept_momentum(p, name)
                    value = cell.values if cell.is_plain else cell.read(torch.float32)
                    kept.lerp_(value.to(kept.dtype), alpha)
                    if cell.is_plain:
                        cell.values.copy_(kept)
                    else:
                        cell.write(kept)
        if not found:
            raise RuntimeError(
                f"Lookahead: pullback={self._pullback!r} found no {' or '.join(MOMENTA)} in the state of "
                f"{type(self.inner).__name__}; use pullback='none'"
            )

    def _momenta(self, p: torch.Tensor) -> Iterator[tuple[str, Cell]]:
        kept = self.inner.state.get(p) or {}
        for name in MOMENTA:
            if (cell := find(kept, name)) is not None:
                yield name, cell

    def _kept_momentum(self, p: torch.Tensor, name: str) -> torch.Tensor:
        """The momentum at the last synchronization: 0 if there was none then."""
        own, key = self._own.get(p) or self._begin(p), self._key(name)
        if key not in own:
            own[key] = torch.zeros_like(p, dtype=wide(p)).detach()
        momentum: torch.Tensor = own[key]
        return momentum

    def _compensation(self, p: torch.Tensor) -> torch.Tensor | None:
        """What rounding="kahan" has cut off the parameter."""
        if p.dtype not in HALF or not any(isinstance(optimizer, Optimizer) for optimizer in _chain(self.inner)):
            return None
        compensation: torch.Tensor | None = (self.inner.state.get(p) or {}).get(COMPENSATION)
        return compensation

    def _saved(self, p: torch.Tensor) -> dict[str, Any]:
        own = self._begin(p) if self._is_fresh and p in self._own else super()._saved(p)
        return own | {self._key("step"): self._counter} if own else {}

    def _load(self, found: Own) -> None:
        super()._load(found)
        saved = [own[self._key("step")] for own in found.values() if self._key("step") in own]
        self._count_in(torch.tensor(int(saved[0]) if saved else 0, dtype=torch.int64, device="cpu"))
        for own in self._own.values():
            own[self._key("step")] = self._counter
        self._is_fresh, self._groups_seen = not found, 0


def _like(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(p, dtype=wide(p)).detach().copy_(value)


def _value(p: torch.Tensor, compensation: torch.Tensor | None) -> torch.Tensor:
    value = p.detach().to(wide(p))
    return value if compensation is None else value + compensation


def _store(p: torch.Tensor, compensation: torch.Tensor | None, value: torch.Tensor) -> None:
    p.copy_(value)
    if compensation is not None:
        compensation.copy_(torch.where(p.isfinite(), value - p, 0))


def _follow(slow: torch.Tensor, p: torch.Tensor, compensation: torch.Tensor | None, alpha: float) -> None:
    """A synchronization of a parameter that holds fewer bits than its slow weight.

    The k steps began at the slow weight as p can hold it. What that has cut off is added to where they led: else it
    would pull the slow weights back at each synchronization, and steps under half of p's last bit would never count.
    """
    start, begun = torch.empty_like(p), None if compensation is None else torch.empty_like(compensation)
    _store(start, begun, slow)
    led = slow - start
    led += p.detach()
    if compensation is not None and begun is not None:
        led += compensation - begun
    slow.lerp_(led, alpha)
    if alpha != 1:
        _store(p, compensation, slow)
