"""Numbers that can be worked out on paper: from formulas, from theorems, and from small NumPy versions of papers."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cases import RICH, Case, each, randn
from schuss import optim


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def trajectory(make: Callable[[list[Any]], Any], grads: Iterable[float], start: float = 0.0) -> list[float]:
    """Where one number goes, step by step, under given gradients."""
    p = parameter(start)
    optimizer, values = make([p]), []
    for g in grads:
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        values.append(p.item())
    return values


def moves(make: Callable[[list[Any]], Any], grads: Iterable[float], start: float = 0.0) -> list[float]:
    """The steps themselves."""
    return np.diff([start, *trajectory(make, grads, start)]).tolist()


# --- Adam does not converge, AMSGrad does (Reddi, Kale, Kumar 2018, theorem 1) ----------------------------------------


@pytest.mark.parametrize(("amsgrad", "expected"), [(False, 1.0), (True, -0.9798)], ids=["Adam", "AMSGrad"])
def test_adam_goes_to_the_worst_point_and_amsgrad_to_the_best(amsgrad: bool, expected: float) -> None:
    """f(x) = 3x at every third step and -x else, on [-1, 1]: the best point is -1."""
    p = parameter(0.0)
    optimizer = optim.Adam([p], lr=0.5, betas=(0.0, 0.1), amsgrad=amsgrad)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
    for t in range(1, 301):
        p.grad = torch.tensor([3.0 if t % 3 == 1 else -1.0], dtype=torch.float64)
        optimizer.step()
        schedule.step()
        p.data.clamp_(-1, 1)
    assert p.item() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("c", "regret"), [(3, 2 / 3), (10, 16 / 3)], ids=["C=3", "C=10"])
def test_adams_average_regret(c: int, regret: float) -> None:
    """With β₁ = 0, β₂ = 1 / (1 + C²) and lr 1/√t, Adam stays near 1 and loses 2 (C - 2) / 3 a step against -1."""
    p = parameter(1.0)
    optimizer = optim.Adam([p], lr=0.5, betas=(0.0, 1 / (1 + c * c)), eps=0.0)
    lost, steps = 0.0, 3000
    for t in range(1, steps + 1):
        slope = float(c) if t % 3 == 1 else -1.0
        lost += slope * (p.item() + 1)
        p.grad = torch.tensor([slope], dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = 0.5 / math.sqrt(t)
        optimizer.step()
        p.data.clamp_(-1, 1)
    assert lost / steps == pytest.approx(regret, rel=0.02)


def test_amsgrad_never_forgets_the_largest_square() -> None:
    """Its maximum is that of the averages before bias correction, so it never falls; the steps are no larger."""
    p = torch.nn.Parameter(randn(20))
    optimizer = optim.Adam([p], lr=0.01, betas=(0.9, 0.5), amsgrad=True)
    largest = torch.zeros(20, dtype=torch.float64)
    for step in range(20):
        p.grad = randn(20, seed=step) * 3 ** (step % 5)
        optimizer.step()
        kept = optimizer.state[p]
        largest = torch.maximum(largest, kept["exp_avg_sq"])
        assert torch.equal(kept["max_exp_avg_sq"], largest)


# --- ADOPT's example: Adam fails unless β₂ is near 1, ADOPT with none ------------------------------------------------

BETAS2 = (0.1, 0.5, 0.9, 0.99, 0.999)


def toy(cls: type[Any], *, k: int, steps: int, seeds: int = 64, **kwargs: Any) -> list[float]:
    """f(θ) = θ on [-1, 1], its gradient k² with probability 1/k, else -k: where each β₂ ends, averaged over seeds.

    Each β₂ is a group, each seed an element; all parameters lie in one tensor, so that one operation keeps them in
    the interval.
    """
    everything = torch.zeros(len(BETAS2), seeds, dtype=torch.float64)
    params = [torch.nn.Parameter(row) for row in everything]
    groups = [{"params": [p], "betas": (0.9, beta2)} for p, beta2 in zip(params, BETAS2, strict=True)]
    optimizer = cls(groups, **kwargs)
    rare = torch.rand(steps, seeds, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < 1 / k
    grads = torch.where(rare, torch.tensor(k * k, dtype=torch.float64), -float(k))
    assert grads.mean().item() == pytest.approx(1, abs=5 * grads.std().item() / math.sqrt(grads.numel()))
    for t, g in enumerate(grads):
        for p, group in zip(params, optimizer.param_groups, strict=True):
            p.grad = g
            group["lr"] = 0.01 / math.sqrt(1 + 0.01 * t)
        optimizer.step()
        everything.clamp_(-1, 1)
    return everything.mean(1).tolist()


def test_adopt_converges_with_any_beta2() -> None:
    """Unclipped. Expected is the mean of 256 seeds in NumPy, whose standard deviation is 0.06 to 0.22; four standard
    errors of 64 seeds are at most 0.11."""
    ends = toy(optim.ADOPT, k=10, steps=20_000, clip_exp=None)
    assert max(ends) < -0.7
    assert ends == pytest.approx([-0.962, -0.958, -0.874, -0.796, -0.810], abs=0.11)


def test_adam_diverges_there_unless_beta2_is_near_one() -> None:
    *small, near, nearest = toy(optim.Adam, k=10, steps=5000)
    assert min(small) > 0.7
    assert max(near, nearest) < -0.05


def test_amsgrad_goes_the_right_way_there_but_slowly() -> None:
    """Not even a third of the way for any β₂, when ADOPT has gone at least a third for each."""
    amsgrad = toy(optim.Adam, k=10, steps=5000, amsgrad=True)
    assert all(-0.33 < end < 0 for end in amsgrad)
    assert max(toy(optim.ADOPT, k=10, steps=5000, clip_exp=None)) < -0.33


def test_clipping_biases_the_example() -> None:
    """The authors' later clip cuts the rare large gradients: after 2000 steps small β₂ sit at the wrong end."""
    assert min(toy(optim.ADOPT, k=10, steps=2000)[:2]) > 0.85
    assert max(toy(optim.ADOPT, k=10, steps=2000, clip_exp=None)) < -0.2


