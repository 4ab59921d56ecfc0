"""From runs to a ranking of optimizers, each at its best learning rate, and how it reads as text."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from schuss.lab.compare import Run

HEADER = ("#", "optimizer", "best lr", "test\naccuracy %", "test loss", "ms per\nstep()", "ms per\ntrain step")


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error, which is nan for a single seed."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)


@dataclass(frozen=True)
class Trial:
    """One optimizer at one learning rate, over all seeds."""

    optimizer: str
    lr: float
    runs: tuple[Run, ...]

    @property
    def diverged(self) -> int:
        """Number of runs that diverged."""
        return sum(run.diverged for run in self.runs)

    @property
    def accuracy(self) -> Mean:
        """Final test accuracy, in [0, 1]."""
        return Mean.of([run.test_accuracy[-1] for run in self.runs])

    @property
    def loss(self) -> Mean:
        """Final test loss."""
        return Mean.of([run.test_loss[-1] for run in self.runs])

    @property
    def step_ms(self) -> float:
        return statistics.median(run.step_ms for run in self.runs)

    @property
    def train_step_ms(self) -> float:
        return statistics.median(run.train_step_ms for run in self.runs)

    @property
    def merit(self) -> tuple[bool, float, float]:
        """What trials are ordered by: no run diverged, then accuracy, then loss."""
        if self.diverged:
            return False, 0.0, 0.0
        # Equal counts of right answers give means that may differ in their last bits.
        return True, round(self.accuracy.value, 9), -self.loss.value


@dataclass(frozen=True)
class Standing:
    """One optimizer in the ranking: all its trials by rising learning rate, and the best of them."""

    rank: int
    best: Trial
    trials: tuple[Trial, ...]

    @property
    def optimizer(self) -> str:
        return self.best.optimizer

    @property
    def edge(self) -> Literal["smallest", "largest"] | None:
        """Which end of the grid the best learning rate is, beyond which a better one may lie."""
        if len(self.trials) == 1 or self.best.diverged:
            return None
        if self.best is self.trials[0]:
            return "smallest"
        return "largest" if self.best is self.trials[-1] else None


def rank(runs: Iterable[Run]) -> list[Standing]:
    """Rank optimizers by final test accuracy at their best learning rate, ties by test loss.

    A learning rate at which a run diverged comes after all at which none did.
    """
    groups: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.optimizer, {}).setdefault(run.lr, []).append(run)
    trials = [
        tuple(Trial(optimizer, lr, tuple(group)) for lr, group in sorted(by_lr.items()))
        for optimizer, by_lr in groups.items()
    ]
    best = [(max(group, key=lambda trial: trial.merit), group) for group in trials]
    best.sort(key=lambda pair: pair[0].merit, reverse=True)
    return [Standing(i, trial, group) for i, (trial, group) in enumerate(best, start=1)]


def tied(standings: Sequence[Standing]) -> list[Standing]:
    """Those whose accuracy is within two standard errors of the first one's; empty for a single seed."""
    if not standings or standings[0].best.diverged:
        return []
    first = standings[0].best.accuracy

    def near(other: Mean) -> bool:
        return first.value - other.value <= 2 * math.hypot(first.error, other.error)

    return [standing for standing in standings[1:] if not standing.best.diverged and near(standing.best.accuracy)]


def table(standings: Sequence[Standing]) -> list[tuple[str, ...]]:
    """The cells below `HEADER`, one row per optimizer."""
    return [(str(standing.rank), standing.optimizer, *_cells(standing.best)) for standing in standings]


def _cells(trial: Trial) -> tuple[str, ...]:
    if trial.diverged:
        return "-", "diverged", "-", f"{trial.step_ms:.3f}", f"{trial.train_step_ms:.2f}"
    return (
        f"{trial.lr:g}",
        _mean(trial.accuracy, scale=100, digits=2),
        _mean(trial.loss, scale=1, digits=3),
        f"{trial.step_ms:.3f}",
        f"{trial.train_step_ms:.2f}",
    )


def _mean(mean: Mean, *, scale: float, digits: int) -> str:
    value = f"{scale * mean.value:.{digits}f}"
    return value if math.isnan(mean.error) else f"{value} ± {scale * mean.error:.{digits}f}"


def remarks(standings: Sequence[Standing]) -> list[str]:
    """Sentences on what the table alone would hide."""
    lines = []
    if near := tied(standings):
        lines.append(f"Within two standard errors of {standings[0].optimizer}: {', '.join(s.optimizer for s in near)}.")
    if edges := [f"{s.optimizer} ({s.best.lr:g}, {s.edge})" for s in standings if s.edge]:
        lines.append(
            f"Best lr at the edge of its grid, so a better one may lie beyond (see --lrs): {', '.join(edges)}."
        )
    diverged = [trial for standing in standings for trial in standing.trials if trial.diverged]
    if diverged:
        cases = ", ".join(f"{t.optimizer} at lr {t.lr:g} ({t.diverged} of {len(t.runs)} runs)" for t in diverged)
        lines.append(f"Diverged: {cases}.")
    return lines
