"""Compare optimizers on workloads: equal budgets, complete schedules, several seeds, and what follows from them."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, TypeGuard

import torch

from schuss.lab.candidate import DEFAULT_NAMES, Candidate, candidates
from schuss.lab.check import check
from schuss.lab.evidence import Profile
from schuss.lab.pool import Died, Pool
from schuss.lab.ranking import Goal, Standing, aligned, header, rank, remarks, table
from schuss.lab.run import Run, attempt, rehearse, train
from schuss.lab.store import Store, fingerprint, settings
from schuss.lab.workload import Task, Workload
from schuss.lab.workloads import find

__all__ = ["Comparison", "Result", "Run", "compare", "train"]

Source = str | Workload | Callable[[int], Task]
Optimizers = Sequence[str | Candidate | Callable[..., torch.optim.Optimizer]]
Key = tuple[str, str, float, int]

MOST_SEEDS = 10_000
"""As a count."""


@dataclass(frozen=True)
class Result:
    """What came out on one workload."""

    goal: Goal
    standings: tuple[Standing, ...]

    @property
    def remarks(self) -> list[str]:
        """Sentences on what the table alone would hide."""
        return remarks(self.standings)

    def __str__(self) -> str:
        return "\n".join([aligned(header(self.goal), table(self.standings)), *(f"- {line}" for line in self.remarks)])


class Comparison:
    """Runs of optimizers on workloads, and what follows from them: see `compare`, which makes and runs one.

    Attributes:
        workloads: what is trained.
        candidates: with what.
        seeds: from which seeds.
        confirming: from which others, once learning rates have been chosen.
        goals: what each workload is judged by, by its name.
        interrupted: whether Ctrl-C ended `run`.
        recalled: how many runs the store had.
    """

    def __init__(
        self,
        workloads: Source | Sequence[Source],
        optimizers: Optimizers,
        *,
        lrs: Sequence[float] | None,
        seeds: int | Sequence[int],
        confirm: int,
        epochs: int | None,
        warmup: float,
        extend: int,
        threads: int | None,
    ) -> None:
        self.candidates = candidates([optimizers] if isinstance(optimizers, str) else list(optimizers), lrs)
        self.workloads = _workloads(workloads)
        self.seeds = _seeds(seeds)
        self.epochs, self.warmup, self.extend = epochs, warmup, extend
        self.threads = torch.get_num_threads() if threads is None else threads
        whole = ("confirm", confirm, 0), ("epochs", epochs, 1), ("extend", extend, 0), ("threads", self.threads, 1)
        for name, value, low in whole:
            if not ((_is_whole(value) and value >= low) or (name == "epochs" and value is None)):
                raise ValueError(f"compare: {name} must be an integer in [{low}, inf), got {value!r}")
        if not (isinstance(warmup, (int, float)) and 0 <= warmup < 1):
            raise ValueError(f"compare: warmup must be in [0, 1), got {warmup!r}")
        self.confirming = range(max(self.seeds) + 1, max(self.seeds) + 1 + confirm)
        self.interrupted, self.recalled = False, 0
        self._runs: dict[Key, Run] = {}
        # Learning rates may be added to.
        self._grids = {(w.name, c.name): c.lrs for w in self.workloads for c in self.candidates}
        self.goals: dict[str, Goal] = {}
        self._fingerprints: dict[str, str] = {}
        with _threads(self.threads):
            for workload in self.workloads:
                facts = check(workload, seconds=0)
                self.goals[workload.name] = Goal.of(workload, facts.task, epochs)
                self._fingerprints[workload.name] = fingerprint(facts)
            self._refused = dict(self._rehearsed())

    def _rehearsed(self) -> Iterator[tuple[tuple[str, str], str]]:
        """Which optimizer cannot train which workload, and why."""
        errors = []
        for workload in self.workloads:
            for candidate in self.candidates:
                try:
                    rehearse(workload, candidate)
                except ValueError as error:
                    errors.append(error)
                    yield (workload.name, candidate.name), str(error)
        if len(errors) == len(self._grids):
            raise ValueError("; ".join(map(str, errors)))

    def run(
        self,
        *,
        jobs: int = 1,
        store: Path | str | None = None,
        on_run: Callable[[Run, int, int], None] | None = None,
    ) -> Self:
        """Make every run that is missing; a best learning rate at the edge of its grid adds the next one to it.

        Ctrl-C ends it, with what there is; called again, it goes on.

        Args:
            jobs: processes that train side by side, in [1, inf); 1 trains in this one. The numbers are the same; times
                are not, where they wait for one another.
            store: an SQLite file in which runs are kept, and looked for before they are made.
            on_run: called after each run with it, and with how many there are and how many there will be at least.

        Raises:
            ValueError: a workload or an optimizer cannot be sent to another process.
            OSError: the store cannot be used.
        """
        if not (_is_whole(jobs) and jobs >= 1):
            raise ValueError(f"compare: jobs must be an integer in [1, inf), got {jobs!r}")
        self.interrupted = False
        with ExitStack() as stack:
            stack.enter_context(_threads(self.threads))
            kept = None if store is None else stack.enter_context(Store(store))
            pool = None if jobs == 1 else stack.enter_context(Pool(_work, jobs, self.threads))
            try:
                while missing := self._missing():
                    for run in self._made(missing, kept, pool):
                        self._runs[run.workload, run.optimizer, run.lr, run.seed] = run
                        if on_run is not None:
                            on_run(run, len(self._runs), self.total)
                    self._extend()
            except KeyboardInterrupt:
                self.interrupted = True
        return self

    @property
    def total(self) -> int:
        """How many runs there will be, unless a grid is extended."""
        return len(self.seeds) * sum(map(len, self._grids.values())) + len(self.confirming) * len(self._grids)

    @property
    def runs(self) -> list[Run]:
        """Those that have ended: by workload, optimizer, learning rate and seed."""
        keys = (
            (workload.name, candidate.name, lr, seed)
            for workload in self.workloads
            for candidate in self.candidates
            for lr in self._grids[workload.name, candidate.name]
            for seed in (*self.seeds, *self.confirming)
        )
        return [self._runs[key] for key in keys if key in self._runs]

    @property
    def results(self) -> list[Result]:
        """The ranking on each workload on which a run has ended."""
        runs = self.runs
        return [
            Result(goal, tuple(rank(there, goal, self.confirming)))
            for name, goal in self.goals.items()
            if (there := [run for run in runs if run.workload == name])
        ]

    def profile(self, cost: str = "steps") -> Profile:
        """Performance profiles over the workloads, of each optimizer at its best learning rate.

        Args:
            cost: "steps" or "seconds" to the target.
        """
        results = self.results
        costs: dict[str, list[float]] = {candidate.name: [] for candidate in self.candidates}
        for result in results:
            reached = {
                s.optimizer: s.best.steps_to_target if cost == "steps" else s.best.seconds_to_target
                for s in result.standings
                if s.best.finished
            }
            for name, column in costs.items():
                column.append(reached.get(name, float("inf")))
        return Profile(tuple(r.goal.workload for r in results), {name: tuple(c) for name, c in costs.items()})

    @property
    def remarks(self) -> list[str]:
        """On all of it."""
        lines = []
        if len(self._runs) < self.total:
            how = "Interrupted" if self.interrupted else "Unfinished"
            lines.append(f"{how}: {len(self._runs)} of {self.total} runs; means are over the seeds that are there.")
            if self.confirming:
                lines.append("Learning rates are chosen from the seeds that are shown, but where it is said otherwise.")
        return lines

    def __str__(self) -> str:
        results = self.results
        if len(results) < 2:
            parts = [str(result) for result in results]
        else:
            parts = [f"{r.goal.workload}: {r.goal.description}\n{r}" for r in results] + [
                f"All {len(results)} workloads, performance profiles\n{aligned(*self.scores())}"
            ]
        return "\n\n".join([*parts, *self.remarks])

    def scores(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The performance profiles as a table: titles, and a row for each optimizer, the best first."""
        steps, seconds = self.profile("steps"), self.profile("seconds")
        names = sorted(steps.costs, key=lambda name: -steps.score(name))
        best = {
            name: sum(cost < float("inf") and ratio == 1 for cost, ratio in zip(steps.costs[name], ratios, strict=True))
            for name, ratios in steps.ratios.items()
        }
        rows: list[tuple[str, ...]] = [
            (str(i), name, f"{steps.score(name):.3f}", f"{seconds.score(name):.3f}",
             f"{sum(cost < float('inf') for cost in steps.costs[name])} of {len(steps.workloads)}", str(best[name]))
            for i, name in enumerate(names, start=1)
        ]  # fmt: skip
        return ("#", "optimizer", "score\nby steps", "score\nby seconds", "targets\nreached", "fewest\nsteps"), rows

    def save(self, folder: Path | str, *, command: str = "", tensorboard: bool = False) -> list[Path]:
        """Write compare.html and its numbers, as JSON and CSV, to a folder; what was there under these names is gone.

        Args:
            folder: is made if it is not there.
            command: how to make it again, for the page.
            tensorboard: also write the curves of every run to the folder `tensorboard` in it.

        Returns:
            The files, and that folder.

        Raises:
            ModuleNotFoundError: TensorBoard is wanted and not installed.
        """
        from schuss.lab import report

        return report.save(self, Path(folder), command=command, tensorboard=tensorboard)

    def _missing(self) -> list[tuple[Workload, Candidate, float, int]]:
        """Runs that have not been made; optimizers alternate, so that a machine that slows down slows all of them.

        Those that confirm are known when all others are there. They go seed by seed: every one that has ended is as
        good as a comparison that had no more.
        """
        missing = []
        for workload in self.workloads:
            columns = [[(c, lr) for lr in self._grids[workload.name, c.name]] for c in self.candidates]
            pairs = [pair for row in zip_longest(*columns) for pair in row if pair is not None]
            missing += [
                (workload, candidate, lr, seed)
                for seed in self.seeds
                for candidate, lr in pairs
                if (workload.name, candidate.name, lr, seed) not in self._runs
            ]
        if missing or not self.confirming:
            return missing
        candidates, workloads = {c.name: c for c in self.candidates}, {w.name: w for w in self.workloads}
        return [
            (workloads[result.goal.workload], candidates[standing.optimizer], standing.best.lr, seed)
            for seed in self.confirming
            for result in self.results
            for standing in result.standings
            if (result.goal.workload, standing.optimizer, standing.best.lr, seed) not in self._runs
        ]

    def _made(
        self, missing: Sequence[tuple[Workload, Candidate, float, int]], store: Store | None, pool: Pool[Run] | None
    ) -> Iterator[Run]:
        """The runs: what cannot be, what is kept, and then what has to be trained."""
        tasks: list[tuple[Workload, Candidate, float, int, int | None, float]] = []
        keys: list[dict[str, Any]] = []
        for workload, candidate, lr, seed in missing:
            if (error := self._refused.get((workload.name, candidate.name))) is not None:
                yield Run.failed(workload.name, candidate.name, lr, seed, error)
                continue
            key = {} if store is None else self._settings(workload, candidate, lr, seed)
            if store is not None and (run := store.get(key)) is not None:
                self.recalled += 1
                yield run
                continue
            tasks.append((workload, candidate, lr, seed, self.epochs, self.warmup))
            keys.append(key)
        if pool is not None:
            _check_sendable(tasks)
        made = enumerate(_attempt(*task) for task in tasks) if pool is None else pool(tasks)
        for i, result in made:
            if isinstance(result, Died):
                workload, candidate, lr, seed, *_ = tasks[i]
                yield Run.failed(workload.name, candidate.name, lr, seed, str(result))
                continue
            if store is not None and result.error is None:  # what failed may not do so again
                store.put(keys[i], result)
            yield result

    def _settings(self, workload: Workload, candidate: Candidate, lr: float, seed: int) -> dict[str, Any]:
        name = workload.name
        return settings(
            self._fingerprints[name], name, candidate, lr, seed=seed, epochs=self.goals[name].epochs, warmup=self.warmup
        )

    def _extend(self) -> None:
        """Add a learning rate to each grid at whose edge the best one is."""
        for result in self.results:
            for standing in result.standings:
                where = result.goal.workload, standing.optimizer
                grid, [candidate] = self._grids[where], [c for c in self.candidates if c.name == standing.optimizer]
                if standing.edge is not None and len(grid) < len(candidate.lrs) + self.extend:
                    self._grids[where] = extended(grid, standing.edge)


