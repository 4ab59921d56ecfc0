"""Rules at the edge of what can be cut into passes: the back ends agree, or the error is clear and changes nothing."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from cases import randn
from schuss import Optimizer, State
from schuss.engine.bucket import add_up
from schuss.formula import (
    clamp,
    column_mean,
    dot,
    everywhere,
    lerp,
    log,
    matrix_function,
    minimum,
    norm,
    row_mean,
    total,
    where,
)

BACKENDS = ("numba", "foreach", "reference")
VECTORS = ((5,), (3, 4), (), (0,))
MATRICES = ((5, 7), (5, 7), (2, 3, 4))


def rule_of(formula: Callable[..., Any], *states: State) -> type[Optimizer]:
    """An optimizer with this rule, whose states are called what their letters are."""

    class Made(Optimizer):
        def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
            super().__init__(params, dict(lr=lr), **options)

    Made.rule = staticmethod(formula)
    Made.states = {state.name: state for state in states}
    return Made


def run(cls: type[Optimizer], shapes: Iterable[tuple[int, ...]], backend: str, scale: float = 1.0) -> list[Any]:
    """Parameters and states after three steps."""
    params = [torch.nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = cls(params, backend=backend)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = scale * randn(*p.shape, seed=10 * step + i + 1)
        optimizer.step()
    return [*params, *(kept[name] for kept in map(optimizer.state.get, params) if kept for name in sorted(kept))]


def number(name: str, init: float = 1.0) -> State:
    return State(name, init=init, number=True)


def rows(name: str, init: float = 1.0) -> State:
    return State(name, init=init, like="rows")


# --- new states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_need_no_sum(backend: str) -> None:
    cls = rule_of(lambda p, g, n, lr: (p - lr * n * g, n + 1), number("n"))
    *params, n, step = run(cls, [(4,)], backend)
    assert (n.item(), step.item()) == (4.0, 3.0)
    wanted = randn(4) - 0.1 * sum((k + 1) * randn(4, seed=10 * k + 1) for k in range(3))
    torch.testing.assert_close(params[0].detach(), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sums", [False, True])
def test_numbers_that_change_places(backend: str, sums: bool) -> None:
    """Fibonacci's: 1, 1, 2, 3, 5."""
    a, b = number("a"), number("b")
    cls = rule_of(lambda p, g, a, b: (p - (norm(g) if sums else 1.0) * g, b, a + b), a, b)
    cls.__init__ = lambda self, params, **options: Optimizer.__init__(self, params, {}, **options)  # type: ignore
    found = run(cls, [(4,)], backend)
    assert [found[1].item(), found[2].item()] == [3.0, 5.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [lambda lr: 0.5, lambda lr: lr, lambda lr: 5 * lr], ids=["constant", "lr", "made"])
@pytest.mark.parametrize("sums", [False, True])
def test_numbers_that_become_others(backend: str, value: Callable[[Any], Any], sums: bool) -> None:
    cls = rule_of(lambda p, g, n, lr: (p - (norm(g) if sums else 1.0) * n * g, value(lr)), number("n"))
    n = run(cls, [(4,), (3,)], backend)[2]
    assert n.item() == pytest.approx(value(0.1), rel=1e-6)


