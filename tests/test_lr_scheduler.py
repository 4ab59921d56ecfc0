"""schuss.optim.lr_scheduler against torch.optim.lr_scheduler: the same numbers, and right ones where torch is wrong."""

import copy
import inspect
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as theirs

from schuss import optim, schedules
from schuss.optim import lr_scheduler as ours

STEPS = 200
Make = Callable[[Any, torch.optim.Optimizer], Any]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Most tests step schedulers without the optimizer, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step", UserWarning)
        yield


def decay(step: int) -> float:
    return 1 / (1 + step) ** 0.5


def slower(step: int) -> float:
    return 1 - 1 / (5 + step)


CASES: dict[str, list[Make]] = {
    "LambdaLR": [lambda m, o: m.LambdaLR(o, decay), lambda m, o: m.LambdaLR(o, [decay, lambda t: 0.9**t])],
    "MultiplicativeLR": [
        lambda m, o: m.MultiplicativeLR(o, slower),
        lambda m, o: m.MultiplicativeLR(o, [slower, lambda t: 0.99]),
    ],
    "StepLR": [lambda m, o: m.StepLR(o, 7, 0.3), lambda m, o: m.StepLR(o, 1), lambda m, o: m.StepLR(o, 500)],
    "MultiStepLR": [
        lambda m, o: m.MultiStepLR(o, [3, 50, 9, 9], 0.3),
        lambda m, o: m.MultiStepLR(o, []),
        lambda m, o: m.MultiStepLR(o, [0, 2]),
    ],
    "ConstantLR": [
        lambda m, o: m.ConstantLR(o),
        lambda m, o: m.ConstantLR(o, 0.1, 40),
        lambda m, o: m.ConstantLR(o, 1.0),
    ],
    "LinearLR": [
        lambda m, o: m.LinearLR(o),
        lambda m, o: m.LinearLR(o, 0.01, 0.7, 60),
        lambda m, o: m.LinearLR(o, 1.0, 0.0, 50),
        lambda m, o: m.LinearLR(o, 0.5, 1.0, 1),
    ],
    "ExponentialLR": [lambda m, o: m.ExponentialLR(o, 0.97), lambda m, o: m.ExponentialLR(o, 1.0)],
    "PolynomialLR": [
        lambda m, o: m.PolynomialLR(o),
        lambda m, o: m.PolynomialLR(o, 120, 0.9),
        lambda m, o: m.PolynomialLR(o, 300, 3.0),
    ],
    "CosineAnnealingLR": [
        lambda m, o: m.CosineAnnealingLR(o, 33, 0.001),
        lambda m, o: m.CosineAnnealingLR(o, 300),
        lambda m, o: m.CosineAnnealingLR(o, 1),
        lambda m, o: m.CosineAnnealingLR(o, 50, 0.5),
    ],
    "CosineAnnealingWarmRestarts": [
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 7),
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 3, 2, 0.01),
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 1, 3),
    ],
    "CyclicLR": [
        lambda m, o: m.CyclicLR(o, 0.01, 0.3, 7, 13),
        lambda m, o: m.CyclicLR(o, [0.01, 0.02], [0.3, 0.1], 5, mode="triangular2"),
        lambda m, o: m.CyclicLR(o, 0.01, 0.3, 1, 48, mode="exp_range", gamma=0.99, base_momentum=0.5),
        lambda m, o: m.CyclicLR(o, 0.01, 0.3, 10, 0, cycle_momentum=False),
        lambda m, o: m.CyclicLR(o, 0.01, 0.3, 4, scale_fn=decay, scale_mode="iterations"),
        lambda m, o: m.CyclicLR(o, 0.01, 0.3, 4, scale_fn=decay),
    ],
    "OneCycleLR": [
        lambda m, o: m.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
        lambda m, o: m.OneCycleLR(o, [0.5, 0.1], epochs=7, steps_per_epoch=30, anneal_strategy="linear"),
        lambda m, o: m.OneCycleLR(o, 0.5, total_steps=210, three_phase=True, pct_start=0.41),
        lambda m, o: m.OneCycleLR(o, 0.5, total_steps=210, three_phase=True, pct_start=0.6),
        lambda m, o: m.OneCycleLR(o, 0.5, total_steps=201, cycle_momentum=False, div_factor=3, final_div_factor=5),
    ],
    "SequentialLR": [
        lambda m, o: m.SequentialLR(
            o, [m.LinearLR(o, 0.1, 1.0, 10), m.CosineAnnealingLR(o, 50, 0.01), m.ExponentialLR(o, 0.9)], [10, 60]
        ),
        lambda m, o: m.SequentialLR(o, [m.ConstantLR(o, 0.1, 20), m.StepLR(o, 30), m.LambdaLR(o, decay)], [20, 90]),
        lambda m, o: m.SequentialLR(o, [m.ConstantLR(o), m.ExponentialLR(o, 0.99)], [0]),
        lambda m, o: m.SequentialLR(o, [m.CosineAnnealingWarmRestarts(o, 7, 2), m.PolynomialLR(o, 90)], [80]),
        lambda m, o: m.SequentialLR(o, [m.ExponentialLR(o, 0.9)], []),
    ],
    "ChainedScheduler": [
        lambda m, o: m.ChainedScheduler([m.LinearLR(o, 0.1, 1.0, 10), m.ExponentialLR(o, 0.99), m.StepLR(o, 30)]),
        lambda m, o: m.ChainedScheduler([m.ConstantLR(o, 0.1, 20), m.CosineAnnealingLR(o, 250, 0.001)], optimizer=o),
        lambda m, o: m.ChainedScheduler([m.MultiplicativeLR(o, slower), m.MultiStepLR(o, [5, 50])]),
        lambda m, o: m.ChainedScheduler([m.CosineAnnealingLR(o, 40), m.ExponentialLR(o, 0.99)]),
        lambda m, o: m.ChainedScheduler([m.LambdaLR(o, decay), m.LinearLR(o, 0.5, 1.0, 30)]),
    ],
}  # fmt: skip