def compare(
    workloads: Source | Sequence[Source] = "digits",
    optimizers: Optimizers = DEFAULT_NAMES,
    *,
    lrs: Sequence[float] | None = None,
    seeds: int | Sequence[int] = 3,
    confirm: int = 0,
    epochs: int | None = None,
    warmup: float = 0.0,
    extend: int = 2,
    jobs: int = 1,
    threads: int | None = None,
    store: Path | str | None = None,
    on_run: Callable[[Run, int, int], None] | None = None,
) -> Comparison:
    """Train workloads with every optimizer, at every learning rate of its grid, from every seed.

    Every run is complete: its learning rate falls to zero, and it is judged by its last evaluation. For a given seed
    all runs of a workload start from the same weights and see the same batches in the same order. Ctrl-C returns what
    there is.

    Args:
        workloads: one or several: a name of `schuss workloads`, `module:function`, a function from a seed to a `Task`,
            or a `Workload`.
        optimizers: names, `AdamW` for schuss's, `torch:AdamW` for torch's and `module:Class` for anybody's; or classes,
            functions and `Candidate`s.
        lrs: learning rates in (0, inf) for all, instead of a grid for each.
        seeds: a count, or the seeds.
        confirm: how many seeds more each optimizer is then trained from at its best learning rate, in [0, inf). If
            there are any, the ranking is on these alone: scores by which a rate was chosen are a little too good.
        epochs: of a run, in [1, inf); None: as many as the workload says.
        warmup: share of a run in which the learning rate rises first, in [0, 1).
        extend: how many learning rates a grid may get beyond its edges, in [0, inf).
        jobs: processes that train side by side, in [1, inf).
        threads: of torch in each of them; None: as many as there are now.
        store: an SQLite file from which finished runs are taken, and in which new ones are kept.
        on_run: called after each run, with it, and how many there are and will be.

    Raises:
        ValueError: an argument that is none, a workload that is none, or no optimizer that can train any workload.
        OSError: the store cannot be used.
    """
    made = Comparison(
        workloads, optimizers, lrs=lrs, seeds=seeds, confirm=confirm, epochs=epochs, warmup=warmup, extend=extend,
        threads=threads,
    )  # fmt: skip
    return made.run(jobs=jobs, store=store, on_run=on_run)


