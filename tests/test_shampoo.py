"""Shampoo: against a NumPy version of the papers, against the methods that are grafted, and bad matrices."""

import copy
import io
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from cases import assert_equal, randn
from schuss import optim
from schuss.matrices import kronecker

Array = np.ndarray[Any, Any]
BACKENDS = ("numba", "foreach", "reference")


class Paper:
    """Gupta, Koren, Singer 2018, algorithm 1, of one matrix, with the blocks and the grafting of Anil et al. 2020.

    Each block is a matrix by itself but for the norms; the roots that a step uses were computed before it.
    """

    def __init__(
        self, x: Array, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, momentum: float = 0.0, nesterov: bool = False, block_size: int = 1024,
        precondition_frequency: int = 10, start_preconditioning_step: int = 10, exponent: float | None = None,
        grafting: str | None = "adam", grafting_beta2: float = 0.999, grafting_eps: float = 1e-8,
    ) -> None:  # fmt: skip
        self.x, self.lr, self.betas, self.eps, self.decay = x, lr, betas, eps, weight_decay
        self.momentum, self.nesterov, self.b = momentum, nesterov, np.zeros(x.shape)
        self.frequency, self.start, self.exponent = precondition_frequency, start_preconditioning_step, exponent
        self.grafting, self.beta_g, self.eps_g = grafting, grafting_beta2, grafting_eps
        self.m, self.v, self.t = np.zeros(x.shape), np.zeros(x.shape), 0
        edges = []
        for n in x.shape:
            length = -(-n // -(-n // block_size))  # of as many blocks as there must be
            edges.append([range(i, min(i + length, n)) for i in range(0, n, length)])
        self.blocks = [np.ix_(rows, columns) for rows in edges[0] for columns in edges[1]]
        self.moments = [[0.0, 0.0] for _ in self.blocks]
        self.roots: list[list[Array]] | None = None
        self.sides = [i for i in (0, 1) if x.shape[i] > 1]

    def root(self, a: Array) -> Array:
        if self.betas[1] < 1:
            a = a / (1 - self.betas[1] ** self.t)
        values, vectors = np.linalg.eigh(a)
        power = 0.5 / len(self.sides) if self.exponent is None else self.exponent
        return (vectors * (values.clip(0) + self.eps * values[-1]) ** -power) @ vectors.T

    def step(self, g: Array) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        self.m = beta1 * self.m + (1 - beta1) * g
        a = hat = self.m / (1 - beta1**self.t)
        if self.grafting == "adagrad":
            self.v = self.v + g * g
        else:
            self.v = self.beta_g * self.v + (1 - self.beta_g) * g * g
        if self.grafting == "adam":
            a = hat / (np.sqrt(self.v / (1 - self.beta_g**self.t)) + self.eps_g)
        elif self.grafting in ("rmsprop", "adagrad"):
            a = hat / (np.sqrt(self.v) + self.eps_g)
        u = a if self.grafting else np.zeros(g.shape)
        if self.roots is not None:
            u = np.zeros(g.shape)
            for where, (left, right) in zip(self.blocks, self.roots, strict=True):
                u[where] = left @ hat[where] @ right
            if self.grafting:
                u = u * np.linalg.norm(a) / np.linalg.norm(u)
        self.b = self.momentum * self.b + u
        u = u + self.momentum * self.b if self.nesterov else self.b
        self.x = (1 - self.lr * self.decay) * self.x - self.lr * u
        weight = 1.0 if beta2 == 1 else 1 - beta2
        for where, pair in zip(self.blocks, self.moments, strict=True):
            pair[0] = beta2 * pair[0] + weight * g[where] @ g[where].T
            pair[1] = beta2 * pair[1] + weight * g[where].T @ g[where]
        if self.t >= self.start and self.t % self.frequency == 0:
            eyes = [[np.eye(len(a)) for a in pair] for pair in self.moments]
            self.roots = [
                [self.root(a) if i in self.sides else eye[i] for i, a in enumerate(pair)]
                for pair, eye in zip(self.moments, eyes, strict=True)
            ]


SOON = dict(lr=0.1, precondition_frequency=2, start_preconditioning_step=1)
PAPERS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((5, 7), {}),
    ((5, 7), SOON),
    ((5, 7), dict(lr=0.1, precondition_frequency=3, start_preconditioning_step=4, betas=(0.5, 0.8), weight_decay=0.3)),
    ((5, 7), dict(SOON, grafting=None, betas=(0.0, 1.0), eps=1e-3)),
    ((5, 7), dict(SOON, grafting=None, exponent=0.5, eps=1e-2)),
    ((5, 7), dict(SOON, grafting="sgd", momentum=0.9, betas=(0.5, 1.0))),
    ((5, 7), dict(SOON, grafting="rmsprop", grafting_beta2=0.8, grafting_eps=0.1, momentum=0.5, nesterov=True)),
    ((5, 7), dict(SOON, grafting="adagrad", grafting_eps=1e-3)),
    ((7, 5), dict(SOON, block_size=4)),  # 4 and 3 rows, 3 and 2 columns
    ((6, 8), dict(SOON, block_size=3, grafting=None, betas=(0.5, 0.9))),
    ((10, 4), dict(SOON, block_size=4)),  # 4, 4 and 2 rows
    ((4, 2, 3), dict(SOON, block_size=5)),
    ((5, 1), dict(SOON, eps=1e-2)),
    ((1, 5), dict(SOON, eps=1e-2, grafting=None)),
]


