"""The way of one optimizer over a surface, and the learning rate that suits it there."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from schuss import bounds
from schuss.lab.candidate import Candidate, candidates
from schuss.lab.landscape.surface import Box, Function, Point, Surface, find
from schuss.training.step import in_eval_mode, with_modes

Build = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer: `build(params, lr=..., **settings)`; a class, say."""

RATES = (*(float(f"{digit}e{power}") for power in range(-4, 1) for digit in (1, 2, 5)), 10.0)
"""What is tried when no learning rate is given, for every optimizer alike: 0.0001 to 10, three in a decade."""
WITHIN = 1e-3
"""How near to the lowest value counts as having reached it."""
FAR = 10.0
"""So many times as far from the middle of the box as its edge is: gone for good."""
BY_ITERATION: Mapping[str, Mapping[str, Any]] = {
    "LBFGS": {"max_iter": 1, "max_eval": 25, "line_search_fn": "strong_wolfe"}
}
"""A step of L-BFGS is twenty iterations unless one says otherwise, and there is nothing to see between them."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Where an optimizer was.

    Attributes:
        title: what it is called, without the learning rate.
        optimizer: its name.
        lr: the learning rate; None if it was left as it is.
        settings: other hyperparameters that were given.
        steps: after how many steps the points were taken; the first is 0.
        points: where the weights were that one would evaluate, one row for each of `steps`.
        losses: at these points.
        evaluations: of the loss with its gradient, up to there.
        diverged: whether it ended early, where nothing is finite any more or far outside of the box.
        tried: the learning rates that were tried to find `lr`, and the score of each; empty if it was given.
        in_plane: of the weights of a network: the part of the squared distances from the middle that lies in the plane.
    """

    title: str
    optimizer: str
    lr: float | None
    settings: Mapping[str, Any]
    steps: tuple[int, ...]
    points: tuple[Point, ...]
    losses: tuple[float, ...]
    evaluations: tuple[int, ...]
    diverged: bool = False
    tried: Mapping[float, float] = field(default_factory=dict)
    in_plane: float | None = None

    @property
    def label(self) -> str:
        """What it is called in a picture."""
        return self.title if self.lr is None else f"{self.title}, lr {self.lr:g}"

    def left(self, box: Box) -> int | None:
        """The step after which it never was in the box again; None if it ends inside."""
        x0, x1, y0, y1 = box
        inside = [x0 <= x <= x1 and y0 <= y <= y1 for x, y in self.points]
        if inside[-1]:
            return None
        return self.steps[max((i + 1 for i, is_in in enumerate(inside) if is_in), default=0)]

    def reached(self, lowest: float, within: float = WITHIN) -> int | None:
        """The step from which on the loss stays within so much of the lowest value; None if it does not."""
        above = [i for i, loss in enumerate(self.losses) if not loss - lowest <= within]
        first = above[-1] + 1 if above else 0
        return self.steps[first] if first < len(self.steps) else None

    def distance(self, minima: Sequence[Point]) -> float:
        """How far from the nearest minimum it ended."""
        x, y = self.points[-1]
        return min(math.hypot(x - a, y - b) for a, b in minima)


