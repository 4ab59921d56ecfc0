"""SOAP: against a NumPy version of the paper, against Adam, and what becomes of bad matrices."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from cases import assert_equal, randn
from schuss import optim
from schuss.optim._preconditioned import _batches

Array = np.ndarray[Any, Any]
BACKENDS = ("numba", "foreach", "reference")


class Paper:
    """Vyas et al. 2024, algorithms 3 and 4, of one matrix. The average of gradients stays in their own space.

    Args:
        permutes: whether the second moment follows its directions when bases are put in order, as in the authors' code.
    """

    def __init__(
        self, x: Array, *, lr: float = 3e-3, betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None, eps: float = 1e-8, weight_decay: float = 1e-2,
        precondition_frequency: int = 10, max_precond_dim: int = 10000, normalize_grads: bool = False,
        correct_bias: bool = True, permutes: bool = True,
    ) -> None:  # fmt: skip
        self.x, self.lr, self.betas, self.eps, self.decay = x, lr, betas, eps, weight_decay
        self.beta = betas[1] if shampoo_beta is None else shampoo_beta
        self.frequency, self.normalizes, self.corrects, self.permutes = (
            precondition_frequency,
            normalize_grads,
            correct_bias,
            permutes,
        )
        self.moments = [np.zeros((n, n)) if 1 < n <= max_precond_dim else None for n in x.shape]
        self.bases: list[Array | None] = [None, None]
        self.m, self.v, self.t = np.zeros(x.shape), np.zeros(x.shape), -1

    def rotate(self, a: Array, *, back: bool = False) -> Array:
        left, right = (np.eye(n) if q is None else q for q, n in zip(self.bases, self.x.shape, strict=True))
        return left @ a @ right.T if back else left.T @ a @ right

    def accumulate(self, g: Array) -> None:
        for i, a in enumerate(self.moments):
            if a is not None:
                outer = g @ g.T if i == 0 else g.T @ g
                self.moments[i] = self.beta * a + (1 - self.beta) * outer

    def step(self, g: Array) -> None:
        self.t += 1
        if self.t == 0:
            self.accumulate(g)
            self.bases = [None if a is None else np.linalg.eigh(a)[1][:, ::-1] for a in self.moments]
            return
        beta1, beta2 = self.betas
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * self.rotate(g) ** 2
        m, v = self.rotate(self.m), self.v
        if self.corrects:
            m, v = m / (1 - beta1**self.t), v / (1 - beta2**self.t)
        u = self.rotate(m / (np.sqrt(v) + self.eps), back=True)
        if self.normalizes:
            u = u / np.sqrt(np.mean(u**2))
        self.x = (1 - self.lr * self.decay) * self.x - self.lr * u
        self.accumulate(g)
        if self.t % self.frequency == 0:
            for i, (a, q) in enumerate(zip(self.moments, self.bases, strict=True)):
                if a is None or q is None:
                    continue
                order = np.argsort(-np.diag(q.T @ a @ q))
                self.bases[i] = np.linalg.qr(a @ q[:, order])[0]
                if self.permutes:
                    self.v = np.take(self.v, order, axis=i)


def gradient(x: Array, step: int) -> Array:
    """Of changing directions: the order of eigenvalues changes, too."""
    noise = randn(*x.shape, seed=1000 + step).numpy()
    noise[step % len(noise)] *= 3.0
    noise[:, (step // 3) % noise.shape[1]] *= 4.0
    return noise + 0.3 * x


PAPERS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((6, 6), {}),
    ((6, 6), dict(lr=0.1, betas=(0.5, 0.8), shampoo_beta=0.6, eps=1e-3, weight_decay=0.3, precondition_frequency=2)),
    ((6, 6), dict(lr=0.1, precondition_frequency=1, normalize_grads=True, weight_decay=0)),
    ((6, 6), dict(lr=0.1, precondition_frequency=3, correct_bias=False)),
    ((5, 9), dict(lr=0.1, precondition_frequency=2, max_precond_dim=5)),
    ((9, 5), dict(lr=0.1, precondition_frequency=2, max_precond_dim=5)),
    ((4, 2, 3), dict(lr=0.1, precondition_frequency=2, max_precond_dim=4)),
    ((5, 9), dict(lr=0.1, max_precond_dim=0)),
]


def same_basis(paper: Paper, optimizer: Any, p: torch.Tensor) -> None:
    """Let both begin in the same basis: of a matrix of low rank it is a matter of rounding."""
    for i, side in enumerate(("left", "right")):
        if paper.bases[i] is not None:
            ours = optimizer.state[p][f"{side}_basis"].numpy()
            spectrum = np.linalg.eigvalsh(paper.moments[i])[::-1]
            np.testing.assert_allclose(ours.T @ paper.moments[i] @ ours, np.diag(spectrum), atol=1e-10 * spectrum[0])
            paper.bases[i] = ours.copy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "kwargs"), [*PAPERS, ((5, 9), dict(lr=0.1, precondition_frequency=4))])
def test_what_the_paper_says(shape: tuple[int, ...], kwargs: dict[str, Any], backend: str) -> None:
    start = randn(*shape).numpy()
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer, paper = optim.SOAP([p], backend=backend, **kwargs), Paper(start.reshape(shape[0], -1), **kwargs)
    for step in range(13):
        g = gradient(paper.x, step)
        p.grad = torch.tensor(g).reshape(shape)
        optimizer.step()
        paper.step(g)
        if step == 0:
            assert np.array_equal(p.detach().numpy(), start)
            same_basis(paper, optimizer, p)
        np.testing.assert_allclose(p.detach().numpy().reshape(shape[0], -1), paper.x, rtol=1e-9, atol=1e-9)
    assert abs(p.detach().numpy() - start).max() > 3 * kwargs.get("lr", 3e-3)


def test_the_second_moment_follows_its_directions() -> None:
    """Where it does not, the steps are others: the test above would fail."""
    results = []
    for permutes in (True, False):
        paper = Paper(randn(6, 6).numpy(), lr=0.1, precondition_frequency=2, permutes=permutes)
        for step in range(13):
            paper.step(gradient(paper.x, step))
        results.append(paper.x)
    assert abs(results[0] - results[1]).max() > 1e-2


# --- Adam -------------------------------------------------------------------------------------------------------------


def step(optimizer: Any, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bases_it_is_adamw_one_step_later(backend: str) -> None:
    shapes = ((3,), (), (1, 1), (0, 3), (5, 7))
    ours, theirs = ([torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)] for _ in range(2))
    optimizer = optim.SOAP(
        [{"params": ours[:-1]}, {"params": ours[-1:], "max_precond_dim": 4}],
        lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, eps=1e-3, backend=backend,
    )  # fmt: skip
    adamw = torch.optim.AdamW(theirs, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, eps=1e-3)
    start = [p.detach().clone() for p in ours]
    step(optimizer, ours, [randn(*s, seed=50) for s in shapes])
    assert_equal([p.detach() for p in ours], start)
    for k in range(6):
        grads = [randn(*s, seed=60 + k + i) for i, s in enumerate(shapes)]
        step(optimizer, ours, grads)
        step(adamw, theirs, grads)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert all(len(optimizer.state[p]) == 3 for p in ours), "step and the moments alone"


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_the_identity_basis_it_is_adamw(backend: str) -> None:
    p, q = (torch.nn.Parameter(randn(5, 7)) for _ in range(2))
    optimizer = optim.SOAP([p], lr=0.1, weight_decay=0.2, precondition_frequency=100, backend=backend)
    adamw = torch.optim.AdamW([q], lr=0.1, betas=(0.95, 0.95), weight_decay=0.2)
    step(optimizer, [p], [randn(5, 7, seed=1)])
    for side, n in (("left", 5), ("right", 7)):
        optimizer.state[p][f"{side}_basis"].copy_(torch.eye(n))
    for k in range(6):
        step(optimizer, [p], [randn(5, 7, seed=2 + k)])
        step(adamw, [q], [randn(5, 7, seed=2 + k)])
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_turning_everything_turns_the_steps() -> None:
    """U x Vᵀ with gradients U g Vᵀ goes where U and Vᵀ take x. Adam does not."""
    u, v = (torch.linalg.qr(randn(6, 6, seed=s)).Q for s in (1, 2))

    def run(cls: Any, turn: bool) -> torch.Tensor:
        def turned(a: torch.Tensor) -> torch.Tensor:
            return u @ a @ v.mT if turn else a

        p = torch.nn.Parameter(turned(randn(6, 6)))
        optimizer = cls([p], lr=0.1)
        for group in optimizer.param_groups:
            group["precondition_frequency"] = 2
        for k in range(9):
            step(optimizer, [p], [turned(randn(6, 6, seed=10 + k))])
        return u.mT @ p.detach() @ v if turn else p.detach()

    torch.testing.assert_close(run(optim.SOAP, True), run(optim.SOAP, False), rtol=1e-8, atol=1e-8)
    assert (run(optim.AdamW, True) - run(optim.AdamW, False)).abs().max() > 0.1


# --- states -----------------------------------------------------------------------------------------------------------


def test_which_sides_have_bases() -> None:
    shapes = {
        (5, 7): "LR",
        (5, 20): "L",
        (20, 5): "R",
        (1, 5): "R",
        (5, 1): "L",
        (4, 2, 3): "LR",
        (5,): "",
        (20, 20): "",
    }
    params = {shape: torch.nn.Parameter(torch.zeros(shape)) for shape in shapes}
    optimizer = optim.SOAP(params.values(), max_precond_dim=10)
    step(optimizer, [*params.values()], [randn(*s, dtype=torch.float32) for s in shapes])
    for shape, sides in shapes.items():
        kept = optimizer.state[params[shape]]
        there = "".join(letter for letter, side in (("L", "left"), ("R", "right")) if f"{side}_basis" in kept)
        assert there == sides, shape
        for side in ("left", "right"):
            assert (f"{side}_basis" in kept) == (f"{side}_moment" in kept)
    vector = torch.nn.Parameter(torch.zeros(5))
    optimizer = optim.SOAP([vector], precondition_1d=True)
    step(optimizer, [vector], [torch.ones(5)])
    assert optimizer.state[vector]["left_basis"].shape == (5, 5)
    assert "right_basis" not in optimizer.state[vector]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", {"exp_avg": "bfloat16"}])
def test_moments_of_fewer_bits(state_dtype: Any, backend: str) -> None:
    """Preconditioners stay float32; the steps are near those with float32 moments, also after new bases."""
    results = []
    for wish in (None, state_dtype):
        p = torch.nn.Parameter(randn(64, 64, dtype=torch.float32))
        optimizer = optim.SOAP([p], lr=0.01, precondition_frequency=2, state_dtype=wish, backend=backend)
        for k in range(8):
            step(optimizer, [p], [randn(64, 64, dtype=torch.float32, seed=k)])
        results.append(p.detach())
    kept = optimizer.state[p]
    assert {kept[f"{side}_{what}"].dtype for side in ("left", "right") for what in ("moment", "basis")} == {
        torch.float32
    }
    stored = {t.dtype for name, t in kept.items() if name.startswith("exp_avg")}
    assert (torch.int8 if state_dtype == "int8" else torch.bfloat16) in stored
    moved = (results[0] - randn(64, 64, dtype=torch.float32)).norm()
    assert 0 < (results[0] - results[1]).norm() < 0.1 * moved


def test_preconditioners_of_bfloat16_parameters_are_float32() -> None:
    p = torch.nn.Parameter(randn(6, 6, dtype=torch.bfloat16))
    optimizer = optim.SOAP([p], lr=0.1)
    for k in range(3):
        step(optimizer, [p], [randn(6, 6, dtype=torch.bfloat16, seed=k)])
    kept = optimizer.state[p]
    assert kept["left_basis"].dtype == kept["right_moment"].dtype == torch.float32
    assert kept["exp_avg"].dtype == torch.bfloat16
    identity = kept["left_basis"].mT @ kept["left_basis"]
    torch.testing.assert_close(identity, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopped_and_resumed_through_torch_save(stop: int) -> None:
    """Also between two bases, and right after one."""

    def fresh() -> tuple[torch.nn.Parameter, Any]:
        p = torch.nn.Parameter(randn(6, 8, dtype=torch.float32))
        return p, optim.SOAP([p], lr=0.1, precondition_frequency=3)

    def drive(p: torch.Tensor, optimizer: Any, steps: range) -> None:
        for k in steps:
            step(optimizer, [p], [randn(6, 8, dtype=torch.float32, seed=k)])

    (p, whole), (q, first), (r, second) = fresh(), fresh(), fresh()
    drive(p, whole, range(8))
    drive(q, first, range(stop))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    r.data.copy_(q.data)
    drive(r, second, range(stop, 8))
    assert torch.equal(r, p)
    assert_equal(second.state[r], whole.state[p])


def test_distributed_checkpoints() -> None:
    """They make state by a step with lr=0 and gradients of zeros, and load into it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    optimizer = optim.SOAP(model.parameters(), lr=0.1, precondition_frequency=2)
    other = copy.deepcopy(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(5, 4)).square().sum().backward()
        optimizer.step()
    resumed = optim.SOAP(other.parameters(), lr=0.1, precondition_frequency=2)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(other, resumed, state)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_equal(resumed.state[q], optimizer.state[p])