def step(optimizer: Any, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "kwargs"), PAPERS)
def test_what_the_papers_say(shape: tuple[int, ...], kwargs: dict[str, Any], backend: str) -> None:
    start = randn(*shape).numpy()
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer, paper = optim.Shampoo([p], backend=backend, **kwargs), Paper(start.reshape(shape[0], -1), **kwargs)
    for k in range(13):
        g = randn(*paper.x.shape, seed=100 + k).numpy() + 0.3 * paper.x
        step(optimizer, [p], [torch.tensor(g).reshape(shape)])
        paper.step(g)
        np.testing.assert_allclose(p.detach().numpy().reshape(shape[0], -1), paper.x, rtol=1e-9, atol=1e-9)
    assert paper.roots is not None
    assert abs(p.detach().numpy() - start).max() > kwargs.get("lr", 1e-3)


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_roots_of_one_gradient_make_it_orthogonal() -> None:
    """Of g = U S Vᵀ alone: L^(-1/4) g R^(-1/4) = U Vᵀ (Bernstein, Newhouse 2024, arXiv:2409.20325)."""
    p, g = torch.nn.Parameter(torch.zeros(5, 7, dtype=torch.float64)), randn(5, 7)
    optimizer = optim.Shampoo(
        [p], lr=0.1, grafting=None, betas=(0.0, 1.0), eps=1e-13, precondition_frequency=1, start_preconditioning_step=1
    )
    step(optimizer, [p], [g])
    assert not p.any(), "there are no roots at the first step"
    step(optimizer, [p], [g])
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(p.detach(), -0.1 * (u @ v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6)])
def test_of_a_vector_the_root_makes_its_length_one(shape: tuple[int, ...]) -> None:
    """One side: L^(-1/2) g = g / |g|."""
    p, g = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)), randn(*shape)
    optimizer = optim.Shampoo(
        [p], lr=0.1, grafting=None, betas=(0.0, 1.0), eps=1e-13, precondition_frequency=1,
        start_preconditioning_step=1, precondition_1d=True,
    )  # fmt: skip
    step(optimizer, [p], [g])
    step(optimizer, [p], [g])
    torch.testing.assert_close(p.detach(), -0.1 * g / g.norm(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_size_of_gradients_does_not_matter(factor: float) -> None:
    """eps is relative."""
    results = []
    for scale in (1.0, factor):
        p = torch.nn.Parameter(randn(5, 7))
        optimizer = optim.Shampoo([p], **SOON, grafting=None, betas=(0.5, 0.9))
        for k in range(6):
            step(optimizer, [p], [scale * randn(5, 7, seed=k)])
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    assert (results[0] - randn(5, 7)).abs().max() > 0.05


def test_turning_everything_turns_the_steps() -> None:
    u, v = (torch.linalg.qr(randn(n, n, seed=n)).Q for n in (5, 7))
    results = []
    for turn in (False, True):
        p = torch.nn.Parameter(u @ randn(5, 7) @ v if turn else randn(5, 7))
        optimizer = optim.Shampoo([p], **SOON, grafting="sgd")
        for k in range(6):
            g = randn(5, 7, seed=k + 1)
            step(optimizer, [p], [u @ g @ v if turn else g])
        results.append(p.detach())
    torch.testing.assert_close(u.mT @ results[1] @ v.mT, results[0], rtol=1e-9, atol=1e-9)


def test_blocks_without_grafting_are_tensors_by_themselves() -> None:
    whole = torch.nn.Parameter(randn(8, 6))
    parts = [torch.nn.Parameter(part.clone()) for part in kronecker.grid(whole.detach()[None], 4)[0]]
    one = optim.Shampoo([whole], **SOON, grafting=None, block_size=4)
    many = optim.Shampoo(parts, **SOON, grafting=None)
    for k in range(6):
        g = randn(8, 6, seed=k)
        step(one, [whole], [g])
        step(many, parts, list(kronecker.grid(g[None], 4)[0]))
    joined = kronecker.grid(whole.detach()[None], 4)[0]
    torch.testing.assert_close(joined, torch.stack([p.detach() for p in parts]), rtol=1e-12, atol=1e-12)


# --- grafting ---------------------------------------------------------------------------------------------------------

GRAFTED: list[tuple[str, Any]] = [
    ("adam", lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.999), weight_decay=0.2)),
    ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.999)),
    ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8)),
    ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
]


