"""Training runs, their ranking, and the report on them."""

import csv
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import schuss
import small_workloads as small
from schuss import optim
from schuss.lab import report
from schuss.lab.candidate import CENTRES, DEFAULT_NAMES, Candidate, around, candidates
from schuss.lab.compare import Comparison, Run, compare, extended, train
from schuss.lab.ranking import Goal, Mean, aligned, header, means, rank, remarks, table
from schuss.lab.recipes import RECIPES
from schuss.lab.store import Store
from schuss.lab.workload import Task, Workload
from schuss.lab.workloads import find


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Test processes side by side already use every core, and so small a network gains nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return find("digits")


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return compare("digits", ["torch:SGD", "torch:AdamW"], lrs=[0.003, 0.03], seeds=2, epochs=2, extend=0)


@pytest.fixture(scope="module")
def runs(compared: Comparison) -> list[Run]:
    return compared.runs


def untimed(run: Run) -> Run:
    return replace(run, step_ms=0.0, train_step_ms=0.0, seconds=())


ACCURACY = Goal("digits", "Digits.", "accuracy", "higher", 0.95, 2, 46, 64, 6058)
LOSS = replace(ACCURACY, workload="line", metric="loss", better="lower", target=0.3)


def made(optimizer: str, lr: float, accuracy: float, *, seed: int = 0, loss: float = 0.5) -> Run:
    test = {"loss": (2.3, loss), "accuracy": (0.1, accuracy)}
    return Run(optimizer, lr, seed, (2.3, loss), test, 0.25, 1.5, "digits", (0, 23), (0.0, 0.2))


