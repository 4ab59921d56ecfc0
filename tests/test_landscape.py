"""Landscapes: functions, minima, closed forms of trajectories, planes of networks, numbers, pictures and the page."""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from browser import look, need_chromium
from schuss import optim
from schuss.cli import app, main
from schuss.lab.landscape import SURFACES, Landscape, Plane, Surface, landscape, network, page, trajectory
from schuss.lab.landscape.compare import look_up
from schuss.lab.landscape.surface import own
from schuss.lab.landscape.trajectory import RATES, best_of, resolve, run, search
from schuss.lab.workload import Task, Workload
from schuss.wrappers import SAM, Combined, Lookahead

every_surface = pytest.mark.parametrize("name", SURFACES)

# Value at the start and minima with six decimals, as they are published or, of the last two, as they follow.
PUBLISHED: dict[str, tuple[float, list[tuple[float, float]]]] = {
    "rosenbrock": (24.2, [(1, 1)]),
    "beale": (14.203125, [(3, 0.5)]),
    "himmelblau": (180.0, [(3, 2), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126)]),
    "rastrigin": (36.25, [(0, 0)]),
    "quadratic": (0.5 * (4.5**2 + 50), [(0, 0)]),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Test processes side by side already use every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- functions --------------------------------------------------------------------------------------------------------


@every_surface
def test_minima_are_minima(name: str) -> None:
    """No gradient, curved upwards in all directions, and nothing lower on a grid of the box."""
    surface = SURFACES[name]()
    assert surface.lowest is not None
    _, _, z = surface.grid(101)
    assert z.min() >= surface.lowest - 1e-12
    for point in surface.minima:
        assert np.abs(surface.gradient(point)).max() < 1e-10
        hessian = torch.autograd.functional.hessian(lambda p: surface.function(*p), torch.tensor(point).double())
        assert torch.linalg.eigvalsh(hessian).min() > 1e-3
        assert surface.at(point) == pytest.approx(surface.lowest, abs=1e-20)
    x0, x1, y0, y1 = surface.box
    for x, y in [surface.start, *surface.minima]:
        assert x0 < x < x1
        assert y0 < y < y1


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name: str) -> None:
    start, minima = PUBLISHED[name]
    surface = SURFACES[name]()
    assert surface.at(surface.start) == pytest.approx(start, rel=1e-12)
    assert surface.lowest == pytest.approx(0.0, abs=1e-20)
    assert np.array(surface.minima) == pytest.approx(np.array(minima), abs=1e-6)


def test_the_hill_of_himmelblau() -> None:
    """Its local maximum, as it is published."""
    surface = SURFACES["himmelblau"]()
    assert surface.at((-0.270845, -0.923039)) == pytest.approx(181.617, abs=1e-3)
    assert np.abs(surface.gradient((-0.270845, -0.923039))).max() < 1e-4


def test_linear_regression_is_least_squares() -> None:
    """Mini-batches are ten different points each, whose mean loss is the loss; and the minimum is that of an oracle."""
    surface = SURFACES["linear"]()
    random = np.random.RandomState(0)
    x = random.uniform(-1, 3, 100)
    t = 2 * x + 1 + random.normal(0, 0.5, 100)
    assert surface.minima[0] == pytest.approx(tuple(np.polyfit(x, t, 1)), rel=1e-10)
    assert surface.at((0.5, 0.25)) == pytest.approx(((0.5 * x + 0.25 - t) ** 2).mean(), rel=1e-12)
    assert surface.batches is not None
    batches = surface.batches(0)
    w, b = torch.tensor(0.5).double(), torch.tensor(0.25).double()
    values = [float(next(batches)(w, b)) for _ in range(20)]
    for epoch in (values[:10], values[10:]):
        assert np.mean(epoch) == pytest.approx(surface.at((0.5, 0.25)), rel=1e-12)
    assert values[:10] != values[10:]
    again = surface.batches(0)
    assert [float(next(again)(w, b)) for _ in range(20)] == values


