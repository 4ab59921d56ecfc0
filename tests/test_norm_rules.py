"""LARS, LAMB, StableAdamW, MARS and Prodigy: against NumPy versions of their papers, and what follows from them."""

import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from cases import Case, assert_equal, each, parameters, randn
from schuss import optim

Array = np.ndarray[Any, Any]
Arrays = list[Array]
SHAPES = ((5, 7), (3,), (), (0, 4), (2, 3, 4))
BACKENDS = ("numba", "foreach", "reference")
inf = math.inf


# --- the papers' algorithms, for tensors `x`, whose gradients are None where they rest ------------------------------


def length(a: Array) -> float:
    return math.sqrt(math.fsum((a.reshape(-1) ** 2).tolist()))


class Lars:
    """You, Gitman, Ginsburg 2017, algorithm 1, with the learning rate outside of the momentum, as torch has it."""

    def __init__(
        self, *, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False,
        trust_coefficient: float = 1e-3, eps: float = 1e-8, adapt: bool = True,
    ) -> None:  # fmt: skip
        self.lr, self.m, self.decay, self.nesterov = lr, momentum, weight_decay, nesterov
        self.eta, self.eps, self.adapt = trust_coefficient, eps, adapt
        self.velocity: dict[int, Array] = {}

    def step(self, x: Arrays, grads: Sequence[Array | None]) -> None:
        for i, g in enumerate(grads):
            if g is None:
                continue
            local = 1.0
            if self.adapt and length(x[i]) > 0:
                local = self.eta * length(x[i]) / (length(g) + self.decay * length(x[i]) + self.eps)
            d = local * (g + self.decay * x[i])
            v = self.velocity[i] = self.m * self.velocity.get(i, 0.0 * x[i]) + d
            x[i] = x[i] - self.lr * (d + self.m * v if self.nesterov else v)


