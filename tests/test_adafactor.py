"""Adafactor: against a NumPy version of its paper, torch in lock-step on tensors of every dimension, and identities."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cases import Case, assert_equal, drive, lockstep, randn
from schuss import optim

Array = np.ndarray[Any, Any]
BACKENDS = ("numba", "foreach", "reference")
SHAPES = ((5, 7), (3,), (), (2, 3, 4), (3, 2, 4, 3), (1, 9), (9, 1), (5, 7))


def rms(a: Array) -> float:
    return math.sqrt(np.mean(a * a))


class Paper:
    """Shazeer, Stern 2018, algorithms 4 and 5 with the settings of algorithm 6, for float64.

    As torch documents it, `lr` takes the place of the constant in ρ and scales a decoupled decay, and ε₁ bounds the
    estimate in the place of joining the squares; with `literal` it joins them, as in the paper.
    """

    def __init__(
        self, *, lr: float = 1e-2, beta2_decay: float = -0.8, eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0, weight_decay: float = 0.0, beta1: float | None = None, relative_step: bool = True,
        scale_parameter: bool = True, warmup_init: bool = False, literal: bool = False,
    ) -> None:  # fmt: skip
        self.lr, self.power, self.d, self.decay, self.beta1 = lr, beta2_decay, d, weight_decay, beta1
        self.eps1, self.eps2 = np.finfo(np.float64).eps if eps[0] is None else eps[0], eps[1]
        self.relative, self.scaled, self.warm, self.literal = relative_step, scale_parameter, warmup_init, literal
        self.kept: dict[int, dict[str, Any]] = {}

    def estimate(self, g: Array, kept: dict[str, Any], beta: float) -> Array:
        """The second moment."""
        square = g * g + (self.eps1 if self.literal else 0.0)
        if g.ndim < 2:
            kept["v"] = v = beta * kept.get("v", 0.0) + (1 - beta) * square
        else:
            kept["r"] = r = beta * kept.get("r", 0.0) + (1 - beta) * square.sum(-1, keepdims=True)
            kept["c"] = c = beta * kept.get("c", 0.0) + (1 - beta) * square.sum(-2, keepdims=True)
            n, m = g.shape[-2:]
            total = r.sum(-2, keepdims=True)
            v = r * c / (total if self.literal else np.maximum(total, n * m * self.eps1))
        return v if self.literal else np.maximum(v, self.eps1**2)

    def step(self, x: list[Array], grads: Sequence[Array | None]) -> None:
        for i, g in enumerate(grads):
            if g is None:
                continue
            kept = self.kept.setdefault(i, {"t": 0})
            t = kept["t"] = kept["t"] + 1
            u = g / np.sqrt(self.estimate(g, kept, 1 - t**self.power))
            rho = min(1e-6 * t if self.warm else self.lr, 1 / math.sqrt(t)) if self.relative else self.lr
            alpha = rho * (max(self.eps2, rms(x[i])) if self.scaled else 1.0)
            u = alpha * u / max(1.0, rms(u) / self.d)
            if self.beta1 is not None:
                u = kept["m"] = self.beta1 * kept.get("m", 0.0) + (1 - self.beta1) * u
            x[i] = (1 - self.lr * self.decay) * x[i] - u


FORMS: list[dict[str, Any]] = [
    {},
    dict(lr=0.3, beta2_decay=-0.5, eps=(1e-2, 0.5), d=2.0, weight_decay=0.1),
    dict(lr=0.1, beta1=0.9),
    dict(lr=0.1, relative_step=False),
    dict(lr=0.1, scale_parameter=False, beta1=0.5, weight_decay=0.1),
    dict(lr=0.1, warmup_init=True, eps=(None, 10.0)),
]


def gradients(x: Sequence[Array], step: int, size: float = 1.0) -> list[Array | None]:
    """The gradients of a step; one of four steps is large, and some tensors rest."""
    size *= 30.0 if step % 4 == 3 else 1.0
    found = [size * randn(*a.shape, seed=100 * step + i).numpy() for i, a in enumerate(x)]
    return [None if step % 5 == 2 and i % 3 == 1 else g for i, g in enumerate(found)]


def trained(
    params: Sequence[torch.Tensor], optimizer: Any, grads: Sequence[Sequence[Array | None]], sign: float = 1.0
) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else torch.tensor(sign * g, dtype=p.dtype)
        optimizer.step()


RUNS = [
    *((kwargs, backend, False) for kwargs in FORMS for backend in BACKENDS),
    (FORMS[1], "numba", True),
]


@pytest.mark.parametrize(
    ("kwargs", "backend", "maximize"),
    RUNS,
    ids=[f"{Case('Adafactor', kwargs)}-{backend}{'-maximize' * up}" for kwargs, backend, up in RUNS],
)
def test_what_the_paper_says(kwargs: dict[str, Any], backend: str, maximize: bool) -> None:
    x = [randn(*shape, seed=i).numpy() for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(torch.tensor(a)) for a in x]
    optimizer, expected = optim.Adafactor(params, **kwargs, backend=backend, maximize=maximize), Paper(**kwargs)
    for step in range(16):
        grads = gradients(x, step)
        trained(params, optimizer, [grads], -1.0 if maximize else 1.0)
        expected.step(x, grads)
        for i, (p, a) in enumerate(zip(params, x, strict=True)):
            np.testing.assert_allclose(p.detach().numpy(), a, rtol=1e-12, atol=1e-13, err_msg=f"{step}: {i}")


def test_with_a_small_epsilon_it_is_the_paper_to_the_letter() -> None:
    """ε₁ = 1e-30, which the paper adds to squares, changes none of 1e-4 or more."""
    x = [randn(*shape, seed=i).numpy() for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(torch.tensor(a)) for a in x]
    grads = [gradients(x, step, 1e-2) for step in range(10)]
    trained(params, optim.Adafactor(params, eps=(1e-30, 1e-3)), grads)
    expected = Paper(eps=(1e-30, 1e-3), literal=True)
    for step in grads:
        expected.step(x, step)
    for p, a in zip(params, x, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), a, rtol=1e-12)


# --- torch ------------------------------------------------------------------------------------------------------------

IN_TORCH: list[dict[str, Any]] = [
    {},
    dict(lr=0.3, weight_decay=0.1),
    dict(lr=0.1, beta2_decay=-0.5, eps=(1e-2, 0.5), d=2.0, maximize=True),
]


def tensors(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("kwargs", IN_TORCH, ids=lambda kwargs: str(Case("Adafactor", kwargs)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("theirs", [{}, {"foreach": True}], ids=["loop", "foreach"])
def test_torch_in_lockstep(kwargs: dict[str, Any], dtype: torch.dtype, theirs: dict[str, Any]) -> None:
    """Tensors of none to four dimensions, single rows and columns; with more than two, each pair of the last two is a
    matrix."""
    ours, others = tensors(dtype), tensors(dtype)
    a, b = optim.Adafactor(ours, **kwargs, **theirs), torch.optim.Adafactor(others, **kwargs, **theirs)
    lockstep(a, b, ours, others, 10, missing=True)


@pytest.mark.parametrize("kwargs", IN_TORCH, ids=lambda kwargs: str(Case("Adafactor", kwargs)))
@pytest.mark.parametrize("first", [torch.optim, optim], ids=["torch to schuss", "schuss to torch"])
def test_checkpoints_are_exchanged(kwargs: dict[str, Any], first: Any) -> None:
    second = optim if first is torch.optim else torch.optim
    params, oracle = tensors(torch.float64), tensors(torch.float64)
    source, whole = first.Adafactor(params, **kwargs), torch.optim.Adafactor(oracle, **kwargs)
    drive(source, params, 4, missing=True)
    drive(whole, oracle, 4, missing=True)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    taken = [torch.nn.Parameter(p.detach().clone()) for p in params]
    target = second.Adafactor(taken, **kwargs)
    target.load_state_dict(torch.load(file, weights_only=True))
    lockstep(target, whole, taken, oracle, range(4, 9), missing=True)


def test_each_dtype_has_its_own_epsilon() -> None:
    """None is the epsilon of the parameter's dtype; torch takes that of the first parameter for the whole group."""
    wide, narrow = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)), torch.nn.Parameter(torch.zeros(4))
    optimizer = optim.Adafactor([wide, narrow], eps=(None, 1.0), d=1e30)
    for p in (wide, narrow):
        p.grad = torch.full_like(p, 1e-30)
    optimizer.step()
    for p in (wide, narrow):
        assert p[0].item() == pytest.approx(-1e-2 * 1e-30 / torch.finfo(p.dtype).eps, rel=1e-6)


