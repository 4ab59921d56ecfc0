"""NAdamW, AdaBelief, Adan, AdEMAMix, LaProp and Signum: against NumPy versions of their papers, and numbers."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from cases import Case, assert_equal, each, randn
from schuss import optim

Array = np.ndarray[Any, Any]
Grads = Sequence[Array]
Lrs = Sequence[float]


# --- the papers' algorithms, for one tensor; each step has its own learning rate ------------------------------------


def nadamw(
    x: Array, grads: Grads, lrs: Lrs, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Array:  # fmt: skip
    """Choi et al. 2019, table 1, with decoupled decay: momentum is applied twice for the step, once for the state."""
    m, v = np.zeros_like(x), np.zeros_like(x)

    def average(of: Array, kept: Array, beta: float) -> Array:
        return (1 - beta) * of + beta * kept

    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m, v = average(g, m, betas[0]), average(g**2, v, betas[1])
        m_hat = average(g, m, betas[0]) / (1 - betas[0] ** t)
        v_hat = v / (1 - betas[1] ** t)
        x = x - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * x)
    return x


def adabelief(
    x: Array, grads: Grads, lrs: Lrs, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-16,
    weight_decay: float = 0.0, decoupled: bool = True, amsgrad: bool = False, rectify: bool = False,
) -> Array:  # fmt: skip
    """Zhuang et al. 2020, algorithm 2, with options of the authors' code; rectified as in Liu et al. 2020."""
    beta1, beta2 = betas
    m, s, largest = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        if decoupled:
            x = x * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * x
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * (g - m) ** 2 + eps
        largest = np.maximum(largest, s)
        denominator = largest if amsgrad else s
        m_hat = m / (1 - beta1**t)
        if not rectify:
            x = x - lr * m_hat / (np.sqrt(denominator / (1 - beta2**t)) + eps)
            continue
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * t * beta2**t / (1 - beta2**t)
        if length > 5:
            top, bottom = (length - 4) * (length - 2) * limit, (limit - 4) * (limit - 2) * length
            x = x - lr * math.sqrt(top / bottom * (1 - beta2**t)) * m_hat / (np.sqrt(denominator) + eps)
        else:
            x = x - lr * m_hat
    return x


def adan(
    x: Array, grads: Grads, lrs: Lrs, *, betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-8,
    weight_decay: float = 0.0, no_prox: bool = False,
) -> Array:  # fmt: skip
    """Xie et al. 2022, algorithm 1, in whose letters each β is one minus ours; corrected for the start as in the
    authors' code."""
    b1, b2, b3 = (1 - beta for beta in betas)
    m, v, n, before = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), grads[0]
    for k, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = (1 - b1) * m + b1 * g
        v = (1 - b2) * v + b2 * (g - before)
        n = (1 - b3) * n + b3 * (g + (1 - b2) * (g - before)) ** 2
        eta = lr / (np.sqrt(n / (1 - (1 - b3) ** k)) + eps)
        step = eta * (m / (1 - (1 - b1) ** k) + (1 - b2) * v / (1 - (1 - b2) ** k))
        x = (1 - lr * weight_decay) * x - step if no_prox else (x - step) / (1 + lr * weight_decay)
        before = g
    return x


def ademamix(
    x: Array, grads: Grads, lrs: Lrs, *, betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), alpha: float = 2.0,
    beta3_warmup: float | None = None, alpha_warmup: float | None = None, eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Array:  # fmt: skip
    """Pagliardini et al. 2024, algorithm 1, with the schedules of its equations."""
    m1, m2, nu = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        a = alpha if alpha_warmup is None else min(t * alpha / alpha_warmup, alpha)
        b3 = betas[2]
        if beta3_warmup is not None and t < beta3_warmup:
            start, end, done = math.log(betas[0]), math.log(betas[2]), t / beta3_warmup
            b3 = min(math.exp(start * end / ((1 - done) * end + done * start)), betas[2])
        m1 = betas[0] * m1 + (1 - betas[0]) * g
        m2 = b3 * m2 + (1 - b3) * g
        nu = betas[1] * nu + (1 - betas[1]) * g * g
        m1_hat, nu_hat = m1 / (1 - betas[0] ** t), nu / (1 - betas[1] ** t)
        x = x - lr * ((m1_hat + a * m2) / (np.sqrt(nu_hat) + eps) + weight_decay * x)
    return x


