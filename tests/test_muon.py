"""Muon and NorMuon: against NumPy versions with an exact polar factor, and what an orthogonal step must be."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import schuss
from cases import Case, assert_equal, drive, gradient, lockstep, orthogonalize, randn
from schuss import optim
from schuss.engine.storage import MAPS
from schuss.formula import matrix_function

Array = np.ndarray[Any, Any]
BACKENDS = ("numba", "foreach", "reference")
RULES = (optim.Muon, optim.NorMuon)
MATRICES = ((5, 7), (7, 5), (5, 7), (6, 6), (1, 9), (9, 1))
backends = pytest.mark.parametrize("backend", BACKENDS)
rules = pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)


def polar(x: torch.Tensor, **_: Any) -> torch.Tensor:
    """U Vᵀ of matrices U S Vᵀ."""
    u, _s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return (u @ v).to(x.dtype)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The polar factor itself in the place of iterations that come close to it."""
    monkeypatch.setattr("schuss.optim.muon.orthogonalize", matrix_function(polar))


def matrices(dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = MATRICES) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]


def steps_of(optimizer: Any, params: Sequence[torch.Tensor], seed: int = 0, size: float = 1.0) -> list[torch.Tensor]:
    """How far each parameter moves in a step with given gradients."""
    before = [p.detach().clone() for p in params]
    for i, p in enumerate(params):
        p.grad = size * gradient(p, seed, i)
    optimizer.step()
    return [p.detach() - b for p, b in zip(params, before, strict=True)]


# --- the papers -------------------------------------------------------------------------------------------------------


class Paper:
    """Jordan 2024, with the decay and the two rates of torch; NorMuon: Li et al. 2025, algorithm 1."""

    def __init__(
        self, *, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95, nesterov: bool = True,
        adjust_lr_fn: str | None = None, beta2: float | None = None, eps2: float = 1e-10,
    ) -> None:  # fmt: skip
        self.lr, self.decay, self.mu, self.nesterov = lr, weight_decay, momentum, nesterov
        self.adjust, self.beta2, self.eps2 = adjust_lr_fn, beta2, eps2
        self.kept: dict[int, dict[str, Any]] = {}

    def step(self, x: list[Array], grads: Sequence[Array]) -> None:
        for i, g in enumerate(grads):
            kept, (n, m) = self.kept.setdefault(i, {"m": 0.0, "v": 0.0}), g.shape
            kept["m"] = self.mu * kept["m"] + (1 - self.mu) * g
            u, _, v = np.linalg.svd(
                self.mu * kept["m"] + (1 - self.mu) * g if self.nesterov else kept["m"], full_matrices=False
            )
            o = u @ v
            rate = self.lr * (0.2 * math.sqrt(max(n, m)) if self.adjust else math.sqrt(max(1, n / m)))
            if self.beta2 is not None:
                kept["v"] = self.beta2 * kept["v"] + (1 - self.beta2) * (o * o).mean(1, keepdims=True)
                o = o / (np.sqrt(kept["v"]) + self.eps2)
                rate *= math.sqrt(min(n, m)) / np.linalg.norm(o)
            x[i] = (1 - self.lr * self.decay) * x[i] - rate * o


FORMS = [
    ("Muon", dict(lr=0.1)),
    ("Muon", dict(lr=0.1, weight_decay=0.3, momentum=0.5, nesterov=False, adjust_lr_fn="match_rms_adamw")),
    ("NorMuon", dict(lr=0.1, beta2=0.95)),
    ("NorMuon", dict(lr=0.1, weight_decay=0.3, beta2=0.5, eps2=0.3, nesterov=False, adjust_lr_fn="match_rms_adamw")),
]


