"""The learning-rate range test: ladder and curve against closed forms, its suggestions, and that it leaves no trace."""

import csv
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import schuss
from browser import look
from schuss import find_lr, optim
from schuss.cli import app, main
from schuss.lab.find_lr import RULES, RangeTest
from schuss.lab.restored import Snapshot
from schuss.schedules import linear
from schuss.wrappers import SAM, Combined, Lookahead

Build = Callable[[nn.Module], torch.optim.Optimizer]

BUILDERS: dict[str, Build] = {
    "torch.SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.03, momentum=0.9),
    "torch.AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "torch.AdamW, tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01)),
    "AdamW": lambda m: optim.AdamW(m.parameters(), lr=0.01, max_norm=1.0, ema_decay=0.9),
    "AdamW, int8": lambda m: optim.AdamW(m.parameters(), lr=0.01, state_dtype="int8"),
    "AdamW, reference": lambda m: optim.AdamW(
        m.parameters(), lr=0.01, backend="reference", max_norm=9, nonfinite="skip"
    ),
    "groups": lambda m: optim.RMSprop([{"params": [p], "lr": 0.01 / i} for i, p in enumerate(m.parameters(), 1)]),
    "Adagrad": lambda m: optim.Adagrad(m.parameters(), lr=0.05),
    "Prodigy": lambda m: optim.Prodigy(m.parameters()),
    "ScheduleFreeAdamW": lambda m: optim.ScheduleFreeAdamW(m.parameters(), lr=0.01),
    "Lookahead": lambda m: Lookahead(optim.AdamW(m.parameters(), lr=0.01), k=3, pullback="interpolate"),
    "Lookahead(torch)": lambda m: Lookahead(torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9), k=3),
    "Combined": lambda m: Combined(
        [
            optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.01),
            optim.AdamW([p for p in m.parameters() if p.dim() != 2], lr=0.001),
        ]
    ),
}


