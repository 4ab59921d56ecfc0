"""Several optimizers, or one with a hyperparameter varied, over one loss."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from schuss.bounds import nearest
from schuss.lab import workloads
from schuss.lab.candidate import candidates
from schuss.lab.check import check
from schuss.lab.landscape import network
from schuss.lab.landscape.result import Landscape
from schuss.lab.landscape.surface import SURFACES, Box, Function, Point, Surface, find
from schuss.lab.landscape.trajectory import (
    BY_ITERATION,
    RATES,
    Build,
    Trajectory,
    best_of,
    check_numbers,
    resolve,
    run,
    search,
    title_of,
)
from schuss.lab.workload import Workload
from schuss.lookup import named

OPTIMIZERS = ("SGD", "RMSprop", "Adam", "Lion", "LBFGS")
"""Compared on a function unless one says otherwise."""
OF_NETWORKS = ("SGD", "AdamW", "Lion")
"""And on a network."""
RATES_OF_NETWORKS = (0.001, 0.01, 0.1)
"""For what has no learning rates in `schuss.lab.candidate`."""


@dataclass(frozen=True)
class Entrant:
    """One trajectory to be: its name, what makes the optimizer, and what it is made with."""

    name: str
    title: str
    build: Build
    settings: Mapping[str, Any]
    lr: float | None
    rates: tuple[float, ...]
    group: str
    """Those of one group share the learning rate that is found for the first of them."""


def landscape(
    surface: str | Surface | Function | Workload,
    optimizers: Sequence[str] | Mapping[str, str | Build] | str | None = None,
    *,
    lr: float | Mapping[str, float] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    steps: int = 200,
    start: Point | None = None,
    box: Box | None = None,
    minima: Sequence[Point] | None = None,
    condition: float | None = None,
    seed: int = 0,
    size: int | None = None,
) -> Landscape:
    """Contours of a loss with the trajectories of optimizers from one start.

    A learning rate that is not given is looked for: everyone gets the same rates, 0.0001 to 10 on a function, and as
    many steps with each as are shown. Of a network it is the best of three; the ways of its weights are projected on
    the plane of their two largest principal components, all trajectories on the same one.

    Args:
        surface: a function by name: rosenbrock, beale, himmelblau, rastrigin, quadratic, linear; a `Surface`; a
            function of two tensors x and y; or a `Workload`, or the name of one. `module:function` is a function or a
            workload, by whether it takes two arguments or one.
        optimizers: names, `AdamW` of schuss or `torch:AdamW`; or a dict from labels to names or to what makes an
            optimizer, `build(params, lr=...)`. By default SGD, RMSprop, Adam, Lion and LBFGS; of a workload SGD, AdamW
            and Lion.
        lr: in (0, inf), of all, or of some by name; the others' are looked for.
        vary: one hyperparameter with its values, {"momentum": [0.0, 0.9]}, for one optimizer. The learning rate, if it
            is neither varied nor given, is looked for with the first value and is that of all.
        settings: hyperparameters for all of them.
        steps: of each, in [1, inf).
        start: where they begin; by default where the surface says.
        box: what is shown: from and to of x, from and to of y.
        minima: of a function of one's own, where it is lowest; by default they are looked for.
        condition: of the quadratic, in [1, inf).
        seed: of batches, and of a network's first weights.
        size: points of the grid along each axis; by default 301, and of a network 31.

    Returns:
        Contours, trajectories and table. Print it, `save` it, or `plot` it.

    Raises:
        ValueError: an unknown name, a number out of its bounds, an argument that this surface has no use for, or an
            optimizer that cannot step there.

    Source: of the plane, Li, Xu, Taylor, Studer, Goldstein 2018, arXiv:1712.09913, section 7.
    """
    check_numbers("landscape", lr=lr if isinstance(lr, float | int) else None, steps=steps)
    for name, rate in lr.items() if isinstance(lr, Mapping) else ():
        check_numbers(f"landscape: {name}", lr=rate, steps=steps)
    if size is not None and size < 3:
        raise ValueError(f"landscape: size must be in [3, inf), got {size}")
    if isinstance(surface, str):
        surface = look_up(surface)
    is_network = isinstance(surface, Workload)
    entrants = _entrants(optimizers, lr, vary, settings or {}, is_network)
    if isinstance(surface, Workload):
        _refuse(surface.name, "is a network", start=start, box=box, minima=minima, condition=condition)
        return _of_network(surface, entrants, steps, seed, size or 31)
    place = _place(surface, start, box, minima, condition)
    return _of_function(place, entrants, steps, seed, size or 301)


def look_up(name: str) -> str | Function | Workload:
    """The name of a function, a function of x and y, or a workload.

    Raises:
        ValueError: there is none that is called so.
    """
    if name in SURFACES:
        return name
    if ":" not in name:
        if name not in workloads.WORKLOADS:
            known = [*SURFACES, *workloads.WORKLOADS, "module:function"]
            raise ValueError(f"unknown landscape {name!r}: {nearest(name, known)}")
        return workloads.WORKLOADS[name]
    function = named(name)
    if not callable(function):
        raise ValueError(f"{name} must be a function of x and y, or of a seed, got {type(function).__name__}")
    wanted = [
        p for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    return function if len(wanted) == 2 else workloads.find(name)


def _place(
    surface: str | Surface | Function,
    start: Point | None,
    box: Box | None,
    minima: Sequence[Point] | None,
    condition: float | None,
) -> Surface:
    is_own = not isinstance(surface, str | Surface)
    given: dict[str, Any] = {}
    if surface == "quadratic":
        given = {} if condition is None else {"condition": condition}
    else:
        _refuse(surface if isinstance(surface, str) else "it", "is not the quadratic", condition=condition)
    if is_own:
        given |= {} if box is None else {"box": box}
        given |= {} if start is None else {"start": start}
        given |= {} if minima is None else {"minima": tuple(minima)}
        return find(surface, **given)
    place = find(surface, **given)
    _refuse(place.name, "has known minima", minima=minima)
    return replace(place, box=box or place.box, start=start or place.start)


def _refuse(name: str, why: str, **given: Any) -> None:
    for key, value in given.items():
        if value is not None:
            raise ValueError(f"landscape: {name} {why}, so {key} is not for it; leave it out")


def _entrants(
    optimizers: Sequence[str] | Mapping[str, str | Build] | str | None,
    lr: float | Mapping[str, float] | None,
    vary: Mapping[str, Sequence[Any]] | None,
    settings: Mapping[str, Any],
    is_network: bool,
) -> list[Entrant]:
    if optimizers is None:
        optimizers = OF_NETWORKS if is_network else OPTIMIZERS
        optimizers = optimizers if vary is None else ("AdamW",)
    if isinstance(optimizers, str):
        optimizers = [optimizers]
    asked = dict(optimizers) if isinstance(optimizers, Mapping) else {name: name for name in optimizers}
    if not asked:
        raise ValueError("at least one optimizer is needed")
    if isinstance(lr, Mapping) and (unknown := [*lr.keys() - asked.keys()]):
        raise ValueError(f"landscape: lr is given for {unknown[0]}, which is not among {', '.join(asked)}")
    entrants = []
    for title, optimizer in asked.items():
        rate = lr.get(title) if isinstance(lr, Mapping) else lr
        needs_rates = rate is None and "lr" not in (vary or {})
        name, build, own = resolve(optimizer)
        rates: tuple[float, ...] = RATES_OF_NETWORKS if is_network else RATES
        if is_network and isinstance(optimizer, str):
            [candidate] = candidates([optimizer], None if needs_rates else RATES)
            own, rates = {**candidate.arguments, **own}, candidate.lrs
        told = {**own, **settings}
        shown = {key: value for key, value in told.items() if BY_ITERATION.get("LBFGS", {}).get(key) != value}
        entrants.append(Entrant(name, title_of(title, shown), build, told, rate, rates, title))
    return entrants if vary is None else _varied(entrants, vary)


def _varied(entrants: Sequence[Entrant], vary: Mapping[str, Sequence[Any]]) -> list[Entrant]:
    if len(entrants) != 1 or len(vary) != 1:
        raise ValueError(
            f"landscape: one hyperparameter of one optimizer is varied, got {len(vary)} of {len(entrants)}: "
            f"{', '.join(vary)} of {', '.join(entrant.title for entrant in entrants)}"
        )
    [one], [(key, values)] = entrants, vary.items()
    if not values:
        raise ValueError(f"landscape: vary needs at least one value of {key}")
    found = []
    for value in values:
        if key == "lr":
            check_numbers("landscape", lr=value, steps=1)
            found.append(replace(one, lr=value))
        else:
            found.append(replace(one, title=title_of(one.title, {key: value}), settings={**one.settings, key: value}))
    return found


def _of_function(place: Surface, entrants: Sequence[Entrant], steps: int, seed: int, size: int) -> Landscape:
    runs: list[Trajectory] = []
    tried: dict[str, dict[float, float]] = {}
    for one in entrants:
        lr = one.lr
        if lr is None:
            if one.group not in tried:
                tried[one.group] = search(
                    place, one.name, one.build, one.settings, steps=steps, seed=seed, rates=one.rates
                )
            lr = best_of(tried[one.group])
        way = run(place, one.name, one.build, one.settings, lr=lr, steps=steps, seed=seed, title=one.title)
        runs.append(way if one.lr is not None else replace(way, tried=tried[one.group]))
    x, y, z = place.grid(size)
    return Landscape(
        place.name, place.formula, place.axes, place.box, x, y, z, tuple(runs), place.minima, place.lowest,
        source=place.source, noisy=place.batches is not None, steps=steps, seed=seed,
    )  # fmt: skip


def _of_network(workload: Workload, entrants: Sequence[Entrant], steps: int, seed: int, size: int) -> Landscape:
    check(workload, seed=seed, seconds=0)
    probe = network.Probe(workload, seed)

    def follow(one: Entrant, lr: float) -> network.Path:
        return network.follow(
            workload, one.name, one.build, lr=lr, settings=one.settings, steps=steps, seed=seed, probe=probe
        )

    chosen: dict[str, float] = {}
    tried: dict[str, dict[float, float]] = {}
    found: list[tuple[Entrant, float, network.Path]] = []
    for one in entrants:
        if one.lr is not None:
            found.append((one, one.lr, follow(one, one.lr)))
        elif one.group in chosen:
            found.append((one, chosen[one.group], follow(one, chosen[one.group])))
        else:
            best: network.Path | None = None
            scores: dict[float, float] = {}
            for rate in one.rates:
                path = follow(one, rate)
                scores[rate] = path.score
                if best is None or path.score < best.score:
                    best, chosen[one.group] = path, rate
            assert best is not None
            tried[one.group] = scores
            found.append((one, chosen[one.group], best))
    plane = network.Plane.of([path.weights for _, _, path in found])
    projected = [plane.project(path.weights) for _, _, path in found]
    box = network.box_of(np.concatenate(projected))
    x, y, z = network.grid_on(plane, probe, box, size)
    runs = tuple(
        Trajectory(
            one.title, one.name, lr, one.settings, path.steps, tuple((float(a), float(b)) for a, b in points),
            path.losses, path.evaluations, path.diverged, tried.get(one.group, {}) if one.lr is None else {},
            plane.share(path.weights),
        )
        for (one, lr, path), points in zip(found, projected, strict=True)
    )  # fmt: skip
    return Landscape(
        workload.name, workload.description, ("first principal component", "second principal component"), box, x, y, z,
        runs, explained=plane.explained, noisy=True, steps=steps, seed=seed,
    )  # fmt: skip