@pytest.mark.usefixtures("exact")
@backends
@pytest.mark.parametrize(("name", "kwargs"), FORMS, ids=[str(Case(*form)) for form in FORMS])
def test_what_the_papers_say(name: str, kwargs: dict[str, Any], backend: str) -> None:
    params = matrices()
    x = [p.detach().numpy().copy() for p in params]
    optimizer, expected = getattr(optim, name)(params, **kwargs, backend=backend), Paper(**kwargs)
    for step in range(12):
        grads = [gradient(p, step, i) for i, p in enumerate(params)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        expected.step(x, [g.numpy() for g in grads])
        for i, (p, a) in enumerate(zip(params, x, strict=True)):
            np.testing.assert_allclose(p.detach().numpy(), a, rtol=1e-9, atol=1e-11, err_msg=f"{step}: {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}], ids=["", "other"])
def test_torch_within_the_noise_of_bfloat16(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Both iterate in bfloat16 but in another order, so that elements of the step differ by some per cent."""
    shapes = ((60, 90), (90, 60), (40, 200), (64, 64))
    ours, theirs = matrices(dtype, shapes), matrices(dtype, shapes)
    a, b = (
        optim.Muon(ours, lr=1.0, weight_decay=0.0, **kwargs),
        torch.optim.Muon(theirs, lr=1.0, weight_decay=0, **kwargs),
    )
    for step in range(3):
        for mine, other in zip(steps_of(a, ours, step), steps_of(b, theirs, step), strict=True):
            assert (mine - other).norm() < 0.03 * other.norm()


# --- what an orthogonal step is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)], ids=str)
@pytest.mark.parametrize(
    ("preset", "low", "high"), [("jordan", 0.47, 1.21), ("polar_express", 0.84, 1.16)], ids=["jordan", "polar_express"]
)
def test_singular_values_of_a_step(preset: str, low: float, high: float, shape: tuple[int, int]) -> None:
    """Of a gradient whose singular values lie between 0.01 and 1; bfloat16 adds some per cent to the published ranges.
    Polar Express is the tighter one."""
    u, _, v = torch.linalg.svd(randn(*shape, seed=1), full_matrices=False)
    g = u * torch.logspace(-2, 0, min(shape), dtype=torch.float64) @ v
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = optim.Muon([p], lr=1.0, weight_decay=0.0, ns_coefficients=preset)
    p.grad = g
    optimizer.step()
    values = torch.linalg.svdvals(p.detach()) / math.sqrt(max(1, shape[0] / shape[1]))
    assert low - 0.03 < values.min()
    assert values.max() < high + 0.03
    assert (values - 1).abs().mean() < (0.1 if preset == "polar_express" else 0.25)


def test_presets_and_sequences_of_coefficients() -> None:
    """Jordan's numbers are the default; of a sequence the last triple goes on, and what is beyond ns_steps is cut."""
    a, b, c = (2.0, -1.5, 0.5), (3.0, -3.2, 1.2), (1.5, -0.5, 0.0)

    def moved(**kwargs: Any) -> torch.Tensor:
        return steps_of(optim.Muon(params := matrices(torch.float32), lr=0.1, **kwargs), params)[0]

    assert_equal(moved(ns_coefficients="jordan"), moved())
    assert_equal(moved(ns_coefficients=[a, b], ns_steps=4), moved(ns_coefficients=[a, b, b, b], ns_steps=4))
    assert_equal(moved(ns_coefficients=[a, b, c], ns_steps=2), moved(ns_coefficients=[a, b], ns_steps=2))
    assert not torch.equal(moved(ns_coefficients=[a, b], ns_steps=2), moved(ns_coefficients=[b, a], ns_steps=2))
    assert not torch.equal(moved(ns_coefficients="polar_express"), moved())


def test_changed_coefficients_count_from_the_next_step() -> None:
    ours, theirs = matrices(torch.float32), matrices(torch.float32)
    a, b = optim.Muon(ours), optim.Muon(theirs, ns_coefficients="polar_express", ns_steps=3)
    steps_of(a, ours)
    a.param_groups[0].update(ns_coefficients="polar_express", ns_steps=3)
    steps_of(b, theirs)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    for mine, other in zip(steps_of(a, ours, 1), steps_of(b, theirs, 1), strict=True):
        assert_equal(mine, other)


@pytest.mark.usefixtures("exact")
def test_scalings() -> None:
    """ "original" bounds what a layer's output moves by: lr times the root of rows by columns. "match_rms_adamw" makes
    the root mean square of the elements 0.2 lr, whatever the shape."""
    for shape in ((4, 16), (16, 4), (9, 9)):
        for adjust, scale in ((None, max(1, shape[0] / shape[1]) ** 0.5), ("match_rms_adamw", 0.2 * max(shape) ** 0.5)):
            params = matrices(shapes=[shape])
            [step] = steps_of(optim.Muon(params, lr=0.5, weight_decay=0.0, adjust_lr_fn=adjust), params)
            assert torch.linalg.matrix_norm(step, 2).item() == pytest.approx(0.5 * scale, rel=1e-12)
            if adjust:
                assert step.square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=1e-12)


@rules
@pytest.mark.usefixtures("exact_matrices")
def test_equivariance(cls: type[Any]) -> None:
    """Turned columns turn the step. Turned rows do so with Muon; NorMuon tells rows apart, and follows their order."""
    p, g = randn(5, 8), [randn(5, 8, seed=i) for i in range(3)]
    right, left = torch.linalg.qr(randn(8, 8, seed=7))[0], torch.linalg.qr(randn(5, 5, seed=8))[0]
    if cls is optim.NorMuon:
        right, left = (
            torch.eye(8, dtype=torch.float64)[[3, 1, 0, 2, 7, 6, 5, 4]],
            torch.eye(5, dtype=torch.float64)[[4, 2, 0, 3, 1]],
        )
    plain, turned = nn.Parameter(p.clone()), nn.Parameter(left @ p @ right)
    a, b = cls([plain], lr=0.1), cls([turned], lr=0.1)
    for grad in g:
        plain.grad, turned.grad = grad, left @ grad @ right
        a.step()
        b.step()
    torch.testing.assert_close(turned.detach(), left @ plain.detach() @ right, rtol=1e-10, atol=1e-11)


@rules
@backends
def test_the_sign_and_the_size_of_gradients(cls: type[Any], backend: str) -> None:
    """Other signs of gradients and parameters, other signs of steps; a power of two as a factor changes no bit."""
    runs = []
    for factor in (1.0, -1.0, 2.0**9, 2.0**-9):
        params = matrices(torch.float32)
        with torch.no_grad():
            for p in params:
                p.mul_(math.copysign(1.0, factor))
        optimizer = cls(params, lr=0.1, eps=0.0, backend=backend)
        for step in range(3):
            steps_of(optimizer, params, step, factor)
        runs.append([math.copysign(1.0, factor) * p.detach() for p in params])
    for other in runs[1:]:
        assert_equal(other, runs[0])


@pytest.mark.usefixtures("exact_matrices")
@backends
def test_normuon_moves_as_far_as_muon(backend: str) -> None:
    """It gives the step another direction, not another length. In the first step all rows have the same length."""
    plain, normed = matrices(), matrices()
    a = optim.Muon(plain, lr=0.1, weight_decay=0.0, backend=backend)
    b = optim.NorMuon(normed, lr=0.1, weight_decay=0.0, eps2=0.0, backend=backend)
    for step in range(4):
        for muon, normuon in zip(steps_of(a, plain, step), steps_of(b, normed, step), strict=True):
            assert normuon.norm().item() == pytest.approx(muon.norm().item(), rel=1e-9)
            if step == 0:
                rows = normuon.norm(dim=1)
                torch.testing.assert_close(rows, rows.mean().expand_as(rows), rtol=1e-8, atol=0)


@backends
def test_kernels_of_convolutions_are_matrices(backend: str) -> None:
    """One row for each output channel: to the bit the step of the flattened matrix."""
    kernel, flat = nn.Parameter(randn(8, 3, 5, 5, dtype=torch.float32)), nn.Parameter(randn(8, 75, dtype=torch.float32))
    with torch.no_grad():
        flat.copy_(kernel.flatten(1))
    a, b = (optim.Muon([p], lr=0.1, backend=backend) for p in (kernel, flat))
    for step in range(3):
        kernel.grad = gradient(kernel, step)
        flat.grad = kernel.grad.flatten(1).clone()
        a.step()
        b.step()
    assert_equal(kernel.detach().flatten(1), flat.detach())
    assert a.state[kernel]["momentum_buffer"].shape == kernel.shape


def test_no_gradient_is_no_direction() -> None:
    """Of a gradient of zeros nothing is left but the decay."""
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros(4, 6)
    optim.Muon([p], lr=0.1, weight_decay=0.5).step()
    assert (p == torch.tensor(0.95)).all()


# --- batches ----------------------------------------------------------------------------------------------------------


def trained(cls: type[Any], params: Sequence[torch.Tensor], *, alone: bool = False, **kwargs: Any) -> list[Any]:
    """Optimizers of these parameters, together or each alone, after some steps of which not all have all gradients."""
    made = [cls([p], **kwargs) for p in params] if alone else [cls(params, **kwargs)]
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = None if (step + i) % 3 == 1 else gradient(p, step, i)
        for optimizer in made:
            optimizer.step()
    return made


@rules
@backends
def test_a_batch_is_its_matrices_one_by_one(cls: type[Any], backend: str) -> None:
    """Matrices of one shape are orthogonalized together, those without a gradient left out: no bit of it shows."""
    shapes = [(12, 20)] * 5 + [(20, 12)] * 2
    together, apart = matrices(torch.float32, shapes), matrices(torch.float32, shapes)
    [one] = trained(cls, together, backend=backend, lr=0.1)
    several = trained(cls, apart, alone=True, backend=backend, lr=0.1)
    for p, q, other in zip(together, apart, several, strict=True):
        assert_equal(p.detach(), q.detach())
        assert_equal(one.state[p], other.state[q])


@rules
def test_large_batches_are_split(cls: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that their memory is bounded; to the same bits."""
    shapes = [(12, 20)] * 7
    whole, split = matrices(torch.float32, shapes), matrices(torch.float32, shapes)
    [a] = trained(cls, whole, lr=0.1)
    monkeypatch.setattr("schuss.engine.plan.LARGEST_BATCH", 3 * 240)
    [b] = trained(cls, split, lr=0.1)
    assert [len(bucket.params) for bucket in a._plan._buckets] == [7]
    assert [len(bucket.params) for bucket in b._plan._buckets] == [3, 3, 1]
    assert_equal([p.detach() for p in split], [p.detach() for p in whole])


def test_no_matrix_outlives_the_step() -> None:
    """What functions of matrices are given and return is as large as the parameters; it is freed."""
    params = matrices(torch.float32)
    for cls in RULES:
        [optimizer] = trained(cls, params)
        assert all(bucket._matrices == bucket._new_beside == {} for bucket in optimizer._plan._buckets)


@rules
@backends
def test_a_nan_spoils_its_own_matrix(cls: type[Any], backend: str) -> None:
    params = matrices(torch.float32, [(4, 6)] * 3)
    optimizer = cls(params, backend=backend)
    for i, p in enumerate(params):
        p.grad = gradient(p, i)
    params[1].grad[2, 3] = math.nan
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert_equal([p.grad for p in params], before)
    assert [p.isfinite().all().item() for p in params] == [True, False, True]
    assert params[1].isnan().all()


def test_matrices_that_do_not_lie_row_by_row_take_eager_torch() -> None:
    straight, turned = nn.Parameter(randn(6, 4)), nn.Parameter(randn(6, 4).t().contiguous().t())
    optimizer = optim.Muon([straight, turned], lr=0.1)
    for step in range(4):
        straight.grad = randn(6, 4, seed=step)
        turned.grad = straight.grad.t().contiguous().t()
        optimizer.step()
    assert_equal(turned.detach(), straight.detach())
    lines = str(optimizer.plan()).splitlines()[-2:]
    assert lines[0].split()[-1] == "numba"
    assert re.search(r"reference +rows and columns of a tensor whose rows do not lie one after the other", lines[1])


# --- with the options of all ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact_matrices")
@backends
def test_clipping_shortens_what_is_gathered_not_the_step(backend: str) -> None:
    params, others = matrices(), matrices()
    plain, clipped = optim.Muon(params, backend=backend), optim.Muon(others, max_norm=0.5, backend=backend)
    assert_close(steps_of(clipped, others), steps_of(plain, params))
    norm = clipped.last_grad_norm.item()
    assert norm == pytest.approx(math.sqrt(sum(p.grad.square().sum().item() for p in params)), rel=1e-6)
    for p, q in zip(params, others, strict=True):
        a, b = plain.state[p]["momentum_buffer"], clipped.state[q]["momentum_buffer"]
        torch.testing.assert_close(b, a * 0.5 / (norm + 1e-6), rtol=1e-6, atol=0)


def assert_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("exact_matrices")
@backends
def test_cautious_steps(backend: str) -> None:
    """Elements whose step does not go against their gradient rest, the others go further by the inverse of their
    share."""
    params, others = matrices(), matrices()
    plain, careful = optim.Muon(params, weight_decay=0.0, backend=backend), optim.Muon(
        others, weight_decay=0.0, cautious=True, backend=backend
    )  # fmt: skip
    for seed in range(3):
        expected, found = steps_of(plain, params, seed), steps_of(careful, others, seed)
        for step, q, moved in zip(expected, others, found, strict=True):
            goes = -step * q.grad > 0
            torch.testing.assert_close(moved, step * goes / goes.double().mean(), rtol=1e-9, atol=1e-12)


@rules
def test_averages(cls: type[Any]) -> None:
    params, others = matrices(torch.float32), matrices(torch.float32)
    plain, averaging = cls(params, lr=0.1), cls(others, lr=0.1, ema_decay=0.5)
    expected = None
    for step in range(4):
        steps_of(plain, params, step)
        steps_of(averaging, others, step)
        now = [p.detach().clone() for p in params]
        expected = now if expected is None else [0.5 * e + 0.5 * p for e, p in zip(expected, now, strict=True)]
    assert_equal([q.detach() for q in others], [p.detach() for p in params])
    for q, e in zip(others, expected, strict=True):
        torch.testing.assert_close(averaging.state[q]["ema"], e, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_momentum_in_fewer_bits(storage: str) -> None:
    """Steps are made of the momentum before it is rounded; 8 bits lose little of their direction."""
    params, others = matrices(torch.float32, [(80, 90)]), matrices(torch.float32, [(80, 90)])
    plain, small = optim.Muon(params, lr=1.0), optim.Muon(others, lr=1.0, state_dtype=storage)
    assert_equal(steps_of(small, others), steps_of(plain, params))
    kept, exact = small.state[others[0]], plain.state[params[0]]["momentum_buffer"]
    if storage == "bfloat16":
        assert_equal(kept["momentum_buffer"], exact.bfloat16())
    else:
        absmax = exact.flatten().split(256)
        assert kept["momentum_buffer_codes"].dtype in MAPS
        torch.testing.assert_close(kept["momentum_buffer_absmax"], torch.stack([a.abs().max() for a in absmax]))
    assert small.plan().state_bytes <= (0.51 if storage == "bfloat16" else 0.26) * plain.plan().state_bytes
    for seed in range(1, 6):
        [a], [b] = steps_of(plain, params, seed), steps_of(small, others, seed)
    assert torch.sum(a * b) / (a.norm() * b.norm()) > 0.98


def test_normuon_in_8_bits_takes_eager_torch() -> None:
    """Blocks of 256 codes do not end where rows do. The plan says so, and its momentum is Muon's."""
    params, others = matrices(torch.float32, [(80, 90)]), matrices(torch.float32, [(80, 90)])
    small, plain = optim.NorMuon(params, state_dtype="int8"), optim.Muon(others, state_dtype="int8")
    for seed in range(3):
        steps_of(small, params, seed)
        steps_of(plain, others, seed)
    for key in ("momentum_buffer_codes", "momentum_buffer_absmax"):
        assert_equal(small.state[params[0]][key], plain.state[others[0]][key])
    assert small.state[params[0]]["second_momentum"].dtype == torch.float32
    assert re.search(r"reference +means of rows beside 8-bit states", str(small.plan()))
    with pytest.raises(ValueError, match=r"backend='numba' cannot update .*: means of rows beside 8-bit states"):
        optim.NorMuon(matrices(torch.float32, [(80, 90)]), state_dtype="int8", backend="numba").plan()


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_small_steps_of_bfloat16_count(rounding: str) -> None:
    """Steps of a thousandth of what lies between numbers: rounded to the nearest they are lost."""
    moved = {}
    for how in ("nearest", rounding):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = optim.Muon([p], lr=2e-3, weight_decay=0.0, rounding=how)
        p.grad = torch.linalg.qr(randn(64, 64))[0].bfloat16()
        for _ in range(40):
            optimizer.step()
        direction = p.grad.double()
        moved[how] = -((p.detach().double() - 1) * direction).sum().item() / direction.square().sum().item()
    assert abs(moved["nearest"]) < 0.02
    assert moved[rounding] == pytest.approx(40 * 2e-3, rel=0.5)


def test_gradient_scaler_of_mixed_precision() -> None:
    """Unscaled in the first pass; an overflow changes nothing."""
    params, others = matrices(torch.float32), matrices(torch.float32)
    plain, scaled = optim.Muon(params, lr=0.1), optim.Muon(others, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        steps_of(plain, params, step)
        for spoil in (True, False):
            for i, q in enumerate(others):
                q.grad = gradient(q, step, i) * scaler.scale(torch.ones(())).item()
            if spoil:
                others[0].grad[0, 0] = math.inf
            scaler.step(scaled)
            scaler.update()
    assert_equal([q.detach() for q in others], [p.detach() for p in params])


# --- which parameters -------------------------------------------------------------------------------------------------


def test_vectors_are_named_and_told_where_they_belong() -> None:
    weight, bias, gain = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))
    message = (
        r"^Muon: its parameters must be matrices, of two dimensions or more; 2 of 3 are not: fc\.bias \(3,\), gain \(\)"
        r"\. They belong to another optimizer, .* schuss\.param_groups\(model, matrices=.* schuss\.Combined\.of\("
    )
    with pytest.raises(ValueError, match=message):
        optim.Muon([("fc.weight", weight), ("fc.bias", bias), ("gain", gain)])
    optimizer = optim.Muon([weight])
    for group in ({"params": [nn.Parameter(torch.ones(2, 2)), bias]}, {"params": bias}, {"params": iter([gain])}):
        with pytest.raises(ValueError, match=r"parameter \d of group 1 \((3,)?\)"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


def test_normuon_takes_no_kernels_of_convolutions() -> None:
    """Its rows would be those of single kernels."""
    kernel = nn.Parameter(torch.ones(4, 3, 2, 2))
    message = (
        r"^NorMuon: the number of dimensions .* \[2, 2\]; 1 of 1 have another: conv \(4, 3, 2, 2\)\. .*: Muon takes"
    )
    with pytest.raises(ValueError, match=message):
        optim.NorMuon([("conv", kernel)])
    with pytest.raises(
        ValueError, match=r"^NorMuon: its parameters must be matrices, of two dimensions; 1 of 2 are not"
    ):
        optim.NorMuon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))])
    optim.Muon([("conv", kernel)])