def settings_of(grafting: str) -> dict[str, Any]:
    return dict(lr=0.1, grafting=grafting) | (dict(weight_decay=0.2) if grafting == "adam" else dict(betas=(0.0, 0.9)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("grafting", "torchs"), GRAFTED)
def test_without_roots_it_is_the_grafted_method(grafting: str, torchs: Any, backend: str) -> None:
    """Before the first roots, and for tensors that never get any."""
    shapes = ((5, 7), (4,), (), (1, 1))
    ours, theirs = ([torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)] for _ in range(2))
    optimizer, expected = optim.Shampoo(ours, backend=backend, **settings_of(grafting)), torchs(theirs)
    for k in range(10):
        grads = [randn(*s, seed=10 * k + i) for i, s in enumerate(shapes)]
        step(optimizer, ours, grads)
        step(expected, theirs, grads)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    step(optimizer, ours, [randn(*s) for s in shapes])
    step(expected, theirs, [randn(*s) for s in shapes])
    assert (ours[0] - theirs[0]).abs().max() > 1e-3, "roots are used from the step on that follows the tenth"
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("grafting", "torchs"), GRAFTED)
def test_steps_are_as_long_as_those_of_the_grafted_method(grafting: str, torchs: Any) -> None:
    p, q = (torch.nn.Parameter(torch.zeros(5, 7, dtype=torch.float64)) for _ in range(2))
    optimizer = optim.Shampoo([p], **settings_of(grafting), precondition_frequency=1, start_preconditioning_step=1)
    expected = torchs([q])
    for k in range(6):
        for x in (p, q):
            x.data.zero_()  # so that weight decay has nothing to do
        g = [randn(5, 7, seed=k)]
        step(optimizer, [p], g)
        step(expected, [q], g)
        assert p.norm().item() == pytest.approx(q.norm().item(), rel=1e-12)
        cosine = (torch.sum(p * q) / (p.norm() * q.norm())).item()
        assert cosine == pytest.approx(1.0) if k == 0 else 0.1 < cosine < 0.999


