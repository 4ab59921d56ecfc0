"""Averages of the parameters, kept in the pass of the step."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from schuss import Optimizer, optim

SHAPES = ((33, 7), (5000,), (3,), ())


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        self.params = torch.nn.ParameterList(torch.nn.Parameter(v) for v in values)


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def averages(optimizer, params):
    return [optimizer.state[p]["ema"] for p in params]


@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
@pytest.mark.parametrize("cls", [optim.SGD, optim.AdamW, optim.Lion, optim.ADOPT])
def test_is_torch_averaged_model(cls, backend):
    model, other = Model(), Model()
    optimizer = cls(model.parameters(), ema_decay=0.9, backend=backend)
    plain = cls(other.parameters(), backend=backend)
    averaged = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for seed in range(6):
        for m, o in ((model, optimizer), (other, plain)):
            give_gradients(m.parameters(), seed)
            o.step()
        averaged.update_parameters(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for mine, theirs in zip(averages(optimizer, model.parameters()), averaged.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.data, rtol=1e-14, atol=1e-15)


def test_warmup_closed_form():
    """p moves by 1 a step; the decay is min(0.99, (1 + t) / (10 + t)) from the second step on."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optim.SGD([p], lr=1.0, ema_decay=0.99, ema_warmup=True)
    average = 0.0
    for step in range(1, 2001):
        p.grad = torch.full((1,), -1.0, dtype=torch.float64)
        optimizer.step()
        decay = 0.0 if step == 1 else min(0.99, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
        assert optimizer.state[p]["ema"].item() == pytest.approx(average, rel=1e-12)
    assert 2000 - average == pytest.approx(99, rel=1e-5)  # a ramp is followed decay / (1 - decay) steps behind


def test_bfloat16_reaches_what_float32_reaches():
    """2000 steps of 1e-4 from 1: the average of a bfloat16 parameter is kept in float32, where it does not stall."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
        options = {"rounding": "stochastic"} if dtype == torch.bfloat16 else {}
        optimizer = optim.SGD([p], lr=1.0, ema_decay=0.99, **options)
        for _ in range(2000):
            p.grad = torch.full_like(p, -1e-4)
            optimizer.step()
        assert optimizer.state[p]["ema"].dtype == torch.float32
        ends[dtype] = optimizer.state[p]["ema"].mean().item()
    step = float(torch.tensor(1e-4, dtype=torch.bfloat16)) / 1e-4  # the gradient itself is rounded
    assert ends[torch.float32] == pytest.approx(1.2 - 99e-4, abs=1e-4)
    assert ends[torch.bfloat16] - 1 == pytest.approx((ends[torch.float32] - 1) * step, rel=0.01)


class TestAveraged:
    def trained(self, dtype=torch.float32, **options):
        model = Model(dtype)
        optimizer = optim.AdamW(model.parameters(), lr=0.1, ema_decay=0.5, **options)
        for seed in range(3):
            give_gradients(model.parameters(), seed)
            optimizer.step()
        return model, optimizer

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
    def test_swaps_and_restores(self, dtype):
        model, optimizer = self.trained(dtype)
        before, addresses = [p.detach().clone() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
        with optimizer.averaged():
            for p, average in zip(model.parameters(), averages(optimizer, model.parameters()), strict=True):
                assert torch.equal(p, average.to(dtype))
                assert p.dim() == 0 or not torch.equal(p, before[0])
        assert all(map(torch.equal, model.parameters(), before))
        assert [p.data_ptr() for p in model.parameters()] == addresses

    def test_restores_when_the_block_raises(self):
        model, optimizer = self.trained()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(KeyError), optimizer.averaged():
            raise KeyError
        assert all(map(torch.equal, model.parameters(), before))

    def test_misuse(self):
        model, optimizer = self.trained()
        with optimizer.averaged():
            with pytest.raises(RuntimeError, match="a step inside averaged"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="averaged already"), optimizer.averaged():
                pass
        optimizer.step()
        with (
            pytest.raises(RuntimeError, match="AdamW: no averages are kept"),
            optim.AdamW(model.parameters()).averaged(),
        ):
            pass

    def test_before_the_first_step_and_without_gradients(self):
        model = Model()
        optimizer = optim.AdamW(model.parameters(), ema_decay=0.9)
        before = [p.detach().clone() for p in model.parameters()]
        with optimizer.averaged():
            assert all(map(torch.equal, model.parameters(), before))
        first = next(model.parameters())
        first.grad = torch.ones_like(first)
        optimizer.step()
        with optimizer.averaged():
            assert all(map(torch.equal, list(model.parameters())[1:], before[1:]))


def test_checkpoints_copies_and_turning_it_on_later():
    model = Model(torch.float32)
    optimizer = optim.SGD(model.parameters(), momentum=0.9, ema_decay=0.9, ema_warmup=True)
    for seed in range(3):
        give_gradients(model.parameters(), seed)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(model)
    other = optim.SGD(resumed.parameters(), momentum=0.9, ema_decay=0.9, ema_warmup=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    runs = [(model, optimizer), (resumed, other), (copied_model, copied), (pickled_model, pickled)]
    for m, o in runs:
        give_gradients(m.parameters(), 7)
        o.step()
    for m, o in runs[1:]:
        assert all(map(torch.equal, averages(o, m.parameters()), averages(optimizer, model.parameters())))

    portable = optimizer.state_dict(portable=True)["state"]
    assert {key for kept in portable.values() for key in kept} == {"momentum_buffer"}

    later = Model(torch.float32)
    plain = optim.AdamW(later.parameters())
    give_gradients(later.parameters(), 0)
    plain.step()
    values = [p.detach().clone() for p in later.parameters()]
    on = optim.AdamW(later.parameters(), ema_decay=0.9)
    on.load_state_dict(plain.state_dict())
    on.step()
    for p, average, before in zip(later.parameters(), averages(on, later.parameters()), values, strict=True):
        torch.testing.assert_close(average, 0.9 * before + 0.1 * p.detach(), rtol=1e-6, atol=1e-7)


def test_rows_without_a_gradient_are_averaged_too():
    table = torch.nn.Parameter(torch.zeros(3, 1))
    optimizer = optim.SGD([table], lr=1.0, ema_decay=0.5)
    for value in (-4.0, 0.0):
        table.grad = torch.sparse_coo_tensor([[1]], torch.full((1, 1), value), (3, 1), check_invariants=True)
        optimizer.step()
        with torch.no_grad():
            table[0] += 2.0
    assert optimizer.state[table]["ema"].flatten().tolist() == [1.0, 4.0, 0.0]


def of_row(row: int, value: float) -> torch.Tensor:
    return torch.sparse_coo_tensor([[row]], torch.full((1, 2), value), (3, 2), check_invariants=True)


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adagrad])
def test_a_gradient_that_is_made_dense_for_the_average_moves_what_its_rows_do(cls):
    """Adagrad's first sum is 0 where there is no gradient."""
    tables = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    rows, dense = cls([tables[0]], lr=0.5), cls([tables[1]], lr=0.5, ema_decay=0.5)
    for step in range(4):
        for table in tables:
            table.grad = of_row(step % 2, step - 1.5)
        rows.step()
        dense.step()
        assert torch.equal(*tables)
    [entry] = dense.plan().entries
    assert entry.route.reason == "sparse gradient, made dense for the average"
    assert rows.plan().entries[0].route.reason == "sparse gradient, only its rows"


class Rows(Optimizer):
    """Momentum of the rows that occur."""

    states = {"m": "momentum"}
    rule = staticmethod(lambda p, g, m, lr: (p - lr * (0.5 * m + g), 0.5 * m + g))

    def __init__(self, params, lr=1.0, **options):
        super().__init__(params, {"lr": lr}, **options)

    @classmethod
    def sparse_form(cls, group):
        return "rows"


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (Rows, {}, "of which only the rows are updated; ema_decay"),
        (optim.Adagrad, {"eps": 0.0}, "of which only the rows are updated; ema_decay"),
        (optim.SGD, {"cautious": True}, "of which only the rows are updated, and counted by cautious; ema_decay"),
    ],
)
def test_an_average_of_rules_of_rows_is_an_error(cls, settings, words):
    """Made dense, the gradient would move rows that it does not have, or count them."""
    other, table = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizer = cls([other, table], ema_decay=0.5, **settings)
    other.grad, table.grad = torch.ones(2), of_row(1, 1.0)
    kept = len(optimizer.state)
    with pytest.raises(RuntimeError, match=rf"{cls.__name__}: parameter 1 of group 0 has a sparse gradient, {words} "):
        optimizer.step()
    assert torch.equal(table, torch.ones(3, 2))
    assert torch.equal(other, torch.ones(2))
    assert len(optimizer.state) == kept
    cls([table], **settings).step()
    assert (table != 1).any(1).tolist() == [False, True, False]


def test_scaler_overflow_changes_no_average():
    model = Model(torch.float32)
    optimizer = optim.SGD(model.parameters(), ema_decay=0.5)
    give_gradients(model.parameters(), 0)
    optimizer.step()
    before = [a.clone() for a in averages(optimizer, model.parameters())]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    give_gradients(model.parameters(), 1)
    next(model.parameters()).grad[0, 0] = float("inf")
    scaler.step(optimizer)
    assert all(map(torch.equal, before, averages(optimizer, model.parameters())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, "SGD: ema_decay must be None or in [0, 1), got 1.0"),
        ({"ema_decay": -0.1}, "SGD: ema_decay must be None or in [0, 1), got -0.1"),
        ({"ema_warmup": True}, "SGD: ema_warmup=True has no meaning without ema_decay"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.SGD([torch.zeros(2)], **options)
