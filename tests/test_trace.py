"""Formulas on symbols: how they are printed, what is refused, and that every word means the same everywhere."""

import ast
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schuss import formula
from schuss.engine.pieces import Pieces, trace
from schuss.engine.trace import Expr, Formula, Graph, parameters, to_source, used
from schuss.formula import absolute, clamp, lerp, logical_and, maximum, minimum, sign, sqrt, where
from schuss.optimizer import Optimizer

# --- printing -----------------------------------------------------------------------------------------------------


def call(word: str, args: list[str]) -> str:
    return f"{word}({', '.join(args)})"


def printed(make: Callable[..., Any]) -> list[str]:
    """The lines of a function of symbols that is the new p."""
    graph = Graph()
    return to_source(Formula((), {"p": make(*map(graph.name, parameters(make)))}), call, repr)[0]


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (lambda a, b, c: a + b + c, "a + b + c"),
        (lambda a, b, c: a + (b + c), "a + (b + c)"),
        (lambda a, b, c: a - (b - c), "a - (b - c)"),
        (lambda a, b, c: a - b * c, "a - b * c"),
        (lambda a, b, c: (a - b) * c, "(a - b) * c"),
        (lambda a, b, c: a * b / c, "a * b / c"),
        (lambda a, b, c: a / (b * c), "a / (b * c)"),
        (lambda a, b, c: a * (b / c), "a * (b / c)"),
        (lambda a, b: -a * b, "-a * b"),
        (lambda a, b: -(a * b), "-(a * b)"),
        (lambda a: -(0 - -a), "-(0 - -a)"),
        (lambda a: -(a**2), "-a ** 2"),
        (lambda a: (-a) ** 2, "(-a) ** 2"),
        (lambda a: (a**2) ** 3, "(a ** 2) ** 3"),
        (lambda a, b: (a**2) ** b, "(a ** 2) ** b"),
        (lambda a, b, c: (a**b) ** c, "(a ** b) ** c"),
        (lambda a, b, c: a ** (b**c), "a ** b ** c"),
        (lambda a, b: a ** (-b), "a ** (-b)"),
        (lambda a, b: a + b < 2 * a, "a + b < 2 * a"),
        (lambda a, b: (a < b) == (b < 0), "(a < b) == (b < 0)"),
        (lambda a, b: where(a < b, sqrt(a + b), -b), "where(a < b, sqrt(a + b), -b)"),
        (lambda a, b: lerp(a, b, 0.5), "lerp(a, b, 0.5)"),
        (lambda a: clamp(a, -1, 1.0), "minimum(maximum(a, -1), 1.0)"),
        (lambda a: abs(a), "absolute(a)"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_source_has_the_parentheses_it_needs(make: Callable[..., Any], source: str) -> None:
    assert printed(make) == [f"p_new = {source}"]


ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "maximum": maximum,
    "minimum": minimum,
}
UNARY = {"neg": operator.neg, "absolute": absolute, "sqrt": sqrt, "sign": sign}
COMPARISONS = {op: getattr(operator, op) for op in ("lt", "le", "gt", "ge", "eq", "ne")}
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.5, 0.1, 3.0, 1e-300, -1e300, math.inf, -math.inf, math.nan]) | st.floats()
KINDS = ["arithmetic"] * 5 + ["power", "unary", "unary", "compare", "same", "where", "both"]


