"""One training run: a complete one, whose learning rate falls to zero at its end."""

import math
import random
import statistics
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch.optim import Optimizer

from schuss import bounds
from schuss.lab.candidate import Candidate
from schuss.lab.workload import Workload
from schuss.schedules import constant, linear
from schuss.schedules import warmup as warming_up
from schuss.schedules.function import Function
from schuss.training.epochs import kept_random
from schuss.training.step import with_modes

PROTOCOL = 1
"""To be raised when `train` comes to other numbers: runs that are stored no longer count then."""


@dataclass(frozen=True)
class Run:
    """What one training run recorded.

    Args:
        optimizer: name of the candidate.
        lr: the highest learning rate of the schedule.
        seed: of the initial weights and of the order of the batches.
        train_loss: loss of each batch before its step; ends with the first that is not finite.
        test: what the workload evaluates, by name, before training and after each finished epoch.
        step_ms: median time of `optimizer.step()`, in milliseconds.
        train_step_ms: median time of a training step (batch, forward, backward, `optimizer.step()`), in milliseconds.
        workload: its name.
        steps: done at each evaluation.
        seconds: of training at each evaluation, without the time of evaluations.
        error: what was raised, if something was; then nothing else was recorded.
    """

    optimizer: str
    lr: float
    seed: int
    train_loss: tuple[float, ...]
    test: Mapping[str, tuple[float, ...]]
    step_ms: float
    train_step_ms: float
    workload: str = ""
    steps: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    error: str | None = None

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
        if self.error is not None:
            return False
        return not all(map(math.isfinite, [*self.train_loss[-1:], self.test_loss[-1]]))

    def seconds_at(self, steps: Sequence[int]) -> list[float]:
        """When steps ended: between two evaluations at an even pace, after the last one at that of the whole run."""
        last = self.steps[-1]
        pace = self.seconds[-1] / last if last else 1e-3 * self.train_step_ms
        known: list[float] = np.interp(steps, self.steps, self.seconds).tolist()
        return [at + pace * max(0, step - last) for step, at in zip(steps, known, strict=True)]

    @classmethod
    def failed(cls, workload: str, optimizer: str, lr: float, seed: int, error: str) -> "Run":
        """One that raised, or whose process ended."""
        return cls(optimizer, lr, seed, (), {}, math.nan, math.nan, workload, error=error)


def train(
    workload: Workload, candidate: Candidate, lr: float, *, seed: int = 0, epochs: int | None = None, warmup: float = 0
) -> Run:
    """Train once; a loss that is not finite ends the run.

    The learning rate of every group falls linearly to zero: at a constant one the last few batches decide the result,
    and that noise hides the differences between optimizers. With an optimizer that has `train` and `eval` of its own,
    as Schedule-Free has, it stays: averages are what such a one has in the place of a schedule.

    Args:
        workload: what to train.
        candidate: with which optimizer.
        lr: the learning rate that the schedule starts from; groups that the candidate gives others keep their ratios.
        seed: of the workload, and of the generators of Python, NumPy and torch, which go on as if nothing had been.
        epochs: instead of the workload's, in [1, inf).
        warmup: share of the steps in which the learning rate rises linearly before it falls, in [0, 1).
    """
    with seeded(seed):
        task = workload(seed)
        epochs = task.epochs if epochs is None else epochs
        optimizer = candidate.for_model(task.model, lr)
        factor = schedule(optimizer, epochs * len(task.batches), warmup)
        rates = [bounds.number(group["lr"]) for group in optimizer.param_groups]
        train_loss: list[float] = []
        tests = [task.scores(optimizer)]
        if (lacking := task.lacking(tests[0])) is not None:
            raise ValueError(lacking)
        step_s: list[float] = []
        train_step_s: list[float] = []
        steps, seconds = [0], [0.0]
        for _ in range(epochs):
            began, expected = perf_counter(), len(step_s) + len(task.batches)
            for batch in task.batches:
                loss = task.loss(task.model, batch)
                train_loss.append(loss.item())
                if not math.isfinite(train_loss[-1]):
                    break
                optimizer.zero_grad()
                loss.backward()
                now = factor(len(step_s))
                if len(optimizer.param_groups) != len(rates):
                    raise ValueError(
                        f"the optimizer has {len(optimizer.param_groups)} parameter groups now and had {len(rates)}; "
                        "give all of them when it is built"
                    )
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * now
                before = perf_counter()
                optimizer.step()
                after = perf_counter()
                step_s.append(after - before)
                train_step_s.append(after - began)
                began = after
            if train_loss and not math.isfinite(train_loss[-1]):
                break
            if len(step_s) != expected:
                raise ValueError(
                    f"batches gave {len(step_s) - expected + len(task.batches)} in epoch {len(tests)} and have length "
                    f"{len(task.batches)}; each time one goes through them must be a whole epoch"
                )
            tests.append(task.scores(optimizer))
            if tests[-1].keys() != tests[0].keys():
                raise ValueError(
                    f"evaluate gave {_listed(tests[-1])} after epoch {len(tests) - 1} and {_listed(tests[0])} before "
                    "training; give the same values each time"
                )
            steps.append(len(step_s))
            seconds.append(math.fsum(train_step_s))
    return Run(
        optimizer=candidate.name,
        lr=lr,
        seed=seed,
        train_loss=tuple(train_loss),
        test={name: tuple(values[name] for values in tests) for name in tests[0]},
        step_ms=1e3 * statistics.median(step_s) if step_s else math.nan,
        train_step_ms=1e3 * statistics.median(train_step_s) if train_step_s else math.nan,
        workload=workload.name,
        steps=tuple(steps),
        seconds=tuple(seconds),
    )


def schedule(optimizer: Optimizer, steps: int, warmup: float) -> Function:
    """The factor of the learning rates in a run of so many steps."""
    rise = min(round(warmup * steps), steps - 1)
    rest = constant() if with_modes(optimizer) else linear(steps - rise)
    return warming_up(rest, rise) if rise else rest


def rehearse(workload: Workload, candidate: Candidate, seed: int = 0) -> None:
    """Take two steps, so that what cannot work ends before the first run, and compiling is not part of one.

    Raises:
        ValueError: the optimizer cannot train the workload.
    """
    try:
        with seeded(seed):
            task = workload(seed)
            optimizer = candidate.for_model(task.model, candidate.lrs[0])
            for one in with_modes(optimizer):
                one.train()
            for batch in islice(task.batches, 2):
                optimizer.zero_grad()
                task.loss(task.model, batch).backward()
                optimizer.step()
    except (Exception, SystemExit) as error:  # of anybody's optimizer
        raise ValueError(f"{candidate.name} cannot train the {workload.name} workload: {said(error)}") from error


def attempt(
    workload: Workload, candidate: Candidate, lr: float, *, seed: int, epochs: int | None, warmup: float
) -> Run:
    """As `train`, but what it raises is recorded, so that the other runs go on."""
    try:
        return train(workload, candidate, lr, seed=seed, epochs=epochs, warmup=warmup)
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {' '.join(str(error).split())} [{Path(where.filename).name}:{where.lineno}]"
        return Run.failed(workload.name, candidate.name, lr, seed, message)


def said(error: BaseException) -> str:
    """What an exception says, in a line; with its kind, if that is not one that speaks for itself."""
    line, kind = " ".join(str(error).split()), type(error).__name__
    if not line:
        return kind
    return line if isinstance(error, (ValueError, TypeError, RuntimeError)) else f"{kind}: {line}"


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(map(repr, values)) or "nothing"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block with every global generator seeded; after it they go on as if it had not been."""
    with kept_random():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