ALL = [pytest.param(make, id=f"{name}-{i}") for name, makes in CASES.items() for i, make in enumerate(makes)]
each = pytest.mark.parametrize("make", ALL)


def make_optimizer(lrs: Any = (0.3, 0.07), momentum: float = 0.9) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups, momentum=momentum)


def rates(optimizer: torch.optim.Optimizer, key: str = "lr") -> list[float]:
    return [float(group[key]) for group in optimizer.param_groups]


def run(make: Make, module: Any, steps: int = STEPS, **kwargs: Any) -> list[list[float]]:
    """The rates and momenta of each step."""
    optimizer = make_optimizer(**kwargs)
    scheduler = make(module, optimizer)
    seen = []
    for _ in range(steps):
        seen.append(rates(optimizer) + rates(optimizer, "momentum"))
        scheduler.step()
    return seen


def assert_same(a: Any, b: Any) -> None:
    """Equal to 1e-12 of the larger of the value and the largest rate, 1e-3 of it at least."""
    for t, (mine, others) in enumerate(zip(a, b, strict=True)):
        assert mine == pytest.approx(others, rel=1e-12, abs=5e-14), f"step {t}"


# --- the same as torch -----------------------------------------------------------------------------------------------


def test_every_name_with_its_signature() -> None:
    assert sorted(ours.__all__) == sorted(theirs.__all__)
    assert optim.lr_scheduler is ours
    for name in theirs.__all__:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert issubclass(mine, other), name
        a, b = (list(inspect.signature(c).parameters.values()) for c in (mine, other))
        assert [(p.name, p.kind, p.default) for p in a] == [(p.name, p.kind, p.default) for p in b]
    assert ours.EPOCH_DEPRECATION_WARNING is theirs.EPOCH_DEPRECATION_WARNING
    with pytest.raises(AttributeError, match="has no attribute 'SteppLR'; did you mean 'StepLR'"):
        ours.SteppLR  # noqa: B018
    assert set(CASES) | {"LRScheduler", "ReduceLROnPlateau"} == set(theirs.__all__)


@each
def test_the_same_numbers_for_200_steps(make: Make) -> None:
    assert_same(run(make, ours), run(make, theirs))


@each
def test_the_same_attributes_in_the_state(make: Make) -> None:
    a, b = (make(m, make_optimizer()) for m in (ours, theirs))
    for _ in range(15):
        a.step(), b.step()
    mine, other = a.state_dict(), b.state_dict()
    assert set(mine) == set(other)
    assert {k: v for k, v in mine.items() if k in ("last_epoch", "T_cur", "T_i", "_step_count", "_milestones")} == {
        k: v for k, v in other.items() if k in ("last_epoch", "T_cur", "T_i", "_step_count", "_milestones")
    }
    assert a.get_last_lr() == pytest.approx(b.get_last_lr(), rel=1e-12)


RATIO = st.floats(0.05, 1.0)
COUNT = st.integers(1, 60)


