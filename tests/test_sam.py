"""SAM and ASAM against their papers' formulas in NumPy, and the contract of wrappers."""

import copy
import functools
import gc
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import schuss
from cases import assert_equal, parameters, randn, set_gradients
from schuss import optim
from schuss.schedules import Schedule, linear
from schuss.wrappers import ASAM, SAM, Lookahead
from wrapper_contract import INNERS, Lazy, Make, WrapperContract, drive, second_pass, values

Array = np.ndarray[Any, np.dtype[np.float64]]


class Driven(SAM):
    """For checks that call `step` alone: the gradients are the same in both passes."""

    def _step(self, closure: Any = None) -> Any:
        if closure is None:
            second_pass(self)
        return super()._step(closure)


class TestSAM(WrapperContract):
    """What holds for every wrapper."""

    cls = SAM
    checked = Driven
    settings = {"rho": 0.5}
    evaluations = 2


class Problem:
    """Least squares with a quartic term, ½|Xw + b - y|²/n + Σw⁴/40, and its gradient, in NumPy and in torch."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.x, self.y = rng.normal(size=(12, 5)), rng.normal(size=12)
        self.start = rng.normal(size=5), rng.normal()

    def gradient(self, w: Array, b: float) -> tuple[Array, float]:
        residual = self.x @ w + b - self.y
        return self.x.T @ residual / 12 + w**3 / 10, residual.mean()

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in self.start]

    def loss(self, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        residual = torch.from_numpy(self.x) @ w + b - torch.from_numpy(self.y)
        return residual.pow(2).sum() / 24 + w.pow(4).sum() / 40

    def closure(self, optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
        def evaluate() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss(*params)
            loss.backward()
            return loss.detach()

        return evaluate


def by_closure(problem: Problem, optimizer: Any, params: Sequence[torch.Tensor]) -> None:
    optimizer.step(problem.closure(optimizer, params))


def by_hand(problem: Problem, optimizer: Any, params: Sequence[torch.Tensor]) -> None:
    optimizer.zero_grad()
    problem.loss(*params).backward()
    with optimizer.perturbed():
        problem.loss(*params).backward()
    optimizer.step()


forms = pytest.mark.parametrize("step", [by_closure, by_hand])
alone = pytest.mark.parametrize("make", [make for name, make in INNERS.items() if name != "SAM"])


# --- the algorithm ----------------------------------------------------------------------------------------------------


@forms
def test_one_dimension(step: Any) -> None:
    """f = x²/2: the gradient is taken at x + ρ sign(x)."""
    for start in (2.0, -0.25):
        x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        problem = Problem()
        problem.loss = lambda x: x**2 / 2  # type: ignore[method-assign, assignment, misc]
        step(problem, SAM(optim.SGD([x], lr=0.1), rho=0.5), [x])
        assert x.item() == pytest.approx(start - 0.1 * (start + math.copysign(0.5, start)), rel=1e-15)
        assert x.grad.item() == pytest.approx(start + math.copysign(0.5, start), rel=1e-15)


@forms
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("eta", [None, 0.01, 0.0])
def test_is_the_papers_recursion(step: Any, momentum: float, eta: float | None) -> None:
    """Algorithm 1 of either paper with p = 2 round SGD with momentum, in NumPy."""
    problem = Problem()
    params = problem.parameters()
    more: dict[str, Any] = {} if eta is None else {"adaptive": True, "eta": eta}
    optimizer = SAM(torch.optim.SGD(params, lr=0.1, momentum=momentum), rho=0.3, **more)
    w, b = problem.start[0].copy(), problem.start[1]
    mw, mb = np.zeros(5), 0.0
    for _ in range(25):
        gw, gb = problem.gradient(w, b)
        tw, tb = (np.ones(5), 1.0) if eta is None else (np.abs(w) + eta, abs(b) + eta)
        norm = np.sqrt(np.sum((tw * gw) ** 2) + (tb * gb) ** 2)
        gw, gb = problem.gradient(w + 0.3 * tw**2 * gw / norm, b + 0.3 * tb**2 * gb / norm)
        mw, mb = momentum * mw + gw, momentum * mb + gb
        w, b = w - 0.1 * mw, b - 0.1 * mb
        step(problem, optimizer, params)
        np.testing.assert_allclose(params[0].detach().numpy(), w, rtol=1e-11)
        assert params[1].item() == pytest.approx(b, rel=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    rhos=st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 10)), min_size=3, max_size=3),
    etas=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3),
    scale=st.floats(1e-12, 1e12),
    there=st.lists(st.booleans(), min_size=3, max_size=3),
    maximize=st.booleans(),
)
def test_is_the_steepest_direction_in_the_ellipsoid(
    rhos: list[float], etas: list[float | None], scale: float, there: list[bool], maximize: bool
) -> None:
    """|ε / (ρT)| = 1, and no other point of the ellipsoid has a larger ⟨g, ε⟩: by Cauchy-Schwarz that is |ρTg|."""
    params = parameters(("contiguous", "transposed", "0-d"))
    optimizer = SAM(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1, maximize=maximize))
    for group, rho, eta in zip(optimizer.param_groups, rhos, etas, strict=True):
        group.update(sam_rho=rho, sam_adaptive=eta is not None, sam_eta=eta or 0.0)
    set_gradients(params, 0)
    for p, has in zip(params, there, strict=True):
        p.grad = p.grad * scale if has else None
    before, gradients = values(params), [p.grad for p in params]
    if not any(there):
        with pytest.raises(RuntimeError, match="needs the gradients"):
            optimizer.perturbed().__enter__()
        return
    radii = [
        rho * (torch.ones_like(p) if eta is None else p.detach().abs() + eta)
        for p, rho, eta in zip(params, rhos, etas, strict=True)
    ]
    with optimizer.perturbed():
        length = gain = most = 0.0
        for p, w, g, radius in zip(params, before, gradients, radii, strict=True):
            moved = p.detach() - w
            if g is None or not radius.any():
                assert not moved.any()
                continue
            length += (moved / radius).pow(2).sum().item()
            gain += (moved * g).sum().item() / scale
            most += (radius * g / scale).pow(2).sum().item()
            p.grad = torch.zeros_like(p)
        params[0].grad = torch.zeros_like(params[0])
    assert_equal(values(params), before)
    if most:
        assert length == pytest.approx(1, rel=1e-9)
        assert gain == pytest.approx((-1 if maximize else 1) * most**0.5, rel=1e-9)


def test_a_rho_of_zero_leaves_a_group_out_of_the_norm_too() -> None:
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer = SAM(optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1), rho=0.5)
    optimizer.param_groups[1]["sam_rho"] = 0.0
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    with optimizer.perturbed():
        assert (a.item(), b.item()) == (1.5, 1.0)
        a.grad = torch.zeros(1)


@forms
def test_asam_does_not_see_how_weights_are_scaled(step: Any) -> None:
    """f depends on u v alone: with u c and v / c ASAM (η = 0) reaches the same u v at w + ε, SAM another."""

    def reached(make: Callable[..., SAM], c: float) -> float:
        u, v = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (1.5 * c, -0.7 / c))
        seen = []

        class Products(Problem):
            def loss(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                seen.append((u * v).item())
                return (u * v - 2) ** 2

        step(Products(), make(optim.SGD([u, v], lr=0.1)), [u, v])
        return seen[1]

    def asam(inner: Any) -> SAM:
        return ASAM(inner, rho=0.5, eta=0.0)

    assert reached(asam, 8.0) == pytest.approx(reached(asam, 1.0), rel=1e-12)
    assert reached(SAM, 8.0) != pytest.approx(reached(SAM, 1.0), rel=1e-3)


@alone
@forms
def test_rho_of_zero_is_the_inner_optimizer(make: Make, step: Any) -> None:
    problem = Problem()
    ours, theirs = problem.parameters(), problem.parameters()
    optimizer, inner = SAM(make(ours), rho=0.0), make(theirs)
    for _ in range(5):
        step(problem, optimizer, ours)
        problem.closure(inner, theirs)()
        inner.step()
        assert_equal(values(ours), values(theirs))


@alone
def test_both_forms_are_the_same(make: Make) -> None:
    problem = Problem()
    ours, theirs = problem.parameters(), problem.parameters()
    a, b = SAM(make(ours), rho=0.2), SAM(make(theirs), rho=0.2)
    for _ in range(6):
        by_closure(problem, a, ours)
        by_hand(problem, b, theirs)
        assert_equal(values(ours), values(theirs))


def test_lookahead_inside_or_outside() -> None:
    problem = Problem()
    ours, theirs, alone = (problem.parameters() for _ in range(3))
    inside = SAM(Lookahead(optim.AdamW(ours, lr=0.05), k=2), rho=0.2)
    outside = Lookahead(SAM(optim.AdamW(theirs, lr=0.05), rho=0.2), k=2)
    without = Lookahead(optim.AdamW(alone, lr=0.05), k=2)
    for _ in range(7):
        for optimizer, params in ((inside, ours), (outside, theirs), (without, alone)):
            by_closure(problem, optimizer, params)
        assert_equal(values(ours), values(theirs))
    assert not torch.allclose(ours[0], alone[0], rtol=1e-3)


def test_two_around_each_other() -> None:
    """f = x²/2: the gradient of the inner one's loss at x + ρ₂ is that of the outer one there, x + ρ₂ + ρ₁."""
    x = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = SAM(SAM(optim.SGD([x], lr=0.1), rho=0.2), rho=0.5)
    assert {key: value for key, value in optimizer.param_groups[0].items() if key.endswith("rho")} == {
        "sam_rho": 0.2, "sam2_rho": 0.5,
    }  # fmt: skip

    def closure() -> Any:
        optimizer.zero_grad()
        loss = x**2 / 2
        loss.backward()
        return loss.detach()

    assert optimizer.step(closure) == 0.5
    assert x.item() == pytest.approx(1 - 0.1 * 1.7, rel=1e-15)


