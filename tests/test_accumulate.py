"""A window of micro-batches gives the gradient of one large batch, exactly once per step."""

import math
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from schuss import optim
from schuss.training import Window, accumulate

few = settings(max_examples=40, deadline=None, derandomize=True)
sizes_and_steps = given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 10**6)
)  # fmt: skip


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def examples(sizes: list[int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    return (torch.randn(n, 3, generator=generator).double(), torch.randn(n, 4, generator=generator).double())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(model: nn.Module, loss: Tensor) -> None:
    """The gradients that are there are those of `loss`, to the rounding of float64."""
    there = gradients(model)
    model.zero_grad()
    loss.backward()
    assert len(there) == len(gradients(model)) > 0
    for a, b in zip(there, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@few
@sizes_and_steps
def test_windows_equal_the_large_batch(sizes: list[int], steps: int, seed: int) -> None:
    model, (x, y) = model_of(seed), examples(sizes, seed)
    micro_batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    seen = 0
    windows = accumulate(micro_batches, steps)
    for count, window in enumerate(windows, start=1):  # noqa: B007
        model.zero_grad()
        rows = slice(seen, seen + int(window.size))
        for part, target in window:
            window.backward(mse_loss(model(part), target))
            seen += len(part)
        assert rows.stop == seen
        whole = mse_loss(model(x[rows]), y[rows])
        torch.testing.assert_close(window.loss, whole.detach(), rtol=1e-13, atol=0)
        assert_same(model, whole)
    assert seen == sum(sizes)
    assert count == len(windows) == math.ceil(len(sizes) / steps)


@few
@sizes_and_steps
def test_windows_of_masked_tokens_equal_the_large_batch(sizes: list[int], steps: int, seed: int) -> None:
    """The mean runs over tokens that are not masked, of which micro-batches of equal length have unequal numbers."""
    model, (x, _) = model_of(seed), examples([len(sizes) * 9], seed)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (len(x),), generator=generator)
    for i, kept in enumerate(sizes):
        y[9 * i + kept : 9 * i + 9] = -100
    batches = [UserDict(x=a, y=b) for a, b in zip(x.split(9), y.split(9), strict=True)]

    def loss_of(inputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return cross_entropy(model(inputs), labels, reduction=reduction)

    for reduction in ("mean", "sum"):
        start = 0
        for window in accumulate(batches, steps, size=lambda b: (b["y"] != -100).sum(), reduction=reduction):
            model.zero_grad()
            rows = slice(9 * start, 9 * (start + len(window)))
            start += len(window)
            for batch in window:
                window.backward(loss_of(batch["x"], batch["y"], reduction))
            torch.testing.assert_close(
                window.loss, loss_of(x[rows], y[rows]).detach(), rtol=1e-13, atol=0
            )  # fmt: skip
            assert_same(model, loss_of(x[rows], y[rows]))


def test_class_weights_are_sizes() -> None:
    model, (x, _) = model_of(), examples([10], 0)
    y, w = torch.arange(10) % 4, torch.tensor([1.0, 5.0, 0.5, 2.0], dtype=torch.float64)
    micro_batches = zip(x.split(4), y.split(4), strict=True)
    for window in accumulate(micro_batches, 3, size=lambda batch: w[batch[1]].sum()):
        for part, target in window:
            window.backward(cross_entropy(model(part), target, weight=w))
    assert_same(model, cross_entropy(model(x), y, weight=w))


def test_known_numbers() -> None:
    """Micro-batches of 8, 8, 8 and 3, whose mean is -.16456 and the mean of whose means -.11410."""
    p = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x = torch.cat([torch.full((24,), -0.204928), torch.full((3,), 0.158384)]).double()
    for window in accumulate(x.split(8), steps=4):
        for part in window:
            window.backward((p * part).mean())
    assert p.grad.item() == pytest.approx(x.mean().item(), abs=1e-15)
    assert p.grad.item() == pytest.approx(-0.16456, abs=5e-6)
    assert torch.stack([part.mean() for part in x.split(8)]).mean().item() == pytest.approx(-0.11410, abs=5e-6)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, optim.AdamW, optim.SGD])
def test_training_takes_the_path_of_large_batches(cls: Any) -> None:
    """One step of the optimizer and of the schedule per window, for three epochs with a short last window."""
    x, y = examples([27], 1)
    micro, large = model_of(), model_of()
    runs = []
    for model in (micro, large):
        optimizer = cls(model.parameters(), lr=0.05)
        runs.append((model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)))
    windows = accumulate(list(zip(x.split(5), y.split(5), strict=True)), steps=4)
    assert len(windows) == 2
    for _ in range(3):
        model, optimizer, scheduler = runs[0]
        for window in windows:
            optimizer.zero_grad()
            for part, target in window:
                window.backward(mse_loss(model(part), target))
            optimizer.step()
            scheduler.step()
        model, optimizer, scheduler = runs[1]
        for part, target in zip(x.split(20), y.split(20), strict=True):
            optimizer.zero_grad()
            mse_loss(model(part), target).backward()
            optimizer.step()
            scheduler.step()
    for a, b in zip(micro.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert runs[0][2].last_epoch == 6


class Fake(nn.Module):
    """A model that records for every forward and backward whether gradients would be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.syncs, self.log = model_of(), True, []
        self.inner[0].weight.register_post_accumulate_grad_hook(lambda _: self.log.append(("backward", self.syncs)))

    def forward(self, x: Tensor) -> Any:
        self.log.append(("forward", self.syncs))
        return self.inner(x)


class FakeDistributed(Fake):
    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.syncs = False
        try:
            yield
        finally:
            self.syncs = True


class FakeSharded(Fake):
    def set_requires_gradient_sync(self, syncs: bool) -> None:
        self.syncs = syncs


@pytest.mark.parametrize("cls", [FakeDistributed, FakeSharded])
def test_gradients_are_exchanged_once_per_window(cls: type[Fake]) -> None:
    x, y = examples([2] * 7, 0)
    model = cls()
    for window in accumulate(list(zip(x.split(2), y.split(2), strict=True)), 3, model=model):
        for part, target in window:
            window.backward(mse_loss(model(part), target))
    assert model.log == [
        (what, last) for last in [False, False, True, False, False, True, True] for what in ("forward", "backward")
    ]


@pytest.mark.parametrize("cls", [FakeDistributed, FakeSharded])
@pytest.mark.parametrize("leave", ["raise", "break"])
def test_the_exchange_is_on_again_after_a_window_that_was_left(cls: type[Fake], leave: str) -> None:
    model, (x, _) = cls(), examples([4], 0)
    for window in accumulate(x.split(1), 4, model=model):
        try:
            for part in window:
                window.backward(model(part).sum())
                assert not model.syncs
                if leave == "break":
                    break
                raise ArithmeticError
        except ArithmeticError:
            pass
        assert model.syncs
        window.abandon()


def test_a_plain_model_and_none_are_the_same() -> None:
    model, (x, _) = model_of(), examples([4], 0)
    for window in accumulate(x.split(1), 2, model=model):
        for part in window:
            window.backward(model(part).mean())


def _worker(rank: int, sizes: list[list[int]], file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(sizes))
    x, y = examples([sum(map(sum, sizes))], 5)
    start = sum(map(sum, sizes[:rank]))
    mine = [t[start : start + sum(sizes[rank])].split(sizes[rank]) for t in (x, y)]
    model = nn.parallel.DistributedDataParallel(model_of())
    for window in accumulate(list(zip(*mine, strict=True)), 4, model=model):
        for part, target in window:
            window.backward(mse_loss(model(part), target))
    assert_same_as = model_of()
    mse_loss(assert_same_as(x), y).backward()
    for a, b in zip(gradients(model.module), gradients(assert_same_as), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_processes_with_unequal_windows_equal_the_large_batch(tmp_path: Any) -> None:
    mp.spawn(_worker, ([[8, 8, 8, 3], [5, 1]], str(tmp_path / "rendezvous")), nprocs=2)


@pytest.mark.parametrize("cls", [torch.optim.SGD, optim.SGD])
def test_grad_scaler(cls: Any) -> None:
    """The scale is the same throughout a window, a step is skipped as a whole, and the numbers are those without."""
    x, y = examples([11], 2)
    batches = list(zip(x.float().split(2), y.float().split(2), strict=True))
    runs = []
    for enabled in (True, False):
        model = model_of().float()
        optimizer = cls(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1, enabled=enabled)
        losses = []
        for window in accumulate(batches, 4):
            optimizer.zero_grad()
            for part, target in window:
                scaler.scale(window.weighted(mse_loss(model(part), target))).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(window.loss)
        if enabled:
            assert scaler.get_scale() == 2.0**12
            before = [p.clone() for p in model.parameters()]
            for window in accumulate(batches, 6):
                optimizer.zero_grad()
                for i, (part, target) in enumerate(window):
                    scaler.scale(
                        window.weighted(mse_loss(model(part), target) * (math.inf if i == 2 else 1))
                    ).backward()
                scaler.step(optimizer)
                scaler.update()
            assert all(map(torch.equal, before, model.parameters()))
            assert scaler.get_scale() == 2.0**11
        runs.append((list(model.parameters()), losses))
    for a, b in zip(*(parameters for parameters, _ in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert runs[0][1] == runs[1][1]


def test_low_precision_losses_are_added_in_float32() -> None:
    one = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    for window in accumulate([torch.zeros(1)] * 400, 400):
        for _ in window:
            window.backward(one * 1.0)
        assert window.loss.dtype == torch.float32
        assert window.loss.item() == pytest.approx(1.0, abs=1e-5)
        assert not window.loss.requires_grad


@dataclass
class Batch:
    label: str
    scale: Tensor
    pixels: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 7),
        (torch.zeros(3), torch.zeros(5)),
        {"id": "a", "x": [torch.zeros(()), torch.zeros(3)]},
        UserDict(x=torch.zeros(3, 1)),
        Batch("b", torch.ones(()), torch.zeros(3, 2)),
        torch.zeros(3).numpy(),
    ],
    ids=["tensor", "tuple", "dict", "UserDict", "dataclass", "array"],
)
def test_the_size_is_the_length_of_the_first_tensor(batch: Any) -> None:
    (window,) = unchecked([batch], 1)
    assert window.size == 3


def unchecked(*arguments: Any, **keywords: Any) -> list[Window[Any]]:
    windows = []
    for window in accumulate(*arguments, **keywords):
        windows.append(window)
        if not window._begun:
            window.abandon()
    return windows


def test_micro_batches_are_let_go_as_they_are_used() -> None:
    alive: list[int] = []

    class Counted:
        shape = (1,)

        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    loss = torch.ones((), requires_grad=True)
    for window in accumulate((Counted() for _ in range(4)), 4):
        assert len(alive) == 4
        for i, batch in enumerate(window):
            assert len(alive) == 4 - i
            del batch
            window.backward(loss * 1)
    assert not alive


def test_an_abandoned_window_ends_and_the_next_is_whole() -> None:
    p = torch.zeros((), requires_grad=True)
    lengths = []
    for i, window in enumerate(accumulate([torch.ones(1)] * 5, 2)):
        for j, _ in enumerate(window):
            if i == 0:
                window.abandon()
            else:
                window.backward(p * 1)
                lengths.append((i, j))
    assert lengths == [(1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], 0), ValueError, r"accumulate: steps must be in \[1, inf\), got 0"),
        (([], 2.5), TypeError, r"accumulate: steps must be an integer in \[1, inf\), got 2.5"),
        (([], True), TypeError, r"accumulate: steps must be an integer in \[1, inf\), got True"),
        (([], 2, "max"), ValueError, "accumulate: reduction must be 'mean' or 'sum', got 'max'"),
        (([], 2), ValueError, "accumulate: the loader gave no batch; a generator does so after its first epoch"),
        ((["a"], 2), TypeError, "accumulate: found no tensor in a str; pass size="),
        (([torch.zeros(())], 2), TypeError, "accumulate: found no tensor in a Tensor; pass size="),
        (
            ([torch.ones(1), torch.ones(0)], 2),
            ValueError,
            r"accumulate: size of micro-batch 2 of 2 must be in \(0, inf\), got 0",
        ),
        (([-1], 2, "mean", float), ValueError, r"size of micro-batch 1 of 1 must be in \(0, inf\), got -1.0"),
        (([math.nan], 2, "mean", float), ValueError, r"must be in \(0, inf\), got nan"),
        (([0, 0], 2, "sum", float), ValueError, r"accumulate: size of the window must be in \(0, inf\), got 0.0"),
        (([0], 2, "mean", str), TypeError, r"must be a number in \(0, inf\), got '0' \(str\)"),
    ],
)
def test_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    names = ("loader", "steps", "reduction", "size")
    with pytest.raises(error, match=message):
        unchecked(**dict(zip(names, arguments, strict=False)))


def test_a_generator_is_used_up_after_an_epoch() -> None:
    windows = accumulate((torch.ones(2) for _ in range(3)), 2)
    with pytest.raises(TypeError, match="accumulate: a generator has no length, so its windows have none"):
        len(windows)
    p = torch.zeros((), requires_grad=True)
    for window in windows:
        for _ in window:
            window.backward(p * 1)
    with pytest.raises(ValueError, match="the loader gave no batch"):
        next(iter(windows))


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([1, 0, 1, 1], "accumulate: backward was not called for micro-batch 2 of 4"),
        ([1, 1, 1, 0, 0], "accumulate: backward was not called for micro-batch 4 of 4"),
        ([2, 1, 1, 1], "accumulate: backward was called twice for micro-batch 1 of 4; add the losses up first"),
        ([1, 1], "accumulate: 2 of the 4 micro-batches of a window were used, so its gradient is not that of the"),
        ([], "accumulate: 0 of the 4 micro-batches of a window were used"),
    ],
)
def test_backward_is_called_once_per_micro_batch(calls: list[int], message: str) -> None:
    p = torch.ones((), requires_grad=True)

    def run() -> None:
        for window in accumulate([torch.ones(2)] * 4, 4):
            for times, _ in zip(calls, window, strict=False):
                for _ in range(times):
                    window.backward(p * 1)

    with pytest.raises(RuntimeError, match=message):
        run()


def test_misuse_of_a_window() -> None:
    p = torch.ones((), requires_grad=True)
    window = next(iter(accumulate([torch.ones(2)] * 4, 4)))
    with pytest.raises(RuntimeError, match="accumulate: call backward inside the loop over the window"):
        window.backward(p * 1)
    with pytest.raises(RuntimeError, match="accumulate: the loss of a window is known after 4 calls of backward"):
        _ = window.loss
    for _ in window:
        with pytest.raises(ValueError, match=r"accumulate: the loss must be a scalar, got shape \(2,\)"):
            window.backward(p * torch.ones(2))
        with pytest.raises(TypeError, match="accumulate: the loss must be a tensor, got float"):
            window.backward(1.0)  # type: ignore[arg-type]
        window.backward(p * torch.ones(1))
    with pytest.raises(RuntimeError, match="accumulate: a window lets go of its micro-batches; loop over it once"):
        list(window)
    with pytest.raises(RuntimeError, match="call backward inside the loop"):
        _ = window.weight