def test_the_grid_has_the_function_values() -> None:
    x, y, z = SURFACES["beale"]().grid(7)
    a, b = x[5], y[2]
    assert z[2, 5] == pytest.approx(
        (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2, rel=1e-12
    )


@pytest.mark.parametrize("elementwise", [True, False])
def test_minima_of_a_function_of_ones_own_are_found(elementwise: bool) -> None:
    """The deepest two of three wells, also if it only knows single points."""

    def wells(x: Tensor, y: Tensor) -> Tensor:
        if not elementwise and x.dim() > 0:
            raise RuntimeError("one at a time")
        return -sum(
            d * torch.exp(-((x - a) ** 2) - (y - b) ** 2) for a, b, d in ((-2, 1, 2.0), (2, 1, 2.0), (0, -2, 1))
        )

    found = own(wells, box=(-4, 4, -4, 4))
    assert (found.name, found.start) == ("wells", (-3.2, 3.2))
    assert np.array(sorted(found.minima)) == pytest.approx(np.array([(-2, 1), (2, 1)]), abs=2e-3)
    for point in found.minima:
        assert np.abs(found.gradient(point)).max() < 1e-6


# --- trajectories -----------------------------------------------------------------------------------------------------


def test_sgd_on_the_quadratic_is_the_closed_form() -> None:
    way = trajectory(SURFACES["quadratic"](condition=20.0), "SGD", lr=0.09, steps=40)
    factors = np.array([1 - 0.09, 1 - 0.09 * 20]) ** np.arange(41)[:, None]
    assert np.array(way.points) == pytest.approx(np.array([-4.5, 1.0]) * factors, rel=1e-12)
    x, y = np.array(way.points).T
    assert way.losses == pytest.approx(0.5 * (x**2 + 20 * y**2), rel=1e-12)
    assert way.steps == way.evaluations == tuple(range(41))
    assert (way.label, way.diverged) == ("SGD, lr 0.09", False)


def test_momentum_on_the_quadratic_is_its_recurrence() -> None:
    way = trajectory("quadratic", "torch:SGD", lr=0.01, steps=30, momentum=0.9)
    p, m = np.array([-4.5, 1.0]), np.zeros(2)
    for point in way.points[1:]:
        m = 0.9 * m + np.array([1, 50]) * p
        p = p - 0.01 * m
        assert point == pytest.approx(p, rel=1e-10)
    assert way.label == "torch:SGD, momentum 0.9, lr 0.01"


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "LBFGS", "NAdam"])
@pytest.mark.parametrize("surface", ["rosenbrock", "linear"])
def test_schuss_and_torch_go_the_same_way(name: str, surface: str) -> None:
    ours, theirs = (trajectory(surface, prefix + name, lr=0.02, steps=50) for prefix in ("", "torch:"))
    assert np.array(ours.points) == pytest.approx(np.array(theirs.points), rel=1e-8, abs=1e-10)
    assert ours.evaluations == theirs.evaluations


def test_divergence_is_shown_until_it_leaves() -> None:
    """Beyond 2/κ; the point outside is the last that is kept, and it is said."""
    way = trajectory("quadratic", "SGD", lr=0.06, steps=100)
    assert way.diverged
    assert [y for _, y in way.points] == pytest.approx([(-2.0) ** i for i in range(6)])
    outside = [abs(y) > 3 for _, y in way.points]
    assert way.left(SURFACES["quadratic"]().box) == outside.index(True) == 2
    assert [abs(y) > 30 for _, y in way.points] == [False] * (len(way.points) - 1) + [True]
    seen = landscape("quadratic", "SGD", lr=0.06, size=5)
    assert seen.table()[0] == ("SGD", "0.06", "-", "5", "diverged", "-")
    assert "SGD, lr 0.06 diverged: it left the box at step 2 and was stopped at step 5." in seen.remarks()


def test_what_is_not_finite_ends_a_trajectory() -> None:
    way = trajectory(own(lambda x, y: x**2 - torch.log(y), start=(1.0, 1.0), minima=()), "SGD", lr=1e200, steps=9)
    assert way.diverged
    assert len(way.points) == len(way.losses) == len(way.steps) == 2
    cliff = own(lambda x, y: (x + y).sqrt(), start=(1.0, 1.0), minima=())
    way = trajectory(cliff, "SGD", lr=10.0, steps=9)
    assert way.diverged
    assert math.isnan(way.losses[-1])
    assert json.loads(replace_trajectories(landscape("quadratic", "SGD", lr=0.1, size=5), way).to_json())


def replace_trajectories(seen: Landscape, *ways: Any) -> Landscape:
    return replace(seen, trajectories=ways)


def test_an_optimizer_that_averages_is_seen_where_it_is_evaluated() -> None:
    way = trajectory("quadratic", "ScheduleFreeSGD", lr=0.01, steps=20)
    p = nn.Parameter(torch.tensor([-4.5, 1.0], dtype=torch.float64))
    optimizer = optim.ScheduleFreeSGD([p], lr=0.01)
    for point in way.points[1:]:
        optimizer.zero_grad()
        SURFACES["quadratic"]().function(*p.unbind()).backward()
        optimizer.step()
        optimizer.eval()
        assert point == pytest.approx(p.tolist(), rel=1e-12)
        optimizer.train()