def trajectory(
    surface: str | Surface | Function,
    optimizer: str | Build = "SGD",
    *,
    lr: float | None = None,
    steps: int = 200,
    start: Point | None = None,
    seed: int = 0,
    title: str | None = None,
    **settings: Any,
) -> Trajectory:
    """Let an optimizer go downhill on a function of two variables.

    The two are one parameter of float64, and every step gets a closure. Of an optimizer that trains elsewhere than it
    evaluates, such as Schedule-Free's, the points are those it evaluates. It ends early if it diverges.

    Args:
        surface: one of `SURFACES` by name, a `Surface`, or a function of two tensors x and y.
        optimizer: `AdamW` is schuss's, `torch:AdamW` torch's; or what makes one, `build(params, lr=..., **settings)`.
        lr: its learning rate, in (0, inf); by default its own.
        steps: in [1, inf).
        start: where it begins; by default where the surface says.
        seed: of the batches, if the surface has some.
        title: what it is called in a picture, before the learning rate; by default its name and what was given.
        settings: other hyperparameters. L-BFGS makes one iteration in a step unless `max_iter` is given.

    Raises:
        ValueError: a number out of its bounds, an unknown name, or an optimizer that cannot take a step there.
    """
    place = find(surface)
    name, build, own = resolve(optimizer)
    begin = place.start if start is None else _point("start", start)
    check_numbers("trajectory", lr=lr, steps=steps)
    place = replace(place, start=begin)
    title = title or title_of(name, settings)
    return run(place, name, build, {**own, **settings}, lr=lr, steps=steps, seed=seed, title=title)


def search(
    surface: Surface,
    name: str,
    build: Build,
    settings: Mapping[str, Any],
    *,
    steps: int,
    seed: int = 0,
    rates: Sequence[float] = RATES,
) -> dict[float, float]:
    """The score of each learning rate: of complete runs, all as long as the one that is shown.

    The score is the mean over the steps of the logarithm, to base 10, of the loss above its lowest value, relative to
    the start, and not less than a millionth; the lower the better. So a rate is good that gets down soon and stays
    down, and beyond a millionth nothing more is to be won. It is infinite if the run diverges. One that leaves the box
    on its way is not to be seen: 100 is added to its score, which puts it behind all that stay inside.
    """
    scores: dict[float, float] = {}
    x0, x1, y0, y1 = surface.box
    ways = {rate: run(surface, name, build, settings, lr=rate, steps=steps, seed=seed) for rate in rates}
    lowest = surface.lowest
    if lowest is None:
        lowest = min((loss for way in ways.values() for loss in way.losses if math.isfinite(loss)), default=0.0)
    for rate, way in ways.items():
        if way.diverged:
            scores[rate] = math.inf
            continue
        gaps = np.asarray(way.losses) - lowest
        is_inside = all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in way.points)
        score = float(np.log10(np.maximum(gaps / gaps[0], 1e-6)).mean()) if gaps[0] > 0 else 0.0
        scores[rate] = score if is_inside else score + 100
    return scores


def best_of(scores: Mapping[float, float]) -> float:
    """The rate with the lowest score, the smallest of those that are alike."""
    return min(sorted(scores), key=lambda rate: scores[rate])