# --- bad input --------------------------------------------------------------------------------------------------------


def two() -> tuple[list[torch.nn.Parameter], Any]:
    """An optimizer of two named matrices, after two steps; bases are due after the third."""
    params = [torch.nn.Parameter(randn(5, 5, seed=i)) for i in range(2)]
    optimizer = optim.SOAP([("good", params[0]), ("bad", params[1])], lr=0.1, precondition_frequency=2)
    for k in range(2):
        step(optimizer, params, [randn(5, 5, seed=10 * k + i) for i in range(2)])
    return params, optimizer


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_basis_whose_moment_is_not_finite_is_kept(bad: float) -> None:
    params, optimizer = two()
    kept = [optimizer.state[p] for p in params]
    kept[1]["left_moment"][1, 2] = bad
    before = [{name: t.clone() for name, t in one.items()} for one in kept]
    with pytest.warns(UserWarning, match=r"SOAP: a preconditioner of bad, .*\(5, 5\), has NaN or infinity .* stays"):
        step(optimizer, params, [randn(5, 5, seed=30 + i) for i in range(2)])
    assert optimizer.fallbacks == 1
    assert torch.equal(kept[1]["left_basis"], before[1]["left_basis"])
    assert not torch.equal(kept[1]["right_basis"], before[1]["right_basis"]), "the other side is renewed"
    assert not torch.equal(kept[0]["left_basis"], before[0]["left_basis"]), "the other parameter is, too"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        for k in range(4):
            step(optimizer, params, [randn(5, 5, seed=40 + 10 * k + i) for i in range(2)])
    assert optimizer.fallbacks == 3
    assert all(p.isfinite().all() for p in params)