@st.composite
def schedulers(draw: st.DrawFn) -> Make:
    """Any scheduler with any arguments."""
    n, f, g = draw(COUNT), draw(RATIO), draw(RATIO)
    kind = draw(st.sampled_from(range(11)))
    milestones = sorted(draw(st.lists(st.integers(1, 80), max_size=4)))
    low, ups, downs = draw(st.floats(1e-3, 0.05)), draw(COUNT), draw(COUNT)
    total, peak = draw(st.integers(130, 400)), draw(st.floats(0.02, 0.9))
    makes: list[Make] = [
        lambda m, o: m.StepLR(o, n, f),
        lambda m, o: m.MultiStepLR(o, milestones, f),
        lambda m, o: m.ConstantLR(o, f, n),
        lambda m, o: m.LinearLR(o, f, g, n),
        lambda m, o: m.ExponentialLR(o, 1 - f / 20),
        lambda m, o: m.PolynomialLR(o, n, 3 * f),
        lambda m, o: m.CosineAnnealingWarmRestarts(o, n, 1 + n % 3, low),
        lambda m, o: m.CyclicLR(o, low, 0.3, ups, downs, ("triangular", "triangular2", "exp_range")[n % 3], 1 - f / 50),
        lambda m, o: m.OneCycleLR(o, 0.5, total_steps=total, pct_start=peak, anneal_strategy=("cos", "linear")[n % 2]),
        lambda m, o: m.ChainedScheduler([m.LinearLR(o, f, g, n), m.StepLR(o, ups, g), m.ExponentialLR(o, 0.99)]),
        lambda m, o: m.SequentialLR(o, [m.LinearLR(o, f, g, n), m.StepLR(o, ups, g)], [n]),
    ]
    return makes[kind]


@settings(max_examples=120, deadline=None)
@given(make=schedulers())
def test_the_same_numbers_whatever_the_arguments(make: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(run(make, ours, 120), run(make, theirs, 120))


@settings(max_examples=60, deadline=None)
@given(horizon=st.integers(1, 90), low=st.floats(0, 0.5))
def test_cosine_annealing_is_the_closed_form(horizon: int, low: float) -> None:
    """torch's recursion loses digits near the minimum."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = run(lambda m, o: m.CosineAnnealingLR(o, horizon, low), ours, 200)
    for t, (rate, *_) in enumerate(seen):
        expected = low + (0.3 - low) * (1 + math.cos(math.pi * t / horizon)) / 2
        assert rate == pytest.approx(expected, rel=1e-12, abs=1e-14)


@each
@pytest.mark.parametrize(("before", "after"), [(ours, ours), (ours, theirs), (theirs, ours)])
def test_resuming_at_any_step_equals_never_stopping(make: Make, before: Any, after: Any) -> None:
    """Also with the checkpoint of the other library; ours exactly."""
    whole = run(make, after, 100)
    optimizer = make_optimizer()
    scheduler = make(before, optimizer)
    for t in range(75):
        if t < 30 or t % 4 == 0:
            resumed = make_optimizer()
            other = make(after, resumed)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
            seen = []
            for _ in range(3):
                seen.append(rates(resumed) + rates(resumed, "momentum"))
                other.step()
            assert_same(seen, whole[t : t + 3])
            if before is after and not isinstance(scheduler, (ours.ChainedScheduler, ours.MultiplicativeLR)):
                assert seen == whole[t : t + 3]
        scheduler.step()


@each
def test_a_state_is_loaded_twice(make: Make) -> None:
    """torch's CyclicLR takes something out of the dict."""
    scheduler = make(ours, make_optimizer())
    state = scheduler.state_dict()
    for _ in range(2):
        scheduler.load_state_dict(state)


@each
def test_deepcopy_and_pickle(make: Make) -> None:
    optimizer = make_optimizer()
    scheduler = make(ours, optimizer)
    for _ in range(7):
        scheduler.step()
    twins = [copy.deepcopy((optimizer, scheduler))]
    if "<lambda>" not in str(scheduler.__dict__):
        twins.append(pickle.loads(pickle.dumps((optimizer, scheduler))))
    for _ in range(10):
        scheduler.step()
        for other_optimizer, other in twins:
            other.step()
            assert rates(other_optimizer) == rates(optimizer)


def test_a_state_can_be_loaded_with_weights_only() -> None:
    curve = schedules.warmup(schedules.cosine(50), 10)
    optimizer, file = make_optimizer(), io.BytesIO()
    scheduler = ours.LambdaLR(optimizer, curve)
    scheduler.step()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    other_optimizer = make_optimizer()
    other = ours.LambdaLR(other_optimizer, curve)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.step()
    assert rates(other_optimizer) == [0.3 * curve(2), 0.07 * curve(2)]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_rates_are_filled_in_place_and_shared_with_nobody(make: Make, dtype: torch.dtype) -> None:
    tensors = [torch.tensor(lr, dtype=dtype) for lr in (0.3, 0.07)]
    optimizer = make_optimizer(tensors)
    scheduler = make(ours, optimizer)
    held = [group["lr"] for group in optimizer.param_groups]
    plain = run(make, ours, 100)
    for t in range(100):
        tolerance = dict(rel=1e-5, abs=1e-7) if dtype == torch.float32 else dict(rel=1e-12, abs=1e-14)
        assert rates(optimizer) == pytest.approx(plain[t][:2], **tolerance), t
        kept = scheduler.get_last_lr()
        scheduler.step()
        storages = {
            x.data_ptr() for group in optimizer.param_groups for x in group.values() if isinstance(x, torch.Tensor)
        }
        assert [group["lr"] for group in optimizer.param_groups] == held
        assert all(group["lr"] is h for group, h in zip(optimizer.param_groups, held, strict=True))
        assert len(storages) == sum(isinstance(x, torch.Tensor) for g in optimizer.param_groups for x in g.values())
        assert not {k.data_ptr() for k in kept} & storages


CHAINS = ("MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR")


@pytest.mark.parametrize("name", [*CHAINS, "LambdaLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR"])
def test_a_rate_that_somebody_else_changes(name: str) -> None:
    """Chainable schedulers move it on by the same factors as torch's; the others overwrite it."""
    for make in CASES[name]:
        seen = []
        for module in (ours, theirs):
            optimizer = make_optimizer()
            scheduler = make(module, optimizer)
            seen.append([])
            for t in range(120):
                if t in (4, 40, 41):
                    optimizer.param_groups[0]["lr"] *= 0.5
                scheduler.step()
                seen[-1].append(rates(optimizer))
        assert_same(*seen)


def test_a_plateau_beside_a_warm_up() -> None:
    """The common pair: both step the same optimizer, and neither undoes the other."""
    seen = []
    for module in (ours, theirs):
        optimizer = make_optimizer()
        warm, plateau = module.LinearLR(optimizer, 0.1, total_iters=5), module.ReduceLROnPlateau(optimizer, patience=2)
        seen.append([])
        for t in range(40):
            warm.step()
            plateau.step(1.0 if t > 10 else 2.0 - t / 10)
            seen[-1].append(rates(optimizer))
    assert_same(*seen)
    assert seen[0][-1][0] < 1e-4


@each
def test_going_to_an_epoch(make: Make) -> None:
    optimizer = make_optimizer()
    scheduler = make(ours, optimizer)
    if isinstance(scheduler, (ours.SequentialLR, ours.ChainedScheduler)):
        pytest.skip("takes no epoch")
    scheduler.step(17)
    expected = run(make, ours, 20)
    assert rates(optimizer) == pytest.approx(expected[17][:2], rel=1e-12)
    scheduler.step()
    assert rates(optimizer) == pytest.approx(expected[18][:2], rel=1e-12)


def test_fractions_of_an_epoch() -> None:
    a, b = make_optimizer(), make_optimizer()
    mine, other = ours.CosineAnnealingWarmRestarts(a, 4, 2, 0.01), theirs.CosineAnnealingWarmRestarts(b, 4, 2, 0.01)
    for i in range(200):
        mine.step(i / 10), other.step(i / 10)
        assert rates(a) == pytest.approx(rates(b), rel=1e-12)
    with pytest.raises(ValueError, match=r"epoch must be in \[0, inf\), got -1"):
        mine.step(-1)


def test_the_next_epoch_after_a_fraction_is_a_whole_one() -> None:
    optimizer = make_optimizer((1.0,))
    scheduler = ours.CosineAnnealingWarmRestarts(optimizer, 4)
    scheduler.step(1.5)
    scheduler.step()
    assert (scheduler.last_epoch, scheduler.T_cur, rates(optimizer)) == (2, 2, [0.5])


@pytest.mark.parametrize("name", ["LambdaLR", "MultiplicativeLR", "OneCycleLR"])
def test_a_tensor_rate_that_groups_share(name: str) -> None:
    """As a default it is one tensor for all groups, and in torch the last group's rate is everybody's."""
    plain = run(CASES[name][1], ours, 20, lrs=(0.3, 0.3))
    for module, right in ((ours, True), (theirs, False)):
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
        optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.3, dtype=torch.float64), momentum=0.9)
        scheduler = CASES[name][1](module, optimizer)
        for _ in range(19):
            scheduler.step()
        assert (rates(optimizer) == pytest.approx(plain[19][:2])) is right