def resolve(optimizer: str | Build) -> tuple[str, Build, Mapping[str, Any]]:
    """Name, class or function, and the settings it needs to be looked at step by step.

    Of names the settings are the defaults of the class: SGD is plain gradient descent.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(optimizer, str):
        [entrant] = candidates([optimizer], RATES)  # so that no default rate is needed
        return entrant.name, entrant.build, _by_iteration(entrant)
    return getattr(optimizer, "__name__", type(optimizer).__name__).replace("<lambda>", "optimizer"), optimizer, {}


def _by_iteration(entrant: Candidate) -> Mapping[str, Any]:
    return BY_ITERATION.get(entrant.name.removeprefix("torch:"), {})


def made(
    name: str,
    build: Build,
    params: Sequence[Tensor],
    lr: float | None,
    settings: Mapping[str, Any],
    model: nn.Module | None = None,
) -> Any:
    """The optimizer, or a ValueError that says why there is none.

    One that is built from a model, `build(model, lr=...)`, is built from `model`.
    """
    refuse_matrix_rules(name, build, params)
    rate = {} if lr is None else {"lr": lr}
    try:
        takes_model = next(iter(inspect.signature(build).parameters), None) == "model"
    except (TypeError, ValueError):  # written in C
        takes_model = False
    if takes_model and model is None:
        raise ValueError(f"{name} is built from a model, and here is none; give one that is built from parameters")
    try:
        optimizer = build(model if takes_model else params, **rate, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be made for this landscape: {error}") from error
    if not callable(getattr(optimizer, "step", None)):
        raise ValueError(f"{name} must make an optimizer, got {type(optimizer).__name__}")
    for one in with_modes(optimizer):
        one.train()
    return optimizer


def refuse_matrix_rules(name: str, build: Build, params: Sequence[Tensor]) -> None:
    """Raise if a class says that it takes no parameters such as these."""
    takes = getattr(build, "takes", None)
    if not inspect.isclass(build) or takes is None:
        return
    refused = [p for p in params if not takes(p)]
    if refused:
        raise ValueError(
            f"{name} takes parameters of {getattr(build, 'dimensions', 'other')} dimensions, such as matrices, and "
            f"here one has {refused[0].dim()}. Take an optimizer of any parameters, such as AdamW"
            + (
                "; it can be seen on a network, in schuss.Combined"
                if len(params) == 1
                else ", or schuss.Combined of both"
            )
        )


def run(
    surface: Surface,
    name: str,
    build: Build,
    settings: Mapping[str, Any],
    *,
    lr: float | None,
    steps: int,
    seed: int,
    title: str = "",
) -> Trajectory:
    """The way of an optimizer from the start of a surface."""
    start = surface.start
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        p = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        optimizer = made(name, build, [p], lr, settings)
        noisy = None if surface.batches is None else surface.batches(seed)
        averages = bool(with_modes(optimizer))
        points, evaluations, count, diverged = [start], [0], 0, False
        x0, x1, y0, y1 = surface.box
        middle = (x0 + x1) / 2, (y0 + y1) / 2
        reach = FAR * (x1 - x0) / 2, FAR * (y1 - y0) / 2
        for i in range(steps):
            function = surface.function if noisy is None else next(noisy)

            def closure(function: Function = function) -> Tensor:
                nonlocal count
                count += 1
                p.grad = None
                loss = function(*p.unbind())
                loss.backward()
                return loss

            try:
                optimizer.step(closure)
            except (TypeError, RuntimeError) as error:
                if i:
                    raise
                raise ValueError(f"{name} cannot step on a function of two variables: {error}") from error
            with in_eval_mode(optimizer) if averages else nullcontext():
                x, y = p.tolist()
            points.append((x, y))
            evaluations.append(count)
            if not (abs(x - middle[0]) <= reach[0] and abs(y - middle[1]) <= reach[1]):  # nor if they are NaN
                diverged = True
                break
    losses = surface.values(*np.array(points).T)
    if not np.isfinite(losses).all():
        last = int(np.argmin(np.isfinite(losses)))
        points, losses, evaluations, diverged = points[: last + 1], losses[: last + 1], evaluations[: last + 1], True
    return Trajectory(
        title or name,
        name,
        lr,
        settings,
        tuple(range(len(points))),
        tuple(points),
        tuple(losses.tolist()),
        tuple(evaluations),
        diverged,
    )


def title_of(name: str, settings: Mapping[str, Any]) -> str:
    """A name with what was set, as in "SGD, momentum 0.9, nesterov"."""
    return ", ".join([name, *(_told(key, value) for key, value in settings.items())])


def _told(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


def check_numbers(owner: str, *, lr: float | None, steps: int) -> None:
    """Raise if a learning rate or a number of steps is out of its bounds."""
    bounds.check(owner, "steps", steps, "[1, inf)")
    if not isinstance(steps, int):
        raise TypeError(f"{owner}: steps must be an integer, got {steps!r}")
    if lr is not None:
        bounds.check(owner, "lr", lr, "(0, inf)")


def _point(name: str, value: Sequence[float]) -> Point:
    if len(value) != 2 or not all(map(math.isfinite, value)):
        raise ValueError(f"{name} must be two finite numbers, got {value}")
    return float(value[0]), float(value[1])
