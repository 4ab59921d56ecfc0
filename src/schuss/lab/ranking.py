"""From runs to a ranking of optimizers, each at its best learning rate, and how it reads as text."""

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from schuss.lab.evidence import LEVEL, against_the_best, grain
from schuss.lab.run import Run
from schuss.lab.workload import Task, Workload


@dataclass(frozen=True)
class Goal:
    """What a workload is judged by, and how large it is: see `Task`.

    Args:
        workload: its name.
        description: in a line.
        epochs: of the runs.
        steps: of the runs.
    """

    workload: str
    description: str
    metric: str
    better: Literal["lower", "higher"]
    target: float
    epochs: int
    steps: int
    batch_size: int
    parameters: int

    @classmethod
    def of(cls, workload: Workload, task: Task, epochs: int | None = None) -> "Goal":
        """Of runs of so many epochs; None: the task's own."""
        epochs = task.epochs if epochs is None else epochs
        return cls(
            workload.name, workload.description, task.metric, task.better, task.target, epochs,
            epochs * len(task.batches), task.batch_size, task.parameters,
        )  # fmt: skip

    @property
    def percent(self) -> bool:
        """Whether the metric is a share that one writes in per cent."""
        return "accuracy" in self.metric

    @property
    def aim(self) -> str:
        """The target in words."""
        target = f"{100 * self.target:g} %" if self.percent else f"{self.target:g}"
        return f"{self.metric} {'≥' if self.better == 'higher' else '≤'} {target}"

    def status(self, run: Run) -> Literal["finished", "diverged", "failed"]:
        """In a word."""
        if run.error is not None:
            return "failed"
        return "diverged" if run.diverged or not math.isfinite(run.test[self.metric][-1]) else "finished"

    def score(self, run: Run) -> float:
        """The final value of the metric, turned so that larger is better."""
        value = run.test[self.metric][-1]
        return value if self.better == "higher" else -value

    def reached(self, run: Run) -> int | None:
        """Which evaluation was the first to reach the target."""
        for i, value in enumerate(run.test.get(self.metric, ())):
            if value >= self.target if self.better == "higher" else value <= self.target:
                return i
        return None


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error, which is nan for a single seed."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        known = len(values) > 1 and all(map(math.isfinite, values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if known else math.nan
        return cls(statistics.fmean(values), error)


@dataclass(frozen=True)
class Trial:
    """One optimizer at one learning rate, over all seeds."""

    goal: Goal
    optimizer: str
    lr: float
    runs: tuple[Run, ...]

    def count(self, status: str) -> int:
        """Number of runs that ended so."""
        return sum(self.goal.status(run) == status for run in self.runs)

    @property
    def finished(self) -> bool:
        """Whether every run has."""
        return self.count("finished") == len(self.runs)

    def final(self, name: str) -> Mean:
        """The last value of what the workload evaluates under this name."""
        return Mean.of([run.test[name][-1] for run in self.runs])

    @property
    def score(self) -> Mean:
        """The final metric."""
        return self.final(self.goal.metric)

    @property
    def reached(self) -> int:
        """Number of runs that reached the target."""
        return sum(self.goal.reached(run) is not None for run in self.runs)

    @property
    def steps_to_target(self) -> float:
        """Median over seeds, of which those that do not reach it count as infinite."""
        return self._median_to_target([run.steps for run in self.runs])

    @property
    def seconds_to_target(self) -> float:
        """Of training, without evaluations; as `steps_to_target`."""
        return self._median_to_target([run.seconds for run in self.runs])

    def _median_to_target(self, clocks: Sequence[Sequence[float]]) -> float:
        found = [self.goal.reached(run) for run in self.runs]
        return statistics.median(
            math.inf if i is None else clock[i] for i, clock in zip(found, clocks, strict=True)
        )  # fmt: skip

    @property
    def step_ms(self) -> float:
        return _median(run.step_ms for run in self.runs)

    @property
    def train_step_ms(self) -> float:
        return _median(run.train_step_ms for run in self.runs)

    @property
    def merit(self) -> tuple[bool, float, float]:
        """What trials are ordered by: every run finished, then the metric, then the loss."""
        if not self.finished:
            return False, 0.0, 0.0
        score = statistics.fmean(self.goal.score(run) for run in self.runs)
        # Equal counts of right answers give means that may differ in their last bits.
        return True, float(f"{score:.12g}"), -self.final("loss").value