def test_wrappers_and_functions() -> None:
    """Lookahead with its k of 1 and α of 1 is its inner optimizer; SAM takes two gradients in a step."""
    plain = trajectory("rosenbrock", "Adam", lr=0.05, steps=30)
    seen = landscape(
        "rosenbrock",
        {
            "Lookahead": lambda params, lr: Lookahead(optim.Adam(params, lr=lr), k=1, alpha=1.0),
            "SAM": lambda params, lr: SAM(optim.Adam(params, lr=lr), rho=0.01),
            "torch": torch.optim.Adam,
        },
        lr=0.05,
        steps=30,
        size=5,
    )
    ahead, sam, theirs = seen.trajectories
    assert np.array(ahead.points) == pytest.approx(np.array(plain.points), rel=1e-10)
    assert np.array(theirs.points) == pytest.approx(np.array(plain.points), rel=1e-8)
    assert sam.evaluations == tuple(range(0, 62, 2))
    assert [way.title for way in seen.trajectories] == ["Lookahead", "SAM", "torch"]


def test_reached_is_where_it_stays() -> None:
    way = replace(trajectory("quadratic", "SGD", lr=0.01, steps=5), losses=(5.0, 1e-4, 2.0, 1e-3, 0.0, 1e-4))
    assert way.reached(0.0) == 3
    assert way.reached(0.0, within=1e-9) is None
    assert way.distance([(100.0, 0.0), way.points[-1]]) == 0


# --- the search for a rate --------------------------------------------------------------------------------------------


def test_rates_are_three_in_a_decade() -> None:
    assert len(RATES) == 16
    assert (RATES[0], RATES[-1]) == (1e-4, 10.0)
    assert list(RATES[:4]) == [1e-4, 2e-4, 5e-4, 1e-3]


def test_the_score_is_the_mean_logarithm() -> None:
    """Of gradient descent in closed form; infinite beyond the limit; and the best rate is the one just below it."""
    surface = SURFACES["quadratic"](condition=10.0)
    name, build, own_settings = resolve("SGD")
    scores = search(surface, name, build, own_settings, steps=30)
    t = np.arange(31)
    for rate, score in scores.items():
        if rate > 0.2:
            assert score == math.inf
            continue
        gaps = 0.5 * ((4.5 * (1 - rate) ** t) ** 2 + 10 * (1 - 10 * rate) ** (2 * t))
        assert score == pytest.approx(np.log10(np.maximum(gaps / gaps[0], 1e-6)).mean(), rel=1e-6), rate
    assert best_of(scores) == 0.1
    assert best_of({0.1: 1.0, 0.01: 1.0, 1.0: 2.0}) == 0.01


def test_a_way_out_of_the_box_is_the_last_choice() -> None:
    """Momentum overshoots the upper edge although it comes back."""
    surface = replace(SURFACES["quadratic"](condition=10.0), box=(-5.0, 5.0, -0.5, 1.5))
    name, build, _ = resolve("SGD")
    scores = search(surface, name, build, {"momentum": 0.9}, steps=60)
    for rate, score in scores.items():
        way = run(surface, name, build, {"momentum": 0.9}, lr=rate, steps=60, seed=0)
        is_outside = any(not -0.5 <= y <= 1.5 or not -5 <= x <= 5 for x, y in way.points)
        assert is_outside == (score > 50), rate
    assert 0 < sum(50 < score < math.inf for score in scores.values()) < len(scores)


def test_everyone_gets_the_same_search_and_a_given_rate_none() -> None:
    seen = landscape("quadratic", ["SGD", "Adam", "LBFGS"], lr={"SGD": 0.01}, steps=20, size=5)
    sgd, adam, lbfgs = seen.trajectories
    assert (sgd.lr, sgd.tried) == (0.01, {})
    assert tuple(adam.tried) == tuple(lbfgs.tried) == RATES
    assert adam.lr == min(adam.tried, key=adam.tried.__getitem__)
    assert (
        "Learning rates: the best of the same 16 for everyone, 0.0001 to 10, each with as many steps as are shown."
        in (seen.remarks())
    )
    assert adam.settings == {}
    assert lbfgs.settings == {"max_iter": 1, "max_eval": 25, "line_search_fn": "strong_wolfe"}
    assert lbfgs.label == f"LBFGS, lr {lbfgs.lr:g}"