def test_one_nan_spoils_its_tensor() -> None:
    """The root mean square of the step is NaN then. torch's loop compares it in Python, where 1 is not less than NaN,
    and goes on with a vector of which one element is NaN."""
    results = []
    for library in (optim, torch.optim):
        vector, matrix = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), (3, 2)))
        optimizer = library.Adafactor([vector, matrix])
        vector.grad, matrix.grad = torch.tensor([math.nan, 1.0, 1.0]), torch.ones(3, 2)
        optimizer.step()
        results.append(vector.isnan().tolist())
        assert matrix.isfinite().all()
    assert results == [[True, True, True], [True, False, False]]


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 9), (2, 3, 4, 5)], ids=str)
def test_squares_of_rank_one_are_found_exactly(shape: tuple[int, ...], backend: str) -> None:
    """Then row times column is the squared gradient itself, and every element moves by α, against its gradient."""
    *batch, n, m = shape
    a, b = randn(*batch, n, 1, seed=1), randn(*batch, 1, m, seed=2)
    g = a * b * randn(*shape, seed=3).sign()
    p = torch.nn.Parameter(randn(*shape))
    optimizer = optim.Adafactor([p], backend=backend)
    for t in range(1, 4):
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        alpha = min(1e-2, t**-0.5) * before.square().mean().sqrt()
        torch.testing.assert_close(before - p.detach(), alpha * g.sign(), rtol=1e-11, atol=0)


