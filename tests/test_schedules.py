"""Schedules: closed forms, composition, text, the `Schedule` that drives hyperparameters, and `schuss schedule`."""

import copy
import dataclasses
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from schuss import optim
from schuss.cli import app, main
from schuss.schedules import (
    Function,
    Schedule,
    absolute,
    constant,
    cosine,
    cosine_restarts,
    cyclical,
    exponential,
    inverse_sqrt,
    join,
    linear,
    multi_step,
    one_cycle,
    one_minus_sqrt,
    parse,
    picture,
    polynomial,
    scale,
    step,
    warmup,
    wsd,
)
from schuss.schedules.expression import NAMES
from schuss.wrappers import Combined

EACH = [
    constant(0.5), linear(10), linear(7, 0.2, 1.5), cosine(10), cosine(9, end=0.1), polynomial(8, power=2.5),
    one_minus_sqrt(12), exponential(0.9), step(3), multi_step([2, 5, 5], 0.5), inverse_sqrt(4), one_cycle(20),
    one_cycle(30, 0.4, by=linear, three_phase=True), cyclical(4), cyclical(3, 5, 0.1, "triangular2"),
    cyclical(4, mode="exp_range", gamma=0.9), cosine_restarts(5, 2, 0.1), wsd(20, 4, 6),
    wsd(20, 0, 10, end=0.1, by=one_minus_sqrt), join([linear(3), constant(), cosine(4)], [3, 9]),
    scale(cosine(10), 3e-4), scale(cosine(10), exponential(0.9)), warmup(cosine(10), 5), warmup(linear(6), 0),
    warmup(inverse_sqrt(4), 4, by=cosine), absolute(constant(0.9)),
]  # fmt: skip

each = pytest.mark.parametrize("schedule", EACH, ids=repr)


# --- the functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant(0.5), {0: 0.5, 1000: 0.5}),
        (linear(4), {0: 1, 1: 0.75, 3: 0.25, 4: 0, 9: 0}),
        (linear(10, 1 / 3, 1), {0: 1 / 3, 5: 2 / 3, 10: 1, 11: 1}),
        (polynomial(10, power=2), {0: 1, 5: 0.25, 10: 0}),
        (one_minus_sqrt(16), {0: 1, 1: 0.75, 4: 0.5, 9: 0.25, 16: 0}),
        (exponential(0.5), {0: 1, 3: 0.125}),
        (exponential(0), {0: 1, 1: 0}),
        (step(30), {0: 1, 29: 1, 30: 0.1, 60: 0.01}),
        (multi_step([30, 80, 80], 0.5), {29: 1, 30: 0.5, 80: 0.125}),
        (inverse_sqrt(100), {0: 1, 300: 0.5}),
        (cosine_restarts(10, 2), {0: 1, 5: 0.5, 10: 1, 20: 0.5, 30: 1, 50: 0.5, 70: 1}),
        (cyclical(4, 2, 0.2), {0: 0.2, 2: 0.6, 4: 1, 5: 0.6, 6: 0.2, 10: 1}),
        (cyclical(2, mode="triangular2"), {2: 1, 4: 0, 6: 0.5, 10: 0.25}),
        (cyclical(2, mode="exp_range", gamma=0.5), {0: 0, 1: 0.25, 2: 0.25, 6: 0.5**6}),
        # The numbers that torch and fastai give for a peak of 1 in 100 steps.
        (one_cycle(100), {0: 0.04, 29: 1.0, 99: 4e-6, 100: 4e-6, 1000: 4e-6}),
        (one_cycle(100, 0.4, 0.1, 0.01, linear, True), {0: 0.1, 39: 1, 78: 0.1, 99: 0.01}),
        (join([constant(0.1), linear(4)], [20]), {0: 0.1, 19: 0.1, 20: 1, 22: 0.5}),
        (join([constant(0.1), constant(0.2)], [0]), {0: 0.2}),
        (scale(linear(4), 8), {1: 6}),
        (scale(linear(4), exponential(0.5)), {2: 0.125}),
        (warmup(linear(10), 4), {0: 0.25, 1: 0.5, 3: 1, 4: 1, 9: 0.5, 14: 0}),
        (warmup(constant(3), 4), {0: 0.75, 4: 3}),
        (warmup(linear(10), 0), {0: 1}),
        (warmup(constant(), 4, by=cosine), {1: 0.5, 3: 1}),
        (wsd(100, 10, 20), {0: 0.1, 9: 1, 10: 1, 80: 1, 81: 0.95, 90: 0.5, 99: 0.05, 100: 0, 200: 0}),
        (wsd(100, 10, 20, by=cosine), {80: 1, 90: 0.5, 100: 0}),
        (wsd(100, 10, 16, end=0.2, by=one_minus_sqrt), {84: 1, 88: 0.6, 100: 0.2}),
        (wsd(100, 0, 0), {0: 1, 99: 1, 100: 0}),
    ],
    ids=repr,
)
def test_closed_form(schedule: Function, expected: dict[int, float]) -> None:
    assert {t: schedule(t) for t in expected} == pytest.approx(expected, rel=1e-14, abs=1e-16)


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_cosine_is_that_of_the_paper(steps: int, where: float, end: float) -> None:
    t = int(where * steps)
    expected = end + (1 - end) * (1 + math.cos(math.pi * t / steps)) / 2
    assert cosine(steps, end=end)(t) == pytest.approx(expected, rel=1e-14, abs=1e-16)


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True))
def test_a_warm_up_never_starts_at_zero(steps: int, where: float) -> None:
    t = int(where * steps)
    assert warmup(constant(), steps)(t) == (t + 1) / steps
    assert wsd(2 * steps, steps, steps)(t) == (t + 1) / steps