class Net(nn.Module):
    """BatchNorm, Dropout, a frozen part that stays in eval mode, a buffer that is replaced, and a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(5, 7),
            nn.BatchNorm1d(7),
            nn.Dropout(0.2),
            nn.Linear(7, 1),
        )
        self.frozen = nn.BatchNorm1d(5).eval()
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.log = 0, [0.0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(float(x.sum()))
        self.seen = self.seen + len(x)
        noise = random.random() + np.random.random()  # what augmentation draws
        return self.last(self.drop(self.norm(self.first(self.frozen(x)).tanh()))) + 1e-3 * noise


def data(**options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    return DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=20, shuffle=True, **options)


def seeded(build: Build) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Net()
    return model, build(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], epochs: int = 2) -> list[float]:
    """Epochs whose last gradients stay."""
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def frozen(value: Any, names: dict[int, str]) -> Any:
    """A value that can be compared, with the bits of its tensors."""
    if isinstance(value, Tensor):
        if id(value) in names:
            return names[id(value)]
        return str(value.dtype), tuple(value.shape), value.stride(), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict) or hasattr(value, "items"):
        return [(frozen(k, names), frozen(v, names)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [frozen(v, names) for v in value]
    return value


def trace(model: Net, optimizer: torch.optim.Optimizer, loader: DataLoader[Any] | None = None) -> dict[str, Any]:
    """All that a training depends on."""
    names = {id(p): name for name, p in model.named_parameters()}
    named = {
        "parameters": dict(model.named_parameters()),
        "buffers": dict(model.named_buffers()),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "numbers": [model.calls, model.log],
        "modes": [module.training for module in model.modules()],
        "groups": optimizer.param_groups,
        "state": optimizer.state,
        "saved": optimizer.state_dict(),
        "skipped": getattr(optimizer, "skipped_steps", None),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "loader": None if loader is None or loader.generator is None else loader.generator.get_state(),
    }
    return {
        key: frozen(value, {} if key in ("parameters", "gradients", "buffers", "saved") else names)
        for key, value in named.items()
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert [key for key in before if before[key] != after[key]] == []


# --- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 2], ids=["new", "trained"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_everything_is_as_before_and_training_goes_on_to_the_same_bits(build: Build, epochs: int) -> None:
    runs = []
    for finds in (False, True):
        model, optimizer = seeded(build)
        loader = data(generator=torch.Generator().manual_seed(3))
        train(model, optimizer, loader, epochs)
        before = trace(model, optimizer, loader)
        tensors = {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
        gradients = [p.grad for p in model.parameters()]
        groups = [id(group) for group in optimizer.param_groups]
        if finds:
            found = find_lr(model, optimizer, loader, mse_loss, steps=30)
            assert len(found.lrs) > 10
            assert_same(before, trace(model, optimizer, loader))
            assert tensors == {name: (id(t), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
            assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
            assert groups == [id(group) for group in optimizer.param_groups]
        losses = train(model, optimizer, loader)
        runs.append((losses, trace(model, optimizer, loader)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])


def test_the_comparison_sees_what_a_finder_that_restores_nothing_leaves() -> None:
    model, optimizer = seeded(BUILDERS["AdamW"])
    loader = data(generator=torch.Generator().manual_seed(3))
    before = trace(model, optimizer, loader)
    train(model, optimizer, loader, 1)
    model.eval()
    optimizer.param_groups[0]["lr"] = 1.0
    random.random()
    np.random.random()
    after = trace(model, optimizer, loader)
    assert {key for key in before if before[key] == after[key]} == {"skipped"}


class Stop(BaseException):
    pass


@pytest.mark.parametrize("end", ["exception", "KeyboardInterrupt", "SIGINT", "NaN", "first NaN", "no scalar"])
@pytest.mark.parametrize("build", [BUILDERS[n] for n in ("AdamW", "ScheduleFreeAdamW", "Lookahead")])
def test_everything_is_as_before_after_an_end_in_between(end: str, build: Build) -> None:
    model, optimizer = seeded(build)
    loader = data(generator=torch.Generator().manual_seed(3))
    train(model, optimizer, loader)
    before, calls = trace(model, optimizer, loader), 0

    def loss(output: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if end == "no scalar":
            return output - y
        if calls == 12 or end == "first NaN":
            if end == "exception":
                raise Stop
            if end == "KeyboardInterrupt":
                raise KeyboardInterrupt
            if end == "SIGINT":
                os.kill(os.getpid(), signal.SIGINT)
            return mse_loss(output, y) * math.nan
        return mse_loss(output, y)

    expected: dict[str, type[BaseException]] = {
        "exception": Stop, "KeyboardInterrupt": KeyboardInterrupt, "SIGINT": KeyboardInterrupt,
        "first NaN": ValueError, "no scalar": ValueError,
    }  # fmt: skip
    if end == "NaN":
        found = find_lr(model, optimizer, loader, loss, steps=30)
        assert (found.stopped, len(found.losses), len(found.smoothed)) == ("nonfinite", 11, 10)
        assert math.isnan(found.losses[-1])
        assert "the loss was nan" in str(found)
    else:
        with pytest.raises(expected[end]):
            find_lr(model, optimizer, loader, loss, steps=30)
    assert_same(before, trace(model, optimizer, loader))


def test_an_interrupt_while_it_restores_waits_until_all_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = seeded(BUILDERS["AdamW"])
    before, put_back = trace(model, optimizer), Snapshot.restore

    def interrupted(snapshot: Snapshot) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        put_back(snapshot)

    monkeypatch.setattr(Snapshot, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_lr(model, optimizer, data(), mse_loss, steps=12)
    assert_same(before, trace(model, optimizer))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("capturable", [False, True])
def test_random_numbers_and_state_of_a_gpu_are_restored(capturable: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3), nn.Linear(7, 1)).cuda()
    lr = torch.tensor(0.01, device="cuda") if capturable else 0.01
    optimizer = optim.AdamW(model.parameters(), lr=lr, capturable=capturable)
    loader, results = data(generator=torch.Generator().manual_seed(3)), []
    for _ in range(2):
        found = find_lr(model, optimizer, loader, mse_loss, steps=30)
        results.append((found.losses, torch.cuda.get_rng_state().tolist(), [p.tolist() for p in model.parameters()]))
    assert results[0] == results[1]
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    assert not optimizer.state


def test_a_schedule_free_optimizer_in_eval_mode_comes_back_there() -> None:
    model, optimizer = seeded(BUILDERS["ScheduleFreeAdamW"])
    train(model, optimizer, data())
    optimizer.eval()
    model.eval()
    before = trace(model, optimizer)
    assert len(find_lr(model, optimizer, data(), mse_loss, steps=20).lrs) > 10
    assert not optimizer.training
    assert_same(before, trace(model, optimizer))
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize("make", ["LambdaLR", "OneCycleLR", "Schedule", "Schedule that follows"])
def test_schedules_stand_still_and_go_on(make: str) -> None:
    """Also torch's mark on the optimizer by which it sees that a schedule has stepped too early."""

    def build() -> tuple[Net, torch.optim.Optimizer, Any]:
        model, optimizer = seeded(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5))
        schedule: Any
        if make == "LambdaLR":
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)  # from 0
        elif make == "OneCycleLR":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)
        else:
            schedule = schuss.Schedule(optimizer, lr=linear(20), momentum=linear(40), follow="follows" in make)
        return model, optimizer, schedule

    results = []
    for finds in (False, True):
        model, optimizer, schedule = build()
        attributes = {*vars(optimizer)}
        if finds:
            seen: list[float] = []
            handle = optimizer.register_step_pre_hook(lambda o, *_, to=seen: to.append(o.param_groups[0]["momentum"]))
            found = find_lr(model, optimizer, data(), mse_loss, steps=30)
            handle.remove()
            assert found.ratios == (1.0,)
            assert len(seen) == len(found.lrs)
            assert {*seen} == {optimizer.param_groups[0]["momentum"]}
            assert {*vars(optimizer)} == attributes
        for x, y in data():
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
            if "follows" not in make:
                schedule.step()
        results.append((schedule.last_epoch, trace(model, optimizer)))
    assert results[0][0] == results[1][0] == 3
    assert_same(results[0][1], results[1][1])