def test_one_hyperparameter_is_varied() -> None:
    seen = landscape("beale", "AdamW", vary={"lr": [0.01, 0.1]}, steps=10, size=5)
    assert [way.label for way in seen.trajectories] == ["AdamW, lr 0.01", "AdamW, lr 0.1"]
    assert not any(way.tried for way in seen.trajectories)
    seen = landscape("quadratic", "SGD", vary={"momentum": [0.0, 0.5, 0.9]}, steps=15, size=5)
    assert [way.title for way in seen.trajectories] == ["SGD, momentum 0", "SGD, momentum 0.5", "SGD, momentum 0.9"]
    [lr] = {way.lr for way in seen.trajectories}
    alone = landscape("quadratic", "SGD", steps=15, size=5).trajectories[0]
    assert lr == alone.lr  # that of the first value
    assert seen.trajectories[0].points == alone.points


# --- networks ---------------------------------------------------------------------------------------------------------


def test_the_plane_of_a_way_in_two_dimensions_holds_all_of_it() -> None:
    """Distances and values are reproduced, and so are the weights."""
    random = np.random.RandomState(0)
    basis, _ = np.linalg.qr(random.normal(size=(500, 2)))
    inside = random.normal(size=(40, 2)) * [3, 1]
    weights = (inside @ basis.T + random.normal(size=500)).astype(np.float64)
    plane = Plane.of([weights[:25], weights[25:]])
    points = plane.project(weights)
    assert sum(plane.explained) == pytest.approx(1.0, abs=1e-12)
    assert plane.axes @ plane.axes.T == pytest.approx(np.eye(2), abs=1e-12)
    for point, row in zip(points, weights, strict=True):
        assert plane.at(*point) == pytest.approx(row, abs=1e-10)
    assert plane.share(weights) == pytest.approx(1.0)
    assert (points[0] <= 0).all()


def test_the_plane_is_that_of_principal_components() -> None:
    """An SVD of all rows together."""
    weights = np.random.RandomState(1).normal(size=(30, 80)) * np.linspace(3, 0.1, 80)
    plane = Plane.of([weights[:10], weights[10:]])
    centred = weights - weights.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    assert plane.origin == pytest.approx(weights.mean(axis=0))
    assert np.abs(np.diag(plane.axes @ directions[:2].T)) == pytest.approx(np.ones(2), abs=1e-9)
    assert plane.explained == pytest.approx(tuple(values[:2] ** 2 / (values**2).sum()))
    away = centred[:10]
    assert plane.share(weights[:10]) == pytest.approx(((away @ directions[:2].T) ** 2).sum() / (away**2).sum())


def test_a_way_on_a_line_has_a_plane_too() -> None:
    direction = np.zeros(6)
    direction[2] = 1.0
    weights = np.outer(np.arange(5.0), direction)
    plane = Plane.of([weights])
    assert plane.explained == pytest.approx((1.0, 0.0), abs=1e-12)
    assert plane.axes @ plane.axes.T == pytest.approx(np.eye(2), abs=1e-12)
    assert plane.project(weights)[:, 1] == pytest.approx(np.zeros(5), abs=1e-12)
    with pytest.raises(ValueError, match="no optimizer has moved a weight"):
        Plane.of([np.ones((3, 6))])
    with pytest.raises(ValueError, match="two weights or more"):
        Plane.of([np.ones((3, 1))])


