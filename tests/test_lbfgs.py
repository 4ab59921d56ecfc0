"""LBFGS: torch's trajectory, the numbers of its theory, and what torch's does not do."""

import copy
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lbfgs import _strong_wolfe as torch_strong_wolfe

import schuss
from cases import assert_equal, randn
from schuss import describe, optim
from schuss.optim.lbfgs import Point, strong_wolfe

Params = list[torch.nn.Parameter]
Loss = Callable[[Params], torch.Tensor]


def rosenbrock(params: Params) -> torch.Tensor:
    (x,) = params
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(params: Params) -> torch.Tensor:
    x = torch.cat([p.reshape(-1) for p in params])
    return 0.5 * (torch.linspace(1, 30, len(x), dtype=x.dtype) * x * x).sum() + x.sum()


def logistic(params: Params) -> torch.Tensor:
    w, b = params
    x, y = randn(40, 5, seed=5).to(w.dtype), (torch.arange(40) % 3 == 0).to(w.dtype)
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, y) + 0.01 * (w @ w)


def network(params: Params) -> torch.Tensor:
    w1, b1, w2 = params
    x = randn(20, 3, seed=6).to(w1.dtype)
    return ((torch.tanh(x @ w1 + b1) @ w2 - x.sin().sum(1, keepdim=True)) ** 2).mean()


def of_complex(params: Params) -> torch.Tensor:
    """Real numbers beside complex ones; the gradient of a real function of z = a + ib."""
    z, r = params
    target = torch.arange(1, 5).to(z.dtype) * (1 - 2j)
    scale = torch.tensor([1.0, 3.0, 0.3, 5.0], dtype=r.dtype)
    return (scale * ((z - target).abs() ** 2 + 0.1 * (z.real * z.imag) ** 2)).sum() + ((r - z.real.sum()) ** 2).sum()


PROBLEMS: dict[str, tuple[Loss, list[tuple[int, ...]]]] = {
    "rosenbrock": (rosenbrock, [(2,)]),
    "rosenbrock of 7": (rosenbrock, [(7,)]),
    "quadratic": (quadratic, [(4, 3), (), (0,), (5,)]),
    "logistic": (logistic, [(5,), (1,)]),
    "network": (network, [(3, 6), (6,), (6, 1)]),
}
FORMS: list[dict[str, Any]] = [
    dict(lr=0.05),
    dict(lr=0.05, history_size=2, max_iter=7),
    dict(lr=0.3, max_iter=1),
    dict(lr=0.05, max_iter=30, max_eval=5),
    dict(lr=0.1, max_iter=30, tolerance_grad=1e-1),
    dict(lr=0.1, max_iter=30, tolerance_change=1e-2),
    dict(line_search_fn="strong_wolfe"),
    dict(line_search_fn="strong_wolfe", history_size=2),
    dict(line_search_fn="strong_wolfe", lr=0.1, max_iter=5),
    dict(line_search_fn="strong_wolfe", lr=20, max_iter=10, max_eval=7),
    dict(line_search_fn="strong_wolfe", max_iter=1),
    dict(line_search_fn="strong_wolfe", tolerance_grad=1e-2, tolerance_change=1e-4),
    dict(line_search_fn="strong_wolfe", tolerance_grad=-1, tolerance_change=-1, max_iter=6),
]


def named(form: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in form.items())


def start(problem: str, dtype: torch.dtype = torch.float64) -> tuple[Loss, Params]:
    loss, shapes = PROBLEMS[problem]
    return loss, [torch.nn.Parameter(randn(*shape, seed=i + 1, dtype=dtype)) for i, shape in enumerate(shapes)]


def closure_of(optimizer: torch.optim.Optimizer, loss: Loss, params: Params) -> Callable[[], torch.Tensor]:
    """As users write it."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(params)
        value.backward()
        return value

    return closure


def kept(optimizer: Any) -> dict[str, Any]:
    """The state, in torch's form."""
    entries = (optimizer.state_dict(portable=True) if isinstance(optimizer, optim.LBFGS) else optimizer.state_dict())[
        "state"
    ]
    return {key: value for key, value in entries.get(0, {}).items() if key != "al"}


def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """Of each group."""
    arguments = [name for name in inspect.signature(optim.LBFGS).parameters if name != "params"]
    return [{name: group[name] for name in arguments} for group in optimizer.param_groups]


def lockstep(
    ours: Any, theirs: Any, loss: Loss, our_params: Params, their_params: Params, steps: int, *, tolerance: float
) -> None:
    """Step both; losses, parameters, counts and state agree after each."""
    for step in range(steps):
        a = ours.step(closure_of(ours, loss, our_params))
        b = theirs.step(closure_of(theirs, loss, their_params))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for p, q in zip(our_params, their_params, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, s=step: f"step {s}: {m}")
        mine, other = kept(ours), kept(theirs)
        for key in ("func_evals", "n_iter"):
            assert mine[key] == other[key], f"step {step}: {key}"
        if "d" in other:
            assert set(mine) == set(other)
            for key in ("old_dirs", "old_stps", "ro"):
                assert len(mine[key]) == len(other[key]), f"step {step}: {key}"


