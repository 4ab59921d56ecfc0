"""Rules at the edge of what can be cut into passes: the back ends agree, or the error is clear and changes nothing."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
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
    logical_and,
    matrix_function,
    maximum,
    minimum,
    norm,
    row_mean,
    total,
    where,
)
from schuss.formula import columns as columns_of
from schuss.formula import rows as rows_of

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("like", ["rows", "columns", "left", "right"])
def test_what_lies_beside_needs_no_sum(like: str, backend: str) -> None:
    """The new value is made of the old one alone, and p may be made of those of rows and columns."""
    read = like in ("rows", "columns")
    cls = rule_of(lambda p, g, r, lr: (p - lr * (r if read else 1) * g, r + r), State("r", like=like, init=1.0))
    p = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = cls([p], backend=backend)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    lr = optimizer.defaults["lr"]
    torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - (3 if read else 2) * lr), rtol=1e-15, atol=0)
    kept = optimizer.state[p]["r"]
    assert kept.numel() == {"rows": 3, "columns": 4, "left": 9, "right": 16}[like]
    assert torch.equal(kept, torch.full_like(kept, 4))


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


# --- tensors without rows ---------------------------------------------------------------------------------------------

identity = matrix_function(lambda x: x)
FLAT: dict[str, tuple[Callable[..., Any], tuple[State, ...], int]] = {
    "row_mean()": (lambda p, g, lr: p - lr * (g + row_mean(g)), (), 2),
    "column_mean()": (lambda p, g, lr: p - lr * (g + column_mean(g)), (), 2),
    "the state 'r' with like='rows'": (lambda p, g, r, lr: (p - lr * g, r + 1), (rows("r"),), 2),
    "the state 'c' with like='columns'": (
        lambda p, g, c, lr: (p - lr * g, c + 1), (State("c", like="columns"),), 2,
    ),
    "rows()": (lambda p, g, lr: p - lr * g / rows_of(g), (), 1),
    "columns()": (lambda p, g, lr: p - lr * g / columns_of(g), (), 1),
    "<lambda>()": (lambda p, g, lr: p - lr * identity(g), (), 1),
    "the state 'left' with like='left'": (
        lambda p, g, left, lr: (p - lr * g, left), (State("left", like="left"),), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("shape", [(), (3,), (0,)])
@pytest.mark.parametrize("word", FLAT)
def test_tensors_that_have_no_rows(word: str, shape: tuple[int, ...], backend: str) -> None:
    """They are found before anything is written, whatever comes before them."""
    formula, states, least = FLAT[word]
    matrix, flat = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(shape))
    optimizer = rule_of(formula, *states)([("matrix", matrix), ("flat", flat)], backend=backend)
    matrix.grad, flat.grad = torch.ones(2, 2), torch.ones(shape)
    if len(shape) >= least:
        optimizer.step()
        assert (matrix < 1).all()
        return
    allowed = "two dimensions" if least == 2 else "one dimension"
    told = f"Made: flat must have {allowed} or more for {word} in the rule, got the shape {shape}; give it to another"
    for call in (optimizer.step, optimizer.plan):
        with pytest.raises(ValueError, match=re.escape(told)):
            call()
    assert torch.equal(matrix, torch.ones(2, 2))
    assert torch.equal(flat, torch.ones(shape))
    assert not optimizer.state


def test_a_form_without_rows_is_for_vectors() -> None:
    """As Adafactor's, whose states of rows exist for matrices alone."""
    only_matrices = State("r", like="rows", when=lambda group, p: p.dim() >= 2)
    cls = rule_of(lambda p, g, r, lr: (p - lr * g, None) if r is None else (p - lr * row_mean(g), r), only_matrices)
    p, q = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(2, 2), torch.ones(3)
    cls([p, q]).step()
    assert torch.equal(q, torch.full((3,), 0.9))


