"""The statistics of comparisons: error rates on synthetic scores, and closed forms of performance profiles."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from schuss.lab.evidence import LEVEL, R_MAX, Profile, against_the_best, grain, holm

DRAWS = 20_000


def rate(scores: NDArray[np.float64], grain: float = 0.0) -> float:
    """How often anything is told apart from the best."""
    return float((against_the_best(scores, grain=grain).min(axis=-1) < LEVEL).mean())


def sure(rate: float, draws: int = DRAWS) -> float:
    """Three standard errors of a frequency."""
    return 3 * math.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_two_equal_optimizers_are_told_apart_at_the_nominal_rate(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    shared = rng.normal(size=(DRAWS, seeds, 1))  # a seed that is hard for both
    scores = shared + rng.normal(size=(DRAWS, seeds, 2)) * [1.0, 3.0]
    assert rate(scores) == pytest.approx(LEVEL, abs=sure(LEVEL))


@pytest.mark.parametrize("optimizers", [3, 8, 20])
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_rate_of_any_false_claim_is_the_nominal_one_at_most(seeds: int, optimizers: int, spread: float) -> None:
    """Though the best is chosen by the scores that it is then tested on; with equal and with different variances."""
    rng = np.random.default_rng(seeds)
    draws = DRAWS if optimizers < 20 else DRAWS // 5
    sizes = np.exp(spread * rng.normal(size=(draws, 1, optimizers)))
    scores = rng.normal(size=(draws, seeds, 1)) + sizes * rng.normal(size=(draws, seeds, optimizers))
    assert rate(scores) <= LEVEL + sure(LEVEL, draws)


def test_a_correction_for_the_comparisons_with_the_best_alone_would_claim_too_much() -> None:
    """Why it runs over all pairs: of 20 equal optimizers the luckiest would beat another in every sixth comparison."""
    rng = np.random.default_rng(0)
    draws = DRAWS // 5
    scores = rng.normal(size=(draws, 5, 20))
    best = scores.mean(axis=1).argmax(axis=1)
    ahead = np.take_along_axis(scores, best[:, None, None], axis=2) - scores
    t = ahead.mean(axis=1) / (ahead.std(axis=1, ddof=1) / math.sqrt(5) + 1e-300)
    t[np.arange(draws), best] = 0
    naive = 2 * stats.t.sf(t.max(axis=1), 4) < LEVEL / 19
    assert naive.mean() > 2 * LEVEL
    assert rate(scores) < LEVEL


@pytest.mark.parametrize("size", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_scores_in_coarse_steps_make_no_false_claims(seeds: int, size: float) -> None:
    """Accuracies on few examples: the same difference for every seed is no sign of a variance of zero."""
    rng = np.random.default_rng(seeds)
    scores = np.round(0.3 + size * rng.normal(size=(DRAWS, seeds, 8)))
    assert rate(scores, grain=1.0) <= LEVEL + sure(LEVEL)
    if seeds < 5 and size < 2:
        assert rate(scores) > 2 * LEVEL  # what the grain is for


def test_it_is_the_paired_t_test_with_holms_correction() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(6, 4)) + np.array([0.0, 0.4, 1.0, 2.0])
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    p = [stats.ttest_rel(scores[:, i], scores[:, j]).pvalue for i, j in pairs]
    order, stepped, largest = np.argsort(p), {}, 0.0
    for rank, which in enumerate(order):
        largest = max(largest, (6 - rank) * p[which])
        stepped[pairs[which]] = min(largest, 1.0)
    expected = [stepped[0, 3], stepped[1, 3], stepped[2, 3], 1.0]
    np.testing.assert_allclose(against_the_best(scores), expected, rtol=1e-9)
    np.testing.assert_allclose(against_the_best(scores, best=3), expected, rtol=1e-9)
    assert against_the_best(scores, best=2)[3] == pytest.approx(stepped[2, 3])


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([[0.5, 0.9], [0.01, 0.01]]), [[1.0, 1.0], [0.02, 0.02]])


def test_large_differences_are_found_and_equal_scores_are_not_told_apart() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 5, 3)) * 0.01 + np.array([1.0, 1.0, 0.0])
    found = against_the_best(scores) < LEVEL
    assert found[:, 2].all()
    assert found[:, :2].mean() < LEVEL
    same = np.repeat(rng.normal(size=(5, 1)), 2, axis=1)
    assert against_the_best(same).tolist() == [1.0, 1.0]
    assert against_the_best(same + np.array([0, 1])).tolist() == [0.0, 1.0]
    assert against_the_best(same + np.array([0, 1]), grain=1.0)[0] > 0.004
    with pytest.raises(ValueError, match="two seeds or more, got 1"):
        against_the_best([[1.0, 2.0]])


def test_the_grain_is_the_smallest_step_but_for_the_last_bits() -> None:
    assert grain([97 / 100, 99 / 100, 96 / 100, 0.96 + 1e-12]) == pytest.approx(0.01)
    assert grain([0.5, 0.5]) == 0
    assert grain([]) == 0


def test_a_profile_in_closed_form() -> None:
    inf = math.inf
    profile = Profile(("a", "b", "c", "d"), {"X": (10, 30, inf, inf), "Y": (20, 10, 7, inf), "Z": (inf, 50, 7, inf)})
    assert profile.ratios == {"X": (1, 3, inf, inf), "Y": (2, 1, 1, inf), "Z": (inf, 5, 1, inf)}
    assert [profile.share("Y", tau) for tau in (1, 1.9, 2, 100)] == [0.5, 0.5, 0.75, 0.75]
    # Each ratio r adds (4 - r) / 3 to a mean over the four workloads.
    assert profile.score("X") == pytest.approx((1 + 1 / 3) / 4)
    assert profile.score("Y") == pytest.approx((2 / 3 + 1 + 1) / 4)
    assert profile.score("Z") == pytest.approx(1 / 4)
    assert list(profile.record()["optimizers"]) == ["Y", "X", "Z"]


def test_the_score_is_the_integral_of_the_profile() -> None:
    rng = np.random.default_rng(0)
    profile = Profile(tuple("abcde"), {name: tuple(rng.lognormal(size=5)) for name in "XYZ"})
    tau = np.linspace(1, R_MAX, 30_001)
    for name in "XYZ":
        shares = [profile.share(name, t) for t in tau[::10]]
        assert profile.score(name) == pytest.approx(np.trapezoid(shares, tau[::10]) / (R_MAX - 1), abs=1e-3)


def test_a_target_that_is_reached_before_the_first_step() -> None:
    profile = Profile(("a",), {"X": (0,), "Y": (3,)})
    assert profile.ratios == {"X": (1,), "Y": (math.inf,)}


def test_a_run_that_went_astray_does_not_make_the_others_coarse() -> None:
    losses = [0.101, 0.1035, 0.1049, 0.1091]
    assert grain([*losses, 58950.0]) == pytest.approx(grain(losses)) == pytest.approx(0.0014)
    assert grain([0.1 + 0.2, 0.3, 0.4]) == pytest.approx(0.1)