@st.composite
@np.errstate(all="ignore")
def computations(draw: st.DrawFn) -> tuple[Graph, list[tuple[Expr, Any]], dict[str, np.float64]]:
    """A graph that grows node by node out of earlier nodes, each with its value computed directly."""
    graph = Graph()
    inputs = {name: np.float64(draw(NUMBERS)) for name in ("a", "b", "c")}
    real: list[tuple[Any, Any]] = [(graph.name(name), value) for name, value in inputs.items()]
    truth: list[tuple[Any, Any]] = [(graph.node("lt", real[0][0], real[1][0]), inputs["a"] < inputs["b"])]

    def operand() -> tuple[Any, Any]:
        if draw(st.integers(0, 4)) == 0:
            number = draw(NUMBERS)
            return number, np.float64(number)
        return draw(st.sampled_from(real))

    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(KINDS))
        if kind == "arithmetic":
            op = draw(st.sampled_from(sorted(ARITHMETIC)))
            (x, x_value), (y, y_value) = operand(), operand()
            real.append((graph.node(op, x, y), ARITHMETIC[op](x_value, y_value)))
        elif kind == "power":
            (x, x_value), exponent = operand(), draw(st.integers(0, 4))
            real.append((graph.node("pow", x, exponent), x_value**exponent))
        elif kind == "unary":
            op = draw(st.sampled_from(sorted(UNARY)))
            x, x_value = operand()
            real.append((graph.node(op, x), UNARY[op](x_value)))
        elif kind == "where":
            (x, x_value), (y, y_value) = operand(), operand()
            condition, holds = draw(st.sampled_from(truth))
            real.append((graph.node("where", condition, x, y), x_value if holds else y_value))
        else:
            op = "logical_and" if kind == "both" else draw(st.sampled_from(sorted(COMPARISONS)))
            source = operand if kind == "compare" else lambda: draw(st.sampled_from(truth))
            (x, x_value), (y, y_value) = source(), source()
            value = logical_and(x_value, y_value) if kind == "both" else COMPARISONS[op](x_value, y_value)
            truth.append((graph.node(op, x, y), value))
    condition, holds = truth[-1]
    real.append((graph.node("where", condition, real[-1][0], 0.0), real[-1][1] if holds else 0.0))
    outputs = draw(st.lists(st.sampled_from(real), min_size=1, max_size=3))
    return graph, outputs, inputs


def bits(value: Any) -> bytes:
    """Equal for equal numbers, -0.0 apart from 0.0, and for NaN and NaN."""
    value = np.float64(value)
    return b"nan" if np.isnan(value) else value.tobytes()


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(computations())
def test_printed_source_computes_what_the_graph_says_and_everything_once(
    computation: tuple[Graph, list[tuple[Expr, Any]], dict[str, np.float64]],
) -> None:
    _, outputs, inputs = computation
    names = ["p", "m", "v"][: len(outputs)]
    constants: dict[str, np.float64] = {}

    def constant(number: float) -> str:
        name = f"k{len(constants)}"
        constants[name] = np.float64(number)
        return name

    with np.errstate(all="ignore"):
        lines, new = to_source(
            Formula(tuple(inputs), dict(zip(names, (node for node, _ in outputs), strict=True))), call, constant
        )
        scope = {name: getattr(formula, name) for name in formula.__all__} | inputs | constants
        exec("\n".join(lines), scope)
        for name, (_, value) in zip(names, outputs, strict=True):
            assert bits(eval(new[name], scope)) == bits(value), (lines, new)

    written = [n for line in lines for n in ast.walk(ast.parse(line))]
    operations = sum(isinstance(n, (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call)) for n in written)
    assert operations == sum(node.op not in ("name", "const") for node in used(node for node, _ in outputs))
    assert all(len(n.ops) == 1 for n in written if isinstance(n, ast.Compare)), "a chained comparison"


# --- interning ----------------------------------------------------------------------------------------------------


def test_a_subexpression_used_twice_is_one_node_and_one_line() -> None:
    graph = Graph()
    m, g = graph.name("m"), graph.name("g")
    assert graph.name("m") is m
    assert m * g + 1 is m * g + 1
    assert m - g is not g - m
    lines, new = to_source(Formula((), {"p": sqrt(m * g) + 1 / sqrt(m * g), "m": m * g}), call, repr)
    assert lines == ["m_new = m * g", "t1 = sqrt(m_new)", "p_new = t1 + 1 / t1"]
    assert new == {"p": "p_new", "m": "m_new"}


def test_numbers_that_differ_only_in_sign_or_kind_are_different_constants() -> None:
    graph = Graph()
    a = graph.name("a")
    nodes = [a * 0.0, a * -0.0, a * 0, a * 1.0, a * 1, a * math.nan]
    assert len(set(map(id, nodes))) == len(nodes)
    assert a * math.nan is nodes[-1]


def test_new_values_that_are_old_values_need_no_line() -> None:
    graph = Graph()
    m, v = graph.name("m"), graph.name("v")
    assert to_source(Formula((), {"m": v, "v": m}), call, repr) == ([], {"m": "v", "v": "m"})


