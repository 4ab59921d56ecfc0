"""Cutting formulas at their sums: how many passes, what is found in each, and that the numbers are right."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cases import assert_equal, gradient, randn
from schuss import Optimizer, State
from schuss.engine import pieces
from schuss.engine.stages import Domain, Stages, Values, cut, is_staged
from schuss.engine.trace import Formula
from schuss.formula import (
    dot,
    everywhere,
    maximum,
    mean,
    mean_square,
    norm,
    size,
    sqrt,
    total,
    where,
)
from schuss.testing import check_optimizer

BACKENDS = ("numba", "foreach", "reference")


def traced(rule: Callable[..., Any], states: tuple[str, ...] = (), numbers: tuple[str, ...] = ()) -> Any:
    """A formula and its scalars; `numbers` are states that are one number for a tensor."""
    return pieces.trace(rule, pieces.Pieces(), dict.fromkeys((*states, *numbers), True), {}, numbers)


def stages_of(rule: Callable[..., Any], states: tuple[str, ...] = (), numbers: tuple[str, ...] = ()) -> Stages:
    formula, scalars = traced(rule, states, numbers)
    return cut(formula, scalars)


def words_of(formula: Formula) -> set[str]:
    """The words and names in a formula."""
    found, todo = set(), list(formula.outputs.values())
    while todo:
        node = todo.pop()
        found.add(node.value if node.op == "name" else node.op)
        todo += node.args
    return found


# --- where a formula is cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word", [norm, total, mean, mean_square, size, lambda x: dot(x, x), lambda x: everywhere(1.0 * norm(x))]
)
def test_sums_need_a_pass_of_their_own(word: Callable[..., Any]) -> None:
    assert is_staged(traced(lambda p, g: p - word(g) * g)[0])
    assert not is_staged(traced(lambda p, g: p - sqrt(abs(g)))[0])


def test_a_rule_without_sums_has_no_levels() -> None:
    stages = stages_of(lambda p, g, lr: p - lr * g)
    assert stages.levels == ()
    assert stages.scalars == ("lr",)
    assert stages.sums_everywhere == 0
    assert words_of(stages.final) == {"p", "g", "lr", "mul", "sub"}


def test_sums_that_need_no_other_are_found_in_one_pass() -> None:
    """Each once, however often it is used; what is made of them alone is computed between the passes."""

    def rule(p: Any, g: Any, lr: Any) -> Any:
        return p - lr * (norm(p) / norm(g)) * g - dot(g, g) * total(p)

    stages = stages_of(rule)
    [level] = stages.levels
    assert level.sums is not None
    assert sorted(node.op for node in level.reductions) == ["dot", "dot", "total"]
    assert sorted(map(len, level.sums.terms)) == [1, 2, 2]
    assert level.everywhere == ()
    assert stages.scalars == ("lr", "s1", "s2")  # lr * ratio, and the product
    assert words_of(stages.final) == {"p", "g", "mul", "sub", "s1", "s2"}
    assert all(node.op == "mul" for node in stages.between.values())


def test_sums_of_what_is_made_of_sums_are_found_in_the_next_pass() -> None:
    def rule(p: Any, g: Any) -> Any:
        centered = g - mean(g)
        return p - centered / sqrt(mean_square(centered))

    stages = stages_of(rule)
    assert [[node.op for node in level.reductions] for level in stages.levels] == [["total"], ["dot"]]
    first, second = stages.levels
    assert first.between == ()
    assert second.between == ("s1",)  # the mean
    assert stages.scalars == ("s1", "s2")
    assert {node.op for node in stages.sizes} == {"size"}
    assert first.sums is not None
    assert second.sums is not None
    assert words_of(first.sums.formula) == {"g"}
    assert words_of(second.sums.formula) == {"g", "s1", "sub"}


def test_a_sum_waits_for_the_last_of_what_it_needs() -> None:
    def rule(p: Any, g: Any) -> Any:
        a = total(g * total(g))
        return p - total(g * a) * total(p)

    levels = [[node.op for node in level.reductions] for level in stages_of(rule).levels]
    assert levels == [["total", "total"], ["total"], ["total"]]


def test_the_size_is_known_before_any_pass() -> None:
    stages = stages_of(lambda p, g: p - g / size(p))
    assert stages.levels == ()
    assert stages.scalars == ("s1",)


def test_sums_over_all_tensors_end_a_pass() -> None:
    def rule(p: Any, g: Any, lr: Any) -> Any:
        return p - lr / sqrt(everywhere(dot(g, g))) * g

    stages = stages_of(rule)
    [level] = stages.levels
    assert [node.op for node in level.reductions] == ["dot"]
    assert [node.op for node in level.everywhere] == ["everywhere"]
    assert stages.sums_everywhere == 1


def test_numbers_are_summed_over_all_tensors_without_a_pass_of_kernels() -> None:
    stages = stages_of(lambda p, g, lr: p - g * lr / everywhere(lr))
    [level] = stages.levels
    assert level.sums is None
    assert level.reductions == ()
    assert stages.sums_everywhere == 1


def test_passes_after_the_last_sum_over_all_tensors() -> None:
    def rule(p: Any, g: Any) -> Any:
        scaled = g / everywhere(total(abs(g)))
        return p - scaled / norm(scaled - mean(scaled))

    stages = stages_of(rule)
    assert len(stages.levels) == 3
    assert stages.sums_everywhere == 1


def test_new_numbers_are_no_business_of_kernels() -> None:
    def rule(p: Any, g: Any, d: Any) -> Any:
        return p - d * g, maximum(d, norm(p))

    stages = stages_of(rule, numbers=("d",))
    assert set(stages.final.outputs) == {"p"}
    assert set(stages.outside) == {"d"}
    assert stages.scalars == ("d",)


def test_a_new_state_that_is_the_same_everywhere() -> None:
    """A state like the parameter may become a number: it is written to all elements."""
    stages = stages_of(lambda p, g, m: (p - m, norm(g)), states=("m",))
    assert set(stages.final.outputs) == {"p", "m"}
    assert words_of(Formula((), {"m": stages.final.outputs["m"]})) == {"s1"}


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_that_the_rule_has_are_left_to_it() -> None:
    def rule(p: Any, g: Any, s1: Any, s3: Any) -> Any:
        return p - s1 * norm(g) * s3 * g + total(g) * s1, s3 + g

    stages = stages_of(rule, states=("s3",))
    assert stages.scalars == ("s1", "s2", "s4")
    assert set(stages.between) == {"s2", "s4"}


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda p, g, lr: p - everywhere(g), r"everywhere\(\) is about a number of each tensor, such as a dot\(\)"),
        (lambda p, g, lr: p - everywhere(norm(g) * p), r"everywhere\(\) is about a number of each tensor"),
        (lambda p, g, lr: p - total(lr), r"total\(\) is about tensors; the rule gives it a number"),
        (lambda p, g, lr: p - dot(lr, 2 * lr), r"dot\(\) is about tensors; the rule gives it a number"),
        (lambda p, g, lr: p - total(norm(g)), r"total\(\) is about tensors; the rule gives it a number"),
        (lambda p, g, lr: p - g / size(lr), r"size\(\) is about tensors; the rule gives it a number"),
    ],
)
def test_sums_of_what_cannot_be_summed(rule: Callable[..., Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        stages_of(rule)


def test_one_tensor_does_not_know_the_others() -> None:
    with pytest.raises(TypeError, match=r"everywhere\(\) is a sum over all tensors of an optimizer"):
        everywhere(torch.ones(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_rule_changes_nothing(backend: str) -> None:
    """The error comes with the first step, and leaves no state."""

    class Wrong(Optimizer):
        states = {"m": "momentum"}

        def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
            super().__init__(params, dict(lr=lr), **options)

        @staticmethod
        def rule(p, g, m, lr):
            return p - lr * everywhere(g), m

    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Wrong([p], backend=backend)
    p.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"everywhere\(\)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state.get(p)


# --- numbers between passes -------------------------------------------------------------------------------------------


def test_values_of_many_tensors_at_once() -> None:
    """What is made of sums, of vectors with a number for each tensor, as NumPy computes."""

    def rule(p: Any, g: Any, lr: Any) -> Any:
        a, b = norm(p), norm(g)
        return p - lr * where(b > 0, a / b, 1.0) ** 0.5 * g

    stages = stages_of(rule)
    values = Values({"lr": np.array([0.1, 0.2, 0.3])})
    sums = {"p": np.array([4.0, 9.0, 1.0]), "g": np.array([1.0, 0.0, 16.0])}
    [level] = stages.levels
    values.known |= {node: sums[node.args[0].value] for node in level.reductions}
    [node] = stages.between.values()
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(values(node), [0.1 * 2**0.5, 0.2, 0.3 * 0.5], rtol=1e-15)


def test_domains() -> None:
    assert Domain.join([]) == Domain.NUMBER
    assert Domain.join([Domain.NUMBER, Domain.ROWS]) == Domain.ROWS
    assert Domain.join([Domain.ROWS, Domain.COLUMNS]) == Domain.ELEMENTS
    assert Domain.join([Domain.NUMBER, Domain.ELEMENTS]) == Domain.ELEMENTS


# --- rules with sums, run ---------------------------------------------------------------------------------------------


class Nested(Optimizer):
    """Gradients of mean 0 and mean square 1, with momentum: a sum, and a sum of what is made of it.

    Args:
        lr, momentum, weight_decay, maximize, capturable: as in SGD; weight_decay is added to the gradient.
    """

    states = {"m": "momentum"}
    decay = "l2"

    def __init__(
        self, params: Any, lr: float = 0.1, momentum: float = 0.5, weight_decay: float = 0.0, maximize: bool = False,
        capturable: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize, capturable=capturable)
        super().__init__(params, defaults, **options)

    @staticmethod
    def rule(p, g, m, lr, momentum):
        centered = g - mean(g)
        m = momentum * m + centered / sqrt(mean_square(centered) + 1e-3)
        return p - lr * m, m


def nested(x: np.ndarray, m: Any, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centered = g - (g.mean() if g.size else 0.0)
    m = 0.5 * m + centered / np.sqrt(((centered**2).mean() if g.size else 0.0) + 1e-3)
    return x - 0.1 * m, m


class Normalized(Optimizer):
    """Gradients divided by the norm of all, and a step that grows with the largest norm of all so far.

    Args:
        lr, maximize: as in SGD.
    """

    states = {"largest": State("largest", number=True)}

    def __init__(self, params: Any, lr: float = 0.1, maximize: bool = False, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, maximize=maximize), **options)

    @staticmethod
    def rule(p, g, largest, lr):
        length = sqrt(everywhere(dot(g, g)))
        largest = maximum(largest, length)
        return p - lr * (largest / where(length > 0, length, 1.0)) * g, largest


SHAPES = ((5, 7), (3,), (), (0,), (4, 3, 2), (40_000,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nested_sums(backend: str) -> None:
    x = [randn(*shape, seed=i).numpy() for i, shape in enumerate(SHAPES)]
    m: list[Any] = [0.0] * len(x)
    params = [torch.nn.Parameter(torch.tensor(a)) for a in x]
    optimizer = Nested(params, backend=backend)
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = None if (i, step) == (1, 2) else randn(*p.shape, seed=10 * step + i + 1)
            if p.grad is not None:
                x[i], m[i] = nested(x[i], m[i], p.grad.numpy())
        optimizer.step()
        for p, a in zip(params, x, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), a, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_all_tensors(backend: str) -> None:
    """Of two dtypes, of several back ends and groups, some without a gradient."""
    dtypes = (torch.float64, torch.float32, torch.float64, torch.float64)
    x = [randn(n, seed=n).to(d).double().numpy() for n, d in zip((7, 30_000, 1, 5), dtypes, strict=True)]
    params = [torch.nn.Parameter(torch.tensor(a).to(d)) for a, d in zip(x, dtypes, strict=True)]
    optimizer = Normalized([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}], backend=backend)
    largest = [0.0] * len(x)
    for step in range(6):
        there = [i for i in range(len(x)) if (i + step) % 4]
        grads = {i: gradient(params[i], step, i) * (step + 1) for i in there}
        length = np.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))
        for i, p in enumerate(params):
            p.grad = grads.get(i)
        for i in there:
            largest[i] = max(largest[i], length)
            x[i] = x[i] - (0.1 if i < 2 else 0.01) * largest[i] / length * grads[i].double().numpy()
        optimizer.step()
        for i, (p, a) in enumerate(zip(params, x, strict=True)):
            rtol = 1e-6 if p.dtype == torch.float64 else 1e-5  # the largest norm is kept in float32
            np.testing.assert_allclose(p.detach().double().numpy(), a, rtol=rtol, atol=rtol)
            if i in there:
                assert optimizer.state[p]["largest"].item() == pytest.approx(largest[i], rel=1e-6)


def test_tensors_that_take_different_ways_share_their_sums() -> None:
    """A view with gaps is for eager torch, the other for a kernel: the sums are of both."""
    whole = randn(6, 4)
    view = torch.nn.Parameter(whole[:, ::2])
    rest = torch.nn.Parameter(randn(5))
    optimizer = Normalized([view, rest])
    view.grad, rest.grad = torch.ones(6, 2, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    before = view.detach().clone()
    optimizer.step()
    assert {e.route.backend for e in optimizer.plan().entries} == {"numba", "reference"}
    torch.testing.assert_close(view.detach(), before - 0.1, rtol=1e-13, atol=0)


@pytest.mark.parametrize("cls", [Nested, Normalized], ids=lambda cls: cls.__name__)
def test_every_generic_check(cls: type[Optimizer]) -> None:
    check_optimizer(cls)


CLASHES = ("s1", "s2", "x0_0", "x0_1", "sums", "total", "sum0_", "count", "tensor", "scalar", "t1", "b1", "u1", "start")


class Clash(Optimizer):
    """Hyperparameters and states under names that kernels have for themselves.

    Args:
        s1, s2, x0_0, x0_1, sums, total, sum0_, count, tensor, scalar, t1, b1, u1, start: added up.
    """

    def __init__(self, params: Any, lr: float = 0.1, **more: Any) -> None:
        own = {name: 0.01 * (i + 1) for i, name in enumerate(CLASHES[2:])}
        super().__init__(params, dict(lr=lr, **own), **more)

    states = {"s1": "s1", "s2": State("s2", number=True)}

    @staticmethod
    def rule(p, g, s1, s2, lr, x0_0, x0_1, sums, total, sum0_, count, tensor, scalar, t1, b1, u1, start):
        everything = x0_0 + x0_1 + sums + total + sum0_ + count + tensor + scalar + t1 + b1 + u1 + start
        s1 = s1 + g * norm(g + x0_0) + sums
        return p - lr * (s1 / norm(s1)) * everything * s2 - total * norm(p * sum0_) * g, s1, s2 + norm(g * t1 + s1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_the_rule_do_not_clash_with_those_of_kernels(backend: str) -> None:
    assert [*inspect.signature(Clash.rule).parameters][2:4] == ["s1", "s2"]
    own = {name: 0.01 * (i + 1) for i, name in enumerate(CLASHES[2:])}
    x, s1, s2 = randn(50).numpy(), 0.0, 0.0
    p = torch.nn.Parameter(torch.tensor(x))
    optimizer = Clash([p], backend=backend)
    for step in range(4):
        g = randn(50, seed=step).numpy()
        p.grad = torch.tensor(g)
        optimizer.step()
        s1 = s1 + g * np.linalg.norm(g + own["x0_0"]) + own["sums"]
        new = s2 + np.linalg.norm(g * own["t1"] + s1)
        step_ = 0.1 * s1 / np.linalg.norm(s1) * sum(own.values()) * s2
        x, s2 = x - step_ - own["total"] * np.linalg.norm(x * own["sum0_"]) * g, new
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-5, atol=1e-6)  # s2 is kept in float32
    assert optimizer.state[p]["s2"].item() == pytest.approx(s2, rel=1e-6)


# --- with all else ----------------------------------------------------------------------------------------------------


TOGETHER: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "maximize": (torch.float32, dict(maximize=True)),
    "max_norm": (torch.float32, dict(max_norm=1.0)),
    "clip_value": (torch.float32, dict(clip_value=0.5)),
    "l2": (torch.float32, dict(weight_decay=0.1)),
    "ema": (torch.float32, dict(ema_decay=0.9)),
    "int8": (torch.float32, dict(state_dtype="int8")),
    "bfloat16 state": (torch.float32, dict(state_dtype="bfloat16")),
    "kahan": (torch.bfloat16, dict(rounding="kahan")),
    "stochastic": (torch.bfloat16, dict(rounding="stochastic", seed=3)),
    "float16": (torch.float16, {}),
    "complex": (torch.complex64, {}),
    "cautious": (torch.float32, dict(cautious=True)),
    "all": (torch.bfloat16, dict(max_norm=1.0, weight_decay=0.1, ema_decay=0.9, state_dtype="int8", maximize=True)),
}


@pytest.mark.parametrize("together", TOGETHER)
def test_nested_sums_with_all_else(together: str) -> None:
    """What surrounds the rule is in the formula before it is cut: kernels do what eager torch does."""
    dtype, options = TOGETHER[together]
    results = []
    for backend in BACKENDS:
        params = [torch.nn.Parameter(randn(n, dtype=dtype, seed=i)) for i, n in enumerate((40_000, 300, 7, 1))]
        optimizer = Nested(params, backend=backend, **options)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = gradient(p, step, i)
            optimizer.step()
        results.append([*params, *(kept["ema"] for kept in optimizer.state.values() if "ema" in kept)])
    half = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
    for got in results[:2]:
        for a, b in zip(got, results[2], strict=True):
            wrong = (a - b).abs() > half.get(dtype, 3e-6) * b.abs().max()
            assert wrong.sum() <= (2 if together in ("cautious", "all", "int8") and a.numel() > 1000 else 0)


def test_gains_reach_the_sums() -> None:
    """A loss that was scaled makes the steps of one that was not: sums are of unscaled gradients."""
    results = []
    for scale in (1.0, 1024.0):
        p = torch.nn.Parameter(randn(100))
        optimizer = Nested([p])
        for step in range(3):
            p.grad = randn(100, seed=step) * scale
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
        results.append(p.detach())
    assert_equal(*results)


@pytest.mark.parametrize("large", [0.0, 3e8])
@pytest.mark.parametrize("n", [1, 15, 16_383, 16_384, 16_385, 100_003])
def test_sums_do_not_fill_up(n: int, large: float) -> None:
    """Ones of float32, however many, are counted exactly; beside a number that would swallow them, too, but for those
    of its block of 256."""

    class Total(Optimizer):
        has_step = False

        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {}, **options)

        @staticmethod
        def rule(p, g):
            return 0 * p + (total(g) - large)

    for backend in BACKENDS:
        p = torch.nn.Parameter(torch.zeros(n))
        p.grad = torch.ones(n)
        p.grad[n // 2] += large
        Total([p], backend=backend).step()
        [found] = p.unique().tolist()
        assert abs(found - n) <= (256 if large else 0)