def adopt(
    start: np.ndarray, grads: Sequence[np.ndarray], *, lr: float, betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6, weight_decay: float = 0.0, decoupled: bool = False, clip_exp: float | None = 0.25,
) -> np.ndarray:  # fmt: skip
    """Algorithm 2 of Taniguchi et al. 2024, with the clip of the authors' code: v starts as the first gradient's
    square, which moves nothing; then each gradient is divided by the v before it."""
    theta, m, v = start.copy(), np.zeros_like(start), None
    for t, g in enumerate(grads):
        if weight_decay and not decoupled:
            g = g + weight_decay * theta
        if v is None:
            v = g * g
            continue
        if decoupled:
            theta = theta - lr * weight_decay * theta
        u = g / np.maximum(np.sqrt(v), eps)
        if clip_exp is not None:
            u = np.clip(u, -(t**clip_exp), t**clip_exp)
        m = betas[0] * m + (1 - betas[0]) * u
        theta = theta - lr * m
        v = betas[1] * v + (1 - betas[1]) * g * g
    return theta


def lion(
    start: np.ndarray, grads: Sequence[np.ndarray], *, lr: float, betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Program 1 of Chen et al. 2023."""
    theta, m = start.copy(), np.zeros_like(start)
    for g in grads:
        update = np.sign(betas[0] * m + (1 - betas[0]) * g)
        m = betas[1] * m + (1 - betas[1]) * g
        theta = theta - lr * (update + weight_decay * theta)
    return theta


PAPERS: list[tuple[str, dict[str, Any], Callable[..., np.ndarray], dict[str, Any]]] = [
    ("ADOPT", {}, adopt, {}),
    ("ADOPT", {"clip_exp": None}, adopt, {"clip_exp": None}),
    ("ADOPT", {"clip_exp": 0.5, "betas": (0.8, 0.5)}, adopt, {"clip_exp": 0.5, "betas": (0.8, 0.5)}),
    ("ADOPT", {"eps": 0.7}, adopt, {"eps": 0.7}),
    ("ADOPT", {"weight_decay": 0.1}, adopt, {"weight_decay": 0.1}),
    (
        "ADOPT",
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        adopt,
        {"weight_decay": 0.1, "decoupled": True},
    ),
    ("Lion", {}, lion, {}),
    ("Lion", {"betas": (0.5, 0.8)}, lion, {"betas": (0.5, 0.8)}),
    ("Lion", {"weight_decay": 0.3}, lion, {"weight_decay": 0.3}),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "paper", "settings"), PAPERS, ids=[str(Case(name, kwargs)) for name, kwargs, _, _ in PAPERS]
)
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
def test_what_the_paper_says(
    name: str, kwargs: dict[str, Any], paper: Any, settings: dict[str, Any], maximize: bool, backend: str
) -> None:
    start = randn(4, 5)
    grads = [randn(4, 5, seed=1 + t) * (5.0 if t == 3 else 1.0) for t in range(12)]
    p = torch.nn.Parameter(start.clone())
    optimizer = getattr(optim, name)([p], lr=0.05, maximize=maximize, backend=backend, **kwargs)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    sign = -1.0 if maximize else 1.0
    expected = paper(start.numpy(), [sign * g.numpy() for g in grads], lr=0.05, **settings)
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


# --- RAdam's rectification --------------------------------------------------------------------------------------------


def rho(beta2: float, t: int) -> float:
    return 2 / (1 - beta2) - 1 - 2 * t * beta2**t / (1 - beta2**t)


def test_radams_first_steps_are_not_adapted() -> None:
    """With gradient 100 and lr 1: five steps of exactly 100, then the rectified ones."""
    found = moves(lambda p: optim.RAdam(p, lr=1.0), [100.0] * 6)
    assert found[:5] == [-100.0] * 5
    assert found[5] == pytest.approx(-0.025821, abs=5e-7)


@pytest.mark.parametrize(("beta2", "r6"), [(0.999, 0.02582), (0.99, 0.08168), (0.9, 0.25518)])
def test_radams_rectification_at_the_sixth_step(beta2: float, r6: float) -> None:
    """Under a constant gradient and without eps, Adam's step is lr, so RAdam's is r."""
    found = moves(lambda p: optim.RAdam(p, lr=1.0, betas=(0.9, beta2), eps=0.0), [100.0] * 6)
    assert found[4] == pytest.approx(-100.0, rel=1e-12)
    assert found[5] == pytest.approx(-r6, abs=5e-6)


def test_radams_rectification_grows_to_one() -> None:
    steps = {10: 0.0490, 100: 0.2153, 1000: 0.6453, 10_000: 0.99977}
    found = moves(lambda p: optim.RAdam(p, lr=1.0, eps=0.0), [1.0] * 10_000)
    for t, r in steps.items():
        assert found[t - 1] == pytest.approx(-r, abs=5e-5 if t < 10_000 else 5e-6)


@pytest.mark.parametrize("beta2", [0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_radam_adapts_from_the_first_step_with_rho_above_five(beta2: float) -> None:
    """Which never comes where ρ∞ = 2 / (1 - β₂) - 1 is below 5."""
    found = moves(lambda p: optim.RAdam(p, lr=1.0, betas=(0.9, beta2), eps=0.0), [100.0] * 40)
    adapted = [abs(move) < 1.01 for move in found]
    assert adapted == [rho(beta2, t) > 5 for t in range(1, 41)]
    assert any(adapted) == (beta2 > 2 / 3)


# --- weight decay -----------------------------------------------------------------------------------------------------


def test_adamw_decays_by_lr_times_weight_decay_and_adam_does_not() -> None:
    """A thousand steps without a gradient, lr 1e-3, weight decay 0.1."""
    adamw = trajectory(lambda p: optim.AdamW(p, lr=1e-3, weight_decay=0.1), [0.0] * 1000, start=1.0)
    assert adamw[-1] == pytest.approx(0.9048328935585562, rel=1e-13)
    assert adamw[-1] == pytest.approx((1 - 1e-4) ** 1000, rel=1e-13)
    adam = trajectory(lambda p: optim.Adam(p, lr=1e-3, weight_decay=0.1), [0.0] * 1000, start=1.0)
    assert adam[-1] == pytest.approx(0.25766508491640244, rel=1e-9)


@pytest.mark.parametrize("weight_decay", [0.01, 0.1])
def test_adams_first_step_of_decay_is_lr_whatever_the_decay(weight_decay: float) -> None:
    """What tells AdamW from "Adam plus L2": Adam divides the decay by its own size."""
    [adam] = moves(lambda p: optim.Adam(p, lr=1e-3, weight_decay=weight_decay), [0.0], start=1.0)
    assert adam == pytest.approx(-1e-3, rel=2e-6)
    [adamw] = moves(lambda p: optim.AdamW(p, lr=1e-3, weight_decay=weight_decay), [0.0], start=1.0)
    assert adamw == pytest.approx(-1e-3 * weight_decay, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "steps_that_decay"),
    [
        pytest.param(lambda p, **o: optim.AdamW(p, **o), 50, id="AdamW"),
        pytest.param(lambda p, **o: optim.Adam(p, decoupled_weight_decay=True, **o), 50, id="Adam"),
        pytest.param(lambda p, **o: optim.NAdam(p, decoupled_weight_decay=True, **o), 50, id="NAdam"),
        pytest.param(lambda p, **o: optim.RAdam(p, decoupled_weight_decay=True, **o), 50, id="RAdam"),
        pytest.param(lambda p, **o: optim.ADOPT(p, decoupled_weight_decay=True, **o), 49, id="ADOPT"),
        pytest.param(lambda p, **o: optim.Lion(p, **o), 50, id="Lion"),
    ],
)
def test_decoupled_decay_is_a_product(make: Callable[..., Any], steps_that_decay: int) -> None:
    """Without gradients p falls by 1 - lr λ a step, with a changing lr too; ADOPT's first step does nothing."""
    p = parameter(2.0)
    optimizer = make([p], lr=0.1, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(50):
        p.grad = torch.zeros(1, dtype=torch.float64)
        optimizer.step()
        schedule.step()
    rates = [0.1 * 0.9**t for t in range(50)][50 - steps_that_decay :]
    assert p.item() == pytest.approx(2 * math.prod(1 - rate * 0.3 for rate in rates), rel=1e-12)


def test_decay_comes_before_the_step_and_the_gradient_is_not_decayed() -> None:
    """θ' = (1 - lr λ) θ - lr u; the other order differs by lr² λ u."""
    found = trajectory(lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.5, eps=0.0), [5.0], start=2.0)
    assert found == pytest.approx([2 * (1 - 0.05) - 0.1], rel=1e-14)


def test_sgds_decay_with_and_without_momentum() -> None:
    """Plain SGD's L2 is decoupled decay; with momentum it decays 1 / (1 - μ) times as fast."""
    plain = trajectory(lambda p: optim.SGD(p, lr=0.01, weight_decay=0.1), [0.0] * 2000, start=1.0)
    assert plain[-1] == pytest.approx(0.13519992539749, rel=1e-12)
    assert plain[-1] == pytest.approx((1 - 0.001) ** 2000, rel=1e-12)
    momentum = trajectory(lambda p: optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.9), [0.0] * 2000, start=1.0)
    assert momentum[-1] == pytest.approx(2.2e-10, rel=0.05)


