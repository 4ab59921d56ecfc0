"""Tuning: numbers against closed forms, the same points whatever stops it, and that it leaves no trace."""

import csv
import importlib
import inspect
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from scipy import stats
from torch import nn
from typer.testing import CliRunner

import schuss
from schuss import optim
from schuss.cli import app, main
from schuss.lab.candidate import candidates
from schuss.lab.spaces import TABLE, limits, space, table
from schuss.lab.tune import Search, tune
from schuss.lab.tuning import Confirmation, Tuning
from schuss.lab.workload import Task, Workload

CURVATURES = (1.0, 10.0)
PLAIN = {"momentum": 0.0, "nesterov": False}
"""Gradient descent, of which everything is known."""


class Bowl(nn.Module):
    """½ Σ h θ², from θ = 1."""

    def __init__(self, *curvatures: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))
        self.register_buffer("h", torch.tensor(curvatures, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.h * self.theta**2).sum()


def bowl(seed: int, *, epochs: int = 1, curvatures: tuple[float, ...] = CURVATURES) -> Task:
    """A quadratic without noise, of one step in an epoch."""
    return Task(Bowl(*curvatures), [0], lambda m, b: m(), lambda m: {"loss": m().item()}, "loss", 1e-3, epochs, 1)


def bowls(epochs: int) -> Workload:
    return Workload("bowl", "a quadratic", lambda seed: bowl(seed, epochs=epochs))


def noisy(seed: int) -> Task:
    """A bowl whose end depends on the seed."""
    task = bowl(seed, epochs=2)
    shift = 1e-2 * float(np.random.RandomState(seed).normal())
    return replace(task, evaluate=lambda m: {"loss": m().item() + shift})


def fallen(lr: float, steps: int) -> float:
    """The loss after gradient descent whose rate falls linearly to zero: 1 - lr h (1 - t / T) is a factor of each θ."""
    h = np.array(CURVATURES)
    theta = np.prod([1 - lr * (1 - t / steps) * h for t in range(steps)], axis=0)
    return float(0.5 * (h * theta**2).sum())


def opened(workload: Workload, optimizer: str, **given: Any) -> Search:
    """A study that is open, with the defaults of `tune`."""
    arguments = inspect.signature(tune).bind(workload, optimizer, **given)
    arguments.apply_defaults()
    return Search(*arguments.args, **arguments.kwargs)


def found(tuning: Tuning) -> list[tuple[Any, ...]]:
    """Everything but times and numbers, which differ if a trial has been begun twice."""
    rows = [(t.origin, tuple(t.params.items()), tuple(t.values.items()), t.failure) for t in tuning.trials]
    return sorted(rows, key=repr)


def refuse(*_: Any) -> float:
    raise RuntimeError("no such\n  layer")


# --- what is trained, and what wins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "halton", "grid"])
def test_the_rate_is_the_best_in_closed_form(sampler: str) -> None:
    """One step leaves ½ Σ h (1 - γ h)², which is least at γ = Σ h² / Σ h³."""
    h = np.array(CURVATURES)
    best = (h**2).sum() / (h**3).sum()
    tuned = tune(bowls(1), "torch:SGD", trials=40, names=["lr"], settings=PLAIN, sampler=sampler, seeds=0)
    assert tuned.best.arguments["lr"] == pytest.approx(best, rel={"tpe": 0.03, "halton": 0.2, "grid": 0.2}[sampler])
    assert tuned.best.value == pytest.approx(fallen(tuned.best.arguments["lr"], 1), rel=1e-9)
    assert tuned.best.value == min(trial.value for trial in tuned.trials if trial.values)


def test_every_training_of_every_rung_is_a_complete_schedule() -> None:
    tuned = tune(bowls(9), "torch:SGD", trials=27, names=["lr"], settings=PLAIN, seeds=0, sampler="halton", extend=0)
    assert tuned.rungs == (1, 3, 9)
    assert len(tuned.trials) == 27
    for trial in tuned.trials:
        for epochs, value in trial.values.items():
            assert value == pytest.approx(fallen(trial.arguments["lr"], epochs), rel=1e-9)


def test_the_best_third_goes_on() -> None:
    tuned = tune(bowls(9), "torch:SGD", trials=27, names=["lr"], settings=PLAIN, seeds=0, sampler="halton", extend=0)
    for shorter, longer in ((1, 3), (3, 9)):
        here = sorted((trial for trial in tuned.trials if shorter in trial.values), key=lambda t: t.values[shorter])
        gone = [trial for trial in here if longer in trial.values]
        third = here[: len(here) // 3]
        assert all(trial in gone for trial in third)
        # Those that were among the best third when fewer had been seen come on top, and they are few.
        assert len(third) <= len(gone) <= len(third) + 2
    assert tuned.best.epochs == 9


@pytest.mark.parametrize(
    ("trials", "epochs", "rungs", "expected"),
    [
        (20, 15, None, (2, 5, 15)),
        (8, 9, None, (3, 9)),
        (2, 9, None, (9,)),
        (20, 2, None, (2,)),
        (20, 30, 4, (1, 3, 10, 30)),
        (20, 30, 1, (30,)),
    ],
)
def test_rungs(trials: int, epochs: int, rungs: int | None, expected: tuple[int, ...]) -> None:
    assert opened(bowls(epochs), "torch:SGD", trials=trials, rungs=rungs).rungs == expected


def test_somebody_arrives_however_few_there_are_and_whoever_fails_on_the_way() -> None:
    long: list[float] = []

    def fragile(seed: int) -> Task:
        """The first that is trained for nine steps raises."""
        task, steps = bowl(seed, epochs=9), []

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            steps.append(0)
            if len(steps) == 9:
                long.append(0)
                if len(long) == 1:
                    raise RuntimeError("broken")
            return model()

        return replace(task, loss=loss)

    tuned = tune(Workload.of(fragile), "torch:SGD", trials=9, names=["lr"], settings=PLAIN, seeds=0, extend=0)
    assert [trial.failure for trial in tuned.trials if trial.failure] == ["RuntimeError: broken"]
    assert tuned.best.epochs == 9
    assert tuned.best.failure is None


def test_a_metric_of_which_more_is_better() -> None:
    def upside_down(seed: int) -> Task:
        evaluate = lambda m: {"loss": 0.0, "merit": -m().item()}  # noqa: E731
        return replace(bowl(seed), evaluate=evaluate, metric="merit", better="higher")

    tuned = tune(Workload.of(upside_down), "torch:SGD", trials=20, names=["lr"], settings=PLAIN, seeds=2)
    assert tuned.best.arguments["lr"] == pytest.approx(1010 / 10010 * 10 / 10, rel=0.1)
    assert tuned.best.value == max(trial.value for trial in tuned.trials)


# --- the same points, whatever happens -------------------------------------------------------------------------------

SETTING: dict[str, Any] = {"trials": 12, "names": ["lr", "weight_decay"], "settings": PLAIN, "seeds": 1}


def test_the_same_seed_finds_the_same_and_another_seed_does_not() -> None:
    first, again, other = (tune(bowls(9), "torch:SGD", seed=seed, **SETTING) for seed in (3, 3, 4))
    assert found(first) == found(again)
    assert [t.number for t in first.trials] == [t.number for t in again.trials]
    assert first.confirmed == again.confirmed
    assert not {t.params["lr"] for t in first.trials} & {t.params["lr"] for t in other.trials}


def test_nothing_of_the_caller_changes() -> None:
    model, generator = Bowl(*CURVATURES), torch.Generator().manual_seed(5)
    data = torch.utils.data.DataLoader([0.0, 1.0], shuffle=True, generator=generator)
    seen: list[float] = []

    def mine(seed: int) -> Task:
        """Hands out the same model each time, and is not careful with random numbers and threads."""
        random.random(), np.random.random(), torch.rand(1)
        torch.set_num_threads(1)
        seen.append(model.theta[0].item())
        return Task(model, data, lambda m, b: m(), lambda m: {"loss": m().item()}, "loss", 1e-3, 1, 1)

    parameter, memory = model.theta, model.theta.data_ptr()
    model.theta.grad = torch.full_like(model.theta, 7.0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), generator.get_state()
    threads = torch.get_num_threads()
    verbosity = optuna.logging.get_verbosity()
    torch.set_num_threads(2)
    tuned = tune(Workload.of(mine), optim.SGD, trials=4, seeds=1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert {*seen} == {1.0}
    assert model.theta is parameter
    assert model.theta.data_ptr() == memory
    assert model.theta.tolist() == [1.0, 1.0]
    assert model.theta.grad is not None
    assert model.theta.grad.tolist() == [7.0, 7.0]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), generator.get_state()
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(states, after, strict=True))
    assert optuna.logging.get_verbosity() == verbosity
    assert len({trial.value for trial in tuned.trials}) > 1


def stopping(at: int, stop: Callable[[], None]) -> Workload:
    """Does something in the middle of its training number `at`."""
    begun: list[int] = []

    def make(seed: int) -> Task:
        begun.append(seed)
        task = bowl(seed, epochs=9)

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            if len(begun) == at:
                stop()
            return model()

        return replace(task, loss=loss)

    return Workload("bowl", "a quadratic", make)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", [5, 12])
def test_after_ctrl_c_the_study_goes_on_with_the_points_it_would_have_had(tmp_path: Path, at: int) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'tune.db'}"
    whole = tune(bowls(9), "torch:SGD", **SETTING)
    with pytest.raises(KeyboardInterrupt):
        tune(stopping(at, interrupt), "torch:SGD", storage=url, **SETTING)
    half = opened(bowls(9), "torch:SGD", storage=url, **SETTING)
    before = half.result()
    assert 0 < len(before.trials) < len(whole.trials)
    assert not any(trial.running for trial in before.trials)
    assert before.ranked
    half.run()
    assert found(half.result()) == found(whole)
    assert half.result().confirmed == whole.confirmed
    half.close()
    counted = opened(stopping(2, lambda: pytest.fail("nothing is left to train")), "torch:SGD", storage=url, **SETTING)
    counted.run()
    assert found(counted.result()) == found(whole)
    counted.close()


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_after_a_kill_the_trial_that_ran_is_tried_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tune.db'}"
    code = (
        f"import os, sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
        "from test_tune import SETTING, stopping, tune\n"
        f"tune(stopping(7, lambda: os.kill(os.getpid(), 9)), 'torch:SGD', storage={url!r}, **SETTING)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    search = opened(bowls(9), "torch:SGD", storage=url, **SETTING)
    [running] = [trial for trial in search.result().trials if trial.running]
    search.run()
    whole = tune(bowls(9), "torch:SGD", **SETTING)
    assert found(search.result()) == found(whole)
    state = {trial.number: trial.state for trial in search.study.get_trials(deepcopy=False)}
    assert state[running.number] == TrialState.FAIL
    search.close()


def test_more_trials_go_on_from_those_that_are_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tune.db'}"
    arguments: dict[str, Any] = {"settings": PLAIN, "seeds": 0, "extend": 0, "storage": url, "sampler": "halton"}
    few = tune(bowls(9), "torch:SGD", trials=5, **arguments)
    more = tune(bowls(9), "torch:SGD", trials=30, **arguments)  # which would else tune more
    assert more.rungs == few.rungs == (3, 9)
    assert [*more.ranges] == ["lr"]
    assert len(more.trials) == 30
    assert [dict(t.params) for t in more.trials[:5]] == [dict(t.params) for t in few.trials]


def test_trials_that_somebody_puts_into_the_queue_are_trained_too() -> None:
    storage = optuna.storages.InMemoryStorage()
    search = opened(bowls(9), "torch:SGD", trials=9, names=["lr"], settings=PLAIN, seeds=0, storage=storage, extend=0)
    search.study.enqueue_trial({"lr": 0.0123})
    search.study.enqueue_trial({})
    search.run()
    tuned = search.result()
    given = [trial for trial in tuned.trials if trial.origin == "given"]
    assert [trial.params["lr"] for trial in given] == pytest.approx([0.0123, math.sqrt(0.01 * 5)])
    assert given[0].values[1] == pytest.approx(fallen(0.0123, 1))
    assert len(tuned.trials) == 11
    assert tuned.best.epochs == 9


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "was begun with seed 0, got 1; choose another name for the study"),
        ({"sampler": "grid"}, "was begun with sampler tpe, got grid"),
        ({"ranges": {"lr": (1e-3, 1.0)}}, r"with ranges \{'lr': \[0.01, 5.0\]\}, got \{'lr': \[0.001, 1.0\]\}"),
        ({"settings": {"momentum": 0.5}}, "was begun with fixed "),
        ({"rungs": 1}, r"was begun with rungs \[1, 3, 9\], got \[9\]"),
    ],
)  # fmt: skip
def test_another_tuning_does_not_go_on_with_this_study(other: dict[str, Any], message: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    tune(bowls(9), "torch:SGD", trials=9, settings=PLAIN, seeds=0, storage=storage)
    with pytest.raises(ValueError, match=message):
        tune(bowls(9), "torch:SGD", **{"trials": 9, "settings": PLAIN, "seeds": 0, "storage": storage, **other})
    optuna.create_study(storage=storage, study_name="mine").add_trial(optuna.create_trial(value=0.0))
    with pytest.raises(ValueError, match="study 'mine' was not begun by tune; choose another name"):
        tune(bowls(9), "torch:SGD", storage=storage, study="mine")


def test_several_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "work_of_several.py").write_text(
        "import os, pathlib, time, torch\n"
        "from schuss.lab.workload import Task\n"
        "def slow(seed):\n"
        f"    with open({str(tmp_path / 'who')!r}, 'a') as f: print(os.getpid(), file=f)\n"
        f"    while len({{*pathlib.Path({str(tmp_path / 'who')!r}).read_text().split()}}) < 2: time.sleep(0.1)\n"
        "    loss = lambda m, b: m(b).sum() ** 2\n"
        "    return Task(torch.nn.Linear(1, 1), [torch.ones(1)], loss, lambda m: {'loss': 0.0}, 'loss', 0.1, 1, 1)\n"
    )
    (tmp_path / "who").write_text("1\n2\n")  # who waits for another, before there is one
    slow = Workload.of(importlib.import_module("work_of_several").slow)
    url = f"sqlite:///{tmp_path / 'tune.db'}"
    arguments: dict[str, Any] = {"trials": 12, "names": ["lr"], "seeds": 0, "extend": 0, "sampler": "halton"}
    search = opened(slow, "torch:SGD", jobs=2, storage=url, **arguments)
    (tmp_path / "who").write_text("")
    search.run()
    tuned = search.result()
    search.close()
    assert len({*(tmp_path / "who").read_text().split()}) == 2
    assert tuned.remarks == ()
    alone = tune(slow, "torch:SGD", **arguments)
    assert sorted(t.params["lr"] for t in tuned.trials) == sorted(t.params["lr"] for t in alone.trials)
    with pytest.raises(
        ValueError, match="jobs > 1 need a workload and an optimizer that are functions or classes of a"
    ):
        tune(bowls(1), "torch:SGD", jobs=2, storage=f"sqlite:///{tmp_path / 'other.db'}")