def test_parameters_of_the_loss_are_restored_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output: Tensor, y: Tensor) -> Tensor:
            return mse_loss(self.scale * output, y)

    loss = Scaled()
    model, optimizer = seeded(lambda m: optim.AdamW([*m.parameters(), loss.scale], lr=0.01))
    find_lr(model, optimizer, data(), loss, steps=20)
    assert loss.scale.item() == 1.0
    assert loss.scale.grad is None


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_the_same_numbers_afterwards(persistent: bool) -> None:
    def epoch(loader: DataLoader[Any]) -> list[float]:
        return [x.sum().item() for x, _ in loader]

    class Augmented(TensorDataset):
        def __getitem__(self, i: Any) -> Any:
            x, y = super().__getitem__(i)
            return x + torch.rand(()), y

    results = []
    for finds in (False, True):
        torch.manual_seed(5)
        whole = Augmented(*data().dataset.tensors)  # type: ignore[attr-defined]
        loader = DataLoader(whole, batch_size=20, num_workers=1, persistent_workers=persistent)
        first = epoch(loader)
        if finds:
            model = nn.Linear(5, 1)
            torch.manual_seed(6)
            find_lr(model, torch.optim.SGD(model.parameters(), lr=1), loader, mse_loss, steps=10)
        torch.manual_seed(6)
        results.append((first, epoch(loader), epoch(loader)))
        del loader
    assert results[0] == results[1]


def test_data_with_a_position_are_put_back() -> None:
    class Stream:
        position = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            while self.position < 7:
                self.position += 1
                yield torch.full((4, 5), self.position / 7), torch.ones(4, 1)
            self.position = 0

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.position = state_dict["position"]

    model, optimizer = seeded(BUILDERS["AdamW"])
    stream = Stream()
    stream.position = 4
    assert len(find_lr(model, optimizer, stream, mse_loss, steps=25, high=0.1).lrs) == 25
    assert stream.position == 4


# --- the ladder, the curve, the stop ---------------------------------------------------------------------------------


class Point(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)


def bowl(eigenvalues: Tensor) -> tuple[Point, Callable[[Point, Any], Tensor]]:
    """½ Σ λ x², from x = 1."""

    def loss(model: Point, batch: Any) -> Tensor:
        return 0.5 * (eigenvalues * model.x.square()).sum()

    return Point(torch.ones(len(eigenvalues), dtype=torch.float64)), loss