# --- against torch ----------------------------------------------------------------------------------------------------


def test_the_signature_and_the_groups_are_torchs() -> None:
    ours, theirs = (inspect.signature(library.LBFGS).parameters for library in (optim, torch.optim))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    a, b = (library.LBFGS([torch.nn.Parameter(torch.ones(2))], max_iter=9) for library in (optim, torch.optim))
    assert a.state_dict() == b.state_dict()
    assert isinstance(a, torch.optim.Optimizer)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("form", FORMS, ids=named)
def test_the_trajectory_is_torchs(problem: str, form: dict[str, Any]) -> None:
    made = []
    for library in (optim, torch.optim):
        loss, params = start(problem)
        made.append((library.LBFGS(params, **form), params))
    (ours, our_params), (theirs, their_params) = made
    never_ends = form.get("tolerance_change", 0) < 0  # at a minimum the last bits decide
    lockstep(ours, theirs, loss, our_params, their_params, 2 if never_ends else 4, tolerance=1e-7)


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_float32(form: dict[str, Any]) -> None:
    """On a loss that does not blow up the last bit, in which the line searches differ: torch's reckons in float32."""
    made = []
    for library in (optim, torch.optim):
        loss, params = start("logistic", torch.float32)
        made.append((library.LBFGS(params, **form | {"tolerance_change": 1e-5}), params))
    (ours, our_params), (theirs, their_params) = made
    for _ in range(3):
        a = ours.step(closure_of(ours, loss, our_params))
        b = theirs.step(closure_of(theirs, loss, their_params))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(our_params, their_params, rtol=1e-2, atol=1e-2)
    assert ours.state[our_params[0]]["d"].dtype == torch.float32