# --- what has no number ----------------------------------------------------------------------------------------------


def test_divergence_is_recorded_told_to_the_sampler_and_does_not_stop_the_study() -> None:
    storage = optuna.storages.InMemoryStorage()
    deep = Workload("deep", "", lambda seed: replace(bowl(seed), batches=[0] * 600))
    tuned = tune(
        deep, "torch:SGD", trials=8, ranges={"lr": (1e-2, 1e3)}, settings=PLAIN, sampler="grid", rungs=1, seeds=0,
        storage=storage, extend=0,
    )  # fmt: skip
    [study] = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=study, storage=storage).trials
    for trial, one in zip(tuned.trials, trials, strict=True):
        lr, theta, step = trial.arguments["lr"], np.ones(2), 0
        with np.errstate(over="ignore", invalid="ignore"):  # the same in NumPy, to the step at which it overflows
            while step < 600 and math.isfinite(0.5 * (CURVATURES * theta**2).sum()):
                theta, step = theta * (1 - lr * (1 - step / 600) * np.array(CURVATURES)), step + 1
            last = 0.5 * (CURVATURES * theta**2).sum()
        if math.isfinite(last):
            assert (trial.failure, one.state) == (None, TrialState.COMPLETE)
        else:
            assert trial.failure == f"loss inf at step {step + 1} of 600"
            assert trial.values == {}
            assert one.state == TrialState.PRUNED
            assert one.constraints == {"finite": pytest.approx(2 - (step + 1) / 600)}
    failed = sum(trial.failure is not None for trial in tuned.trials)
    assert 0 < failed < 8
    assert f"{failed} of 8 failed; trial " in str(tuned)
    assert tuned.best.failure is None