# --- states -----------------------------------------------------------------------------------------------------------


def test_shapes_of_states() -> None:
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((10, 6), (10, 1), (3, 2, 2), (4,), (1, 1))]
    optimizer = optim.Shampoo(params, block_size=4)
    step(optimizer, params, [torch.ones_like(p) for p in params])
    shapes = [
        {name: tuple(t.shape) for name, t in optimizer.state[p].items() if "moment" in name or "root" in name}
        for p in params
    ]
    left, right = ({f"{side}_{what}" for what in ("moment", "root")} for side in ("left", "right"))
    assert shapes[0] == dict.fromkeys(left, (6, 4, 4)) | dict.fromkeys(right, (6, 3, 3))
    assert shapes[1] == dict.fromkeys(left, (3, 4, 4))
    assert shapes[2] == dict.fromkeys(left, (1, 3, 3)) | dict.fromkeys(right, (1, 4, 4))
    assert shapes[3] == shapes[4] == {}
    assert optimizer.plan().state_bytes == 4 * sum(
        t.numel() for p in params for name, t in optimizer.state[p].items() if name != "step"
    )


def test_which_other_states_there_are() -> None:
    for kwargs, names in (
        ({}, ["step", "exp_avg", "grafting_sq"]),
        (dict(grafting="sgd"), ["step", "exp_avg"]),
        (dict(grafting=None, momentum=0.9), ["step", "exp_avg", "momentum_buffer"]),
    ):
        p = torch.nn.Parameter(torch.zeros(3))
        optimizer = optim.Shampoo([p], **kwargs)
        step(optimizer, [p], [torch.ones(3)])
        assert list(optimizer.state[p]) == names