def test_a_jump_of_the_gradients_is_clipped() -> None:
    """The root mean square of a step is at most d times α, however much larger gradients become at once."""
    p = torch.nn.Parameter(randn(20, 30))
    optimizer = optim.Adafactor([p], d=1.5)
    for t in range(1, 30):
        before = p.detach().clone()
        p.grad = randn(20, 30, seed=t) * (1e6 if t == 20 else 1.0)
        optimizer.step()
        share = ((p.detach() - before).square().mean() / before.square().mean()).sqrt().item() / min(1e-2, t**-0.5)
        assert share <= 1.5 * (1 + 1e-12)
        if t == 20:
            assert share == pytest.approx(1.5, rel=1e-12)


def test_steps_are_relative_to_the_parameter_until_it_is_small() -> None:
    """Twice the parameter, twice the step, whatever the size of gradients; below ε₂ the step stays."""
    moved = {}
    for factor in (2.0**-20, 2.0**-15, 1.0, 2.0):
        p = torch.nn.Parameter(factor * randn(8, 8))
        optimizer = optim.Adafactor([p], eps=(0.0, 1e-3))
        p.grad = factor**2 * randn(8, 8, seed=1)
        before = p.detach().clone()
        optimizer.step()
        moved[factor] = before - p.detach()
    torch.testing.assert_close(moved[2.0], 2 * moved[1.0], rtol=1e-12, atol=0)
    torch.testing.assert_close(moved[2.0**-15], moved[2.0**-20], rtol=1e-9, atol=0)
    assert moved[2.0**-15].square().mean().sqrt().item() == pytest.approx(1e-2 * 1e-3, rel=0.3)


def test_lr_is_the_largest_relative_step() -> None:
    """From step 1 / lr² on, 1 / sqrt(t) is the smaller one, and lr has no say any more."""
    results = []
    for lr in (0.01, 0.1):
        p = torch.nn.Parameter(randn(5, 4))
        optimizer = optim.Adafactor([p], lr=lr)
        p.grad = randn(5, 4, seed=1)
        optimizer.step()
        with torch.no_grad():
            p.copy_(randn(5, 4))
        optimizer.state[p]["step"].fill_(20_000)
        optimizer.step()
        results.append(p.detach())
    assert_equal(*results)