def test_exceptions_are_recorded_and_do_not_stop_the_study() -> None:
    def picky(seed: int) -> Task:
        """Rehearses, but trains only with small rates."""
        task = bowl(seed)

        def evaluate(model: nn.Module) -> dict[str, float]:
            return {"loss": refuse() if model.theta[0] < 0.5 else model().item()}

        return replace(task, evaluate=evaluate)

    tuned = tune(Workload.of(picky), "torch:SGD", trials=8, names=["lr"], settings=PLAIN, sampler="grid", seeds=1)
    failures = {trial.failure for trial in tuned.trials}
    assert failures == {None, "RuntimeError: no such layer"}
    assert all((trial.failure is None) == (trial.arguments["lr"] <= 0.5) for trial in tuned.trials)


def test_if_nothing_has_a_value_it_says_why() -> None:
    everywhere = Workload("bowl", "", lambda seed: replace(bowl(seed), evaluate=refuse))
    tuned = tune(everywhere, "torch:SGD", trials=3, seeds=2)
    with pytest.raises(ValueError, match="no trial of torch:SGD on bowl has a value: RuntimeError: no such layer"):
        _ = tuned.best
    assert "3 trials of 1 epochs, 3 of them failed." in str(tuned)
    assert tuned.confirmed is None
    assert tuned.record()["best"] is None