def simplified_ademamix(
    x: Array, grads: Grads, lrs: Lrs, *, betas: tuple[float, float], alpha: float, eps: float, weight_decay: float
) -> Array:
    """Morwani et al. 2025, algorithm 1, with a constant β₁: one sum of gradients, and the gradient itself."""
    m, nu = np.zeros_like(x), np.zeros_like(x)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = betas[0] * m + g
        nu = betas[1] * nu + (1 - betas[1]) * g * g
        x = x - lr * ((m + alpha * g) / (np.sqrt(nu / (1 - betas[1] ** t)) + eps) + weight_decay * x)
    return x


def laprop(
    x: Array, grads: Grads, lrs: Lrs, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15,
    weight_decay: float = 0.0,
) -> Array:  # fmt: skip
    """Ziyin, Wang, Ueda 2020, algorithm 1 with μ, ν = betas: first normalised, then averaged."""
    m, n = np.zeros_like(x), np.zeros_like(x)
    mu, nu = betas
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        n = nu * n + (1 - nu) * g**2
        m = mu * m + (1 - mu) * g / (np.sqrt(n / (1 - nu**t)) + eps)
        x = x * (1 - lr * weight_decay) - lr * m / (1 - mu**t)
    return x


def signum(x: Array, grads: Grads, lrs: Lrs, *, momentum: float = 0.9, weight_decay: float = 0.0) -> Array:
    """Bernstein et al. 2018, algorithm 2, with decoupled decay."""
    m = np.zeros_like(x)
    for g, lr in zip(grads, lrs, strict=True):
        m = momentum * m + (1 - momentum) * g
        x = x - lr * (np.sign(m) + weight_decay * x)
    return x


PAPERS: list[tuple[Callable[..., Array], Case]] = [
    (nadamw, Case("NAdamW", {})),
    (nadamw, Case("NAdamW", dict(betas=(0.5, 0.8), eps=0.1, weight_decay=0.0))),
    (nadamw, Case("NAdamW", dict(betas=(0.0, 0.9), weight_decay=0.3))),
    (adabelief, Case("AdaBelief", {})),
    (adabelief, Case("AdaBelief", dict(betas=(0.5, 0.8), eps=0.01))),
    (adabelief, Case("AdaBelief", dict(weight_decay=0.3))),
    (adabelief, Case("AdaBelief", dict(weight_decay=0.3, decoupled_weight_decay=False))),
    (adabelief, Case("AdaBelief", dict(amsgrad=True, betas=(0.9, 0.5)))),
    (adabelief, Case("AdaBelief", dict(rectify=True))),
    (adabelief, Case("AdaBelief", dict(rectify=True, amsgrad=True, betas=(0.8, 0.9), eps=1e-3))),
    (adan, Case("Adan", {})),
    (adan, Case("Adan", dict(betas=(0.5, 0.7, 0.6), eps=0.1))),
    (adan, Case("Adan", dict(weight_decay=0.3))),
    (adan, Case("Adan", dict(weight_decay=0.3, no_prox=True))),
    (ademamix, Case("AdEMAMix", {})),
    (ademamix, Case("AdEMAMix", dict(betas=(0.5, 0.8, 0.7), alpha=5.0, eps=0.1, weight_decay=0.3))),
    (ademamix, Case("AdEMAMix", dict(alpha=8.0, beta3_warmup=100, alpha_warmup=100, weight_decay=0.1))),
    (ademamix, Case("AdEMAMix", dict(alpha=8.0, betas=(0.9, 0.999, 0.99), beta3_warmup=12, alpha_warmup=7.5))),
    (ademamix, Case("AdEMAMix", dict(betas=(0.9, 0.99, 0.8), beta3_warmup=20))),
    (laprop, Case("LaProp", {})),
    (laprop, Case("LaProp", dict(betas=(0.5, 0.8), eps=0.1))),
    (laprop, Case("LaProp", dict(betas=(0.9, 0.0), weight_decay=0.3))),
    (signum, Case("Signum", {})),
    (signum, Case("Signum", dict(momentum=0.0))),
    (signum, Case("Signum", dict(momentum=0.5, weight_decay=0.3))),
]


