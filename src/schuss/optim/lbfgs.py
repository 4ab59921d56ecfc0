"""L-BFGS: steps along a quasi-Newton direction, and the line search that goes with it."""

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, StateDict

from schuss import bounds
from schuss.engine.state import real_view
from schuss.optimizer import Number, Optimizer
from schuss.roles import names_of

if TYPE_CHECKING:
    from schuss.engine.plan import Plan

ARMIJO, CURVATURE = 1e-4, 0.9
"""The constants of the strong Wolfe conditions: how much the loss must fall, how flat the slope must become."""
SMALLEST_CURVATURE = 1e-10
"""Pairs of steps and differences of gradients with less are not kept."""


class LBFGS(Optimizer):
    r"""Limited-memory quasi-Newton: steps along -H g, where H is made of the last steps and gradients.

    .. math::
        s_k = x_{k+1} - x_k, \qquad y_k = g_{k+1} - g_k, \qquad \rho_k = 1 / s_k^T y_k \\
        H_{k+1} = (I - \rho_k s_k y_k^T) H_k (I - \rho_k y_k s_k^T) + \rho_k s_k s_k^T, \qquad
        x_{k+1} = x_k - t_k H_k g_k

    x is all parameters as one vector; H starts as s^T y / y^T y of the newest pair and is never made, only applied to
    g, from `history_size` pairs. One `step` is up to `max_iter` iterations, each with one call of the closure or, with
    a line search, as many as it needs. The loss must be a function of the parameters alone: full batches, no dropout.

    The history takes `2 * history_size` times the parameters, from the first step on.

    Args:
        params: dense tensors on one device, (name, tensor) pairs, or groups as dicts, which must agree in everything.
        lr: the length t of a step, in [0, inf), or what a line search tries first; 1 is Newton's. The first step of
            all is shorter if the gradient is large.
        max_iter: iterations per step, in [1, inf).
        max_eval: calls of the closure per step, in [1, inf), after which no iteration begins; None is 1.25 max_iter.
        tolerance_grad: a step ends when no element of the gradient is larger; negative: never.
        tolerance_change: a step ends when neither the loss nor an element of x changes by more; negative: never.
        history_size: pairs that are kept, an integer in [1, inf).
        line_search_fn: "strong_wolfe", or None: every step has the length `lr`.

    Raises:
        ValueError: a hyperparameter out of its bounds, groups that disagree, sparse parameters, or several devices.
        TypeError: history_size is no integer.

    Source: Liu, Nocedal 1989, Mathematical Programming 45; line search: Nocedal, Wright 2006, algorithms 3.5 and 3.6.
    """

    bounds = {
        "lr": "[0, inf)",
        "max_iter": "[1, inf)",
        "max_eval": "[1, inf)",
        "tolerance_grad": "(-inf, inf)",
        "tolerance_change": "(-inf, inf)",
        "history_size": "[1, inf)",
    }
    has_step = False
    source = "Liu, Nocedal 1989, Mathematical Programming 45; line search: Nocedal, Wright 2006, algorithms 3.5 and 3.6"
    _step_supports_amp_scaling = False

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
    ) -> None:
        if max_eval is None:
            bounds.check(type(self).__name__, "max_iter", max_iter, self.bounds["max_iter"])
            max_eval = max_iter * 5 // 4
        defaults = dict(
            lr=lr, max_iter=max_iter, max_eval=max_eval, tolerance_grad=tolerance_grad,
            tolerance_change=tolerance_change, history_size=history_size, line_search_fn=line_search_fn,
        )  # fmt: skip
        super().__init__(params, defaults, backend="reference")  # no kernel is ever run: none needs to be loaded

    @staticmethod
    def rule(p, g):
        """Never run, for a step is no formula of one element; but every class declares one."""
        raise NotImplementedError

    @classmethod
    def vectors_kept(cls, group: Mapping[str, Any]) -> int:
        """How many vectors as long as all parameters together the state has."""
        return 2 * int(group["history_size"]) + 2

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        size, search = group["history_size"], group["line_search_fn"]
        if not isinstance(size, Integral):
            raise TypeError(
                f"{cls.__name__}: history_size must be an integer in [1, inf), got {size!r} ({type(size).__name__})"
            )
        if search not in (None, "strong_wolfe"):
            raise ValueError(f"{cls.__name__}: line_search_fn must be 'strong_wolfe' or None, got {search!r}")

    def plan(self) -> "Plan":
        """There is none: a step is a search along a line, not one pass over memory."""
        raise NotImplementedError(f"{type(self).__name__} has no plan: its step is a search, not one pass over memory")

    # --- groups and state -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the next step then starts without a history, since x has become longer.

        Args:
            param_group: {"params": ..., and hyperparameters, which must be those of the other groups}.

        Raises:
            ValueError: a hyperparameter out of its bounds or unlike that of another group, sparse parameters, another
                device, or a parameter that the optimizer has already.
        """
        super().add_param_group(param_group)
        if self.state:
            calls = sum(kept.get("func_evals", 0) for kept in self.state.values())
            self.state = defaultdict(dict, {self._params()[0]: {"func_evals": calls}})

    def _check_parameters(self, group: Mapping[str, Any]) -> None:
        """Raise on parameters that cannot be part of x, and on hyperparameters unlike those of other groups."""
        owner, others = type(self).__name__, self._params()
        for name, p in names_of(group, len(self.param_groups)):
            if not isinstance(p, torch.Tensor):
                continue  # torch says so
            if p.layout != torch.strided:
                raise ValueError(f"{owner}: parameters must be dense, {name} has layout {p.layout}")
            if others and p.device != others[0].device:
                raise ValueError(
                    f"{owner}: all parameters must be on one device, {name} is on {p.device}, others on "
                    f"{others[0].device}"
                )
            others.append(p)
        _agreed(owner, [*self.param_groups, self.defaults | dict(group)])

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self, *, portable: bool = False) -> StateDict:
        """The state as a dict of tensors and numbers, the history as rows of `old_dirs` and `old_stps`.

        Args:
            portable: write the history as lists, which is how torch.optim.LBFGS keeps, and must be given, it. Such
                a dict is loaded here, too, but cannot be flattened by torch.distributed.checkpoint.
        """
        state_dict = super().state_dict()
        entries = {index: kept for index, kept in state_dict["state"].items() if kept}
        if portable:
            entries = {index: _as_lists(kept) if "pairs" in kept else kept for index, kept in entries.items()}
        elif entries:  # distributed checkpoints take a parameter without an entry for one that was forgotten
            entries = {index: entries.get(index, {}) for g in state_dict["param_groups"] for index in g["params"]}
        return {**state_dict, "state": entries}

    def load_state_dict(self, state_dict: StateDict, *, strict: bool = True) -> None:
        """Load what `state_dict` returned, or that of torch.optim.LBFGS. The state is copied and keeps its dtype.

        Args:
            state_dict: the saved state.
            strict: as in `schuss.Optimizer.load_state_dict`; here names must be the same, in the same order, in any
                case, since the history is of all parameters together.

        Raises:
            ValueError: other groups, sizes or names than this optimizer has. Nothing has been changed then.
        """
        saved, here = (
            [name for group in groups for name in group.get("param_names", ())]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if saved and here and sorted(saved) == sorted(here) and saved != here:
            raise ValueError(
                f"{type(self).__name__}: the saved history is of the parameters in another order; make the optimizer "
                "with the parameters in the order in which they were saved"
            )
        super().load_state_dict(state_dict, strict=strict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = state["param_groups"]
        _agreed(type(self).__name__, groups)
        super().__setstate__(state | {"state": self._adopted(state["state"], groups)})

    def _adopted(self, state: Mapping[Any, Any], groups: list[dict[str, Any]]) -> Mapping[Any, Any]:
        """Loaded state in the form that it has here; torch's has lists."""
        owner = type(self).__name__
        first = next((p for group in groups for p in group["params"]), None)
        found = {p: kept for p, kept in state.items() if kept}
        if any("func_evals" in kept and p is not first for p, kept in found.items() if isinstance(p, torch.Tensor)):
            raise ValueError(
                f"{owner}: the loaded state belongs to another parameter than the first one, so the order of the "
                "parameters is not the one that it was saved with"
            )
        if "func_evals" in found.get(first, {}):  # there may be state of a wrapper alone
            found[first] = _fitted(owner, found[first], _Line(owner, groups), groups[0]["history_size"])
        return defaultdict(dict, found)

    # --- a step -----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Up to `max_iter` iterations.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss; called several
                times, with gradients enabled.

        Returns:
            The loss of the closure's first call, at the parameters as they were.

        Raises:
            TypeError: no closure, or one that returns nothing. (With lr 0 and no closure only state is made, which is
                how distributed checkpoints ask for it.)
            ValueError: groups that disagree, or a hyperparameter out of its bounds.
            RuntimeError: a sparse gradient.

        After an error, whatever has raised it, parameters and state are as they were before the step.
        """
        owner = type(self).__name__
        for each in self.param_groups:
            self._check(each)
        group = _agreed(owner, self.param_groups)
        line = _Line(owner, self.param_groups)
        if closure is None and bounds.number(group["lr"]) != 0:
            raise TypeError(
                f"{owner}: step needs a closure that clears the gradients, computes the loss, calls backward and "
                "returns the loss, since a step evaluates it several times: optimizer.step(closure)"
            )
        if closure is not None:
            line.closure = torch.enable_grad()(closure)
        if line.length == 0:
            return None if closure is None else line.evaluate()[0]
        first = self._params()[0]
        kept = _fitted(owner, self.state.get(first, {}), line, group["history_size"])
        if closure is None:
            self.state[first].update(kept)
            return None
        history, start = _History(kept), line.copy()
        try:
            loss: float = _iterate(owner, group, line, history, kept)
            self.state[first].update(kept)
        except BaseException:
            line.place(start)
            history.take_back()
            raise
        return loss

    # Who asks for the signature, as `schuss.fit` does, is told that a closure is needed; who leaves it out, which one.
    step.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "closure")]
    )


def _agreed(owner: str, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The hyperparameters that all groups have.

    Raises:
        ValueError: they disagree.
    """
    first = groups[0]
    for key in (*LBFGS.bounds, "line_search_fn"):
        for index, group in enumerate(groups[1:], start=1):
            if group[key] != first[key]:
                raise ValueError(
                    f"{owner}: {key} must be the same in all groups, got {first[key]!r} in group 0 and {group[key]!r} "
                    f"in group {index}, but all parameters move along one line"
                )
    return first