def test_an_optimizer_that_cannot_train_it_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="torch:LBFGS cannot train the bowl workload: "):
        tune(bowls(1), "torch:LBFGS", trials=3)


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_a_range_whose_end_is_the_best_is_extended_until_it_is_not() -> None:
    storage = optuna.storages.InMemoryStorage()
    arguments: dict[str, Any] = {"trials": 8, "ranges": {"lr": (1e-5, 1e-3)}, "settings": PLAIN, "seeds": 0}
    tuned = tune(bowls(1), "torch:SGD", storage=storage, extend=5, **arguments)
    best = 1010 / 10010 * 10 / 10  # as above
    assert 0.3 < tuned.best.arguments["lr"] / best < 3
    assert tuned.best.origin == "extended"
    assert (tuned.ranges["lr"].low, tuned.ranges["lr"].high) == (1e-5, pytest.approx(1.0))
    beyond = [trial.params["lr"] for trial in tuned.trials if trial.origin == "extended"]
    assert beyond == pytest.approx([1e-3 * 10 ** (i / 3) for i in range(1, 10)])
    assert sum("so that" in line for line in tuned.remarks) == 3
    assert not any("may lie beyond" in line for line in tuned.remarks)
    # Optuna has a range of its own for each trial.
    [study] = optuna.get_all_study_names(storage)
    highs = {t.distributions["lr"].high for t in optuna.load_study(study_name=study, storage=storage).trials}
    assert sorted(highs) == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])


@pytest.mark.parametrize("extend", [0, 1])
def test_extension_is_bounded_and_the_end_is_told(extend: int) -> None:
    tuned = tune(
        bowls(1), "torch:SGD", trials=6, ranges={"lr": (1e-6, 1e-5)}, settings=PLAIN, seeds=0, extend=extend,
        sampler="grid",
    )  # fmt: skip
    assert len(tuned.trials) == 6 + 3 * extend
    assert tuned.best.params["lr"] == pytest.approx(1e-5 * 10**extend)
    assert any("is at the upper end" in line and "may lie beyond" in line for line in tuned.remarks)


