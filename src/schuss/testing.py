"""What every optimizer must pass, whoever wrote it: `schuss.testing.check_optimizer(MyRule)`.

Each check takes a class and the settings to make it with, and raises AssertionError. They need no knowledge of the
rule: they compare back ends, runs and orders with each other. Whether the formula is the right one, only a test
against its paper can tell.
"""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch

from schuss.bounds import Interval
from schuss.engine.pieces import Pieces
from schuss.engine.stages import is_staged
from schuss.optimizer import Optimizer

__all__ = ["CHECKS", "check_optimizer"]

SHAPES = ((5, 7), (3,), (), (0,), (4, 3, 2, 2), (40_000,))
MATRICES = ((5, 7), (7, 5), (1, 9), (0, 3), (2, 3, 4), (3, 1, 2), (4, 3, 2, 2), (2, 3, 1, 5), (5, 7), (130, 130))
"""In the place of `SHAPES`, for optimizers that take no vectors."""
STEPS = 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.complex64: 2e-6}
"""Relative to the largest element. Kernels round as eager torch does but for roots, where torch may be an ulp off."""


def check_optimizer(cls: type[Optimizer], **settings: Any) -> None:
    """Run every check on an optimizer.

    Args:
        cls: a subclass of `schuss.Optimizer`.
        settings: hyperparameters to make it with.

    Raises:
        AssertionError: naming the check that failed, and what it found.
    """
    for check in CHECKS:
        try:
            check(cls, settings)
        except AssertionError as error:
            raise AssertionError(f"{cls.__name__}: {check.__name__}: {error}") from error


def shapes(cls: type[Optimizer]) -> list[tuple[int, ...]]:
    """The shapes of parameters that an optimizer is checked with: those that it takes."""
    several = SHAPES if cls.takes(torch.empty(3)) else MATRICES
    return [shape for shape in several if cls.takes(torch.empty(shape, device="meta"))]


class Run:
    """A few parameters, an optimizer of them, and steps with gradients that depend on a seed alone."""

    def __init__(
        self,
        cls: type[Optimizer],
        settings: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float64,
        groups: int = 1,
        **more: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, dtype=dtype, generator=generator)) for s in shapes(cls)]
        parts = [self.params[i::groups] for i in range(groups)]
        self.optimizer = cls([{"params": part} for part in parts], **(dict(settings) | more))

    def step(self, seed: int, *, skip: int | None = None, sign: float = 1.0) -> None:
        """One step; the parameter `skip` has no gradient."""
        generator = torch.Generator().manual_seed(1000 + seed)
        for i, p in enumerate(self.params):
            # laid out like p, as autograd lays it out
            g = torch.empty_like(p).copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator) * sign)
            p.grad = None if i == skip else g.detach()
        self.optimizer.step()

    def steps(self, start: int = 0, stop: int = STEPS, **more: Any) -> "Run":
        """Several steps; returns itself."""
        for seed in range(start, stop):
            self.step(seed, **more)
        return self


