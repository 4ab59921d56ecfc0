"""Tune an optimizer on a workload: short complete trainings rule settings out, long ones decide."""

import hashlib
import json
import math
import multiprocessing
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState

from schuss import bounds
from schuss.lab.candidate import Candidate, candidates
from schuss.lab.check import made
from schuss.lab.evidence import grain
from schuss.lab.recipes import RECIPES
from schuss.lab.restored import restored
from schuss.lab.run import rehearse, said, train
from schuss.lab.sampler import Sampler
from schuss.lab.spaces import GIVEN, Range, Space, space
from schuss.lab.storage import beats, bury, masked, opened
from schuss.lab.tuning import Confirmation, Trial, Tuning, finite, in_order, plain, quiet
from schuss.lab.workload import Task, Workload

__all__ = ["Search", "Tuning", "tune"]

SAMPLERS = ("tpe", "halton", "grid")
EXTENSION = 3
"""Trials for each extension of a range."""
ALIVE = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that count; the others failed, or wait."""

Optimizer = str | Candidate | Callable[..., torch.optim.Optimizer]


def tune(
    workload: Workload,
    optimizer: Optimizer,
    *,
    trials: int = 20,
    seeds: int = 3,
    epochs: int | None = None,
    rungs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    names: Sequence[str] | None = None,
    sampler: str = "tpe",
    extend: int = 2,
    seed: int = 0,
    budget: str | None = None,
    storage: str | BaseStorage | None = None,
    study: str | None = None,
    jobs: int = 1,
) -> Tuning:
    """Search the learning rate of an optimizer, and with more trials its averages and weight decay, on a workload.

    A trial is trained for a ninth of the epochs; of those that have been, the best third for a third of the epochs,
    the best third of these for all of them. Each of these trainings is complete: the rate falls to zero at its end.
    Which of two settings wins is known only then. The best setting and the default are trained from other seeds.

    The random numbers of Python, NumPy, torch and CUDA, the number of threads, and models and loaders that the
    workload hands out are afterwards what they were.

    Args:
        workload: what to train, `Workload.of(function)` for one's own.
        optimizer: a name, `torch:` before one of torch's, `module:Class`, a class, a function, or a `Candidate`.
        trials: settings that are tried, those of extended ranges not counted, in [1, inf).
        seeds: trainings of the best setting and of the default, from other seeds than `seed`, in [0, inf).
        epochs: of a complete run, instead of the workload's, in [1, inf).
        rungs: lengths of training, each a third of the next, in [1, inf). 1: every trial is a complete run. Default:
            three, or as many as trials and epochs are enough for.
        settings: arguments of the optimizer that are fixed.
        ranges: (low, high) of a hyperparameter, instead of those of `schuss.lab.spaces.TABLE`; it is tuned then.
        names: what to tune, instead of what the number of trials says.
        sampler: "tpe", after a beginning by "halton", a quasi-random sequence; or "grid", evenly on the logarithm.
        extend: how many times each end of a range is moved when the best setting lies there, in [0, inf).
        seed: of the sampler, and of the workload in every trial.
        budget: ends the search: "90s", "10m" or "2h" of time, or "500 epochs" that are trained in this study. What
            has begun is ended.
        storage: "sqlite:///file.db", another URL that Optuna takes, or one of its storages. A study that is there goes
            on, and several machines may work on it. Default: memory.
        study: its name. Default: made of workload, optimizer and epochs.
        jobs: processes, in [1, inf). With more than one the workload must be a function of a module.

    Raises:
        ValueError: an argument out of its bounds, an optimizer that cannot train the workload, or a study that was
            begun with other settings.
        KeyboardInterrupt: what has ended until then is in the storage.
    """
    search = Search(
        workload, optimizer, trials=trials, seeds=seeds, epochs=epochs, rungs=rungs, settings=settings, ranges=ranges,
        names=names, sampler=sampler, extend=extend, seed=seed, budget=budget, storage=storage, study=study, jobs=jobs,
    )  # fmt: skip
    try:
        search.run()
        return search.result()
    finally:
        search.close()


class Search:
    """A study that is open: `run` works on it, `result` tells what is there. For the arguments see `tune`."""

    def __init__(
        self,
        workload: Workload,
        optimizer: Optimizer,
        *,
        trials: int,
        seeds: int,
        epochs: int | None,
        rungs: int | None,
        settings: Mapping[str, Any] | None,
        ranges: Mapping[str, tuple[float, float]] | None,
        names: Sequence[str] | None,
        sampler: str,
        extend: int,
        seed: int,
        budget: str | None,
        storage: str | BaseStorage | None,
        study: str | None,
        jobs: int,
    ) -> None:
        _check(trials=(trials, 1), seeds=(seeds, 0), extend=(extend, 0), seed=(seed, 0), jobs=(jobs, 1))
        if epochs is not None:
            _check(epochs=(epochs, 1))
        if rungs is not None:
            _check(rungs=(rungs, 1))
        if sampler not in SAMPLERS:
            raise ValueError(f"tune: unknown sampler {sampler!r}: {bounds.nearest(sampler, SAMPLERS)}")
        if jobs > 1 and not isinstance(storage, str):
            raise ValueError('tune: jobs > 1 need a storage that they share: storage="sqlite:///tune.db"')
        self._given = {
            "optimizer": optimizer, "trials": trials, "seeds": seeds, "epochs": epochs, "rungs": rungs,
            "settings": settings, "ranges": ranges, "names": names, "sampler": sampler, "extend": extend, "seed": seed,
            "storage": storage,
        }  # fmt: skip
        self.workload, self.trials, self.jobs, self.extend, self.seed = workload, trials, jobs, extend, seed
        self.seeds = tuple(range(seed + 1, seed + 1 + seeds))
        self._limit = Budget.parse(budget)
        [candidate] = candidates([optimizer], [1.0])
        chosen = space(
            candidate.build, trials=trials, arguments=candidate.arguments, settings=settings, ranges=ranges, names=names
        )
        with _still(), _untouched(workload) as safe:
            task = made(safe, seed)
            self.metric, self.better, self.batches = task.metric, task.better, len(task.batches)
            self.epochs = task.epochs if epochs is None else epochs
        self.rungs = _rungs(self.epochs, trials, rungs)
        self.candidate = candidate
        self.storage = masked(storage) if isinstance(storage, str) else type(storage).__name__ if storage else "memory"
        self.name = study or f"{workload.name} {candidate.name} {self.epochs} epochs"
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._died: list[int] = []
        self._is_cut = False
        self.tell: Callable[[str], object] = lambda line: None
        """Is called with a line after each training."""
        self._storage, self._owned = opened(storage)
        try:
            self._open(chosen, sampler, named=names is not None, counted=rungs is not None)
        except BaseException:
            self.close()
            raise

    def _open(self, chosen: Space, sampler: str, *, named: bool, counted: bool) -> None:
        """Begin the study, or go on with one that has the same settings."""
        with quiet():
            self.study = optuna.create_study(
                storage=self._storage, study_name=self.name, load_if_exists=True,
                direction="minimize" if self.better == "lower" else "maximize",
            )  # fmt: skip
        known = self.study.user_attrs.get("settings")
        if known is None and self.study.get_trials(deepcopy=False):
            raise ValueError(f"tune: study {self.name!r} was not begun by tune; choose another name for the study")
        if known is not None and not counted and known["rungs"][-1] == self.epochs:
            self.rungs = tuple(known["rungs"])
        if known is not None and not named:
            # With more trials more would be tuned; but a study tunes what it began with.
            limits = {name: (low, high) for name, (low, high) in known["ranges"].items()}
            limits |= {name: (r.low, r.high) for name, r in chosen.ranges.items() if r.source == GIVEN}
            chosen = space(self.candidate.build, trials=1, arguments=chosen.fixed, ranges=limits, names=[*limits])
        self.space = chosen
        self._sampler = self.study.sampler = Sampler(self, sampler)
        settings = {
            "workload": self.workload.name,
            "optimizer": self.candidate.name,
            "metric": self.metric,
            "rungs": list(self.rungs),
            "seed": self.seed,
            "sampler": sampler,
            "ranges": {name: [r.low, r.high] for name, r in chosen.ranges.items()},
            "fixed": {name: plain(value) for name, value in chosen.fixed.items()},
        }
        if known is None:
            middle = self.space.arguments({name: r.at(0.5) for name, r in chosen.ranges.items()})
            with _still(), _untouched(self.workload) as safe:
                rehearse(safe, self._entrant(middle)[0], self.seed)
            self.study.set_user_attr("settings", settings)
            return
        for name, value in settings.items():
            if known.get(name) != value:
                raise ValueError(
                    f"tune: study {self.name!r} was begun with {name} {known.get(name)}, got {value}; "
                    "choose another name for the study"
                )

    def close(self) -> None:
        """Let go of the storage."""
        if isinstance(self._storage, RDBStorage) and self._owned:
            self._storage.remove_session()
            self._storage.engine.dispose()

    # --- work ---

    def run(self) -> None:
        """Work until every trial and every training from other seeds has ended, or the budget has."""
        with _still():
            try:
                self._begin_processes(torch.get_num_threads())
                self.work()
                for process in self._processes:
                    process.join()
                self._died = [process.exitcode for process in self._processes if process.exitcode]
                self.work()  # what they have left, if they were killed
                self._confirm()
            finally:
                for process in self._processes:
                    process.terminate()
                    process.join()
                bury(self.study, self._storage)

    def _begin_processes(self, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork of a process whose torch has threads may hang
        given = self._given | {"study": self.name, "budget": None, "jobs": 1}
        for _ in range(1, self.jobs):
            process = spawn.Process(target=_help, args=(self.workload, given, self._limit, threads))
            try:
                process.start()
            except Exception as error:  # of pickling
                raise ValueError(
                    f"tune: jobs > 1 need a workload and an optimizer that are functions or classes of a module: "
                    f"{said(error)}"
                ) from error
            self._processes.append(process)

    def work(self) -> None:
        """Take trials, one after the other, until there are none."""
        while not self._limit.is_spent(self.study):
            multiprocessing.active_children()  # buries those that have ended, so that they no longer count as alive
            bury(self.study, self._storage)
            found = self._found()
            if self._waiting() or self._enqueue(found, final=False) or self.free() is not None:
                self.study.optimize(self._objective, n_trials=1, catch=(Surplus,))
            elif any(trial.running for trial in found):
                if not beats(self._storage):  # nobody would notice if they had died
                    return
                time.sleep(0.2)
            elif not (self._enqueue(found, final=True) or self._extend(found)):
                return
        self._is_cut = True

    def _waiting(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _roles(self) -> set[str]:
        """What is done, being done, or to be done."""
        trials = self.study.get_trials(deepcopy=False, states=(*ALIVE, TrialState.WAITING))
        return {trial.user_attrs["role"] for trial in trials if "role" in trial.user_attrs}

    def free(self, before: int | None = None) -> int | None:
        """The first place of the sampler's sequence that nobody has taken; None if there is none left.

        Args:
            before: number of a trial that asks. Those with lower numbers that have just been begun choose first.
        """
        taken = self._roles()
        free = [i for i in range(self._sampler.total) if f"sample {i}" not in taken]
        first = 0
        if before is not None:
            begun = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            first = sum(one.number < before and "role" not in one.user_attrs for one in begun)
        return free[first] if first < len(free) else None

    def _found(self) -> list[Trial]:
        """The settings, each with what all its Optuna trials have given."""
        origins: dict[str, Literal["sampled", "extended"]] = {"sample": "sampled", "extend": "extended"}
        found: dict[int, Trial] = {}
        for one in self.study.get_trials(deepcopy=False, states=ALIVE):
            kind, _, rest = one.user_attrs.get("role", "given").partition(" ")
            root = int(rest.split()[0]) if kind == "continue" else one.number
            if root not in found:
                params = {name: one.params[name] for name in self.space.ranges if name in one.params}
                if len(params) < len(self.space.ranges):  # it has just been begun
                    continue
                found[root] = Trial(
                    root, params, self.space.arguments(params), {}, origins.get(kind, "given"), None, False, 0.0
                )
            before = found[root]
            found[root] = replace(
                before,
                values=dict(sorted({**before.values, **one.intermediate_values}.items())),
                failure=before.failure or one.user_attrs.get("failure"),
                running=before.running or one.state == TrialState.RUNNING,
                seconds=before.seconds + one.user_attrs.get("trained", (0, 0.0))[1],
            )
        return [found[number] for number in sorted(found)]

    def _promoted(self, found: Sequence[Trial], rung: int, *, final: bool) -> list[Trial]:
        """Those of a rung that go on to the next: the best third of all that have been there.

        At the end at least one goes on. Asynchronous successive halving: Li et al. 2020, arXiv:1810.05934.
        """
        if rung + 1 == len(self.rungs):
            return []
        epochs = self.rungs[rung]
        here = [trial for trial in found if epochs in trial.values]
        failed = [trial for trial in found if trial.failure and len(trial.values) == rung]
        quota = (len(here) + len(failed)) // 3
        if final:  # somebody has to arrive
            here, quota = [trial for trial in here if not trial.failure], max(1, quota)
        sign = 1 if self.better == "lower" else -1
        return sorted(here, key=lambda trial: (sign * trial.values[epochs], trial.number))[:quota]

    def _enqueue(self, found: Sequence[Trial], *, final: bool) -> bool:
        """Put trials into the queue that have to be there; whether there were any."""
        taken, added = self._roles(), False

        def add(role: str, params: Mapping[str, float]) -> bool:
            if role in taken:
                return False
            self.study.enqueue_trial(dict(params), user_attrs={"role": role})
            return True

        for k, extension in enumerate(self._extensions()):
            for i, params in enumerate(extension["points"]):
                added |= add(f"extend {k} {i}", params)
        for rung in reversed(range(len(self.rungs) - 1)):
            for trial in self._promoted(found, rung, final=final):
                if not (trial.failure or trial.running or self.rungs[rung + 1] in trial.values):
                    added |= add(f"continue {trial.number} {rung + 1}", trial.params)
        return added

    def _objective(self, trial: optuna.Trial) -> float:
        """Train one setting, longer and longer, as long as it is among the best third."""
        trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
        params = {name: trial.suggest_float(name, r.low, r.high, log=True) for name, r in self.ranges().items()}
        role = trial.user_attrs.get("role", f"given {trial.number}")
        if trial.number in self._sampler.places:
            place = self._sampler.places.pop(trial.number)
            if place is None:  # somebody has just begun a trial, and taken the last one
                time.sleep(0.2)
                raise Surplus
            role = f"sample {place}"
        trial.set_user_attr("role", role)
        if self._is_taken(trial.number, role):
            raise Surplus
        root, rung = trial.number, 0
        if role.startswith("continue"):
            root, rung = map(int, role.split()[1:])
            for epochs, value in next(one for one in self._found() if one.number == root).values.items():
                trial.report(value, epochs)
        seconds, trained = 0.0, 0
        while True:
            began = time.perf_counter()
            value, failure, done = self._trained(self.space.arguments(params), self.seed, self.rungs[rung])
            seconds += time.perf_counter() - began
            trained += self.rungs[rung]
            trial.set_user_attr("trained", [trained, seconds])
            point = ", ".join(f"{name} {x:.3g}" for name, x in params.items())
            what = failure or f"{self.metric} {value:.5g} after {self.rungs[rung]} epochs"
            self.tell(f"trial {root}: {point}: {what}")
            if failure is not None:
                trial.set_user_attr("failure", failure)
                # The sampler takes what broke early for worse than what broke late, and both for worse than all else.
                trial.set_constraint("finite", 2 - done)
                raise optuna.TrialPruned
            trial.report(value, self.rungs[rung])
            if rung + 1 == len(self.rungs):
                return value
            ahead = {one.number for one in self._promoted(self._found(), rung, final=False)}
            if root not in ahead or self._limit.is_spent(self.study):
                raise optuna.TrialPruned
            rung += 1

    def _is_taken(self, number: int, role: str) -> bool:
        """Whether somebody else had the same idea at the same time, and was first."""
        trials = self.study.get_trials(deepcopy=False, states=ALIVE)
        return any(one.number < number and one.user_attrs.get("role") == role for one in trials)

    def _entrant(self, arguments: Mapping[str, Any]) -> tuple[Candidate, float]:
        rest = {name: value for name, value in arguments.items() if name != "lr"}
        return replace(self.candidate, arguments=rest, lrs=(arguments["lr"],)), arguments["lr"]

    def _trained(self, arguments: Mapping[str, Any], seed: int, epochs: int) -> tuple[float, str | None, float]:
        """The metric at the end of a training; or why there is none, and the part of the way that it got."""
        candidate, lr = self._entrant(arguments)
        try:
            with _untouched(self.workload) as safe:
                run = train(safe, candidate, lr, seed=seed, epochs=epochs)
            value = run.test[self.metric][-1]
        except Exception as error:  # of anybody's optimizer, model or data
            return math.nan, f"{type(error).__name__}: {said(error)}", 0.0
        if run.diverged or not math.isfinite(value):
            done = len(run.train_loss) / (epochs * self.batches)
            last = run.train_loss[-1] if run.train_loss else math.nan
            what = f"loss {last}" if not math.isfinite(last) else f"{self.metric} {value}"
            return math.nan, f"{what} at step {len(run.train_loss)} of {epochs * self.batches}", min(done, 1.0)
        return value, None, 1.0

    # --- ranges that grow ---

    def _extensions(self) -> list[dict[str, Any]]:
        attrs = self.study.user_attrs
        return [attrs[f"extension {k}"] for k in range(len(attrs)) if f"extension {k}" in attrs]

    def ranges(self) -> dict[str, Range]:
        """What is searched now."""
        found = dict(self.space.ranges)
        for one in self._extensions():
            known = found[one["name"]]
            found[one["name"]] = replace(known, low=min(known.low, one["low"]), high=max(known.high, one["high"]))
        return found

    def distributions(self) -> dict[str, BaseDistribution]:
        """The same in Optuna's words. It lets the ends of a range change from trial to trial, but not its scale."""
        return {name: FloatDistribution(r.low, r.high, log=True) for name, r in self.ranges().items()}

    def _extend(self, found: Sequence[Trial]) -> bool:
        """Move ends of ranges at which the best setting lies; whether there were any."""
        ranked = in_order(found, self.better)
        known = self._extensions()
        added = 0
        for name, limits in self.ranges().items() if ranked else ():
            side = _edge(found, ranked[0], name, limits)
            times = sum(one["name"] == name and one["side"] == side for one in known)
            if side is None or times >= self.extend or ranked[0].epochs < self.rungs[-1]:
                continue
            factor = 3 if name.startswith("1-") else 10
            if side == "upper":
                beyond = replace(limits, low=limits.high, high=min(limits.high * factor, limits.ceiling))
                parts = [(i + 1) / EXTENSION for i in range(EXTENSION)]
            else:
                beyond = replace(limits, low=max(limits.low / factor, limits.floor), high=limits.low)
                parts = [i / EXTENSION for i in range(EXTENSION)]
            points = [{**ranked[0].params, name: beyond.at(part)} for part in parts]
            extension = {"name": name, "side": side, "low": beyond.low, "high": beyond.high, "points": points}
            self.study.set_user_attr(f"extension {len(known) + added}", extension)
            added += 1
        return bool(added)

    # --- the end ---

    def _confirm(self) -> None:
        """Train the best setting and the default from other seeds; what has been is not repeated."""
        for seed in self.seeds:
            for arguments in self._rivals():
                key = _key(arguments, seed, self.rungs[-1])
                if key in self.study.user_attrs:
                    continue
                if self._limit.is_spent(self.study):
                    self._is_cut = True
                    return
                value, failure, _ = self._trained(arguments, seed, self.rungs[-1])
                self.study.set_user_attr(key, {"value": finite(value), "failure": failure})

    def _rivals(self) -> list[dict[str, Any]]:
        """The arguments of the best setting and of the default."""
        ranked = in_order(self._found(), self.better)
        default = self.space.default()
        return [dict(ranked[0].arguments), *([] if default is None else [default])] if ranked else []

    def _confirmation(self) -> Confirmation | None:
        rivals, attrs = self._rivals(), self.study.user_attrs
        seeds = [
            seed for seed in self.seeds if all(_key(arguments, seed, self.rungs[-1]) in attrs for arguments in rivals)
        ]
        if not rivals or not seeds:
            return None

        def values(arguments: Mapping[str, Any]) -> tuple[float, ...]:
            found = (attrs[_key(arguments, seed, self.rungs[-1])]["value"] for seed in seeds)
            return tuple(math.nan if value is None else value for value in found)

        tuned, *default = map(values, rivals)
        known = [value for trial in self._found() for value in trial.values.values()]
        known += [value for column in (tuned, *default) for value in column]
        return Confirmation(
            tuple(seeds), tuned, default[0] if default else (), rivals[1] if default else {},
            grain([value for value in known if math.isfinite(value)]),
        )  # fmt: skip

    def result(self) -> Tuning:
        """What has been found until now."""
        with _still():
            found, confirmed = self._found(), self._confirmation()
            ranked = in_order(found, self.better)
            decay = self._decay(ranked[0].arguments) if ranked else None
            return Tuning(
                self.workload.name, self.candidate.name, self.metric, self.better, self.rungs, self.batches,
                self.ranges(), tuple(found), confirmed, decay, tuple(self._said(found, ranked, confirmed)), self.name,
                self.storage, _call(self.candidate),
            )  # fmt: skip

    def _decay(self, arguments: Mapping[str, Any]) -> float | None:
        """The decoupled weight decay of an optimizer, if all its groups have the same."""
        with _untouched(self.workload) as safe:
            candidate, lr = self._entrant(arguments)
            made = candidate.for_model(safe(self.seed).model, lr)
        groups = made.param_groups
        decays = {float(group.get("weight_decay", 0)) if _is_decoupled(made, group) else None for group in groups}
        return decays.pop() if len(decays) == 1 else None

    def _said(self, found: list[Trial], ranked: list[Trial], confirmed: Confirmation | None) -> Iterator[str]:
        for one in self._extensions():
            yield (
                f"{one['name']}: the best was at the {one['side']} end of its range, so that {one['low']:.3g} to "
                f"{one['high']:.3g} was tried too."
            )
        for name, limits in self.ranges().items() if ranked else ():
            if side := _edge(found, ranked[0], name, limits):
                yield (
                    f"{name}: the best, {ranked[0].params[name]:.3g}, is at the {side} end of {limits.low:.3g} to "
                    f"{limits.high:.3g}: a better one may lie beyond (see --range and --extend)."
                )
        if ranked and ranked[0].epochs < self.rungs[-1]:
            yield f"No trial has been trained for {self.rungs[-1]} epochs yet."
        elif ranked and confirmed is not None and len(confirmed.seeds) > 1:
            spread = confirmed.mean.error * math.sqrt(len(confirmed.seeds))
            near = [
                str(one.number) for one in ranked[1:]
                if one.epochs == self.rungs[-1] and abs(one.value - ranked[0].value) <= 2 * spread
            ]  # fmt: skip
            if near:
                yield (
                    f"A training varies by {spread:.2g} from seed to seed (standard deviation). Within two of that of "
                    f"the best: trial{'s' if len(near) > 1 else ''} {', '.join(near)}."
                )
        if ranked and (shorter := self._overtaken(ranked)):
            yield shorter
        if failed := [trial for trial in found if trial.failure]:
            point = ", ".join(f"{name} {value:.3g}" for name, value in failed[0].params.items())
            yield f"{len(failed)} of {len(found)} failed; trial {failed[0].number} ({point}): {failed[0].failure}."
        if running := sum(trial.running for trial in found):
            yield f"Still in training, in other processes: {running}."
        if self._is_cut:
            yield "The budget was spent; the same command with a larger one goes on."
        for code in self._died:
            yield f"A process of jobs ended with exit code {code}; others have done its work."

    def _overtaken(self, ranked: list[Trial]) -> str | None:
        """Where a shorter training ended with a better value than the best of the longest."""
        best, sign = ranked[0], 1 if self.better == "lower" else -1
        ends = [(sign * value, epochs) for trial in ranked for epochs, value in trial.values.items()]
        value, epochs = min(ends)
        if epochs >= best.epochs or value >= sign * best.value:
            return None
        return (
            f"Trainings of {epochs} epochs came to {sign * value:.5g}: those of {best.epochs} overfit (see --epochs)."
        )