class Adam:
    """The moments of Kingma, Ba 2015, each tensor with its own count of steps."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.betas, self.t = betas, dict[int, int]()
        self.m, self.v = dict[int, Array](), dict[int, Array]()

    def moments(self, i: int, g: Array) -> tuple[Array, Array, int]:
        """m, v, t after a gradient."""
        self.t[i] = self.t.get(i, 0) + 1
        self.m[i] = self.betas[0] * self.m.get(i, 0.0 * g) + (1 - self.betas[0]) * g
        self.v[i] = self.betas[1] * self.v.get(i, 0.0 * g) + (1 - self.betas[1]) * g * g
        return self.m[i], self.v[i], self.t[i]

    def corrected(self, i: int, g: Array) -> tuple[Array, Array]:
        m, v, t = self.moments(i, g)
        return m / (1 - self.betas[0] ** t), v / (1 - self.betas[1] ** t)


class Lamb(Adam):
    """You et al. 2020, algorithm 2."""

    def __init__(
        self, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 1e-2, bias_correction: bool = True, phi: tuple[float, float] = (0.0, inf),
        adapt: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(betas)
        self.lr, self.eps, self.decay = lr, eps, weight_decay
        self.corrects, self.phi, self.adapt = bias_correction, phi, adapt

    def step(self, x: Arrays, grads: Sequence[Array | None]) -> None:
        for i, g in enumerate(grads):
            if g is None:
                continue
            m, v = self.corrected(i, g) if self.corrects else self.moments(i, g)[:2]
            r = m / (np.sqrt(v) + self.eps) + self.decay * x[i]
            size = min(max(length(x[i]), self.phi[0]), self.phi[1])
            trust = size / length(r) if self.adapt and size > 0 and length(r) > 0 else 1.0
            x[i] = x[i] - self.lr * trust * r


class StableAdamW:
    """Wortsman et al. 2023, algorithm 2: the moments are corrected by their rates, the step by its mean square."""

    def __init__(
        self, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:  # fmt: skip
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.t, self.v, self.u = dict[int, int](), dict[int, Array](), dict[int, Array]()

    def step(self, x: Arrays, grads: Sequence[Array | None]) -> None:
        for i, g in enumerate(grads):
            if g is None:
                continue
            t = self.t[i] = self.t.get(i, 0) + 1
            b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in self.betas)
            v = self.v[i] = b1 * self.v.get(i, 0.0 * g) + (1 - b1) * g
            u = self.u[i] = b2 * self.u.get(i, 0.0 * g) + (1 - b2) * g * g
            squares = (g * g / np.maximum(u, self.eps**2)).reshape(-1).tolist()
            rms = math.sqrt(math.fsum(squares) / max(len(squares), 1))
            eta = self.lr / max(1.0, rms)
            x[i] = x[i] - eta * self.decay * x[i] - eta * v / (np.sqrt(u) + self.eps)


class Mars(Adam):
    """Yuan et al. 2024, algorithms 1 and 2 with x_1 = x_0, and the gradient before for the one at the point before."""

    def __init__(
        self, *, lr: float = 3e-3, betas: tuple[float, float] = (0.95, 0.99), gamma: float = 0.025, clip: float = 1.0,
        eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(betas)
        self.lr, self.gamma, self.clip, self.eps, self.decay = lr, gamma, clip, eps, weight_decay
        self.amsgrad, self.largest, self.before = amsgrad, dict[int, Array](), dict[int, Array]()

    def step(self, x: Arrays, grads: Sequence[Array | None]) -> None:
        for i, g in enumerate(grads):
            if g is None:
                continue
            c = g + self.gamma * self.betas[0] / (1 - self.betas[0]) * (g - self.before.get(i, g))
            self.before[i] = g
            if length(c) > self.clip:
                c = c / length(c) * self.clip
            m, v, t = self.moments(i, c)
            if self.amsgrad:
                v = self.largest[i] = np.maximum(self.largest.get(i, v), v)
            root = np.sqrt(v / (1 - self.betas[1] ** t))
            x[i] = x[i] - self.lr * (self.decay * x[i] + m / (1 - self.betas[0] ** t) / (root + self.eps))


class ProdigyPaper:
    """Mishchenko, Defazio 2023, algorithm 4, with the options of the authors' code.

    The factor 1 - β₃ that r and s share there is left out, and d₀ divides both. A tensor at rest keeps its s, and
    stays in the norm.
    """

    def __init__(
        self, *, lr: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), beta3: float | None = None,
        eps: float = 1e-8, weight_decay: float = 0.0, decouple: bool = True, use_bias_correction: bool = False,
        safeguard_warmup: bool = False, d0: float = 1e-6, d_coef: float = 1.0, growth_rate: float = inf,
    ) -> None:  # fmt: skip
        self.lr, self.betas, self.eps, self.decay, self.decouple = lr, betas, eps, weight_decay, decouple
        self.beta3 = math.sqrt(betas[1]) if beta3 is None else beta3
        self.corrects, self.safeguard, self.coef, self.growth = (
            use_bias_correction, safeguard_warmup, d_coef, growth_rate,
        )  # fmt: skip
        self.d0 = self.d = self.d_max = d0
        self.r, self.t, self.start = 0.0, dict[int, int](), dict[int, Array]()
        self.m, self.v, self.s = dict[int, Array](), dict[int, Array](), dict[int, Array]()

    def step(self, x: Arrays, grads: Sequence[Array | None]) -> None:
        d, products = self.d, []
        for i, g in enumerate(grads):
            if g is None:
                continue
            t = self.t[i] = self.t.get(i, 0) + 1
            zero = 0.0 * x[i]
            start = self.start.setdefault(i, x[i])
            gamma = self.lr
            if self.corrects:
                gamma *= math.sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t)
            if not self.decouple:
                g = g + self.decay * x[i]
            products += (d * d / self.d0 * gamma * g * (start - x[i])).reshape(-1).tolist()
            self.m[i] = self.betas[0] * self.m.get(i, zero) + (1 - self.betas[0]) * d * g
            self.v[i] = self.betas[1] * self.v.get(i, zero) + (1 - self.betas[1]) * d * d * g * g
            own = 1.0 if self.safeguard else gamma
            self.s[i] = self.beta3 * self.s.get(i, zero) + d * d / self.d0 * own * g
            step = gamma * d * self.m[i] / (np.sqrt(self.v[i]) + d * self.eps)
            x[i] = x[i] - step - (self.lr * d * self.decay * x[i] if self.decouple else 0.0)
        self.r = self.beta3 * self.r + math.fsum(products)
        norm = math.fsum(value for s in self.s.values() for value in np.abs(s).reshape(-1).tolist())
        found = self.coef * self.r / norm if norm else 0.0
        if d == self.d0:
            d = max(d, found)
        self.d_max = max(self.d_max, found)
        self.d = min(self.d_max, d * self.growth)


PAPERS: list[tuple[Callable[..., Any], Case]] = [
    (Lars, Case("LARS", {})),
    (Lars, Case("LARS", dict(lr=5.0, trust_coefficient=0.02, weight_decay=0.3))),
    (Lars, Case("LARS", dict(lr=0.1, momentum=0.0, trust_coefficient=1.0, eps=0.5))),
    (Lars, Case("LARS", dict(lr=0.1, nesterov=True, trust_coefficient=0.3, weight_decay=0.1))),
    (Lars, Case("LARS", dict(lr=0.1, adapt=False, weight_decay=0.1))),
    (Lamb, Case("LAMB", {})),
    (Lamb, Case("LAMB", dict(lr=0.1, betas=(0.5, 0.8), eps=0.1, weight_decay=0.3))),
    (Lamb, Case("LAMB", dict(lr=0.1, weight_decay=0.0, bias_correction=False))),
    (Lamb, Case("LAMB", dict(lr=0.1, phi=(0.9, 3.0)))),
    (Lamb, Case("LAMB", dict(lr=0.1, adapt=False))),
    (StableAdamW, Case("StableAdamW", {})),
    (StableAdamW, Case("StableAdamW", dict(lr=0.1, betas=(0.5, 0.8), eps=0.3, weight_decay=0.5))),
    (Mars, Case("MARS", {})),
    (Mars, Case("MARS", dict(lr=0.1, betas=(0.5, 0.8), gamma=0.4, clip=3.0, weight_decay=0.3))),
    (Mars, Case("MARS", dict(lr=0.1, gamma=0.1, clip=inf, amsgrad=True))),
    (Mars, Case("MARS", dict(lr=0.1, gamma=0.0))),
    (ProdigyPaper, Case("Prodigy", {})),
    (ProdigyPaper, Case("Prodigy", dict(d0=0.1, weight_decay=0.2, eps=0.1))),
    (ProdigyPaper, Case("Prodigy", dict(d0=0.01, betas=(0.5, 0.8), beta3=0.7, weight_decay=0.2, decouple=False))),
    (ProdigyPaper, Case("Prodigy", dict(lr=0.5, d0=0.01, d_coef=3.0, growth_rate=1.2))),
    (ProdigyPaper, Case("Prodigy", dict(lr=0.7, d0=0.01, d_coef=9.0, use_bias_correction=True, safeguard_warmup=True))),
]


def gradients(x: Sequence[Array], step: int) -> list[Array | None]:
    """Downhill at first, so that Prodigy's d grows, and with a jump; some tensors rest at some steps."""
    noise = [randn(*a.shape, seed=17 * step + i + 1).numpy() for i, a in enumerate(x)]
    found = [(2.0 * a + n) * (10.0 if step == 12 else 1.0) for a, n in zip(x, noise, strict=True)]
    return [None if step % 4 == 2 and i % 3 == 1 else g for i, g in enumerate(found)]