def test_float32_without_a_search_has_torchs_bits() -> None:
    made = []
    for library in (optim, torch.optim):
        loss, params = start("rosenbrock", torch.float32)
        made.append((library.LBFGS(params, lr=0.05, history_size=3), params))
    (ours, our_params), (theirs, their_params) = made
    lockstep(ours, theirs, loss, our_params, their_params, 3, tolerance=0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_complex_parameters(dtype: torch.dtype, search: str | None) -> None:
    made = []
    for library in (optim, torch.optim):
        params = [torch.nn.Parameter(randn(4, dtype=dtype)), torch.nn.Parameter(randn(2, dtype=dtype).real.clone())]
        made.append((library.LBFGS(params, lr=1 if search else 0.05, line_search_fn=search, max_iter=8), params))
    (ours, our_params), (theirs, their_params) = made
    tolerance = 1e-3 if dtype == torch.complex64 else 1e-9
    lockstep(ours, theirs, of_complex, our_params, their_params, 3, tolerance=tolerance)


def test_a_tensor_as_lr() -> None:
    loss, params = start("logistic")
    _, twins = start("logistic")
    a, b = optim.LBFGS(params, lr=torch.tensor(0.5)), optim.LBFGS(twins, lr=0.5)
    a.step(closure_of(a, loss, params))
    b.step(closure_of(b, loss, twins))
    assert_equal(params, twins)


def test_schedulers_drive_it() -> None:
    made = []
    for library in (optim, torch.optim):
        loss, params = start("network")
        optimizer = library.LBFGS(params, lr=0.1, max_iter=3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for _ in range(6):
            optimizer.step(closure_of(optimizer, loss, params))
            schedule.step()
        made.append(params)
    torch.testing.assert_close(made[0], made[1], rtol=1e-9, atol=1e-9)


STARTS = [(-1.2, 1.0), (0.0, 0.0), (2.0, -2.0), (-3.0, 4.0), (10.0, 10.0)]


@pytest.mark.parametrize("begin", STARTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rosenbrock_takes_no_more_calls_than_torch(begin: tuple[float, float], dtype: torch.dtype) -> None:
    calls = []
    for library in (optim, torch.optim):
        x = torch.nn.Parameter(torch.tensor(begin, dtype=dtype))
        optimizer = library.LBFGS([x], line_search_fn="strong_wolfe", max_iter=200)
        closure = closure_of(optimizer, rosenbrock, [x])
        while optimizer.state[x].get("func_evals", 0) < 1000 and rosenbrock([x]) > 1e-8:
            optimizer.step(closure)
        calls.append(optimizer.state[x]["func_evals"])
        torch.testing.assert_close(x.detach(), torch.ones_like(x), rtol=0, atol=1e-3)
    assert calls[0] <= calls[1]
    assert calls[0] < 100


# --- numbers ----------------------------------------------------------------------------------------------------------


def inverse_hessian(old_dirs: Sequence[Any], old_stps: Sequence[Any]) -> np.ndarray[Any, Any]:
    """H as a matrix: the product form of BFGS, from the oldest pair to the newest."""
    y, s = (np.array([row.numpy() for row in rows]) for rows in (old_dirs, old_stps))
    identity = np.eye(y.shape[1])
    h = (s[-1] @ y[-1]) / (y[-1] @ y[-1]) * identity
    for a, b in zip(y, s, strict=True):
        v = identity - np.outer(b, a) / (b @ a)
        h = v @ h @ v.T + np.outer(b, b) / (b @ a)
    return h


@pytest.mark.parametrize("history_size", [1, 2, 5, 100])
@pytest.mark.parametrize("problem", ["rosenbrock of 7", "network"])
def test_the_direction_is_that_of_the_matrix(problem: str, history_size: int) -> None:
    """And H y = s for the newest pair."""
    loss, params = start(problem)
    optimizer = optim.LBFGS(params, line_search_fn="strong_wolfe", history_size=history_size, max_iter=9)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss, params))
    state = kept(optimizer)
    assert len(state["old_dirs"]) == min(history_size, state["n_iter"] - 1)
    h = inverse_hessian(state["old_dirs"], state["old_stps"])
    np.testing.assert_allclose(state["d"].numpy(), -h @ state["prev_flat_grad"].numpy(), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(h @ state["old_dirs"][-1].numpy(), state["old_stps"][-1].numpy(), atol=1e-12)
    for y, s, rho in zip(state["old_dirs"], state["old_stps"], state["ro"], strict=True):
        assert rho.item() == pytest.approx(1 / (y @ s).item(), rel=1e-14)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_exact_steps_solve_a_quadratic_of_n_numbers_in_n(n: int) -> None:
    """With exact steps its directions are conjugate: after n of them the gradient is zero."""
    a = randn(n, n, seed=3)
    a = a @ a.T + torch.eye(n, dtype=torch.float64)
    b, x = randn(n, seed=4), torch.nn.Parameter(randn(n, seed=5))
    optimizer = optim.LBFGS([x], max_iter=1, tolerance_grad=-1, tolerance_change=-1)
    closure = closure_of(optimizer, lambda p: 0.5 * p[0] @ a @ p[0] - b @ p[0], [x])
    begin = (a @ x.detach() - b).norm().item()
    twin = copy.deepcopy(optimizer)
    y = twin.param_groups[0]["params"][0]
    twin_closure = closure_of(twin, lambda p: 0.5 * p[0] @ a @ p[0] - b @ p[0], [y])
    for k in range(n):
        twin.load_state_dict(optimizer.state_dict())
        with torch.no_grad():
            y.copy_(x)
        before = y.detach().clone()
        twin.param_groups[0]["lr"] = 1.0
        twin.step(twin_closure)  # it shows where the next step leads, for an lr of 1
        d, g = y.detach() - before, a @ before - b
        optimizer.param_groups[0]["lr"] = float(-(g @ d) / (d @ a @ d))
        optimizer.step(closure)
        residual = (a @ x.detach() - b).norm().item()
        assert (residual < 1e-9 * begin) == (k == n - 1), f"after {k + 1} steps: {residual / begin:.1e}"


def polynomial(coefficients: Sequence[float]) -> Callable[[float], tuple[float, float]]:
    value, slope = np.polynomial.Polynomial(coefficients), np.polynomial.Polynomial(coefficients).deriv()
    return lambda t: (float(value(t)), float(slope(t)))


numbers = st.floats(-5, 5).map(lambda x: round(x, 3))


@example(0.0, -1.0, 0.0, -2.0, 1.0, 1.0, 4)  # the cubic through 0 and 1 has no curvature left to divide by
@settings(max_examples=150, deadline=None)
@given(numbers, st.floats(-5, -0.01), numbers, numbers, st.floats(0.01, 5), st.floats(0.01, 20), st.integers(1, 25))
def test_the_line_search_is_torchs_and_keeps_its_promise(
    c0: float, c1: float, c2: float, c3: float, c4: float, first: float, limit: int
) -> None:
    """On polynomials of fourth degree that rise in the end."""
    f = polynomial([c0, c1, c2, c3, c4])

    def at(t: float) -> Point:
        return Point(t, *f(t), torch.zeros(1))

    def of_torch(x: float, t: Any, d: Any) -> tuple[float, torch.Tensor]:
        value, slope = f(float(t))
        return value, torch.tensor([slope], dtype=torch.float64)

    d = torch.ones(1, dtype=torch.float64)
    point, calls = strong_wolfe(at, at(0.0), first, 1.0, 1e-9, limit)
    loss, _, t, their_calls = torch_strong_wolfe(
        of_torch, 0.0, first, d, c0, torch.tensor([c1], dtype=torch.float64), torch.tensor(c1, dtype=torch.float64),
        tolerance_change=1e-9, max_ls=limit,
    )  # fmt: skip
    assert calls == their_calls <= limit + 1
    assert point.t == pytest.approx(float(t), rel=1e-6, abs=1e-9)
    assert point.loss == pytest.approx(loss, rel=1e-6, abs=1e-9)
    if calls < limit:
        assert point.loss <= c0 + 1e-4 * point.t * c1 + 1e-12
        assert abs(point.slope) <= 0.9 * abs(c1) + 1e-6
    assert point.loss <= c0


@settings(max_examples=100, deadline=None)
@given(st.floats(-10, -0.1), st.floats(0.5, 30), st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(1e-3, 100))
def test_the_line_search_turns_back_from_what_is_no_number(
    slope: float, bend: float, beyond: float, edge: float
) -> None:
    """A parabola that ends at an edge: what comes back is finite, and lower if a step before the edge is lower."""

    def at(t: float) -> Point:
        if t < edge:
            return Point(t, slope * t + bend * t * t / 2, slope + bend * t, torch.zeros(1))
        return Point(t, math.inf, beyond, torch.zeros(1))

    point, calls = strong_wolfe(at, at(0.0), 1.0, 1.0, 1e-9, 40)
    assert point.t < edge
    assert point.loss < 0
    assert calls <= 41


# --- what is no number ------------------------------------------------------------------------------------------------


def barrier(params: Params) -> torch.Tensor:
    """Lowest at 1e-3 for each, NaN below 0: a Newton-like step from 1 leads there."""
    return (1e3 * params[0] - params[0].log()).sum()


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_a_search_turns_back_from_a_barrier(beyond: float) -> None:
    x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = optim.LBFGS([x], lr=10, line_search_fn="strong_wolfe", max_iter=50)
    met = []

    def loss(params: Params) -> torch.Tensor:
        value = barrier(params)
        met.append(bool(value.isnan()))
        return torch.where(value.isnan(), torch.full_like(value, beyond), value)

    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss, [x]))
    assert any(met)
    torch.testing.assert_close(x.detach(), torch.full_like(x, 1e-3), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_where_nothing_further_along_is_a_number_parameters_stay(search: str | None) -> None:
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optim.LBFGS([x], lr=0.5, line_search_fn=search)
    before = x.detach().clone()
    closure = closure_of(optimizer, lambda p: p[0].sum() * (1.0 if torch.equal(p[0], before) else math.nan), [x])
    hint = "try a smaller lr$" if search else "smaller lr or line_search_fn='strong_wolfe'$"
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=f"LBFGS: the loss or its gradient is not finite further.*{hint}") as w:
            assert optimizer.step(closure).item() == 3.0
        assert w[0].filename == __file__
        assert torch.equal(x, before)
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in optimizer.state[x].values())