def extended(grid: Sequence[float], edge: str) -> tuple[float, ...]:
    """A rising grid with one more value at its smallest or largest end, as far beyond as its last two steps go.

    By two steps and not by one, so that 1, 3, 10 goes on with 30, and not with 33. A grid that cannot go on, for
    there is no such number, stays.
    """
    step = min(len(grid) - 1, 2)
    last = (-1, -1 - step, -step) if edge == "largest" else (0, step, step - 1)
    end, far, near = (grid[i] for i in last)
    value = float(f"{near * (end / far):.6g}")
    if not (0 < value < float("inf")) or value in grid:
        return tuple(grid)
    return (*grid, value) if edge == "largest" else (value, *grid)


_KNOWN: set[tuple[str, str]] = set()
"""What this process has rehearsed."""


def _work(workload: Workload, candidate: Candidate, lr: float, seed: int, epochs: int | None, warmup: float) -> Run:
    """A run in a process of its own, after a rehearsal: compiling is no part of a run there, either."""
    if (workload.name, candidate.name) not in _KNOWN:
        _KNOWN.add((workload.name, candidate.name))
        try:
            rehearse(workload, candidate)
        except ValueError as error:
            return Run.failed(workload.name, candidate.name, lr, seed, str(error))
    return _attempt(workload, candidate, lr, seed, epochs, warmup)