def test_ranges_grow_downwards_too_but_not_where_things_break_or_past_their_bounds() -> None:
    down = tune(bowls(1), "torch:SGD", trials=6, ranges={"lr": (1.0, 10.0)}, settings=PLAIN, seeds=0, extend=3)
    assert down.best.params["lr"] < 0.25
    assert down.ranges["lr"].low == pytest.approx(0.01)
    tuned = tune(
        Workload("bowl", "", lambda seed: replace(bowl(seed), evaluate=lambda m: {"loss": 1.0})), "AdamW", trials=6,
        names=["lr", "weight_decay", "beta1"], seeds=0, extend=9, sampler="grid",
    )  # fmt: skip
    assert tuned.ranges["1-beta1"].high <= 0.9
    assert tuned.ranges["weight_decay"].low == 5e-3
    deep = Workload("deep", "", lambda seed: replace(bowl(seed), batches=[0] * 600))
    broken = tune(
        deep, "torch:SGD", trials=9, rungs=1, seeds=0,
        ranges={"lr": (1e-6, 1.0)}, settings=PLAIN, sampler="grid",
    )  # fmt: skip
    assert any(trial.failure for trial in broken.trials)
    assert broken.ranges["lr"].high == 1.0


def test_points_are_even_on_the_logarithm() -> None:
    grid = tune(bowls(1), "AdamW", trials=13, names=["lr", "weight_decay"], seeds=0, sampler="grid", extend=0)
    lrs, decays = ({trial.params[name] for trial in grid.trials} for name in ("lr", "weight_decay"))
    assert len(grid.trials) == 12
    assert sorted(lrs) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert sorted(decays) == pytest.approx([5e-3, math.sqrt(5e-3), 1.0])
    halton = tune(bowls(1), "AdamW", trials=32, names=["lr"], seeds=0, sampler="halton", extend=0)
    # Of 2^k points of base 2 one is in each of 2^k parts.
    parts = sorted(math.log10(trial.params["lr"] / 1e-4) / 3 for trial in halton.trials)
    assert [math.floor(32 * part) for part in parts] == [*range(32)]


@pytest.mark.parametrize(
    ("trials", "name", "expected"),
    [
        (9, "AdamW", ["lr"]),
        (10, "AdamW", ["lr", "1-beta1"]),
        (25, "AdamW", ["lr", "1-beta1", "weight_decay", "eps"]),
        (50, "AdamW", ["lr", "1-beta1", "weight_decay", "eps", "1-beta2"]),
        (10, "torch:SGD", ["lr", "1-momentum"]),
        (50, "Muon", ["lr", "1-momentum", "weight_decay"]),
        (50, "torch:RMSprop", ["lr", "1-alpha", "weight_decay", "eps"]),
        (50, "AdEMAMix", ["lr", "1-beta1", "weight_decay", "eps", "1-beta2", "1-beta3"]),
    ],
)
def test_the_number_of_trials_says_what_is_tuned(trials: int, name: str, expected: list[str]) -> None:
    [one] = candidates([name], [1.0])
    assert [*space(one.build, trials=trials, arguments=one.arguments).ranges] == expected


def test_ranges_of_the_table() -> None:
    def lr(name: str, **fixed: Any) -> tuple[float, float]:
        [one] = candidates([name], [1.0])
        row = space(one.build, trials=1, settings=fixed).ranges["lr"]
        return row.low, row.high

    adamw, sgd = lr("AdamW"), lr("SGD")
    assert adamw == lr("torch:AdamW") == lr("Muon", adjust_lr_fn="match_rms_adamw")
    assert lr("Lion") == pytest.approx((adamw[0] / 10, adamw[1] * 0.3))
    assert lr("ScheduleFreeSGD") == pytest.approx((10 * sgd[0], 50 * sgd[1]))
    assert lr("ScheduleFreeAdamW") == pytest.approx((adamw[0], 10 * adamw[1]))
    assert lr("Prodigy") == (0.5, 2.0)
    low, high = lr("Muon")
    assert math.sqrt(low * high) == pytest.approx(0.02)
    for cls in optim.RULES:
        chosen = space(cls, trials=50)
        assert next(iter(chosen.ranges)) == "lr"
        middle = chosen.arguments({name: row.at(0.5) for name, row in chosen.ranges.items()})
        cls([nn.Parameter(torch.ones(2, 2))], **middle)  # within all bounds
        assert chosen.ranges["lr"].source.strip()
    shown = table()
    assert all(row.optimizers in shown and row.source in shown for row in TABLE)