@rules
def test_complex_and_sparse_are_refused(cls: type[Any]) -> None:
    wave, table = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)), nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: its parameters must be real, and wave is complex64"):
        cls([("wave", wave)])
    optimizer = cls([("table", table)])
    with pytest.raises(ValueError, match=r"must be real, and parameter 0 of group 1 is complex64"):
        optimizer.add_param_group({"params": [wave]})
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match=rf"^{cls.__name__} does not support sparse gradients, and table has one"):
        optimizer.step()
    assert (table == 1).all()
    assert not optimizer.state


@backends
def test_empty_matrices(backend: str) -> None:
    for cls in RULES:
        params = matrices(torch.float32, [(0, 3), (3, 0), (2, 2)])
        optimizer = cls(params, backend=backend)
        drive(optimizer, params, 2)
        assert params[2].isfinite().all()


# --- with another optimizer for the rest ------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(self.up(x).relu())


class Gpt(nn.Module):
    def __init__(self, d: int = 16, tokens: int = 11) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(tokens, d), nn.ModuleList(Block(d) for _ in range(2))
        self.head = nn.Linear(d, tokens, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], set[str]]] = {
    "gpt": (
        Gpt,
        lambda: torch.arange(36).view(4, 9) % 11,
        {
            f"blocks.{i}.{name}.weight"
            for i in range(2)
            for name in ("attention.out_proj", "up", "down")
        } | {f"blocks.{i}.attention.in_proj_weight" for i in range(2)},
    ),
    "cnn": (cnn, lambda: randn(16, 1, 8, 8, dtype=torch.float32), {"0.weight", "3.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_hidden_matrices_of_a_model(name: str) -> None:
    """What belongs to Muon goes there, the rest to AdamW, and the model learns; kernels of convolutions among it."""
    torch.manual_seed(0)
    make, inputs, hidden = MODELS[name]
    model, x = make(), inputs()
    groups = schuss.param_groups(model, matrices={"lr": 0.02}, weight_decay=0.01)
    muon = optim.Muon
    optimizer = schuss.Combined.of(groups, matrices=muon, others=partial(optim.AdamW, lr=3e-3))
    inner = optimizer.optimizers["matrices"]
    assert isinstance(inner, optim.Muon)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for group in inner.param_groups for p in group["params"]} == hidden
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = model(x)
        target = x.roll(-1, 1).flatten() if name == "gpt" else torch.arange(16) % 4
        loss = nn.functional.cross_entropy(out.flatten(0, -2) if name == "gpt" else out, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# --- machine code -----------------------------------------------------------------------------------------------------


def test_both_passes_compile_for_a_gpu() -> None:
    """The one that gathers and writes bfloat16, and the one that updates: each memory place is read and written once,
    16 bytes a thread."""
    triton = pytest.importorskip("schuss.engine.triton")
    pytest.importorskip("triton")
    if triton.interpreted():
        pytest.skip("nothing is compiled in the interpreter")
    from schuss import describe

    first, second = describe.kernels(optim.Muon, {}, backend="triton")
    assert first.heading == "pass 1 of 2 writes matrices for torch: u1 = orthogonalize(b1)"
    assert second.heading == "pass 2 of 2 updates"
    for kernel in (first, second):
        machine = triton.compiled(kernel.label, kernel.source, kernel.layout)
        assert re.search(r"ld\.global(?:\.\w+)*\.v4\.\w?32", machine.ptx)
        assert triton.resources(machine).spilled_bytes == 0


def test_the_definition_in_float64() -> None:
    """The oracle of other tests is what torch's loop computes, when it computes in float64."""
    x = randn(6, 9)
    expected = x / x.norm()
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = expected @ expected.T
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalize(x[None], [(a, b, c)] * 5, 1e-7)[0], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("exact_matrices")
def test_torch_in_lockstep_with_exact_matrices() -> None:
    """All but the function of matrices is torch's to the last digits: momentum, both rates, decay, and state."""
    for kwargs in (
        dict(lr=0.1, momentum=0.0),
        dict(lr=0.1, momentum=1.0, nesterov=False),
        dict(lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
        dict(lr=0.1, adjust_lr_fn="original", ns_steps=1, eps=3.0),
        dict(lr=0.1, ns_steps=0, weight_decay=0.0),
    ):
        ours, theirs = matrices(), matrices()
        lockstep(optim.Muon(ours, **kwargs), torch.optim.Muon(theirs, **kwargs), ours, theirs, 6, missing=True)
