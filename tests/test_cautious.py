"""Cautious steps and cautious weight decay: over several rules, against NumPy versions of the two papers."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import cases
from cases import Case, assert_equal, each, gradient, randn
from schuss import optim
from schuss.engine.pieces import _subtracted
from schuss.engine.trace import Graph, parameters

Array = np.ndarray[Any, Any]
BACKENDS = ("numba", "foreach", "reference")
SHAPES = ((6, 5), (40,), (), (0, 2), (2, 3, 4))


# --- what rules would subtract from the parameter, one tensor at a time; L2 decay is a part of it ------------------


class Sgd:
    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.lr, self.momentum, self.decay, self.b = lr, momentum, weight_decay, None

    def step(self, x: Array, g: Array) -> Array:
        g = g + self.decay * x
        self.b = g if self.b is None else self.momentum * self.b + g
        return self.lr * self.b


class Adam:
    def __init__(
        self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, x: Array, g: Array) -> Array:
        g = g + self.decay * x
        self.t += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * g * g
        v = self.v / (1 - self.betas[1] ** self.t)
        return self.lr * self.m / (1 - self.betas[0] ** self.t) / (np.sqrt(v) + self.eps)


class Lion:
    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.lr, self.betas, self.m = lr, betas, 0.0

    def step(self, x: Array, g: Array) -> Array:
        u = np.sign(self.betas[0] * self.m + (1 - self.betas[0]) * g)
        self.m = self.betas[1] * self.m + (1 - self.betas[1]) * g
        return self.lr * u


class Lamb(Adam):
    def step(self, x: Array, g: Array) -> Array:
        decay, self.decay = self.decay, 0.0
        u = super().step(x, g) / self.lr + decay * x
        self.decay = decay
        a, b = (math.sqrt(math.fsum((z * z).reshape(-1).tolist())) for z in (x, u))
        return self.lr * (a / b if a and b else 1.0) * u


def cautious(u: Array, g: Array) -> Array:
    """Liang et al. 2024, algorithm 1, with the scale of the authors' code: one over the share that goes, up to 1000."""
    mask = (u * g > 0).astype(float)
    return u * mask / max(mask.mean() if mask.size else 0.0, 1e-3)


def cautious_decay(x: Array, u: Array, decay: float) -> Array:
    """Chen et al. 2025, algorithm 1: what decays is where the step goes towards zero, or nowhere."""
    return decay * x * (u * x >= 0)


RULES: list[tuple[Callable[..., Any], Case, dict[str, Any], float]] = [
    (Sgd, Case("SGD", dict(lr=0.1, momentum=0.9)), dict(momentum=0.9), 0.0),
    (Sgd, Case("SGD", dict(lr=0.1, momentum=0.9, weight_decay=0.5)), dict(momentum=0.9, weight_decay=0.5), 0.0),
    (Adam, Case("Adam", dict(lr=0.1, weight_decay=0.5)), dict(weight_decay=0.5), 0.0),
    (Adam, Case("AdamW", dict(lr=0.1, betas=(0.5, 0.8), weight_decay=0.5)), dict(betas=(0.5, 0.8)), 0.5),
    (Adam, Case("Adam", dict(lr=0.1, weight_decay=0.5, decoupled_weight_decay=True)), {}, 0.5),
    (Lion, Case("Lion", dict(lr=0.1, weight_decay=0.5)), {}, 0.5),
    (Lamb, Case("LAMB", dict(lr=0.1, weight_decay=0.5)), dict(eps=1e-6, weight_decay=0.5), 0.0),
]
"""The rule, what makes it, the settings of its NumPy version, and its decoupled decay."""
DECOUPLED = [rule for rule in RULES if rule[3]]


def ids(rules: Sequence[tuple[Any, Case, Any, Any]]) -> list[str]:
    return [str(case) for _, case, _, _ in rules]


