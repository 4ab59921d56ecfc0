"""Clipping inside the step: torch's function and then torch's step, and what happens when there is no norm."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import schuss
from schuss import optim

SHAPES = ((33, 7), (5000,), (3,), (), (0,), (40_000,))


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (size * torch.randn(p.shape, generator=generator)).to(p.dtype)


@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_is_torch_function_then_step(name, backend):
    """Every second gradient is small enough to stay as it is."""
    ours, theirs = parameters(), parameters()
    optimizer = getattr(optim, name)(ours, max_norm=2.0, backend=backend)
    other = getattr(torch.optim, name)(theirs)
    for seed in range(6):
        for params in (ours, theirs):
            give_gradients(params, seed, 1e-3 if seed % 2 else 1.0)
        before = [p.grad.clone() for p in ours]
        norm = clip_grad_norm_(theirs, 2.0)
        other.step()
        optimizer.step()
        assert optimizer.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)  # told in float32
        assert all(map(torch.equal, before, [p.grad for p in ours]))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_norm_of_every_dtype(dtype):
    """Summed in float64, so that 45,000 squares of one dtype agree with float64 to its printed digits."""
    params = parameters(dtype)
    optimizer = optim.SGD(params, max_norm=math.inf)
    give_gradients(params, 1)
    optimizer.step()
    exact = sum(p.grad.abs().double().square().sum() for p in params).sqrt().item()
    assert optimizer.last_grad_norm.item() == pytest.approx(exact, rel=1e-6)


def test_norm_does_not_overflow():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([p], lr=1.0, max_norm=1.0)
    p.grad = torch.full((4,), 1e30)  # its square is no float32
    optimizer.step()
    assert optimizer.last_grad_norm.item() == pytest.approx(2e30, rel=1e-6)
    assert torch.allclose(p, torch.full((4,), 0.5))


def test_infinite_bound_measures_and_changes_nothing():
    runs = []
    for more in ({}, {"max_norm": math.inf}):
        params = parameters(torch.float32)
        optimizer = optim.AdamW(params, **more)
        for seed in range(3):
            give_gradients(params, seed)
            optimizer.step()
        runs.append(params)
    assert all(map(torch.equal, *runs))


def test_one_norm_over_groups_dtypes_and_back_ends():
    """Tensors of kernels, views that eager torch updates, sparse gradients: all count."""
    table = torch.randn(6, 8)
    params = [
        torch.nn.Parameter(torch.randn(5)),
        torch.nn.Parameter(torch.randn(4, dtype=torch.float64)),
        torch.nn.Parameter(table[:, ::2]),
        torch.nn.Parameter(torch.randn(9, 2)),
    ]
    optimizer = optim.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], lr=1.0, max_norm=0.5)
    for p in params[:3]:
        p.grad = torch.ones_like(p)
    params[3].grad = torch.sparse_coo_tensor([[1, 4, 4]], torch.ones(3, 2), (9, 2), check_invariants=True)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    squares = 5 + 4 + 24 + (2 * 1.0 + 2 * 4.0)
    assert optimizer.last_grad_norm.item() == pytest.approx(math.sqrt(squares), rel=1e-6)
    factor = 0.5 / (math.sqrt(squares) + 1e-6)
    assert torch.allclose(before[0] - params[0], torch.full((5,), factor), atol=1e-6)
    assert torch.allclose(before[2] - params[2], torch.full((6, 4), 0.1 * factor), atol=1e-6)
    assert torch.allclose((before[3] - params[3])[4], torch.full((2,), 0.2 * factor), atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    try:
        norms = []
        for count in (1, threads):
            torch.set_num_threads(count)
            params = parameters(torch.float32)
            optimizer = optim.AdamW(params, max_norm=1.0)
            give_gradients(params, 3)
            optimizer.step()
            norms.append([optimizer.last_grad_norm, *params])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *norms))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), st.floats(0.01, 5))
def test_clip_value(values, bound):
    ours, theirs = (torch.nn.Parameter(torch.zeros(len(values), dtype=torch.float64)) for _ in range(2))
    for p in (ours, theirs):
        p.grad = torch.tensor(values, dtype=torch.float64)
    optim.SGD([ours], lr=1.0, clip_value=bound, weight_decay=0.5).step()
    clip_grad_value_([theirs], bound)
    torch.optim.SGD([theirs], lr=1.0, weight_decay=0.5).step()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


def test_after_unscaling():
    """The norm is that of the gradients without the scale."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = optim.AdamW(ours, max_norm=1.0), torch.optim.AdamW(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        give_gradients(theirs, seed)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad * 1024.0
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        norm = clip_grad_norm_(theirs, 1.0)
        other.step()
        assert optimizer.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