def test_training_with_both_libraries() -> None:
    """The warning about the order of steps is torch's, and is not given in the right order."""
    finals = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module, kind in ((ours, optim.AdamW), (theirs, torch.optim.AdamW)):
            p = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
            optimizer = kind([p], lr=0.1)
            scheduler = module.OneCycleLR(optimizer, 0.1, total_steps=30)
            for _ in range(29):
                optimizer.zero_grad()
                (p**2).sum().backward()
                optimizer.step()
                scheduler.step()
            finals.append(p.detach().clone())
    torch.testing.assert_close(*finals, rtol=1e-10, atol=1e-12)


def test_the_warning_about_the_order_is_given() -> None:
    scheduler = ours.StepLR(make_optimizer(), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"before `optimizer\.step"):
            scheduler.step()
        with pytest.raises(UserWarning, match="get_last_lr"):
            scheduler.get_lr()


def test_a_scheduler_of_the_user() -> None:
    """A subclass of the base, alone and inside ours."""

    class Halving(ours.LRScheduler):
        def get_lr(self) -> list[Any]:
            return [base * 0.5**self.last_epoch for base in self.base_lrs]

    for module in (ours, theirs):
        optimizer = make_optimizer()
        scheduler = module.SequentialLR(optimizer, [module.ConstantLR(optimizer, 0.5, 9), Halving(optimizer)], [2])
        seen = []
        for _ in range(5):
            seen.append(rates(optimizer)[0])
            scheduler.step()
        assert seen == pytest.approx([0.15, 0.15, 0.3, 0.15, 0.075])


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "LambdaLR"])
def test_torch_s_schedulers_inside_ours_and_ours_inside_torch_s(name: str) -> None:
    expected = run(lambda m, o: m.SequentialLR(o, [m.LinearLR(o, 0.1), CASES[name][0](m, o)], [4]), theirs, 60)

    def make(outer: Any, inner: Any, o: Any) -> Any:
        return outer.SequentialLR(o, [inner.LinearLR(o, 0.1), CASES[name][0](inner, o)], [4])

    assert_same(run(lambda m, o: make(ours, theirs, o), None, 60), expected)
    assert_same(run(lambda m, o: make(theirs, ours, o), None, 60), expected)