def test_it_recovers_once_the_loss_is_a_number_again() -> None:
    x = torch.nn.Parameter(randn(4))
    optimizer, broken = optim.LBFGS([x], line_search_fn="strong_wolfe", max_iter=2), [False]
    closure = closure_of(optimizer, lambda p: quadratic(p) * (math.nan if broken[0] else 1.0), [x])
    optimizer.step(closure)
    broken[0] = True
    before, state = x.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"][0])
    assert optimizer.step(closure).isnan()  # told by what is returned, so without a warning
    assert torch.equal(x, before)
    assert_equal(optimizer.state_dict()["state"][0], state | {"func_evals": state["func_evals"] + 1})
    broken[0] = False
    for _ in range(10):
        optimizer.step(closure)
    torch.testing.assert_close(x.detach(), -1 / torch.linspace(1, 30, 4, dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_gradient_that_is_no_number_is_told() -> None:
    x = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = optim.LBFGS([x])
    closure = closure_of(optimizer, lambda p: p[0].sqrt().sum(), [x])
    with pytest.warns(RuntimeWarning, match="LBFGS: the loss is 1, but its gradient is not finite"):
        optimizer.step(closure)
    assert_equal(x.detach(), torch.tensor([0.0, 1.0]))


def test_a_direction_that_overflows_is_replaced_by_the_gradient() -> None:
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optim.LBFGS([x], max_iter=1, lr=1e-3)
    closure = closure_of(optimizer, quadratic, [x])
    for _ in range(3):
        optimizer.step(closure)
    optimizer.state[x]["old_stps"].fill_(1e30)
    before = x.detach().clone()
    optimizer.step(closure)
    g = torch.tensor([1.0, 30.0]) * before + 1
    torch.testing.assert_close(x.detach(), before - 1e-3 * g / g.abs().sum())
    assert optimizer.state[x]["pairs"] == 0


def test_a_gradient_whose_square_overflows_is_told() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.LBFGS([x])
    with pytest.warns(RuntimeWarning, match="LBFGS: the square of the gradient overflows its dtype"):
        optimizer.step(closure_of(optimizer, lambda p: 1e25 * p[0].sum(), [x]))
    assert_equal(x.detach(), torch.ones(2))


# --- a closure that raises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("history_size", [2, 100])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_closure_that_raises_leaves_everything_as_it_was(
    search: str | None, history_size: int, before: int, error: type[BaseException]
) -> None:
    """At whichever of its calls: afterwards it goes on with the bits of the twin that was not interrupted."""
    loss, params = start("network")
    form = dict(lr=1 if search else 0.1, line_search_fn=search, history_size=history_size, max_iter=6)
    optimizer = optim.LBFGS(params, **form)
    calls, stop = [0], [0]

    def interrupted(params: Params) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == stop[0]:
            raise error
        return loss(params)

    closure = closure_of(optimizer, interrupted, params)
    for _ in range(before):
        optimizer.step(closure)
    values = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())
    for at in range(1, 6):
        calls[0], stop[0] = 0, at
        with pytest.raises(error):
            optimizer.step(closure)
        assert_equal([p.detach() for p in params], values)
        assert_equal(optimizer.state_dict(), state)
        assert bool(optimizer.state) == bool(before)
    stop[0] = 0
    _, twins = start("network")
    twin = optim.LBFGS(twins, **form)
    for _ in range(before + 2):
        twin.step(closure_of(twin, loss, twins))
    for _ in range(2):
        optimizer.step(closure)
    assert_equal(params, twins)
    assert_equal(optimizer.state_dict(), twin.state_dict())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("form", [FORMS[1], FORMS[7], FORMS[0], FORMS[6]], ids=named)