# --- what a rule may not do -----------------------------------------------------------------------------------------


def traced(rule: Callable[..., Any], *states: str) -> Any:
    return trace(rule, Pieces(), dict.fromkeys(states, True), {})


def branches(p, g):
    return p if g > 0 else -p


def decides_with_and(p, g):
    return where(g > 0 and p > 0, p, g)


def chains_a_comparison(p, g):
    return where(0 < g < 1, p, g)


def negates_a_condition(p, g):
    return where(not g > 0, p, g)


def picks_the_largest(p, g):
    return max(p, g)


def looks_for_it(p, g):
    return p if g in (p, 0) else g


@pytest.mark.parametrize(
    "rule",
    [branches, decides_with_and, chains_a_comparison, negates_a_condition, picks_the_largest, looks_for_it],
    ids=lambda rule: rule.__name__,
)
def test_a_rule_cannot_branch_on_values(rule: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"a rule cannot branch on values .* use where\(\.\.\.\)"):
        traced(rule)


def loops(p, g):
    return sum(x for x in g)


def unpacks(p, g):
    first, second = g
    return p - first - second


def spreads(p, g):
    return maximum(*g)


@pytest.mark.parametrize("rule", [loops, unpacks, spreads], ids=lambda rule: rule.__name__)
def test_a_rule_cannot_iterate_over_an_array(rule: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="cannot unpack or iterate over an array"):
        traced(rule)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda p, g, m, v: (p, m), "must return the new p, m, v, got 2 values"),
        (lambda p, g, m, v: (p, m, v, g), "must return the new p, m, v, got 4 values"),
        (lambda p, g, m, v: p, "must return the new p, m, v, got 1 values"),
        (lambda p, g, m, v: None, "must return the new p, m, v, got 1 values"),
    ],
    ids=["too few", "too many", "p alone", "nothing"],
)
def test_a_rule_returns_as_many_values_as_it_has_states(rule: Callable[..., Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        traced(rule, "m", "v")


def test_a_rule_without_states_returns_p_alone_or_in_a_tuple() -> None:
    for rule in (lambda p, g: p - g, lambda p, g: (p - g,)):
        formula_, scalars = traced(rule)
        assert list(formula_.outputs) == ["p"]
        assert scalars == ()


@pytest.mark.parametrize(
    "value",
    [True, None, "2", 1j, [1.0], np.ones(2), np.float32(2), torch.tensor(2.0), np.True_],
    ids=["bool", "None", "str", "complex", "list", "array", "float32", "tensor", "NumPy bool"],
)
@pytest.mark.parametrize("side", ["left", "right", "in a word"])
def test_only_numbers_are_constants(value: Any, side: str) -> None:
    rules = {
        "left": lambda p, g: value * g,
        "right": lambda p, g: g * value,
        "in a word": lambda p, g: maximum(g, value),
    }
    with pytest.raises(TypeError, match="a rule computes with arrays and numbers, got"):
        traced(rules[side])


def test_a_float64_of_numpy_is_a_number_on_either_side() -> None:
    two = np.float64(2)
    for rule in (lambda p, g: p - two * g, lambda p, g: p - g * two):
        node = traced(rule)[0].outputs["p"]
        assert isinstance(node, Expr)
        assert [n.value for n in used([node]) if n.op == "const"] == [2.0]


# --- every word on everything -----------------------------------------------------------------------------------------

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 0.75, 1e-40, -3e38]
PAIRS = [(x, y) for x in SPECIAL for y in SPECIAL]


def words(x: Any, y: Any, k: Any) -> dict[str, Any]:
    """What the vocabulary and the operators make of two values and a scalar of the step."""
    return {
        "sqrt_x": sqrt(x),
        "absolute_x": absolute(x),
        "abs_x": abs(x),
        "sign_x": sign(x),
        "maximum_xy": maximum(x, y),
        "minimum_xy": minimum(x, y),
        "maximum_xk": maximum(x, k),
        "minimum_kx": minimum(k, x),
        "maximum_x1": maximum(x, 1.0),
        "minimum_1x": minimum(1.0, x),
        "clamp_x": clamp(x, -1.0, k),
        "clamp_xy": clamp(x, y, 2.0),
        "lerp_xy": lerp(x, y, k),
        "lerp_near_x": lerp(x, y, 0.25),
        "lerp_by_y": lerp(x, -x, y),
        "where_xy": where(x < y, x, y),
        "where_xk": where(x > k, x, k),
        "where_k1": where(x > 0, k, 1.0),
        "where_12": where(x > 0, 0.1, 0.2),
        "where_ky": where(k > 1, x, y),
        "and_xy": where(logical_and(x > 0, y <= 0.75), x, y),
        "lt": where(x < y, 1.0, 0.0),
        "le": where(x <= y, 1.0, 0.0),
        "gt": where(x > y, 1.0, 0.0),
        "ge": where(x >= y, 1.0, 0.0),
        "eq": where(x == y, 1.0, 0.0),
        "ne": where(x != y, 1.0, 0.0),
        "same_side": where((x > 0) == (y > 0), x, 0.0),
        "add": x + y,
        "sub": x - y,
        "mul": x * y,
        "div": x / y,
        "neg": -x,
        "radd": k + x,
        "rsub": 1 - x,
        "rmul": k * x,
        "rdiv": 1 / x,
        "square": x**2,
        "cube": x**3,
        "root": absolute(x) ** 0.5,
        "power": absolute(x) ** k,
        "power_of_2": 2.0**y,
        "tower": (absolute(x) ** k) ** 2,
        "scalars": x + sqrt(k) * abs(-k) / (maximum(k, 1) - lerp(k, k * k, 0.5) + where(k > 0, 1, 2)),
    }


ROUNDED = {
    "lerp_xy",
    "lerp_near_x",
    "lerp_x1",
    "lerp_1x",
    "lerp_by_y",
    "cube",
    "root",
    "power",
    "power_of_2",
    "tower",
    "scalars",
}
"""Words of more than one rounding, where a fused multiply-add may leave one out."""
NAMES = tuple(words(np.float64(1), np.float64(1), np.float64(0.75)))
K = 0.75


def by_torch(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """`words`, written down with torch's functions."""
    k = torch.full_like(x, K)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return {
        "sqrt_x": torch.sqrt(x),
        "absolute_x": torch.absolute(x),
        "abs_x": torch.abs(x),
        "sign_x": torch.sign(x),
        "maximum_xy": torch.maximum(x, y),
        "minimum_xy": torch.minimum(x, y),
        "maximum_xk": torch.maximum(x, k),
        "minimum_kx": torch.minimum(k, x),
        "maximum_x1": torch.maximum(x, one),
        "minimum_1x": torch.minimum(one, x),
        "clamp_x": torch.clamp(x, -1.0, K),
        "clamp_xy": torch.clamp(x, y, 2 * one),
        "lerp_xy": torch.lerp(x, y, K),
        "lerp_near_x": torch.lerp(x, y, 0.25),
        "lerp_by_y": torch.lerp(x, -x, y),
        "where_xy": torch.where(x < y, x, y),
        "where_xk": torch.where(x > k, x, k),
        "where_k1": torch.where(x > 0, k, one),
        "where_12": torch.where(x > 0, 0.1 * one, 0.2 * one),
        "where_ky": y,
        "and_xy": torch.where(torch.logical_and(x > 0, y <= 0.75), x, y),
        "lt": (x < y).to(x.dtype),
        "le": (x <= y).to(x.dtype),
        "gt": (x > y).to(x.dtype),
        "ge": (x >= y).to(x.dtype),
        "eq": (x == y).to(x.dtype),
        "ne": (x != y).to(x.dtype),
        "same_side": torch.where((x > 0) == (y > 0), x, zero),
        "add": torch.add(x, y),
        "sub": torch.sub(x, y),
        "mul": torch.mul(x, y),
        "div": torch.div(x, y),
        "neg": torch.neg(x),
        "radd": torch.add(k, x),
        "rsub": torch.sub(one, x),
        "rmul": torch.mul(k, x),
        "rdiv": torch.div(one, x),
        "square": torch.square(x),
        "cube": x * x * x,
        "root": torch.sqrt(torch.abs(x)),
        "power": torch.pow(torch.abs(x), k),
        "power_of_2": torch.pow(2 * one, y),
        "tower": torch.pow(torch.abs(x), k) ** 2,
        "scalars": x + math.sqrt(K) * K / (1 - (K + K * K) / 2 + 1),
    }


class Words(Optimizer):
    """Not an optimizer: writes what `words` makes of p, g and lr into its states."""

    states: ClassVar = {name: name for name in NAMES}
    has_step = False

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": K}, **options)

    @classmethod
    def declared(cls, defaults: Any) -> Any:
        def rule(p, g, *rest):
            return (p, *words(p, g, rest[-1]).values())

        # The signature that the rule would have if its arguments were written out.
        rule.__signature__ = inspect.signature(eval(f"lambda p, g, {', '.join(NAMES)}, lr: None"))
        cls.rule = staticmethod(rule)
        return super().declared(defaults)


def differs(name: str, got: torch.Tensor, expected: torch.Tensor, *, signs: bool) -> bool:
    """Whether a word has another value than torch's; NaN is NaN, and with `signs` -0.0 is not 0.0."""
    tolerance = 4 * torch.finfo(expected.dtype).eps if name in ROUNDED else 0.0
    if got.dtype != expected.dtype or not torch.allclose(got, expected, rtol=tolerance, atol=0.0, equal_nan=True):
        return True
    if not signs or name.startswith(("maximum", "minimum", "clamp")):  # which zero is larger, torch leaves open
        return False
    number = ~expected.isnan()
    return not torch.equal(got[number].signbit(), expected[number].signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", "foreach", "numba"])
def test_every_word_means_on_every_back_end_what_torch_means(backend: str, dtype: torch.dtype) -> None:
    x, y = (torch.tensor(column, dtype=dtype) for column in zip(*PAIRS, strict=True))
    p = torch.nn.Parameter(x.clone())
    p.grad = y.clone()
    optimizer = Words([p], backend=backend)
    optimizer.step()
    assert torch.equal(p.detach().nan_to_num(7.0), x.nan_to_num(7.0))
    expected, got = by_torch(x, y), optimizer.state[p]
    assert set(expected) == set(NAMES) == set(got)
    # A kernel may ignore the sign of a zero ("nsz"), nothing else.
    assert [name for name in NAMES if differs(name, got[name], expected[name], signs=backend != "numba")] == []


@pytest.mark.parametrize("kind", ["tensors", "arrays", "numbers"])
def test_every_word_means_on_torch_and_numpy_what_torch_means(kind: str) -> None:
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*PAIRS, strict=True))
    with np.errstate(all="ignore"):
        if kind == "tensors":
            got = words(x, y, torch.tensor(K, dtype=torch.float64))
        elif kind == "arrays":
            got = words(x.numpy(), y.numpy(), np.float64(K))
        else:
            rows = [words(np.float64(a), np.float64(b), np.float64(K)) for a, b in PAIRS]
            got = {name: np.array([row[name] for row in rows]) for name in NAMES}
    expected = by_torch(x, y)
    of_numbers = {"where_12", "lt", "le", "gt", "ge", "eq", "ne"}  # torch gives a choice of numbers the default dtype
    exact = [name for name in NAMES if kind != "tensors" or name not in of_numbers]
    assert [name for name in exact if differs(name, torch.as_tensor(got[name]), expected[name], signs=True)] == []
    for name in of_numbers:
        assert torch.equal(torch.as_tensor(got[name]).float(), expected[name].float()), name


class Custom(Optimizer):
    """A rule without states but m."""

    states: ClassVar = {"m": "m"}
    has_step = False

    def __init__(self, params: Any, lr: float = 1.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)


@pytest.mark.parametrize("backend", ["reference", "foreach", "numba"])
def test_a_constant_may_be_infinite_or_nan(backend: str) -> None:
    class Extremes(Custom):
        @staticmethod
        def rule(p, g, m, lr):
            return maximum(where(g > 0, p, math.nan), -math.inf), where(g > 0, math.inf, p - p - math.inf)

    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, -1.0])
    optimizer = Extremes([p], backend=backend)
    optimizer.step()
    assert str(p.tolist()) == "[1.0, nan]"
    assert optimizer.state[p]["m"].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("backend", ["reference", "foreach", "numba"])