@pytest.mark.parametrize(("low", "high", "steps"), [(1e-7, 10, 100), (1e-3, 1.0, 10), (3e-12, 7e8, 1000), (1, 1.5, 33)])
def test_the_ladder_is_geometric_and_reaches_both_ends(low: float, high: float, steps: int) -> None:
    model, loss = bowl(torch.ones(1, dtype=torch.float64))
    used: list[float] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    found = find_lr(
        model, optimizer, [0], lambda model, batch: 0 * loss(model, batch) + 1, low=low, high=high, steps=steps
    )
    assert tuple(used) == found.lrs
    assert (len(found.lrs), found.lrs[0], found.lrs[-1]) == (steps, low, high)
    ratios = np.array(found.lrs[1:]) / np.array(found.lrs[:-1])
    assert np.abs(ratios / (high / low) ** (1 / (steps - 1)) - 1).max() < 1e-12


def test_the_curve_of_a_quadratic_is_the_closed_form() -> None:
    """losses[i] is the loss after the steps 0 to i: of λ it is ½ λ Π (1 - lr_k λ)²."""
    eigenvalues = torch.linspace(1, 10, 10, dtype=torch.float64)
    model, loss = bowl(eigenvalues)
    found = find_lr(model, torch.optim.SGD(model.parameters(), lr=1), [0], loss, smoothing=0.8, stop_factor=math.inf)
    ladder = 1e-7 * (1e8) ** (np.arange(100) / 99)
    left = np.cumprod(1 - ladder[:, None] * eigenvalues.numpy(), axis=0)
    expected = 0.5 * (eigenvalues.numpy() * left**2).sum(axis=1)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-10)
    assert found.first_loss == 27.5
    everything = np.concatenate([[27.5], expected])
    for i in (0, 1, 50, 99):
        weights = 0.8 ** np.arange(i + 1, -1, -1)
        np.testing.assert_allclose(found.smoothed[i], np.average(everything[: i + 2], weights=weights), rtol=1e-12)


def test_the_steepest_point_is_by_log_lr_and_credits_the_step() -> None:
    """Without noise and smoothing: the step that takes most off; d loss/d lr is largest near the lowest rate."""
    model, loss = bowl(torch.linspace(1, 10, 10, dtype=torch.float64))
    found = find_lr(model, torch.optim.SGD(model.parameters(), lr=1), [0], loss, smoothing=0)
    falls = -np.diff([found.first_loss, *found.losses])
    assert found.suggestions["steepest"] == found.lrs[int(np.argmax(falls))]
    np.testing.assert_allclose(found.slopes, -falls / (math.log(1e8) / 99), rtol=1e-12)
    with_respect_to_lr = np.gradient(found.losses, found.lrs)
    assert found.lrs[int(np.argmin(with_respect_to_lr))] < 1e-4 * found.suggestions["steepest"]


@pytest.mark.parametrize("steps", [60, 100, 300])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_suggestions_depend_on_neither_units_nor_offset_of_the_loss(scale: float, steps: int) -> None:
    """For a rule of which a scaled gradient means nothing, sign descent."""

    def suggest(scale: float, offset: float) -> dict[str, float | None]:
        model, loss = bowl(torch.linspace(1, 10, 10, dtype=torch.float64))
        return find_lr(
            model, optim.Signum(model.parameters()), [0], lambda model, b: scale * loss(model, b) + offset,
            steps=steps, stop_factor=math.inf, high=1,
        ).suggestions  # fmt: skip

    expected = suggest(1.0, 0.0)
    assert suggest(scale, 0.0) == pytest.approx(expected)
    assert suggest(scale, -scale) == pytest.approx(expected)


def test_it_stops_where_the_smoothed_loss_is_too_high() -> None:
    values = [10.0, 8.0, 6.0, 4.0, 2.0, 2.0, 7.0, 8.5, 9.0, *[9.0] * 10]
    model, optimizer = Point(torch.zeros(1)), None
    optimizer = torch.optim.SGD(model.parameters(), lr=1)

    def stop(smoothing: float, factor: float, shift: float = 0.0) -> RangeTest:
        given = iter(values)
        return find_lr(
            model, optimizer, [0], lambda model, batch: 0 * model.x.sum() + next(given) + shift, steps=18,
            smoothing=smoothing, stop_factor=factor,
        )  # fmt: skip

    found = stop(0.0, 4.0)
    assert (found.losses[-1], found.stopped) == (8.5, "diverged")
    assert "more than 4 times its lowest" in str(found)
    assert (stop(0.0, 3.0).losses[-1], stop(0.0, 5.0).stopped) == (7.0, "high")
    s, lowest = 10.0, 10.0
    weight, total, expected = 1.0, 10.0, None
    for i, value in enumerate(values[1:]):
        total, weight = 0.5 * total + value, 0.5 * weight + 1
        s = total / weight
        lowest = min(lowest, s)
        if s > 2.5 * lowest:
            expected = i + 1
            break
    assert len(stop(0.5, 2.5).losses) == expected