# --- training ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_run_whatever_the_global_random_state(workload: Workload) -> None:
    [candidate] = candidates(["torch:AdamW"])
    torch.manual_seed(1)
    first = train(workload, candidate, 0.01, seed=3, epochs=1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = train(workload, candidate, 0.01, seed=3, epochs=1)
    assert untimed(first) == untimed(second)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_generators_of_python_and_numpy_are_seeded_for_a_run_and_go_on_after_it() -> None:
    drawn = []

    def noisy(seed: int) -> Task:
        task = small.plane(seed)

        def loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return task.loss(model, batch)

        return replace(task, loss=loss)

    before = random.getstate(), np.random.get_state()[1].tolist()
    [candidate] = candidates(["torch:SGD"])
    for seed in (5, 5, 6):
        train(Workload.of(noisy), candidate, 0.01, seed=seed, epochs=1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert drawn[:4] == drawn[4:8]
    assert all(
        a != b for first, other in zip(drawn[:4], drawn[8:], strict=True) for a, b in zip(first, other, strict=True)
    )


def test_training_is_the_textbook_loop(workload: Workload) -> None:
    [candidate] = candidates(["torch:SGD"])
    run = train(workload, candidate, 0.03, seed=5, epochs=2)
    task = workload(5)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=2 * 23)
    for _ in range(2):
        for inputs, targets in task.batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(task.model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    assert {name: values[-1] for name, values in run.test.items()} == pytest.approx(task.scores(optimizer), rel=1e-5)
    assert (len(run.train_loss), len(run.test_loss), run.steps) == (2 * 23, 3, (0, 23, 46))
    assert 0 == run.seconds[0] < run.seconds[1] < run.seconds[2]


def test_the_rate_of_every_group_falls_linearly_to_zero_after_a_warm_up() -> None:
    seen = Candidate("seen", small.Seen, (0.1,))
    train(Workload.of(small.plane), seen, 0.1)
    assert [rate for [rate] in small.LAST] == pytest.approx([0.1 * (1 - t / 16) for t in range(16)])
    train(Workload.of(small.plane), seen, 0.1, warmup=0.25)
    rise, fall = [0.025, 0.05, 0.075, 0.1], [0.1 * (1 - t / 12) for t in range(12)]
    assert [rate for [rate] in small.LAST] == pytest.approx(rise + fall)

    def two(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
        weight, bias = model.parameters()
        return small.Seen([{"params": [weight]}, {"params": [bias], "lr": 10 * lr}], lr=lr)

    train(Workload.of(small.plane), Candidate("two", two, (0.01,)), 0.01)
    assert [high / low for low, high in small.LAST] == pytest.approx([10] * 16)


def test_an_optimizer_that_averages_keeps_its_rate() -> None:
    """Schedule-Free's average is what it has in the place of a schedule."""

    def run_by_hand(factor: bool) -> float:
        task = small.plane(3)
        optimizer = optim.ScheduleFreeSGD(task.model.parameters(), lr=0.05)
        for t in range(16):
            optimizer.zero_grad()
            task.loss(task.model, task.batches[t % 4]).backward()  # type: ignore[index]
            if factor:
                optimizer.param_groups[0]["lr"] = 0.05 * (1 - t / 16)
            optimizer.step()
        return task.scores(optimizer)["loss"]

    for candidate in (*candidates(["ScheduleFreeSGD"]), Candidate("mine", small.averaging, (0.05,))):
        run = train(Workload.of(small.plane), candidate, 0.05, seed=3)
        assert run.test_loss[-1] == pytest.approx(run_by_hand(False), rel=1e-6)
        assert run.test_loss[-1] != pytest.approx(run_by_hand(True), rel=1e-3)


def test_every_optimizer_starts_from_the_same_weights_and_batch(runs: list[Run]) -> None:
    assert len(runs) == 2 * 2 * 2
    for seed in (0, 1):
        starts = {(run.test_loss[0], run.test_accuracy[0], run.train_loss[0]) for run in runs if run.seed == seed}
        assert len(starts) == 1
    assert len({run.train_loss[0] for run in runs}) == 2


def test_torch_and_schuss_take_the_same_path() -> None:
    ours, theirs = compare("digits", ["AdamW", "torch:AdamW"], lrs=[0.003], seeds=[2], epochs=1).runs
    assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-3)
    assert ours.test_loss[-1] == pytest.approx(theirs.test_loss[-1], rel=1e-3)


def test_training_learns(runs: list[Run]) -> None:
    for run in runs:
        assert run.test_loss[-1] < run.test_loss[0]


def test_a_run_that_diverges_stops_and_says_so(workload: Workload) -> None:
    [candidate] = candidates(["torch:SGD"])
    run = train(workload, candidate, 1e30, epochs=2)
    assert run.diverged
    assert len(run.train_loss) < 23
    assert not math.isfinite(run.train_loss[-1])
    assert len(run.test_loss) == len(run.steps) == 1


# --- candidates -------------------------------------------------------------------------------------------------------


def test_default_candidates_have_equal_budgets_and_names_of_their_own() -> None:
    defaults = candidates(DEFAULT_NAMES)
    assert [candidate.name for candidate in defaults] == list(DEFAULT_NAMES)
    assert {len(candidate.lrs) for candidate in defaults} == {3}
    for candidate in defaults:
        module = torch.optim if candidate.name.startswith("torch:") else optim
        assert candidate.build is getattr(module, candidate.name.removeprefix("torch:"))


def test_recipes_are_optimizers_of_a_whole_model() -> None:
    """Who has what, and that nothing else is switched on than their names say."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    made = {one.name: one.for_model(model, 0.02) for one in candidates(list(RECIPES))}
    kernel, hidden, head = model[0].weight, model[2].weight, model[4].weight
    rules = {"Muon+AdamW": (optim.Muon, {kernel, hidden}), "NorMuon+AdamW": (optim.NorMuon, {hidden})}
    for name, (rule, expected) in rules.items():
        combined = made[name]
        assert isinstance(combined, schuss.Combined)
        own = {type(one): {p for g in one.param_groups for p in g["params"]} for one in combined.optimizers.values()}
        assert own == {rule: expected, optim.AdamW: set(model.parameters()) - expected}
        assert {group["lr"] for group in combined.param_groups} == {0.02}
        assert head not in own[rule]
    assert isinstance(made["Lookahead+AdamW"], schuss.Lookahead)
    assert type(made["Cautious+AdamW"]) is optim.AdamW
    assert type(made["AMSGrad"]) is optim.Adam
    assert [group["amsgrad"] for group in made["AMSGrad"].param_groups] == [True]
    p, q = (nn.Parameter(torch.tensor([1.0, 1.0])) for _ in range(2))
    for name, parameter in (("Cautious+AdamW", p), ("AdamW", q)):
        [one] = candidates([name])
        optimizer = one.built(nn.ParameterList([parameter]), 0.1)
        for gradient in ([1.0, 1.0], [-0.1, 1.0]):  # the first turns, its momentum does not
            parameter.grad, before = torch.tensor(gradient), parameter.detach().clone()
            optimizer.step()
        moved = (parameter.detach() - before * (1 - 0.1 * 0.01)).abs() > 1e-6
        assert moved.tolist() == [name == "AdamW", True]


def test_a_recipe_that_needs_a_model_refuses_one_without_hidden_matrices() -> None:
    with pytest.raises(ValueError, match=r"^Muon\+AdamW cannot train the plane workload: .* has no hidden matrix"):
        compare(small.plane, ["Muon+AdamW"])


def test_five_rates_round_a_centre() -> None:
    assert [around(0.01, n) for n in (1, 3, 5)] == [(0.01,), (0.003, 0.01, 0.03), (0.001, 0.003, 0.01, 0.03, 0.1)]


def test_every_rule_has_a_centre() -> None:
    pairs = {optim.Muon, optim.NorMuon}
    rules = {rule.__name__ for rule in optim.RULES if rule not in pairs}
    assert set(CENTRES) == rules | set(RECIPES) | {"SparseAdam"}


def test_lrs_replace_the_grid_sorted_and_once_each() -> None:
    [candidate] = candidates(["torch:AdamW", "torch:AdamW"], [0.1, 0.01, 0.1])
    assert candidate.lrs == (0.01, 0.1)


def test_a_class_without_a_grid_of_its_own_is_tried_around_its_default() -> None:
    [candidate] = candidates(["torch:Adadelta"])
    assert candidate.lrs == (0.3, 1.0, 3.0)


def test_sgd_has_nesterov_momentum() -> None:
    [candidate] = candidates(["torch:SGD"])
    [group] = candidate.built(nn.ParameterList([torch.zeros(1)]), 0.1).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.9, True)


def test_anybodys_optimizers_by_name_and_as_objects() -> None:
    named = candidates(["small_workloads:Seen", "small_workloads:unchanged"], [0.1])
    assert [candidate.build for candidate in named] == [small.Seen, small.unchanged]
    given = candidates([small.Seen, torch.optim.AdamW, optim.Lion, named[1]], [0.2])
    assert [candidate.name for candidate in given] == ["Seen", "torch:AdamW", "Lion", "small_workloads:unchanged"]
    assert {candidate.lrs for candidate in given} == {(0.2,)}
    assert candidates([small.Seen])[0].lrs == (0.0003, 0.001, 0.003)
    assert candidates([optim.Lion])[0] == candidates(["Lion"])[0]


def test_a_function_of_the_model_gets_the_model() -> None:
    [candidate] = candidates(["small_workloads:both"])
    model = torch.nn.Linear(4, 1)
    optimizer = candidate.for_model(model, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]
    assert optimizer.param_groups[0]["params"][0] is model.weight
    [plain] = candidates(["small_workloads:unchanged"], [0.1])
    assert plain.for_model(model, 0.1).param_groups[0]["params"] == [*model.parameters()]


@pytest.mark.parametrize(
    ("names", "lrs", "message"),
    [
        (["torch:adamw"], None, "unknown optimizer 'torch:adamw': did you mean 'torch:AdamW'?"),
        (["Adopt"], None, "unknown optimizer 'Adopt': did you mean 'ADOPT'?"),
        (["torch:RAdm"], None, "unknown optimizer 'torch:RAdm': did you mean 'torch:RAdam'?"),
        (["Optimizer"], None, "unknown optimizer 'Optimizer': "),
        ([], None, "at least one optimizer is needed"),
        (["torch:SGD"], [], "at least one learning rate is needed"),
        (["torch:SGD"], [0.1, 0.0], "lr must be in (0, inf), got 0"),
        (["torch:SGD"], [math.nan], "lr must be in (0, inf), got nan"),
        (["torch:SGD"], [math.inf], "lr must be in (0, inf), got inf"),
        (["torch:optim.SGD"], None, "unknown optimizer 'torch:optim.SGD': did you mean 'torch:"),
        (["small_workloads:Sean"], None, "module 'small_workloads' has no 'Sean': did you mean 'Seen'?"),
        (["no_such_module:SGD"], None, "cannot import 'no_such_module': ModuleNotFoundError: "),
        (["small_workloads:X"], None, "small_workloads:X must be an optimizer's class or a function, got Tensor"),
        (
            ["small_workloads:unchanged"],
            None,
            "small_workloads:unchanged has no default learning rate: give its lr one, or ",
        ),
        ([small.Seen, Candidate("Seen", small.Tired, (0.1,))], None, "two optimizers are called 'Seen': "),
    ],
)
def test_bad_candidates(names: list[Any], lrs: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        candidates(names, lrs)


# --- ranking ----------------------------------------------------------------------------------------------------------


def test_mean_and_standard_error() -> None:
    mean = Mean.of([0.90, 0.92, 0.94])
    assert mean.value == pytest.approx(0.92)
    assert mean.error == pytest.approx(0.02 / math.sqrt(3))
    assert math.isnan(Mean.of([0.9]).error)


RUNS = [
    made("A", 0.1, 0.95),
    made("A", 0.2, 0.80),
    made("B", 0.1, 0.90),
    made("B", 0.2, 0.97),
    made("C", 0.1, 0.95, loss=0.4),
    made("D", 0.1, 0.99, loss=math.nan),
]


def test_ranked_by_the_metric_at_the_best_lr_then_by_loss() -> None:
    standings = rank(RUNS, ACCURACY)
    assert [(s.rank, s.optimizer, s.best.lr) for s in standings] == [
        (1, "B", 0.2),
        (2, "C", 0.1),
        (3, "A", 0.1),
        (4, "D", 0.1),
    ]
    lower = rank(RUNS, replace(ACCURACY, better="lower"))
    assert [(s.optimizer, s.best.lr) for s in lower] == [("A", 0.2), ("B", 0.1), ("C", 0.1), ("D", 0.1)]
    by_loss = rank(RUNS, LOSS)
    assert [s.optimizer for s in by_loss] == ["C", "A", "B", "D"]


def test_a_metric_that_is_not_finite_has_diverged_though_the_loss_has_not() -> None:
    run = made("A", 0.1, math.nan)
    assert (run.diverged, ACCURACY.status(run), LOSS.status(run)) == (False, "diverged", "finished")


def test_equal_means_are_equal_however_they_are_summed() -> None:
    thirds, tenths = [0.1 + 0.2, 0.9], [0.3, 0.9]
    assert Mean.of(thirds).value != Mean.of(tenths).value
    runs = [made("A", 0.1, value, seed=i, loss=0.5) for i, value in enumerate(thirds)]
    runs += [made("B", 0.1, value, seed=i, loss=0.4) for i, value in enumerate(tenths)]
    standings = rank(runs, ACCURACY)
    assert [standing.optimizer for standing in standings] == ["B", "A"]
    assert [standing.p for standing in standings] == [None, 1.0]


def test_a_learning_rate_at_which_any_seed_diverged_or_failed_is_not_the_best() -> None:
    runs = [made("A", 0.1, 0.6), made("A", 0.1, 0.6, seed=1), made("A", 0.2, 0.9)]
    for last in (made("A", 0.2, 0.9, seed=1, loss=math.inf), Run.failed("digits", "A", 0.2, 1, "no")):
        [standing] = rank([*runs, last], ACCURACY)
        assert standing.best.lr == 0.1
        assert [trial.finished for trial in standing.trials] == [True, False]
        assert standing.failed is None


def test_ranked_on_seeds_from_which_no_rate_was_chosen() -> None:
    """A is better where rates are chosen, B elsewhere; at a rate that was not chosen a run does not count."""
    chosen = {"A": ((0.1, 0.9), (0.2, 0.8)), "B": ((0.1, 0.6), (0.2, 0.7))}
    runs = [made(name, lr, at - 0.01 * i, seed=i) for name in "AB" for lr, at in chosen[name] for i in range(2)]
    others = [made("A", 0.1, 0.80 + 0.01 * i, seed=i) for i in (2, 3, 4)]
    others += [made("B", 0.2, 0.85 + 0.01 * i, seed=i) for i in (2, 3, 4)]
    stray = [made("B", 0.1, 1.0, seed=i) for i in (2, 3, 4)]
    before = rank([*runs, *others[:-1], *stray], ACCURACY, range(2, 5))  # one is missing
    assert [(s.optimizer, s.best.lr, s.confirmed) for s in before] == [("A", 0.1, False), ("B", 0.2, False)]
    assert before[0].best.score.value == pytest.approx(0.895)
    after = rank([*runs, *others, *stray], ACCURACY, range(2, 5))
    assert [(s.optimizer, s.best.lr, s.confirmed) for s in after] == [("B", 0.2, True), ("A", 0.1, True)]
    assert [s.best.score.value for s in after] == pytest.approx([0.88, 0.83])
    assert [s.edge for s in after] == ["largest", "smallest"]
    # Differences of 0.05 each, but for the rounding of scores in steps of 0.01: t = 0.05 / sqrt(0.01² / 6 / 3).
    t = 0.05 / math.sqrt(0.01**2 / 18)
    assert after[1].p == pytest.approx(2 * stats.t.sf(t, 2))
    assert remarks(after)[0] == "What is shown is of seeds 2, 3, 4; learning rates were chosen from others."
    assert [trial.runs[0].seed for trial in after[0].every] == [0, 0, 2]


def test_one_that_fails_only_where_it_is_to_be_confirmed() -> None:
    runs = [made("A", lr, 0.9, seed=i) for lr in (0.1, 0.2) for i in range(2)]
    for last, word in ((made("A", 0.1, 0.9, seed=2, loss=math.nan), "Diverged"), (failed_run(2), "failed")):
        [standing] = rank([*runs, last], ACCURACY, [2])
        assert (standing.best.finished, standing.best.lr, standing.edge is None) == (False, 0.1, word == "failed")
        assert any(word in line for line in remarks([standing]))


def failed_run(seed: int) -> Run:
    return Run.failed("digits", "A", 0.1, seed, "no")


@pytest.mark.parametrize(
    ("accuracies", "edge"),
    [
        ([0.9, 0.8, 0.7], "smallest"),
        ([0.7, 0.9, 0.8], None),
        ([0.7, 0.8, 0.9], "largest"),
        ([0.9], None),
        ([math.nan, math.nan], "smallest"),
    ],
)
def test_edge_of_the_grid(accuracies: list[float], edge: str | None) -> None:
    [standing] = rank([made("A", 0.1 * (i + 1), accuracy) for i, accuracy in enumerate(accuracies)], ACCURACY)
    assert standing.edge == edge


@pytest.mark.parametrize(
    ("grid", "smallest", "largest"),
    [((0.003, 0.01, 0.03), 0.001, 0.1), ((0.1, 0.3, 1.0), 0.03, 3.0), ((1e-4, 1e-3), 1e-5, 1e-2), ((1, 2, 4), 0.5, 8)],
)
def test_a_grid_goes_on_as_it_is(grid: tuple[float, ...], smallest: float, largest: float) -> None:
    assert extended(grid, "smallest") == (smallest, *grid)
    assert extended(grid, "largest") == (*grid, largest)


def seeds(optimizer: str, *accuracies: float) -> list[Run]:
    return [made(optimizer, 0.1, accuracy, seed=i) for i, accuracy in enumerate(accuracies)]


def test_who_can_be_told_apart_from_the_first() -> None:
    first = [0.95, 0.96, 0.97, 0.95, 0.96]
    runs = [*seeds("A", *first), *seeds("B", *(x - 0.1 + 0.001 * i for i, x in enumerate(first)))]
    runs += seeds("C", 0.99, 0.80, 0.95, 0.95, 0.97)
    standings = rank(runs, ACCURACY)
    assert [(s.optimizer, s.tied) for s in standings] == [("A", False), ("C", True), ("B", False)]
    assert standings[2].p is not None
    assert standings[2].p < 0.001
    assert "Not told apart from A by a paired t test over seeds, corrected for all pairs, at 5 %: C." in remarks(
        standings
    )
    [line] = [line for line in remarks(rank(runs[:10], ACCURACY)) if "told apart" in line]
    assert line.startswith("A is told apart from each of the others")


def test_one_seed_says_nothing() -> None:
    standings = rank([made("A", 0.1, 0.9), made("B", 0.1, 0.1)], ACCURACY)
    assert [s.p for s in standings] == [None, None]
    assert "From one seed it cannot be said that one optimizer is better than another: see --seeds." in remarks(
        standings
    )


def test_the_target_is_reached_by_the_median_of_the_seeds() -> None:
    def run(seed: int, *losses: float) -> Run:
        steps = tuple(range(0, 10 * len(losses), 10))
        return Run("A", 0.1, seed, losses, {"loss": losses}, 1, 1, "line", steps, tuple(0.5 * s for s in steps))

    reached = [run(0, 1.0, 0.3, 0.4), run(1, 1.0, 0.9, 0.2), run(2, 1.0, 0.9, 0.8)]
    [standing] = rank(reached, LOSS)
    assert [LOSS.reached(one) for one in reached] == [1, 2, None]
    assert (standing.best.steps_to_target, standing.best.seconds_to_target, standing.best.reached) == (20, 10, 2)
    assert table([standing])[0][5:7] == ("20 (2 of 3)", "10.00")
    [standing] = rank([*reached[1:], run(3, 1.0, 0.9, 0.8)], LOSS)
    assert math.isinf(standing.best.steps_to_target)
    assert table([standing])[0][5:7] == ("- (1 of 3)", "-")
    [standing] = rank([run(2, 1.0, 0.9)], LOSS)
    assert (
        remarks([standing])[-1] == "No run has reached the target, loss ≤ 0.3: take more --epochs, or another target."
    )


def test_table_and_remarks() -> None:
    runs = [made("A", 0.1, 0.90), made("A", 0.1, 0.94, seed=1, loss=0.7), made("A", 0.2, 0.5), made("A", 0.2, 0.5)]
    runs += [made("B", 0.003, 0.9, loss=math.nan), made("B", 0.003, 0.9, seed=1)]
    runs += [Run.failed("digits", "C", 0.1, seed, "TypeError: no") for seed in (0, 1)]
    standings = rank(runs, ACCURACY)
    assert table(standings) == [
        ("1", "A", "0.1", "92.00 ± 2.00", "0.60 ± 0.10", "-", "-", "-", "0.250", "1.50"),
        ("2", "B", "-", "diverged", "-", "-", "-", "-", "0.250", "1.50"),
        ("3", "C", "-", "failed", "-", "-", "-", "-", "-", "-"),
    ]
    assert [len(row) for row in table(standings)] == [len(header(ACCURACY))] * 3
    assert remarks(standings) == [
        "Best lr at the edge of its grid, so a better one may lie beyond (see --lrs): A (0.1, smallest).",
        "Larger budgets: tried at more learning rates than the 1 of others: A (2).",
        "Diverged: B at lr 0.003 (1 of 2 runs).",
        "C failed: TypeError: no",
        "No run has reached the target, accuracy ≥ 95 %: take more --epochs, or another target.",
    ]
    [row] = table(rank([made("A", 0.1, 0.95)], ACCURACY))
    assert row == ("1", "A", "0.1", "95.00", "0.5000", "-", "23", "0.20", "0.250", "1.50")
    assert len(header(LOSS)) == len(header(ACCURACY)) - 1


def test_digits_of_a_column_are_those_of_a_typical_error() -> None:
    nan = math.nan
    assert means([Mean(1.2345, 0.012), Mean(20.0, 0.03)], percent=False) == ["1.234 ± 0.012", "20.000 ± 0.030"]
    assert means([Mean(1234.5, 30.0)], percent=False) == ["1234 ± 30"]
    assert means([Mean(1e-9, 1e-10), Mean(0.5, 0.1)], percent=False) == ["1e-09 ± 1e-10", "0.5 ± 0.1"]
    assert means([Mean(0.0123456, nan)], percent=False) == ["0.01235"]
    assert means([Mean(0.0, nan), Mean(0.0, 0.0)], percent=False) == ["0.000", "0.000 ± 0.000"]
    assert means([Mean(0.98765, 0.001)], percent=True) == ["98.77 ± 0.10"]


def test_columns_are_aligned() -> None:
    shown = aligned(("#", "optimizer", "a\nlong one"), [("1", "A", "3.5"), ("10", "Bcd", "-")])
    assert shown == "                      a\n #  optimizer  long one\n 1  A               3.5\n10  Bcd               -"


# --- comparisons ------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"optimizers": ["torch:SGD", "AdamW"], "lrs": [0.01, 0.1], "seeds": 2}


def numbers(comparison: Comparison) -> Any:
    """All that is reported, without times."""

    def pruned(value: Any) -> Any:
        if isinstance(value, dict):
            timed = [name for name in value if "seconds" in name or name.endswith("_ms")]
            return {name: pruned(item) for name, item in value.items() if name not in timed}
        return [pruned(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)

    return pruned(report.record(comparison))


def test_two_comparisons_are_equal() -> None:
    first, second = (compare(small.plane, **SMALL) for _ in range(2))
    assert numbers(first) == numbers(second)
    assert [row[:7] for row in table(first.results[0].standings)] == [
        row[:7] for row in table(second.results[0].standings)
    ]


def test_an_edge_extends_the_grid_a_bounded_number_of_times() -> None:
    """Of both in the same way: none of these rates is large enough."""
    comparison = compare(small.plane, ["torch:SGD", "Adam"], lrs=[1e-5, 1e-4], seeds=1)
    grids = {s.optimizer: [trial.lr for trial in s.trials] for s in comparison.results[0].standings}
    assert grids == {"torch:SGD": [1e-5, 1e-4, 1e-3, 1e-2], "Adam": [1e-5, 1e-4, 1e-3, 1e-2]}
    assert not any("Larger budgets" in line for line in comparison.results[0].remarks)
    assert sum("Best lr at the edge" in line for line in comparison.results[0].remarks) == 1
    assert len(comparison.runs) == comparison.total == 8
    fixed = compare(small.plane, ["torch:SGD"], lrs=[1e-5, 1e-4], seeds=1, extend=0)
    assert len(fixed.runs) == 2


def test_an_optimizer_that_diverges_everywhere_is_tried_at_smaller_rates_and_shown() -> None:
    comparison = compare(small.ravine, ["torch:SGD", "Lion"], lrs=[1e3, 1e4], seeds=1, epochs=30, extend=1)
    [first, last] = comparison.results[0].standings
    assert [trial.lr for trial in last.trials] == [100.0, 1e3, 1e4]
    assert (last.optimizer, last.rank, table([last])[0][3]) == ("torch:SGD", 2, "diverged")
    assert sum(run.diverged for run in comparison.runs) == 3
    assert first.optimizer == "Lion"


def test_the_best_rates_are_confirmed_from_other_seeds() -> None:
    plain, comparison = compare(small.plane, **SMALL, extend=0), compare(small.plane, **SMALL, extend=0, confirm=3)
    assert list(comparison.confirming) == [2, 3, 4]
    assert len(comparison.runs) == comparison.total == 2 * 2 * 2 + 2 * 3
    assert numbers(plain)["runs"] == [run for run in numbers(comparison)["runs"] if int(run["seed"]) < 2]
    [result], [before] = comparison.results, plain.results
    chosen = {s.optimizer: s.best.lr for s in before.standings}
    [candidate] = candidates(["AdamW"])
    for standing in result.standings:
        assert (standing.confirmed, standing.best.lr) == (True, chosen[standing.optimizer])
        assert [run.seed for run in standing.best.runs] == [2, 3, 4]
        assert [len(trial.runs) for trial in standing.trials] == [2, 2]
    [adamw] = [s for s in result.standings if s.optimizer == "AdamW"]
    direct = [train(comparison.workloads[0], candidate, adamw.best.lr, seed=seed) for seed in (2, 3, 4)]
    assert adamw.best.score == Mean.of([run.test[result.goal.metric][-1] for run in direct])
    rows = [row for row in report.standing_rows(comparison) if row["optimizer"] == "AdamW"]
    assert [(row["best"], row["confirmed"], row["runs"]) for row in rows if row["best"]] == [
        (True, False, 2),
        (True, True, 3),
    ]
    assert "from other seeds than are shown" in report.to_html(comparison)
    assert "2 seeds and 3 to confirm" in report.to_html(comparison)


def test_a_confirmation_that_is_interrupted_ranks_by_the_other_seeds_and_goes_on() -> None:
    whole = compare(small.plane, **SMALL, extend=0, confirm=2)
    comparison = Comparison(small.plane, **SMALL, confirm=2, epochs=None, warmup=0.0, extend=0, threads=None)

    def stop(run: Run, done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    comparison.run(on_run=stop)
    assert (len(comparison.runs), comparison.total, comparison.interrupted) == (10, 12, True)
    assert [standing.confirmed for standing in comparison.results[0].standings] == [False, False]
    assert comparison.remarks[0].startswith("Interrupted: 10 of 12 runs")
    assert "chosen from the seeds that are shown" in comparison.remarks[1]
    assert numbers(comparison.run()) == numbers(whole)


def test_several_workloads_and_their_profile() -> None:
    comparison = compare([small.plane, small.ravine, "quadratic_deep"], **SMALL, epochs=2)
    assert [result.goal.workload for result in comparison.results] == ["plane", "ravine", "quadratic_deep"]
    for cost in ("steps", "seconds"):
        profile = comparison.profile(cost)
        for result, column in zip(comparison.results, zip(*profile.costs.values(), strict=True), strict=True):
            best = {s.optimizer: s.best for s in result.standings}
            for name, value in zip(profile.costs, column, strict=True):
                assert value == getattr(best[name], f"{cost}_to_target")
    assert "All 3 workloads, performance profiles" in str(comparison)
    page = report.to_html(comparison)
    for word in ("<h2>plane</h2>", "A plane through &lt;waves&gt; &amp; noise.", "<h2>All workloads</h2>"):
        assert word in page


def test_runs_that_raise_are_marked_and_the_others_go_on() -> None:
    comparison = compare(small.plane, ["torch:SGD", "small_workloads:Tired"], lrs=[0.01, 0.1], seeds=2)
    good, bad = comparison.results[0].standings
    assert [s.optimizer for s in (good, bad)] == ["torch:SGD", "small_workloads:Tired"]
    assert good.best.finished
    assert bad.failed is not None
    assert re.fullmatch(r"RuntimeError: no more steps: rest \[small_workloads.py:\d+\]", bad.failed)
    assert f"small_workloads:Tired failed: {bad.failed}" in comparison.results[0].remarks
    assert [run["status"] for run in report.run_rows(comparison)].count("failed") == 4
    assert bad.failed in report.to_html(comparison)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch:LBFGS", "torch:LBFGS cannot train the plane workload: LBFGS needs a closure, for it evaluates"),
        ("LBFGS", "LBFGS cannot train the plane workload: LBFGS needs a closure"),
        ("small_workloads:Greedy", "small_workloads:Greedy cannot train the plane workload: Greedy needs a closure"),
        ("small_workloads:wrapped", "small_workloads:wrapped cannot train the plane workload: SAM needs a closure"),
        ("small_workloads:nothing", "small_workloads:nothing cannot train the plane workload: small_workloads:nothing "
         "must build a torch.optim.Optimizer, got NoneType"),
        ("torch:SparseAdam", "torch:SparseAdam cannot train the plane workload: SparseAdam does not support dense"),
        ("Muon", "Muon cannot train the plane workload: Muon: its parameters must be matrices"),
    ],
)  # fmt: skip
def test_an_optimizer_that_cannot_train_the_workload_is_said_before_the_first_run(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        compare(small.plane, [name])
    comparison = compare(small.plane, [name, "torch:SGD"], lrs=[0.1], seeds=1)
    assert (comparison.results[0].standings[1].failed or "").startswith(message)
    assert comparison.results[0].standings[0].best.finished


def broken(**changes: Any) -> Any:
    def make(seed: int) -> Task:
        return replace(small.plane(seed), **changes)

    return make


def raising(*_: object) -> Any:
    raise RuntimeError("no\nfile")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workloads": raising}, "raising: the function raised RuntimeError: no file"),
        ({"workloads": broken(loss=raising)}, "make: loss raised RuntimeError: no file"),
        ({"workloads": broken(evaluate=raising)}, "make: evaluate raised RuntimeError: no file"),
        ({"workloads": broken(loss=lambda m, b: m(b[0]).sum() * math.nan)}, "make: the loss of the first batch is nan"),
        (
            {"workloads": broken(model=torch.nn.ReLU())},
            "make: the function raised ValueError: Task: the model has no par",
        ),
        ({"workloads": broken(metric="accuracy")}, "make: evaluate must give 'accuracy', got 'loss', 'error'"),
        ({"workloads": small.endless}, "endless: the function must return a schuss.lab.workload.Task, got generator"),
        ({"workloads": "digit"}, "unknown workload 'digit': did you mean 'digits'?"),
        ({"workloads": ["small_workloads:plain"]}, "module 'small_workloads' has no 'plain': did you mean 'plane'?"),
        ({"workloads": []}, "at least one workload is needed"),
        ({"workloads": [small.plane, Workload("plane", "", small.ravine)]}, "two workloads are called 'plane'"),
        ({"seeds": 0}, "seeds must be a count in [1, 10000] or integers in [0, 2**63), got 0"),
        ({"confirm": -1}, "compare: confirm must be an integer in [0, inf), got -1"),
        ({"seeds": [1, -1]}, "seeds must be a count in [1, 10000] or integers in [0, 2**63), got [1, -1]"),
        ({"epochs": 0}, "compare: epochs must be an integer in [1, inf), got 0"),
        ({"extend": -1}, "compare: extend must be an integer in [0, inf), got -1"),
        ({"threads": 0}, "compare: threads must be an integer in [1, inf), got 0"),
        ({"warmup": 1.0}, "compare: warmup must be in [0, 1), got 1.0"),
        ({"jobs": 0}, "compare: jobs must be an integer in [1, inf), got 0"),
        ({"jobs": 2, "workloads": broken()}, "make cannot be sent to another process, "),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        compare(**({"workloads": small.plane, "optimizers": ["torch:SGD"], "lrs": [0.1]} | arguments))


def test_threads_are_those_that_were_asked_for_and_then_those_of_before() -> None:
    seen = set()

    def counting(seed: int) -> Task:
        seen.add(torch.get_num_threads())
        return small.plane(seed)

    compare(counting, ["torch:SGD"], lrs=[0.1], seeds=1, threads=2)
    assert (seen, torch.get_num_threads()) == ({2}, 1)


def test_processes_give_the_same_numbers_and_one_that_dies_is_a_failed_run() -> None:
    """The second optimizer kills the process that it is in."""
    arguments: dict[str, Any] = {"lrs": [0.01, 0.1], "seeds": 1, "epochs": 3}
    several = compare(small.plane, ["AdamW", "small_workloads:Deadly"], **arguments, jobs=2)
    alone = compare(small.plane, ["AdamW"], **arguments)
    assert [untimed(r) for r in several.runs if r.optimizer == "AdamW"] == list(map(untimed, alone.runs))
    deaths = {run.error for run in several.runs if run.optimizer != "AdamW"}
    assert deaths == {"its process ended with exit code -9"}
    assert len(several.runs) == several.total


# --- the store --------------------------------------------------------------------------------------------------------


def count(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])


def test_finished_runs_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "runs.sqlite"
    first = compare(small.plane, **SMALL, store=path)
    assert (first.recalled, count(path)) == (0, len(first.runs))
    with monkeypatch.context() as patched:
        patched.setattr("schuss.lab.compare.attempt", raising)
        again = compare(small.plane, **SMALL, store=path)
    assert again.runs == first.runs
    assert (again.recalled, str(again)) == (len(first.runs), str(first))
    more = compare(small.plane, ["torch:SGD", "AdamW", "Lion"], lrs=[0.01, 0.1], seeds=3, store=path)
    assert more.recalled == len(first.runs)
    assert count(path) == len(more.runs)
    assert sorted(path.parent.iterdir()) == [path]


CHANGED: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 3},
    "warmup": {"warmup": 0.5},
    "threads": {"threads": 2},
    "seeds": {"seeds": [7]},
    "lrs": {"lrs": [0.2]},
    "optimizer": {"optimizers": ["torch:Adam"]},
    "arguments": {"optimizers": [Candidate("torch:SGD", torch.optim.SGD, (0.1,), {"momentum": 0.5})]},
    "build": {"optimizers": [Candidate("torch:SGD", small.Seen, (0.1,))]},
    "partial": {"optimizers": [Candidate("torch:SGD", partial(torch.optim.SGD, momentum=0.1), (0.1,))]},
    "workload": {"workloads": small.ravine},
    "first weights": {"workloads": Workload("plane", "", lambda seed: small.plane(seed + 1))},
    "batches": {"workloads": Workload("plane", "", lambda seed: _with(seed, batches=small.plane(seed).batches[:3]))},
    "loss": {"workloads": Workload("plane", "", lambda seed: _with(seed, loss=lambda m, b: m(b[0]).square().mean()))},
    "metric": {"workloads": Workload("plane", "", lambda seed: _with(seed, metric="loss"))},
}


def _with(seed: int, **changes: Any) -> Task:
    return replace(small.plane(seed), **changes)


@pytest.mark.parametrize("what", CHANGED)
def test_whatever_decides_the_numbers_makes_another_run(tmp_path: Path, what: str) -> None:
    arguments: dict[str, Any] = {"workloads": small.plane, "optimizers": ["torch:SGD"], "lrs": [0.1], "seeds": 1}
    compare(**arguments, store=tmp_path / "s")
    assert compare(**arguments, store=tmp_path / "s").recalled == 1
    changed = arguments | CHANGED[what]
    if isinstance(changed["optimizers"][0], Candidate):
        changed["lrs"] = None
    assert compare(**changed, store=tmp_path / "s").recalled == 0


TARGET = 0.0


def test_another_target_makes_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its file had it from elsewhere."""
    found, workload = [], Workload("plane", "", lambda seed: _with(seed, target=TARGET))
    for target in (1e-9, 10.0):
        monkeypatch.setitem(globals(), "TARGET", target)
        comparison = compare(workload, ["torch:SGD"], lrs=[0.1], seeds=1, store=tmp_path / "s")
        found.append((comparison.recalled, comparison.results[0].standings[0].best.reached))
    assert found == [(0, 0), (1, 1)]


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("not a database, and longer than a header: " * 10)
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE runs (a)")
    before = text.read_bytes(), other.read_bytes()
    for path in (text, other, tmp_path):
        with pytest.raises(OSError, match=re.escape(str(path))):
            compare(small.plane, ["torch:SGD"], lrs=[0.1], seeds=1, store=path)
    assert (text.read_bytes(), other.read_bytes()) == before


def test_a_run_comes_back_from_the_store_as_it_was(tmp_path: Path) -> None:
    runs = [made("A", 1e-3, 0.1 + 0.2), made("A", 0.1, 0.5, loss=math.inf)]
    with Store(tmp_path / "s") as store, Store(tmp_path / "s") as other:
        for i, run in enumerate(runs):
            store.put({"i": i}, run)
            assert other.get({"i": i}) == run
        nan = made("A", 0.1, 0.5, loss=math.nan)
        store.put({"i": 9}, nan)
        assert repr(other.get({"i": 9})) == repr(nan)
        assert other.get({"i": 3}) is None


def test_ctrl_c_leaves_a_report_and_the_same_call_goes_on(tmp_path: Path) -> None:
    whole = compare(small.plane, **SMALL)

    def interrupting(run: Run, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    path = tmp_path / "s"
    part = compare(small.plane, **SMALL, store=path, on_run=interrupting)
    assert part.interrupted
    assert (len(part.runs), count(path)) == (3, 3)
    assert f"Interrupted: 3 of {part.total} runs" in str(part)
    part.save(tmp_path / "out")
    assert "Interrupted: 3 of" in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert numbers(part.run(store=path)) == numbers(whole)
    again = compare(small.plane, **SMALL, store=path)
    assert (again.recalled, numbers(again)) == (len(whole.runs), numbers(whole))


def environment() -> dict[str, str]:
    folders = [str(Path(__file__).parent), str(Path(optim.__file__).parents[2]), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


SCRIPT = """
import sys, time
import small_workloads as small
from schuss.lab.compare import compare

def slowly(run, done, total):
    print(done, flush=True)
    time.sleep(0.05)

if __name__ == "__main__":
    compare([small.plane, small.ravine], ["torch:SGD", "AdamW"], lrs=[0.01, 0.1], seeds=2, threads=1,
            jobs=int(sys.argv[2]), store=sys.argv[1], on_run=slowly)
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_at_a_random_moment_and_continued_equals_not_killed(tmp_path: Path, jobs: str) -> None:
    path, script = tmp_path / "runs.sqlite", tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments: dict[str, Any] = {"optimizers": ["torch:SGD", "AdamW"], "lrs": [0.01, 0.1], "seeds": 2}
    process = subprocess.Popen(
        [sys.executable, str(script), str(path), jobs], stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        after = random.randrange(1, 12)
        for line in process.stdout:
            if int(line) == after:
                time.sleep(0.1 * random.random())
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    there = count(path)
    assert after <= there <= after + 4, (after, there)
    continued = compare([small.plane, small.ravine], **arguments, store=path)
    assert continued.recalled == there
    whole = compare([small.plane, small.ravine], **arguments)
    assert len(whole.runs) > there
    assert numbers(continued) == numbers(whole)


# --- report -----------------------------------------------------------------------------------------------------------


def figures(page: str) -> list[list[dict[str, object]]]:
    """The traces of each figure on the page."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    return [figure["data"] for figure in json.loads(found[1])] if found else []


class References(HTMLParser):
    """Collects what the page would load, and its text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str | None] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in {"src", "href", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.text.append(data)


def parsed(page: str) -> References:
    references = References()
    references.feed(page)
    return references


def test_page_needs_nothing_from_outside_and_shows_every_optimizer(compared: Comparison) -> None:
    [result] = compared.results
    page = report.to_html(compared, command="schuss compare --lrs '<1>'")
    references = parsed(page)
    assert references.loaded == []
    assert "@import" not in page.split("</style>")[0]
    text = " ".join(references.text)
    for cell in (cell for row in table(result.standings) for cell in row):
        assert cell in text
    assert "schuss compare --lrs '<1>'" in text
    assert f"torch {torch.__version__}" in text

    accuracy, *others = figures(page)
    assert len(others) == 4
    for figure in (accuracy, *others):
        assert {trace["legendgroup"] for trace in figure} == {"torch:SGD", "torch:AdamW"}
    for standing in result.standings:
        [trace] = [trace for trace in accuracy if trace["name"] == standing.optimizer]
        first, second = (run.test_accuracy for run in standing.best.runs)
        assert trace["y"] == pytest.approx([50 * (a + b) for a, b in zip(first, second, strict=True)])


def test_sensitivity_shows_every_learning_rate_and_marks_divergence() -> None:
    comparison = compare(small.ravine, ["torch:SGD"], lrs=[0.01, 0.03, 1e30], seeds=1)
    _, (finished, diverged), _ = figures(report.to_html(comparison))
    finals = [run.test_loss[-1] for run in comparison.runs[:2]]
    assert (finished["x"], finished["y"]) == ([0.01, 0.03], pytest.approx(finals))
    assert diverged["x"] == [1e30]


def test_a_comparison_in_which_everything_diverged_still_has_a_report() -> None:
    comparison = compare(small.ravine, ["torch:SGD"], lrs=[1e30], seeds=1)
    assert "Diverged: torch:SGD at lr 1e+30 (1 of 1 runs)." in report.to_html(comparison)


def test_what_users_wrote_is_text() -> None:
    """Names and descriptions, in the page and in what Plotly draws."""
    evil = "<img src=x>$title</script>"
    workload = Workload(evil, evil, partial(_with, metric="error", evaluate=_evil))
    comparison = compare(workload, [Candidate(evil, small.Seen, (0.1,))], seeds=1)
    page = report.to_html(comparison, command=evil)
    references = parsed(page)
    assert references.loaded == []
    assert "img" not in references.tags
    assert references.tags.count("script") == parsed(
        report.to_html(compare(small.plane, ["AdamW"], seeds=1))
    ).tags.count("script")
    assert evil in " ".join(references.text)
    for trace in (trace for figure in figures(page) for trace in figure):
        assert "<img" not in f"{trace['name']}{trace['hovertemplate']}"


def _evil(model: torch.nn.Module) -> dict[str, float]:
    return {"loss": 1.0, "error": 2.0, "<img src=y>": 3.0}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_every_number_is_in_the_files(tmp_path: Path) -> None:
    comparison = compare([small.plane, small.ravine], ["torch:SGD", "small_workloads:Tired"], lrs=[0.01, 0.03], seeds=2)
    files = comparison.save(tmp_path / "out", command="schuss compare")
    names = ["compare.html", "compare.json", "standings.csv", "runs.csv", "curves.csv"]
    assert [file.name for file in files] == names
    document = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    tables = {name: rows(tmp_path / "out" / f"{name}.csv") for name in ("standings", "runs", "curves")}
    assert document["command"] == "schuss compare"
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["threads"] == "1"
    assert len(document["runs"]) == len(tables["runs"]) == len(comparison.runs) == document["runs_made"]
    for record, row, run in zip(document["runs"], tables["runs"], comparison.runs, strict=True):
        assert row["status"] == record["status"] == comparison.goals[run.workload].status(run)
        assert (row["optimizer"], float(row["lr"]), int(row["seed"])) == (run.optimizer, run.lr, run.seed)
        assert tuple(record["train_loss"]) == run.train_loss
        assert {name: tuple(record[f"test_{name}"]) for name in run.test} == run.test
        if run.test:
            assert float(row["final_loss"]) == run.test_loss[-1]
        assert row["error"] == (run.error or "")
    standings = [(r, s) for r in comparison.results for s in r.standings]
    recorded = [(w, s) for w in document["workloads"] for s in w["standings"]]
    for (result, standing), (goal, record) in zip(standings, recorded, strict=True):
        assert (goal["workload"], goal["metric"]) == (result.goal.workload, result.goal.metric)
        assert (record["optimizer"], record["best"]["lr"]) == (standing.optimizer, standing.best.lr)
        [row] = [
            row for row in tables["standings"]
            if (row["workload"], row["optimizer"], row["best"]) == (goal["workload"], record["optimizer"], "True")
        ]  # fmt: skip
        assert float(row["lr"]) == standing.best.lr
        if standing.best.finished:
            mean = standing.best.score
            assert record["best"]["final"][goal["metric"]] == {"mean": mean.value, "standard_error": mean.error}
            assert float(row[f"{goal['metric']}_mean"]) == mean.value
        assert float(row["score_by_steps"]) == comparison.profile().score(standing.optimizer)
    assert len(tables["curves"]) == sum(len(run.steps) for run in comparison.runs)
    profile = document["profiles"]["steps"]["optimizers"]["torch:SGD"]
    assert profile["score"] == comparison.profile().score("torch:SGD")


def test_numbers_that_are_not_finite_are_null_and_empty(tmp_path: Path) -> None:
    compare(small.ravine, ["torch:SGD"], lrs=[1e30], seeds=1).save(tmp_path)
    [record] = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["runs"]
    assert record["train_loss"][-1] is None
    assert record["status"] == "diverged"
    [row] = rows(tmp_path / "runs.csv")
    assert row["steps_to_target"] == ""