def test_swalr_beside_ours() -> None:
    optimizer = make_optimizer()
    sequence = ours.SequentialLR(
        optimizer, [ours.ConstantLR(optimizer, 0.5, 10), optim.swa_utils.SWALR(optimizer, 0.01, anneal_epochs=3)], [4]
    )
    seen = []
    for _ in range(9):
        seen.append(rates(optimizer)[0])
        sequence.step()
    assert seen[:4] == [0.15] * 4
    assert seen[4] == pytest.approx(0.3)
    assert seen[8] == pytest.approx(0.01)


# --- right where torch is wrong --------------------------------------------------------------------------------------


# Chains with a rate that is set, that has a floor, or that goes through zero depend on their past, as in torch.
CLOSED = [p for p in ALL if p.id not in ("ChainedScheduler-1", "ChainedScheduler-3", "ChainedScheduler-4")]
EXTENSIBLE = [p for p in CLOSED if p.id not in ("LambdaLR-1", "MultiplicativeLR-1", "CyclicLR-1", "OneCycleLR-1")]


@pytest.mark.parametrize("make", EXTENSIBLE)
@pytest.mark.parametrize("when", [0, 1, 13, 60])
def test_a_group_that_is_added_later_follows(make: Make, when: int) -> None:
    """It gets the rates it would have had from the start; in torch this raises, or drives it anywhere."""
    expected = run(make, ours, 100, lrs=(0.3, 0.07, 0.5))
    optimizer = make_optimizer()
    scheduler = make(ours, optimizer)
    for t in range(99):
        if t == when:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5})
        scheduler.step()
        seen = rates(optimizer) + rates(optimizer, "momentum")
        assert seen == pytest.approx(
            expected[t + 1] if t >= when else expected[t + 1][:2] + expected[t + 1][3:5], rel=1e-12
        )
    again = make_optimizer((0.3, 0.07, 0.5))
    other = make(ours, again)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    scheduler.step(), other.step()
    assert rates(optimizer) == rates(again)


def extended(make: Make, module: Any, lr: float = 1.0) -> list[float]:
    """The rates of two groups, the second added after a scheduler, two steps later."""
    optimizer = make_optimizer((1.0,))
    scheduler = make(module, optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr})
    scheduler.step(), scheduler.step()
    return rates(optimizer)


@pytest.mark.parametrize("name", ["LambdaLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR"])
def test_torch_cannot_take_a_group_later(name: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        extended(CASES[name][0], theirs)
    a, b = extended(CASES[name][0], ours)
    assert a == b


def test_torch_drives_a_group_that_is_added_later_beyond_its_rate() -> None:
    def make(module: Any, optimizer: torch.optim.Optimizer) -> Any:
        return module.LinearLR(optimizer, 0.1, total_iters=4)

    assert extended(make, theirs) == pytest.approx([0.55, 5.5])
    assert extended(make, ours) == [0.55, 0.55]


@pytest.mark.parametrize(
    ("name", "i", "keys"),
    [
        ("CyclicLR", 1, {"base_lr": 0.04, "max_lr": 0.2}),
        ("OneCycleLR", 1, {"max_lr": 0.2}),
        ("LambdaLR", 1, None),
    ],
)
def test_a_later_group_among_groups_that_differ(name: str, i: int, keys: dict[str, float] | None) -> None:
    for given_keys in ({}, keys):
        optimizer = make_optimizer()
        scheduler = CASES[name][i](ours, optimizer)
        if given_keys is None:
            scheduler.lr_lambdas.append(decay)
            scheduler.base_lrs.append(0.2)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.2, **(given_keys or {})})
        if given_keys == {}:
            with pytest.raises(
                ValueError, match=f"{name}: a group was added, and the others differ in .*; give it one, "
            ):
                scheduler.step()
            continue
        for _ in range(5):
            scheduler.step()
        peak = {"CyclicLR": 0.2, "OneCycleLR": 0.2 / 0.5 * rates(optimizer)[0], "LambdaLR": 0.2 * decay(5)}[name]
        assert rates(optimizer)[2] == pytest.approx(peak)