@pytest.mark.parametrize("shift", [-20.0, -10.0, -3.0])
def test_a_negative_loss_does_not_stop_it(shift: float) -> None:
    """Four times a negative number is less than it, so that others stop at the first step."""
    model, loss = bowl(torch.ones(1, dtype=torch.float64) * 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    plain = find_lr(model, optimizer, [0], loss, stop_factor=math.inf)
    found = find_lr(model, optimizer, [0], lambda model, batch: loss(model, batch) + shift)
    assert found.stopped == "diverged"
    assert found.lrs[-1] > 0.2  # 2/λ
    lowest = found.lrs[int(np.argmin(found.losses))]
    assert lowest == plain.lrs[int(np.argmin(plain.losses[: len(found.losses)]))]


def test_groups_keep_the_ratios_of_their_rates() -> None:
    model = Net()
    first, *rest = model.parameters()
    optimizer = optim.SGD([{"params": rest, "lr": 0.02}, {"params": [first], "lr": 0.05}], lr=1)
    used = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append([g["lr"] for g in o.param_groups]))
    found = find_lr(model, optimizer, data(), mse_loss, steps=12, high=0.1)
    assert found.ratios == (pytest.approx(0.4), 1.0)
    np.testing.assert_allclose(used, np.outer(found.lrs, found.ratios), rtol=1e-15)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_short_loader_begins_again(rows: int) -> None:
    seen: list[int] = []

    def loss(model: Point, batch: int) -> Tensor:
        seen.append(batch)
        return model.x.square().sum()

    model = Point(torch.ones(2))
    find_lr(model, torch.optim.SGD(model.parameters(), lr=1), range(rows), loss, steps=10, high=0.1)
    assert seen == [i % rows for i in range(11)]


# --- suggestions -----------------------------------------------------------------------------------------------------


def quadratic_deep(seed: int) -> tuple[Point, list[Tensor], Callable[[Point, Tensor], Tensor], float]:
    """DeepOBS: 90 eigenvalues in (0, 1) and 10 in (30, 60), a random rotation, and noise in the place of data."""
    draw = np.random.RandomState(seed)
    eigenvalues = np.concatenate([draw.uniform(0, 1, 90), draw.uniform(30, 60, 10)])
    rotation, _ = np.linalg.qr(draw.normal(size=(100, 100)))
    matrix = torch.from_numpy((rotation * eigenvalues) @ rotation.T)
    batches = [torch.from_numpy(draw.normal(size=(128, 100))) for _ in range(8)]

    def loss(model: Point, batch: Tensor) -> Tensor:
        away = model.x - batch
        return 0.5 * ((away @ matrix) * away).sum(1).mean()

    return Point(torch.ones(100, dtype=torch.float64)), batches, loss, float(eigenvalues.max())


def least_squares(seed: int) -> tuple[nn.Linear, DataLoader[Any], Any, float]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 20, generator=generator) * torch.logspace(0, -1.5, 20)
    y = 3 * x @ torch.randn(20, 1, generator=generator) + 0.3 * torch.randn(512, 1, generator=generator)
    model = nn.Linear(20, 1, bias=False)
    nn.init.zeros_(model.weight)
    curvature = float(torch.linalg.eigvalsh(2 * x.T @ x / 512).max())
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=generator)
    return model, loader, mse_loss, curvature


@pytest.mark.parametrize("task", [quadratic_deep, least_squares])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("smoothing", [0.9, 0.98])
def test_suggestions_for_sgd_are_stable_ones(task: Any, seed: int, smoothing: float) -> None:
    """Gradient descent converges below 2/λ. The default is also not far below it, at 1/25 of it at least."""
    model, loader, loss, curvature = task(seed)
    found = find_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, loss, smoothing=smoothing)
    limit = 2 / curvature
    assert limit / 25 < found.lr < limit / 2
    for name, lr in found.suggestions.items():
        if name != "range_max":
            assert lr is None or 0 < lr < limit, name
    assert limit / 2 < found.suggestions["range_max"] < 3 * limit
    assert found.stopped == "diverged"