# --- functions of matrices that raise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_what_is_before_a_function_that_raises_has_stepped_whole(backend: str) -> None:
    """One batch for each shape; the second raises."""

    def fussy(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == broken:
            raise ArithmeticError("no")
        return x

    cls = rule_of(lambda p, g, m, lr: (p - lr * matrix_function(fussy)(g), m + g), State("m"))
    params = [torch.nn.Parameter(torch.ones(2, k)) for k in (2, 3, 4)]
    optimizer = cls(params, backend=backend)
    for step, broken, stepped in ((1, 3, [1, 0, 0]), (2, 0, [2, 1, 1]), (3, 3, [3, 1, 1])):
        for p in params:
            p.grad = torch.ones_like(p)
        if broken:
            with pytest.raises(ArithmeticError, match="no"):
                optimizer.step()
        else:
            optimizer.step()
        for p, count in zip(params, stepped, strict=True):
            torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 0.1 * count), rtol=1e-6, atol=0)
            kept = optimizer.state.get(p, {})
            assert (set(kept) == {"step", "m"}) == (count > 0), step
            assert all(bool((value == count).all()) for value in kept.values())


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


# --- square states as lists ------------------------------------------------------------------------------------------


def outer(x: torch.Tensor, a: Any, weight: Any, *, out: Any = None) -> Any:
    """a + weight x xᵀ."""
    weights = np.broadcast_to(np.asarray(weight, np.float64), len(x))
    values = [b + w * y @ y.mT for y, b, w in zip(x, a, weights.tolist(), strict=True)]
    if out is None:
        return torch.stack(values)
    for place, value in zip(out, values, strict=True):
        if place is not None:
            place.copy_(value)
    return None


SQUARES = [State("left", init=1.0, like="left"), State("other", init=2.0, like="left")]
LISTED = {
    "one each": lambda p, g, left, other, lr: (p - lr * g, *(word(outer)(g, a, lr) for a in (left, other))),
    "of each other": lambda p, g, left, other, lr: (p - lr * g, word(outer)(g, other, lr), word(outer)(g, left, lr)),
    "of the other, old one": lambda p, g, left, other, lr: (p - lr * g, 0.5 * left, word(outer)(g, left, lr)),
    "one twice": lambda p, g, left, other, lr: (p - lr * g, *[word(outer)(g, left, lr)] * 2),
    "used again": lambda p, g, left, other, lr: (p - lr * g, new := word(outer)(g, left, lr), 0.5 * new + other),
    "one of the other's": lambda p, g, left, other, lr: (p - lr * g, left, word(outer)(g, left, lr)),
}


def word(function: Callable[..., Any]) -> Callable[..., Any]:
    return matrix_function(function, square=True, listed=True)


@pytest.mark.parametrize("rule", LISTED.values(), ids=LISTED)
def test_square_states_in_lists_are_those_in_batches(rule: Callable[..., Any]) -> None:
    """Whether or not they are overwritten where they are, and whichever other one needs their old values."""
    results = [run(rule_of(rule, *SQUARES), MATRICES, backend) for backend in ("numba", "reference")]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)