def test_lerp_takes_numbers_as_the_other_words_do(backend: str) -> None:
    class Averages(Custom):
        @staticmethod
        def rule(p, g, m, lr):
            return lerp(p, 1.0, 0.25) + lerp(2, p, lr), lerp(lr, g, 0.5) + lerp(g, lr, 0.75) + lerp(lr, 1, 0.5)

    p = torch.nn.Parameter(torch.tensor([0.0, 4.0]))
    p.grad = torch.tensor([1.0, 2.0])
    optimizer = Averages([p], lr=0.5, backend=backend)
    optimizer.step()
    assert p.tolist() == [1.25, 6.25]
    assert optimizer.state[p]["m"].tolist() == [2.125, 2.875]


@pytest.mark.parametrize("exponent", [-1, -2, -3, 0, 1, 2, 3, 7, -0.5, 0.5, 1.5])
@pytest.mark.parametrize("backend", ["reference", "foreach", "numba"])
def test_powers_by_a_constant(backend: str, exponent: float) -> None:
    """Zero to a negative power is infinite, in a kernel, too, which goes on to the next element."""

    class Powers(Custom):
        @staticmethod
        def rule(p, g, m, lr):
            return p, g**exponent

    p = torch.nn.Parameter(torch.zeros(6))
    p.grad = torch.tensor([0.0, 1.0, 2.0, 0.5, math.inf, math.nan])
    optimizer = Powers([p], backend=backend)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["m"], p.grad**exponent, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("rule", "value"),
    [(lambda p, g, m, lr: (p - lr * g, 2 * lr), 0.5), (lambda p, g, m, lr: (p - lr * g, 3.0), 3.0)],
    ids=["scalar of the step", "number"],
)
@pytest.mark.parametrize("backend", ["reference", "foreach", "numba"])
def test_a_new_value_may_be_the_same_for_all_elements(backend: str, rule: Callable[..., Any], value: float) -> None:
    cls = type("Remembers", (Custom,), {"rule": staticmethod(rule)})
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = cls([p], lr=0.25, backend=backend)
    optimizer.step()
    assert p.tolist() == [0.75, 0.75]
    assert optimizer.state[p]["m"].tolist() == [value, value]