def curve(smoothed: list[float], first: float = 10.0, low: float = 1e-4, high: float = 1.0) -> RangeTest:
    """A result with a curve of one's own, of as many steps as there are points."""
    lrs = tuple(low * (high / low) ** (i / (len(smoothed) - 1)) for i in range(len(smoothed)))
    settings = {"low": low, "high": high, "steps": len(smoothed), "smoothing": 0.0, "stop_factor": 4.0}
    return RangeTest(lrs, tuple(smoothed), tuple(smoothed), first, "high", (1.0,), "minimum", settings)


def test_the_rules_on_a_curve_by_hand() -> None:
    #        0     1    2    3    4    5    6    7    8    9   10   11
    shape = [10.0, 9.9, 9.8, 9.9, 9.0, 7.0, 4.0, 3.0, 2.5, 2.6, 5.0, 9.0]
    found = curve(shape)
    suggested = found.suggestions
    assert suggested["range_max"] == found.lrs[8]
    assert suggested["minimum"] == pytest.approx(found.lrs[8] / 10)
    assert suggested["steepest"] == found.lrs[6]  # 7 to 4
    assert suggested["valley"] == found.lrs[4]  # 9.9, 9.8, 9.0, ..., 2.5: from 1 to 8, though 3 is not in it
    assert found.slopes[6] == pytest.approx(-3.0 / (math.log(1e4) / 11))


def test_a_fall_after_the_lowest_point_is_not_the_steepest() -> None:
    found = curve([10.0, 9.9, 9.0, 7.0, 4.0, 3.0, 2.5, 20.0, 8.0, 9.0])
    assert found.suggestions["steepest"] == found.lrs[4]  # not 20 to 8


def test_the_longest_fall_agrees_with_all_subsequences() -> None:
    draw = np.random.RandomState(0)
    for _ in range(30):
        shape = (9 - 0.3 * np.arange(10) + draw.normal(size=10)).tolist()
        found = curve(shape, first=20.0)
        best: tuple[int, ...] = ()
        for mask in range(1, 2**9):
            chosen = tuple(i for i in range(1, 10) if mask >> (i - 1) & 1)
            if len(chosen) > len(best) and all(shape[a] > shape[b] for a, b in pairwise(chosen)):
                best = chosen
        lengths = {
            (c[0] + c[-1]) // 2
            for mask in range(1, 2**9)
            if len(c := tuple(i for i in range(1, 10) if mask >> (i - 1) & 1)) == len(best)
            and all(shape[a] > shape[b] for a, b in pairwise(c))
        }
        assert found.suggestions["valley"] in {found.lrs[i] for i in lengths}


def test_a_loss_that_never_falls_gets_no_suggestion() -> None:
    found = curve([10.0 + i for i in range(20)])
    assert set(found.suggestions.values()) == {None}
    assert found.lr is None
    assert any("never fell" in line for line in found.remarks)


def test_a_loss_that_still_falls_at_the_end_is_told() -> None:
    assert any("raise `high`" in line for line in curve([10.0 - 0.1 * i for i in range(20)]).remarks)
    bottom = [10.0 - 0.5 * i for i in range(10)] + [6.0] * 10
    assert curve(bottom).remarks == ()