def test_a_first_gradient_that_is_not_finite_leaves_the_identity() -> None:
    p = torch.nn.Parameter(randn(4, 4))
    optimizer = optim.SOAP([p], lr=0.1)
    with pytest.warns(UserWarning, match=r"parameter 0 of group 0, .* NaN or infinity .* the identity"):
        step(optimizer, [p], [torch.full((4, 4), torch.nan, dtype=torch.float64)])
    assert optimizer.fallbacks == 2  # rows and columns
    assert torch.equal(p, randn(4, 4))
    assert torch.equal(optimizer.state[p]["left_basis"], torch.eye(4, dtype=torch.float64))
    assert not optimizer.state[p]["exp_avg"].any()


def test_eigenvectors_that_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    p = torch.nn.Parameter(randn(4, 4))
    optimizer = optim.SOAP([p], lr=0.1, precondition_frequency=2)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.warns(UserWarning, match="has no eigenvectors that can be found"):
        step(optimizer, [p], [randn(4, 4, seed=1)])
    assert optimizer.fallbacks == 2
    for k in range(2):
        step(optimizer, [p], [randn(4, 4, seed=2 + k)])
    assert optimizer.fallbacks == 2
    assert not torch.equal(optimizer.state[p]["left_basis"], torch.eye(4, dtype=torch.float64)), "a later one is found"