def test_a_rate_of_ones_own() -> None:
    """With relative_step and scale_parameter off the root mean square of the first step is lr."""
    p = torch.nn.Parameter(100 * randn(50, 40))
    before = p.detach().clone()
    p.grad = 1e-3 * randn(50, 40, seed=1)
    optim.Adafactor([p], lr=1e-3, relative_step=False, scale_parameter=False).step()
    assert (p.detach() - before).square().mean().sqrt().item() == pytest.approx(1e-3, rel=1e-9)


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_is_a_row_and_a_column() -> None:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((1000, 500), (8, 4, 3, 3), (1000,))]
    optimizer = optim.Adafactor(params)
    said = optimizer.plan().state_bytes
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    shapes = [{k: tuple(v.shape) for k, v in optimizer.state[p].items()} for p in params]
    assert shapes == [
        {"step": (), "row_var": (1000, 1), "col_var": (1, 500)},
        {"step": (), "row_var": (8, 4, 3, 1), "col_var": (8, 4, 1, 3)},
        {"step": (), "variance": (1000,)},
    ]
    assert said == optimizer.plan().state_bytes == 4 * (1500 + 2 * 96 + 1000)


def test_state_in_8_bits_is_that_of_vectors() -> None:
    """Rows and columns stay float32, being few; a mean of steps may not be stored so."""
    params = [torch.nn.Parameter(randn(64, 80, dtype=torch.float32)), torch.nn.Parameter(torch.ones(5000))]
    optimizer = optim.Adafactor(params, state_dtype="int8")
    drive(optimizer, params, 3)
    assert {k: v.dtype for k, v in optimizer.state[params[0]].items() if v.dim()} == {
        "row_var": torch.float32,
        "col_var": torch.float32,
    }
    assert optimizer.state[params[1]]["variance_codes"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"state_dtype of 'exp_avg' must be float32 or bfloat16"):
        optim.Adafactor(params, state_dtype="int8", beta1=0.9)


def test_matrices_that_do_not_lie_row_by_row_take_eager_torch() -> None:
    """With the same numbers, and the plan says so."""
    straight, turned = torch.nn.Parameter(randn(6, 4)), torch.nn.Parameter(randn(6, 4).t().contiguous().t())
    optimizer = optim.Adafactor([straight, turned])
    for step in range(4):
        straight.grad = randn(6, 4, seed=step)
        turned.grad = straight.grad.t().contiguous().t()
        optimizer.step()
    torch.testing.assert_close(turned.detach(), straight.detach(), rtol=1e-12, atol=1e-14)
    lines = str(optimizer.plan()).splitlines()[-2:]
    assert lines[0].split()[-1] == "numba"
    assert re.search(r"reference +rows and columns of a tensor whose rows do not lie one after the other", lines[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tensors(backend: str) -> None:
    """torch's Adafactor divides by their number of elements."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((0,), (0, 3), (3, 0), (2, 0, 3), (2, 2))]
    optimizer = optim.Adafactor(params, backend=backend)
    drive(optimizer, params, 3)
    assert all(value.isfinite().all() for kept in optimizer.state.values() for value in kept.values())
    assert params[-1].isfinite().all()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_complex_parameters_are_refused_at_once() -> None:
    real, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    message = r"^Adafactor: its parameters must be real, and phase is complex64; give it to .*AdamW$"
    with pytest.raises(ValueError, match=message):
        optim.Adafactor([("gain", real), ("phase", other)])
    optimizer = optim.Adafactor([("gain", real)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("phase", other)]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_and_change_nothing() -> None:
    p, q = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizer = optim.Adafactor([("dense", p), ("table", q)])
    p.grad = torch.ones(3, 2)
    q.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="Adafactor does not support sparse gradients, and table has one"):
        optimizer.step()
    assert (p == 1).all()
    assert not optimizer.state