def test_the_rule_of_lr_can_be_chosen() -> None:
    model, loader, loss, _ = least_squares(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = {rule: find_lr(model, optimizer, list(loader), loss, rule=rule) for rule in RULES}
    for rule, found in results.items():
        assert found.lr == found.suggestions[rule]
        assert f"* {rule} " in str(found)


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_are_printed_and_saved(tmp_path: Path) -> None:
    model, loader, loss, _ = least_squares(0)
    found = find_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, loss)
    text = str(found)
    assert text.splitlines()[0].split()[:3] == ["*", "minimum", f"{found.lr:.3g}"]
    assert f"stopped at {found.lrs[-1]:.3g}" in text
    document = json.loads(found.save(tmp_path / "a.json").read_text())
    assert document["suggestions"] == found.suggestions
    assert (document["lrs"], document["losses"]) == ([*found.lrs], [*found.losses])
    assert (document["stopped"], document["rule"], document["settings"]["steps"]) == ("diverged", "minimum", 100)
    rows = list(csv.DictReader(io.StringIO(found.save(tmp_path / "a.csv").read_text())))
    assert [float(row["lr"]) for row in rows] == [0.0, *found.lrs]
    assert [float(row["smoothed"]) for row in rows] == [found.first_loss, *found.smoothed]
    page = found.save(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "plotly" in page
    assert [trace.name.split()[0] for trace in found.plot().data] == ["loss", "smoothed", *RULES]
    with pytest.raises(ValueError, match=r"save: path must end in .html, .csv, .json, .png, got .*a.svg"):
        found.save(tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("width", "theme", "colour"), [(375, "dark", "rgb(228, 232, 238)"), (1200, "light", "rgb(30, 36, 48)")]
)
def test_the_page_in_a_browser(tmp_path: Path, width: int, theme: str, colour: str) -> None:
    model, loader, loss, _ = least_squares(0)
    found = find_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, loss)
    page = found.save(tmp_path / "page.html", title="<b>&")
    script = """
      await wait(300);
      const plot = doc.getElementById("curve"), box = plot.getBoundingClientRect();
      const chosen = doc.querySelector("tr.chosen").cells;
      return {title: doc.title, width: box.right, all: doc.documentElement.scrollWidth,
              rules: doc.querySelectorAll("tbody tr").length, points: plot.data[1].x.length,
              chosen: [chosen[0].textContent, chosen[1].textContent],
              markers: plot.data.filter(t => t.mode === "markers").length,
              colour: win.getComputedStyle(doc.body).color};"""
    seen = look(page, script, width=width, theme=theme)
    assert seen["title"] == "<b>&"
    assert seen["width"] <= width
    assert seen["all"] <= width
    assert (seen["rules"], seen["points"]) == (len(RULES), len(found.smoothed))
    assert seen["markers"] == sum(lr is not None for lr in found.suggestions.values())
    assert seen["chosen"] == ["minimum", f"{found.lr:.3g}"]
    assert seen["colour"] == colour


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    model = Point(torch.ones(1))
    found = find_lr(
        model, torch.optim.SGD(model.parameters(), lr=1), [0],
        lambda model, b: model.x.sum().square().exp(), low=1e-3, high=1e3,
        stop_factor=math.inf,
    )  # fmt: skip
    assert found.stopped == "nonfinite"
    document = json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert document["losses"][-1] is None
    assert document["settings"]["stop_factor"] is None
    assert found.to_csv().splitlines()[-1].split(",")[2] == ""
    found.plot()


