"""Where `tune` looks next: points of a sequence that goes on where it stopped."""

import math
from typing import TYPE_CHECKING, Any

import optuna
from numpy.random import SeedSequence
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

if TYPE_CHECKING:
    from schuss.lab.tune import Search


class Sampler(optuna.samplers.BaseSampler):
    """Points by their place in a sequence, so that a study that goes on, goes on with the points it would have had.

    Optuna's samplers draw from one generator, which begins again with every process.
    """

    def __init__(self, search: "Search", method: str) -> None:
        self._search, self._method = search, method
        self.places: dict[int, int | None] = {}
        """Of trials that have just been drawn, by their numbers."""

    @property
    def total(self) -> int:
        """Places there are."""
        return math.prod(self._levels) if self._method == "grid" else self._search.trials

    @property
    def _levels(self) -> list[int]:
        """Of a grid: as many values of each as there are trials for, and no more of a later one than of an earlier."""
        levels = [1] * len(self._search.space.ranges)
        while True:
            for i in sorted(range(len(levels)), key=lambda i: levels[i]):
                more = [n + (i == j) for j, n in enumerate(levels)]
                if math.prod(more) <= self._search.trials:
                    levels = more
                    break
            else:
                return levels

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {} if "fixed_params" in trial.system_attrs else self._search.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        free = self.places[trial.number] = self._search.free(trial.number)
        place = free or 0
        if self._method == "tpe" and place >= min(10, max(3, self._search.trials // 3)):
            tpe = optuna.samplers.TPESampler(seed=_mixed(self._search.seed, place), n_startup_trials=0)
            if found := tpe.sample_relative(study, trial, search_space):
                return found
        ranges = self._search.ranges()
        parts = self._grid(place) if self._method == "grid" else self._halton(place, len(ranges))
        return {name: limits.at(part) for (name, limits), part in zip(ranges.items(), parts, strict=True)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Of what somebody has left open who put a trial into the queue: the middle."""
        return self._search.ranges()[param_name].at(0.5)

    def _halton(self, place: int, count: int) -> list[float]:
        from scipy.stats import qmc

        return [float(x) for x in qmc.Halton(count, scramble=True, seed=self._search.seed).random(place + 1)[-1]]

    def _grid(self, place: int) -> list[float]:
        parts = []
        for levels in self._levels:
            place, i = divmod(place, levels)
            parts.append(i / (levels - 1) if levels > 1 else 0.5)
        return parts


def _mixed(seed: int, place: int) -> int:
    """A seed of its own for each place."""
    return int(SeedSequence((seed, place)).generate_state(1)[0])