class Two(nn.Module):
    """Two weights, BatchNorm's buffers and dropout, none of which may disturb a look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.drop = nn.Dropout(0.5)
        nn.init.constant_(self.line.weight, -1.0)
        nn.init.constant_(self.line.bias, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.line(x) + 0 * self.drop(x)


def regression(seed: int) -> Task:
    """A line through points: two weights."""
    x = torch.linspace(-1, 3, 40).unsqueeze(1)
    t = 2 * x + 1
    return Task(
        model=Two(),
        batches=[(x, t)],
        loss=lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean(),
        evaluate=lambda model: {"loss": 0.0},
        metric="loss",
        target=1.0,
        epochs=1,
        batch_size=40,
    )


def test_the_plane_of_a_model_with_two_weights_is_its_loss() -> None:
    """Contours are the function itself, turned; trajectories those of the function; all is in the plane."""
    workload = Workload.of(regression)
    seen = landscape(workload, ["SGD", "Adam"], lr=0.05, settings={}, steps=30, size=7)
    assert seen.explained is not None
    assert sum(seen.explained) == pytest.approx(1.0, abs=1e-9)
    x = np.linspace(-1, 3, 40)
    w, b = -1.0, 3.0
    sgd, adam = seen.trajectories
    v = np.zeros(2)
    expected = []
    for _ in range(31):  # Nesterov's momentum, which SGD has on networks
        away = w * x + b - (2 * x + 1)
        expected.append((away**2).mean())
        g = 2 * np.array([(away * x).mean(), away.mean()])
        v = 0.9 * v + g
        w, b = np.array([w, b]) - 0.05 * (g + 0.9 * v)
    assert sgd.losses == pytest.approx(expected, rel=2e-4)
    assert sgd.points[0] == pytest.approx(adam.points[0])
    assert (sgd.in_plane, adam.in_plane) == (pytest.approx(1.0), pytest.approx(1.0))
    assert sgd.title == "SGD, momentum 0.9, nesterov"
    # The grid, at the point next to the start: bilinear, so roughly.
    i, j = np.abs(seen.y - sgd.points[0][1]).argmin(), np.abs(seen.x - sgd.points[0][0]).argmin()
    assert seen.z.min() < 0.1 * sgd.losses[0]
    assert seen.z[i, j] == pytest.approx(sgd.losses[0], rel=1.0)
    assert any("The plane holds 100.0% of the variance" in line for line in seen.remarks())
    assert "in the plane" in str(seen)


def test_looking_at_a_network_changes_nothing() -> None:
    """The probe gives equal values for equal weights; the state of torch's generator is left alone."""
    workload = Workload.of(regression)
    probe = network.Probe(workload, 0)
    before = torch.get_rng_state()
    values = [probe(torch.tensor([a, 1.0])) for a in (0.5, 2.0, 0.5)]
    assert values[0] == values[2] != values[1]
    assert values[1] == pytest.approx(0.0, abs=1e-10)
    assert int(probe._model.norm.num_batches_tracked) == 0
    first = landscape(workload, ["SGD"], lr=0.05, steps=5, size=3)
    assert first.to_json() == landscape(workload, ["SGD"], lr=0.05, steps=5, size=3).to_json()
    assert torch.equal(before, torch.get_rng_state())


def test_a_network_with_several_optimizers_in_one() -> None:
    """What is built from a model gets the model; of 250 steps every third is kept, and the last."""
    from schuss.training.groups import param_groups

    def muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        groups = param_groups(model, matrices={})
        return Combined.of(groups, matrices=partial(optim.Muon, lr=lr), others=partial(optim.AdamW, lr=lr))

    seen = landscape("diabetes", {"Muon": muon, "AdamW": "AdamW"}, lr=0.003, steps=205, size=3)
    assert [way.title for way in seen.trajectories] == ["Muon", "AdamW"]
    assert seen.trajectories[0].steps == (*range(0, 205, 3), 205)
    assert all(way.losses[-1] < way.losses[0] for way in seen.trajectories)
    assert seen.explained is not None
    assert 0.3 < sum(seen.explained) < 1


# --- what is refused --------------------------------------------------------------------------------------------------


def broken(params: Any, lr: float) -> Any:
    return None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rosenbrok",), "unknown landscape 'rosenbrok': did you mean 'rosenbrock'"),
        (("beale", ["AdmW"]), "unknown optimizer 'AdmW'"),
        (("beale", ["Muon"]), "Muon takes parameters of [2, inf) dimensions, such as matrices, and here one has 1"),
        (("beale", ["torch:Muon"]), "torch:Muon cannot be made for this landscape: "),
        (("beale", ["SparseAdam"]), "SparseAdam cannot step on a function of two variables: "),
        (("beale", {"x": broken}), "broken must make an optimizer, got NoneType"),
        (("beale", []), "at least one optimizer is needed"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        landscape(*arguments, lr=0.1, size=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "landscape: lr must be in (0, inf), got -1"),
        ({"lr": {"Adam": 0.1}}, "lr is given for Adam, which is not among SGD"),
        ({"steps": 0}, "landscape: steps must be in [1, inf), got 0"),
        ({"size": 2}, "size must be in [3, inf), got 2"),
        ({"condition": 5.0}, "beale is not the quadratic, so condition is not for it"),
        ({"minima": [(0, 0)]}, "beale has known minima, so minima is not for it"),
        ({"box": (1, 0, 0, 1)}, "box must be (x from, x to, y from, y to), finite and rising"),
        ({"start": (0.0, math.nan)}, "start must be two finite numbers"),
        ({"vary": {"momentum": []}}, "vary needs at least one value of momentum"),
        ({"vary": {"lr": [0.1], "momentum": [0.1]}}, "one hyperparameter of one optimizer is varied, got 2 of 1"),
        ({"vary": {"lr": [0.0]}}, "lr must be in (0, inf), got 0"),
        ({"settings": {"momentun": 0.9}}, "SGD cannot be made for this landscape: "),
    ],
)
def test_arguments_out_of_bounds_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        landscape("beale", ["SGD"], **{"lr": 0.1, "steps": 5, **arguments})