@pytest.mark.parametrize("problem", ["network", "rosenbrock of 7"])
@pytest.mark.parametrize("to_torch", [True, False], ids=["to torch", "from torch"])
def test_checkpoints_are_exchanged_with_torch(problem: str, form: dict[str, Any], to_torch: bool) -> None:
    """In mid-run, with rings that have gone round or not: the other goes on with the same numbers."""
    source, target = (optim, torch.optim) if to_torch else (torch.optim, optim)
    loss, params = start(problem)
    optimizer = source.LBFGS(params, **form)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss, params))
    saved = through_a_file(optimizer.state_dict(portable=True) if to_torch else optimizer.state_dict())
    _, others = start(problem)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    other = target.LBFGS(others)
    other.load_state_dict(saved)
    assert kept(other)["n_iter"] == kept(optimizer)["n_iter"] > 1
    ours, theirs = (optimizer, other) if to_torch else (other, optimizer)
    mine, their = (params, others) if to_torch else (others, params)
    lockstep(ours, theirs, loss, mine, their, 2, tolerance=1e-7)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("history_size", [2, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16], ids=str)
def test_resuming_is_not_stopping(portable: bool, history_size: int, dtype: torch.dtype) -> None:
    x = torch.nn.Parameter(randn(6, dtype=dtype))

    def loss(params: Params) -> torch.Tensor:
        (x,) = params
        return quadratic([torch.view_as_real(x) if dtype.is_complex else x.float()])

    optimizer = optim.LBFGS([x], lr=0.1, history_size=history_size, max_iter=4)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss, [x]))
    y = torch.nn.Parameter(x.detach().clone())
    other = optim.LBFGS([y])
    saved = through_a_file(optimizer.state_dict(portable=portable))
    other.load_state_dict(saved)
    for p, o in ((x, optimizer), (y, other)):
        o.step(closure_of(o, loss, [p]))
    assert_equal(x.detach(), y.detach())
    assert_equal(kept(optimizer), kept(other))
    assert other.state[y]["old_dirs"].dtype == torch.float32


def test_what_is_loaded_is_copied() -> None:
    loss, params = start("network")
    optimizer = optim.LBFGS(params, lr=0.1, max_iter=4)
    optimizer.step(closure_of(optimizer, loss, params))
    for portable in (False, True):
        saved = optimizer.state_dict(portable=portable)
        before = copy.deepcopy(saved)
        other = optim.LBFGS([torch.nn.Parameter(p.detach().clone()) for p in params])
        other.load_state_dict(saved)
        other.step(closure_of(other, loss, other.param_groups[0]["params"]))
        assert_equal(saved["state"], before["state"])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_go_on_like_the_original(how: Callable[[Any], Any], steps: int) -> None:
    loss, params = start("network")
    original = optim.LBFGS(params, line_search_fn="strong_wolfe", history_size=3, max_iter=4)
    for _ in range(steps):
        original.step(closure_of(original, loss, params))
    twin = how(original)
    twins = twin.param_groups[0]["params"]
    for o, p in ((original, params), (twin, twins)):
        o.step(closure_of(o, loss, p))
    assert_equal(twins, params)
    assert_equal(twin.state_dict()["state"], original.state_dict()["state"])
    assert hyperparameters(twin) == hyperparameters(original)


class Model(torch.nn.Module):
    """The network as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1, self.w2 = start("network")[1]


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("history_size", [3, 100])
def test_distributed_checkpoint_round_trip(flatten: bool, history_size: int) -> None:
    """torch's own can neither be flattened nor be asked for a state before its first step."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = Model()
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, history_size=history_size, max_iter=5)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, network, list(model.parameters())))
    saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))

    other = Model()
    other.load_state_dict(model.state_dict())
    fresh = optim.LBFGS(other.parameters(), lr=7.0, history_size=history_size)
    before = [p.detach().clone() for p in other.parameters()]
    template = get_optimizer_state_dict(other, fresh, options=options)
    assert fresh.param_groups[0]["lr"] == 7.0

    def shapes(tree: Any) -> Any:
        """What `torch.distributed.checkpoint.load` fills in: it needs the keys and shapes that were saved."""
        if isinstance(tree, dict):
            return {key: shapes(value) for key, value in tree.items()}
        return tree.shape if isinstance(tree, torch.Tensor) else None

    part = (lambda s: s) if flatten else (lambda s: s["state"])
    assert shapes(part(template)) == shapes(part(saved))
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert_equal([p.detach() for p in other.parameters()], before)
    for m, o in ((model, optimizer), (other, fresh)):
        o.step(closure_of(o, network, list(m.parameters())))
    assert_equal(list(other.parameters()), list(model.parameters()))
    assert_equal(fresh.state_dict()["state"], optimizer.state_dict()["state"])
    assert hyperparameters(fresh) == hyperparameters(optimizer)