def test_what_where_does_not_choose_has_no_influence() -> None:
    nan, x = torch.tensor(math.nan), torch.tensor(3.0)
    assert where(x > 0, x, nan).item() == 3.0
    assert where(x < 0, nan, x).item() == 3.0
    assert where(True, 3.0, math.nan) == 3.0


@pytest.mark.parametrize("backend", ["reference", "foreach", "numba"])
def test_a_scalar_may_be_divided_by_zero(backend: str) -> None:
    class Divides(Custom):
        @staticmethod
        def rule(p, g, m, lr):
            return p - minimum(1 / lr, 2.0) * g, m

    p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    p.grad = torch.tensor([1.0, 2.0])
    Divides([p], lr=0.0, backend=backend).step()
    assert p.tolist() == [-1.0, -5.0]


@pytest.mark.parametrize(
    "group",
    [
        ["t1", "i", "count", "start", "tensor"],
        ["context", "tables", "at", "row", "scalar"],
        ["m_", "p_new", "m_new", "kernel", "np"],
        ["sqrt", "int64", "carray", "x", "yes"],
    ],
    ids=" ".join,
)
def test_letters_may_have_any_name(group: list[str]) -> None:
    """Names that generated code uses itself, too: nothing else than the rule gives them a meaning."""
    scope: dict[str, Any] = {"root": sqrt}
    total = " + ".join(group)
    exec(
        f"def rule(p, g, m, {', '.join(group)}):\n    s = root({total})\n    return p - (s + g) * s, m + {total}", scope
    )

    class Named(Optimizer):
        states: ClassVar = {"m": "m"}
        has_step = False
        rule = staticmethod(scope["rule"])

        def __init__(self, params: Any, **options: Any) -> None:
            values = {name: 2.0**i for i, name in enumerate(group)}
            values[group[-1]] += 64 - sum(values.values())
            super().__init__(params, values, **options)

    for backend in ("reference", "foreach", "numba"):
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.tensor([0.0, 1.0, 2.0])
        optimizer = Named([p], backend=backend)
        optimizer.step()
        assert optimizer.state[p]["m"].tolist() == [64.0] * 3, backend
        assert p.tolist() == [-64.0, -72.0, -80.0], backend