@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
@pytest.mark.parametrize(("paper", "case"), PAPERS, ids=[str(case) for _, case in PAPERS])
def test_what_the_paper_says(paper: Callable[..., Array], case: Case, backend: str) -> None:
    """25 steps with a large gradient, a zero one, and a rate that falls in the middle."""
    start, steps = randn(4, 5), 25
    sizes = {3: 5.0, 8: 0.0}
    grads = [randn(4, 5, seed=1 + t) * sizes.get(t, 1.0) for t in range(steps)]
    lrs = [0.05 if t < 12 else 0.01 for t in range(steps)]
    p = torch.nn.Parameter(start.clone())
    optimizer = case.ours([p], backend=backend)
    for g, lr in zip(grads, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = g.clone()
        optimizer.step()
    settings = {k.replace("decoupled_weight_decay", "decoupled"): v for k, v in case.kwargs.items()}
    expected = paper(start.numpy(), [g.numpy() for g in grads], lrs, **settings)
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


# --- identities -------------------------------------------------------------------------------------------------------


def after(case: Case, steps: int = 20, lr: Callable[[int], float] | None = None) -> torch.Tensor:
    """Where random gradients, the same ones for all, take a parameter."""
    p = torch.nn.Parameter(randn(60))
    optimizer = case.ours([p])
    for t in range(steps):
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr(t + 1)
        p.grad = randn(60, seed=10 + t)
        optimizer.step()
    return p.detach()


SAME = [
    (Case("AdEMAMix", dict(alpha=0.0, weight_decay=0.1)), Case("AdamW", dict(weight_decay=0.1))),
    (
        Case("AdEMAMix", dict(alpha=0.0, betas=(0.8, 0.9, 0.9999), beta3_warmup=5)),
        Case("AdamW", dict(betas=(0.8, 0.9), weight_decay=0.0)),
    ),
    (Case("AdEMAMix", dict(alpha_warmup=0, beta3_warmup=0)), Case("AdEMAMix", {})),
    (Case("LaProp", dict(betas=(0.0, 0.9), eps=1e-8)), Case("Adam", dict(lr=4e-4, betas=(0.0, 0.9)))),
    (Case("NAdamW", dict(betas=(0.0, 0.9))), Case("AdamW", dict(betas=(0.0, 0.9)))),
    (Case("Adan", dict(betas=(0.9, 0.0, 0.999))), Case("Adam", {})),
    (Case("Signum", dict(momentum=0.7, weight_decay=0.1)), Case("Lion", dict(betas=(0.7, 0.7), weight_decay=0.1))),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_one_rule_is_another_to_the_bit(one: Case, other: Case) -> None:
    assert_equal(after(one), after(other))


def test_laprop_without_momentum_is_rmsprop_with_a_correction_of_the_start() -> None:
    """Which is a factor √(1 - β₂ᵗ) of RMSprop's rate."""
    ours = after(Case("LaProp", dict(lr=0.01, betas=(0.0, 0.9), eps=0.0)))
    theirs = after(Case("RMSprop", dict(alpha=0.9, eps=0.0)), lr=lambda t: 0.01 * math.sqrt(1 - 0.9**t))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.05, 3.0, 100.0])
