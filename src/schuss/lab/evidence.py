"""What final scores say: which optimizers can be told apart, and how soon each reaches its targets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr

Floats = NDArray[np.float64]

LEVEL = 0.05
"""The chance, at most, of telling any two optimizers apart that are equally good."""

R_MAX = 4.0
"""How many times slower than the fastest still counts for a score: AlgoPerf's."""


def against_the_best(scores: ArrayLike, *, grain: float = 0.0, best: ArrayLike | None = None) -> Floats:
    """For each optimizer the p value of being as good as the best one, corrected for all comparisons.

    The test is the paired t test over seeds. For a pair with differences of mean d̄ and variance s² over n seeds

    .. math::
        t = \\bar d \\Big/ \\sqrt{(s^2 + g^2/6) / n}

    is held against Student's distribution with n - 1 degrees of freedom, on both sides. Of other tests on few seeds,
    Wilcoxon's cannot get below 0.05 with five of them, and one with a pooled variance takes it that all optimizers vary
    alike, which they do not.

    g is the step between possible scores, of an accuracy 1 / images: differences that are equal by rounding would
    otherwise count as no variance at all. g² / 6 is what rounding adds to the variance of a difference (Sheppard).

    The best is known from the same scores, so any pair might have been compared: Holm's correction runs over all
    k (k - 1) / 2 of them. The chance of any false claim is `LEVEL` at most, however the means lie, for normal
    differences.

    Args:
        scores: of shape (..., seeds, optimizers), larger is better; at least two seeds.
        grain: g, in [0, inf).
        best: index of the best one, of shape (...); None: the one with the largest mean.

    Returns:
        Of shape (..., optimizers); 1 for the best itself.

    Raises:
        ValueError: there are less than two seeds.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n, k = scores.shape[-2:]
    if n < 2:
        raise ValueError(f"against_the_best: a test needs two seeds or more, got {n}")
    best = scores.mean(axis=-2).argmax(axis=-1) if best is None else np.asarray(best)
    i, j = np.triu_indices(k, 1)
    differences = scores[..., i] - scores[..., j]
    mean = differences.mean(axis=-2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.sqrt((differences.var(axis=-2, ddof=1) + np.float64(grain) ** 2 / 6) / n)
        t = np.where(mean == 0, 0.0, np.abs(mean) / error)
    adjusted = holm(2 * stdtr(n - 1, -t))
    result = np.ones((*scores.shape[:-2], k))
    for pair, (a, b) in enumerate(zip(i, j, strict=True)):
        result[..., a] = np.where(best == b, adjusted[..., pair], result[..., a])
        result[..., b] = np.where(best == a, adjusted[..., pair], result[..., b])
    return result


def holm(p: ArrayLike) -> Floats:
    """P values along the last axis, corrected so that the chance of any false rejection stays what it is for one."""
    p = np.asarray(p, dtype=np.float64)
    order = p.argsort(axis=-1)
    count = p.shape[-1]
    stepped = np.take_along_axis(p, order, axis=-1) * (count - np.arange(count))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(stepped, axis=-1), 1.0), axis=-1)
    return adjusted


def grain(values: Sequence[float]) -> float:
    """The smallest step between values: 1 / n for shares of n, next to nothing for losses. 0 if all are equal."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if len(ordered) == 0:
        return 0.0
    steps = np.diff(ordered)
    # Sums in another order leave equal shares apart in their last bits: of these values, whatever else there is, for
    # one run that went astray must not make all others look coarse.
    steps = steps[steps > 1e-6 * np.maximum(np.abs(ordered[1:]), np.abs(ordered[:-1]))]
    return float(steps.min()) if len(steps) else 0.0


@dataclass(frozen=True)
class Profile:
    """Performance profiles: for each optimizer the share of workloads that it does in τ times the best one's cost.

    Args:
        workloads: names.
        costs: by optimizer, its cost on each workload: infinite where it did not reach the target.
    """

    workloads: tuple[str, ...]
    costs: Mapping[str, tuple[float, ...]]

    @property
    def ratios(self) -> dict[str, tuple[float, ...]]:
        """Costs over those of the best optimizer on the workload; infinite where nobody has reached the target."""
        best = [min(column) for column in zip(*self.costs.values(), strict=True)]
        return {
            name: tuple(_ratio(cost, least) for cost, least in zip(costs, best, strict=True))
            for name, costs in self.costs.items()
        }

    def share(self, optimizer: str, tau: float) -> float:
        """ρ(τ): of the workloads, those with a ratio of τ at most."""
        ratios = self.ratios[optimizer]
        return sum(ratio <= tau for ratio in ratios) / len(ratios)

    def score(self, optimizer: str, r_max: float = R_MAX) -> float:
        """AlgoPerf's score, in [0, 1]; each workload with ratio r adds (r_max - r) / (r_max - 1) to a mean, or 0.

        .. math::
            \\frac{1}{r_{max} - 1} \\int_1^{r_{max}} \\rho(\\tau) \\, d\\tau

        Source: Dolan, Moré 2002, arXiv:cs/0102001; Dahl et al. 2023, arXiv:2306.07179.
        """
        ratios = self.ratios[optimizer]
        return sum(max(0.0, r_max - ratio) for ratio in ratios) / ((r_max - 1) * len(ratios))

    def record(self) -> dict[str, Any]:
        """Scores, costs and ratios by optimizer, the best first."""
        scores = {name: self.score(name) for name in self.costs}
        return {
            "workloads": list(self.workloads),
            "r_max": R_MAX,
            "optimizers": {
                name: {"score": scores[name], "costs": list(self.costs[name]), "ratios": list(self.ratios[name])}
                for name in sorted(scores, key=lambda name: -scores[name])
            },
        }


def _ratio(cost: float, least: float) -> float:
    if not math.isfinite(cost):
        return math.inf
    return 1.0 if cost == least else cost / least if least > 0 else math.inf