@pytest.mark.parametrize("cls", [torch.optim.LBFGS])
def test_lbfgs_sees_the_gradient_at_the_perturbed_parameters(cls: Any) -> None:
    problem = Problem()
    ours, theirs = problem.parameters(), problem.parameters()
    optimizer, oracle = SAM(cls(ours, lr=0.3, max_iter=4), rho=0.1), cls(theirs, lr=0.3, max_iter=4)
    calls = 0

    def counted() -> Any:
        nonlocal calls
        calls += 1
        return problem.closure(optimizer, ours)()

    def by_numpy() -> Any:
        w, b = theirs[0].detach().numpy().copy(), theirs[1].item()
        gw, gb = problem.gradient(w, b)
        norm = np.sqrt(np.sum(gw**2) + gb**2)
        gw, gb = problem.gradient(w + 0.1 * gw / norm, b + 0.1 * gb / norm)
        for p, g in zip(theirs, (gw, gb), strict=True):
            p.grad = torch.tensor(g)
        return problem.loss(*theirs).detach()

    for _ in range(3):
        assert optimizer.step(counted).item() == pytest.approx(oracle.step(by_numpy).item(), rel=1e-9)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert calls == 3 * 2 * 4


def counted_by_a_decorator(optimizer: torch.optim.Optimizer) -> None:
    """As a profiler without functools.wraps does it: the signature says nothing."""
    step = optimizer.step
    optimizer.step = lambda *args, **kwargs: step(*args, **kwargs)  # type: ignore[method-assign]


