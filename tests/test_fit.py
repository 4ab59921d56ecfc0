"""`fit` does what the loop by hand does, in its order; and stopped anywhere, goes on to the same bits."""

import io
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from schuss import optim
from schuss.schedules import Schedule, cosine, linear
from schuss.training.accumulate import accumulate
from schuss.training.checkpoints import load_checkpoint
from schuss.training.fit import fit
from schuss.training.history import History
from schuss.wrappers import SAM, Lookahead

torch.manual_seed(5)
X = torch.randn(23, 3)
Y = X.sin().sum(1, keepdim=True)
PAIRS = list(zip(X.split(5), Y.split(5), strict=True))  # five batches, the last of 3


def model_of(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: Any, b: Any) -> bool:
    """Whether two nests of tensors and numbers are the same, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


# --- one step after another -------------------------------------------------------------------------------------------


class Told:
    """What happened, in its order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def telling(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            self.events.append(name)
            return function(*args, **kwargs)

        return told


def test_the_order_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, model = Told(), model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    for owner, name in ((model, "forward"), (optimizer, "zero_grad"), (schedule, "step")):
        told_of = told.telling(f"{type(owner).__name__}.{name}", getattr(type(owner), name))
        monkeypatch.setattr(type(owner), name, told_of)
    optimizer.register_step_pre_hook(lambda *_: told.events.append("optimizer"))
    for name in ("clip_grad_norm_", "save_checkpoint"):
        module = sys.modules["schuss.training.step" if name == "clip_grad_norm_" else "schuss.training.fit"]
        monkeypatch.setattr(module, name, told.telling(name, getattr(module, name)))
    fit(
        model, PAIRS, mse_loss, optimizer, epochs=1, accumulate=2, schedule=schedule, clip_norm=1.0,
        on_step=lambda _: told.events.append("on_step"), evaluate=told.telling("evaluate", lambda _: 1.0),
        evaluate_every=2, checkpoint=tmp_path, checkpoint_every=3,
    )  # fmt: skip
    whole = ["SGD.zero_grad", "Sequential.forward", "Sequential.forward", "clip_grad_norm_", "optimizer"]
    whole += ["LinearLR.step", "on_step"]
    short = whole[:1] + whole[2:]
    best = ["evaluate", "save_checkpoint"]
    assert told.events == [*whole, *whole, *best, *short, "save_checkpoint", "save_checkpoint", "evaluate"]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("library", [torch.optim, optim])
def test_is_the_loop_by_hand(accumulated: int, library: Any) -> None:
    """Written with torch alone."""
    model = model_of()
    optimizer = library.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
    losses = []
    for _ in range(3):
        for first in range(0, 5, accumulated):
            window = PAIRS[first : first + accumulated]
            count, total = sum(len(x) for x, _ in window), 0.0
            optimizer.zero_grad()
            for x, y in window:
                loss = mse_loss(model(x), y)
                (loss * (len(x) / count)).backward()
                total = total + loss.detach() * (len(x) / count)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            losses.append(float(total))
    by_hand, lr = values(model), schedule.get_last_lr()

    model = model_of()
    optimizer = library.AdamW(model.parameters(), lr=0.01, **({"max_norm": 0.5} if library is optim else {}))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
    history = fit(
        model, PAIRS, mse_loss, optimizer, epochs=3, schedule=schedule, accumulate=accumulated,
        clip_norm=None if library is optim else 0.5,
    )  # fmt: skip
    # A norm that is summed otherwise, or unscaled gradients that are not rounded, differ in the last bits.
    torch.testing.assert_close(values(model), by_hand, rtol=1e-5, atol=1e-6)
    assert history.losses == pytest.approx(losses, rel=1e-5)
    assert schedule.get_last_lr() == lr
    assert (history.steps, history.epochs, history.stopped) == (len(losses), 3, "epochs")


def test_is_the_loop_by_hand_to_the_bit() -> None:
    def build() -> tuple[nn.Module, Any, Any]:
        model = model_of(dropout=0.2)
        optimizer = optim.AdamW(model.parameters(), lr=0.01, max_norm=0.5, ema_decay=0.9)
        return model, optimizer, Schedule(optimizer, lr=cosine(9))

    model, optimizer, schedule = build()
    losses = []
    for _ in range(3):
        for window in accumulate(PAIRS, 2):
            optimizer.zero_grad()
            for x, y in window:
                window.backward(mse_loss(model(x), y))
            optimizer.step()
            schedule.step()
            losses.append(window.loss.item())
    other, second, schedule = build()
    history = fit(other, PAIRS, mse_loss, second, epochs=3, schedule=schedule, accumulate=2)
    assert equal(values(model), values(other))
    assert equal(optimizer.state_dict(), second.state_dict())
    assert history.losses == losses


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a tensor is asked for in a step, but for its loss, once in a hundred steps."""
    told, model = Told(), model_of()
    for name in ("item", "tolist", "__float__", "__bool__", "numpy"):
        monkeypatch.setattr(Tensor, name, told.telling(name, getattr(Tensor, name)))
    history = fit(model, PAIRS, mse_loss, torch.optim.SGD(model.parameters(), 0.1), steps=99)
    assert told.events == []
    assert len(history.losses) == 99
    assert told.events == ["tolist"]
    fit(model, PAIRS, mse_loss, torch.optim.SGD(model.parameters(), 0.1), steps=250)
    assert told.events == ["tolist"] * 3


Named = namedtuple("Named", "x y")


@pytest.mark.parametrize(
    "kind",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: Named(x, y),
        lambda x, y: {"x": x, "y": y},
        lambda x, y: (x, [y], "a text"),
    ],
)
def test_batches_of_any_kind(kind: Callable[[Tensor, Tensor], Any]) -> None:
    """Of pairs by default; a loss whose first parameter is called model takes any, with tensors moved."""
    batches = [kind(x.double(), y.double()) for x, y in PAIRS]
    moved: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        moved.append(batch)
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        return mse_loss(model(x), y[0] if isinstance(y, list) else y)

    model = model_of().double()
    history = fit(model, batches, loss, optim.SGD(model.parameters(), lr=0.1), epochs=2)
    assert [type(batch) for batch in moved] == [type(batch) for batch in batches] * 2
    if isinstance(batches[0], (tuple, list)) and len(batches[0]) == 2:
        model = model_of().double()
        other = fit(model, batches, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.1), epochs=2)
        assert other.losses == history.losses


def test_tensors_of_a_batch_are_moved() -> None:
    """To the device of the model, or to the one that is named."""
    seen: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return mse_loss(model(X), Y)

    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])  # a named tuple that knows better
    batch = {"a": torch.ones(2), "b": [torch.ones(3), Named(torch.ones(1), "a text")], "packed": packed}
    for device in (None, "meta"):
        model = model_of()
        fit(model, [batch], loss, optim.SGD(model.parameters(), lr=0.1), steps=1, device=device)
        a, (b, c) = seen[-1]["a"], seen[-1]["b"]
        assert {t.device.type for t in (a, b, c.x)} == {device or "cpu"}
        assert (type(c), c.y) == (Named, "a text")
        packed = seen[-1]["packed"]
        assert (packed.data.device.type, packed.batch_sizes.device.type) == (device or "cpu", "cpu")


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield X[0], Y[0]


def test_data_without_a_length() -> None:
    model = model_of()
    history = fit(
        model, DataLoader(Endless(), batch_size=4), mse_loss, optim.SGD(model.parameters(), lr=0.1), steps=7,
        accumulate=2, evaluate=lambda _: 1.0,
    )  # fmt: skip
    assert (history.steps, history.epochs, history.stopped) == (7, 0, "steps")
    assert [e["step"] for e in history.evaluations] == [7]


def test_a_generator_has_one_epoch() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="gave no batch; a generator does so after its first epoch"):
        fit(model, iter(PAIRS), mse_loss, optim.SGD(model.parameters(), lr=0.1), epochs=2)


def test_an_epoch_is_told_to_the_sampler() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __iter__(self) -> Iterator[int]:
            return iter(range(23))

        def __len__(self) -> int:
            return 23

    sampler, model = Sampler(), model_of()
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, sampler=sampler)  # type: ignore[arg-type]
    fit(model, loader, mse_loss, optim.SGD(model.parameters(), lr=0.1), epochs=3)
    assert sampler.epochs == [0, 1, 2]


# --- mixed precision and steps that are left out ----------------------------------------------------------------------


def test_the_forward_pass_is_autocast() -> None:
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model, seen = model_of(), []
        model[0].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.dtype))
        data = [PAIRS[0]]
        fit(model, data, mse_loss, optim.SGD(model.parameters(), 0.1), steps=1, precision=precision, evaluate=data)
        assert seen == [dtype, dtype]
        assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["schuss", "schuss clip_norm", "torch", "torch clip_norm", "torch fused"])
def test_a_step_that_the_scaler_leaves_out_changes_nothing(kind: str) -> None:
    model, before = model_of(), []
    if kind.startswith("schuss"):
        optimizer: Any = optim.AdamW(model.parameters(), lr=0.01, ema_decay=0.5, max_norm=1.0)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused="fused" in kind)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=10**6)
    kept: list[Any] = []

    def on_step(history: History) -> None:
        kept.append((values(model), schedule.get_last_lr()[0], history.skipped, len(optimizer.state)))

    before = values(model)
    history = fit(
        model, PAIRS, mse_loss, optimizer, epochs=3, precision="float16", scaler=scaler, schedule=schedule,
        clip_norm=1.0 if "clip_norm" in kind else None, on_step=on_step,
    )  # fmt: skip
    left_out = history.skipped
    assert 1 <= left_out <= 8, "the scale is halved until gradients fit into float16"
    assert history.steps == len(history.losses) == 15
    for parameters, lr, skipped, states in kept[:left_out]:
        assert equal(parameters, before)
        assert lr == 0.01
        assert states == 0 or "fused" in kind  # torch's makes them, and steps them back
        assert skipped <= left_out
    assert not equal(kept[left_out][0], before)
    assert schedule.last_epoch == 15 - left_out
    assert {int(s["step"]) for s in optimizer.state.values()} == {15 - left_out}


@pytest.mark.parametrize("library", [torch.optim, optim])
def test_gradients_are_clipped_without_their_scale(library: Any) -> None:
    """A step of a limited length, and the norm that it has without a scaler."""
    norms, moves = [], []
    for precision in ("float32", "float16"):
        model, heard = model_of(), []
        before = values(model)
        fit(
            model, PAIRS[:1], mse_loss, library.SGD(model.parameters(), lr=1.0), steps=1, precision=precision,
            clip_norm=0.1, log_every=1, log=lambda _, found, heard=heard: heard.append(found["grad_norm"]),
        )  # fmt: skip
        norms += heard
        moves.append(torch.cat([(a - b).flatten() for a, b in zip(values(model), before, strict=True)]).norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert moves == pytest.approx([0.1, 0.1], rel=1e-3)


def test_a_step_without_finite_gradients_is_left_out() -> None:
    model = model_of()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, max_norm=1.0, nonfinite="skip", ema_decay=0.9)
    schedule = Schedule(optimizer, lr=linear(100))
    batches = [*PAIRS[:2], (X[:3] * math.inf, Y[:3]), *PAIRS[2:]]
    history = fit(model, batches, mse_loss, optimizer, epochs=2, schedule=schedule)
    assert (history.steps, history.skipped, optimizer.skipped_steps) == (12, 2, 2)
    assert schedule.last_epoch == 10
    assert [i for i, loss in enumerate(history.losses) if not math.isfinite(loss)] == [2, 8]
    assert all(p.isfinite().all() for p in model.parameters())
    assert {int(s["step"]) for s in optimizer.state.values()} == {10}


def test_a_schedule_that_follows_is_not_stepped() -> None:
    model = model_of()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(optimizer, follow=True, lr=linear(100))
    fit(model, PAIRS, mse_loss, optimizer, epochs=2, schedule=schedule)
    assert schedule.last_epoch == 10


def test_schedules_that_count_epochs() -> None:
    model, seen = model_of(), []
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    fit(
        model, PAIRS, mse_loss, optimizer, epochs=3, schedule=schedule, schedule_every="epoch",
        on_step=lambda _: seen.append(optimizer.param_groups[0]["lr"]),
    )  # fmt: skip
    assert seen == [1.0] * 5 + [0.5] * 5 + [0.25] * 5
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_plateau_hears_the_evaluations() -> None:
    model = model_of()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    numbers = iter([3.0, 2.0, 2.5, 1.0, 1.0])
    fit(
        model, PAIRS, mse_loss, optimizer, epochs=5, schedule=schedule,
        evaluate=lambda _: {"loss": next(numbers), "other": 0.0},
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert schedule.best == 1.0


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_an_evaluation_disturbs_nothing() -> None:
    """It sees averages in eval mode; afterwards parameters, modes and random numbers are as before."""
    seen: list[Any] = []

    def build() -> tuple[nn.Sequential, Any]:
        model = model_of(dropout=0.3)
        model[1].eval()
        return model, optim.AdamW(model.parameters(), lr=0.01, ema_decay=0.5)

    def evaluate(model: nn.Module) -> float:
        seen.append(([m.training for m in model.modules()], torch.is_grad_enabled(), values(model)))
        torch.rand(3), np.random.rand(), random.random()
        return 1.0

    model, optimizer = build()
    fit(model, PAIRS, mse_loss, optimizer, epochs=2)
    alone, drawn = values(model), torch.rand(2)

    model, optimizer = build()
    fit(model, PAIRS, mse_loss, optimizer, epochs=2, evaluate=evaluate, evaluate_every=3)
    assert equal(values(model), alone)
    assert torch.equal(torch.rand(2), drawn)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    modes, grad, parameters = seen[-1]
    assert not any(modes)
    assert not grad
    assert equal(parameters, [optimizer.state[p]["ema"] for p in model.parameters()])
    assert len(seen) == 4  # steps 3, 6, 9 and the end


def test_an_evaluation_that_raises_disturbs_nothing() -> None:
    def evaluate(model: nn.Module) -> float:
        raise ArithmeticError

    model = model_of(dropout=0.3)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, ema_decay=0.5)
    with pytest.raises(ArithmeticError):
        fit(model, PAIRS, mse_loss, optimizer, epochs=2, evaluate=evaluate)
    assert all(m.training for m in model.modules())
    assert not equal(values(model)[0], optimizer.state[model[0].weight]["ema"])
    optimizer.step()


def test_averages_inside_a_wrapper() -> None:
    model, seen = model_of(), []
    optimizer = Lookahead(optim.SGD(model.parameters(), lr=0.1, ema_decay=0.5))
    fit(model, PAIRS, mse_loss, optimizer, steps=3, evaluate=lambda m: seen.append(values(m)) or 1.0)
    assert equal(seen[0], [optimizer.state[p]["ema"] for p in model.parameters()])
    fit(model, PAIRS, mse_loss, Lookahead(torch.optim.SGD(model.parameters(), lr=0.1)), steps=3, evaluate=lambda _: 1.0)


def test_a_model_in_eval_mode_is_put_into_train_mode() -> None:
    model = model_of(dropout=0.3).eval()
    fit(model, PAIRS, mse_loss, optim.SGD(model.parameters(), lr=0.1), steps=1)
    assert all(m.training for m in model.modules())


def test_data_to_evaluate_are_weighted() -> None:
    model = model_of()
    history = fit(model, PAIRS, mse_loss, optim.SGD(model.parameters(), lr=0.1), epochs=1, evaluate=PAIRS)
    with torch.no_grad():
        assert history.evaluations == [{"step": 5, "loss": pytest.approx(mse_loss(model(X), Y).item(), rel=1e-6)}]
    assert history.best == history.evaluations[0]


@pytest.mark.parametrize(
    ("mode", "numbers", "patience", "best", "steps"),
    [
        ("min", [3, 2, 1, 1, 4, 0], 2, 1, 25),
        ("max", [3, 2, 1, 1, 4, 0], 2, 3, 15),
        ("max", [3, 2, 1, 1, 4, 0], 3, 3, 20),
        ("min", [3, 2, 1, 1, 4, 0], None, 0, 30),
        ("min", [math.nan, 2, math.nan, 3, 1, 1], 2, 2, 20),
        ("max", [math.nan, math.nan, math.nan], 3, None, 15),
    ],
)
def test_patience(mode: Any, numbers: list[float], patience: int | None, best: float | None, steps: int) -> None:
    model, rest = model_of(), iter(numbers)
    history = fit(
        model, PAIRS, mse_loss, optim.SGD(model.parameters(), lr=0.1), epochs=6, mode=mode, patience=patience,
        evaluate=lambda _: {"score": torch.tensor(next(rest)), "other": 5},
    )  # fmt: skip
    assert (history.steps, history.stopped) == (steps, "epochs" if steps == 30 else "patience")
    assert (history.best or {}).get("score") == best


def test_the_best_is_kept(tmp_path: Path) -> None:
    model, rest, kept = model_of(), iter([3.0, 1.0, 2.0]), []
    fit(
        model, PAIRS, mse_loss, optim.SGD(model.parameters(), lr=0.1), epochs=3, checkpoint=tmp_path,
        evaluate=lambda m: kept.append(values(m)) or next(rest),
    )  # fmt: skip
    assert load_checkpoint(tmp_path / "best.schuss", model=model).step == 10
    assert equal(values(model), kept[1])
    assert load_checkpoint(tmp_path, model=model).step == 15
    assert equal(values(model), kept[2])


def test_max_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, now = model_of(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def on_step(_: History) -> None:
        now[0] += 2.0

    optimizer = optim.SGD(model.parameters(), lr=0.1)
    history = fit(model, PAIRS, mse_loss, optimizer, epochs=9, max_seconds=13, on_step=on_step, evaluate=lambda _: 1.0)
    assert (history.steps, history.stopped, history.seconds) == (7, "max_seconds", 14.0)


# --- going on ---------------------------------------------------------------------------------------------------------


class Noisy(Dataset[Any]):
    """Data that are augmented with all three kinds of random numbers."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(3) + np.random.randn() + random.gauss()
        return X[i] + 0.1 * noise.float(), Y[i]


class Shuffled:
    """Batches in a new order each time, by the global generator."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(23).split(5):
            yield X[rows], Y[rows]


class Positioned:
    """Batches with a position of their own, which may be the end, and a generator that nobody sees."""

    def __init__(self) -> None:
        self.generator, self.order, self.at = torch.Generator().manual_seed(3), torch.arange(0), 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if len(self.order) == 0:
            self.order = torch.randperm(23, generator=self.generator)
        while self.at < 23:
            rows = self.order[self.at : self.at + 5]
            self.at += len(rows)
            yield X[rows], Y[rows]
        self.order, self.at = self.order[:0], 0

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.at = state["order"], state["at"]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled by the global generator": lambda: DataLoader(Noisy(), 5, shuffle=True),
    "shuffled by its own": lambda: DataLoader(Noisy(), 5, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "an iterable": Shuffled,
    "with a position": Positioned,
}


def run(make: Callable[[], Any], folder: Path | None, **options: Any) -> tuple[History, dict[str, Any]]:
    """A training with everything that has a state; its history, and where it ended."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)
    model = model_of(dropout=0.2)
    torch.manual_seed(9)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, max_norm=0.5, ema_decay=0.9)
    schedule = Schedule(optimizer, lr=cosine(9), weight_decay=linear(9))
    history = fit(
        model, make(), mse_loss, optimizer,
        **{
            "epochs": 3, "accumulate": 2, "schedule": schedule, "checkpoint": folder,
            "evaluate": lambda m: mse_loss(m(X), Y).item(), **options, **({} if folder else {"checkpoint_every": None}),
        },
    )  # fmt: skip
    return history, {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
        "losses": history.losses, "evaluations": history.evaluations, "steps": history.steps,
        "torch": torch.rand(3), "numpy": np.random.rand(), "python": random.random(),
    }  # fmt: skip