def test_squares_that_overflow_do_not_stop_it() -> None:
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = optim.SOAP([p], lr=0.1, precondition_frequency=1)
    for k in range(3):
        step(optimizer, [p], [randn(4, 4, seed=k, dtype=torch.float32)])
    basis = optimizer.state[p]["left_basis"].clone()
    with pytest.warns(UserWarning, match="has NaN or infinity in it"):
        step(optimizer, [p], [torch.full((4, 4), 1e30)])
    assert p.isfinite().all()
    assert torch.equal(optimizer.state[p]["left_basis"], basis)


def test_gradients_of_zeros() -> None:
    p = torch.nn.Parameter(randn(4, 4))
    optimizer = optim.SOAP([p], lr=0.1, precondition_frequency=1, weight_decay=0)
    for _ in range(3):
        step(optimizer, [p], [torch.zeros(4, 4, dtype=torch.float64)])
    assert torch.equal(p, randn(4, 4))
    basis = optimizer.state[p]["left_basis"]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(4, dtype=torch.float64))
    assert optimizer.fallbacks == 0


def test_copies_count_their_own_fallbacks() -> None:
    _, optimizer = two()
    optimizer.fallbacks = 5
    assert copy.deepcopy(optimizer).fallbacks == 0


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_what_needs_a_step_without_the_host_is_refused(option: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=rf"SOAP: {option} must be False, since the host renews matrices"):
        optim.SOAP([{"params": [p], option: True}])


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("cls", [optim.SOAP, optim.Shampoo])
def test_bases_and_roots_do_not_depend_on_threads(cls: Any, threads: Callable[[int], None]) -> None:
    """LAPACK's own threads would change bits of matrices of this size."""
    results = []
    for count in (1, 2, 3):
        threads(count)
        params = [torch.nn.Parameter(randn(130, 140, dtype=torch.float32, seed=i)) for i in range(4)]
        optimizer = cls(params, lr=0.1)
        optimizer.param_groups[0] |= dict(precondition_frequency=1, start_preconditioning_step=1)
        for k in range(3):
            step(optimizer, params, [randn(130, 140, dtype=torch.float32, seed=10 * k + i) for i in range(4)])
        assert torch.get_num_threads() == count
        results.append([p.detach() for p in params])
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