def test_square_states_in_lists_are_not_copied() -> None:
    """Those of tensors without a gradient are not even written."""
    seen: list[tuple[Any, Any]] = []

    def watched(x: torch.Tensor, a: Any, weight: Any, *, out: Any = None) -> Any:
        seen.append((a, out))
        return outer(x, a, weight, out=out)

    params = [torch.nn.Parameter(randn(3, 4, seed=i)) for i in range(3)]
    cls = rule_of(lambda p, g, left, lr: (p - lr * g, word(watched)(g, left, lr)), State("left", like="left"))
    optimizer = cls(params, backend="numba")
    for used in ((0, 1, 2), (0, 2)):
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if i in used else None
        optimizer.step()
    states = [optimizer.state[p]["left"] for p in params]
    given, out = seen[-1]
    assert all(a is b for a, b in zip(given, states, strict=True))
    assert out[0] is states[0]
    assert out[1] is None
    assert out[2] is states[2]
    for state, steps in zip(states, (2, 1, 2), strict=True):
        torch.testing.assert_close(state, torch.full_like(state, 0.4 * steps))


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_number_is_kept_in_float64(backend: str) -> None:
    """Through a checkpoint, too; one that is not wide is float32, as `step` is."""
    cls = rule_of(
        lambda p, g, n, m, lr: (p - lr * g, n + 1e-12, m), State("n", 1.0, number=True, wide=True), number("m")
    )
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([p], backend=backend)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
        other = cls([p], backend=backend)
        other.load_state_dict(optimizer.state_dict())
        optimizer = other
    kept = optimizer.state[p]
    assert {name: kept[name].dtype for name in kept} == {
        "step": torch.float32, "n": torch.float64, "m": torch.float32,
    }  # fmt: skip
    assert kept["n"].item() - 1 == pytest.approx(3e-12, rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(like="rows"), "like of 'n' has no meaning with number=True, .*; got 'rows', leave it out"),
        (dict(when="lr"), "when of 'n' has no meaning with number=True, .*; got 'lr', leave it out"),
        (dict(init="p"), "init of 'n' has no meaning with number=True, .*; got 'p', leave it out"),
    ],
)
def test_what_a_number_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^State: {message}$"):
        State("n", number=True, **wrong)


# --- numbers of NumPy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
def test_numbers_of_numpy_are_numbers_in_every_word(kind: Any, dtype: torch.dtype) -> None:
    x, y = torch.tensor([0.3, -0.7, 2.0], dtype=dtype), torch.tensor([0.1, 0.7, 1.0], dtype=dtype)
    calls: list[Callable[[Any, Any], Any]] = [
        lambda a, b: where(x > 0, a, b), lambda a, b: where(x > 0, x, b), lambda a, b: where(x > 0, a, x),
        lambda a, b: maximum(x, a), lambda a, b: minimum(a, x), lambda a, b: clamp(x, b, a), lambda a, b: lerp(x, y, a),
        lambda a, b: lerp(x, y, b), lambda a, b: a + x, lambda a, b: x**a, lambda a, b: a**x, lambda a, b: a < x,
    ]  # fmt: skip
    python = int if kind is np.int64 else float
    for k, call in enumerate(calls):
        given, wanted = call(kind(1), kind(0)), call(python(1), python(0))
        assert given.dtype == wanted.dtype, k
        assert torch.equal(given, wanted), k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numbers_of_numpy_choose_the_form_of_a_rule(kind: Any, backend: str) -> None:
    """They become constants of a kernel, which is text."""

    class Choosing(Optimizer):
        choices = ("half",)

        def __init__(self, params: Any, half: Any = 0.5, **options: Any) -> None:
            super().__init__(params, dict(lr=0.1, half=half), **options)

        @staticmethod
        def rule(p: Any, g: Any, lr: Any, half: Any) -> Any:
            return p - 2 * lr * (half * g if half > 0.25 else g)

    p, q = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    p.grad = q.grad = torch.ones(2, dtype=torch.float64)
    optimizer = Choosing([{"params": [p]}, {"params": [q], "half": kind(0)}], half=kind(4), backend=backend)
    optimizer.step()
    optimizer.param_groups[1]["half"] = kind(1)
    optimizer.step()
    assert (p[0].item(), q[0].item()) == pytest.approx((1 - 2 * 0.8, 1 - 0.4), rel=1e-15)


@pytest.mark.parametrize("value", [True, False])
def test_booleans_of_numpy_are_booleans_in_every_word(value: bool) -> None:
    x, y = torch.tensor([0.3, -0.7]), torch.tensor([0.1, 0.7])
    for condition in (value, np.bool_(value)):
        assert torch.equal(where(condition, x, y), x if value else y)
        assert torch.equal(logical_and(x > 0, condition), torch.tensor([value, False]))