def test_it_needs_no_lab_extra_but_to_plot() -> None:
    code = (
        "import sys\nfor n in ('plotly', 'rich', 'typer', 'sklearn'): sys.modules[n] = None\n"
        "import torch, schuss\nfrom torch import nn\nm = nn.Linear(2, 1)\n"
        "o = torch.optim.SGD(m.parameters(), 1.0)\n"
        "f = schuss.find_lr(m, o, [torch.ones(1, 2)], lambda model, x: model(x).sum())\n"
        "print(f.lr is not None, len(f.to_csv()) > 9)\n"
        "try: f.plot()\nexcept ModuleNotFoundError as e: print(e)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith('True True\nfind_lr: a plot needs the lab extra: pip install "schuss[lab]"')


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.0}, r"find_lr: low must be in \(0, inf\), got 0.0"),
        ({"high": math.inf}, r"find_lr: high must be in \(0, inf\), got inf"),
        ({"low": 1.0, "high": 1.0}, "find_lr: low must be less than high, got 1 and 1"),
        ({"steps": 9}, r"find_lr: steps must be in \[10, inf\), got 9"),
        ({"smoothing": 1.0}, r"find_lr: smoothing must be in \[0, 1\), got 1.0"),
        ({"stop_factor": 1.0}, r"find_lr: stop_factor must be in \(1, inf\], got 1.0"),
        ({"rule": "vally"}, "find_lr: unknown rule 'vally': did you mean 'valley'?"),
        ({"precision": "float16"}, "find_lr: precision must be float32 or bfloat16, got 'float16'"),
        ({"loader": iter([0])}, "find_lr: loader is an iterator .*islice"),
        ({"loader": []}, "find_lr: loader gave no batch"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], message: str) -> None:
    model, loss = bowl(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    loader = arguments.pop("loader", [0])
    with pytest.raises(ValueError, match=message):
        find_lr(model, optimizer, loader, loss, **arguments)


def test_batches_that_do_not_go_with_the_loss_are_told_by_this_name() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(
        TypeError, match=r"^find_lr: a batch must be a pair \(x, y\) for loss_fn\(model\(x\), y\), got a Te"
    ):
        find_lr(model, torch.optim.SGD(model.parameters(), lr=1), [torch.ones(1)], mse_loss)


def test_optimizers_that_need_a_closure_are_refused() -> None:
    model, loss = bowl(torch.ones(2, dtype=torch.float64))
    lbfgs = [cls(model.parameters()) for cls in (torch.optim.LBFGS, optim.LBFGS)]
    for optimizer in (*lbfgs, *map(Lookahead, lbfgs)):
        with pytest.raises(TypeError, match=r"find_lr: LBFGS needs a closure.*its rate is 1, there is none to find"):
            find_lr(model, optimizer, [0], loss)
    for sam in (SAM(optim.SGD(model.parameters(), lr=1)), Lookahead(SAM(torch.optim.SGD(model.parameters(), lr=1)))):
        with pytest.raises(TypeError, match=r"evaluates the loss twice in a step; pass the optimizer inside"):
            find_lr(model, sam, [0], loss)
    other = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has no parameter of the model"):
        find_lr(model, torch.optim.SGD(other.parameters(), lr=1), [0], loss)


def test_remarks_about_optimizers_for_which_the_test_says_less() -> None:
    for name, words in (("Prodigy", "finds its rate itself"), ("ScheduleFreeAdamW", "averages all its steps")):
        model, optimizer = seeded(BUILDERS[name])
        assert any(words in line for line in find_lr(model, optimizer, data(), mse_loss, steps=20).remarks)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_curve_and_the_suggestions_and_writes_a_file(tmp_path: Path) -> None:
    out = tmp_path / "curve.csv"
    arguments = ["find-lr", "noisy_quadratic", "--optimizer", "torch:SGD", "--steps", "60", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    words = {line.removeprefix("*").split()[0]: line for line in result.stdout.splitlines() if line.split()}
    assert {*RULES} <= {*words}
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    lowest = min(rows[1:], key=lambda row: float(row["smoothed"] or "inf"))
    assert words["minimum"].split()[:3] == ["*", "minimum", f"{float(lowest['lr']) / 10:.3g}"]
    assert float(rows[2]["lr"]) / float(rows[1]["lr"]) == pytest.approx(1e8 ** (1 / 59))
    assert "torch:SGD on noisy_quadratic" in result.stdout
    assert result.stdout.count(" | ") == 10
    assert CliRunner().invoke(app, arguments).stdout == result.stdout


def test_the_command_takes_a_workload_of_yours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_find_lr.py").write_text(
        "import torch\nfrom schuss.lab.workload import Task\n"
        "def line(seed):\n"
        "    m = torch.nn.Linear(1, 1)\n"
        "    loss = lambda m, b: ((m(b) - 2 * b) ** 2).mean()\n"
        "    return Task(m, [torch.ones(4, 1)], loss, lambda m: {'loss': 0.0}, 'loss', 0.1, 1, 4)\n"
    )
    result = CliRunner().invoke(app, ["find-lr", "mine_for_find_lr:line", "--high", "1"])
    assert result.exit_code == 0, result.output
    assert "AdamW on mine_for_find_lr:line" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown workload 'nosuch'"),
        (["digits", "--optimizer", "AdmW"], "unknown optimizer 'AdmW': did you mean"),
        (["noisy_quadratic", "--optimizer", "torch:LBFGS"], "find_lr: LBFGS needs a closure"),
        (["noisy_quadratic", "--low", "2", "--high", "1"], "find_lr: low must be less than high, got 2 and 1"),
        (["noisy_quadratic", "--steps", "3"], "find_lr: steps must be in [10, inf), got 3"),
        (["noisy_quadratic", "--out", "curve.svg"], "--out must end in .html, .csv, .json, .png, got curve.svg"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["find-lr", *arguments])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)