def test_simplified_ademamix_is_ademamix_without_a_fast_average(alpha: float) -> None:
    start, grads, lrs = randn(60), [randn(60, seed=10 + t) for t in range(20)], [0.01] * 20
    settings = dict(betas=(0.99, 0.95), alpha=alpha, eps=1e-3, weight_decay=0.1)
    expected = simplified_ademamix(start.numpy(), [g.numpy() for g in grads], lrs, **settings)  # type: ignore[arg-type]
    found = after(
        Case(
            "AdEMAMix",
            dict(
                lr=0.01 * alpha, betas=(0.0, 0.95, 0.99), alpha=1 / (alpha * (1 - 0.99)), eps=1e-3,
                weight_decay=0.1 / alpha,
            ),
        )
    )  # fmt: skip
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-12)


# --- numbers that can be worked out ---------------------------------------------------------------------------------


def moves(case: Case, grads: Sequence[float], start: float = 0.0) -> list[float]:
    """The steps of one number under given gradients."""
    p = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer, places = case.ours([p]), [start]
    for g in grads:
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        places.append(p.item())
    return [b - a for a, b in pairwise(places)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("NAdamW", dict(weight_decay=0.0)), [-(1 - 0.9 ** (t + 1)) / (1 - 0.9**t) for t in (1, 2, 3)]),
        (Case("AdaBelief", {}), [-1.1111111, -1.1680047, -1.2255840]),
        (Case("AdaBelief", dict(rectify=True)), [-5.0, -5.0, -5.0]),
        (Case("Adan", {}), [-1.0, -1.0, -1.0]),
        (Case("AdEMAMix", {}), [-1 - 2 * (1 - 0.9999**t) for t in (1, 2, 3)]),
        (Case("AdEMAMix", dict(betas=(0.9, 0.999, 0.0), alpha=8.0, alpha_warmup=2)), [-5.0, -9.0, -9.0]),
        (Case("LaProp", {}), [-1.0, -1.0, -1.0]),
        (Case("Signum", {}), [-1.0, -1.0, -1.0]),
    ],
    ids=str,
)
def test_first_steps_under_a_constant_gradient(case: Case, expected: list[float], sign: int) -> None:
    """lr 1, gradient 5."""
    found = moves(Case(case.name, {"lr": 1.0, **case.kwargs}), [5.0 * sign] * 3)
    assert found == pytest.approx([sign * e for e in expected], abs=1e-7)


def test_adabeliefs_steps_grow_under_a_constant_gradient() -> None:
    """g - m is β₁ᵗ g, so s is a geometric sum: (1 - β₂) g² β₁² (β₂ᵗ - β₁²ᵗ) / (β₂ - β₁²). After 1000 steps they are
    20 times lr."""
    beta1, beta2 = 0.9, 0.999
    found = moves(Case("AdaBelief", dict(lr=1.0, eps=0.0)), [5.0] * 1000)
    for t in (1, 2, 10, 100, 1000):
        s = (1 - beta2) * beta1**2 * (beta2**t - beta1 ** (2 * t)) / (beta2 - beta1**2)
        assert found[t - 1] == pytest.approx(-1 / math.sqrt(s / (1 - beta2**t)), rel=1e-9)
    assert found[999] == pytest.approx(-20.03, abs=0.005)