@pytest.mark.parametrize("kind", LOADERS)
def test_stopped_at_any_step_it_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    make = LOADERS[kind]
    _, whole = run(make, None)
    assert whole["steps"] == 9
    for stop in range(1, 10):
        folder = tmp_path / str(stop)
        first, _ = run(make, folder, on_step=lambda history, stop=stop: history.steps == stop)
        assert (first.stopped, first.epochs) == ("on_step", (stop - 1) // 3)  # nobody has asked for a fourth yet
        second, state = run(make, folder)
        assert (second.resumed, second.stopped, second.epochs) == (stop, "epochs", 3)
        assert [name for name in whole if not equal(whole[name], state[name])] == []


@pytest.mark.parametrize("options", [{"evaluate_every": 2}, {"evaluate_every": 4, "checkpoint_every": 1}, {"steps": 8}])
def test_stopped_at_every_step_it_goes_on_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    make = LOADERS["shuffled by the global generator"]
    _, whole = run(make, None, **options)
    stopped = "on_step"
    for step in range(1, 11):
        if stopped == "on_step":
            history, state = run(make, tmp_path, on_step=lambda _: True, **options)
            assert history.steps == min(step, whole["steps"])
            stopped = history.stopped
    state["evaluations"] = [e for e in state["evaluations"] if e in whole["evaluations"]]
    assert stopped in ("epochs", "steps")
    assert [name for name in whole if not equal(whole[name], state[name])] == []


def test_with_workers(tmp_path: Path) -> None:
    """Each has the seed that the epoch began with."""

    def make() -> Any:
        return DataLoader(Noisy(), 5, shuffle=True, num_workers=2)

    _, whole = run(make, None)
    run(make, tmp_path, on_step=lambda history: history.steps == 5)
    _, state = run(make, tmp_path)
    assert [name for name in whole if not equal(whole[name], state[name])] == []


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    """The evaluation of an end that would not be one in a longer training leaves no trace in it."""
    make = LOADERS["shuffled by the global generator"]
    patience = {"patience": 2, "evaluate": lambda _: 1.0}
    _, whole = run(make, None, **patience)
    first, _ = run(make, tmp_path, steps=4, **patience)
    assert [e["step"] for e in first.evaluations] == [3, 4]
    second, state = run(make, tmp_path, **patience)
    assert (second.steps, second.stale) == (9, 2)
    assert [name for name in whole if not equal(whole[name], state[name])] == []


def test_a_finished_training_comes_back_at_once(tmp_path: Path) -> None:
    first, whole = run(Shuffled, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    class Never:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    second, state = run(Never, tmp_path)
    assert [name for name in whole if not equal(whole[name], state[name])] == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert min(first.seconds, second.seconds) > 0


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
@pytest.mark.parametrize("where", ["on_step", "evaluate", "log"])
def test_what_raises_leaves_a_checkpoint(stop: int, where: str, tmp_path: Path) -> None:
    """Of that step, from which the training goes on to the same bits."""
    make = LOADERS["shuffled by the global generator"]
    steps = []

    def failing(*arguments: Any) -> Any:
        if len(steps) == stop:
            raise ArithmeticError("no")
        return mse_loss(arguments[0](X), Y).item() if where == "evaluate" else None

    def on_step(_: History) -> None:
        steps.append(0)
        if where == "on_step":
            failing()

    extra = {"evaluate_every": 1} if where != "on_step" else {}
    _, whole = run(make, None, **extra)
    broken = {"on_step": on_step, **({where: failing} if where != "on_step" else {}), "log_every": 1}
    with pytest.raises(ArithmeticError, match="no"):
        run(make, tmp_path, **extra, **broken)
    assert load_checkpoint(tmp_path, rng=False).step == stop
    history, state = run(make, tmp_path, **extra)
    assert history.resumed == stop
    assert [name for name in whole if not equal(whole[name], state[name])] == []


def test_an_error_in_a_step_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """What is half of a step is not saved."""
    make = LOADERS["shuffled by the global generator"]
    _, whole = run(make, None)
    calls = []

    class Breaking(DataLoader[Any]):
        def __iter__(self) -> Any:
            for i, batch in enumerate(super().__iter__()):
                calls.append(i)
                if len(calls) == 9:
                    raise OSError("the disk is gone")
                yield batch

    with pytest.raises(OSError, match="the disk is gone"):
        run(lambda: Breaking(Noisy(), 5, shuffle=True), tmp_path)
    assert load_checkpoint(tmp_path, rng=False).step == 3
    _, state = run(lambda: Breaking(Noisy(), 5, shuffle=True), tmp_path)
    assert [name for name in whole if not equal(whole[name], state[name])] == []


def test_a_scaler_goes_on(tmp_path: Path) -> None:
    def train(folder: Path | None, stop: int = 0) -> tuple[History, Any]:
        model = model_of()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
        history = fit(
            model, PAIRS, mse_loss, optimizer, epochs=3, precision="float16", scaler=scaler, checkpoint=folder,
            on_step=lambda history: history.steps == stop,
        )  # fmt: skip
        return history, (values(model), scaler.state_dict(), history.losses, history.skipped)

    _, whole = train(None)
    train(tmp_path, 7)
    history, state = train(tmp_path)
    assert history.resumed == 7
    assert equal(whole, state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_cuda_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def train(folder: Path | None, **options: Any) -> tuple[Any, ...]:
        model = model_of(dropout=0.2).cuda()
        torch.manual_seed(9)
        optimizer = optim.AdamW(model.parameters(), lr=0.01, max_norm=0.5, ema_decay=0.9)
        loader = DataLoader(TensorDataset(X, Y), 5, shuffle=True, pin_memory=True)
        history = fit(
            model, loader, mse_loss, optimizer, accumulate=2, precision="float16", checkpoint=folder, evaluate=PAIRS,
            schedule=Schedule(optimizer, lr=cosine(9)), **{"epochs": 3, **options},
        )  # fmt: skip
        return values(model), history.losses, history.evaluations, torch.rand(3, device="cuda")

    whole = train(None)
    train(tmp_path, steps=5)
    assert equal(train(tmp_path), whole)


def test_checkpoints_hold_no_code(tmp_path: Path) -> None:
    run(LOADERS["with a position"], tmp_path, steps=4)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["best.schuss", "step-00000003.schuss", "step-00000004.schuss"]
    for path in files:
        torch.load(path, weights_only=True)


def test_keep_last_and_every(tmp_path: Path) -> None:
    run(Shuffled, tmp_path, checkpoint_every=2, keep_last=2, evaluate=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008.schuss", "step-00000009.schuss"]


def test_starting_anew_beside_checkpoints_is_an_error(tmp_path: Path) -> None:
    run(Shuffled, tmp_path, resume=False)
    with pytest.raises(ValueError, match="has checkpoints; resume=True goes on from there, or name another folder"):
        run(Shuffled, tmp_path, resume=False)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_training_after_the_step(number: int, tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def on_step(history: History) -> None:
        if history.steps == 6:
            os.kill(os.getpid(), number)

    evaluated: list[int] = []
    history, _ = run(
        Shuffled, tmp_path, on_step=on_step, evaluate_every=6, evaluate=lambda _: evaluated.append(1) or 1.0
    )
    assert (history.steps, history.stopped, evaluated) == (6, "signal", [])
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    history, _ = run(Shuffled, tmp_path, evaluate_every=6, evaluate=lambda _: 1.0)
    assert (history.resumed, history.evaluations) == (6, [{"step": 6, "value": 1.0}, {"step": 9, "value": 1.0}])


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)  # twice: it is sent to a group of processes, and by name, say
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    model = model_of()
    with pytest.raises(KeyboardInterrupt):
        fit(model, PAIRS, loss, optim.SGD(model.parameters(), lr=0.1), epochs=1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_so() -> None:
    model = model_of()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        history = fit(
            model, PAIRS, mse_loss, optim.SGD(model.parameters(), lr=0.1), epochs=1,
            on_step=lambda _: os.kill(os.getpid(), signal.SIGINT),
        )  # fmt: skip
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert history.stopped == "epochs"


def test_in_another_thread_signals_are_left_alone() -> None:
    model, found = model_of(), []

    def train() -> None:
        seen: list[Any] = []
        fit(
            model, PAIRS, mse_loss, optim.SGD(model.parameters(), lr=0.1), epochs=1,
            on_step=lambda _: seen.append(signal.getsignal(signal.SIGTERM)),
        )  # fmt: skip
        found.extend(seen)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)] * 5


SCRIPT = """
import sys, time, torch
from torch import nn
from schuss.training.fit import fit
torch.manual_seed(0)
model = nn.Linear(3, 1)
data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(6)]
def on_step(history):
    print(history.steps, flush=True)
    time.sleep(pause)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
history = fit(model, data, nn.functional.mse_loss, optimizer, epochs=20, checkpoint=folder, on_step=on_step)
print(history.stopped, history.steps, model.weight.tolist(), history.losses)
"""


def test_a_process_that_is_terminated_and_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def start(pause: float) -> subprocess.Popen[str]:
        settings = f"folder, pause = {str(tmp_path)!r}, {pause}"
        root = Path(__file__).resolve().parent.parent
        return subprocess.Popen(
            [sys.executable, "-c", settings + SCRIPT], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip

    exec(SCRIPT, {"folder": None, "pause": 0})
    whole = capsys.readouterr().out.splitlines()[-1]
    with start(0.05) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "8\n":
                process.send_signal(signal.SIGTERM)
                break
        last = process.stdout.read().splitlines()[-1]
        assert process.wait(60) == 0
    assert last.startswith("signal ")
    with start(0) as process:
        again = process.communicate()[0].splitlines()
    assert int(again[0]) == int(last.split()[1]) + 1
    assert again[-1] == whole


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_log_function_hears_means(tmp_path: Path) -> None:
    heard: list[tuple[int, dict[str, float]]] = []
    make = LOADERS["shuffled by the global generator"]
    options = {"log_every": 2, "steps": 8}
    history, _ = run(make, None, log=lambda step, values: heard.append((step, dict(values))), **options)
    assert [(step, [*values]) for step, values in heard] == [
        (2, ["loss", "lr", "grad_norm"]), (3, ["evaluation/value"]), (4, ["loss", "lr", "grad_norm"]),
        (6, ["loss", "lr", "grad_norm"]), (6, ["evaluation/value"]), (8, ["loss", "lr", "grad_norm"]),
        (8, ["evaluation/value"]),
    ]  # fmt: skip
    assert heard[0][1]["loss"] == sum(history.losses[:2]) / 2
    assert heard[2][1]["lr"] == 0.01 * cosine(9)(4)
    assert heard[1][1] == {"evaluation/value": history.evaluations[0]["value"]}


def test_a_norm_by_clip_norm_and_rates_by_group() -> None:
    heard: list[dict[str, float]] = []
    model = model_of()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.2}]
    fit(
        model, PAIRS, mse_loss, torch.optim.SGD(groups, lr=0.1), steps=1, clip_norm=1e-3, log_every=1,
        log=lambda _, values: heard.append(dict(values)),
    )  # fmt: skip
    other = model_of()
    mse_loss(other(X[:5]), Y[:5]).backward()
    norm = nn.utils.get_total_norm([p.grad for p in other.parameters() if p.grad is not None])
    assert heard == [
        {"loss": pytest.approx(mse_loss(other(X[:5]), Y[:5]).item()), "lr/0": 0.1, "lr/1": 0.2,
         "grad_norm": pytest.approx(norm.item())},
    ]  # fmt: skip


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make = LOADERS["shuffled by the global generator"]
    log, options = tmp_path / "log", {"log_every": 2, "checkpoint_every": 3}
    whole, _ = run(make, None, **options)
    with pytest.raises(ArithmeticError):  # after step 4 was logged, but step 3 the last that was saved
        run(lambda: Failing(make(), 9), tmp_path / "run", log=log, **options)
    run(lambda: Failing(make(), 99), tmp_path / "run", log=log, **options)
    events = EventAccumulator(str(log))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["evaluation/value", "grad_norm", "loss", "lr"]
    shown = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in ("loss", "evaluation/value")}
    means = [(i, np.float32(sum(whole.losses[i - 2 : i]) / 2)) for i in (2, 4, 6, 8)]
    assert shown["loss"] == means
    assert shown["evaluation/value"] == [(e["step"], np.float32(e["value"])) for e in whole.evaluations]


class Failing:
    """Data whose n-th batch cannot be read."""

    def __init__(self, loader: DataLoader[Any], n: int) -> None:
        self.loader, self.left = loader, n

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.left -= 1
            if self.left == 0:
                raise ArithmeticError
            yield batch


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    model = model_of()
    with pytest.raises(ModuleNotFoundError, match=r'needs TensorBoard: pip install "schuss\[lab\]"'):
        fit(model, PAIRS, mse_loss, optim.SGD(model.parameters(), lr=0.1), epochs=1, log=tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fit(model, PAIRS, mse_loss, optimizer, epochs=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    fit(model, PAIRS, mse_loss, optimizer, epochs=1, progress=False)
    assert shown.getvalue() == ""
    fit(model, PAIRS, mse_loss, optimizer, epochs=4, accumulate=2, log_every=3, evaluate=lambda _: {"score": 0.25})
    assert "12/12" in shown.getvalue()
    assert "evaluation/score 0.25" in shown.getvalue()
    shown.truncate(0)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    fit(model, PAIRS, mse_loss, optimizer, epochs=1)
    assert shown.getvalue().strip("\0") == ""


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "fit: give epochs or steps, or it would never end"),
        ({"epochs": 0}, ValueError, "fit: epochs must be None or in [1, inf), got 0"),
        ({"steps": 1.5}, TypeError, "fit: steps must be an integer, got 1.5"),
        ({"epochs": True}, TypeError, "fit: epochs must be None or a number in [1, inf), got True"),
        ({"epochs": 1, "accumulate": None}, TypeError, "fit: accumulate must be a number in [1, inf), got None"),
        ({"epochs": 1, "log_every": 0}, ValueError, "fit: log_every must be in [1, inf), got 0"),
        ({"epochs": 1, "precision": "fp16"}, ValueError, "fit: precision must be one of float32, bfloat16, float16"),
        ({"epochs": 1, "schedule_every": "batch"}, ValueError, "fit: schedule_every must be one of step, epoch, got"),
        ({"epochs": 1, "mode": "best"}, ValueError, "fit: mode must be one of min, max, got 'best'"),
        ({"epochs": 1, "clip_norm": 0}, ValueError, "fit: clip_norm must be None or in (0, inf], got 0"),
        ({"epochs": 1, "max_seconds": -1}, ValueError, "fit: max_seconds must be None or in (0, inf), got -1"),
        ({"epochs": 1, "patience": 2}, ValueError, "fit: patience needs evaluate, a function or data"),
        ({"epochs": 1, "evaluate_every": 2}, ValueError, "fit: evaluate_every needs evaluate, a function or data"),
        ({"epochs": 1, "checkpoint_every": 2}, ValueError, "fit: checkpoint_every needs checkpoint, a folder"),
        ({"epochs": 1, "evaluate": lambda _: {}}, ValueError, "fit: evaluate must return a number, or numbers"),
        ({"epochs": 1, "evaluate": lambda _: {"step": 1}}, ValueError, "other than 'step', got {'step': 1}"),
        ({"epochs": 1, "evaluate": []}, ValueError, "fit: evaluate gave no batch; a generator does so after its first"),
        ({"epochs": 1, "data": [{"x": X}]}, TypeError, "fit: a batch must be a pair (x, y) for loss_fn(model(x), y)"),
        ({"epochs": 1, "data": []}, ValueError, "accumulate: the loader gave no batch"),
    ],
)  # fmt: skip
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = model_of()
    options = {"data": PAIRS, **options}
    with pytest.raises(error) as raised:
        fit(model, loss_fn=mse_loss, optimizer=optim.SGD(model.parameters(), lr=0.1), **options)
    assert message in str(raised.value)