def compare(
    paper: Callable[..., Any], case: Case, settings: dict[str, Any], decay: float, backend: str, maximize: bool,
    *, steps: bool, decays: bool,
) -> None:  # fmt: skip
    x = [randn(*shape, seed=i).numpy() for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(torch.tensor(a)) for a in x]
    optimizer = case.ours(params, backend=backend, maximize=maximize, cautious=steps, cautious_decay=decays)
    rules = [paper(0.1, **settings) for _ in x]
    stayed = undecayed = 0
    for step in range(12):
        for i, (p, rule) in enumerate(zip(params, rules, strict=True)):
            g = randn(*p.shape, seed=50 * step + i).numpy()
            p.grad = torch.tensor(-g if maximize else g)
            decayed = x[i] * (1 - 0.1 * decay)
            u = rule.step(x[i] if decays else decayed, g)
            stayed += int((u * g <= 0).sum())
            u = cautious(u, g) if steps else u
            undecayed += int((u * x[i] < 0).sum())
            x[i] = x[i] - u - cautious_decay(x[i], u, 0.1 * decay) if decays else decayed - u
        optimizer.step()
        for p, a in zip(params, x, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), a, rtol=1e-12, atol=1e-13)
    assert not steps or stayed > 50
    assert not decays or undecayed > 50


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=ids(RULES))
def test_cautious_steps(rule: Any, backend: str, maximize: bool) -> None:
    compare(*rule, backend, maximize, steps=True, decays=False)


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", DECOUPLED, ids=ids(DECOUPLED))
def test_cautious_decay(rule: Any, backend: str, maximize: bool) -> None:
    compare(*rule, backend, maximize, steps=False, decays=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", DECOUPLED, ids=ids(DECOUPLED))
def test_both(rule: Any, backend: str) -> None:
    """Where an element stays, it decays: its step leads nowhere."""
    compare(*rule, backend, maximize=False, steps=True, decays=True)


# --- what follows -----------------------------------------------------------------------------------------------------


MANY = [
    Case(name, kwargs)
    for name, kwargs in (
        ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
        ("RMSprop", dict(lr=0.01, momentum=0.9)),
        ("AdamW", dict(lr=0.01, weight_decay=0.0)),
        ("NAdam", dict(lr=0.01)),
        ("RAdam", dict(lr=0.01)),
        ("ADOPT", dict(lr=0.01)),
        ("Lion", dict(lr=0.01)),
        ("Adan", dict(lr=0.01)),
        ("AdEMAMix", dict(lr=0.01)),
        ("Signum", dict(lr=0.01)),
        ("LARS", dict(lr=1.0, trust_coefficient=0.1)),
        ("StableAdamW", dict(lr=0.01, weight_decay=0.0)),
        ("MARS", dict(lr=0.01)),
        ("Prodigy", dict(d0=0.01)),
    )
]


@each(MANY)
def test_no_element_goes_along_its_gradient(case: Case) -> None:
    """Those that do go, go the way that they would have gone, farther by one over their share."""
    p = torch.nn.Parameter(randn(500))
    optimizer = case.ours([p], cautious=True)
    for step in range(8):
        p.grad = randn(500, seed=step)
        other = copy.deepcopy((optimizer, p))
        other[1].grad = p.grad.clone()
        other[0]._options = copy.copy(other[0]._options)
        object.__setattr__(other[0]._options, "cautious", False)
        other[0].__setstate__(other[0].__getstate__())
        before = p.detach().clone()
        for one in (optimizer, other[0]):
            one.step()
        moved, would = p.detach() - before, other[1].detach() - before
        goes = would * p.grad < 0
        assert not moved[~goes].any()
        assert (moved * p.grad <= 0).all()
        if goes.any():
            torch.testing.assert_close(moved[goes], would[goes] / goes.double().mean(), rtol=1e-9, atol=1e-14)
    assert 0 < goes.sum() < 500


def test_steps_along_the_gradient_are_as_before() -> None:
    """SGD's without momentum, and Adam's first."""
    for name, kwargs, steps in (("SGD", {}, 5), ("AdamW", {}, 1)):
        both = [torch.nn.Parameter(randn(30)) for _ in range(2)]
        for p, is_cautious in zip(both, (False, True), strict=True):
            optimizer = getattr(optim, name)([p], lr=0.1, cautious=is_cautious, **kwargs)
            for step in range(steps):
                p.grad = randn(30, seed=step)
                optimizer.step()
        torch.testing.assert_close(both[0].detach(), both[1].detach(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("goes", "factor"), [(1, 1000.0), (5, 1000.0), (20, 250.0), (5000, 1.0)])
def test_the_scale_is_one_over_the_share_and_a_thousand_at_most(goes: int, factor: float) -> None:
    """Elements without a gradient stay, and count: 5000 of them, of which some have one."""
    p = torch.nn.Parameter(torch.zeros(5000, dtype=torch.float64))
    p.grad = torch.zeros(5000, dtype=torch.float64)
    p.grad[:goes] = 1.0
    optim.SGD([p], lr=1.0, cautious=True).step()
    torch.testing.assert_close(p.detach(), -factor * p.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [1e-3, 1e-9, 1e-20])
def test_steps_that_round_away_count_as_what_they_are(
    backend: str, dtype: torch.dtype, rounding: str, lr: float
) -> None:
    """Steps of 1e-13 or less do not move elements of 1. All go at the first step, three quarters at the second."""
    if rounding != "nearest" and dtype != torch.bfloat16:
        pytest.skip("for half types")
    p = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    with torch.no_grad():
        p[0] = 0.0
    optimizer = optim.SGD([p], lr=lr, momentum=0.5, cautious=True, backend=backend, rounding=rounding)
    for step in range(2):
        p.grad = torch.full_like(p, 1e-10)
        if step:
            p.grad[-250:] = -1e-11
        optimizer.step()
    assert p[0].item() == pytest.approx(-lr * 1e-10 * (1 + 1.5 / 0.75), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_that_round_away_decide_on_decay(backend: str, dtype: torch.dtype) -> None:
    """Of a step of 1e-9 and a decay by a half: it would lead away from zero in the first place alone."""
    p = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    p.grad = torch.tensor([-1.0, 1.0], dtype=dtype)
    optim.Lion([p], lr=1e-9, weight_decay=5e8, cautious_decay=True, backend=backend).step()
    assert p.tolist() == [1.0, 0.5]


@each(cases.RICH + cases.PLAIN)
def test_what_every_rule_subtracts_is_known(case: Case) -> None:
    """But of Schedule-Free's, which refuse it: else p minus the new p would stand for it."""
    optimizer = case.ours(case.parameters())
    rule, group = optimizer._rule, optimizer.param_groups[0]
    variant, graph = rule.variant(group), Graph()
    flags, there = rule.chosen(variant), rule.letters(variant)
    given = [
        flags[n] if n in flags else graph.name(n) if there.get(n, True) else None for n in parameters(rule.formula)[2:]
    ]
    new = rule.formula(p := graph.name("p"), graph.name("g"), *given)
    known = _subtracted(new[0] if isinstance(new, tuple) else new, p) is not None
    assert known != case.name.startswith("ScheduleFree")


def test_each_tensor_has_its_own_share() -> None:
    """And a stack of tensors is one tensor: what lies in p, decides."""
    params = [torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2)]
    params[0].grad = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    params[1].grad = torch.ones(4, dtype=torch.float64)
    optim.SGD(params, lr=1.0, cautious=True).step()
    assert params[0].tolist() == [-4.0, 0.0, 0.0, 0.0]
    assert params[1].tolist() == [-1.0] * 4


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_decay_without_a_step(name: str) -> None:
    """Without gradients every element decays."""
    p = torch.nn.Parameter(randn(20))
    start = p.detach().clone()
    optimizer = getattr(optim, name)([p], lr=0.1, weight_decay=0.5, cautious_decay=True)
    for _ in range(10):
        p.grad = torch.zeros(20, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(p.detach(), start * 0.95**10, rtol=1e-12, atol=0)


def test_elements_that_go_away_from_zero_do_not_decay() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0], dtype=torch.float64))
    p.grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    optim.Lion([p], lr=0.1, weight_decay=0.5, cautious_decay=True).step()
    assert p.tolist() == pytest.approx([0.95 - 0.1, 1.1, -1.1, -0.95 + 0.1, -0.1], rel=1e-14)