def test_adabeliefs_eps_gathers() -> None:
    """Without gradients s is ε (1 - β₂ᵗ) / (1 - β₂). With β₁ = 0 nothing ever surprises: SGD with the rate
    lr / (√(ε / (1 - β₂)) + ε), which is 3162 lr for ε = 1e-10."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optim.AdaBelief([p], eps=1e-4, betas=(0.9, 0.99))
    for t in range(1, 51):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert optimizer.state[p]["exp_avg_var"].item() == pytest.approx(1e-4 * (1 - 0.99**t) / 0.01, rel=1e-12)
    found = moves(Case("AdaBelief", dict(lr=1e-4, betas=(0.0, 0.999), eps=1e-10)), [2.0, -3.0, 0.5])
    rate = 1e-4 / (math.sqrt(1e-10 / 0.001) + 1e-10)
    assert rate == pytest.approx(0.3162, abs=1e-4)
    assert found == pytest.approx([-rate * g for g in (2.0, -3.0, 0.5)], rel=1e-9)


def test_adans_second_step() -> None:
    """Gradients 1 and 3: m̂ = 0.0796 / 0.0396, v̂ = 0.16 / 0.1536, n̂ = (0.0099 + 0.01 · 4.84²) / 0.0199."""
    m, v, n = 0.0796 / 0.0396, 0.16 / 0.1536, (0.0099 + 0.01 * 4.84**2) / 0.0199
    found = moves(Case("Adan", dict(lr=1.0, eps=0.0)), [1.0, 3.0])
    assert found == pytest.approx([-1.0, -(m + 0.92 * v) / math.sqrt(n)], rel=1e-12)
    assert found[1] == pytest.approx(-0.847463, abs=1e-6)


def test_adans_two_decays() -> None:
    """Without gradients p is divided by 1 + lr λ, or with no_prox multiplied by 1 - lr λ."""
    kwargs = dict(lr=0.1, weight_decay=0.3)
    assert sum(moves(Case("Adan", kwargs), [0.0] * 50, 2.0)) == pytest.approx(2 / 1.03**50 - 2, rel=1e-12)
    assert sum(moves(Case("Adan", kwargs | {"no_prox": True}), [0.0] * 50, 2.0)) == pytest.approx(
        2 * 0.97**50 - 2, rel=1e-12
    )


def test_adan_remembers_the_last_gradient_that_there_was() -> None:
    """A step without a gradient neither moves the parameter nor counts as a gradient of zero."""
    values = []
    for steps in ([1.0, None, 3.0, 2.0], [1.0, 3.0, None, None, 2.0]):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.Adan([p], lr=1.0)
        for g in steps:
            p.grad = None if g is None else torch.tensor([g], dtype=torch.float64)
            optimizer.step()
        values.append(p.item())
    assert values[0] == values[1] == pytest.approx(sum(moves(Case("Adan", {"lr": 1.0}), [1.0, 3.0, 2.0])), rel=1e-14)


@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.0])
def test_ademamixs_half_life_grows_linearly(beta1: float) -> None:
    """After one gradient the slow average falls by β₃(t) a step, which shows it."""
    beta3, length = 0.999, 16
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optim.AdEMAMix([p], betas=(beta1, 0.999, beta3), beta3_warmup=length)
    kept = []
    for t in range(1, 21):
        p.grad = torch.full_like(p, float(t == 1))
        optimizer.step()
        kept.append(optimizer.state[p]["exp_avg_slow"].item())
    rates = [1 - kept[0], *(b / a for a, b in pairwise(kept))]
    first, last = (0.0 if b == 0 else math.log(0.5) / math.log(b) for b in (beta1, beta3))
    for t, rate in enumerate(rates, start=1):
        share = min(t / length, 1.0)
        assert math.log(0.5) / math.log(rate) == pytest.approx((1 - share) * first + share * last, rel=1e-9)


def test_ademamix_continues_a_checkpoint_of_the_authors() -> None:
    """Theirs has the same names, and counts steps in an integer."""
    grads = [randn(4, 5, seed=1 + t) for t in range(6)]
    settings = dict(lr=0.01, betas=(0.9, 0.99, 0.999), alpha=8.0, beta3_warmup=5, alpha_warmup=5, weight_decay=0.1)
    p, q = (torch.nn.Parameter(randn(4, 5)) for _ in range(2))
    whole, half = (optim.AdEMAMix([x], **settings) for x in (p, q))  # type: ignore[arg-type]
    for g in grads:
        p.grad = g.clone()
        whole.step()
    for g in grads[:3]:
        q.grad = g.clone()
        half.step()
    kept = half.state[q]
    theirs = {
        "state": {
            0: {"step": 3} | {name: kept[name].clone() for name in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")}
        },
        "param_groups": [settings | {"eps": 1e-8, "params": [0]}],
    }
    r = torch.nn.Parameter(q.detach().clone())
    loaded = optim.AdEMAMix([r])
    loaded.load_state_dict(theirs)
    for g in grads[3:]:
        r.grad = g.clone()
        loaded.step()
    assert_equal(r.detach(), p.detach())


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.8), (0.9, 0.8, 0.7, 0.6), 0.9])
def test_a_tuple_of_another_length_in_a_group_is_an_error_that_changes_nothing(betas: Any) -> None:
    params = [torch.nn.Parameter(randn(3)) for _ in range(2)]
    optimizer = optim.Adan([{"params": [p]} for p in params])
    for p in params:
        p.grad = randn(3, seed=2)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1]["betas"] = betas
    with pytest.raises(ValueError, match=r"Adan: betas must be three numbers, got "):
        optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert_equal(p.detach(), b)
    optimizer.param_groups[1]["betas"] = [0.9, 0.8, 0.7]
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 2


def test_ademamixs_schedules_on_a_device_are_those_of_the_host() -> None:
    """Where the step is a tensor, scalars are computed from tensors."""
    hyper = dict(lr=0.01, alpha=8.0, alpha_warmup=30.0, beta3_warmup=20.0)
    steps = [1.0, 7.0, 19.0, 20.0, 40.0]
    with np.errstate(all="ignore"):
        for warm in (hyper, hyper | dict(alpha_warmup=math.nan, beta3_warmup=math.nan)):
            for beta1 in (0.9, 0.0):
                betas = (beta1, 0.999, 0.9999)
                host = optim.AdEMAMix.scalars(np.array(steps), betas=tuple(map(np.array, betas)), **warm)
                there = optim.AdEMAMix.scalars(
                    torch.tensor(steps, dtype=torch.float64),
                    betas=tuple(torch.tensor(beta, dtype=torch.float64) for beta in betas),
                    **{k: torch.tensor(v, dtype=torch.float64) for k, v in warm.items()},
                )
                for name in host:
                    np.testing.assert_allclose(np.asarray(there[name]), host[name], rtol=1e-11, err_msg=name)


def test_laprop_stays_bounded_where_adam_grows() -> None:
    """After a single gradient and with β₁ > √β₂, Adam's steps tend to grow by β₁ / √β₂, 1.27, a step; LaProp's fall by
    β₁ (1 - β₁ᵗ) / (1 - β₁ᵗ⁺¹)."""
    grads = [1.0] + [0.0] * 30
    adam = moves(Case("Adam", dict(lr=1.0, betas=(0.9, 0.5), eps=0.0)), grads)
    assert adam[30] / adam[29] == pytest.approx(0.9 / math.sqrt(0.5) * (1 - 0.9**30) / (1 - 0.9**31), rel=1e-6)
    assert adam[30] < -70
    found = moves(Case("LaProp", dict(lr=1.0, betas=(0.9, 0.5), eps=1e-15)), grads)
    assert [b / a for a, b in pairwise(found)] == pytest.approx(
        [0.9 * (1 - 0.9**t) / (1 - 0.9 ** (t + 1)) for t in range(1, 31)], rel=1e-12
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_signum_moves_every_element_by_lr(dtype: torch.dtype, momentum: float) -> None:
    """Exactly: lr is a power of two and the parameters are multiples of it; elements with gradient 0 stay."""
    p = torch.nn.Parameter(torch.zeros(50, dtype=dtype))
    optimizer = optim.Signum([p], lr=2.0**-7, momentum=momentum)
    for step in range(10):
        before = p.detach().clone()
        p.grad = randn(50, dtype=dtype, seed=step)
        p.grad[:5] = 0
        optimizer.step()
        moved = p.detach() - before
        assert set(moved[5:].abs().tolist()) == {2.0**-7}
        assert not moved[:5].any()
        if not momentum:
            assert torch.equal(moved, -(2.0**-7) * p.grad.sign())
            assert not optimizer.state[p]


DECOUPLED = [Case(n, {}) for n in ("NAdamW", "AdaBelief", "AdEMAMix", "LaProp", "Signum")]


@each(DECOUPLED)
def test_decoupled_decay_is_a_product(case: Case) -> None:
    """Without gradients p falls by 1 - lr λ a step, with a changing lr too."""
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = case.ours([p], lr=0.1, weight_decay=0.3)
    rates = [0.1 * 0.9**t for t in range(50)]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.item() == pytest.approx(2 * math.prod(1 - rate * 0.3 for rate in rates), rel=1e-12)


def test_nadamw_is_not_nadam_with_decoupled_decay() -> None:
    ours = moves(Case("NAdamW", dict(lr=1.0, weight_decay=0.0)), [5.0] * 100)
    other = moves(Case("NAdam", dict(lr=1.0, decoupled_weight_decay=True)), [5.0] * 100)
    assert ours[0] == pytest.approx(-1.9, abs=1e-7)
    assert other[0] == pytest.approx(-1.056452, abs=1e-6)
    assert ours[99] == pytest.approx(-1.0, abs=1e-5)


# --- states of fewer bits ---------------------------------------------------------------------------------------------

STORED: list[tuple[Case, dict[str, torch.dtype]]] = [
    (Case("NAdamW", {}), {"exp_avg_codes": torch.int8, "exp_avg_sq_codes": torch.uint8}),
    (
        Case("AdaBelief", dict(amsgrad=True)),
        {"exp_avg_codes": torch.int8, "exp_avg_var_codes": torch.uint8, "max_exp_avg_var_codes": torch.uint8},
    ),
    (
        Case("Adan", {}),
        {
            "exp_avg_codes": torch.int8, "exp_avg_diff_codes": torch.int8, "exp_avg_sq_codes": torch.uint8,
            "prev_grad_codes": torch.int8,
        },
    ),
    (
        Case("AdEMAMix", dict(state_dtype={"exp_avg_fast": "int8", "exp_avg_sq": "int8"})),
        {"exp_avg_fast_codes": torch.int8, "exp_avg_slow": torch.float32, "exp_avg_sq_codes": torch.uint8},
    ),
    (Case("LaProp", {}), {"exp_avg_codes": torch.int8, "exp_avg_sq_codes": torch.uint8}),
    (Case("Signum", {}), {"momentum_buffer_codes": torch.int8}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "stored"), STORED, ids=[case.name for case, _ in STORED])
def test_eight_bits(case: Case, stored: dict[str, torch.dtype]) -> None:
    """What has a sign has one in 8 bits, and 30 steps go where those with float32 state go: within a twentieth of the
    distance, or as for Signum, whose steps are all or nothing, a tenth."""
    ends = []
    for options in ({}, {"state_dtype": "int8"} | case.kwargs):
        settings = {k: v for k, v in case.kwargs.items() if k != "state_dtype"} | options
        p = torch.nn.Parameter(randn(8192, dtype=torch.float32))
        start = p.detach().clone()
        optimizer = Case(case.name, settings).ours([p], lr=0.01)
        for t in range(30):
            p.grad = randn(8192, dtype=torch.float32, seed=1 + t) + 0.3 * start
            optimizer.step()
        ends.append(p.detach() - start)
    kept = optimizer.state[p]
    assert {k: v.dtype for k, v in kept.items() if k in stored} == stored
    exact, rough = ends
    assert (rough - exact).norm() < (0.1 if case.name == "Signum" else 0.05) * exact.norm()


def test_ademamixs_slow_average_needs_its_bits() -> None:
    """Its changes, a ten-thousandth of the distance, are below half an ulp of bfloat16 once it is 1/32: there it stays,
    if it is kept so. By default it is not."""
    right = 1 - 0.9999**1000
    for options, expected in (({}, right), ({"state_dtype": "bfloat16"}, 1 / 32)):
        p = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
        optimizer = optim.AdEMAMix([p], lr=0.0, **options)  # type: ignore[arg-type]
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert optimizer.state[p]["exp_avg_slow"].tolist() == pytest.approx([expected] * 8, rel=1e-4)
    with pytest.raises(ValueError, match="AdEMAMix: state_dtype of 'exp_avg_slow' must be float32 or bfloat16"):
        optim.AdEMAMix([p], state_dtype="int8")