def test_in_a_wrapper_it_is_loaded_too() -> None:
    """Lookahead round ours makes the steps of Lookahead round torch's, and goes on after loading."""
    made = []
    for library in (optim, torch.optim):
        loss, params = start("network")
        optimizer = schuss.Lookahead(library.LBFGS(params, lr=0.1, max_iter=3), k=2)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, loss, params))
        made.append((optimizer, params))
    (ours, params), (_, theirs) = made
    torch.testing.assert_close(params, theirs, rtol=1e-9, atol=1e-9)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = schuss.Lookahead(optim.LBFGS(twins), k=2)
    other.load_state_dict(through_a_file(ours.state_dict()))
    for o, p in ((ours, params), (other, twins)):
        o.step(closure_of(o, loss, p))
    assert_equal(twins, params)


def test_named_parameters_in_another_order_are_refused() -> None:
    model = Model()
    optimizer = optim.LBFGS(model.named_parameters(), lr=0.1)
    optimizer.step(closure_of(optimizer, network, list(model.parameters())))
    other = optim.LBFGS(reversed([*Model().named_parameters()]))
    with pytest.raises(ValueError, match="LBFGS: the saved history is of the parameters in another order; make the"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    assert other.param_groups[0]["lr"] == 1


def test_a_state_of_another_length_is_refused() -> None:
    loss, params = start("network")
    saved = []
    for library in (optim, torch.optim):
        optimizer = library.LBFGS(params, lr=0.1, max_iter=3)
        optimizer.step(closure_of(optimizer, loss, params))
        saved.append(optimizer.state_dict())
    for state_dict in saved:
        other = optim.LBFGS([torch.nn.Parameter(torch.ones(n)) for n in (2, 3, 4)])
        with pytest.raises(ValueError, match=r"LBFGS: 'd' of the state has 30 elements, all .* together have 9"):
            other.load_state_dict(state_dict)
        assert not other.state
        assert other.param_groups[0]["lr"] == 1


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_history_is_a_ring_that_stays_where_it_is() -> None:
    loss, params = start("network")
    optimizer = optim.LBFGS(params, lr=0.1, history_size=3, max_iter=5)
    optimizer.step(closure_of(optimizer, loss, params))
    state = optimizer.state[params[0]]
    rings = {key: (state[key], state[key].data_ptr()) for key in ("old_dirs", "old_stps", "ro")}
    assert state["old_dirs"].shape == (3, 30)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, loss, params))
    assert state["pairs"] > 9
    for key, (ring, address) in rings.items():
        assert optimizer.state[params[0]][key] is ring
        assert ring.data_ptr() == address


@pytest.mark.parametrize("size", [2, 4, 9])
def test_a_history_size_that_changes_keeps_the_newest_pairs(size: int) -> None:
    loss, params = start("network")
    optimizer = optim.LBFGS(params, lr=0.1, history_size=5, max_iter=5)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss, params))
    before = kept(optimizer)
    optimizer.param_groups[0] |= {"history_size": size, "max_iter": 1}
    optimizer.step(closure_of(optimizer, loss, params))
    after = kept(optimizer)
    assert len(after["old_dirs"]) == min(size, 6)
    expected = (before["old_dirs"] + after["old_dirs"][-1:])[-size:]
    assert_equal(after["old_dirs"], expected[-len(after["old_dirs"]) :])
    h = inverse_hessian(after["old_dirs"], after["old_stps"])
    np.testing.assert_allclose(after["d"].numpy(), -h @ after["prev_flat_grad"].numpy(), rtol=1e-8, atol=1e-10)


# --- parameters and groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_groups_do_not_matter(search: str | None) -> None:
    made = []
    for split in (False, True):
        loss, params = start("network")
        groups = [{"params": params[:1]}, {"params": []}, {"params": params[1:]}] if split else params
        optimizer = optim.LBFGS(groups, lr=0.5, line_search_fn=search, max_iter=6)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, loss, params))
        made.append((params, optimizer.state[params[0]]))
    assert_equal(made[0][0], made[1][0])
    assert_equal(dict(made[0][1]), dict(made[1][1]))