# --- momentum on quadratics -------------------------------------------------------------------------------------------


def quadratic(curvatures: Sequence[float], steps: int, **kwargs: Any) -> list[float]:
    """The distance from the minimum of half the sum of curvature times square, step by step."""
    a = torch.tensor(curvatures, dtype=torch.float64)
    p = torch.nn.Parameter(torch.ones_like(a))
    optimizer, distances = optim.SGD([p], **kwargs), []
    for _ in range(steps):
        p.grad = a * p.detach()
        optimizer.step()
        distances.append(p.detach().norm().item())
    return distances


def gd(k: float) -> tuple[dict[str, Any], float]:
    return {"lr": 2 / (k + 1)}, (k - 1) / (k + 1)


def heavy_ball(k: float) -> tuple[dict[str, Any], float]:
    rate = (math.sqrt(k) - 1) / (math.sqrt(k) + 1)
    return {"lr": 4 / (math.sqrt(k) + 1) ** 2, "momentum": rate**2}, rate


def nesterov(k: float) -> tuple[dict[str, Any], float]:
    rate = (math.sqrt(k) - 1) / (math.sqrt(k) + 1)
    return {"lr": 1 / k, "momentum": rate, "nesterov": True}, 1 - 1 / math.sqrt(k)


def tuned_nesterov(k: float) -> tuple[dict[str, Any], float]:
    root = math.sqrt(3 * k + 1)
    return {"lr": 4 / (3 * k + 1), "momentum": (root - 2) / (root + 2), "nesterov": True}, 1 - 2 / root