def test_errors_about_the_optimizer() -> None:
    model = model_of()
    several: list[tuple[torch.optim.Optimizer, str]] = [
        (torch.optim.LBFGS(model.parameters()), "LBFGS"),
        (optim.LBFGS(model.parameters()), "LBFGS"),
        (Lookahead(torch.optim.LBFGS(model.parameters())), "LBFGS inside of Lookahead"),
        (Lookahead(optim.LBFGS(model.parameters())), "LBFGS inside of Lookahead"),
        (SAM(optim.SGD(model.parameters(), lr=0.1)), "SAM"),
        (Lookahead(SAM(optim.SGD(model.parameters(), lr=0.1))), "SAM inside of Lookahead"),
    ]
    before = [p.detach().clone() for p in model.parameters()]
    for one, named in several:
        with pytest.raises(TypeError, match=rf"fit: {named} needs a closure, .* with optimizer\.step\(closure\)"):
            fit(model, PAIRS, mse_loss, one, epochs=1)
    assert all(map(torch.equal, model.parameters(), before))
    with pytest.raises(ValueError, match=r"fit: the optimizer has no parameter of the model; make it from model\."):
        fit(model, PAIRS, mse_loss, optim.SGD(model_of().parameters(), lr=0.1), epochs=1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(optim.SGD(model.parameters(), lr=0.1), lr=linear(9))
    with pytest.raises(ValueError, match="fit: the schedule was made for another optimizer; make it from this one"):
        fit(model, PAIRS, mse_loss, optimizer, epochs=1, schedule=schedule)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match="fit: ReduceLROnPlateau needs evaluate, a function or data"):
        fit(model, PAIRS, mse_loss, optimizer, epochs=1, schedule=plateau)
    wrapper = Lookahead(optimizer)
    fit(model, PAIRS, mse_loss, wrapper, epochs=1, schedule=Schedule(optimizer, lr=linear(9)))


def test_a_model_of_another_training_is_an_error(tmp_path: Path) -> None:
    run(Shuffled, tmp_path, steps=2)
    model = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(ValueError, match="has no object to load into"):
        fit(model, PAIRS, mse_loss, optim.AdamW(model.parameters()), epochs=1, checkpoint=tmp_path)