def test_a_group_that_is_added_starts_the_history_anew() -> None:
    x, y = (torch.nn.Parameter(randn(3, seed=s)) for s in (1, 2))
    optimizer = optim.LBFGS([x], lr=0.05, max_iter=4)
    optimizer.step(closure_of(optimizer, quadratic, [x]))
    assert optimizer.state[x]["func_evals"] == 4
    fresh_x, fresh_y = (torch.nn.Parameter(p.detach().clone()) for p in (x, y))
    optimizer.add_param_group({"params": [y]})
    fresh = optim.LBFGS([fresh_x, fresh_y], lr=0.05, max_iter=4)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, quadratic, [x, y]))
        fresh.step(closure_of(fresh, quadratic, [fresh_x, fresh_y]))
    assert_equal([x, y], [fresh_x, fresh_y])
    assert optimizer.state[x]["func_evals"] == 4 + fresh.state[fresh_x]["func_evals"]


def test_memory_layouts_and_missing_gradients() -> None:
    """Gradients that lie in memory like a transposed parameter, of which torch's takes none, count by position."""
    plain = [torch.nn.Parameter(randn(4, 6)), torch.nn.Parameter(randn(3)), torch.nn.Parameter(randn(2))]
    strange = [torch.nn.Parameter(plain[0].detach().t().contiguous().t()), *map(copy.deepcopy, plain[1:])]
    gaps = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64)[:, 1].detach())
    with torch.no_grad():
        strange[1] = gaps
        gaps.copy_(plain[1])
    assert not strange[0].is_contiguous()
    for params in (plain, strange):
        optimizer = optim.LBFGS(params, line_search_fn="strong_wolfe", max_iter=5)
        for _ in range(2):
            optimizer.step(closure_of(optimizer, lambda p: quadratic(p[:2]), params))
    assert_equal([p.detach() for p in strange], [p.detach() for p in plain])
    assert_equal(plain[2].detach(), randn(2))


def test_half_parameters_keep_a_float32_history() -> None:
    """Differences of bfloat16 gradients tell little; the minimum is met within the parameters' own precision."""
    x = torch.nn.Parameter(randn(8, dtype=torch.bfloat16))
    optimizer = optim.LBFGS([x], line_search_fn="strong_wolfe", max_iter=30)
    target = randn(8, seed=9).float()
    scale = torch.linspace(1, 20, 8)
    closure = closure_of(optimizer, lambda p: (scale * (p[0].float() - target) ** 2).sum(), [x])
    for _ in range(5):
        optimizer.step(closure)
    assert optimizer.state[x]["old_dirs"].dtype == torch.float32
    assert x.dtype == torch.bfloat16
    assert (scale * (x.detach().float() - target) ** 2).sum() < 1e-3 * (scale * (randn(8).float() - target) ** 2).sum()


def test_a_closure_may_project_or_exchange_the_memory() -> None:
    """As the tutorial of style transfer clamps its image; here also with new memory each time."""
    made = []
    for library, exchange in ((torch.optim, False), (optim, False), (optim, True)):
        x = torch.nn.Parameter(torch.tensor([0.9, 0.1, 0.5], dtype=torch.float64))
        optimizer = library.LBFGS([x], lr=0.2, max_iter=4)

        def closure(x: Any = x, optimizer: Any = optimizer, exchange: bool = exchange) -> torch.Tensor:
            with torch.no_grad():
                if exchange:
                    x.data = x.data.clamp(0, 1)
                else:
                    x.clamp_(0, 1)
            optimizer.zero_grad()
            loss = ((x - torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64)) ** 2).sum()
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        made.append(x.detach())
    torch.testing.assert_close(made[1], made[0], rtol=1e-12, atol=1e-12)
    assert_equal(made[2], made[1])


def test_the_closure_runs_with_gradients_and_its_first_loss_is_returned() -> None:
    x = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer, returned = optim.LBFGS([x], lr=0.1), []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (x * x).sum()
        loss.backward()
        returned.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is returned[0]
    assert len(returned) == optimizer.state[x]["func_evals"] > 5
    assert optimizer.step(lambda: closure().item()) == returned[-optimizer.state[x]["func_evals"] + 20 :][0].item()


def test_hooks_run_once_per_step() -> None:
    loss, params = start("network")
    optimizer, calls = optim.LBFGS(params, lr=0.1, max_iter=3), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(closure_of(optimizer, loss, params))
    assert calls == ["before", "after"]


def test_lr_zero_moves_nothing() -> None:
    for search in (None, "strong_wolfe"):
        loss, params = start("network")
        before = [p.detach().clone() for p in params]
        optimizer = optim.LBFGS(params, lr=0.0, line_search_fn=search)
        optimizer.step(closure_of(optimizer, loss, params))
        assert_equal([p.detach() for p in params], before)


def test_without_parameters_that_have_elements_the_loss_is_returned() -> None:
    for params in ([{"params": []}], [torch.nn.Parameter(torch.zeros(0))]):
        assert optim.LBFGS(params).step(lambda: 2.0) == 2.0


# --- errors -----------------------------------------------------------------------------------------------------------