def test_where_cautious_decay_ends() -> None:
    """Decay pulls weights off the minimum of the loss; a cautious one leaves off at it (from outside)."""
    ends = {}
    for is_cautious in (False, True):
        p = torch.nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))
        optimizer = optim.AdamW([p], lr=0.01, weight_decay=0.5, cautious_decay=is_cautious)
        for step in range(3000):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 3000)
            p.grad = p.detach() - 1.0
            optimizer.step()
        ends[is_cautious] = p.item()
    assert ends[True] == pytest.approx(1.0, abs=1e-3)
    assert ends[False] < 0.98


# --- with all else ----------------------------------------------------------------------------------------------------


TOGETHER: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "max_norm": (torch.float32, dict(max_norm=1.0)),
    "clip_value": (torch.float32, dict(clip_value=0.5)),
    "ema": (torch.float32, dict(ema_decay=0.9)),
    "int8": (torch.float32, dict(state_dtype="int8")),
    "kahan": (torch.bfloat16, dict(rounding="kahan")),
    "stochastic": (torch.bfloat16, dict(rounding="stochastic", seed=3)),
    "complex": (torch.complex64, {}),
}


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("name", ["AdamW", "Lion", "LAMB"])
def test_with_other_options(name: str, together: str) -> None:
    """Kernels do what eager torch does; sizes are those of one chunk, of several, and of many small ones."""
    dtype, options = TOGETHER[together]
    more = dict(cautious=True, cautious_decay=name != "LAMB", **options)
    results = []
    for backend in BACKENDS:
        params = [torch.nn.Parameter(randn(n, dtype=dtype, seed=i)) for i, n in enumerate((20_000, 300, 7, 1))]
        optimizer = getattr(optim, name)(params, lr=0.01, weight_decay=0.1, backend=backend, **more)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = gradient(p, step, i)
            optimizer.step()
        results.append([*params, *(kept["ema"] for kept in optimizer.state.values() if "ema" in kept)])
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 3e-6
    for got in results[:2]:
        for a, b in zip(got, results[2], strict=True):
            # An element whose step is all but zero may stay here and go there.
            assert ((a - b).abs() > rounding * b.abs().max()).sum() <= (2 if a.numel() > 1000 else 0)