@pytest.mark.parametrize("mult", [2, 3, 5, 10])
def test_restarts_are_where_they_belong(mult: int) -> None:
    """math.log(243, 3) is 4.999..., so a logarithm misses the restart."""
    begin = 0
    for n in range(12):
        assert cosine_restarts(7, mult)(begin) == 1
        assert begin == 0 or cosine_restarts(7, mult)(begin - 1) < 0.1
        begin += 7 * mult**n


@pytest.mark.parametrize("peak", [0.0, 0.005, 0.01, 0.02, 0.99, 1.0])
@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_with_degenerate_phases(peak: float, three_phase: bool) -> None:
    schedule = one_cycle(100, peak, three_phase=three_phase)
    weights = [schedule.weights(t) for t in range(100)]
    assert all(min(w) >= 0 and sum(w) == pytest.approx(1) for w in weights)
    assert schedule(max(round(100 * peak) - 1, 0)) == 1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_cycle_of_few_steps(steps: int) -> None:
    values = [one_cycle(steps)(t) for t in range(4)]
    assert values[0] == 1
    assert values[3] == pytest.approx(1.0 if steps == 1 else 4e-6)


@each
def test_a_schedule_is_a_value(schedule: Function) -> None:
    for other in (
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        parse(repr(schedule)),
        dataclasses.replace(schedule),
    ):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)
    assert schedule not in [other for other in EACH if other is not schedule]
    with pytest.raises(AttributeError):
        schedule.steps = 3  # type: ignore[attr-defined]


@each
def test_arrays_give_what_numbers_give(schedule: Function) -> None:
    t = np.arange(60).reshape(3, 20)
    values = schedule(t)
    assert values.dtype == np.float64
    assert values.shape == t.shape
    assert values.ravel().tolist() == [schedule(int(i)) for i in t.ravel()]
    assert all(type(schedule(i)) is float for i in (0, 1, 59))
    assert schedule(2.5) == schedule(np.array(2.5))