def test_other_mistakes() -> None:
    with pytest.raises(ValueError, match="regression is a network, so start is not for it"):
        landscape(Workload.of(regression), start=(0, 0))
    with pytest.raises(ValueError, match=r"condition must be in \[1, inf\), got 0.5"):
        landscape("quadratic", condition=0.5)
    with pytest.raises(ValueError, match="no gradient at"):
        landscape(lambda x, y: math.sin(x) + math.cos(y))
    with pytest.raises(ValueError, match="choose another start"):
        own(lambda x, y: torch.log(x) + y, start=(0.0, 0.0))
    with pytest.raises(ValueError, match=r"path must end in \.html, \.json, \.csv, \.png, \.svg"):
        landscape("quadratic", "SGD", lr=0.01, size=3).save("x.pdf")
    with pytest.raises(ValueError, match="is built from a model"):
        landscape("beale", {"m": lambda model, lr: None}, lr=0.1, size=3)


# --- numbers and pictures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen() -> Landscape:
    """Five optimizers, one of which diverges."""
    lrs = {"SGD": 0.02, "RMSprop": 0.05, "Adam": 0.3, "LBFGS": 1.0, "torch:SGD": 0.5}
    return landscape("beale", [*lrs], lr=lrs, steps=60, size=61)


def test_json_and_csv_have_the_numbers_of_the_picture(seen: Landscape) -> None:
    document = json.loads(seen.to_json())
    rows = list(csv.DictReader(io.StringIO(seen.to_csv())))
    paths = [trace for trace in seen.plot().data if trace.meta and trace.meta["kind"] == "path"]
    curves = seen.plot_losses().data
    assert len(document["trajectories"]) == len(paths) == len(curves) == 5
    for way, trace, curve in zip(document["trajectories"], paths, curves, strict=True):
        assert way["label"] == trace.name == curve.name
        assert [[x, y] for x, y in zip(trace.x, trace.y, strict=True)] == way["points"]
        assert [list(pair) for pair in trace.customdata] == [
            [*pair] for pair in zip(way["steps"], way["losses"], strict=True)
        ]
        assert list(curve.customdata) == way["losses"]
        mine = [row for row in rows if row["optimizer"] == way["label"]]
        assert [[float(row["x"]), float(row["y"])] for row in mine] == way["points"]
        assert [float(row["loss"]) for row in mine] == way["losses"]
        assert [int(row["gradients"]) for row in mine] == way["evaluations"]
    contour = seen.plot().data[0]
    z = np.array(document["z"])
    assert list(contour.x) == document["x"]
    above = np.array(contour.z) > contour.contours.start - 0.9 * contour.contours.size
    assert above.mean() > 0.9
    assert np.array(contour.z)[above] == pytest.approx(np.log10(z)[above], abs=1e-5)
    assert document["lowest"] == document["floor"] == 0
    assert document["minima"] == [[3.0, 0.5]]


def test_contours_are_evenly_spaced_in_the_logarithm() -> None:
    """From the lowest points to the highest, nine of them or more, at whole parts of powers of ten."""
    z = 10.0 ** np.linspace(-3, 2, 10_000).reshape(100, 100) + 7.0
    logs, first, last, distance = page.levels(z, 7.0)
    assert (first, last, distance) == (-2.5, 2.0, 0.5)
    assert logs.max() == pytest.approx(2.0)
    assert logs.min() > first - distance
    z[0, 0] = math.nan
    z[1, 1] = 7.0
    logs, *_ = page.levels(z, 7.0)
    assert math.isnan(logs[0, 0])
    assert logs[1, 1] < first
    assert page.levels(np.ones((3, 3)), 1.0)[0].tolist() == np.zeros((3, 3)).tolist()


def test_the_floor_keeps_logarithms_finite(seen: Landscape) -> None:
    assert seen.floor == 0
    unknown = replace(seen, lowest=None, minima=())
    assert unknown.floor == 0
    below = replace(unknown, z=seen.z - 5)
    assert below.floor == pytest.approx((seen.z - 5).min())
    assert np.isfinite(page.levels(below.z, below.floor)[0]).all()