def _attempt(workload: Workload, candidate: Candidate, lr: float, seed: int, epochs: int | None, warmup: float) -> Run:
    return attempt(workload, candidate, lr, seed=seed, epochs=epochs, warmup=warmup)


def _check_sendable(tasks: Sequence[tuple[Any, ...]]) -> None:
    for workload, candidate in {(w.name, c.name): (w, c) for w, c, *_ in tasks}.values():
        for thing, function in ((workload, workload.make), (candidate, candidate.build)):
            try:
                pickle.dumps(thing)
            except Exception as error:
                raise ValueError(
                    f"{thing.name} cannot be sent to another process, {error}: put {function!r} into a module, at its "
                    "top level, or use jobs=1"
                ) from error


def _workloads(given: Source | Sequence[Source]) -> list[Workload]:
    several = [given] if isinstance(given, (str, Workload)) or callable(given) else list(given)
    found = [
        one if isinstance(one, Workload) else find(one) if isinstance(one, str) else Workload.of(one) for one in several
    ]
    if not found:
        raise ValueError("at least one workload is needed")
    by_name: dict[str, Workload] = {}
    for workload in found:
        if by_name.setdefault(workload.name, workload).make is not workload.make:
            raise ValueError(f"two workloads are called {workload.name!r}: give one of them another name")
    return list(by_name.values())


def _seeds(given: int | Sequence[int]) -> list[int]:
    if _is_whole(given) and 1 <= given <= MOST_SEEDS:
        return list(range(given))
    seeds = list(dict.fromkeys(given)) if isinstance(given, Sequence) else []
    if not seeds or not all(_is_whole(seed) and 0 <= seed < 2**63 for seed in seeds):
        raise ValueError(f"seeds must be a count in [1, {MOST_SEEDS}] or integers in [0, 2**63), got {given!r}")
    return seeds


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """A block with so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