def test_groups_that_are_gone() -> None:
    """Sharding engines drop empty groups; torch raises since 2.10."""
    for make in (CASES["StepLR"][1], CASES["LambdaLR"][0], CASES["OneCycleLR"][0], CASES["CyclicLR"][0]):
        optimizer = make_optimizer()
        scheduler = make(ours, optimizer)
        del optimizer.param_groups[1]
        scheduler.step()
        assert rates(optimizer) == pytest.approx(run(make, ours, 2)[1][:1])


@pytest.mark.parametrize("make", CLOSED)
@pytest.mark.parametrize("t", [1, 5, 21, 99])
def test_a_scheduler_made_for_a_later_step_has_the_rate_of_that_step(make: Make, t: int) -> None:
    """From groups that have their initial_lr and nothing else; torch leaves most of them at any rate."""
    expected = run(make, ours, t + 4)
    optimizer = make_optimizer()
    for group, group_of_old in zip(optimizer.param_groups, trained(make, t).param_groups, strict=True):
        group.update({k: v for k, v in group_of_old.items() if k not in ("params", "lr")})
    scheduler = make(Late(t - 1), optimizer)
    for k in range(4):
        assert rates(optimizer) == pytest.approx(expected[t + k][:2], rel=1e-12)
        scheduler.step()


def trained(make: Make, steps: int) -> torch.optim.Optimizer:
    """An optimizer whose scheduler has done so many steps."""
    optimizer = make_optimizer()
    scheduler = make(ours, optimizer)
    for _ in range(steps):
        scheduler.step()
    return optimizer


class Late:
    """The module, with last_epoch given to what takes it from the checkpoint: sequences, or schedulers alone."""

    def __init__(self, last_epoch: int) -> None:
        self.last_epoch = last_epoch

    def __getattr__(self, name: str) -> Any:
        cls, last_epoch = getattr(ours, name), self.last_epoch
        if name == "ChainedScheduler":
            return cls
        if name != "SequentialLR":
            return partial(cls, last_epoch=last_epoch)

        def sequence(optimizer: Any, schedulers: list[Any], milestones: list[int]) -> Any:
            return ours.SequentialLR(optimizer, schedulers, milestones, last_epoch=last_epoch)

        return sequence


def test_resuming_a_sequence_as_in_torch_s_issue_162591() -> None:
    """Made with last_epoch, torch's sequence starts its first scheduler again."""

    def sequence(module: Any, optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> Any:
        parts = [module.ConstantLR(optimizer, 0.5, 4), module.ExponentialLR(optimizer, 0.9)]
        return module.SequentialLR(optimizer, parts, [4], last_epoch=last_epoch)

    wanted = [rate for rate, *_ in run(sequence, ours, 12, lrs=(1.0,))]
    assert wanted[7] == pytest.approx(0.729)
    for module, right in ((ours, True), (theirs, False)):
        optimizer = make_optimizer((1.0,))
        sequence(module, optimizer, last_epoch=6)
        assert (rates(optimizer) == pytest.approx([0.729])) is right


def test_nested_sequences() -> None:
    """torch's come a step early."""

    def nested(m: Any, o: Any) -> Any:
        inner = m.SequentialLR(o, [m.ConstantLR(o, 0.5, 9), m.ConstantLR(o, 0.2, 9)], [2])
        return m.SequentialLR(o, [inner, m.ExponentialLR(o, 0.5)], [5])

    def late(m: Any, o: Any) -> Any:
        inner = m.SequentialLR(o, [m.ConstantLR(o, 0.5, 9), m.ConstantLR(o, 0.2, 9)], [2])
        return m.SequentialLR(o, [m.ConstantLR(o, 0.1, 9), inner], [3])

    assert [r for r, *_ in run(nested, ours, 8, lrs=(1.0,))] == [0.5, 0.5, 0.2, 0.2, 0.2, 1.0, 0.5, 0.25]
    assert [r for r, *_ in run(late, ours, 8, lrs=(1.0,))] == [0.1, 0.1, 0.1, 0.5, 0.5, 0.2, 0.2, 0.2]
    assert [r for r, *_ in run(nested, theirs, 4, lrs=(1.0,))][1] == pytest.approx(0.2)
    for make in (nested, late):
        whole = run(make, ours, 12)
        for t in range(10):
            optimizer, resumed = make_optimizer(), make_optimizer()
            scheduler, other = make(ours, optimizer), make(ours, resumed)
            for _ in range(t):
                scheduler.step()
            resumed.load_state_dict(optimizer.state_dict())
            other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
            other.step()
            assert rates(resumed) == whole[t + 1][:2]


def test_a_chain_that_begins_late() -> None:
    """In torch a chain can only come first."""

    def make(m: Any, o: Any) -> Any:
        chain = m.ChainedScheduler([m.ConstantLR(o, 0.5, 2), m.ExponentialLR(o, 0.5)])
        return m.SequentialLR(o, [m.ConstantLR(o, 0.1, 9), chain], [3])

    assert [r for r, *_ in run(make, ours, 8, lrs=(1.0,))] == [0.1, 0.1, 0.1, 0.5, 0.25, 0.25, 0.125, 0.0625]
    with pytest.raises(NotImplementedError):
        run(make, theirs, 8)


def test_a_chain_that_begins_a_sequence() -> None:
    """In torch it takes a factor too many."""

    def make(m: Any, o: Any) -> Any:
        return m.SequentialLR(o, [m.ChainedScheduler([m.ConstantLR(o, 0.5, 9), m.ExponentialLR(o, 0.5)])], [])

    assert [r for r, *_ in run(make, ours, 3, lrs=(1.0,))] == [0.5, 0.25, 0.125]
    assert [r for r, *_ in run(make, theirs, 3, lrs=(1.0,))] == [0.25, 0.125, 0.0625]


@pytest.mark.parametrize("plateaus", [ours, theirs])
def test_a_plateau_in_a_sequence_and_in_a_chain(plateaus: Any) -> None:
    optimizer = make_optimizer((1.0,))
    plateau = plateaus.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    sequence = ours.SequentialLR(
        optimizer, [ours.LinearLR(optimizer, 0.25, total_iters=3), plateau, ours.ConstantLR(optimizer, 0.1, 9)], [3, 7]
    )
    seen = []
    for metric in (None, None, None, 5.0, 6.0, 6.0, None, None):
        seen.append(rates(optimizer)[0])
        sequence.step(metric)
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.25, 0.1])

    optimizer = make_optimizer((1.0,))
    chain = ours.ChainedScheduler(
        [ours.ConstantLR(optimizer, 0.5, 3), plateaus.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)]
    )
    seen = []
    for metric in (5.0, 6.0, 4.0, 3.0):
        seen.append(rates(optimizer)[0])
        chain.step(metric)
    assert seen == pytest.approx([0.5, 0.5, 0.05, 0.1])
    with pytest.raises(TypeError, match=r"ChainedScheduler: ReduceLROnPlateau is running, so step\(metric\) needs the"):
        chain.step()