def as_a_partial(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step = functools.partial(optimizer.step)  # type: ignore[method-assign]


def under_another_name(optimizer: torch.optim.Optimizer) -> None:
    step = optimizer.step
    optimizer.step = lambda evaluate=None: step(evaluate)  # type: ignore[method-assign]


def by_a_scheduler(optimizer: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def without_an_argument(optimizer: torch.optim.Optimizer) -> None:
    step = optimizer.step
    optimizer.step = lambda: step()  # type: ignore[method-assign]


MADE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=3),
    "Lookahead(LBFGS)": lambda p: Lookahead(torch.optim.LBFGS(p, lr=0.3, max_iter=3), k=2),
    "Combined": lambda p: schuss.Combined([optim.SGD(p[:1], lr=0.1), torch.optim.AdamW(p[1:], lr=0.1)]),
}


@pytest.mark.parametrize(
    "wrapped", [counted_by_a_decorator, as_a_partial, under_another_name, by_a_scheduler, without_an_argument],
)  # fmt: skip
@pytest.mark.parametrize("inner", MADE)
@pytest.mark.parametrize("outside", [False, True], ids=["", "inside of Lookahead"])
def test_whatever_a_step_is_wrapped_in(inner: str, wrapped: Callable[..., None], outside: bool) -> None:
    if wrapped is without_an_argument and "LBFGS" in inner:
        pytest.skip("LBFGS cannot do without a closure")
    problem = Problem()
    ours, theirs = problem.parameters(), problem.parameters()
    one, other = MADE[inner](ours), MADE[inner](theirs)
    wrapped(one)
    optimizers = [SAM(one, rho=0.1), SAM(other, rho=0.1)]
    optimizers = [Lookahead(optimizer, k=2) for optimizer in optimizers] if outside else optimizers
    for _ in range(3):
        for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
            by_closure(problem, optimizer, params)
        assert_equal(values(ours), values(theirs))


# --- groups -----------------------------------------------------------------------------------------------------------


def test_settings_are_in_the_groups_and_may_follow_a_schedule() -> None:
    optimizer = ASAM(optim.SGD([{"params": parameters()}, {"params": parameters(("0-d",))}], lr=0.1), eta=0.02)
    assert [{k: v for k, v in g.items() if k.startswith("sam_")} for g in optimizer.param_groups] == [
        {"sam_rho": 0.5, "sam_eta": 0.02, "sam_adaptive": True}
    ] * 2
    optimizer.add_param_group({"params": (late := parameters(("one element",))), "sam_adaptive": False, "sam_rho": 2})
    late[0].grad = torch.ones_like(late[0])
    before = late[0].item()
    with optimizer.perturbed():
        assert late[0].item() == pytest.approx(before + 2)
        late[0].grad = torch.ones_like(late[0])
    optimizer.step()
    Schedule(optimizer, sam_rho=linear(4)).step()
    assert optimizer.param_groups[0]["sam_rho"] == pytest.approx(0.375)