SWAPS: dict[str, tuple[Callable[..., Any], tuple[State, ...]]] = {
    "old p": (lambda p, g, m, lr: (p - lr * g + 0.01 * m, p), (State("m"),)),
    "old p, sums": (lambda p, g, m, lr: (p - lr * norm(g) * g + 0.01 * m, p), (State("m"),)),
    "old p, everywhere": (lambda p, g, m, lr: (p - lr * everywhere(norm(g)) * g + 0.01 * m, p), (State("m"),)),
    "swap": (lambda p, g, a, b, lr: (p - lr * g + 0.01 * a, b, a), (State("a", init="p"), State("b"))),
    "swap, sums": (lambda p, g, a, b, lr: (p - 0.01 * norm(a) * a, b, a), (State("a", init="p"), State("b"))),
    "p and a state": (lambda p, g, a, lr: (a, p - lr * g), (State("a", init="p"),)),
    "p becomes g": (lambda p, g, a, lr: (g, p + lr), (State("a"),)),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_new_values_are_made_of_old_ones(swap: str) -> None:
    """A state that becomes what another one was, which may have been written by then."""
    formula, states = SWAPS[swap]
    results = [run(rule_of(formula, *states), VECTORS, backend) for backend in BACKENDS]
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_old_parameter_as_a_state(backend: str) -> None:
    cls = rule_of(lambda p, g, m, lr: (p - lr * g, p), State("m"))
    p, m, _ = run(cls, [(4,)], backend)
    torch.testing.assert_close(m, p.detach() + 0.1 * randn(4, seed=21), rtol=1e-12, atol=1e-13)


BESIDE: dict[str, tuple[Callable[..., Any], tuple[State, ...]]] = {
    "a number of sums": (
        lambda p, g, r, n, lr: (p - lr * g / (1 + row_mean(g * g)), row_mean(g), n + norm(g)),
        (rows("r"), number("n")),
    ),
    "a number without": (
        lambda p, g, r, n, lr: (p - lr * n * g / (1 + row_mean(g * g)), row_mean(g), n + 1),
        (rows("r"), number("n")),
    ),
    "a constant": (lambda p, g, r, lr: (p - lr * g / (r + row_mean(g * g)), 2.0), (rows("r"),)),
    "lr": (lambda p, g, r, lr: (p - lr * g / (r + row_mean(g * g)), lr), (rows("r"),)),
    "a sum": (lambda p, g, r, lr: (p - lr * g / (r + row_mean(g * g)), norm(g)), (rows("r"),)),
    "a swap": (lambda p, g, r, q, lr: (p - lr * g / (r + row_mean(g * g)), q, r), (rows("r"), rows("q", 2.0))),
    "a mean of a mean": (lambda p, g, r, lr: (p - lr * r * g, column_mean(row_mean(g))), (rows("r"),)),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_new_states_of_rows(beside: str) -> None:
    formula, states = BESIDE[beside]
    results = [run(rule_of(formula, *states), MATRICES, backend) for backend in BACKENDS]
    for got in results[:2]:
        torch.testing.assert_close(got, results[2], rtol=1e-6, atol=1e-7)  # numbers are kept in float32


WRONG: dict[str, tuple[Callable[..., Any], State, str]] = {
    "number, g": (lambda p, g, n: (p - g, g), number("n"), "each element; the state has one for the tensor"),
    "number, n + g": (lambda p, g, n: (p - g, n + g), number("n"), "each element; the state has one for the tensor"),
    "number, row": (lambda p, g, n: (p, n + row_mean(g)), number("n"), "each row; the state has one for the tensor"),
    "row, g": (lambda p, g, r: (p - row_mean(g), r + g), rows("r"), "each element; the state has one for each row"),
    "row, column": (lambda p, g, r: (p, column_mean(g)), rows("r"), "each column; the state has one for each row"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_new_states_with_too_many_values(wrong: str, backend: str) -> None:
    formula, state, message = WRONG[wrong]

    class Wrong(Optimizer):
        states = {state.name: state}
        rule = staticmethod(formula)

        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {}, **options)

    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Wrong([p], backend=backend)
    p.grad = torch.ones(3, 4)
    with pytest.raises(TypeError, match=f"the new {state.name} has a value for {message}"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 4))
    assert not optimizer.state.get(p)


# --- sums over all tensors --------------------------------------------------------------------------------------------


def all_of(g: Any) -> Any:
    return everywhere(dot(g, g))


ZEROS: dict[str, Callable[..., Any]] = {
    "quotient": lambda p, g, lr: p - lr * minimum(1.0 / all_of(g), 3.0) * p,
    "power": lambda p, g, lr: p - lr * clamp(all_of(g) ** -0.5, 0, 3) * p,
    "root of a negative": lambda p, g, lr: p - lr * where((all_of(g) - 1.0) ** 0.5 > 0, 1.0, 2.0) * p,
    "logarithm": lambda p, g, lr: p - lr * where(log(all_of(g)) < 0, 1.0, 2.0) * p,
    "quotient, rows": lambda p, g, lr: p - lr * minimum(1.0 / all_of(g), 3.0) * (p + row_mean(g)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("word", ZEROS)
def test_numbers_of_all_tensors_compute_as_arrays_do(word: str, backend: str) -> None:
    """Where all gradients are zero, quotients are infinite and roots are NaN; nothing raises."""
    factor = {"quotient": 0.7, "power": 0.7, "root of a negative": 0.8, "logarithm": 0.9, "quotient, rows": 0.7}[word]
    params = run(rule_of(ZEROS[word]), [(2, 3), (4, 5)], backend, scale=0.0)
    for i, p in enumerate(params[:2]):
        torch.testing.assert_close(p.detach(), factor**3 * randn(*p.shape, seed=i), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shapes", [[(4,), (3,)], [(4, 2), (3, 2)]])
def test_sums_of_sums_over_all_tensors(backend: str, shapes: list[tuple[int, ...]]) -> None:
    """The inner sum is the same for each of the tensors, so the outer one is that times their number."""

    def rule(p: Any, g: Any, lr: Any) -> Any:
        by_rows = 0 * row_mean(g) if len(shapes[0]) > 1 else 0.0
        return p - lr * everywhere(everywhere(dot(g, g))) * g - by_rows

    x = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    for step in range(3):
        grads = [randn(*shape, seed=10 * step + i + 1) for i, shape in enumerate(shapes)]
        length = 2 * sum((g * g).sum() for g in grads)
        x = [a - 0.1 * length * g for a, g in zip(x, grads, strict=True)]
    for p, a in zip(run(rule_of(rule), shapes, backend), x, strict=False):
        torch.testing.assert_close(p.detach(), a, rtol=1e-12, atol=1e-12)


def test_sums_that_are_no_numbers() -> None:
    assert math.isnan(add_up([math.inf, -math.inf]))
    assert add_up([1.5e308, 1.5e308]) == math.inf
    assert add_up([1e100, 1.0, -1e100]) == 1.0


def test_infinite_sums_of_both_signs() -> None:
    """What they make is NaN, as in torch; here it is not chosen."""
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = rule_of(lambda p, g, lr: p - where(everywhere(total(g)) == 1, g, lr))(params, backend="numba")
    params[0].grad, params[1].grad = torch.full((3,), math.inf), torch.full((2,), -math.inf)
    optimizer.step()
    assert all(torch.equal(p, torch.full_like(p, 0.9)) for p in params)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_between_steps() -> None:
    """Square matrices are as large as states: no copies of them outlive the step."""
    square = matrix_function(lambda x: x @ x.mT, square=True)
    cls = rule_of(lambda p, g, left, lr: (p - lr * g, lerp(left, square(g), 0.5)), State("left", like="left"))
    p = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = cls([p], backend="numba")
    p.grad = torch.ones(6, 4)
    optimizer.step()
    assert optimizer._plan is not None
    [bucket] = optimizer._plan._buckets
    assert not bucket._values.known
    torch.testing.assert_close(optimizer.state[p]["left"], torch.full((6, 6), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_keep_their_digits(backend: str) -> None:
    """Of a state that is stored in float64 nothing is lost where the rule computes in float32."""
    cls = rule_of(lambda p, g, n, lr: (p - everywhere(norm(g)) * n * g, n + 1e-12), number("n"))
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([p], backend=backend)
    for step in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
        if step == 0:
            optimizer.state[p]["n"] = torch.tensor(1.0, dtype=torch.float64)
    assert optimizer.state[p]["n"].item() - 1 == pytest.approx(2e-12, rel=1e-3)