@pytest.mark.parametrize(
    ("backend", "maximize"),
    [("numba", False), ("foreach", False), ("reference", False), ("numba", True)],
    ids=["numba", "foreach", "reference", "maximize"],
)
@pytest.mark.parametrize(("paper", "case"), PAPERS, ids=[str(case) for _, case in PAPERS])
def test_what_the_paper_says(paper: Callable[..., Any], case: Case, backend: str, maximize: bool) -> None:
    """Twenty-four steps of five tensors, of which one is empty, one a number, and one rests now and then."""
    x = [randn(*shape, seed=i).numpy() for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(torch.tensor(a)) for a in x]
    optimizer, expected = case.ours(params, backend=backend, maximize=maximize), paper(**case.kwargs)
    for step in range(24):
        grads = gradients(x, step)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else torch.tensor(-g if maximize else g)
        optimizer.step()
        expected.step(x, grads)
        for p, a in zip(params, x, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), a, rtol=1e-12, atol=1e-13)
    if isinstance(expected, ProdigyPaper):
        assert optimizer.d == pytest.approx(expected.d, rel=1e-12)
        assert optimizer.d > 2 * expected.d0


# --- LARS and LAMB: steps as long as the tensor ---------------------------------------------------------------------


def steps_of(optimizer: Any, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """How far each parameter moves."""
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return [p.detach() - b for p, b in zip(params, before, strict=True)]


LONG_STEPS = [
    Case("LARS", dict(lr=0.1, momentum=0.0, trust_coefficient=1.0, eps=0.0)),
    Case("LAMB", dict(lr=0.1)),
    Case("LAMB", dict(lr=0.1, bias_correction=False, weight_decay=0.0)),
]


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@each(LONG_STEPS)
def test_a_step_is_lr_times_as_long_as_the_tensor(case: Case, size: float) -> None:
    params = parameters(("contiguous", "transposed", "0-d", "one element", "offset"))
    optimizer = case.ours(params)
    for step in range(3):
        grads = [randn(*p.shape, seed=step) * size for p in params]
        lengths = [p.norm().item() for p in params]
        if case.name == "LAMB":  # without eps only the direction of the update depends on the gradient's size
            optimizer.param_groups[0]["eps"] = 0.0
        for moved, before in zip(steps_of(optimizer, params, grads), lengths, strict=True):
            assert moved.norm().item() == pytest.approx(0.1 * before, rel=1e-12)


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (40.0, inf), (2.0, 3.0)])
def test_phi_bounds_the_length_of_lambs_step(bounds: tuple[float, float]) -> None:
    for size in (0.01, 2.5, 100.0):
        p = torch.nn.Parameter(randn(30) / randn(30).norm() * size)
        optimizer = optim.LAMB([p], lr=0.1, phi=bounds, weight_decay=0.0)
        [moved] = steps_of(optimizer, [p], [randn(30, seed=1)])
        assert moved.norm().item() == pytest.approx(0.1 * min(max(size, bounds[0]), bounds[1]), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "without"), [("LARS", "SGD"), ("LAMB", "AdamW")])