def close(a: Run, b: Run, tolerance: float) -> None:
    """Parameters agree, relative to the largest element."""
    for i, (x, y) in enumerate(zip(a.params, b.params, strict=True)):
        if x.numel():
            error = ((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item()
            assert error <= tolerance, f"parameter {i} of shape {tuple(x.shape)}: relative error {error:.1e}"


def same(a: Run, b: Run) -> None:
    """Parameters agree bit for bit."""
    for i, (x, y) in enumerate(zip(a.params, b.params, strict=True)):
        assert torch.equal(x, y), f"parameter {i} of shape {tuple(x.shape)} differs by {(x - y).abs().max().item():.1e}"


def has_sums(optimizer: Optimizer) -> bool:
    """Whether the rule sums over tensors, in the form that some parameter has."""
    if not isinstance(optimizer, Optimizer):  # a wrapper, of one or of several
        inner = getattr(optimizer, "optimizers", None)
        return any(map(has_sums, inner.values() if inner else [optimizer.inner]))
    rule = optimizer._rule
    variants = {rule.variant(group, p) for group in optimizer.param_groups for p in group["params"]}
    return any(is_staged(rule.trace(variant, Pieces())[0], rule.domains()) for variant in variants)


def alike(a: Run, b: Run) -> None:
    """Parameters agree bit for bit, or to rounding where the elements of sums may be added in another order."""
    if has_sums(a.optimizer):
        close(a, b, TOLERANCE[torch.float64])
    else:
        same(a, b)


def back_ends_agree(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """Every back end gives what eager torch gives."""
    for dtype, tolerance in TOLERANCE.items():
        if dtype.is_complex and not cls.takes_complex:
            continue
        reference = Run(cls, settings, dtype=dtype, backend="reference").steps()
        for backend in ("numba", "foreach"):
            close(Run(cls, settings, dtype=dtype, backend=backend).steps(), reference, tolerance)


def groups_do_not_matter(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """Parameters in three groups move as in one."""
    same(Run(cls, settings, groups=3).steps(), Run(cls, settings).steps())


def threads_do_not_matter(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """One thread gives the bits of several."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(Run(cls, settings, dtype=torch.float32).steps())
    finally:
        torch.set_num_threads(before)
    same(*runs)


def layout_does_not_matter(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """A transposed parameter moves as a contiguous one."""
    runs = [Run(cls, settings), Run(cls, settings)]
    for p in runs[1].params:
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()
    alike(*(run.steps() for run in runs))


def missing_gradients_are_skipped(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """A parameter without a gradient stays where it is; its own steps alone count for it."""
    run, start = Run(cls, settings), Run(cls, settings)
    run.steps(0, 2, skip=1)
    assert torch.equal(run.params[1], start.params[1]), "a parameter without a gradient moved"
    alone = Run(cls, settings)
    for seed in range(2, STEPS):
        run.step(seed)
        alone.step(seed)
    assert torch.equal(run.params[1], alone.params[1]), "steps of other parameters counted"


def gradients_stay(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """A step leaves p.grad as it is, and p in its memory."""
    run = Run(cls, settings).steps(0, 1)
    addresses = [p.data_ptr() for p in run.params]
    grads = [p.grad.clone() for p in run.params if p.grad is not None]
    run.optimizer.step()
    now = [p.grad for p in run.params if p.grad is not None]
    assert all(map(torch.equal, now, grads)), "a step changed a gradient"
    assert [p.data_ptr() for p in run.params] == addresses, "a step moved a parameter in memory"


def maximize_is_the_negated_gradient(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """maximize=True with g is maximize=False with -g."""
    if "maximize" in Run(cls, settings).optimizer.defaults:
        alike(Run(cls, settings, maximize=True).steps(sign=-1.0), Run(cls, settings).steps())


def zero_rate_stands_still(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """With lr=0 nothing moves, but state is made: distributed checkpoints rely on it."""
    run = Run(cls, settings)
    if "lr" not in run.optimizer.defaults:
        return
    run = Run(cls, settings, lr=0.0)
    start = [p.detach().clone() for p in run.params]
    for p in run.params:
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    assert all(map(torch.equal, run.params, start)), "lr=0 moved a parameter"
    rule = run.optimizer._rule
    group = run.optimizer.param_groups[0]
    for p in run.params:
        needed = [*rule.scalar_states, *(s.name for s in rule.present(rule.variant(group, p)))]
        assert list(run.optimizer.state.get(p, {})) == needed, f"state after a step with lr=0 is not {needed}"


def decoupled_decay_multiplies(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """Decoupled weight decay takes lr * weight_decay * p more than no decay does, at the second step."""
    run = Run(cls, settings)
    group = run.optimizer.param_groups[0]
    if "weight_decay" not in group or not run.optimizer._rule.is_decoupled(group):
        return
    lr, weight_decay = float(group["lr"]), 0.25
    plain, decayed = (Run(cls, settings, weight_decay=w).steps(0, 1) for w in (0.0, weight_decay))
    with torch.no_grad():
        for p, q in zip(plain.params, decayed.params, strict=True):
            q.copy_(p)
    before = [p.detach().clone() for p in plain.params]
    plain.step(1)
    decayed.step(1)
    for p, q, b in zip(plain.params, decayed.params, before, strict=True):
        error = ((p - q) - lr * weight_decay * b).abs().max().item() if b.numel() else 0.0
        assert error <= 1e-12, f"decay is off by {error:.1e}"


def resuming_is_not_stopping(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """Saved, loaded without pickled code, and continued: the bits of never having stopped."""
    for dtype in (torch.float32, torch.bfloat16):
        whole = Run(cls, settings, dtype=dtype).steps()
        first = Run(cls, settings, dtype=dtype).steps(0, 3)
        file = io.BytesIO()
        torch.save([first.optimizer.state_dict(), [p.data for p in first.params]], file)
        file.seek(0)
        state, params = torch.load(file, weights_only=True)
        second = Run(cls, settings, dtype=dtype)
        with torch.no_grad():
            for p, saved in zip(second.params, params, strict=True):
                p.copy_(saved)
        second.optimizer.load_state_dict(state)
        same(second.steps(3, STEPS), whole)


def copies_continue(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """A deep copy, and a pickled one, go on as the original."""
    run = Run(cls, settings).steps(0, 3)
    copies = [copy.deepcopy(run), pickle.loads(pickle.dumps(run))]
    run.steps(3, STEPS)
    for other in copies:
        same(other.steps(3, STEPS), run)


def bounds_hold(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """Every declared bound is enforced, by a message that names the class, the argument and the interval."""
    defaults = Run(cls, settings).optimizer.defaults
    for name, bound in cls.bounds.items():
        assert name in defaults, f"bounds name {name!r}, which is no hyperparameter"
        several = isinstance(bound, tuple)
        intervals = bound if isinstance(bound, tuple) else (bound,)
        for i, allowed in enumerate(intervals):
            text = allowed.removeprefix("None or ")
            interval = Interval.parse(text)
            for wrong in (interval.low - 1, interval.high + 1, math.nan):
                if wrong in interval or math.isinf(wrong):
                    continue
                value = tuple(wrong if j == i else d for j, d in enumerate(defaults[name])) if several else wrong
                where = f"{name}[{i}]" if several else name
                try:
                    Run(cls, {**settings, name: value})
                except ValueError as error:
                    wanted = f"None or in {text}" if allowed.startswith("None or ") else f"in {text}"
                    clear = f"{cls.__name__}: {where} must be {wanted}"
                    assert clear in str(error), f"unclear message: {error}"
                else:
                    raise AssertionError(f"{name}={value!r} was accepted")


def documented(cls: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """The docstring says what it is and speaks of every hyperparameter."""
    text = cls.__doc__ or ""
    assert cls.__dict__.get("__doc__") and text.partition("\n")[0].strip(), "no docstring of its own"
    arguments = inspect.signature(cls).parameters
    silent = [name for name in Run(cls, settings).optimizer.defaults if name in arguments and name not in text]
    assert not silent, f"the docstring does not mention {', '.join(silent)}"


CHECKS: tuple[Callable[[type[Optimizer], Mapping[str, Any]], None], ...] = (
    back_ends_agree,
    groups_do_not_matter,
    threads_do_not_matter,
    layout_does_not_matter,
    missing_gradients_are_skipped,
    gradients_stay,
    maximize_is_the_negated_gradient,
    zero_rate_stands_still,
    decoupled_decay_multiplies,
    resuming_is_not_stopping,
    copies_continue,
    bounds_hold,
    documented,
)
"""The checks, in the order in which `check_optimizer` runs them."""