# --- the parameters as one vector ------------------------------------------------------------------------------------


class _Line:
    """All parameters as one vector x of reals, which is moved along lines, and the loss as a function of it."""

    def __init__(self, owner: str, groups: Iterable[Mapping[str, Any]]) -> None:
        self.closure: Callable[[], Any] | None = None
        self.met_nonfinite = False
        self._owner, self._named = owner, [pair for i, group in enumerate(groups) for pair in names_of(group, i)]
        reals = self._reals()
        self.dtype = torch.float32  # at least: differences of gradients of fewer bits tell nothing
        for real in reals:
            self.dtype = torch.promote_types(self.dtype, real.dtype)
        self.device = reals[0].device if reals else torch.device("cpu")
        self.length = sum(real.numel() for real in reals)

    def _reals(self) -> list[torch.Tensor]:
        """The parameters, complex ones as pairs; anew each time, since a closure may give them other memory."""
        params = [p.detach() for _, p in self._named]
        return [torch.view_as_real(p) if p.is_complex() else p for p in params]

    def evaluate(self) -> tuple[Any, float, torch.Tensor]:
        """What the closure returns, its value, and the gradient as a new vector."""
        assert self.closure is not None
        loss = self.closure()
        if loss is None:
            raise TypeError(f"{self._owner}: the closure must return the loss, got None; let it end in `return loss`")
        parts = []
        for name, p in self._named:
            if p.grad is None:
                zeros = torch.zeros((2 if p.is_complex() else 1) * p.numel(), dtype=self.dtype, device=self.device)
                parts.append(zeros)
            elif p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{self._owner} does not support sparse gradients, and {name} has one; use sparse=False in its "
                    "layer"
                )
            else:
                parts.append(real_view(p.grad).detach().reshape(-1).to(self.dtype))
        return loss, float(loss), torch.cat(parts) if parts else torch.zeros(0)

    def point(self, x: list[torch.Tensor], d: torch.Tensor, t: float) -> "Point":
        """The loss at x + t d, and its slope along d; infinite where either is no finite number."""
        self.place(x, t, d)
        _, loss, g = self.evaluate()
        slope = g.dot(d).item()
        if not (math.isfinite(loss) and math.isfinite(slope)):
            self.met_nonfinite = True
            loss = math.inf
        return Point(t, loss, slope, g)

    def copy(self, into: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """The parameters' values."""
        if into is None:
            return [real.clone() for real in self._reals()]
        torch._foreach_copy_(into, self._reals())
        return into

    def place(self, x: list[torch.Tensor], t: float = 0.0, d: torch.Tensor | None = None) -> None:
        """Move the parameters to x, or to x + t d."""
        reals = self._reals()
        torch._foreach_copy_(reals, x)
        if d is not None:
            pieces = d.split([real.numel() for real in reals])
            steps = [piece.view(real.shape) for piece, real in zip(pieces, reals, strict=True)]
            torch._foreach_add_(reals, steps, alpha=t)


# --- the state -------------------------------------------------------------------------------------------------------

RINGS = ("old_dirs", "old_stps", "ro")
"""The names of the history: y, s and rho of each pair. Pair k lies in row k % history_size."""


def _fitted(owner: str, kept: Mapping[str, Any], line: _Line, size: int) -> dict[str, Any]:
    """The state that a step begins with: what is there, in the form, dtype and size that is needed.

    Raises:
        ValueError: it is of another number of elements.
    """
    like: dict[str, Any] = {"dtype": line.dtype, "device": line.device}
    fresh = {
        "func_evals": 0, "n_iter": 0, "d": None, "t": 0.0, "old_dirs": None, "old_stps": None, "ro": None, "pairs": 0,
        "H_diag": 1.0, "prev_flat_grad": None, "prev_loss": 0.0,
    }  # fmt: skip
    fitted: dict[str, Any] = fresh | {k: v for k, v in kept.items() if v is not None and k != "al"}  # al is scratch
    for key in ("t", "H_diag", "prev_loss"):
        fitted[key] = bounds.number(fitted[key])
    for key in ("d", "prev_flat_grad"):
        value = fitted[key]
        fitted[key] = torch.zeros(line.length, **like) if value is None else value.to(**like)
        _check_length(owner, key, fitted[key].numel(), line)
    rings = [fitted[key] for key in RINGS]
    if all(isinstance(ring, torch.Tensor) and len(ring) == size for ring in rings):
        for key, ring in zip(RINGS[:2], rings, strict=False):
            _check_length(owner, key, ring[0].numel(), line)
        return fitted | {key: ring.to(**like) for key, ring in zip(RINGS, rings, strict=True)}
    # None, or of another size, or torch's lists: the newest pairs move to the front.
    rows = [_in_order(r, fitted["pairs"]) if isinstance(r, torch.Tensor) else list(r or ()) for r in rings]
    count = min(len(rows[0]), size)
    for key, old in zip(RINGS, rows, strict=True):
        shape = (size,) if key == "ro" else (size, line.length)
        fitted[key] = torch.zeros(shape, **like)
        for row, value in zip(fitted[key], old[len(old) - count :], strict=False):
            if key != "ro":
                _check_length(owner, key, value.numel(), line)
            row.copy_(torch.as_tensor(value))
    return fitted | {"pairs": count}


def _check_length(owner: str, key: str, length: int, line: _Line) -> None:
    if length != line.length:
        raise ValueError(
            f"{owner}: {key!r} of the state has {length} elements, all parameters together have {line.length}"
        )


def _in_order(rows: Any, pairs: int) -> list[Any]:
    """The rows of a ring from the oldest to the newest."""
    size = len(rows)
    return [rows[k % size] for k in range(max(0, pairs - size), pairs)]


def _as_lists(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The state as torch.optim.LBFGS keeps it."""
    lists = {key: _in_order(kept[key], kept["pairs"]) for key in RINGS}
    return {key: lists.get(key, value) for key, value in kept.items() if key != "pairs"}


class _History:
    """The pairs (s, y) that stand for H, in the rings of a state, and what a step has overwritten in them."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self._kept, self._before, self._numbers = kept, kept["pairs"], kept["ro"].clone()
        self._rows = list(zip(*(kept[key].unbind() for key in RINGS), strict=True))
        self._overwritten: dict[int, list[torch.Tensor]] = {}

    def __len__(self) -> int:
        return min(int(self._kept["pairs"]), len(self._rows))

    def forget(self) -> None:
        """Start anew, with H = I."""
        self._kept |= {"pairs": 0, "H_diag": 1.0}

    def add(self, y: torch.Tensor, s: torch.Tensor) -> None:
        """Keep a pair, in the place of the oldest one if there is no other, unless the loss does not curve upwards."""
        ys = y.dot(s)
        curvature, inverse, scale = torch.stack((ys, 1 / ys, ys / y.dot(y))).tolist()
        if not curvature > SMALLEST_CURVATURE:
            return
        k = self._kept["pairs"] % len(self._rows)
        if k not in self._overwritten:
            was_used = k < self._before
            self._overwritten[k] = [row.clone() if was_used else torch.zeros(()) for row in self._rows[k][:2]]
        of_y, of_s, rho = self._rows[k]
        of_y.copy_(y)
        of_s.copy_(s)
        rho.fill_(inverse)
        self._kept |= {"pairs": self._kept["pairs"] + 1, "H_diag": scale}

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        """-H g, by the two loops of Nocedal 1980. Its numbers stay on the device: nothing waits for it."""
        pairs = _in_order(self._rows, self._kept["pairs"])
        q, shares = g.neg(), []
        for y, s, rho in reversed(pairs):
            shares.append(s.dot(q) * rho)
            q.addcmul_(y, shares[-1], value=-1)
        q *= self._kept["H_diag"]
        for (y, s, rho), share in zip(pairs, reversed(shares), strict=True):
            q.addcmul_(s, share - y.dot(q) * rho)
        return q

    def take_back(self) -> None:
        """Undo in the rings what has been done since this object was made."""
        self._kept["ro"].copy_(self._numbers)
        for k, old in self._overwritten.items():
            for row, value in zip(self._rows[k][:2], old, strict=True):
                row.copy_(value)


# --- iterations ------------------------------------------------------------------------------------------------------


def _iterate(owner: str, group: Mapping[str, Any], line: _Line, history: _History, kept: dict[str, Any]) -> Any:
    """The iterations of a step; `kept` becomes the state after it. Returns what the closure returned first."""
    lr, max_iter, max_eval = (bounds.number(group[key]) for key in ("lr", "max_iter", "max_eval"))
    tolerance_grad, tolerance_change = (bounds.number(group[key]) for key in ("tolerance_grad", "tolerance_change"))
    result, loss, g = line.evaluate()
    calls, largest = 1, _largest(g)
    kept["func_evals"] += 1
    if math.isfinite(loss) and not math.isfinite(largest):
        _warn(f"{owner}: the loss is {loss:g}, but its gradient is not finite; parameters stay where they are")
    if largest <= tolerance_grad or not (math.isfinite(loss) and math.isfinite(largest)):
        return result
    x = line.copy()
    n = 0
    while n < max_iter:
        n += 1
        kept["n_iter"] += 1
        if steepest := kept["n_iter"] == 1:
            history.forget()
        else:
            history.add(g - kept["prev_flat_grad"], kept["d"] * kept["t"])
        d = g.neg() if steepest else history.direction(g)
        slope, reach = torch.stack((g.dot(d), d.abs().max())).tolist()
        if not math.isfinite(slope) and len(history):  # the pairs are too large for their dtype
            history.forget()
            steepest, d = True, g.neg()
            slope, reach = torch.stack((g.dot(d), d.abs().max())).tolist()
        t = (lr * (1 / g.abs().sum()).clamp(max=1)).item() if steepest else lr
        kept |= {"d": d, "t": t, "prev_flat_grad": g, "prev_loss": loss}
        if not math.isfinite(slope):
            _warn(f"{owner}: the square of the gradient overflows its dtype; parameters stay where they are")
            kept |= {"d": torch.zeros_like(d), "t": 0.0}
            break
        if slope > -tolerance_change:
            break

        line.copy(into=x)
        before, searches = calls, group["line_search_fn"] is not None
        if searches and t != 0:
            start = Point(0.0, loss, slope, g)
            point, more = strong_wolfe(partial(line.point, x, d), start, t, reach, tolerance_change, max_eval - calls)
            line.place(x, point.t, d)
            t, loss, g = point.t, point.loss, point.g
            calls += more
        else:
            line.place(x, t, d)
            if n != max_iter:  # else the next step evaluates there
                _, loss, g = line.evaluate()
                calls += 1
        kept["func_evals"] += calls - before
        if calls != before:
            largest = _largest(g)
            if not (math.isfinite(loss) and math.isfinite(largest)):
                line.place(x)
                line.met_nonfinite, t = True, 0.0
        kept["t"] = t
        if t == 0 and line.met_nonfinite:
            _warn(
                f"{owner}: the loss or its gradient is not finite further along, so parameters stay where they are; "
                "try a smaller lr" + ("" if searches else " or line_search_fn='strong_wolfe'")
            )
            break
        if n == max_iter or calls >= max_eval or largest <= tolerance_grad:
            break
        if abs(t) * reach <= tolerance_change or abs(loss - kept["prev_loss"]) < tolerance_change:
            break
    return result


def _largest(g: torch.Tensor) -> float:
    return g.abs().max().item()


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=8)  # the caller of step, which is wrapped four times


# --- the line search -------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A point x + t d on a line."""

    t: float
    loss: float
    """Infinite where the loss or the slope is no finite number."""
    slope: float
    g: torch.Tensor


def strong_wolfe(
    at: Callable[[float], Point], start: Point, t: float, reach: float, tolerance: float, limit: float
) -> tuple[Point, int]:
    """A point where the loss has fallen enough and the slope is flat enough; the lowest one if there is none in time.

    First steps get longer until an interval is found that must hold such a point, then the interval gets shorter. The
    constants and the order of the conditions are those of torch.optim, so that it takes the same number of calls. A
    point whose loss is not finite counts as too high, and intervals that end in one are halved.

    Args:
        at: evaluates a point.
        start: the point at t = 0.
        t: what to try first.
        reach: the largest element of d.
        tolerance: intervals are not made shorter than this, in elements of x.
        limit: points to evaluate after the first.

    Returns:
        The point, and how many were evaluated.
    """

    def is_high(point: Point) -> bool:
        return point.loss > start.loss + ARMIJO * point.t * start.slope

    def is_flat(point: Point) -> bool:
        return abs(point.slope) <= -CURVATURE * start.slope

    previous, new, rounds = start, at(t), 0
    while rounds < limit:
        if is_high(new) or (rounds > 1 and new.loss >= previous.loss):
            ends = [previous, new]
            break
        if is_flat(new):
            return new, rounds + 1
        if new.slope >= 0:
            ends = [previous, new]
            break
        t = _lowest(previous, new, (new.t + 0.01 * (new.t - previous.t), 10 * new.t))
        previous, new, rounds = new, at(t), rounds + 1
    else:
        ends = [start, new]

    low = 0 if ends[0].loss <= ends[1].loss else 1
    was_near_an_end = False
    while rounds < limit and abs(ends[1].t - ends[0].t) * reach >= tolerance:
        t = _lowest(ends[0], ends[1])
        left, right = sorted(end.t for end in ends)
        margin = 0.1 * (right - left)
        is_near_an_end = min(right - t, t - left) < margin
        if is_near_an_end and (was_near_an_end or not left < t < right):
            t = right - margin if abs(t - right) < abs(t - left) else left + margin
            is_near_an_end = False
        was_near_an_end = is_near_an_end
        new, rounds = at(t), rounds + 1
        if is_high(new) or new.loss >= ends[low].loss:
            ends[1 - low] = new
            low = 0 if ends[0].loss <= ends[1].loss else 1
            continue
        if is_flat(new):
            return new, rounds + 1
        if new.slope * (ends[1 - low].t - ends[low].t) >= 0:
            ends[1 - low] = ends[low]
        ends[low] = new
    return ends[low], rounds + 1


def _lowest(a: Point, b: Point, within: tuple[float, float] | None = None) -> float:
    """Where the cubic through two points with their slopes is lowest, in an interval; its middle if that is nowhere."""
    a, b = sorted((a, b), key=lambda point: point.t)
    left, right = within or (a.t, b.t)
    t = math.nan
    if a.t < b.t and math.isfinite(a.loss) and math.isfinite(b.loss):
        secant = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
        square = secant * secant - a.slope * b.slope
        if square >= 0:
            root = math.sqrt(square)
            bend = b.slope - a.slope + 2 * root
            share = b.slope + root - secant
            if bend:
                t = b.t - (b.t - a.t) * (share / bend)
            elif share:  # it falls on and on
                t = -math.copysign(math.inf, share)
    return (left + right) / 2 if math.isnan(t) else min(max(t, left), right)