def test_tensors_of_zeros_take_the_step_of_the_rule_without_a_ratio(name: str, without: str, backend: str) -> None:
    more = dict(momentum=0.9) if name == "LARS" else dict(eps=1e-6, weight_decay=0)
    p, q = (torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in range(2))
    for other, cls in ((p, name), (q, without)):
        optimizer = getattr(optim, cls)([other], lr=0.1, backend=backend, **more)
        steps_of(optimizer, [other], [randn(3, 2)])
    assert p.detach().norm() > 0
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Case("LARS", dict(lr=0.1, adapt=False)), Case("SGD", dict(lr=0.1, momentum=0.9))),
        (
            Case("LARS", dict(lr=0.1, adapt=False, nesterov=True, weight_decay=0.1)),
            Case("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
        ),
        (Case("LAMB", dict(lr=0.1, adapt=False)), Case("AdamW", dict(lr=0.1, eps=1e-6))),
    ],
    ids=str,
)
def test_tensors_that_do_not_adapt(ours: Case, theirs: Case) -> None:
    p, q = (torch.nn.Parameter(randn(20)) for _ in range(2))
    a, b = ours.ours([p]), theirs.theirs([q])
    for step in range(8):
        for parameter, optimizer in ((p, a), (q, b)):
            parameter.grad = randn(20, seed=step)
            optimizer.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_gradients_that_are_gone_do_not_overflow(name: str, backend: str) -> None:
    """A step is divided by the norm of what, in float32, may be too small to be a divisor."""
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = getattr(optim, name)([p], lr=0.1, backend=backend, **(dict(weight_decay=0.0) if name == "LAMB" else {}))
    p.grad = torch.full((100,), 1e-3)
    optimizer.step()
    p.grad = torch.zeros(100)
    if name == "LAMB":  # as after a thousand steps without a gradient
        optimizer.state[p]["exp_avg"].fill_(1e-44)
    else:
        p.grad[3] = 1e-45
    for _ in range(3):
        optimizer.step()
        assert p.isfinite().all()


def test_weight_decay_alone_shrinks_by_lr() -> None:
    """Without gradients, LAMB's update is the decay, and as long as the tensor, however small λ is."""
    p = torch.nn.Parameter(randn(10))
    start = p.detach().clone()
    optimizer = optim.LAMB([p], lr=0.1, weight_decay=1e-9)
    steps_of(optimizer, [p], [torch.zeros(10, dtype=torch.float64)])
    torch.testing.assert_close(p.detach(), 0.9 * start, rtol=1e-12, atol=0)