class Surplus(Exception):
    """Of a trial that nobody needs."""


@dataclass(frozen=True)
class Budget:
    """When to stop: at a moment, or after so many epochs."""

    until: float = math.inf
    epochs: float = math.inf

    @classmethod
    def parse(cls, text: str | None) -> "Budget":
        """Read "90s", "10m", "2h" or "500 epochs"."""
        if text is None:
            return cls()
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(s|m|h|epochs)\s*", text)
        if match is None or not float(match[1]):
            raise ValueError(f'tune: budget must be like "90s", "10m", "2h" or "500 epochs", got {text!r}')
        amount = float(match[1])
        if match[2] == "epochs":
            return cls(epochs=amount)
        return cls(until=time.time() + amount * {"s": 1, "m": 60, "h": 3600}[match[2]])

    def is_spent(self, study: optuna.Study) -> bool:
        """Whether nothing more may begin."""
        if self.epochs < math.inf:
            trained = sum(trial.user_attrs.get("trained", (0,))[0] for trial in study.get_trials(deepcopy=False))
            if trained >= self.epochs:
                return True
        return time.time() >= self.until


def _help(workload: Workload, given: dict[str, Any], limit: Budget, threads: int) -> None:
    """What a process of `jobs` does."""
    torch.set_num_threads(threads)
    search = Search(workload, **given)
    search._limit = limit
    try:
        with quiet():
            search.work()
    except KeyboardInterrupt:
        pass
    finally:
        search.close()