class TestNonfinite:
    def run(self, wrong, first, **more):
        params = parameters(torch.float32)
        optimizer = optim.SGD(params, momentum=0.9, max_norm=1.0, ema_decay=0.9, **more)
        if not first:
            give_gradients(params, 0)
            optimizer.step()
        give_gradients(params, 1)
        params[1].grad[17] = wrong
        return params, optimizer

    def everything(self, params, optimizer):
        return [*params, *(v for p in params for v in optimizer.state.get(p, {}).values())]

    def test_skip(self, wrong, first):
        params, optimizer = self.run(wrong, first, nonfinite="skip")
        before = [t.detach().clone() for t in self.everything(params, optimizer)]
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert all(map(torch.equal, before, self.everything(params, optimizer)))
        assert not math.isfinite(optimizer.last_grad_norm)
        plain, other = self.run(0.0, first)
        for run, o in ((params, optimizer), (plain, other)):
            give_gradients(run, 2)
            o.step()
        assert optimizer.skipped_steps == 1
        assert all(map(torch.equal, params, plain))

    def test_raise(self, wrong, first):
        params, optimizer = self.run(wrong, first, nonfinite="raise")
        before = [t.detach().clone() for t in self.everything(params, optimizer)]
        with pytest.raises(RuntimeError, match=r"SGD: the norm of the gradients is (nan|inf), and nothing was changed"):
            optimizer.step()
        assert all(map(torch.equal, before, self.everything(params, optimizer)))

    def test_propagate_is_torch(self, wrong, first):
        params, optimizer = self.run(wrong, first)
        optimizer.step()
        assert params[1][17].isnan()
        assert params[0].isnan().all() == math.isnan(wrong)


class TestFunction:
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
    @pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
    def test_values_of_torch(self, norm_type, dtype, max_norm):
        ours, theirs = parameters(dtype), parameters(dtype)
        for params in (ours, theirs):
            give_gradients(params, 5)
            params[2].grad = params[4].grad = None
        norm = schuss.clip_grad_norm_(ours, max_norm, norm_type)
        expected = clip_grad_norm_(theirs, max_norm, norm_type)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        for p, q in zip(ours, theirs, strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0)

    def test_mixed_dtypes_views_and_one_tensor(self):
        params = [torch.nn.Parameter(torch.randn(50, dtype=d)) for d in (torch.float32, torch.float64, torch.float32)]
        for p in params:
            p.grad = torch.ones_like(p)
        params[2].grad = torch.ones(50, 2).t()[0]  # every second element of memory
        assert schuss.clip_grad_norm_(iter(params), 1.0).item() == pytest.approx(math.sqrt(150), rel=1e-6)
        assert params[0].grad[0].item() == pytest.approx(1 / math.sqrt(150), rel=1e-5)
        assert schuss.clip_grad_norm_(params[1], math.inf).item() == pytest.approx(math.sqrt(1 / 3), rel=1e-5)

    def test_errors(self):
        p = torch.nn.Parameter(torch.ones(2))
        assert schuss.clip_grad_norm_([p], 1.0).item() == 0.0
        p.grad = torch.tensor([1.0, math.nan])
        with pytest.raises(RuntimeError, match="norm of the gradients is nan, and nothing was changed"):
            schuss.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
        assert p.grad[0] == 1.0
        with pytest.raises(ValueError, match=r"clip_grad_norm_: max_norm must be in \(0, inf\], got 0"):
            schuss.clip_grad_norm_([p], 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_norm": 0}, ValueError, "SGD: max_norm must be None or in (0, inf], got 0"),
        ({"max_norm": -1.0}, ValueError, "SGD: max_norm must be None or in (0, inf], got -1.0"),
        ({"max_norm": math.nan}, ValueError, "SGD: max_norm must be None or in (0, inf], got nan"),
        ({"max_norm": "1"}, TypeError, "SGD: max_norm must be None or a number in (0, inf], got '1' (str)"),
        ({"clip_value": 0.0}, ValueError, "SGD: clip_value must be None or in (0, inf), got 0.0"),
        ({"nonfinite": "ignore", "max_norm": 1}, ValueError, "nonfinite must be one of propagate, skip, raise"),
        ({"nonfinite": "skip"}, ValueError, "nonfinite='skip' has no meaning without max_norm"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error) as caught:
        optim.SGD([torch.zeros(2)], **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("backend", ["foreach", "reference"])
def test_steps_without_kernels_are_left_out_by_the_host(backend, monkeypatch):
    """As on a device without kernels, where the norm is a tensor that waits there."""
    from schuss.engine import clip

    there = clip._square_sum
    monkeypatch.setattr(clip, "_square_sum", lambda g: torch.as_tensor(there(g), dtype=torch.float64))
    params = parameters()
    optimizer = optim.AdamW(params, max_norm=1.0, nonfinite="skip", backend=backend)
    give_gradients(params, 0)
    params[0].grad[0, 0] = math.nan
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, params))
    give_gradients(params, 1)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(before[0], params[0])