def test_biases_may_be_left_as_they_are_in_the_authors_code() -> None:
    """There T is 1 for what is not called a weight; by groups, to the same numbers."""
    w, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer = ASAM(optim.SGD([{"params": [w]}, {"params": [b]}], lr=0.1), rho=0.5, eta=0.0)
    optimizer.param_groups[1]["sam_adaptive"] = False
    w.grad, b.grad = torch.tensor([1.0]), torch.tensor([4.0])
    with optimizer.perturbed():  # |Tg| = |(3, 4)| = 5; T²g = (9, 4)
        assert (w.item(), b.item()) == pytest.approx((3.9, 3.4))
        w.grad = torch.ones(1)


# --- nothing is left --------------------------------------------------------------------------------------------------


def closure_of(optimizer: Any, params: Sequence[torch.Tensor], fails_at: int = 0) -> Callable[[], Any]:
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = sum(p.abs().square().sum() for p in params)
        loss.backward()
        if calls == fails_at:
            raise KeyboardInterrupt
        return loss.detach()

    return closure


@pytest.mark.parametrize("cls", [SAM, ASAM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_parameters_come_back_to_the_last_bit(cls: Any, dtype: torch.dtype) -> None:
    """Whoever subtracts what was added, loses bits: here in most elements."""
    params = parameters(("contiguous", "transposed", "channels-last", "gaps", "offset", "0-d", "empty"), dtype=dtype)
    optimizer = cls(optim.SGD(params, lr=0.0), rho=3.0)
    before = values(params)
    optimizer.backward(closure_of(optimizer, params))
    assert_equal(values(params), before)
    norm = sum(p.grad.double().norm() ** 2 for p in params if not dtype.is_complex) ** 0.5
    steps = [(3 * p.grad / norm).to(dtype) for p in params] if norm else []
    closure_of(optimizer, params)()
    with optimizer.perturbed():
        assert not any(torch.equal(p, w) for p, w in zip(params, before, strict=True) if p.numel())
        closure_of(optimizer, params)()
    assert_equal(values(params), before)
    assert not steps or any(not torch.equal(w + e - e, w) for w, e in zip(before, steps, strict=True))


def test_an_exception_leaves_nothing() -> None:
    params = parameters()
    optimizer = SAM(optim.SGD(params, lr=0.1, momentum=0.9), rho=0.5)
    drive(optimizer, params, 1)
    before = copy.deepcopy((values(params), optimizer.state_dict()))
    for fails_at in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure_of(optimizer, params, fails_at))
        assert_equal((values(params), optimizer.state_dict()), before)
        assert not optimizer.is_perturbed
    set_gradients(params, 0)
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():  # noqa: PT012
        set_gradients(params, 1)
        raise ZeroDivisionError
    assert_equal((values(params), optimizer.state_dict()), before)
    with pytest.raises(RuntimeError, match="gradients of the perturbed parameters"):
        optimizer.step()
    optimizer.step(closure_of(optimizer, params))


def test_an_exception_on_the_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [*parameters(), *parameters(("contiguous",), dtype=torch.float32)]
    optimizer = SAM(optim.SGD(params, lr=0.1), rho=0.5)
    before, add, calls = values(params), torch._foreach_add_, 0

    def add_once(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.cuda.OutOfMemoryError
        add(*args, **kwargs)

    monkeypatch.setattr(torch, "_foreach_add_", add_once)
    set_gradients(params, 0)
    with pytest.raises(torch.cuda.OutOfMemoryError), optimizer.perturbed():
        pass
    assert calls == 2
    assert_equal(values(params), before)
    assert not optimizer.is_perturbed


def test_checkpoints_know_nothing_of_the_perturbation() -> None:
    params = parameters()
    optimizer = SAM(optim.AdamW(params, lr=0.1), rho=0.5)
    drive(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict())
    set_gradients(params, 2)
    with optimizer.perturbed():
        assert_equal(optimizer.state_dict(), before)
        assert_equal(optimizer.inner.state_dict(), before)
        set_gradients(params, 2)
    assert_equal(optimizer.state_dict(), before)


@contextmanager
def counted(shape: tuple[int, ...]) -> Iterator[Callable[[], int]]:
    def alive() -> int:
        return sum(type(x) in (torch.Tensor, nn.Parameter) and x.shape == shape for x in gc.get_objects())

    yield alive


@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_only_one_copy_of_the_parameters_while_they_are_perturbed(cls: Any) -> None:
    p = nn.Parameter(torch.randn(37, 41))
    optimizer = cls(torch.optim.SGD([p], lr=0.1))
    with counted((37, 41)) as alive:
        assert alive() == 1
        p.grad = torch.ones(37, 41)
        assert alive() == 2
        with optimizer.perturbed():
            assert alive() == 2  # p and its copy: the gradient of the first pass is gone
            p.grad = torch.ones(37, 41)
        assert alive() == 2
        optimizer.step()
        assert alive() == 2


# --- gradients that are zero, or no numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SAM, ASAM])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-39])
def test_a_gradient_of_zero_perturbs_nothing(cls: Any, size: float) -> None:
    """Nor does one whose inverse would overflow."""
    p = nn.Parameter(torch.ones(1))
    optimizer = cls(optim.SGD([p], lr=0.1))
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        p.grad = torch.full((1,), size)
        return 1.0

    assert optimizer.step(closure) == 1.0
    assert calls == 1
    assert p.item() == 1
    closure()
    with optimizer.perturbed():
        assert p.item() == 1
        closure()
    optimizer.step()
    assert p.item() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("form", ["closure", "hand"])
def test_a_norm_that_is_not_finite_is_an_error_or_skipped(value: float, form: str) -> None:
    """1e30 is finite, but its square is no float32."""
    params = parameters(dtype=torch.float32)

    def make(**settings: Any) -> tuple[SAM, Lookahead]:
        sam = SAM(optim.SGD(params, lr=0.1, momentum=0.9), rho=0.5, **settings)
        return sam, Lookahead(sam, k=5)

    def step(sam: SAM, optimizer: Any) -> Any:
        def closure() -> float:
            set_gradients(params, 0)
            params[0].grad[0, 0] = value
            return 7.0

        if form == "closure":
            return optimizer.step(closure)
        closure()
        with sam.perturbed():
            assert_equal(values(params), before[0])
            set_gradients(params, 0)  # finite this time
        return optimizer.step()

    sam, optimizer = make()
    drive(optimizer, params, 1)
    before = copy.deepcopy((values(params), optimizer.state_dict()["state"]))
    with pytest.raises(RuntimeError, match=r"^SAM: the norm of the gradients .* not finite.*nonfinite='skip'"):
        step(sam, optimizer)
    assert_equal((values(params), optimizer.state_dict()["state"]), before)

    sam, optimizer = make(nonfinite="skip")
    drive(optimizer, params, 1)
    before = copy.deepcopy((values(params), optimizer.state_dict()["state"]))
    assert step(sam, optimizer) == (7.0 if form == "closure" else None)
    assert_equal((values(params), optimizer.state_dict()["state"]), before)
    assert optimizer.skipped_steps == 1
    drive(optimizer, params, 1)
    assert optimizer.skipped_steps == 1
    assert optimizer.state[params[0]]["lookahead_step"].item() == 2


def test_the_second_gradient_is_the_inner_optimizers_business() -> None:
    params = parameters()
    optimizer = SAM(optim.SGD(params, lr=0.1, max_norm=1.0, nonfinite="raise"))
    set_gradients(params, 0)
    with optimizer.perturbed():
        set_gradients(params, 0)
        params[0].grad.fill_(math.nan)
    with pytest.raises(RuntimeError, match="SGD: the norm of the gradients is nan"):
        optimizer.step()


# --- gradient scaling -------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("form", ["closure", "hand", "unscaled by hand"])
@pytest.mark.parametrize("inner", [torch.optim.SGD, optim.SGD], ids=["torch", "schuss"])
@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_a_grad_scaler_in_both_forms(cls: Any, inner: Any, form: str) -> None:
    """Scales are powers of 2: but for steps that are skipped, the bits are those of no scaler."""
    model, oracle = network(), network()
    optimizer = cls(inner(model.parameters(), lr=0.1, momentum=0.9), model=model)
    unscaled = cls(inner(oracle.parameters(), lr=0.1, momentum=0.9), model=oracle)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    overflows = {(1, 0), (1, 1), (3, 0), (5, 1)}
    """Steps and passes whose gradients overflow."""
    for step in range(8):
        x = randn(6, 3, dtype=torch.float32, seed=step)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scaler.get_scale()))
        passes = 0

        def loss_of(net: nn.Module, x: torch.Tensor = x) -> torch.Tensor:
            return (net(x) - x.sum(1, keepdim=True)).pow(2).mean()

        def closure(step: int = step) -> torch.Tensor:
            nonlocal passes
            optimizer.zero_grad()
            loss = loss_of(model)
            scaler.scale(loss * (math.inf if (step, passes) in overflows else 1)).backward()
            passes += 1
            return loss.detach()

        if form == "closure":
            with torch.no_grad():
                expected = loss_of(model.eval() and copy.deepcopy(model).train())
            model.train()
            assert optimizer.backward(closure) == expected
        else:
            closure()
            with optimizer.perturbed():
                closure()
        if form == "unscaled by hand":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if {(step, 0), (step, 1)} & overflows:
            after = model.state_dict()
            for name, p in model.named_parameters():
                assert_equal(after[name], before[0][name])
                assert torch.isfinite(p).all()
            assert_equal(optimizer.state_dict(), before[1])
            assert scaler.get_scale() == before[2] / 2
            oracle.load_state_dict(after)  # its statistics have seen the batch
        else:
            unscaled.step(lambda loss_of=loss_of: _backward(loss_of(oracle), unscaled))
        assert_equal(values([*model.parameters()]), values([*oracle.parameters()]), f"step {step}")
    assert optimizer.skipped_steps == 0