@pytest.mark.parametrize("block_size", [4, 1024])
def test_stopped_and_resumed_through_torch_save(block_size: int) -> None:
    """The saved group says how long blocks are."""

    def fresh(**kwargs: Any) -> tuple[torch.nn.Parameter, Any]:
        p = torch.nn.Parameter(randn(6, 9, dtype=torch.float32))
        return p, optim.Shampoo([p], **kwargs)

    def drive(p: torch.Tensor, optimizer: Any, steps: range) -> None:
        for k in steps:
            step(optimizer, [p], [randn(6, 9, dtype=torch.float32, seed=k)])

    kwargs = dict(SOON, block_size=block_size, momentum=0.5)
    (p, whole), (q, first), (r, second) = fresh(**kwargs), fresh(**kwargs), fresh()
    drive(p, whole, range(8))
    drive(q, first, range(5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    r.data.copy_(q.data)
    drive(r, second, range(5, 8))
    assert torch.equal(r, p)
    assert_equal(second.state[r], whole.state[p])


def test_matrices_of_another_shape_are_not_loaded() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(6, 9)) for _ in range(2))
    first, second = optim.Shampoo([p], block_size=4), optim.Shampoo([q])
    step(first, [p], [torch.ones(6, 9)])
    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"][0]["block_size"] = 5
    with pytest.raises(ValueError, match=r"'left_moment' of .* has the shape \(6, 3, 3\) .* needs \(4, 3, 3\)"):
        second.load_state_dict(saved)
    assert not second.state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_moments_of_fewer_bits(state_dtype: str, backend: str) -> None:
    results = []
    for wish in (None, state_dtype):
        p = torch.nn.Parameter(randn(64, 64, dtype=torch.float32))
        optimizer = optim.Shampoo([p], **SOON, state_dtype=wish, backend=backend)
        for k in range(6):
            step(optimizer, [p], [randn(64, 64, dtype=torch.float32, seed=k)])
        results.append(p.detach())
    kept = optimizer.state[p]
    assert {kept[f"{s}_{what}"].dtype for s in ("left", "right") for what in ("moment", "root")} == {torch.float32}
    assert (torch.int8 if state_dtype == "int8" else torch.bfloat16) in {t.dtype for t in kept.values()}
    moved = (results[0] - randn(64, 64, dtype=torch.float32)).norm()
    assert 0 < (results[0] - results[1]).norm() < 0.1 * moved


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_roots_of_what_is_not_finite_are_kept(bad: float) -> None:
    params = [torch.nn.Parameter(randn(5, 5, seed=i)) for i in range(2)]
    optimizer = optim.Shampoo([("good", params[0]), ("bad", params[1])], **SOON)
    for k in range(3):
        step(optimizer, params, [randn(5, 5, seed=10 * k + i) for i in range(2)])
    kept = [optimizer.state[p] for p in params]
    kept[1]["left_moment"][0, 1, 2] = bad
    before = [{name: t.clone() for name, t in one.items()} for one in kept]
    with pytest.warns(UserWarning, match=r"Shampoo: a preconditioner of bad, .* has NaN or infinity in it; the roots"):
        step(optimizer, params, [randn(5, 5, seed=30 + i) for i in range(2)])
    assert optimizer.fallbacks == 1
    assert torch.equal(kept[1]["left_root"], before[1]["left_root"])
    assert not torch.equal(kept[1]["right_root"], before[1]["right_root"])
    assert not torch.equal(kept[0]["left_root"], before[0]["left_root"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        for k in range(4):
            step(optimizer, params, [randn(5, 5, seed=40 + 10 * k + i) for i in range(2)])
    assert optimizer.fallbacks == 3
    assert all(p.isfinite().all() for p in params)


def test_without_any_roots_the_grafted_steps_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    p, q = (torch.nn.Parameter(randn(4, 4)) for _ in range(2))
    optimizer, adam = optim.Shampoo([p], **SOON), torch.optim.Adam([q], lr=0.1)
    for k in range(6):
        g = randn(4, 4, seed=k)
        told = pytest.warns(UserWarning, match="no eigenvectors that can be found") if k == 1 else nullcontext()
        with told:
            step(optimizer, [p], [g])
        step(adam, [q], [g])
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert optimizer.fallbacks == 6


@pytest.mark.parametrize("grafting", [None, "sgd", "adagrad", "rmsprop", "adam"])
def test_gradients_of_zeros(grafting: Any) -> None:
    p = torch.nn.Parameter(randn(4, 4))
    optimizer = optim.Shampoo([p], **SOON, grafting=grafting)
    for _ in range(5):
        step(optimizer, [p], [torch.zeros(4, 4, dtype=torch.float64)])
    assert torch.equal(p, randn(4, 4))
    assert optimizer.fallbacks == 0
    step(optimizer, [p], [randn(4, 4, seed=1)])
    step(optimizer, [p], [randn(4, 4, seed=2)])
    assert p.isfinite().all()
    assert not torch.equal(p, randn(4, 4))


def test_gradients_of_low_rank() -> None:
    """Rounding makes zeros among the eigenvalues negative; a direction that was not there before is not blown up."""
    p = torch.nn.Parameter(torch.zeros(20, 20))
    optimizer = optim.Shampoo([p], lr=0.1, precondition_frequency=1, start_preconditioning_step=1)
    column, row = randn(20, 1, dtype=torch.float32), randn(1, 20, dtype=torch.float32, seed=1)
    for k in range(10):
        before = p.detach().clone()
        step(optimizer, [p], [column @ row if k < 8 else randn(20, 20, dtype=torch.float32, seed=k)])
        assert (p - before).norm() <= 0.1 * 20 * 1.001  # Adam's elements move by about lr
    assert optimizer.fallbacks == 0


def test_products_in_bfloat16_are_near() -> None:
    results = []
    for precision in (None, "bfloat16"):
        p = torch.nn.Parameter(torch.zeros(40, 30))
        optimizer = optim.Shampoo([p], **SOON, precision=precision)
        for k in range(8):
            step(optimizer, [p], [randn(40, 30, dtype=torch.float32, seed=k)])
        results.append(p.detach())
    error = (results[0] - results[1]).norm() / results[0].norm()
    assert 1e-4 < error < 0.03
