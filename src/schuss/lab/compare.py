"""Train one workload with several optimizers, learning rates and seeds."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from time import perf_counter

import torch

from schuss.lab.candidate import Candidate
from schuss.lab.workload import Workload


@dataclass(frozen=True)
class Run:
    """What one training run recorded.

    Args:
        optimizer: name of the candidate.
        lr: learning rate of the first step.
        seed: of the initial weights and of the order of the batches.
        train_loss: loss of each batch before its step; ends with the first that is not finite.
        test: what the workload evaluates, by name, before training and after each finished epoch.
        step_ms: median time of `optimizer.step()`, in milliseconds.
        train_step_ms: median time of a training step (batch, forward, backward, `optimizer.step()`), in milliseconds.
    """

    optimizer: str
    lr: float
    seed: int
    train_loss: tuple[float, ...]
    test: Mapping[str, tuple[float, ...]]
    step_ms: float
    train_step_ms: float

    @property
    def test_loss(self) -> tuple[float, ...]:
        """Before training and after each finished epoch."""
        return self.test["loss"]

    @property
    def test_accuracy(self) -> tuple[float, ...]:
        """At the same times, in [0, 1]; of classifiers."""
        return self.test["accuracy"]

    @property
    def diverged(self) -> bool:
        """Whether the last training or test loss is infinite or not a number."""
        return not (math.isfinite(self.train_loss[-1]) and math.isfinite(self.test_loss[-1]))


def compare(
    workload: Workload, candidates: Sequence[Candidate], *, seeds: Sequence[int] = (0,), epochs: int | None = None
) -> Iterator[Run]:
    """Train with every optimizer, at every learning rate of its grid, from every seed; yield each run as it ends.

    A run has as many epochs as the workload says, or `epochs`, in [1, inf). For a given seed every run starts from the
    same weights and sees the same batches in the same order.

    Raises:
        ValueError: at once, if an optimizer cannot train this workload.
    """
    for candidate in candidates:
        _rehearse(workload, candidate)
    # Optimizers alternate, so that a machine that slows down for a while slows all of them.
    rounds = zip_longest(*([(candidate, lr) for lr in candidate.lrs] for candidate in candidates))
    pairs = [pair for pairs in rounds for pair in pairs if pair is not None]
    return (train(workload, candidate, lr, seed=seed, epochs=epochs) for seed in seeds for candidate, lr in pairs)


def train(workload: Workload, candidate: Candidate, lr: float, *, seed: int = 0, epochs: int | None = None) -> Run:
    """Train once; a loss that is not finite ends the run.

    The learning rate falls linearly from `lr` to zero: at a constant one the last few batches decide the result, and
    that noise hides the differences between optimizers.
    """
    with torch.random.fork_rng(devices=[]):  # for dropout, and for workloads of others that draw from torch's own
        torch.manual_seed(seed)
        task = workload(seed)
        epochs = task.epochs if epochs is None else epochs
        optimizer = candidate.optimizer(task.model.parameters(), lr)
        steps = epochs * len(task.batches)
        train_loss: list[float] = []
        tests = [task.scores(optimizer)]
        step_s: list[float] = []
        train_step_s: list[float] = []
        for _ in range(epochs):
            began = perf_counter()
            for batch in task.batches:
                loss = task.loss(task.model, batch)
                train_loss.append(loss.item())
                if not math.isfinite(train_loss[-1]):
                    break
                optimizer.zero_grad()
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - len(step_s) / steps)
                before = perf_counter()
                optimizer.step()
                after = perf_counter()
                step_s.append(after - before)
                train_step_s.append(after - began)
                began = after
            if not math.isfinite(train_loss[-1]):
                break
            tests.append(task.scores(optimizer))
    return Run(
        optimizer=candidate.name,
        lr=lr,
        seed=seed,
        train_loss=tuple(train_loss),
        test={name: tuple(values[name] for values in tests) for name in tests[0]},
        step_ms=1e3 * statistics.median(step_s) if step_s else math.nan,
        train_step_ms=1e3 * statistics.median(train_step_s) if train_step_s else math.nan,
    )


def _rehearse(workload: Workload, candidate: Candidate) -> None:
    """Take one step, so that what cannot work ends before the first run, and compiling is not part of it."""
    with torch.random.fork_rng(devices=[]):
        task = workload(0)
        task.loss(task.model, next(iter(task.batches))).backward()
        try:
            candidate.optimizer(task.model.parameters(), candidate.lrs[0]).step()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{candidate.name} cannot train the {workload.name} workload: {error}") from error