# --- parts -----------------------------------------------------------------------------------------------------------


@contextmanager
def _still() -> Iterator[None]:
    """A block after which random numbers, threads and Optuna's log are what they were."""
    threads = torch.get_num_threads()
    try:
        with restored(), quiet():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _untouched(workload: Workload) -> Iterator[Workload]:
    """The workload, with models and loaders that are afterwards what they were: a function may return its own again."""
    with ExitStack() as stack:

        def make(seed: int) -> Task:
            task = workload(seed)
            if isinstance(task, Task):  # else the check says what it is
                stack.enter_context(restored(task.model, data=task.batches))
            return task

        yield replace(workload, make=make)


def _rungs(epochs: int, trials: int, count: int | None) -> tuple[int, ...]:
    """The epochs of the trainings of a trial."""
    most = 1
    while 3**most <= epochs:
        most += 1
    if count is None:
        count = next(k for k in (3, 2, 1) if k <= most and 3 ** (k - 1) <= trials)
    elif count > most:
        raise ValueError(f"tune: {epochs} epochs are too few for {count} rungs, each a third of the next")
    return tuple(round(epochs / 3**k) for k in reversed(range(count)))


def _edge(found: Iterable[Trial], best: Trial, name: str, limits: Range) -> Literal["lower", "upper"] | None:
    """The end of a range that the best setting is at: none lies beyond it, or it is within a twentieth of the end."""
    if name not in best.params:
        return None
    value = best.params[name]
    part = limits.where(value)
    others = [trial for trial in found if name in trial.params and trial is not best]
    above = [trial for trial in others if trial.params[name] > value]
    below = [trial for trial in others if trial.params[name] < value]
    if limits.high < limits.ceiling and not any(trial.failure for trial in above) and (not above or part > 0.95):
        return "upper"
    if limits.low > limits.floor and not any(trial.failure for trial in below) and (not below or part < 0.05):
        return "lower"
    return None


def _is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    if group.get("relative_step"):  # of Adafactor: its rate is not the one that is given
        return False
    of_torch = isinstance(optimizer, (torch.optim.AdamW, torch.optim.Muon, torch.optim.Adafactor))
    declared = getattr(type(optimizer), "decay", None) == "decoupled"
    return bool(group.get("decoupled_weight_decay", of_torch or declared))


def _call(candidate: Candidate) -> str:
    """How one writes the call in Python, up to the arguments."""
    module, colon, name = candidate.name.rpartition(":")
    if candidate.name in RECIPES:
        module, name = candidate.build.__module__, candidate.build.__name__
    elif module == "torch":
        module = "torch.optim"
    if not colon and getattr(candidate.build, "__module__", "").startswith("schuss.optim"):
        module = "optim"
    first = "model" if candidate._takes_model else "params"
    return f"{module}.{name}({first}" if module else f"{name}({first}"


def _key(arguments: Mapping[str, Any], seed: int, epochs: int) -> str:
    text = json.dumps([{name: plain(value) for name, value in arguments.items()}, seed, epochs], sort_keys=True)
    return f"confirmed {hashlib.sha256(text.encode()).hexdigest()}"


def _check(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"tune: {name} must be an integer in [{least}, inf), got {value!r}")