def test_print_is_written_where_kaleido_is(seen: Landscape, tmp_path: Path) -> None:
    pytest.importorskip("kaleido", reason='pip install "schuss[print]"')
    need_chromium()
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<svg")):
        assert seen.save(tmp_path / f"x{suffix}").read_bytes().startswith(start)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_page_and_numbers(tmp_path: Path) -> None:
    out = tmp_path / "new"
    arguments = ["landscape", "quadratic", "--optimizers", "SGD,Adam", "--lr", "SGD=0.02,Adam=0.5", "--steps", "30"]
    result = CliRunner().invoke(app, [*arguments, "--condition", "10", "--out", str(out)])
    assert result.exit_code == 0, result.output
    document = json.loads((out / "quadratic.json").read_text(encoding="utf-8"))
    assert document["formula"] == "f(x, y) = ½ (x² + 10 y²)"
    y = 1.0 * (1 - 0.02 * 10) ** 30
    assert document["trajectories"][0]["points"][-1] == pytest.approx([-4.5 * 0.98**30, y])
    final = document["trajectories"][1]["losses"][-1]
    assert re.search(rf"^Adam +0\.5 +\S+ +30 +{final:.3g}", result.stdout, flags=re.MULTILINE)
    text = (out / "quadratic.html").read_text(encoding="utf-8")
    assert "schuss landscape quadratic --optimizers SGD,Adam --lr=SGD=0.02,Adam=0.5 --condition=10.0" in text
    assert (out / "quadratic.csv").read_text(encoding="utf-8").startswith("optimizer,lr,step,gradients,x,y,loss\n")
    assert f"Page: {out / 'quadratic.html'}" in result.stdout


