"""What a tuning has found: trials, the best of them, and what limits it; as text, JSON and CSV."""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import FloatDistribution

from schuss.lab.evidence import LEVEL, against_the_best
from schuss.lab.ranking import Mean
from schuss.lab.spaces import Range

__all__ = ["Confirmation", "Trial", "Tuning"]


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it.

    Attributes:
        number: of the Optuna trial that it began with.
        params: what was varied, by the names of the ranges.
        arguments: what the optimizer was built with, lr among them.
        values: the metric at the end of complete trainings, by their epochs.
        origin: "sampled"; "extended", from beyond a range; "given", by somebody else who uses the study.
        failure: why there is no number, if one of its trainings gave none.
        running: somebody is training it now.
        seconds: of training.
    """

    number: int
    params: Mapping[str, float]
    arguments: Mapping[str, Any]
    values: Mapping[int, float]
    origin: Literal["sampled", "extended", "given"]
    failure: str | None
    running: bool
    seconds: float

    @property
    def epochs(self) -> int:
        """Of its longest training; 0 if there is none."""
        return max(self.values, default=0)

    @property
    def value(self) -> float:
        """Of its longest training; nan if there is none."""
        return self.values[self.epochs] if self.values else math.nan


@dataclass(frozen=True)
class Confirmation:
    """The best setting and the default, each trained from the same seeds, none of which was tuned on.

    Attributes:
        seeds: of the trainings.
        tuned: values of the metric with the best setting; nan where there is none.
        default: values with the optimizer's default, empty if it has none.
        default_arguments: what that is.
        grain: the step between possible values of the metric, of an accuracy 1 / images; see `against_the_best`.
    """

    seeds: tuple[int, ...]
    tuned: tuple[float, ...]
    default: tuple[float, ...]
    default_arguments: Mapping[str, Any]
    grain: float = 0.0

    @property
    def mean(self) -> Mean:
        """With the best setting."""
        return Mean.of(self.tuned)

    @property
    def default_mean(self) -> Mean | None:
        """With the default."""
        return Mean.of(self.default) if self.default else None

    @property
    def p(self) -> float:
        """Of the paired t test that both are equally good; nan for a single seed, or where a value is missing."""
        if len(self.tuned) < 2 or len(self.default) < 2 or not all(map(math.isfinite, (*self.tuned, *self.default))):
            return math.nan
        scores = list(zip(self.tuned, self.default, strict=True))
        return float(against_the_best(scores, grain=self.grain).min())


@dataclass(frozen=True)
class Tuning:
    """What `tune` has found.

    Attributes:
        workload, optimizer: their names.
        metric: what was tuned for, and whether a "lower" or a "higher" one is `better`.
        rungs: epochs of the trainings of a trial; the last is a complete run.
        batches: steps in an epoch.
        ranges: what was searched in the end, extensions included.
        trials: all settings, in the order in which they were begun.
        best: the one with the best metric among those with the longest trainings.
        line: Python that builds the optimizer with it.
        confirmed: the best setting from other seeds, and the default.
        decay: the weight decay of the best setting where it is decoupled, else None.
        remarks: what limits all this.
        study, storage: where the trials are.
    """

    workload: str
    optimizer: str
    metric: str
    better: Literal["lower", "higher"]
    rungs: tuple[int, ...]
    batches: int
    ranges: Mapping[str, Range]
    trials: tuple[Trial, ...]
    confirmed: Confirmation | None
    decay: float | None
    remarks: tuple[str, ...]
    study: str
    storage: str
    _call: str = field(default="", repr=False)

    @cached_property
    def ranked(self) -> tuple[Trial, ...]:
        """Trials with a value, the best first: a longer training counts before a better value."""
        return tuple(in_order(self.trials, self.better))

    @property
    def best(self) -> Trial:
        """See above.

        Raises:
            ValueError: no trial has a value.
        """
        if not self.ranked:
            why = next((trial.failure for trial in self.trials if trial.failure), "none has ended")
            raise ValueError(f"tune: no trial of {self.optimizer} on {self.workload} has a value: {why}")
        return self.ranked[0]

    @property
    def line(self) -> str:
        """Python that builds the optimizer with the best setting."""
        return _line(self._call, self.best.arguments)

    @property
    def tau(self) -> float | None:
        """1 / (γ λ), the steps over which decoupled weight decay averages updates, at the first rate."""
        return None if not self.decay else 1 / (self.best.arguments["lr"] * self.decay)

    @cached_property
    def importances(self) -> dict[str, float]:
        """The share of the variance of the shortest trainings that each hyperparameter explains, by fANOVA.

        Empty for one hyperparameter or fewer than ten trials. Source: Hutter, Hoos, Leyton-Brown 2014, ICML.
        """
        known = [trial for trial in self.trials if self.rungs[0] in trial.values]
        if len(self.ranges) < 2 or len(known) < 10:
            return {}
        with quiet():
            study = optuna.create_study()
            limits = {name: FloatDistribution(r.low, r.high, log=True) for name, r in self.ranges.items()}
            for trial in known:
                value = trial.values[self.rungs[0]]
                study.add_trial(optuna.create_trial(params=dict(trial.params), distributions=dict(limits), value=value))
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            return optuna.importance.get_param_importances(study, evaluator=evaluator)

    def __str__(self) -> str:
        if not self.ranked:
            return "\n".join([self._head(), *(f"- {line}" for line in self.remarks)])
        lines = [self._head(), "", *self._table(), "", f"Best: {self.line}"]
        if self.confirmed is not None:
            lines.append(self._confirmation(self.confirmed))
        if self.tau is not None:
            lines.append(self._decay(self.tau))
        return "\n".join([*lines, *(f"- {line}" for line in self.remarks)])

    def _head(self) -> str:
        failed = sum(trial.failure is not None for trial in self.trials)
        rungs = ", ".join(map(str, self.rungs))
        return (
            f"{self.optimizer} on {self.workload}: {self.metric}, {self.better} is better. "
            f"{len(self.trials)} trials of {rungs} epochs" + (f", {failed} of them failed." if failed else ".")
        )

    def _table(self, count: int = 5) -> list[str]:
        names = [*self.ranges]
        rows = [["trial", *names, "epochs", self.metric]]
        for trial in self.ranked[:count]:
            params = (f"{trial.params[name]:.3g}" if name in trial.params else "-" for name in names)
            rows.append([str(trial.number), *params, str(trial.epochs), f"{trial.value:.5g}"])
        if self.importances:
            shares = (f"{100 * self.importances.get(name, 0):.0f} %" for name in names)
            rows.append(["weighs", *shares, "", ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _confirmation(self, confirmed: Confirmation) -> str:
        seeds = f"seed{'s' if len(confirmed.seeds) > 1 else ''} {', '.join(map(str, confirmed.seeds))}"
        text = f"Trained from {seeds}: {_shown(confirmed.tuned)}"
        if not confirmed.default:
            return f"{text}; {self.optimizer} has no default rate to compare with."
        changed = {k: v for k, v in confirmed.default_arguments.items() if k == "lr"}
        text += f"; with the default, lr {changed['lr']:g}: {_shown(confirmed.default)}"
        if math.isnan(confirmed.p):
            return f"{text}."
        p = f"p = {confirmed.p:.2g}" if confirmed.p >= 0.001 else "p < 0.001"
        if confirmed.p > LEVEL:
            return f"{text}; not told apart ({p})."
        is_better = (confirmed.mean.value < Mean.of(confirmed.default).value) == (self.better == "lower")
        return f"{text}; {'better' if is_better else 'worse'} ({p})."

    def _decay(self, tau: float) -> str:
        epochs = tau / self.batches
        text = f"Weight decay averages over 1 / (lr · weight_decay) = {tau:.4g} steps, {epochs:.3g} epochs: "
        if epochs < 1:
            return text + "less than one; a smaller decay sees all data."
        if epochs > self.rungs[-1]:
            return text + "more than the training has, so that it hardly acts."
        return text + "keep these epochs when data, batch or length change."

    def record(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        confirmed = self.confirmed
        return {
            "workload": self.workload,
            "optimizer": self.optimizer,
            "metric": self.metric,
            "better": self.better,
            "rungs": list(self.rungs),
            "batches": self.batches,
            "study": self.study,
            "storage": self.storage,
            "ranges": {name: [r.low, r.high, r.source] for name, r in self.ranges.items()},
            "best": self.best.number if self.ranked else None,
            "line": self.line if self.ranked else None,
            "tau": self.tau if self.ranked else None,
            "importances": self.importances,
            "confirmed": confirmed
            and {
                "seeds": list(confirmed.seeds),
                "tuned": [finite(x) for x in confirmed.tuned],
                "default": [finite(x) for x in confirmed.default],
                "default_arguments": {k: plain(v) for k, v in confirmed.default_arguments.items()},
                "p": finite(confirmed.p),
            },
            "remarks": list(self.remarks),
            "trials": [
                {
                    "number": trial.number,
                    "origin": trial.origin,
                    "params": dict(trial.params),
                    "arguments": {k: plain(v) for k, v in trial.arguments.items()},
                    "values": {str(epochs): value for epochs, value in trial.values.items()},
                    "failure": trial.failure,
                    "running": trial.running,
                    "seconds": round(trial.seconds, 3),
                }
                for trial in self.trials
            ],
        }

    def to_csv(self) -> str:
        """The trials: what was varied, the metric at the end of each of their trainings, failure, seconds."""
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        ends = [f"{self.metric} after {epochs}" for epochs in self.rungs]
        writer.writerow(["trial", "origin", *self.ranges, *ends, "failure", "seconds"])
        for trial in self.trials:
            params = [trial.params.get(name, "") for name in self.ranges]
            values = [trial.values.get(epochs, "") for epochs in self.rungs]
            failure = trial.failure or ""
            writer.writerow([trial.number, trial.origin, *params, *values, failure, f"{trial.seconds:.3f}"])
        return written.getvalue()

    def save(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write `tune.json` and `tune.csv` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        numbers, rows = folder / "tune.json", folder / "tune.csv"
        numbers.write_text(json.dumps(self.record()), encoding="utf-8")
        rows.write_text(self.to_csv(), encoding="utf-8")
        return numbers, rows


def in_order(trials: Iterable[Trial], better: str) -> list[Trial]:
    """Those with a value, the best first."""
    sign = 1 if better == "lower" else -1
    known = [trial for trial in trials if trial.values and not trial.failure]
    return sorted(known, key=lambda trial: (-trial.epochs, sign * trial.value, trial.number))


def _line(call: str, arguments: Mapping[str, Any]) -> str:
    return ", ".join([call, *(f"{name}={value!r}" for name, value in arguments.items())]) + ")"


def _shown(values: Sequence[float]) -> str:
    missing = sum(not math.isfinite(value) for value in values)
    if missing:
        return f"failed from {missing} of {len(values)} seeds"
    mean = Mean.of(values)
    return f"{mean.value:.5g}" if math.isnan(mean.error) else f"{mean.value:.5g} ± {mean.error:.2g}"


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def finite(value: float) -> float | None:
    """None, which JSON has, for a number that it has not."""
    return value if math.isfinite(value) else None


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its lines for each trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