def test_groups_and_copies_keep_it() -> None:
    """It is the optimizer's, not a group's: deep copies and pickled ones have it."""
    params = [torch.nn.Parameter(randn(30, seed=i)) for i in range(2)]
    optimizer = optim.AdamW([{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(params)], cautious=True)
    runs = [(optimizer, params), copy.deepcopy((optimizer, params)), pickle.loads(pickle.dumps((optimizer, params)))]
    for one, its in runs:
        for step in range(5):
            for i, p in enumerate(its):
                p.grad = randn(30, seed=10 * step + i)
            one.step()
    for _, its in runs[1:]:
        assert_equal([p.detach() for p in its], [p.detach() for p in params])


def test_sparse_gradients_have_the_share_of_their_rows() -> None:
    """Of a table of a hundred rows, two have a gradient: all elements of these go, so nothing grows."""
    p = torch.nn.Parameter(torch.zeros(100, 3))
    p.grad = torch.sparse_coo_tensor([[4, 70]], torch.ones(2, 3), (100, 3), check_invariants=True)
    optim.SGD([p], lr=1.0, cautious=True).step()
    assert p.detach().sum().item() == -6.0
    assert p[4].tolist() == [-1.0] * 3


@pytest.mark.parametrize("name", ["cautious", "cautious_decay"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_other_values_are_errors(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"AdamW: {name} must be True or False, got {value!r}"):
        optim.AdamW([torch.zeros(1)], **{name: value})


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_cautious_decay_needs_decoupled_decay(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: cautious_decay needs decoupled weight decay"):
        getattr(optim, name)([torch.zeros(1)], lr=0.1, cautious_decay=True)
    if name == "Adam":
        optim.Adam([torch.zeros(1)], cautious_decay=True, decoupled_weight_decay=True)