def _backward(loss: torch.Tensor, optimizer: Any) -> torch.Tensor:
    optimizer.zero_grad()
    loss.backward()
    return loss.detach()


def test_a_scaler_that_is_not_enabled() -> None:
    params = parameters()
    optimizer = SAM(torch.optim.SGD(params, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    set_gradients(params, 0)
    second_pass(optimizer)
    before = values(params)
    scaler.step(optimizer)
    assert not torch.equal(params[0], before[0])


def test_a_scaler_cannot_step_with_a_closure() -> None:
    params = parameters()
    optimizer = SAM(optim.SGD(params, lr=0.1))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match=r"write optimizer\.backward\(closure\), then scaler\.step\(optimizer\)"):
        scaler.step(optimizer, lambda: 1.0)


# --- buffers ----------------------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """Every kind of module whose forward pass writes buffers, by torch or by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
        self.plain = nn.BatchNorm1d(6)
        self.cumulative = nn.BatchNorm1d(6, momentum=None)
        self.instance = nn.InstanceNorm1d(6, track_running_stats=True)
        self.frozen = nn.BatchNorm1d(6).eval()
        self.register_buffer("replaced", torch.zeros(6))
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cumulative(self.plain(self.linear(x)))
        x = self.frozen(self.instance(x.view(2, -1, 6).transpose(1, 2)).transpose(1, 2).reshape(-1, 6))
        self.replaced = self.replaced + x.detach().mean(0)
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_statistics_come_from_the_first_pass(fails: bool) -> None:
    torch.manual_seed(0)
    model = Statistics()
    optimizer = SAM(optim.SGD(model.parameters(), lr=0.1), rho=1.0, model=model)
    once = copy.deepcopy(model)
    x = randn(8, 4, dtype=torch.float32)
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    once(x)
    passes = 0

    def closure() -> torch.Tensor:
        nonlocal passes
        passes += 1
        loss = _backward(model(x).pow(3).sum(), optimizer)
        if fails and passes == 2:
            raise ZeroDivisionError
        return loss

    if fails:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
    assert passes == 2
    assert_equal(dict(model.named_buffers()), dict(once.named_buffers()))
    assert model.plain.num_batches_tracked.item() == 1
    for name, module in model.named_modules():
        for key, value in modules[name].items():
            if isinstance(value, (bool, int, float, type(None))):
                assert vars(module)[key] == value


def test_without_the_model_statistics_are_of_both_passes() -> None:
    model, told = network(), network()
    for net, settings_ in ((model, {}), (told, {"model": told})):
        optimizer = SAM(optim.SGD(net.parameters(), lr=0.1), **settings_)
        x = randn(6, 3, dtype=torch.float32)
        optimizer.step(lambda net=net, optimizer=optimizer, x=x: _backward(net(x).pow(2).sum(), optimizer))
    assert (model[1].num_batches_tracked.item(), told[1].num_batches_tracked.item()) == (2, 1)
    assert_equal(values([*model.parameters()]), values([*told.parameters()]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_their_model(duplicate: Any) -> None:
    model = network()
    optimizer = SAM(optim.SGD(model.parameters(), lr=0.1), model=model, nonfinite="skip")
    twin, other = duplicate((optimizer, model))
    x = randn(6, 3, dtype=torch.float32)
    twin.step(lambda: _backward(other(x).pow(2).sum(), twin))
    assert other[1].num_batches_tracked.item() == 1
    assert model[1].num_batches_tracked.item() == 0
    assert twin._nonfinite == "skip"


# --- kinds of gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype, adaptive: bool) -> None:
    """Sums of 250,000 squares would stop growing at 256 in bfloat16, and overflow in float16."""
    p = nn.Parameter(randn(500, 500, dtype=dtype))
    p.grad = randn(500, 500, dtype=dtype, seed=1) * 4
    optimizer = SAM(optim.SGD([p], lr=0.1), rho=100.0, adaptive=adaptive, eta=0.25)
    w, g = p.detach().double(), p.grad.double()
    t = w.abs() + 0.25 if adaptive else torch.ones_like(w)
    expected = w + 100 * t * t * g / (t * g).norm()
    with optimizer.perturbed():
        torch.testing.assert_close(p.detach().double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=3e-5)
        p.grad = torch.zeros_like(p)


def test_the_norm_is_that_of_all_dtypes_together() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
    params = [nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in dtypes]
    optimizer = SAM(optim.SGD(params, lr=0.1), rho=1.0)
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    with optimizer.perturbed():
        assert [p.item() for p in params] == [0.5] * 4
        for p in params:
            p.grad = torch.ones_like(p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_norm_is_that_of_all_devices_together() -> None:
    params = [nn.Parameter(torch.zeros(1, device=device)) for device in ("cpu", "cuda")]
    optimizer = SAM(torch.optim.SGD(params, lr=0.1), rho=5.0)
    params[0].grad, params[1].grad = torch.full((1,), 3.0), torch.full((1,), 4.0, device="cuda")
    with optimizer.perturbed():
        assert [p.item() for p in params] == [3, 4]
        params[0].grad = torch.ones(1)


def test_parameters_without_a_gradient_stay() -> None:
    params = parameters()
    optimizer = SAM(optim.SGD(params, lr=0.1), rho=0.5)
    set_gradients(params, 0)
    params[1].grad = None
    version = params[1]._version
    with optimizer.perturbed():
        params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert params[1]._version == version


@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_sparse_gradients_move_their_rows(cls: Any) -> None:
    sparse, dense = (nn.Embedding(6, 2, sparse=kind) for kind in (True, False))
    dense.load_state_dict(sparse.state_dict())
    optimizers = [cls(optim.SGD(e.parameters(), lr=0.1), rho=0.7) for e in (sparse, dense)]
    start = sparse.weight.detach().clone()
    for index in ([1, 1, 3], [0, 3, 5]):
        for e, optimizer in zip((sparse, dense), optimizers, strict=True):
            optimizer.step(
                lambda e=e, o=optimizer, i=index: _backward(e(torch.tensor(i)).pow(3).sum(), o)  # type: ignore[misc]
            )
        torch.testing.assert_close(sparse.weight, dense.weight, rtol=1e-6, atol=1e-7)
    assert_equal(sparse.weight[2].detach(), start[2])
    assert not torch.equal(sparse.weight[3], start[3])


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_layouts_are_an_error() -> None:
    p = nn.Parameter(torch.eye(3).to_sparse_csr())
    optimizer = SAM(Lazy([p]))
    p.grad = torch.eye(3).to_sparse_csr()
    with pytest.raises(RuntimeError, match=r"SAM: a gradient must be dense, or sparse of layout torch\.sparse_coo"):
        optimizer.perturbed().__enter__()
    assert not optimizer.is_perturbed


# --- what stands around the step --------------------------------------------------------------------------------------


def test_a_closure_can_tell_which_pass_it_is_in() -> None:
    params = parameters()
    optimizer = SAM(optim.SGD(params, lr=0.1))
    seen = []

    def closure() -> Any:
        seen.append(optimizer.is_perturbed)
        return closure_of(optimizer, params)()

    optimizer.step(closure)
    assert seen == [False, True]
    assert not optimizer.is_perturbed


def test_clipping_is_of_the_second_gradient() -> None:
    """In the step, or between the passes and the step, to the same numbers."""
    problem = Problem()
    ours, theirs = problem.parameters(), problem.parameters()
    inside = SAM(optim.SGD(ours, lr=0.1, max_norm=0.1))
    between = SAM(optim.SGD(theirs, lr=0.1))
    for _ in range(4):
        inside.step(problem.closure(inside, ours))
        between.backward(problem.closure(between, theirs))
        schuss.clip_grad_norm_(theirs, 0.1)
        between.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["closure", "hand"])
def test_accumulated_gradients_are_those_of_the_large_batch(form: str) -> None:
    x, y = randn(10, 3), randn(10, 1)
    ours, theirs = (nn.Linear(3, 1).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    a, b = (SAM(optim.AdamW(model.parameters(), lr=0.1), rho=0.5) for model in (ours, theirs))
    micro = [*zip(x.split([4, 4, 2]), y.split([4, 4, 2]), strict=True)]

    def gradients() -> torch.Tensor:
        for window in schuss.accumulate(micro, steps=len(micro)):
            for xi, yi in window:
                window.backward(nn.functional.mse_loss(ours(xi), yi))
        return window.loss

    for _ in range(3):
        a.zero_grad()
        if form == "closure":
            loss = a.step(gradients)
            assert loss == pytest.approx(nn.functional.mse_loss(theirs(x), y).item())
        else:
            gradients()
            with a.perturbed():
                gradients()
            a.step()
        b.step(lambda: _backward(nn.functional.mse_loss(theirs(x), y), b))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_window_of_micro_batches_cannot_be_used_for_both_passes() -> None:
    model = nn.Linear(3, 1)
    optimizer = SAM(optim.SGD(model.parameters(), lr=0.1))
    window = next(iter(schuss.accumulate([torch.ones(2, 3)] * 2, steps=2)))

    def gradients() -> torch.Tensor:
        for x in window:
            window.backward(model(x).sum())
        return window.loss

    before = values([*model.parameters()])
    with pytest.raises(RuntimeError, match="loop over it once"):
        optimizer.step(gradients)
    assert_equal(values([*model.parameters()]), before)


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: Lookahead(o)], ids=["SAM", "Lookahead"])
def test_fit_refuses_it(wrap: Any) -> None:
    model = nn.Linear(3, 1)
    optimizer = wrap(SAM(optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(
        TypeError, match=r"fit: .* evaluates the loss several times in a step, and fit once; write the loop"
    ):
        schuss.fit(model, [(torch.ones(2, 3), torch.ones(2, 1))], nn.functional.mse_loss, optimizer, epochs=1)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_step_that_would_be_one_of_the_inner_optimizer_is_an_error() -> None:
    params = parameters()
    optimizer = Lookahead(SAM(optim.SGD(params, lr=0.1)))
    before = values(params)
    for value in (1.0, math.nan):
        params[0].grad = torch.full_like(params[0], value)
        with pytest.raises(RuntimeError, match=r"SAM: step\(\) takes gradients of the perturbed.*step\(closure\)"):
            optimizer.step()
    assert_equal(values(params), before)
    second_pass(optimizer)
    optimizer.zero_grad()
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="gradients of the perturbed"):
        optimizer.step()
    second_pass(optimizer)
    params[0].grad = torch.full_like(params[0], math.nan)
    second_pass(optimizer)
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert_equal(values(params), before)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="gradients of the perturbed"):
        optimizer.step()
    second_pass(optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match="gradients of the perturbed"):
        optimizer.step()


def test_blocks_in_the_wrong_place_are_errors() -> None:
    params = parameters()
    optimizer = SAM(optim.SGD(params, lr=0.1))
    with pytest.raises(RuntimeError, match=r"perturbed\(\) needs the gradients"), optimizer.perturbed():
        pass
    set_gradients(params, 0)
    before = values(params)
    with optimizer.perturbed():
        there = values(params)
        with pytest.raises(RuntimeError, match="leave the inner"), optimizer.perturbed():
            pass
        with pytest.raises(RuntimeError, match="a step would be undone"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"call backward\(closure\) before or after"):
            optimizer.backward(lambda: 1.0)
        assert_equal(values(params), there)
        set_gradients(params, 0)
    assert_equal(values(params), before)
    with pytest.raises(RuntimeError, match=r"perturbed\(\) has seen no backward pass"), optimizer.perturbed():
        pass
    assert_equal(values(params), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(rho=-0.1), ValueError, r"^SAM: rho must be in \[0, inf\), got -0\.1$"),
        (dict(rho=math.inf), ValueError, r"rho must be in \[0, inf\), got inf"),
        (dict(rho="0.1"), TypeError, r"rho must be a number in \[0, inf\), got '0\.1'"),
        (dict(rho=nn.Linear(1, 1)), TypeError, r"rho must be a number"),
        (dict(eta=-1.0), ValueError, r"^SAM: eta must be in \[0, inf\), got -1\.0$"),
        (dict(eta=math.nan), ValueError, r"eta must be in \[0, inf\), got nan"),
        (dict(adaptive=1), TypeError, r"^SAM: adaptive must be True or False, got 1$"),
        (dict(model=[]), TypeError, r"^SAM: model must be a torch\.nn\.Module or None, got list$"),
        (dict(nonfinite="propagate"), ValueError, r"nonfinite must be one of raise, skip, got 'propagate'"),
    ],
    ids=str,
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    inner = optim.SGD(parameters())
    with pytest.raises(error, match=message):
        SAM(inner, **arguments)
    assert "sam_rho" not in inner.param_groups[0]


def test_groups_out_of_bounds_are_an_error() -> None:
    optimizer = ASAM(optim.SGD(parameters()))
    late = parameters(("0-d",))
    for key, value, message in (("sam_rho", -1, r"ASAM: rho must"), ("sam_adaptive", None, r"ASAM: adaptive must")):
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group({"params": late, key: value})
    assert len(optimizer.param_groups) == 1


def test_exported() -> None:
    assert schuss.SAM is SAM
    assert schuss.ASAM is ASAM