ONE = [torch.nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(lr=-1.0), ValueError, r"LBFGS: lr must be in \[0, inf\), got -1\.0$"),
        (dict(lr=torch.ones(2)), ValueError, r"LBFGS: Tensor lr must be 1-element"),
        (dict(max_iter=0), ValueError, r"LBFGS: max_iter must be in \[1, inf\), got 0$"),
        (dict(max_iter="20"), TypeError, r"LBFGS: max_iter must be a number in \[1, inf\), got '20' \(str\)$"),
        (dict(max_eval=0), ValueError, r"LBFGS: max_eval must be in \[1, inf\), got 0$"),
        (dict(tolerance_grad=math.nan), ValueError, r"LBFGS: tolerance_grad must be in \(-inf, inf\), got nan$"),
        (dict(tolerance_change=math.inf), ValueError, r"LBFGS: tolerance_change must be in \(-inf, inf\), got inf$"),
        (dict(history_size=0), ValueError, r"LBFGS: history_size must be in \[1, inf\), got 0$"),
        (dict(history_size=2.5), TypeError, r"LBFGS: history_size must be an integer in \[1, inf\), got 2\.5 \(float"),
        (dict(line_search_fn="armijo"), ValueError, r"LBFGS: line_search_fn must be 'strong_wolfe' or None, got 'arm"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optim.LBFGS(ONE, **arguments)
    optimizer = optim.LBFGS(ONE)
    optimizer.param_groups[0].update(arguments)
    with pytest.raises(error, match=message):  # what other code writes is checked by the step
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("call", [lambda o: o.step(), lambda o: o.step(None)], ids=["nothing", "None"])
def test_a_missing_closure(call: Callable[[Any], Any]) -> None:
    optimizer = optim.LBFGS([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"^LBFGS: step needs a closure that clears the gradients, computes the loss"):
        call(optimizer)
    assert not optimizer.state


def test_fit_says_that_it_needs_a_closure() -> None:
    model = torch.nn.Linear(2, 1)
    pairs = [(torch.ones(1, 2), torch.ones(1, 1))]
    with pytest.raises(TypeError, match="fit: LBFGS needs a closure"):
        schuss.fit(model, pairs, torch.nn.functional.mse_loss, optim.LBFGS(model.parameters()), epochs=1)


def test_a_closure_that_returns_nothing() -> None:
    optimizer = optim.LBFGS([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="LBFGS: the closure must return the loss, got None; let it end in"):
        optimizer.step(lambda: None)
    assert not optimizer.state


def test_groups_that_disagree() -> None:
    x, y = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    message = r"LBFGS: lr must be the same in all groups, got 1 in group 0 and 0\.5 in group 1"
    with pytest.raises(ValueError, match=message):
        optim.LBFGS([{"params": [x]}, {"params": [y], "lr": 0.5}])
    optimizer = optim.LBFGS([x])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [y], "lr": 0.5})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [y]})
    optimizer.param_groups[1]["history_size"] = 7
    with pytest.raises(
        ValueError, match="LBFGS: history_size must be the same in all groups, got 100 in group 0 and 7"
    ):
        optimizer.step(lambda: 0.0)


def test_sparse_parameters_and_gradients_and_two_devices() -> None:
    sparse = torch.ones(3, 2).to_sparse().requires_grad_()
    with pytest.raises(ValueError, match=r"LBFGS: parameters must be dense, parameter 0 of group 0 has layout"):
        optim.LBFGS([sparse])
    with pytest.raises(
        ValueError, match="LBFGS: all parameters must be on one device, there is on meta, others on cpu"
    ):
        optim.LBFGS([("here", torch.ones(2)), ("there", torch.ones(2, device="meta"))])
    layer = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = optim.LBFGS(layer.named_parameters())
    before = layer.weight.detach().clone()
    closure = closure_of(optimizer, lambda p: layer(torch.tensor([1, 3])).square().sum(), [layer.weight])
    with pytest.raises(RuntimeError, match="LBFGS does not support sparse gradients, and weight has one; use sparse="):
        optimizer.step(closure)
    assert_equal(layer.weight.detach(), before)
    assert not optimizer.state


def test_there_is_no_plan_and_no_formula() -> None:
    with pytest.raises(NotImplementedError, match="LBFGS has no plan: its step is a search"):
        optim.LBFGS(ONE).plan()
    with pytest.raises(ValueError, match="LBFGS is a search along lines"):
        describe.find("LBFGS")


def test_the_list_tells_the_memory_of_the_state() -> None:
    (row,) = (row for row in describe.table() if row.name == "LBFGS")
    loss, params = start("network", torch.float32)
    optimizer = optim.LBFGS(params, lr=0.1)
    optimizer.step(closure_of(optimizer, loss, params))
    vectors = [v for v in optimizer.state[params[0]].values() if isinstance(v, torch.Tensor) and v.shape[-1] == 30]
    assert row.state_bytes == sum(v.numel() * v.element_size() for v in vectors) / 30


def test_no_warnings_in_a_plain_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, params = start("logistic", torch.float32)
        optimizer = optim.LBFGS(params, line_search_fn="strong_wolfe")
        for _ in range(4):
            optimizer.step(closure_of(optimizer, loss, params))
    assert loss(params) < 0.68