def test_biases_are_left_out_by_groups() -> None:
    """As the docstrings of LAMB and LARS say."""
    from schuss import param_groups

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    groups = param_groups(model, overrides={lambda name, p: p.dim() < 2: {"adapt": False}})
    optimizer = optim.LAMB(groups, lr=0.1)
    kept = {id(p): (g["adapt"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert [kept[id(p)] for p in model.parameters()] == [(True, 0.01), *[(False, 0.0)] * 3]


# --- StableAdamW ----------------------------------------------------------------------------------------------------


def test_stable_adamw_is_adamw_while_gradients_shrink() -> None:
    p, q = (torch.nn.Parameter(randn(6, 5)) for _ in range(2))
    a, b = optim.StableAdamW([p], lr=0.01, weight_decay=0.1), torch.optim.AdamW([q], 0.01, (0.9, 0.99), 1e-8, 0.1)
    g = randn(6, 5, seed=1)
    for step in range(10):
        for parameter, optimizer in ((p, a), (q, b)):
            parameter.grad = g * 0.5**step
            optimizer.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)


def test_stable_adamw_is_adamw_for_gradients_below_eps() -> None:
    p, q = (torch.nn.Parameter(randn(20)) for _ in range(2))
    a, b = optim.StableAdamW([p], lr=0.1), torch.optim.AdamW([q], 0.1, (0.9, 0.99), 1e-8, 1e-2)
    for step in range(10):
        for parameter, optimizer in ((p, a), (q, b)):
            parameter.grad = 1e-9 * randn(20, seed=step) * 2**-step
            optimizer.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("factor", [10.0, 1e6])
def test_a_jump_of_the_gradients_slows_stable_adamw_down(factor: float) -> None:
    """Ten steps with gradient 1, then f: v̂ is then (f² + s) / (1 + s), where s = β₂ + ... + β₂¹⁰."""
    p = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer = optim.StableAdamW([p], lr=1.0, eps=0.0, weight_decay=0.0, betas=(0.0, 0.9))
    moved = [steps_of(optimizer, [p], [torch.full((7,), g, dtype=torch.float64)])[0] for g in [1.0] * 10 + [factor]]
    for step in moved[:10]:
        assert step.tolist() == pytest.approx([-1.0] * 7, rel=1e-12)
    s = sum(0.9**k for k in range(1, 11))
    rms = factor / math.sqrt((factor**2 + s) / (1 + s))
    assert rms > 2
    assert moved[10].tolist() == pytest.approx([-rms / rms] * 7, rel=1e-12)


def test_stable_adamws_decay_slows_down_with_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = optim.StableAdamW([p], lr=0.1, betas=(0.0, 0.5), eps=0.0, weight_decay=0.5)
    steps_of(optimizer, [p], [torch.full((4,), 1.0, dtype=torch.float64)])
    before = p.detach().clone()
    steps_of(optimizer, [p], [torch.full((4,), 100.0, dtype=torch.float64)])
    root = math.sqrt((0.5 * 1e4 + 0.25) / 0.75)
    rate = 0.1 / (100 / root)
    expected = (1 - rate * 0.5) * before - rate * 100 / root
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=0)


def test_stable_adamw_goes_on_from_adamw() -> None:
    p, q = (torch.nn.Parameter(randn(20)) for _ in range(2))
    a, b = optim.AdamW([p], lr=0.01, betas=(0.9, 0.99)), optim.StableAdamW([q], lr=0.01)
    for parameter, optimizer in ((p, a), (q, b)):
        for step in range(5):
            parameter.grad = randn(20, seed=1) * 0.9**step
            optimizer.step()
    b.load_state_dict(a.state_dict())
    for parameter, optimizer in ((p, a), (q, b)):
        parameter.grad = randn(20, seed=1) * 0.1
        optimizer.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-13, atol=0)


# --- MARS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [dict(clip=inf), dict(clip=1e3)], ids=["unclipped", "clipped above"])
def test_mars_without_gamma_is_adamw(more: dict[str, float]) -> None:
    """To the bit, and without the memory of a gradient; so is a clip that no gradient reaches."""
    both = []
    for cls, kwargs in ((optim.MARS, dict(gamma=0, **more)), (optim.AdamW, {})):
        params = parameters()
        optimizer = cls(params, lr=0.01, betas=(0.95, 0.99), weight_decay=0.1, **kwargs)
        for step in range(8):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=10 * step + i)
            optimizer.step()
        both.append((params, [optimizer.state[p] for p in params]))
    assert_equal(*[[p.detach() for p in params] for params, _ in both])
    assert_equal(*[state for _, state in both])


def test_mars_bounds_the_norm_of_what_adam_gets() -> None:
    """Of c, not of the gradient; every tensor for itself: here 1.3 and 0.3 times its gradient."""
    params = [torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2)]
    optimizer = optim.MARS(params, betas=(0.5, 0.5), gamma=0.3, clip=2.0)
    for size in (1.0, 2.0):
        for p, factor in zip(params, (1.0, 0.1), strict=True):
            p.grad = torch.full((4,), size * factor, dtype=torch.float64)
        optimizer.step()
    c = [1.0, 2.0 + 0.3], [0.1, 0.2 + 0.03]  # of norms 2, 4.6 and 0.2, 0.46
    clipped = (c[0][0], c[0][1] * 2.0 / 4.6), c[1]
    for p, (first, second) in zip(params, clipped, strict=True):
        assert optimizer.state[p]["exp_avg"].tolist() == pytest.approx([0.25 * first + 0.5 * second] * 4, rel=1e-12)


def test_mars_remembers_the_gradient_not_its_memory() -> None:
    """p.grad may be zeroed and filled again in place: the difference is between two gradients all the same."""
    results = []
    for in_place in (False, True):
        p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
        p.grad = torch.zeros(5, dtype=torch.float64)
        optimizer = optim.MARS([p], gamma=0.5)
        for step in range(4):
            optimizer.zero_grad(set_to_none=not in_place)
            g = 0.1 * randn(5, seed=step)
            p.grad = p.grad.add_(g) if in_place else g
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


# --- Prodigy: d stays below the distance, and finds it ---------------------------------------------------------------