def test_the_command_writes_one_file(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    arguments = [
        "landscape",
        "rosenbrock",
        "--optimizers",
        "AdamW",
        "--vary",
        "betas=(0.9,0.999),(0.5,0.9)",
        "--lr=0.1",
    ]
    result = CliRunner().invoke(app, [*arguments, "--steps", "5", "--start=-1,2", "--box=-3,3,-1,3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [way["points"][0] for way in document["trajectories"]] == [[-1.0, 2.0]] * 2
    assert document["box"] == [-3.0, 3.0, -1.0, 3.0]
    assert [way["settings"]["betas"] for way in document["trajectories"]] == [[0.9, 0.999], [0.5, 0.9]]
    assert [file.name for file in tmp_path.iterdir()] == ["numbers.json"]


def test_functions_and_workloads_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_landscape.py").write_text(
        "def bowl(x, y):\n    return (x - 1) ** 2 + y ** 2\n\n\n"
        "def work(seed):\n    from schuss.lab.workloads import WORKLOADS\n    return WORKLOADS['diabetes'](seed)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = CliRunner().invoke(
        app, ["landscape", "mine_landscape:bowl", "--optimizers", "SGD", "--lr", "0.5", "--out", "bowl.json"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "bowl.json").read_text(encoding="utf-8"))
    assert document["minima"] == [pytest.approx([1.0, 0.0], abs=1e-6)]
    assert document["trajectories"][0]["points"][1] == [1.0, 0.0]
    assert isinstance(look_up("mine_landscape:work"), Workload)
    assert look_up("digits").name == "digits"  # type: ignore[union-attr]
    monkeypatch.delitem(sys.modules, "mine_landscape")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bele"], "unknown landscape 'bele': did you mean 'beale'?"),
        (["beale", "--lr", "x"], "--lr must be a number, or such as SGD=0.01,Adam=0.1, got 'x'"),
        (["beale", "--vary", "lr"], "--vary must be a hyperparameter with its values"),
        (["beale", "--optimizers", "SGD,Adam", "--vary", "lr=0.1"], "one hyperparameter of one optimizer is varied"),
        (["beale", "--start", "1"], "--start must be 2 numbers separated by commas, got '1'"),
        (["beale", "--box", "1,2,3"], "--box must be 4 numbers separated by commas"),
        (["beale", "--out", "x.pdf"], "--out must be a folder, or a file that ends in .html, .json, .csv, .png, .svg"),
        (["beale", "--optimizers", "Muon"], "Muon takes parameters of [2, inf) dimensions"),
        (["nowhere_landscape:f"], "nowhere_landscape"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["landscape", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# --- the page in a browser --------------------------------------------------------------------------------------------


SCRIPT = """
const [ground, plane, slider, play] = ["ground", "plane", "step", "play"].map(name => doc.getElementById(name));
const lines = () => plane.data.filter(t => t.meta && t.meta.kind === "path");
const told = () => doc.getElementById("now").textContent;
const found = {last: lines().map(t => [[...t.x], [...t.y], t.customdata.map(pair => [...pair])]), told: told()};
slider.value = 10;
slider.dispatchEvent(new win.Event("input"));
await wait(50);
found.at10 = lines().map(t => t.x.length);
found.drawn = plane.querySelectorAll(".scatterlayer .trace .points path").length;
found.heads = plane.data.filter(t => t.meta && t.meta.kind === "head").map(t => [t.x[0], t.y[0]]);
found.told10 = told();
play.click();
found.pressed = play.textContent;
await wait(1500);
found.moved = Number(slider.value);
play.click();
found.stopped = play.textContent;
const button = doc.querySelector("nav button");
button.click();
await wait(50);
found.hidden = [plane, doc.getElementById("curves")].map(
  plot => plot.data.filter(t => t.visible === false).map(t => t.meta.run));
found.pressedButton = button.getAttribute("aria-pressed");
button.click();
await wait(50);
found.shown = plane.data.filter(t => t.visible === false).length;
found.focus = [...doc.querySelectorAll("button, input")].map(e => { e.focus(); return doc.activeElement === e; });
found.named = [...doc.querySelectorAll("button, input")].map(e => e.getAttribute("aria-label") || e.textContent.trim());
found.width = [doc.documentElement.scrollWidth, win.innerWidth, plane.getBoundingClientRect().width];
const boxes = [plane, ground].map(plot => plot.querySelector("rect.nsewdrag").getBoundingClientRect());
found.areas = boxes.map(box => [box.x, box.y, box.width, box.height]);
found.outside = [...ground.querySelectorAll(".ytick text")].map(tick => tick.getBoundingClientRect())
  .filter(tick => tick.bottom < boxes[0].top - 2 || tick.top > boxes[0].bottom + 2).length;
found.contours = ground.querySelectorAll(".contourlines path, .contourfill path").length;
await win.Plotly.relayout(plane, {"xaxis.range[0]": 1, "xaxis.range[1]": 2});
await wait(50);
found.zoomed = [plane, ground].map(plot => [...plot.layout.xaxis.range]);
found.dark = win.getComputedStyle(doc.body).backgroundColor;
found.low = ground.data[0].colorscale[0][1];
found.requests = win.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"));
return found;
"""


@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (375, "dark")])
def test_the_page_in_a_browser(seen: Landscape, tmp_path: Path, width: int, theme: str) -> None:
    """Slider, play button, legend, keyboard, width, theme; no error on the console, nothing from the network."""
    need_chromium()
    seen.save(tmp_path / "page.html", command="schuss landscape beale")
    assert (tmp_path / "page.html").stat().st_size < 10e6  # five of them are Plotly
    found = look(tmp_path / "page.html", SCRIPT, width=width, theme=theme)
    document = json.loads(seen.to_json())
    for (x, y, told), way in zip(found["last"], document["trajectories"], strict=True):
        assert [list(point) for point in zip(x, y, strict=True)] == way["points"]
        assert told == [[step, loss] for step, loss in zip(way["steps"], way["losses"], strict=True)]
    assert (found["told"], found["told10"]) == ("step 60 of 60", "step 10 of 60")
    lengths = [min(11, len(way["points"])) for way in document["trajectories"]]
    assert min(lengths) < 11  # the one that diverged
    assert found["at10"] == lengths
    assert found["drawn"] == sum(lengths) + 5 + 2  # heads; start and minimum
    assert found["heads"] == [way["points"][n - 1] for way, n in zip(document["trajectories"], lengths, strict=True)]
    assert "Pause" in found["pressed"]
    assert "Play" in found["stopped"]
    assert 10 < found["moved"] < 60
    assert found["hidden"] == [[0, 0], [0]]
    assert (found["pressedButton"], found["shown"]) == ("false", 0)
    assert all(found["focus"])
    assert all(found["named"])
    assert len(found["focus"]) == 5 + 2
    scroll, inner, drawn = found["width"]
    assert inner == width
    assert scroll <= inner
    assert drawn > 0.5 * min(width, 1000)
    x0, x1, y0, y1 = seen.box  # one scale for both axes, also after the slider has moved
    assert found["areas"][0] == pytest.approx(found["areas"][1], abs=0.5)
    assert found["areas"][0][2] / found["areas"][0][3] == pytest.approx((x1 - x0) / (y1 - y0), rel=0.02)
    assert found["outside"] == 0
    assert found["contours"] > 20
    assert found["zoomed"][0] == pytest.approx(found["zoomed"][1])
    assert found["zoomed"][0] != [x0, x1]
    assert found["requests"] == []
    assert found["dark"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[theme]
    assert found["low"] == page.SHADES[theme][0]


def test_surfaces_refuse_what_is_no_box_or_start() -> None:
    with pytest.raises(ValueError, match="box must be"):
        Surface("x", lambda x, y: x, (0, math.inf, 0, 1), (0, 0))
    with pytest.raises(ValueError, match="start must be"):
        Surface("x", lambda x, y: x, (0, 1, 0, 1), (0, math.inf))