def test_resuming_a_sequence_with_a_plateau() -> None:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        warm, plateau = ours.LinearLR(optimizer, 0.25, total_iters=3), ours.ReduceLROnPlateau(optimizer, patience=2)
        return ours.SequentialLR(optimizer, [warm, plateau], [3])

    metrics = [1.0] * 20
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    for metric in metrics:
        resumed = make_optimizer()
        other = make(resumed)
        resumed.load_state_dict(optimizer.state_dict())
        other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
        scheduler.step(metric), other.step(metric)
        assert rates(resumed) == rates(optimizer)
    assert rates(optimizer)[0] == pytest.approx(0.3e-5)


@given(
    metrics=st.lists(st.floats(0, 10), min_size=5, max_size=60), mode=st.sampled_from(["min", "max"]),
    threshold_mode=st.sampled_from(["rel", "abs"]), threshold=st.sampled_from([0.0, 1e-4, 0.1]),
    patience=st.integers(0, 3), cooldown=st.integers(0, 3), negative=st.booleans(),
)  # fmt: skip
def test_plateau(
    metrics: list[float], mode: Any, threshold_mode: Any, threshold: float, patience: int, cooldown: int, negative: bool
) -> None:
    """As torch for metrics that are not negative. For others as torch in the other mode for their sizes."""
    named = dict(patience=patience, threshold=threshold, threshold_mode=threshold_mode, cooldown=cooldown)
    a, b = make_optimizer(), make_optimizer()
    mine = ours.ReduceLROnPlateau(a, mode=mode, **named)
    other = theirs.ReduceLROnPlateau(b, mode=mode if not negative else {"min": "max", "max": "min"}[mode], **named)
    for metric in metrics:
        mine.step(-metric if negative else metric), other.step(metric)
        assert rates(a) == rates(b)
        assert mine.num_bad_epochs == other.num_bad_epochs
    if not negative:
        assert mine.state_dict() == other.state_dict()


def test_plateau_with_a_negative_metric() -> None:
    """A loss of -0.95 after -1 is worse."""
    for module, is_better in ((ours, False), (theirs, True)):
        plateau = module.ReduceLROnPlateau(make_optimizer(), threshold=0.1)
        plateau.step(-1.0)
        assert plateau._is_better(-0.95, plateau.best) is is_better
    plateau = ours.ReduceLROnPlateau(make_optimizer(), "max", threshold=0.1)
    plateau.step(-1.0)
    assert not plateau._is_better(-0.95, plateau.best)
    assert plateau._is_better(-0.85, plateau.best)