def test_what_is_renewed_at_once_is_alike() -> None:
    """As many at once as there are threads; small ones in larger numbers."""
    large, small = torch.empty(2000, 900, device="meta"), torch.empty(30, 20, device="meta")
    sizes = [len(batch) for batch in _batches([(small,)] * 7 + [(large,)] * 5, 2)]
    assert sizes == [8, 2, 2]
    assert [len(batch) for batch in _batches([(large,)] * 3, 1)] == [1, 1, 1]
    assert list(_batches([], 2)) == []


def test_an_error_on_the_way_changes_no_matrix(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as too little memory: parameters have moved, bases and moments fit each other still."""
    threads(2)
    params, optimizer = two()
    geqrf, done = torch.geqrf, list[torch.Tensor]()

    def fails(a: torch.Tensor) -> Any:
        if len(done) == 2:
            raise torch.OutOfMemoryError("none left")
        done.append(a)
        return geqrf(a)

    bases = [optimizer.state[p][f"{side}_basis"].clone() for p in params for side in ("left", "right")]
    monkeypatch.setattr(torch, "geqrf", fails)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        step(optimizer, params, [randn(5, 5, seed=30 + i) for i in range(2)])
    assert torch.get_num_threads() == 2
    assert_equal([optimizer.state[p][f"{side}_basis"] for p in params for side in ("left", "right")], bases)
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3]


# --- precision --------------------------------------------------------------------------------------------------------


def test_products_in_bfloat16_fit_as_well() -> None:
    """Least squares of condition 100: after 150 steps the loss is within a tenth of that of products in float32."""
    losses = {}
    for precision in (None, "bfloat16"):
        a = torch.linalg.qr(randn(16, 16, dtype=torch.float32)).Q * torch.logspace(0, -1, 16)
        target = a.mT @ randn(16, 16, dtype=torch.float32, seed=1)
        x = torch.nn.Parameter(torch.zeros(16, 16))
        optimizer = optim.SOAP([x], lr=0.1, weight_decay=0, precision=precision)
        for k in range(150):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - k / 150)
            residual = a.mT @ x.detach() - target
            step(optimizer, [x], [a @ residual])
        losses[precision] = ((a.mT @ x.detach() - target).norm() / target.norm()).item()
    assert losses[None] < 0.1
    assert losses["bfloat16"] != losses[None]
    assert losses["bfloat16"] == pytest.approx(losses[None], rel=0.1)
