"""SparseAdam: torch's numbers, the decay that torch's lacks, and what is refused."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import cases
import schuss
from cases import assert_equal, randn
from schuss import describe, optim

SHAPE = (7, 3)
FORMS: list[dict[str, Any]] = [
    dict(lr=0.1),
    dict(lr=0.1, betas=(0.0, 0.3), eps=1e-3),
    dict(lr=0.1, betas=(0.5, 0.9), maximize=True),
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    """torch warns unless one says whether sparse tensors are to be checked."""
    with torch.sparse.check_sparse_tensor_invariants(True):
        yield


def gradient(step: int, dtype: torch.dtype = torch.float64, *, dense_dims: int = 1) -> torch.Tensor:
    """Some rows, or elements, one of them twice; none at all in step 3."""
    count, sparse_shape = 5, SHAPE[: len(SHAPE) - dense_dims]
    index = torch.stack([torch.randint(n, (count,), generator=cases.generator(step, n)) for n in sparse_shape])
    index[:, 1] = index[:, 0]
    values = randn(count, *SHAPE[len(sparse_shape) :], seed=step, dtype=dtype)
    if step == 3:
        index, values = index[:, :0], values[:0]
    return torch.sparse_coo_tensor(index, values, SHAPE)


def table(dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(randn(*SHAPE, dtype=dtype))


def drive(optimizer: Any, p: torch.Tensor, steps: range, **more: Any) -> None:
    for step in steps:
        p.grad = gradient(step, p.dtype, **more)
        optimizer.step()


def close(a: Any, b: Any) -> None:
    tolerance = TOLERANCE[b.dtype]
    torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


# --- against torch ----------------------------------------------------------------------------------------------------


def test_the_signature_is_torchs() -> None:
    ours, theirs = (inspect.signature(library.SparseAdam).parameters for library in (optim, torch.optim))
    for name, argument in theirs.items():
        assert (ours[name].default, ours[name].kind) == (argument.default, argument.kind)
    assert [*ours][: len(theirs)] == [*theirs]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dense_dims", [0, 1])
def test_is_torchs(form: dict[str, Any], dtype: torch.dtype, dense_dims: int) -> None:
    """Parameters, moments and the count of steps; by rows or by elements, rows that come twice, and none."""
    p, q = table(dtype), table(dtype)
    ours, theirs = optim.SparseAdam([p], **form), torch.optim.SparseAdam([q], **form)
    for step in range(8):
        for optimizer, x in ((ours, p), (theirs, q)):
            drive(optimizer, x, range(step, step + 1), dense_dims=dense_dims)
        close(p, q)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine["state"][0].keys() == other["state"][0].keys()
    assert mine["state"][0]["step"] == other["state"][0]["step"] == 8
    assert type(mine["state"][0]["step"]) is int
    for name in ("exp_avg", "exp_avg_sq"):
        close(mine["state"][0][name], other["state"][0][name])
    assert mine["param_groups"][0] == other["param_groups"][0] | {"weight_decay": 0.0}


@pytest.mark.parametrize("order", [("ours", "theirs"), ("theirs", "ours")], ids=" to ".join)
@pytest.mark.parametrize("portable", [False, True])
def test_checkpoints_are_exchanged(order: tuple[str, str], portable: bool) -> None:
    """In mid-run, through a file without pickled code; the other continues on the same numbers."""
    library = {"ours": optim, "theirs": torch.optim}
    p = table()
    source = library[order[0]].SparseAdam([p], lr=0.1)
    drive(source, p, range(3))
    file = io.BytesIO()
    torch.save(source.state_dict(portable=True) if portable and order[0] == "ours" else source.state_dict(), file)
    file.seek(0)
    q = torch.nn.Parameter(p.detach().clone())
    target = library[order[1]].SparseAdam([q])
    target.load_state_dict(torch.load(file, weights_only=True))
    for optimizer, x in ((source, p), (target, q)):
        drive(optimizer, x, range(3, 8))
    close(p, q)
    assert target.state_dict()["state"][0]["step"] == 8


def test_an_embedding_trained_beside_torchs() -> None:
    losses = []
    for library in (optim, torch.optim):
        torch.manual_seed(0)
        layer = torch.nn.Embedding(50, 4, sparse=True, dtype=torch.float64)
        optimizer = library.SparseAdam(layer.parameters(), lr=0.05)
        for step in range(15):
            optimizer.zero_grad()
            words = torch.randint(50, (6,), generator=cases.generator(step))
            loss = (layer(words).sum(1) - words).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:15] == pytest.approx(losses[15:], rel=1e-12)


# --- numbers ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lr=st.floats(1e-3, 1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    eps=st.floats(1e-10, 1),
    weight_decay=st.floats(0, 1),
    rows=st.lists(st.sets(st.integers(0, 4), max_size=5), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_is_the_formula_on_the_rows_that_there_are(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, rows: list[set[int]], seed: int
) -> None:
    """In NumPy, from the formula; rows without a gradient keep their bits, and their moments."""
    p = torch.nn.Parameter(randn(5, 2, seed=seed))
    optimizer = optim.SparseAdam([p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    x, m, v = p.detach().numpy().copy(), np.zeros((5, 2)), np.zeros((5, 2))
    for t, chosen in enumerate(rows, start=1):
        there = sorted(chosen)
        g = randn(len(there), 2, seed=seed + t).numpy()
        p.grad = torch.sparse_coo_tensor(torch.tensor([there], dtype=torch.int64), torch.from_numpy(g), (5, 2))
        before = p.detach().clone()
        optimizer.step()
        m[there] = beta1 * m[there] + (1 - beta1) * g
        v[there] = beta2 * v[there] + (1 - beta2) * g**2
        step_size = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
        x[there] = (1 - lr * weight_decay) * x[there] - step_size * m[there] / (np.sqrt(v[there]) + eps)
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-11)
        others = [i for i in range(5) if i not in chosen]
        assert torch.equal(p.detach()[others], before[others])
    np.testing.assert_allclose(optimizer.state[p]["exp_avg"].numpy(), m, rtol=1e-9, atol=1e-12)


def test_a_row_decays_as_often_as_it_has_a_gradient() -> None:
    """A zero gradient moves nothing else: (1 - lr * weight_decay) to the power of the row's steps."""
    p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer = optim.SparseAdam([p], lr=0.1, weight_decay=0.5)
    for step in range(6):
        rows = [[0, 1]] if step % 3 == 0 else [[0]]
        p.grad = torch.sparse_coo_tensor(rows, torch.zeros(len(rows[0]), 2, dtype=torch.float64), (3, 2))
        optimizer.step()
    torch.testing.assert_close(p.detach()[:, 0], torch.tensor([0.95**6, 0.95**2, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_eps_weighs_more_at_first_than_in_adam(beta2: float) -> None:
    """It stands beside sqrt(v), not beside sqrt(v / (1 - beta2^t)): with g = eps the first step is no half of lr."""
    p = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = optim.SparseAdam([p], lr=1.0, betas=(0.9, beta2), eps=1e-3)
    p.grad = torch.sparse_coo_tensor([[0]], torch.full((1, 1), 1e-3, dtype=torch.float64), (1, 1))
    optimizer.step()
    root = (1 - beta2) ** 0.5
    assert p.item() == pytest.approx(-root / (root + 1), rel=1e-12)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_l2_decay_of_other_rules_is_still_refused(name: str) -> None:
    p = table()
    p.grad = gradient(0)
    with pytest.raises(RuntimeError, match=f"{name}: weight_decay option is not compatible with sparse gradients"):
        getattr(optim, name)([p], weight_decay=0.1).step()


# --- options of all optimizers ----------------------------------------------------------------------------------------


def test_max_norm_counts_the_rows() -> None:
    """As clipping before the step does."""
    p, q = table(), table()
    clipped, plain = optim.SparseAdam([p], lr=0.1, max_norm=0.5), optim.SparseAdam([q], lr=0.1)
    for step in range(3):
        p.grad, g = gradient(step), gradient(step).coalesce()
        clipped.step()
        norm = g.values().norm()
        assert clipped.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        q.grad = g * min(1.0, 0.5 / (norm.item() + 1e-6))
        plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_state_in_fewer_bits() -> None:
    p = table(torch.float32)
    optimizer = optim.SparseAdam([p], state_dtype="bfloat16")
    drive(optimizer, p, range(3))
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_plan_says_that_rows_are_taken(backend: str) -> None:
    p = table()
    optimizer = optim.SparseAdam([p], backend=backend)
    drive(optimizer, p, range(1))
    assert "sparse gradient, only its rows" in str(optimizer.plan())


def test_lookahead_follows_it() -> None:
    made = []
    for library in (optim, torch.optim):
        p = table()
        drive(schuss.Lookahead(library.SparseAdam([p], lr=0.1), k=2), p, range(5))
        made.append(p)
    close(*made)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_closure_groups_and_missing_gradients() -> None:
    p, q, r = (table() for _ in range(3))
    optimizer = optim.SparseAdam([{"params": [p, r]}, {"params": [q], "lr": 0.0}], lr=0.1)
    start = q.detach().clone()

    def closure() -> float:
        assert torch.is_grad_enabled()
        p.grad, q.grad = gradient(0), gradient(0)
        return 3.0

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert_equal(q.detach(), start)
    assert not torch.equal(p, start)
    assert r not in optimizer.state


def test_hooks_run_once() -> None:
    p = table()
    optimizer, calls = optim.SparseAdam([p]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    drive(optimizer, p, range(2))
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_like_the_original(how: Callable[[Any], Any]) -> None:
    p = table()
    original = optim.SparseAdam([p], lr=0.1, weight_decay=0.1)
    drive(original, p, range(2))
    p.grad = None
    twin = how(original)
    (q,) = twin.param_groups[0]["params"]
    for optimizer, x in ((original, p), (twin, q)):
        drive(optimizer, x, range(2, 5))
    assert_equal(q, p)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint_round_trip(flatten: bool) -> None:
    """torch asks for the state of a fresh optimizer by a step with dense zeros and lr 0, which torch's refuses."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    torch.manual_seed(0)
    model, other = (torch.nn.Embedding(*SHAPE, sparse=True, dtype=torch.float64) for _ in range(2))
    optimizer, fresh = (optim.SparseAdam(m.parameters(), lr=lr) for m, lr in ((model, 0.1), (other, 7.0)))
    drive(optimizer, model.weight, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert_equal(other.weight, model.weight)
    for o, m in ((optimizer, model), (fresh, other)):
        drive(o, m.weight, range(3, 6))
    assert_equal(other.weight, model.weight)
    assert_equal(fresh.state_dict()["state"], optimizer.state_dict()["state"])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, 0.0])
@pytest.mark.parametrize("before", [0, 2])
def test_a_dense_gradient_is_refused(lr: float, before: int) -> None:
    """Whatever came before; nothing has changed then, in the tensors with sparse gradients neither."""
    p, q = table(), table()
    optimizer = optim.SparseAdam([("first", p), ("second", q)], lr=lr)
    for step in range(before):
        p.grad, q.grad = gradient(step), gradient(step)
        optimizer.step()
    state, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone(), q.detach().clone()]
    p.grad, q.grad = gradient(9), torch.ones_like(q)
    with pytest.raises(
        RuntimeError,
        match=r"SparseAdam does not support dense gradients, please consider Adam instead: second .* sparse=True$",
    ):
        optimizer.step()
    assert_equal([p.detach(), q.detach()], values)
    assert_equal(optimizer.state_dict(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lr=-0.1), r"SparseAdam: lr must be in \[0, inf\), got -0\.1$"),
        (dict(lr=torch.ones(2)), r"SparseAdam: Tensor lr must be 1-element"),
        (dict(eps=0.0), r"SparseAdam: eps must be in \(0, inf\), got 0\.0$"),
        (dict(betas=(1.0, 0.9)), r"SparseAdam: betas\[0\] must be in \[0, 1\), got 1\.0$"),
        (dict(betas=(0.9, 1.2)), r"SparseAdam: betas\[1\] must be in \[0, 1\), got 1\.2$"),
        (dict(weight_decay=-1.0), r"SparseAdam: weight_decay must be in \[0, inf\), got -1\.0$"),
        (dict(ema_decay=0.9), r"SparseAdam: ema_decay is not for it, .* use torch\.optim\.swa_utils\.AveragedModel$"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.SparseAdam([table()], **arguments)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.ones(3, dtype=torch.complex64), "must be real, and {} is complex64"),
        (torch.ones(3, 2).to_sparse(), "must be dense, and {} is sparse; only gradients may be$"),
    ],
    ids=["complex", "sparse"],
)
def test_parameters_that_are_refused(p: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"SparseAdam: its parameters {message.format('parameter 1 of group 0')}"):
        optim.SparseAdam([table(), p])
    optimizer = optim.SparseAdam([table()])
    with pytest.raises(ValueError, match=f"SparseAdam: its parameters {message.format('parameter 0 of group 1')}"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1
    drive(optimizer, optimizer.param_groups[0]["params"][0], range(2))


def test_it_is_listed() -> None:
    (row,) = (row for row in describe.table() if row.name == "SparseAdam")
    assert row.state_bytes == 8
    assert describe.find("SparseAdam") is optim.SparseAdam
