"""The learning-rate range test: train for a moment with a rate that rises, watch the loss, and undo everything."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from schuss import bounds
from schuss.lab import web
from schuss.lab.restored import restored
from schuss.schedules import Schedule
from schuss.schedules.picture import text
from schuss.training.step import Loss, with_modes
from schuss.wrappers.outer import _chain, _needs_closure
from schuss.wrappers.sam import SAM

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["RULES", "RangeTest", "find_lr"]

Curve = NDArray[np.float64]
Stopped = Literal["high", "diverged", "nonfinite"]
SUFFIXES = (".html", ".csv", ".json", ".png")
"""Of the files that a result is saved as."""
TITLE = "Learning-rate range test"


@dataclass(frozen=True, eq=False)
class RangeTest:
    """What `find_lr` has seen.

    Attributes:
        lrs: the rates of the steps that were made, each the same multiple of the one before: those of the group with
            the largest rate.
        losses: after each of these steps, on the batch that follows it. The last may be infinite or NaN.
        smoothed: the bias-corrected exponential average of the first loss and `losses`, without what is not finite.
        first_loss: the loss before the first step.
        stopped: "high", it went through the whole range; "diverged", the smoothed loss was too high; "nonfinite", the
            loss was infinite or NaN.
        ratios: the rate of each group as a multiple of `lrs`.
        rule: the suggestion rule that `lr` follows.
        settings: low, high, steps, smoothing and stop_factor, as they were given.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    first_loss: float
    stopped: Stopped
    ratios: tuple[float, ...]
    rule: str
    settings: dict[str, float]
    _hints: tuple[str, ...] = field(default=(), repr=False)

    @property
    def slopes(self) -> Curve:
        """The change of the smoothed loss that each step made, per unit of the natural logarithm of the rate."""
        s = self.settings
        unit = math.log(s["high"] / s["low"]) / (s["steps"] - 1)
        return np.diff([self.first_loss, *self.smoothed]) / unit

    @property
    def suggestions(self) -> dict[str, float | None]:
        """Every rule of `RULES` and the rate that it suggests; None where it finds nothing on this curve."""
        return {name: rule(self) for name, rule in RULES.items()}

    @property
    def lr(self) -> float | None:
        """The rate that `rule` suggests; None if the loss never fell."""
        return RULES[self.rule](self)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What limits these suggestions; empty if all is as it should be."""
        s, found = self.settings, []
        i = _lowest(self)
        if i is None:
            found.append(f"The loss never fell below that of the first batch, {self.first_loss:.4g}: lower `low`.")
        elif i == len(self.smoothed) - 1 and self.stopped == "high":
            found.append(f"The loss still fell at the end, at {self.lrs[-1]:.3g}: raise `high`.")
        if 2 * (len(self.smoothed)) < s["steps"]:
            found.append(f"More than half of the range, above {self.lrs[-1]:.3g}, was not seen: lower `high`.")
        return (*found, *self._hints)

    def __str__(self) -> str:
        """A small table of the suggestions, and where and why it stopped."""
        width = max(map(len, RULES))
        lines = []
        for name, lr in self.suggestions.items():
            mark = "*" if name == self.rule else " "
            lines.append(f"{mark} {name:<{width}}  {'-' if lr is None else format(lr, '.3g'):>9}  {_summary(name)}")
        return "\n".join([*lines, self._ending(), *(f"- {line}" for line in self.remarks)])

    def _ending(self) -> str:
        why = {
            "high": "the end of the range",
            "diverged": f"the smoothed loss was more than {self.settings['stop_factor']:g} times its lowest",
            "nonfinite": f"the loss was {self.losses[-1]}",
        }
        return f"{len(self.lrs)} steps, stopped at {self.lrs[-1]:.3g}: {why[self.stopped]}."

    def sketch(self, *, width: int = 72, height: int = 10, dots: bool = True) -> str:
        """The smoothed curve as text, cut off half above the first loss.

        Args:
            width, height: in characters.
            dots: draw with braille; else with asterisks.
        """
        if not self.smoothed:
            return ""
        drawn = text(np.minimum(self.smoothed, self._ceiling), width=width, height=height, dots=dots)
        margin = drawn.index("|") + 2
        ends = f"{self.lrs[0]:.3g}", f"{self.lrs[len(self.smoothed) - 1]:.3g}"
        return f"{drawn}\n{'':{margin}}{ends[0]}{ends[1]:>{max(width - len(ends[0]), len(ends[1]) + 1)}}"

    @property
    def _ceiling(self) -> float:
        """What diverges is cut off here, for it would press all else to the floor."""
        low = min(self.smoothed)
        return self.first_loss + 0.5 * max(self.first_loss - low, abs(low), 1e-300)

    def plot(self) -> "go.Figure":
        """The curve and the suggestions as a Plotly figure. Needs the lab extra.

        Raises:
            ModuleNotFoundError: Plotly is missing.
        """
        go = _plotly()
        figure = go.Figure()
        finite = [x if math.isfinite(x) else None for x in self.losses]
        figure.add_scatter(x=self.lrs, y=finite, name="loss", mode="lines", line={"color": "#94a3b8", "width": 1})
        figure.add_scatter(x=self.lrs, y=self.smoothed, name="smoothed", mode="lines", line={"color": "#3b82f6"})
        for i, (name, lr) in enumerate(self.suggestions.items()):
            if lr is not None:
                y = float(np.interp(math.log(lr), np.log(self.lrs[: len(self.smoothed)]), self.smoothed))
                symbol = "star" if name == self.rule else "circle"
                figure.add_scatter(
                    x=[lr], y=[y], name=f"{name} {lr:.3g}", mode="markers",
                    marker={"color": web.colour(i), "size": 14 if name == self.rule else 9, "symbol": symbol},
                )  # fmt: skip
        figure.update_layout(
            title=self._ending(), xaxis_title="learning rate", yaxis_title="loss after the step",
            template="plotly_white", xaxis={"type": "log", "exponentformat": "power"},
        )  # fmt: skip
        if self.smoothed:
            low, high = min(self.smoothed), self._ceiling
            figure.update_yaxes(range=[low - 0.1 * (high - low), high])
        return figure

    def to_json(self) -> str:
        """All of it, with null for numbers that are not finite."""
        numbers = {name: list(getattr(self, name)) for name in ("lrs", "losses", "smoothed", "ratios")}
        numbers["losses"] = [x if math.isfinite(x) else None for x in self.losses]
        settings = {name: x if math.isfinite(x) else None for name, x in self.settings.items()}
        about = {"first_loss": self.first_loss, "stopped": self.stopped, "rule": self.rule, "settings": settings}
        return json.dumps({**about, "suggestions": self.suggestions, "remarks": self.remarks, **numbers})

    def to_csv(self) -> str:
        """The curve: lr, loss, smoothed. The first line is the loss before the first step, at the rate 0."""
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerows([("lr", "loss", "smoothed"), (0.0, self.first_loss, self.first_loss)])
        writer.writerows(
            (lr, loss, self.smoothed[i] if i < len(self.smoothed) else "")
            for i, (lr, loss) in enumerate(zip(self.lrs, self.losses, strict=True))
        )
        return written.getvalue()

    def to_html(self, title: str = TITLE) -> str:
        """A page that needs no network: the curve, the suggestions and what they are. Needs the lab extra.

        Args:
            title: of the page, as text.

        Raises:
            ModuleNotFoundError: Plotly is missing.
        """
        figure = self.plot()
        from schuss.lab.store import versions  # knows packages of the lab, of which Plotly is one

        figure.update_layout(**web.LAYOUT, title=None, showlegend=False, margin={"l": 56, "r": 14, "t": 10, "b": 48})
        figure.update_traces(marker_line_width=1.5, selector={"mode": "markers"})
        for axis in (figure.layout.xaxis, figure.layout.yaxis):
            axis.zeroline = False
        decades = math.log10(self.lrs[-1] / self.lrs[0]) if len(self.lrs) > 1 else 1.0
        figure.update_xaxes(web.log_ticks(decades))
        rows = "".join(
            f"<tr{' class=chosen' if name == self.rule else ''}><th scope=row>{web.named(i, name)}</th>"
            f"<td>{'-' if lr is None else format(lr, '.3g')}</td><td>{escape(_summary(name))}</td></tr>"
            for i, (name, lr) in enumerate(self.suggestions.items())
        )
        return web.filled(
            "schuss.lab",
            "find_lr.html",
            made_by="find-lr",
            title=escape(title),
            ending=escape(self._ending()),
            curve=figure.to_html(full_html=False, include_plotlyjs=True, config=dict(web.CONFIG), div_id="curve"),
            rows=rows,
            remarks="".join(f"<li>{escape(line)}</li>" for line in self.remarks),
            versions=escape(", ".join(f"{name} {version}" for name, version in versions().items())),
        )

    def save(self, path: str | os.PathLike[str], *, title: str = TITLE) -> Path:
        """Write it to a file: .json or .csv, numbers; .html, a page that needs no network; .png.

        Args:
            path: whose ending says what is written. A page needs the lab extra, .png also the package kaleido.
            title: of a page.

        Returns:
            The file.

        Raises:
            ValueError: another ending.
            ModuleNotFoundError: Plotly is missing.
        """
        path = Path(path)
        match path.suffix:
            case ".json":
                path.write_text(self.to_json(), encoding="utf-8")
            case ".csv":
                path.write_text(self.to_csv(), encoding="utf-8")
            case ".html":
                path.write_text(self.to_html(title), encoding="utf-8")
            case ".png":
                self.plot().write_image(path)
            case _:
                raise ValueError(f"save: path must end in {', '.join(SUFFIXES)}, got {path}")
        return path


# --- suggestions -----------------------------------------------------------------------------------------------------
# All of them go by the smoothed curve on the logarithm of the rate, so that neither the units of the loss nor the
# number of steps matter. A first tenth of the range is left out by those that look for a slope: an average of few
# batches is noisy.


def _lowest(found: RangeTest) -> int | None:
    """Where the smoothed loss is lowest; None if that is before the first step."""
    i = int(np.argmin(found.smoothed)) if found.smoothed else 0
    return i if found.smoothed and found.smoothed[i] < found.first_loss else None


def _first(found: RangeTest) -> int:
    return int(found.settings["steps"]) // 10


def steepest(found: RangeTest) -> float | None:
    """Where the loss falls fastest per log lr.

    The step before the lowest point that takes most off the smoothed loss. Smith 2015, arXiv:1506.01186, looked for
    it by eye; Howard's fast.ai made it a rule.
    """
    lowest, first = _lowest(found), _first(found)
    if lowest is None or lowest < first:
        return None
    slopes = found.slopes[first : lowest + 1]
    return found.lrs[first + int(np.argmin(slopes))] if slopes.min() < 0 else None


def minimum(found: RangeTest) -> float | None:
    """A tenth of where the loss is lowest.

    fast.ai's oldest rule, `minimum` of its `lr_find`: where the loss is lowest it is about to diverge.
    """
    lowest = _lowest(found)
    return None if lowest is None else found.lrs[lowest] / 10


def valley(found: RangeTest) -> float | None:
    """The middle of the longest fall.

    The longest sequence of points, not all need be neighbours, of which each is lower than the one before; the rate
    halfway between its ends. fast.ai's `valley`, its default.
    """
    first = _first(found)
    y = np.asarray(found.smoothed[first:])
    if _lowest(found) is None or len(y) < 2:
        return None
    length, before = np.ones(len(y), dtype=int), np.full(len(y), -1)
    for i in range(1, len(y)):
        candidates = np.where(y[:i] > y[i], length[:i], 0)
        best = int(np.argmax(candidates))
        if candidates[best]:
            length[i], before[i] = candidates[best] + 1, best
    end = begin = int(np.argmax(length))
    while before[begin] >= 0:
        begin = int(before[begin])
    return found.lrs[first + (begin + end) // 2] if end > begin else None


def slide(found: RangeTest) -> float | None:
    """The left end of a window that slides down from the right until its ends slope alike.

    fast.ai's `slide`: its window of 15 steps is 1.2 decades of its range; its threshold
    of 0.005 per step is 0.027 per unit of log lr. That is of losses about 1, so it is relative here, to the fall.
    """
    first, y = _first(found), np.asarray(found.smoothed)
    fall = found.first_loss - min(found.smoothed, default=math.inf)
    if fall <= 0 or len(y) < first + 3:
        return None
    logs = np.log(found.lrs[: len(y)])
    slopes = np.gradient(y, logs) / fall
    width = max(1, round(1.2 * math.log(10) / (logs[1] - logs[0])))
    right = len(y) - 1
    if right - width < first:
        return None
    while right - width > first and abs(slopes[right] - slopes[right - width]) > 0.027:
        right -= 1
    return found.lrs[int(right - width)]


def range_max(found: RangeTest) -> float | None:
    """Where the loss is lowest: the top of a cycle, not a rate to stay at.

    Smith 2015, arXiv:1506.01186, section 3.3: the upper bound of a cyclical schedule; a third or a quarter of it is
    the lower one.
    """
    lowest = _lowest(found)
    return None if lowest is None else found.lrs[lowest]


RULES: dict[str, Callable[[RangeTest], float | None]] = {
    rule.__name__: rule for rule in (minimum, steepest, valley, slide, range_max)
}
"""Suggestion rules by name."""


def _summary(name: str) -> str:
    """What a rule is, in a line."""
    return (RULES[name].__doc__ or "").split(". ")[0].partition("\n")[0].rstrip(".")


# --- the test itself -------------------------------------------------------------------------------------------------


def find_lr(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    loss: Callable[..., Tensor],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop_factor: float = 4.0,
    rule: str = "minimum",
    precision: Literal["float32", "bfloat16"] = "float32",
    device: torch.device | str | None = None,
) -> RangeTest:
    """The learning-rate range test: steps with a rate that rises from `low` to `high`, and the loss after each.

    .. math::
        \\gamma_i = a\\,(b/a)^{i/(N-1)}, \\qquad
        s_i = \\frac{\\sum_{j \\le i} \\beta^{i-j} f_j}{\\sum_{j \\le i} \\beta^{i-j}}

    with a and b the ends of the range, N the steps, f the losses and β the smoothing.

    All that the steps change is undone at the end, also if it raises or is interrupted: parameters, buffers, the
    optimizer with its state and hyperparameters, gradients, modes, the position of the loader and the random numbers
    of Python, NumPy, torch and CUDA. A training after it has the bits of one without it. While it runs it takes the
    memory of one more copy of model and optimizer.

    Groups keep the ratios of their rates: those that they have or, under a schedule, those that it begins with.
    Schedules stand still.

    Args:
        model: on its device. One in eval mode is put into train mode as a whole for the test.
        optimizer: any that needs no closure; better a new one than one in the middle of a training.
        loader: gives batches, and is begun anew when it ends; no iterator, whose batches would be gone.
        loss: as in `schuss.fit`: `loss(model, batch)` if its first parameter is called `model`, else
            `loss(model(x), y)` for batches (x, y).
        low, high: the range, 0 < low < high < inf.
        steps: in [10, inf); one batch more is used.
        smoothing: β, in [0, 1).
        stop_factor: stop when the smoothed loss is more than this times its lowest, in (1, inf]. A lowest that is not
            positive counts as the first loss, if that is further from 0.
        rule: which of the suggestions is `lr` of the result, one of `RULES`.
        precision: what the forward pass computes in, as in `schuss.fit`.
        device: where batches are moved to; by default that of the model's first parameter.

    Returns:
        The curve and what every rule makes of it. Print it.

    Raises:
        ValueError: an argument out of its bounds; a loader that is an iterator or gives no batch; a first loss that is
            not finite, or a loss that is no scalar.
        TypeError: an optimizer that needs a closure.
        RuntimeError: several processes of `torch.distributed`.

    Source: Smith 2015, arXiv:1506.01186, section 3.3.
    """
    for name, value, bound in (
        ("low", low, "(0, inf)"), ("high", high, "(0, inf)"), ("steps", steps, "[10, inf)"),
        ("smoothing", smoothing, "[0, 1)"), ("stop_factor", stop_factor, "(1, inf]"),
    ):  # fmt: skip
        bounds.check("find_lr", name, value, bound)
    if not isinstance(steps, int):
        raise TypeError(f"find_lr: steps must be an integer, got {steps!r}")
    if low >= high:
        raise ValueError(f"find_lr: low must be less than high, got {low:g} and {high:g}")
    if rule not in RULES:
        raise ValueError(f"find_lr: unknown rule {rule!r}: {bounds.nearest(rule, RULES)}")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"find_lr: precision must be float32 or bfloat16, got {precision!r}")
    _check_optimizer(optimizer, model)
    if isinstance(loader, Iterator):
        raise ValueError(
            f"find_lr: loader is an iterator ({type(loader).__name__}), whose batches would be gone after it; pass "
            f"what it is made of, or list(itertools.islice(it, {steps + 1}))"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError("find_lr: is for one process, since several would not stop at the same step")

    s = {"low": low, "high": high, "steps": steps, "smoothing": smoothing, "stop_factor": stop_factor}
    device = torch.device(device or next(model.parameters()).device)
    forward, average = Loss(loss, device, precision, owner="find_lr"), _Smooth(smoothing)
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    stopped: Stopped = "high"
    with restored(model, optimizer, loss, data=loader), torch.enable_grad():
        batches = _cycled(loader)
        try:
            ratios = _prepare(model, optimizer)
            output = _scalar(forward(model, next(batches)))
            first = output.item()
            if not math.isfinite(first):
                raise ValueError(
                    f"find_lr: the loss of the first batch is {first}, before any step; look for the cause"
                )
            best = average.add(first)
            for lr in ladder(low, high, steps):
                _step(optimizer, output, lr, ratios)
                output = _scalar(forward(model, next(batches)))
                value = output.item()
                lrs.append(lr)
                losses.append(value)
                if not math.isfinite(value):
                    stopped = "nonfinite"
                    break
                smoothed.append(average.add(value))
                best = min(best, smoothed[-1])
                if smoothed[-1] > best + (stop_factor - 1) * (best if best > 0 else max(-best, abs(first))):
                    stopped = "diverged"
                    break
        finally:
            batches.close()  # and with them the workers of a DataLoader
    return RangeTest(
        tuple(lrs), tuple(losses), tuple(smoothed), first, stopped, ratios, rule, s, tuple(_hints(optimizer))
    )


def ladder(low: float, high: float, steps: int) -> Iterator[float]:
    """Rates from `low` to `high`, both among them, each the same multiple of the one before."""
    ratio = high / low
    yield from (low * ratio ** (i / (steps - 1)) for i in range(steps - 1))
    yield high


def _check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"find_lr: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    owner = type(optimizer).__name__
    for one in _chain(optimizer):
        if isinstance(one, SAM):
            raise TypeError(
                f"find_lr: {owner} evaluates the loss twice in a step; pass the optimizer inside of it, "
                "find_lr(model, optimizer.inner, ...), which has the same groups"
            )
    if (several := _needs_closure(optimizer)) is not None:
        raise TypeError(
            f"find_lr: {type(several).__name__} needs a closure, for it evaluates the loss several times in a step, "
            "and a line search chooses how far it goes; its rate is 1, there is none to find"
        )
    known = {id(p) for p in model.parameters()}
    if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("find_lr: the optimizer has no parameter of the model; make it from model.parameters()")


def _prepare(model: nn.Module, optimizer: Optimizer) -> tuple[float, ...]:
    """Train mode, and schedules that stand still; the rate of each group as a multiple of the largest."""
    if not model.training:
        model.train()
    for one in with_modes(optimizer):
        one.train()
    for one in _chain(optimizer):
        hooks = one._optimizer_step_post_hooks
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Schedule)]:
            del hooks[key]
    # A warm-up may be at 0 now, so what a schedule multiplies says more.
    rates = [abs(bounds.number(group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]
    top = max(rates)
    return tuple(rate / top if top > 0 else 1.0 for rate in rates)


def _step(optimizer: Optimizer, loss: Tensor, lr: float, ratios: tuple[float, ...]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        if isinstance(group["lr"], Tensor):  # who has compiled or captured a step reads it there
            with torch.no_grad():
                group["lr"].fill_(lr * ratio)
        else:
            group["lr"] = lr * ratio
    optimizer.step()


def _cycled(loader: Iterable[Any]) -> Generator[Any, None, None]:
    while True:
        is_empty = True
        for batch in loader:
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError("find_lr: loader gave no batch")


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"find_lr: loss must return a tensor with one element, got {got}; take its mean")
    return loss


class _Smooth:
    """A bias-corrected exponential average."""

    def __init__(self, smoothing: float) -> None:
        self._smoothing, self._sum, self._weight = smoothing, 0.0, 0.0

    def add(self, value: float) -> float:
        self._sum = self._smoothing * self._sum + value
        self._weight = self._smoothing * self._weight + 1.0
        return self._sum / self._weight


def _hints(optimizer: Optimizer) -> Iterator[str]:
    """What a range test does not see of some optimizers."""
    for one in _chain(optimizer):
        name = type(one).__name__
        if with_modes(one) == [one]:
            yield f"{name} averages all its steps, those with small rates too, so that its best rate is higher."
        if name.startswith(("Prodigy", "DAdapt")):
            yield f"{name} finds its rate itself: leave lr at 1. What is varied here is a factor of that."


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'find_lr: a plot needs the lab extra: pip install "schuss[lab]"; save(path) writes .json and .csv without',
            name="plotly",
        ) from None
    return go