def descent(
    f: Callable[[torch.Tensor], torch.Tensor], steps: int, sizes: Sequence[int] = (1,), **kwargs: Any
) -> list[float]:
    """d after each step of a descent from 0 along exact gradients of a function of all parameters in one vector."""
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in sizes]
    optimizer, found = optim.Prodigy(params, **kwargs), []
    for _ in range(steps):
        optimizer.zero_grad()
        f(torch.cat(params)).backward()
        optimizer.step()
        found.append(optimizer.d)
    return found


def distance_to(point: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: (x - point).abs().sum()


def rises(d: Sequence[float]) -> bool:
    return all(a <= b for a, b in pairwise(d))


@pytest.mark.parametrize(
    ("distance", "share", "soon"), [(0.01, 0.387, 8), (1.0, 0.436, 13), (10.0, 0.741, 15), (1000.0, 0.834, 20)]
)
def test_prodigy_finds_the_distance(distance: float, share: float, soon: int) -> None:
    """|x - D| from 0: d becomes this share of D, and is above a tenth of it after so many steps and one; never above D.

    After three thousand steps d is the same: it is found within twenty-five.
    """
    d = descent(distance_to(distance), 200)
    assert d[-1] / distance == pytest.approx(share, abs=5e-4)
    assert next(i for i, value in enumerate(d) if value > 0.1 * distance) == soon
    assert max(d) <= distance
    assert rises(d)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(weight_decay=0.1),
        dict(use_bias_correction=True),
        dict(beta3=0.9),
        dict(growth_rate=1.02, d0=1e-3),
        dict(lr=0.1),
        dict(betas=(0.0, 0.5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("loss", [torch.square, torch.abs], ids=["squares", "absolute values"])
def test_ds_bound_for_convex_functions(loss: Callable[..., torch.Tensor], kwargs: dict[str, Any]) -> None:
    """Never above the largest distance of an element from the solution: least squares and absolute deviations."""
    a, solution = randn(20, 6), randn(6, seed=1) * torch.logspace(-2, 0, 6, dtype=torch.float64)
    bound = solution.abs().max().item()
    d = descent(lambda x: loss(a @ (x - solution)).mean(), 300, (1, 2, 3), **kwargs)
    assert rises(d)
    assert max(d) <= bound
    assert d[-1] > 0.02 * bound


@pytest.mark.parametrize("rest", [13, 14, 15])
def test_the_bound_holds_when_a_tensor_comes_to_rest(rest: int) -> None:
    """|x - 1| + 100 |y - 1|, of which y has no gradient any more: its part of r is there, and so is that of ‖s‖₁.

    Without the latter d becomes 1.17, 3.00 and 8.02, as in the authors' code.
    """
    params, found = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)], []
    optimizer = optim.Prodigy(params)
    for step in range(60):
        for p, weight in zip(params, (1.0, 0.0 if step >= rest else 100.0), strict=True):
            p.grad = weight * (p.detach() - 1).sign() if weight else None
        optimizer.step()
        found.append(optimizer.d)
    assert rises(found)
    assert max(found) <= 1.0
    assert found[-1] > 0.1


def test_the_bound_holds_with_gradients_that_come_and_go() -> None:
    """Sums of |x_i - 1| in which each tensor takes part at random."""
    for seed in range(2):
        params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(4)]
        optimizer, found = optim.Prodigy(params, d0=1e-3), []
        there = torch.rand(200, 4, generator=torch.Generator().manual_seed(seed)) < 0.3
        for row in there.tolist():
            for p, has in zip(params, row, strict=True):
                p.grad = (p.detach() - 1).sign() if has else None
            optimizer.step()
            found.append(optimizer.d)
        assert rises(found)
        assert max(found) <= 1.0
        assert found[-1] > 0.1


def test_growth_is_limited_once_d_has_grown() -> None:
    d = descent(distance_to(1.0), 400, growth_rate=1.02, d0=1e-4)
    ratios = [b / a for a, b in pairwise(d) if a > 1e-4]
    assert max(ratios) == pytest.approx(1.02, rel=1e-12)
    assert d[-1] > 0.1


def test_d_coef_multiplies_the_estimate() -> None:
    """Of the second step: before it, d is d0 whatever d_coef, and both sums are of two gradients alike."""
    estimates = [descent(distance_to(1.0), 2, d_coef=coef)[1] / coef for coef in (2.0, 8.0)]
    assert estimates[0] == pytest.approx(estimates[1], rel=1e-12)