RATES = {
    gd: (0.81818, 0.98020),
    heavy_ball: (0.51949, 0.81818),
    nesterov: (0.68377, 0.90000),
    tuned_nesterov: (0.64079, 0.88472),
}


@pytest.mark.parametrize("method", RATES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("k", [10, 100])
def test_rates_on_quadratics_with_condition_number_k(method: Callable[[float], Any], k: int) -> None:
    """Curvatures from 1 to k: the distance falls by the spectral radius of the method, its best possible rate.

    At a double root a factor that grows like the number of steps comes on top, hence one per cent.
    """
    kwargs, rate = method(k)
    assert rate == pytest.approx(RATES[method][0 if k == 10 else 1], abs=5e-6)
    first, last = (20, 40) if k == 10 and method is not gd else (200, 400)
    distances = quadratic([1.0, math.sqrt(k), float(k)], last, **kwargs)
    measured = (distances[-1] / distances[first - 1]) ** (1 / (last - first))
    assert measured == pytest.approx(rate, rel=0.01 if k == 100 else 0.04)


@pytest.mark.parametrize(
    ("kwargs", "limit"),
    [
        pytest.param({}, 2.0, id="gradient-descent"),
        pytest.param({"momentum": 0.9}, 3.8, id="heavy-ball"),
        pytest.param({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8, id="nesterov"),
        pytest.param({"momentum": 0.5}, 3.0, id="heavy-ball-0.5"),
    ],
)
def test_stability_limits(kwargs: dict[str, Any], limit: float) -> None:
    """lr times curvature below 2 (1 + μ), with Nesterov (2 + 2μ) / (1 + 2μ): half a per cent decides."""
    assert quadratic([1.0], 3000, lr=0.995 * limit, **kwargs)[-1] < 1e-2
    assert quadratic([1.0], 3000, lr=1.005 * limit, **kwargs)[-1] > 1e2


def test_momentum_after_a_drop_of_lr() -> None:
    """torch's form multiplies the buffer by the rate when it is used: -101.000; Sutskever's would give -109.090."""
    p = parameter(0.0)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9)
    for t in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 if t < 100 else 0.01
        p.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    assert p.item() == pytest.approx(-101.000, abs=5e-3)


# --- steps under a constant gradient ----------------------------------------------------------------------------------

STEPS: list[tuple[str, dict[str, Any], list[float]]] = [
    ("Adam", {}, [-1, -1, -1]),
    ("AdamW", {"weight_decay": 0}, [-1, -1, -1]),
    ("Adamax", {}, [-1, -1, -1]),
    ("NAdam", {}, [-1.056452, -0.783684, -0.732217]),
    ("RMSprop", {}, [-10, -7.088812, -5.802491]),
    ("Adagrad", {}, [-1, -1 / math.sqrt(2), -1 / math.sqrt(3)]),
    ("Adagrad", {"lr_decay": 1.0}, [-1, -1 / math.sqrt(2) / 2, -1 / math.sqrt(3) / 3]),
    ("Adadelta", {}, [-0.003162, -0.003244, -0.003301]),
    ("Rprop", {}, [-1, -1.2, -1.44]),
    ("SGD", {}, [-5, -5, -5]),
    ("SGD", {"momentum": 0.9}, [-5, -9.5, -13.55]),
    ("SGD", {"momentum": 0.9, "nesterov": True}, [-9.5, -13.55, -17.195]),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}, [-5, -7, -8.8]),
    ("ADOPT", {"clip_exp": None}, [0, -0.1, -0.19]),
    ("ADOPT", {}, [0, -0.1, -0.19]),
    ("Lion", {}, [-1, -1, -1]),
]