def test_what_is_fixed_and_what_is_given() -> None:
    one = space(optim.AdamW, trials=50, settings={"beta1": 0.8, "eps": 1e-6}, ranges={"beta2": (0.9, 0.99)})
    assert [*one.ranges] == ["lr", "weight_decay", "1-beta2"]
    assert (one.ranges["1-beta2"].low, one.ranges["1-beta2"].high) == (0.01, 0.1)
    made = one.arguments({"lr": 0.00123456, "weight_decay": 0.1, "1-beta2": 0.0123})
    assert made == {"lr": 0.001235, "betas": (0.8, 0.9877), "eps": 1e-6, "weight_decay": 0.1}
    assert one.default() == {"lr": 1e-3, "betas": (0.8, 0.999), "eps": 1e-6}
    assert "lr" not in space(optim.AdamW, trials=10, settings={"lr": 0.1}).ranges
    assert [*space(optim.AdamW, trials=50, settings={"betas": (0.8, 0.9)}).ranges] == ["lr", "weight_decay", "eps"]
    assert [*space(optim.SGD, trials=50, ranges={"momentum": (0.5, 0.9)}).ranges] == [
        "lr",
        "1-momentum",
        "weight_decay",
    ]
    assert [*space(optim.AdamW, trials=1, settings={"max_norm": 1.0}).ranges] == ["lr"]


class Mine(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.02, *, beta: float = 0.5) -> None:
        super().__init__(params, lr)


def test_a_class_that_is_not_in_the_table() -> None:
    row = space(Mine, trials=50).ranges["lr"]
    assert (row.low, row.high) == (0.0007, 0.6)
    tuned = tune(bowls(1), Mine, trials=10, seeds=0)
    assert tuned.line.startswith("Mine(params, lr=")
    required = space(lambda params, lr: torch.optim.SGD(params, lr), trials=1)
    assert (required.ranges["lr"].low, required.ranges["lr"].high) == (1e-4, 1e-1)
    assert required.default() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": 0}, r"tune: trials must be an integer in \[1, inf\), got 0"),
        ({"seeds": -1}, r"tune: seeds must be an integer in \[0, inf\), got -1"),
        ({"jobs": 2}, "tune: jobs > 1 need a storage that they share"),
        ({"sampler": "tpa"}, "tune: unknown sampler 'tpa': did you mean 'tpe'"),
        ({"rungs": 3}, "tune: 1 epochs are too few for 3 rungs"),
        ({"budget": "soon"}, "tune: budget must be like .*, got 'soon'"),
        ({"budget": "0s"}, "tune: budget must be like"),
        ({"names": ["lrr"]}, "tune: AdamW has no 'lrr' to tune: did you mean 'lr'"),
        ({"settings": {"momentum": 1}}, "tune: AdamW has no 'momentum' to set"),
        ({"settings": {"lr": 1}, "names": ["lr"]}, "tune: lr is both fixed and tuned"),
        ({"settings": {"lr": 1}, "trials": 5}, "tune: nothing is left to tune of AdamW"),
        ({"ranges": {"lr": (1.0, 0.1)}}, "tune: the range of lr must be 0 < low < high, got 1:0.1"),
        ({"ranges": {"1-beta1": (0.1, 1.0)}}, "tune: the range of 1-beta1 must end below 1, got 1"),
        ({"storage": "sqlit:///x:y"}, "tune: cannot open the storage 'sqlit:///x:y'.*a file is sqlite:///tune.db"),
        ({"storage": "nosuch://me:secret@host/db"}, r"cannot open the storage 'nosuch://me:\*\*\*@host/db'"),
    ],
)  # fmt: skip
def test_mistakes_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune(bowls(1), "AdamW", **arguments)


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("AdamW", {"max_norm": 1.0}),
        ("torch:SGD", {}),
        ("SGD", {}),
        ("Lion", {}),
        ("torch:RMSprop", {"centered": True}),
        ("ScheduleFreeAdamW", {"warmup_steps": 2}),
        ("AMSGrad", {}),
    ],
)
def test_the_line_builds_the_optimizer_that_was_trained(name: str, fixed: dict[str, Any]) -> None:
    [candidate] = candidates([name], [1.0])
    names = [*space(candidate.build, trials=50, arguments=candidate.arguments).ranges]
    tuned = tune(bowls(1), name, trials=3, seeds=0, settings=fixed, names=names, extend=0)
    params = [nn.Parameter(torch.ones(1))]
    built = eval(tuned.line, {"optim": optim, "schuss": schuss, "torch": torch, "params": params})
    rest = {key: value for key, value in tuned.best.arguments.items() if key != "lr"}
    expected = replace(candidate, arguments=rest).for_model(nn.ParameterList(params), tuned.best.arguments["lr"])
    assert type(built) is type(expected)
    keys = [key for key in expected.param_groups[0] if key != "params"]
    assert [built.param_groups[0][key] for key in keys] == [expected.param_groups[0][key] for key in keys]
    for key, value in tuned.best.arguments.items():
        assert built.param_groups[0].get(key, value) == value
    # And what was varied is in it.
    assert len(tuned.ranges) >= 3
    for key, value in tuned.best.params.items():
        if key == "1-beta1":
            assert built.param_groups[0]["betas"][0] == pytest.approx(1 - value, abs=1e-3)
        elif not key.startswith("1-"):
            assert built.param_groups[0][key] == pytest.approx(value, rel=1e-3)