def test_one_cycle_after_its_last_step() -> None:
    """torch bounces up at step total_steps and raises after it."""
    rate = run(lambda m, o: m.OneCycleLR(o, 1.0, total_steps=100), ours, 150, lrs=(1.0,))
    assert [rate[t][0] for t in (0, 29)] == pytest.approx([0.04, 1.0])
    assert [rate[t][0] for t in (99, 100, 149)] == pytest.approx([4e-6] * 3)
    optimizer = make_optimizer()
    scheduler = theirs.OneCycleLR(optimizer, 1.0, total_steps=10)
    for _ in range(10):
        scheduler.step()
    assert rates(optimizer)[0] > 0.01


@pytest.mark.parametrize("pct_start", [0.0, 0.005, 0.01, 1.0])
@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_with_phases_of_no_length(pct_start: float, three_phase: bool) -> None:
    seen = run(
        lambda m, o: m.OneCycleLR(o, 1.0, total_steps=100, pct_start=pct_start, three_phase=three_phase), ours, 102
    )
    peak = max(round(100 * pct_start) - 1, 0)
    assert seen[peak][0] == pytest.approx(1.0)
    assert seen[peak][2] == pytest.approx(0.85)
    assert seen[101][0] == seen[99][0]


def test_factors_and_lengths_of_zero() -> None:
    def first(make: Make, n: int) -> list[float]:
        return [rate for rate, *_ in run(make, ours, n, lrs=(1.0,))]

    assert first(lambda m, o: m.ConstantLR(o, 0.0, 2), 4) == [0, 0, 1, 1]
    assert first(lambda m, o: m.ConstantLR(o, 0.5, 0), 3) == [1, 1, 1]
    assert first(lambda m, o: m.LinearLR(o, 0.1, 0.8, 0), 3) == [0.8, 0.8, 0.8]
    assert first(lambda m, o: m.SequentialLR(o, [m.MultiplicativeLR(o, lambda t: 0.5)] * 1, []), 3) == [1, 0.5, 0.25]

    def sequence(m: Any, o: Any) -> Any:
        return m.SequentialLR(o, [m.ConstantLR(o, 0.1, 9), m.MultiplicativeLR(o, lambda t: 0.5)], [2])

    assert first(sequence, 5) == [0.1, 0.1, 1.0, 0.5, 0.25]


def test_restarts_that_a_logarithm_misses() -> None:
    """Epoch 847 = 7 + 21 + 63 + 189 + 567 is a restart."""
    for module, rate in ((ours, 1.0), (theirs, 0.0)):
        optimizer = make_optimizer((1.0,))
        module.CosineAnnealingWarmRestarts(optimizer, 7, 3).step(847)
        assert rates(optimizer) == pytest.approx([rate])


def test_cyclic_after_another_scheduler() -> None:
    """torch's begins at the initial rate of the scheduler before."""
    for module, rate in ((ours, 0.01), (theirs, 0.3)):
        optimizer = make_optimizer()
        module.StepLR(optimizer, 5)
        module.CyclicLR(optimizer, 0.01, 0.1)
        assert rates(optimizer)[0] == rate


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, o: m.StepLR(o, 0), "StepLR: step: every must be in [1, inf), got 0"),
        (lambda m, o: m.CosineAnnealingLR(o, 0), "CosineAnnealingLR: cosine: steps must be in [1, inf), got 0"),
        (lambda m, o: m.PolynomialLR(o, 0), "PolynomialLR: polynomial: steps must be in [1, inf), got 0"),
        (lambda m, o: m.LinearLR(o, total_iters=-1), "LinearLR: linear: steps must be in [1, inf), got -1"),
        (lambda m, o: m.ExponentialLR(o, -0.5), "ExponentialLR: exponential: gamma must be in [0, inf), got -0.5"),
        (lambda m, o: m.CyclicLR(o, 0.1, 1.0, 0, 5), "CyclicLR: cyclical: up must be in [1, inf), got 0.0"),
        (
            lambda m, o: m.SequentialLR(o, [m.StepLR(o, 1), m.StepLR(o, 1), m.StepLR(o, 1)], [9, 3]),
            "SequentialLR: milestones must be in [0, inf) and increase, got [9, 3]",
        ),
        (
            lambda m, o: m.SequentialLR(o, [m.StepLR(o, 1)], [9, 3]),
            "SequentialLR: there must be one more scheduler than milestones, got 1 and 2",
        ),
        (lambda m, o: m.SequentialLR(o, [], []), "SequentialLR: expects at least one scheduler"),
        (lambda m, o: m.ChainedScheduler([]), "ChainedScheduler: expects at least one scheduler"),
        (
            lambda m, o: m.ChainedScheduler([m.StepLR(o, 1), m.StepLR(make_optimizer(), 1)]),
            "ChainedScheduler: all schedulers must belong to the same optimizer, but schedulers[1] does not",
        ),
        (lambda m, o: m.OneCycleLR(o, 1.0, total_steps=0), "Expected positive integer total_steps, but got 0"),
    ],
)  # fmt: skip
def test_bad_values(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        make(ours, make_optimizer())