def test_each_name_is_tested() -> None:
    assert {type(schedule) for schedule in EACH} == set(NAMES.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine(0), "cosine: steps must be in [1, inf), got 0"),
        (lambda: linear(-5), "linear: steps must be in [1, inf), got -5"),
        (lambda: polynomial(5, power=0), "polynomial: power must be in (0, inf), got 0"),
        (lambda: constant(math.nan), "constant: value must be in (-inf, inf), got nan"),
        (lambda: exponential(-0.1), "exponential: gamma must be in [0, inf), got -0.1"),
        (lambda: step(0), "step: every must be in [1, inf), got 0"),
        (lambda: multi_step([5, 3]), "multi_step: milestones must increase, got [5, 3]"),
        (lambda: multi_step([-1]), "multi_step: milestones[0] must be in [0, inf), got -1"),
        (lambda: join([linear(1), linear(1), linear(1)], [5, 5]), "join: milestones must increase, got [5, 5]"),
        (lambda: join([linear(1)], [5]), "join: there must be one more schedule than milestones, got 1 and 1"),
        (lambda: one_cycle(0), "one_cycle: steps must be in [1, inf), got 0"),
        (lambda: one_cycle(10, 1.5), "one_cycle: peak must be in [0, 1], got 1.5"),
        (lambda: cyclical(3, mode="x"), "cyclical: mode must be triangular, triangular2 or exp_range, got 'x'"),
        (lambda: cosine_restarts(5, 0.5), "cosine_restarts: mult must be in [1, inf), got 0.5"),
        (lambda: warmup(linear(3), -1), "warmup: steps must be in [0, inf), got -1"),
        (lambda: wsd(10, 6, 6), "wsd: warmup + cooldown must be in [0, steps], got 6 + 6 of 10"),
        (lambda: cosine(10)(-1), "cosine: step must be in [0, inf), got -1"),
        (lambda: cosine(10)(math.nan), "cosine: step must be in [0, inf), got nan"),
        (
            lambda: warmup(linear(3), 2, by=constant),
            "warmup: by must make a schedule that falls from 1 to 0 over its steps, as linear, cosine and "
            "one_minus_sqrt do, got constant",
        ),
    ],
)  # fmt: skip
def test_bad_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine("10"), "cosine: steps must be a number in [1, inf), got '10' (str)"),
        (lambda: scale(0.5, 3), "scale: schedule must be a schedule, got 0.5 (float)"),
        (
            lambda: warmup(cosine, 3),
            "warmup: schedule must be a schedule, got cosine (ABCMeta); it needs its arguments",
        ),
        (lambda: join([cosine(3), 1], [3]), "join: schedules[1] must be a schedule, got 1 (int)"),
    ],
)  # fmt: skip
def test_bad_types(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message) + "$"):
        make()