def test_the_best_and_the_default_are_trained_from_seeds_that_were_not_tuned_on() -> None:
    tuned = tune(Workload.of(noisy), "torch:SGD", trials=8, settings=PLAIN, seeds=5, seed=2)
    confirmed = tuned.confirmed
    assert confirmed is not None
    assert confirmed.seeds == (3, 4, 5, 6, 7)

    def expected(lr: float) -> list[float]:
        return [fallen(lr, 2) + 1e-2 * np.random.RandomState(seed).normal() for seed in confirmed.seeds]

    tried, default = expected(tuned.best.arguments["lr"]), expected(1e-3)
    assert confirmed.tuned == pytest.approx(tried)
    assert confirmed.default == pytest.approx(default)
    assert confirmed.default_arguments == {"lr": 1e-3, **PLAIN}
    assert (confirmed.mean.value, confirmed.mean.error) == pytest.approx((np.mean(tried), stats.sem(tried)))
    assert confirmed.default_mean is not None
    assert confirmed.default_mean.error == pytest.approx(stats.sem(default))
    text = f"{np.mean(tried):.5g} ± {stats.sem(tried):.2g}; with the default, lr 0.001: {np.mean(default):.5g} ± "
    assert text in str(tuned)
    assert "; better (p < 0.001)." in str(tuned)
    assert confirmed.grain < 0.01  # though some settings ended far off


def test_the_verdict_is_the_paired_t_test() -> None:
    a, b = (0.50, 0.52, 0.47, 0.55), (0.53, 0.54, 0.51, 0.56)
    confirmed = Confirmation((1, 2, 3, 4), a, b, {"lr": 1.0})
    assert confirmed.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6)
    for changed in ({"tuned": (*a[:3], math.nan)}, {"tuned": a[:1], "default": b[:1]}, {"default": ()}):
        assert math.isnan(replace(confirmed, **changed).p)