def _median(values: Iterable[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return statistics.median(there) if there else math.nan


@dataclass(frozen=True)
class Standing:
    """One optimizer in the ranking.

    Args:
        rank: from 1.
        best: its best trial, or one at its learning rate on seeds from which none was chosen.
        trials: all that it was chosen from, by rising learning rate.
        p: that it is as good as the first, corrected for all comparisons: see `evidence.against_the_best`. None for the
            first, with less than two seeds, and if a run of the best trial has not finished.
    """

    rank: int
    best: Trial
    trials: tuple[Trial, ...]
    p: float | None = None

    @property
    def optimizer(self) -> str:
        return self.best.optimizer

    @property
    def confirmed(self) -> bool:
        """Whether the best trial is on seeds of its own."""
        return all(trial is not self.best for trial in self.trials)

    @property
    def every(self) -> tuple[Trial, ...]:
        """The trials, and the best one if it is none of them."""
        return (*self.trials, self.best) if self.confirmed else self.trials

    def is_best(self, trial: Trial) -> bool:
        """Whether a trial is at the learning rate that was chosen."""
        return trial.lr == self.best.lr

    @property
    def tied(self) -> bool:
        """Whether it has been held against the first and cannot be told apart from it."""
        return self.p is not None and self.p >= LEVEL

    @property
    def failed(self) -> str | None:
        """The first message, if a run raised and so the best trial has not finished."""
        if self.best.finished:
            return None
        return next((run.error for trial in self.every for run in trial.runs if run.error is not None), None)

    @property
    def edge(self) -> Literal["smallest", "largest"] | None:
        """Which end of the grid the best learning rate is, beyond which a better one may lie."""
        if len(self.trials) == 1 or self.failed is not None:
            return None
        if not any(trial.finished for trial in self.trials):  # it diverged at all of them
            return "smallest"
        if self.is_best(self.trials[0]):
            return "smallest"
        return "largest" if self.is_best(self.trials[-1]) else None


def rank(runs: Iterable[Run], goal: Goal, confirming: Collection[int] = ()) -> list[Standing]:
    """Rank optimizers by the final metric at their best learning rate, ties by test loss.

    A learning rate at which a run diverged or failed comes after all at which none did.

    Args:
        runs: on one workload.
        goal: of this workload.
        confirming: seeds from which no learning rate is chosen. Once all optimizers have been trained from all of them
            at the rate that was chosen from the others, the ranking is on these alone.
    """
    groups: dict[str, dict[float, list[Run]]] = {}
    others: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        if run.seed in confirming:
            others.setdefault((run.optimizer, run.lr), []).append(run)
        else:
            groups.setdefault(run.optimizer, {}).setdefault(run.lr, []).append(run)
    trials = [
        tuple(Trial(goal, optimizer, lr, tuple(group)) for lr, group in sorted(by_lr.items()))
        for optimizer, by_lr in groups.items()
    ]
    best = [(max(group, key=lambda trial: trial.merit), group) for group in trials]
    confirmed = [others.get((trial.optimizer, trial.lr), []) for trial, _ in best]
    if confirming and all(len(there) == len(confirming) for there in confirmed):
        best = [
            (replace(trial, runs=tuple(there)), group) for (trial, group), there in zip(best, confirmed, strict=True)
        ]
    best.sort(key=lambda pair: pair[0].merit, reverse=True)
    return _tested([Standing(i, trial, group) for i, (trial, group) in enumerate(best, start=1)])


def _tested(standings: list[Standing]) -> list[Standing]:
    """With p values: of those that finished, on the seeds that all of these have."""
    finished = [standing for standing in standings if standing.best.finished]
    if len(finished) < 2:
        return standings
    goal = finished[0].best.goal
    by_seed = [{run.seed: goal.score(run) for run in standing.best.runs} for standing in finished]
    seeds = [seed for seed in by_seed[0] if all(seed in scores for scores in by_seed)]
    if len(seeds) < 2 or _is_one_run(finished):
        return standings
    every = [
        goal.score(run)
        for standing in standings
        for trial in standing.every
        for run in trial.runs
        if goal.status(run) == "finished"
    ]
    scores = np.array([[one[seed] for one in by_seed] for seed in seeds])
    p = against_the_best(scores, grain=grain(every), best=0)
    return [
        replace(standing, p=float(p[i])) if 0 < i < len(finished) else standing for i, standing in enumerate(standings)
    ]


def _is_one_run(standings: Sequence[Standing]) -> bool:
    """Whether seeds change nothing: all runs of every best trial are the same one, and there are several."""
    several = [standing.best.runs for standing in standings if len(standing.best.runs) > 1]
    return bool(several) and all(
        len({(run.train_loss, *run.test.values()) for run in runs}) == 1 and len(runs[0].train_loss) > 1
        for runs in several
    )


# --- as text ----------------------------------------------------------------------------------------------------------


def header(goal: Goal) -> tuple[str, ...]:
    """Of `table`; a line break stands where one is wanted."""
    target = goal.aim.removeprefix(f"{goal.metric} ")
    return (
        "#", "optimizer", "best lr", f"test\n{goal.metric}{' %' if goal.percent else ''}",
        *(["test loss"] if goal.metric != "loss" else []), "p", f"steps to\n{target}", f"s to\n{target}",
        "ms per\nstep()", "ms per\ntrain step",
    )  # fmt: skip


def table(standings: Sequence[Standing]) -> list[tuple[str, ...]]:
    """The cells below `header`, one row per optimizer."""
    if not standings:
        return []
    goal = standings[0].best.goal
    finished = [standing.best for standing in standings if standing.best.finished]
    names = dict.fromkeys((goal.metric, "loss"))
    columns = [
        iter(means([trial.final(name) for trial in finished], percent=goal.percent and name == goal.metric))
        for name in names
    ]
    rows = []
    for standing in standings:
        trial = standing.best
        if trial.finished:
            judged = [f"{trial.lr:g}", *(next(column) for column in columns), _p(standing), *_to_target(trial)]
        else:
            word = "failed" if standing.failed is not None else "diverged"
            judged = ["-", word, *(["-"] * (len(names) - 1)), "-", "-", "-"]
        times = f"{trial.step_ms:.3f}", f"{trial.train_step_ms:.2f}"
        rows.append((str(standing.rank), standing.optimizer, *judged, *(t.replace("nan", "-") for t in times)))
    return rows


def _p(standing: Standing) -> str:
    if standing.p is None:
        return "-"
    return "<0.001" if standing.p < 0.001 else f"{standing.p:.2g}" if standing.p < 0.095 else f"{standing.p:.2f}"


def _to_target(trial: Trial) -> tuple[str, str]:
    """Steps and seconds; and how many runs have reached it, unless all have."""
    some = "" if trial.reached in (0, len(trial.runs)) else f" ({trial.reached} of {len(trial.runs)})"
    steps, seconds = trial.steps_to_target, trial.seconds_to_target
    if math.isinf(steps):
        return f"-{some}", "-"
    return f"{steps:.0f}{some}", f"{seconds:.2f}"


def means(column: Sequence[Mean], *, percent: bool) -> list[str]:
    """Means with their errors, all to the same digits: two of a typical error."""
    scale = 100 if percent else 1
    values = [scale * mean.value for mean in column]
    errors = [scale * mean.error for mean in column]
    digits = 2 if percent else _digits(values, errors)
    if digits is None:
        cells = [f"{value:.3g}" for value in values]
        spreads = [f"{error:.2g}" for error in errors]
    else:
        cells = [f"{value:.{digits}f}" for value in values]
        spreads = [f"{error:.{digits}f}" for error in errors]
    return [
        cell if math.isnan(error) else f"{cell} ± {spread}"
        for cell, spread, error in zip(cells, spreads, errors, strict=True)
    ]


def _digits(values: Sequence[float], errors: Sequence[float]) -> int | None:
    """After the point; None if no number of them suits all."""
    positive = [error for error in errors if error > 0]
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 3
    digits = 1 - _exponent(statistics.median(positive)) if positive else 3 - _exponent(statistics.median(sizes))
    digits = max(digits, 0)
    return digits if digits <= 6 and min(sizes) >= 10.0 ** (1 - digits) and max(sizes) < 1e6 else None


def _exponent(value: float) -> int:
    return math.floor(math.log10(value))


def remarks(standings: Sequence[Standing]) -> list[str]:
    """Sentences on what the table alone would hide."""
    if not standings:
        return []
    goal, first = standings[0].best.goal, standings[0]
    lines = []
    if first.confirmed:
        seeds = listed([str(run.seed) for run in first.best.runs])
        lines.append(f"What is shown is of seeds {seeds}; learning rates were chosen from others.")
    tested = [standing for standing in standings if standing.p is not None]
    test = f"by a paired t test over seeds, corrected for all pairs, at {100 * LEVEL:g} %"
    if near := [standing.optimizer for standing in tested if standing.tied]:
        lines.append(f"Not told apart from {first.optimizer} {test}: {listed(near)}.")
    elif tested:
        lines.append(f"{first.optimizer} is told apart from each of the others {test}.")
    elif _is_one_run(finished := [standing for standing in standings if standing.best.finished]):
        lines.append("Seeds change nothing in this workload: there is one run of each, so no error and no test.")
    elif len(finished) > 1:
        lines.append("From one seed it cannot be said that one optimizer is better than another: see --seeds.")
    if edges := [f"{s.optimizer} ({s.best.lr:g}, {s.edge})" for s in standings if s.edge and s.best.finished]:
        lines.append(f"Best lr at the edge of its grid, so a better one may lie beyond (see --lrs): {listed(edges)}.")
    fewest = min(len(standing.trials) for standing in standings)
    if more := [f"{s.optimizer} ({len(s.trials)})" for s in standings if len(s.trials) > fewest]:
        lines.append(f"Larger budgets: tried at more learning rates than the {fewest} of others: {listed(more)}.")
    for word in ("Diverged", "Failed"):
        trials = [trial for s in standings if s.failed is None for trial in s.every if trial.count(word.lower())]
        if trials:
            cases = [f"{t.optimizer} at lr {t.lr:g} ({t.count(word.lower())} of {len(t.runs)} runs)" for t in trials]
            lines.append(f"{word}: {listed(cases)}.")
    lines += [f"{standing.optimizer} failed: {standing.failed}" for standing in standings if standing.failed]
    if not any(trial.reached for standing in standings for trial in standing.every):
        lines.append(f"No run has reached the target, {goal.aim}: take more --epochs, or another target.")
    return lines


def listed(items: Sequence[str]) -> str:
    """With commas."""
    return ", ".join(items)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ("optimizer",)) -> str:
    """A table as text; columns under a title in `left` begin at the left."""
    titles = [title.split("\n") for title in head]
    height = max(map(len, titles))
    above = [["" for _ in range(height - len(title))] + title for title in titles]
    lines = [[title[i] for title in above] for i in range(height)] + [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = [
        "  ".join(
            cell.ljust(width) if title in left else cell.rjust(width)
            for cell, width, title in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join(shown)