def test_numbers_of_numpy_and_torch_are_taken_as_numbers() -> None:
    schedule = cosine(np.int64(10), end=torch.tensor(0.5))  # type: ignore[arg-type]
    assert schedule == cosine(10, end=0.5)
    assert repr(schedule) == "cosine(10.0, end=0.5)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin(3)", "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ("cosine(10, stps=3)", "cosine: unknown argument 'stps'; did you mean 'steps'?"),
        ("cosine()", "cosine: missing a required argument: 'steps'"),
        ("cosine(1, 2, 3, 4)", "cosine: too many positional arguments"),
        ("cosine", "not a schedule: 'cosine'; write a call such as cosine(1000)"),
        ("3", "not a schedule: '3'; write a call such as cosine(1000)"),
        ("cosine(", "not an expression: '(' was never closed: 'cosine('"),
        ("cosine(0)", "cosine: steps must be in [1, inf), got 0"),
        ("cosine('a')", "cosine: steps must be a number in [1, inf), got 'a' (str)"),
        ("cosine(1) + 1", "not a call, a number, a list or a name: cosine(1) + 1"),
        ("cosine(**{})", "not a call, a number, a list or a name: cosine(**{})"),
        ("cosine(*[1])", "not a call, a number, a list or a name: *[1]"),
        ("(lambda: 1)()", "not a call, a number, a list or a name: (lambda: 1)()"),
        ("__import__('os').system('true')", "not a call, a number, a list or a name: __import__('os').system('true')"),
        ("cosine(1j)", "not a call, a number, a list or a name: 1j"),
        ("cosine(" + "9" * 400 + ")", "an expression that is too large: int too large to convert to float"),
        ("(" * 20_000, "an expression has at most 10000 characters, got 20000"),
    ],
)
def test_bad_expressions(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        parse(text)


@pytest.mark.parametrize("text", ["warmup(" * 1200, "-" * 9000 + "1", "[" * 5000, "cosine(\0)", "9" * 9000])
def test_hostile_expressions(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse(text)


# --- Schedule --------------------------------------------------------------------------------------------------------


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


def adamw(*lrs: float, **named: Any) -> optim.AdamW:
    return optim.AdamW([{"params": [parameter()], "lr": lr} for lr in lrs], **named)


def lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def train(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.sin(torch.arange(3) + p.detach())
    optimizer.step()


def test_the_value_is_the_initial_value_times_the_factor() -> None:
    optimizer, curve = adamw(0.1, 0.3), warmup(cosine(20), 5)
    schedule = Schedule(optimizer, lr=curve)
    for t in range(40):
        assert schedule.last_epoch == t
        assert lrs(optimizer) == [0.1 * curve(t), 0.3 * curve(t)] == schedule.get_last_lr()
        assert schedule.values() == schedule.values(t) == [{"lr": lr} for lr in lrs(optimizer)]
        train(optimizer)
        schedule.step()
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    schedule.step(3)
    assert lrs(optimizer) == [0.1 * curve(3), 0.3 * curve(3)]
    assert repr(schedule) == "Schedule(AdamW, lr=warmup(cosine(20), 5)) at step 3"


def test_any_hyperparameter() -> None:
    optimizer = adamw(0.1, betas=(0.9, 0.99), weight_decay=0.5)
    sgd = torch.optim.SGD([parameter()], lr=1, momentum=0.95)
    schedules = [
        Schedule(optimizer, weight_decay=linear(10), betas=(None, absolute(linear(10, 0.99, 0.999)))),
        Schedule(sgd, lr=linear(10), momentum=absolute(linear(5, 0.85, 0.95))),
    ]
    for _ in range(5):
        for schedule in schedules:
            schedule.step()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.25)
    assert group["betas"] == pytest.approx((0.9, 0.9945))
    assert (sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]) == (0.5, 0.95)


@pytest.mark.parametrize(
    ("groups", "chosen"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        ([0, 2], [0, 2]),
        (range(2), [0, 1]),
        (lambda group: group["weight_decay"] > 0, [1, 2]),
    ],
)
def test_chosen_groups(groups: Any, chosen: list[int]) -> None:
    optimizer = optim.SGD([{"params": [parameter()], "weight_decay": wd} for wd in (0.0, 0.1, 0.2)], lr=1.0)
    schedule = Schedule(optimizer, groups=groups, lr=linear(4))
    schedule.step()
    assert lrs(optimizer) == [0.75 if i in chosen else 1.0 for i in range(3)]
    assert len(schedule.values()) == len(chosen)


def test_groups_are_chosen_by_their_initial_values() -> None:
    """Also when the schedule is made after the optimizer was loaded."""

    def large(group: Any) -> bool:
        return bool(group["lr"] >= 1)

    optimizer = adamw(1.0, 0.5)
    schedule = Schedule(optimizer, groups=large, lr=linear(4))
    schedule.step(3)
    resumed = adamw(1.0, 0.5)
    resumed.load_state_dict(optimizer.state_dict())
    other = Schedule(resumed, groups=large, lr=linear(4))
    other.load_state_dict(schedule.state_dict())
    assert lrs(resumed) == lrs(optimizer) == [0.25, 0.5]


def test_a_step_that_is_refused_changes_nothing() -> None:
    optimizer = adamw(1.0)
    schedule = Schedule(optimizer, lr=linear(4))
    with pytest.raises(ValueError, match=r"linear: step must be in \[0, inf\), got -1$"):
        schedule.step(-1)
    assert (schedule.last_epoch, lrs(optimizer)) == (0, [1.0])


def test_two_schedules_for_two_kinds_of_groups() -> None:
    optimizer = adamw(1.0, 2.0)
    backbone, head = Schedule(optimizer, groups=[0], lr=linear(4)), Schedule(optimizer, groups=[1], lr=exponential(0.5))
    backbone.step()
    head.step()
    assert lrs(optimizer) == [0.75, 1.0]


@pytest.mark.parametrize("groups", [None, lambda group: True, [0]])
def test_a_group_that_is_added_later(groups: Any) -> None:
    optimizer = adamw(1.0)
    schedule = Schedule(optimizer, groups=groups, lr=linear(4))
    schedule.step()
    optimizer.add_param_group({"params": [parameter()], "lr": 10.0})
    schedule.step()
    assert lrs(optimizer) == [0.5, 10.0 if groups == [0] else 5.0]


def test_tensors_are_filled_in_place_and_shared_with_nobody() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.AdamW([parameter()], lr=rate)
    schedule = Schedule(optimizer, lr=linear(4))
    kept = schedule.get_last_lr()[0]
    held = optimizer.param_groups[0]["lr"]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is held
    assert (held.item(), float(kept), optimizer.param_groups[0]["initial_lr"].item()) == (0.375, 0.5, 0.5)
    schedule.step()
    assert held.item() == 0.25


def test_a_tensor_that_groups_share() -> None:
    """As a default it is one tensor for all groups."""
    optimizer = optim.AdamW([{"params": [parameter()]} for _ in range(3)], lr=torch.tensor(0.5, dtype=torch.float64))
    schedule = Schedule(optimizer, groups=[1], lr=linear(4))
    schedule.step()
    assert lrs(optimizer) == [0.5, 0.375, 0.5]


def test_tensor_betas_are_filled_in_place() -> None:
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    optimizer = torch.optim.AdamW([parameter()], lr=torch.tensor(0.1), betas=betas)
    schedule = Schedule(optimizer, betas=(linear(4), None))
    schedule.step()
    assert optimizer.param_groups[0]["betas"][0] is betas[0]
    assert betas[0].item() == pytest.approx(0.675)


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_resuming_at_every_step_equals_never_stopping(optimizer_first: bool) -> None:
    curve = dict(lr=warmup(cosine(8), 3), weight_decay=linear(10), betas=(None, absolute(linear(9, 0.9, 0.99))))

    def fresh() -> tuple[Any, Schedule]:
        optimizer = adamw(0.1, 0.3)
        return optimizer, Schedule(optimizer, **curve)  # type: ignore[arg-type]

    steady, schedule = fresh()
    for t in range(14):
        file = io.BytesIO()
        params = [group["params"][0].detach().clone() for group in steady.param_groups]
        torch.save([steady.state_dict(), schedule.state_dict()], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed, other = fresh()
        for whole, state in list(zip((resumed, other), saved, strict=True))[:: 1 if optimizer_first else -1]:
            whole.load_state_dict(state)
        assert other.last_epoch == t
        for group, p in zip(resumed.param_groups, params, strict=True):
            group["params"][0].data.copy_(p)
        for optimizer, driver in ((steady, schedule), (resumed, other)):
            train(optimizer)
            driver.step()
        for a, b in zip(steady.param_groups, resumed.param_groups, strict=True):
            assert torch.equal(a["params"][0], b["params"][0])
            assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def test_initial_values_that_a_checkpoint_lost() -> None:
    """torch.distributed.checkpoint drops what the optimizer's constructor did not put into the groups."""
    optimizer = adamw(1.0)
    schedule = Schedule(optimizer, lr=linear(4))
    schedule.step()
    state = optimizer.state_dict()
    del state["param_groups"][0]["initial_lr"]
    optimizer.load_state_dict(state)
    schedule.step()
    assert lrs(optimizer) == [0.5]


def test_loading_the_state_of_another_schedule() -> None:
    state = Schedule(adamw(1.0), lr=cosine(10)).state_dict() | {"step": 5}
    assert Schedule(adamw(1.0), lr=cosine(10)).state_dict() == state | {"step": 0}
    optimizer = adamw(1.0)
    schedule = Schedule(optimizer, lr=linear(10))
    message = re.escape("Schedule: saved with lr=cosine(10), this one has lr=linear(10); load_state_dict(..., strict")
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(state)
    assert schedule.last_epoch == 0
    schedule.load_state_dict(state, strict=False)
    assert lrs(optimizer) == [0.5]


SCALED: dict[str, Callable[[torch.nn.Parameter], torch.optim.Optimizer]] = {
    "schuss": lambda p: optim.SGD([p], lr=1.0),
    "torch": lambda p: torch.optim.SGD([p], lr=1.0),
    "torch fused": lambda p: torch.optim.SGD([p], lr=1.0, fused=True),
}


@pytest.mark.parametrize("kind", SCALED)
def test_following_counts_the_steps_that_happened(kind: str) -> None:
    p = parameter()
    optimizer = SCALED[kind](p)
    schedule = Schedule(optimizer, lr=linear(10), follow=True)
    scaler = torch.amp.GradScaler("cpu")
    taken = 0
    for overflow in (True, False, True, False, False):
        optimizer.zero_grad()
        scaler.scale((p * (float("inf") if overflow else 1.0)).sum()).backward()
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        taken += not overflow
        assert torch.equal(before, p) is overflow
        assert schedule.last_epoch == taken
    assert lrs(optimizer) == [1.0 * linear(10)(3)]
    with pytest.raises(
        RuntimeError, match=r"it follows its optimizer \(follow=True\), so step\(\) is not called by hand"
    ):
        schedule.step()


def test_a_copy_follows_the_copy_of_its_optimizer() -> None:
    optimizer = adamw(1.0)
    schedule = Schedule(optimizer, lr=linear(10), follow=True)
    train(optimizer)
    for other_optimizer, other in (
        copy.deepcopy((optimizer, schedule)),
        pickle.loads(pickle.dumps((optimizer, schedule))),
    ):
        train(other_optimizer)
        assert (schedule.last_epoch, other.last_epoch) == (1, 2)
        assert lrs(other_optimizer) == [0.8]


def test_it_is_a_scheduler_to_frameworks() -> None:
    schedule = Schedule(torch.optim.SGD([parameter()], lr=1.0), lr=lambda t: 1 / (t + 1))
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert schedule._step_count == 1
    schedule._step_count += 1  # what accelerate does when it skips a step
    schedule.step()
    assert schedule.get_last_lr() == [0.5]
    assert "<lambda>" in schedule.state_dict()["schedules"]["lr"]


CHOICE = "choose from lr, betas, eps, weight_decay"


@pytest.mark.parametrize(
    ("error", "named", "message"),
    [
        (TypeError, dict(eqs=linear(3)), "AdamW has no hyperparameter 'eqs'; did you mean 'eps'?"),
        (TypeError, dict(momentum=linear(3)), f"AdamW has no hyperparameter 'momentum'; {CHOICE}"),
        (TypeError, dict(amsgrad=linear(3)), f"AdamW has no hyperparameter 'amsgrad'; {CHOICE}"),
        (TypeError, dict(lr=0.1), "lr must be a schedule such as cosine(1000), got 0.1"),
        (TypeError, dict(lr=cosine), "lr must be a schedule such as cosine(1000), got cosine"),
        (TypeError, dict(), "no hyperparameter is given, as in Schedule(optimizer, lr=cosine(1000))"),
        (ValueError, dict(betas=cosine(3)), "betas of AdamW takes 2 schedules, some may be None, got cosine(3)"),
        (ValueError, dict(lr=(linear(3), None)), "lr of AdamW takes one schedule, got (linear(3), None)"),
        (ValueError, dict(lr=linear(3), groups=[1]), "groups must be in [0, 1), got 1"),
    ],
)  # fmt: skip
def test_bad_arguments(error: type[Exception], named: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"Schedule: {message}") + "$"):
        Schedule(adamw(1.0), **named)


def of_two_kinds() -> Combined:
    return Combined(
        {"matrices": optim.SGD([parameter()], lr=1.0, momentum=0.5), "others": optim.AdamW([parameter()], lr=2.0)}
    )


def test_hyperparameters_that_not_every_group_has() -> None:
    optimizer = of_two_kinds()
    schedules = (
        Schedule(optimizer, groups=[1], betas=(linear(4), None)),
        Schedule(optimizer, groups=0, momentum=linear(4)),
    )
    for schedule in schedules:
        schedule.step()
    sgd, adamw_ = optimizer.param_groups
    assert (sgd["momentum"], adamw_["betas"]) == (0.375, (0.675, 0.999))
    assert "betas" not in sgd
    assert "momentum" not in adamw_
    by_choice = Schedule(of_two_kinds(), groups=lambda group: "betas" in group, betas=(linear(4), None))
    assert by_choice.values() == [{"betas": (0.9, 0.999)}]


@pytest.mark.parametrize(
    ("error", "named", "message"),
    [
        (TypeError, dict(betas=(linear(3), None)), "group 0 of Combined has no hyperparameter 'betas'; choose those "
         "that have: groups=[1]"),
        (TypeError, dict(momentum=linear(3)), "group 1 of Combined has no hyperparameter 'momentum'; choose those that "
         "have: groups=[0]"),
        (ValueError, dict(lr=(linear(3), None)), "lr of group 0 of Combined takes one schedule, got (linear(3), None)"),
        (TypeError, dict(rho=linear(3)), "Combined has no hyperparameter 'rho'; choose from lr, momentum, dampening, "
         "weight_decay, betas, eps"),
    ],
)  # fmt: skip
def test_every_chosen_group_is_looked_at(error: type[Exception], named: dict[str, Any], message: str) -> None:
    optimizer = of_two_kinds()
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(error, match=re.escape(f"Schedule: {message}") + "$"):
        Schedule(optimizer, lr=linear(3), **named) if "lr" not in named else Schedule(optimizer, **named)
    assert [dict(group) for group in optimizer.param_groups] == before


def test_a_group_that_is_added_later_is_looked_at() -> None:
    optimizer = of_two_kinds()
    schedule = Schedule(optimizer, groups=lambda group: group["lr"] > 1, betas=(linear(4), None))
    optimizer.add_param_group({"params": [parameter()], "lr": 3.0, "optimizer": "matrices"})
    with pytest.raises(TypeError, match=r"group 2 of Combined has no hyperparameter 'betas'; .*: groups=\[1\]$"):
        schedule.step()
    assert (schedule.last_epoch, optimizer.param_groups[1]["betas"]) == (0, (0.9, 0.999))


def test_a_tensor_that_two_kinds_of_groups_share() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = Combined([optim.SGD([parameter()], lr=rate), optim.AdamW([parameter()], lr=rate, betas=(0.5, 0.9))])
    Schedule(optimizer, groups=1, betas=(None, linear(4)), lr=linear(4)).step()
    assert lrs(optimizer) == [0.5, 0.375]


def test_something_that_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"Schedule: optimizer must be a torch.optim.Optimizer, got int$"):
        Schedule(3, lr=linear(3))  # type: ignore[arg-type]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_draws(tmp_path: Any) -> None:
    page = tmp_path / "curve.html"
    arguments = ["schedule", "warmup(cosine(1000), 100)", "--steps", "1100", "--lr", "3e-4", "--out", str(page)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("0.0003 | ")
    assert lines[11].startswith("     0 | ")
    assert lines[12:] == [
        "warmup(cosine(1000), 100): 3e-06 at step 0, 7.402e-10 at step 1099",
        "highest: 0.0003 at step 99",
        f"Picture: {page}",
    ]
    assert "\x1b" not in result.output
    text = page.read_text(encoding="utf-8")
    assert "warmup(cosine(1000), 100)" in text
    assert "Plotly.newPlot" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cosine(0)"], "cosine: steps must be in [1, inf), got 0"),
        (["exponential(2)", "--steps", "5000"], "exponential(2) gets too large within 5000 steps"),
        (["cosine(5)", "--lr", "0"], "--lr must be in (0, inf), got 0"),
        (["absolute(cosine(5))", "--lr", "1"], "--lr is for a schedule of factors; absolute(...) is one of values"),
        (["cosine(5)", "--out", "x.png"], "--out must end in .html, got x.png"),
        (["cosine(5)", "--out", "/no/such/x.html"], "cannot write /no/such/x.html: No such file or directory"),
        (["cosine(5)", "--steps", "0"], "Input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["schedule", *arguments])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("schuss: Invalid value")
    assert error.endswith(f"{message}\n")
    assert error.count("\n") == 1


def test_the_help_names_every_schedule() -> None:
    text = re.sub(r"\W+", " ", CliRunner().invoke(app, ["schedule", "--help"], terminal_width=400).output)
    assert [name for name in NAMES if name not in text.split()] == []


def test_text_draws_each_value_where_it_belongs() -> None:
    assert picture.text([0.0, 1.0, 2.0], width=3, height=3, dots=False).splitlines() == ["2 |   *", "  |  *", "0 | *"]
    assert picture.text([1.0, 1.0], width=2, height=1).splitlines() == ["1 | ⠉⠉"]
    assert picture.text([0.0], width=1, height=1).splitlines() == ["1 | ⣀"]
    assert picture.text([-1.0, -1.0], width=2, height=1).splitlines() == ["0 | ⣀⣀"]
    spike = [0.0] * 1000
    spike[777] = 1.0
    assert "*" in picture.text(spike, width=10, height=4, dots=False).splitlines()[0]


def test_the_axis_ends_at_zero_if_it_is_near() -> None:
    def drawn(*values: float) -> list[str]:
        lines = picture.text(values, width=len(values), height=3, dots=False).splitlines()
        return [line.rstrip() for line in lines]

    assert drawn(1.0, 2.0) == ["2 |  *", "  | *", "0 |"]
    assert drawn(0.90, 0.95, 1.00) == ["  1 |   *", "    |  *", "0.9 | *"]
    assert drawn(-1.00, -0.95, -0.90) == ["-0.9 |   *", "     |  *", "  -1 | *"]
    assert drawn(-2.0, -1.0) == [" 0 |", "   |  *", "-2 | *"]
    assert drawn(-1.0, 0.0, 1.0) == [" 1 |   *", "   |  *", "-1 | *"]
    assert drawn(0.90001, 0.90002) == ["0.90002 |  *", "        |", "0.90001 | *"]


def test_long_schedules_are_thinned_out() -> None:
    t, values = picture.sample(linear(10**9), 10**9)
    assert (len(t), t[0], t[-1]) == (picture.MOST, 0, 10**9 - 1)
    assert values[0] == 1


def test_following_waits_for_a_step_that_nonfinite_skips() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([p], lr=1.0, max_norm=1.0, nonfinite="skip")
    schedule = Schedule(optimizer, lr=linear(10), follow=True)
    for value in (1.0, float("nan"), float("inf"), 1.0):
        p.grad = torch.full((2,), value)
        optimizer.step()
    assert optimizer.skipped_steps == 2
    assert schedule.last_epoch == 2