@pytest.mark.parametrize(("name", "kwargs", "expected"), STEPS, ids=[str(Case(n, k)) for n, k, _ in STEPS])
@pytest.mark.parametrize("sign", [1, -1])
def test_first_steps_under_a_constant_gradient(
    name: str, kwargs: dict[str, Any], expected: list[float], sign: int
) -> None:
    """lr 1, gradient 5."""
    found = moves(lambda p: getattr(optim, name)(p, lr=1.0, **kwargs), [5.0 * sign] * 3)
    assert found == pytest.approx([sign * e for e in expected], abs=6e-7)


def test_adagrads_steps_add_up() -> None:
    """The sum of 1/√t to 100."""
    found = trajectory(lambda p: optim.Adagrad(p, lr=1.0), [5.0] * 100)
    assert found[-1] == pytest.approx(-18.5896, abs=5e-5)
    assert found[-1] == pytest.approx(-sum(1 / math.sqrt(t) for t in range(1, 101)), rel=1e-9)


def test_rmsprops_first_step() -> None:
    """1 / √(1 - α), which Adam's bias correction does away with."""
    [found] = moves(lambda p: optim.RMSprop(p, lr=1.0, alpha=0.96, eps=0.0), [5.0])
    assert found == pytest.approx(-1 / math.sqrt(0.04), rel=1e-14)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("Adam", {}), ("AdamW", {"weight_decay": 0}), ("RMSprop", {"alpha": 0.0}), ("Adagrad", {})]
)
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_eps_stands_outside_the_root(name: str, kwargs: dict[str, Any], eps: float) -> None:
    """A gradient as small as eps makes half a step; with √(v + eps) it would make a ten-thousandth for 1e-8."""
    [found] = moves(lambda p: getattr(optim, name)(p, lr=1.0, eps=eps, **kwargs), [eps])
    assert found == pytest.approx(-0.5, rel=1e-12)