def test_a_warm_up_needs_its_safeguard() -> None:
    """Rates that grow from almost nothing make s small, not the products: d passes the distance; safeguarded not."""
    largest = []
    for safeguard in (False, True):
        x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.Prodigy([x], d0=0.05, safeguard_warmup=safeguard)
        for step in range(100):
            optimizer.param_groups[0]["lr"] = min(1.0, (step + 1) / 50)
            x.grad = (x.detach() - 1).sign()
            optimizer.step()
        largest.append(optimizer.d)
    assert largest[1] < largest[0]
    assert largest[1] <= 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tensors_have_one_d(backend: str) -> None:
    """Also one that rests while d grows, and one that joins later: its next step is with the d of the others."""
    params = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3)]
    optimizer = optim.Prodigy(params[:2], backend=backend)
    for step in range(30):
        for i, p in enumerate(params[:2]):
            p.grad = None if i == 1 and step > 0 else (p.detach() - 1).sign()
        optimizer.step()
    assert optimizer.d > 0.05
    optimizer.add_param_group({"params": [params[2]]})
    d, before = optimizer.d, [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    assert (params[1] - before[1]).min().item() > 0.05 * d
    # First step of the late one: m / √v is (1 - β₁) d g / √((1 - β₂) d² g²).
    expected = d * 0.1 / math.sqrt(0.001)
    assert (params[2] - before[2]).tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert {optimizer.state[p]["d"].item() for p in params} == {optimizer.d}


def copied(optimizer: Any, params: Sequence[torch.Tensor]) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """The optimizer and its parameters as a deep copy, and as loaded from a file."""
    yield copy.deepcopy((optimizer, list(params)))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = optim.Prodigy(fresh)
    other.load_state_dict(torch.load(file, weights_only=True))
    yield other, fresh


def test_one_d_survives_copying_and_loading() -> None:
    """A tensor that rests right afterwards still gets what the others find."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = optim.Prodigy(params)

    def go(optimizer: Any, params: Sequence[torch.Tensor], steps: int, resting: int | None = None) -> None:
        for _ in range(steps):
            for i, p in enumerate(params):
                p.grad = None if i == resting else (p.detach() - 1).sign()
            optimizer.step()

    go(optimizer, params, 8)
    others = [*copied(optimizer, params)]
    for one, its in ((optimizer, params), *others):
        go(one, its, 8, resting=1)
        go(one, its, 2)
    for one, its in others:
        assert one.d == optimizer.d
        assert_equal([p.detach() for p in its], [p.detach() for p in params])


def test_a_group_with_lr_0_rests() -> None:
    """Its gradients, however large, change neither d nor anything else; when it joins, it starts anew."""
    results = []
    for groups in (1, 2):
        params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2)]
        optimizer = optim.Prodigy([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.0}][:groups])
        for step in range(20):
            params[0].grad = (params[0].detach() - 1).sign()
            params[1].grad = 1e3 * randn(3, seed=step)
            optimizer.step()
        results.append((optimizer.d, params[0].detach()))
        assert not params[1].any()
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    kept = optimizer.state[params[1]]
    assert not any(kept[name].any() for name in ("exp_avg", "exp_avg_sq", "s", "s_norm"))


def test_several_rates_are_an_error() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    message = r"Prodigy: lr must be the same in all groups, or 0 .*; got 0\.5, 1\.0\. Give tensors .* of their own"
    with pytest.raises(ValueError, match=message):
        optim.Prodigy([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    optimizer = optim.Prodigy([{"params": params[:1]}, {"params": params[1:2], "lr": 0.0}])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    assert len(optimizer.param_groups) == 2
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[1]["lr"] = torch.tensor(0.5)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_equal([p.detach() for p in params], before)
    assert_equal(optimizer.state_dict()["state"], state)
    optimizer.param_groups[1]["lr"] = 1.0
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"), [("d0", 1e-3), ("d_coef", 2.0), ("growth_rate", 2.0), ("beta3", 0.5), ("betas", (0.9, 0.5))]
)
def test_what_d_is_made_with_is_one_for_all(name: str, value: Any) -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    argument = "beta3" if name == "betas" else name
    with pytest.raises(ValueError, match=rf"Prodigy: {argument} must be the same in all groups"):
        optim.Prodigy([{"params": params[:1]}, {"params": params[1:], name: value}])


def test_betas_may_differ_where_beta3_is_given() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optim.Prodigy([{"params": params[:1]}, {"params": params[1:], "betas": (0.5, 0.9)}], beta3=0.99)


def test_d_is_seen_before_the_first_step() -> None:
    assert optim.Prodigy([torch.nn.Parameter(torch.zeros(3))], d0=0.25).d == 0.25


@pytest.mark.parametrize("state", ["s", "p0"])
def test_some_states_of_prodigy_cannot_be_stored_in_8_bits(state: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=rf"Prodigy: state_dtype of '{state}' must be float32 or bfloat16"):
        optim.Prodigy([p], state_dtype={state: "int8"})
    optim.Prodigy([p], state_dtype={"exp_avg": "int8", "exp_avg_sq": "int8"})


def test_prodigys_sums_of_bfloat16_are_wide() -> None:
    """s decays by 0.0005 a step, which bfloat16 would round away."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = optim.Prodigy([p], d0=0.1)
    p.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer.step()
    kept = optimizer.state[p]
    assert kept["s"].dtype == torch.float32
    assert {kept[name].dtype for name in ("d", "d_max", "d_numerator", "d_denom", "s_norm")} == {torch.float64}
    before = kept["s"].clone()
    p.grad = torch.zeros(3, dtype=torch.bfloat16)
    optimizer.step()
    torch.testing.assert_close(kept["s"], before * math.sqrt(0.999), rtol=1e-6, atol=0)


# --- what all of them do with unusual gradients ----------------------------------------------------------------------


EACH = [
    Case("LARS", dict(lr=0.1)),
    Case("LAMB", dict(lr=0.1)),
    Case("StableAdamW", dict(lr=0.1)),
    Case("MARS", dict(lr=0.1)),
    Case("Prodigy", dict(d0=0.1)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@each(EACH)
def test_nan_is_not_hidden(case: Case, backend: str) -> None:
    """One NaN in a gradient makes the whole tensor NaN, at this step or the next; with Prodigy, all tensors."""
    params = [torch.nn.Parameter(randn(5, seed=i)) for i in range(2)]
    optimizer = case.ours(params, backend=backend)
    for bad in (math.nan, 1.0):
        for p in params:
            p.grad = torch.ones(5, dtype=torch.float64)
        params[0].grad[2] = bad
        optimizer.step()
    assert params[0].isnan().sum() == (1 if case.name == "Prodigy" else 5) or params[0].isnan().all()
    assert params[0].isnan().any()
    assert params[1].isnan().all() if case.name == "Prodigy" else params[1].isfinite().all()


@each(EACH)
def test_nan_can_be_skipped(case: Case) -> None:
    params = [torch.nn.Parameter(randn(5, seed=i)) for i in range(2)]
    optimizer = case.ours(params, max_norm=1.0, nonfinite="skip")
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = randn(5, seed=step + i)
        if step == 1:
            params[0].grad[2] = math.nan
            before = copy.deepcopy((optimizer.state_dict()["state"], [p.detach() for p in params]))
        optimizer.step()
        if step == 1:
            assert_equal((optimizer.state_dict()["state"], [p.detach() for p in params]), before)
    assert optimizer.skipped_steps == 1
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
@each(EACH)
def test_gradients_of_zero(case: Case, backend: str) -> None:
    """From the first step on: nothing moves, but what weight decay moves, and nothing becomes NaN."""
    params = [torch.nn.Parameter(randn(5)), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    start = [p.detach().clone() for p in params]
    optimizer = case.ours(params, backend=backend, weight_decay=0.0)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_equal([p.detach() for p in params], start)
    assert all(value.isfinite().all() for p in params for value in optimizer.state[p].values())


@pytest.mark.parametrize("backend", BACKENDS)
@each(EACH)
def test_empty_tensors_and_missing_gradients(case: Case, backend: str) -> None:
    """Alone, and beside others, which do not notice."""
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    alone = case.ours([empty], backend=backend)
    alone.step()
    empty.grad = torch.zeros(0, 3)
    alone.step()
    results = []
    for more in (False, True):
        p, idle = torch.nn.Parameter(randn(4)), torch.nn.Parameter(randn(4))
        nothing = torch.nn.Parameter(torch.zeros(0, dtype=torch.float64))
        optimizer = case.ours([p, nothing, idle] if more else [p], backend=backend)
        for step in range(4):
            p.grad, nothing.grad = randn(4, seed=step), torch.zeros(0, dtype=torch.float64)
            optimizer.step()
        results.append(p.detach())
        assert torch.equal(idle, randn(4))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each(EACH)
def test_threads_change_no_bit(case: Case, dtype: torch.dtype) -> None:
    """Several tensors of several chunks, and many small ones."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params = [
                torch.nn.Parameter(randn(n, dtype=dtype, seed=n)) for n in (100_000, 70_001, *range(1, 60), 16_384)
            ]
            optimizer = case.ours(params)
            for step in range(4):
                for p in params:
                    p.grad = randn(p.numel(), dtype=dtype, seed=step)
                optimizer.step()
            runs.append(([p.detach() for p in params], [optimizer.state[p] for p in params]))
    finally:
        torch.set_num_threads(before)
    assert_equal(*runs)