def test_equal_differences_of_a_coarse_metric_are_no_certainty() -> None:
    """Two of 72 images each time: t = 2 / sqrt(1 / 6 / 3), of the rounding alone."""
    tuned, default = (70 / 72, 71 / 72, 72 / 72), (68 / 72, 69 / 72, 70 / 72)
    confirmed = Confirmation((1, 2, 3), tuned, default, {"lr": 1.0}, grain=1 / 72)
    assert confirmed.p == pytest.approx(2 * stats.t.sf(2 * math.sqrt(18), 2), rel=1e-6)

    def counted(seed: int) -> Task:
        task = bowl(seed)
        return replace(task, evaluate=lambda model: {"loss": (8 * float(task.evaluate(model)["loss"]) // 1) / 8})

    found = tune(Workload("counted", "", counted), "torch:SGD", trials=6, seeds=3)
    assert found.confirmed is not None
    assert found.confirmed.grain >= 1 / 8


def test_time_scale_of_the_weight_decay() -> None:
    many = Workload("bowl", "", lambda seed: replace(bowl(seed), batches=[0] * 8))
    arguments: dict[str, Any] = {"trials": 6, "seeds": 0, "settings": {"weight_decay": 0.1}}
    for name in ("AdamW", "torch:AdamW", "Lion"):
        tuned = tune(many, name, **arguments)
        assert tuned.tau == pytest.approx(1 / (0.1 * tuned.best.arguments["lr"]))
        assert f"= {tuned.tau:.4g} steps, {tuned.tau / 8:.3g} epochs" in str(tuned)
    for name in ("torch:Adam", "SGD"):  # their decay goes through the gradient
        assert tune(many, name, **arguments).tau is None
    assert tune(many, "AdamW", trials=6, seeds=0, settings={"weight_decay": 0}).tau is None


def test_importance_tells_what_matters() -> None:
    tuned = tune(
        bowls(1), "torch:SGD", trials=30, names=["lr", "weight_decay"], settings=PLAIN, seeds=0, sampler="halton"
    )
    assert tuned.importances["lr"] > 0.9
    assert sum(tuned.importances.values()) == pytest.approx(1)
    assert tune(bowls(1), "torch:SGD", trials=4, settings=PLAIN, seeds=0).importances == {}


def test_files_have_all_trials(tmp_path: Path) -> None:
    tuned = tune(bowls(9), "torch:SGD", trials=12, settings=PLAIN, names=["lr"], seeds=2, ranges={"lr": (0.01, 1e9)})
    numbers, rows = tuned.save(tmp_path / "new")
    document = json.loads(numbers.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert document["best"] == tuned.best.number
    assert document["line"] == tuned.line
    assert document["confirmed"]["tuned"] == list(tuned.confirmed.tuned if tuned.confirmed else [])
    table = list(csv.DictReader(rows.read_text().splitlines()))
    assert len(table) == len(document["trials"]) == len(tuned.trials)
    for row, record, trial in zip(table, document["trials"], tuned.trials, strict=True):
        assert float(row["lr"]) == record["params"]["lr"] == trial.params["lr"]
        assert {e: float(row[f"loss after {e}"]) for e in tuned.rungs if row[f"loss after {e}"]} == trial.values
        assert record["values"] == {str(e): v for e, v in trial.values.items()}
        assert (row["failure"] or None) == record["failure"] == trial.failure


def test_budgets_end_the_search() -> None:
    storage = optuna.storages.InMemoryStorage()
    arguments: dict[str, Any] = {"trials": 30, "settings": PLAIN, "names": ["lr"], "storage": storage, "seeds": 2}
    short = tune(bowls(9), "torch:SGD", budget="20 epochs", **arguments)
    trained = sum(t.user_attrs["trained"][0] for t in optuna.load_study(study_name=short.study, storage=storage).trials)
    assert 20 <= trained < 20 + 13
    assert short.confirmed is None
    assert any("The budget was spent" in line for line in short.remarks)
    whole = tune(bowls(9), "torch:SGD", budget="10m", **arguments)
    assert whole.best.epochs == 9
    assert whole.confirmed is not None
    assert not any("budget" in line for line in whole.remarks)
    none = tune(bowls(9), "torch:SGD", trials=5, budget="0.000001s")
    assert none.trials == ()


def test_where_short_trainings_end_better_it_is_said() -> None:
    def overfits(seed: int) -> Task:
        task, steps = bowl(seed, epochs=9), []

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            steps.append(0)
            return model()

        return replace(task, loss=loss, evaluate=lambda m: {"loss": m().item() + len(steps)})

    tuned = tune(Workload.of(overfits), "torch:SGD", trials=9, names=["lr"], settings=PLAIN, seeds=0)
    assert tuned.best.epochs == 9
    assert any(line.startswith("Trainings of 1 epochs came to ") for line in tuned.remarks)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A workload of one's own in the folder where one is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_tune.py").write_text(
        "import torch\nfrom schuss.lab.workload import Task\n"
        "def line(seed):\n"
        '    """A line."""\n'
        "    m = torch.nn.Linear(1, 1)\n"
        "    loss = lambda m, b: ((m(b) - 2 * b) ** 2).mean()\n"
        "    x = torch.linspace(-1, 1, 8)[:, None]\n"
        "    return Task(m, [x], loss, lambda m: {'loss': loss(m, x).item()}, 'loss', 0.1, 3, 8)\n"
        "def broken(seed):\n"
        "    from dataclasses import replace\n"
        "    def stop(m): raise KeyboardInterrupt\n"
        "    return replace(line(seed), evaluate=stop)\n"
    )
    yield "mine_for_tune"
    sys.modules.pop("mine_for_tune", None)


def test_the_command_tunes_writes_and_goes_on(module: str) -> None:
    arguments = ["tune", f"{module}:line", "--optimizer", "torch:SGD", "--trials", "6", "--seeds", "2", "--out", "o"]
    arguments += ["--set", "momentum=0.5", "--set", "nesterov=False", "--range", "lr=0.01:3", "--tune", "lr"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Best: torch.optim.SGD(params, lr=" in result.stdout
    assert "momentum=0.5, nesterov=False)" in result.stdout
    assert "Trained from seeds 1, 2: " in result.stdout
    assert f"Study: '{module}:line torch:SGD 3 epochs' in sqlite:///o/tune.db" in result.stdout
    document = json.loads(Path("o/tune.json").read_text())
    trials = len(document["trials"])
    again = CliRunner().invoke(app, arguments)
    assert again.stdout == result.stdout
    assert "trial" not in again.stderr  # nothing was trained
    more = CliRunner().invoke(app, [*arguments, "--trials", "8"])
    assert more.exit_code == 0, more.output
    assert len(json.loads(Path("o/tune.json").read_text())["trials"]) >= trials + 2


def test_ctrl_c_of_the_command_prints_what_there_is(module: str) -> None:
    result = CliRunner().invoke(app, ["tune", f"{module}:broken", "--optimizer", "torch:SGD", "--out", "o"])
    assert result.exit_code == 130, result.output
    assert "The same command goes on from here." in result.stderr
    assert "0 trials of " in result.stdout
    assert Path("o/tune.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown workload 'nosuch'"),
        (["mine_for_tune:line", "--optimizer", "AdmW"], "unknown optimizer 'AdmW': did you mean"),
        (["mine_for_tune:line", "--range", "lr=1"], "--range must be like lr=1e-4:1e-1, got 'lr=1'"),
        (["mine_for_tune:line", "--set", "lr"], "--set must be name=value, got 'lr'"),
        (["mine_for_tune:line", "--trials", "0"], "tune: trials must be an integer in [1, inf), got 0"),
        (["mine_for_tune:line", "--budget", "1 day"], "tune: budget must be like"),
        (["mine_for_tune:line", "--optimizer", "torch:LBFGS"], "torch:LBFGS cannot train the mine_for_tune:line"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_command_is_one_line(
    module: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune", *arguments])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_ranges_as_they_are_written() -> None:
    assert limits(["lr=1e-4:1e-1", " beta1 = 0.5:0.9"]) == {"lr": (1e-4, 0.1), "beta1": (0.5, 0.9)}