def test_eps_of_adadelta_stands_inside_its_roots_and_that_of_adopt_is_a_bound() -> None:
    [found] = moves(lambda p: optim.Adadelta(p, lr=1.0, rho=0.0, eps=0.25), [0.5])
    assert found == pytest.approx(-math.sqrt(0.25) / math.sqrt(0.25 + 0.25) * 0.5, rel=1e-14)
    found = moves(lambda p: optim.ADOPT(p, lr=1.0, betas=(0.0, 0.9), eps=2.0, clip_exp=None), [1.0, 1.0])
    assert found == pytest.approx([0, -0.5], rel=1e-14)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_single_gradient_after_many_zeros_is_bounded(name: str) -> None:
    """By (1 - β₁) / √(1 - β₂) = 3.1623 lr, however large it is."""
    p = parameter(0.0)
    optimizer = getattr(optim, name)([p], lr=1.0, weight_decay=0.0)
    p.grad = torch.zeros(1, dtype=torch.float64)
    optimizer.step()
    optimizer.state[p]["step"].fill_(1e6)  # as after a million zeros
    p.grad = torch.full((1,), 1e6, dtype=torch.float64)
    optimizer.step()
    assert p.item() == pytest.approx(-0.1 / math.sqrt(0.001), rel=1e-9)
    assert p.item() == pytest.approx(-3.1623, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lion_moves_every_element_by_lr(dtype: torch.dtype) -> None:
    """Exactly: lr is a power of two and the parameters are multiples of it; elements with gradient 0 stay."""
    p = torch.nn.Parameter(torch.zeros(50, dtype=dtype))
    optimizer = optim.Lion([p], lr=2.0**-7)
    for step in range(10):
        before = p.detach().clone()
        p.grad = randn(50, dtype=dtype, seed=step)
        p.grad[:5] = 0
        optimizer.step()
        moved = p.detach() - before
        assert set(moved[5:].abs().tolist()) == {2.0**-7}
        assert not moved[:5].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_step_below_half_an_ulp_does_not_move(dtype: torch.dtype) -> None:
    """1 + 2⁻⁸ is 1 in bfloat16 (a tie, to even); the smallest step up that moves is just above half an ulp."""
    half = torch.finfo(dtype).eps / 2
    for step, moves_it in ((half, False), (half * 1.01, True)):
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        p.grad = torch.full_like(p, -1.0)
        optim.SGD([p], lr=step).step()
        assert (p.detach() == 1 + (2 * half if moves_it else 0)).all()
    for step, moves_it in ((half / 2, False), (half / 2 * 1.01, True)):  # the ulp below 1 is half as large
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        p.grad = torch.full_like(p, 1.0)
        optim.SGD([p], lr=step).step()
        assert (p.detach() == 1 - (half if moves_it else 0)).all()


def test_a_thousand_small_steps_are_lost_in_bfloat16() -> None:
    """A thousand steps of 1e-3 from 1, each below half an ulp: 1, not 2."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = optim.SGD([p], lr=1e-3)
    for _ in range(1000):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    assert p.item() == 1.0


@each([c for c in RICH if "lr" in c.kwargs])
def test_no_rate_no_movement(case: Case) -> None:
    """lr 0 moves nothing, whatever else is set. Rprop's steps start at lr but are at least the smallest one: 0 here."""
    p = torch.nn.Parameter(randn(3, 4))
    start = p.detach().clone()
    settings = {"step_sizes": (0.0, 50.0)} if case.name == "Rprop" else {}
    optimizer = case.ours([p], **{"lr": 0.0, **settings})
    for step in range(7):
        p.grad = randn(3, 4, seed=step)
        optimizer.step()
    assert torch.equal(p.detach(), start)


def test_rprop_keeps_its_step_sizes_in_their_bounds() -> None:
    """Alternating gradients halve the step down to the smallest, equal ones grow it to the largest; after a change of
    sign one step is left out."""
    grow = moves(lambda p: optim.Rprop(p, lr=1.0, step_sizes=(0.3, 1.5)), [1.0] * 5)
    assert grow == pytest.approx([-1, -1.2, -1.44, -1.5, -1.5], rel=1e-12)
    turn = moves(lambda p: optim.Rprop(p, lr=1.0, step_sizes=(0.3, 1.5)), [1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    assert turn == pytest.approx([-1, 0, 0.5, 0, -0.3, 0, 0.3], abs=1e-12)


def test_asgds_average_is_the_mean_of_the_iterates_after_t0() -> None:
    """As in torch, step t uses the weight 1 / (t - 1 - t0), so the first iterate that counts is that of step t0 + 2."""
    p = parameter(0.0)
    optimizer = optim.ASGD([p], lr=0.1, lambd=0.0, alpha=0.0, t0=3)
    points = []
    for step in range(10):
        p.grad = randn(1, seed=step)
        optimizer.step()
        points.append(p.item())
        expected = points[-1] if step < 4 else np.mean(points[4:])
        assert optimizer.state[p]["ax"].item() == pytest.approx(expected, rel=1e-6)


def test_adadelta_has_the_units_of_the_parameter() -> None:
    """With eps small beside both averages, gradients 1000 times larger make the same steps."""
    grads = [randn(1, seed=t).item() for t in range(20)]
    small = moves(lambda p: optim.Adadelta(p, eps=1e-20), grads)
    large = moves(lambda p: optim.Adadelta(p, eps=1e-20), [1024 * g for g in grads])
    assert large == pytest.approx(small, rel=1e-9)
