"""On a CUDA device: the kernels' bits, steps without waiting, graphs, GradScaler. Skipped where there is none."""

import copy

import pytest
import torch

from schuss import optim
from schuss.testing import has_sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

SHAPES = ((257, 129), (64, 96), (64, 96), (5000,), (3,), (), (0,), (8, 4, 3, 3), (70_000,))
FORMS = [
    *((cls, {}) for cls in optim.RULES),
    (optim.AdamW, {"cautious": True, "cautious_decay": True}),
    (optim.LAMB, {"max_norm": 1.0, "state_dtype": "int8"}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
]
STORED = [
    (torch.float32, {"state_dtype": "int8"}),
    (torch.float32, {"state_dtype": "bfloat16"}),
    (torch.float64, {}),
    (torch.float16, {"rounding": "kahan"}),
    (torch.float16, {"rounding": "stochastic"}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"rounding": "kahan"}),
    (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "int8", "seed": 7}),
    (torch.complex64, {}),
]


def make(cls, device, dtype=torch.float32, **settings):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in SHAPES if cls.takes(torch.empty(shape, device="meta"))]
    values = [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes]
    params = [torch.nn.Parameter(value) for value in values]
    return cls([{"params": params[::2]}, {"params": params[1::2]}], **settings), params


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = g.to(p.device)


def trained(cls, device, dtype=torch.float32, steps=4, **settings):
    optimizer, params = make(cls, device, dtype, **settings)
    for seed in range(steps):
        give_gradients(params, seed)
        optimizer.step()
    return optimizer, params


def assert_same(a, b):
    (first, params), (second, others) = a, b
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.cpu(), q.cpu())
        for key, value in first.state[p].items():
            assert torch.equal(value.cpu(), second.state[q][key].cpu()), key


@pytest.mark.parametrize(("cls", "settings"), FORMS)
def test_bits_of_the_cpu(cls, settings):
    """Sums are added in another order there, and products of matrices are torch's: those agree within rounding."""
    (optimizer, params), cpu = trained(cls, "cuda", **settings), trained(cls, "cpu", **settings)
    entries = optimizer.plan().entries
    rows = {e.name for e in entries if "vectors" in optimizer._rule.needs(e.variant)}
    assert {e.route.backend for e in entries if e.name not in rows} <= {"triton"}
    matrices = any("matrices" in optimizer._rule.needs(e.variant) for e in entries)
    if not has_sums(optimizer):
        assert_same((optimizer, params), cpu)
        return
    for p, q in zip(params, cpu[1], strict=True):
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if matrices else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(p.cpu(), q, **tolerance)


@pytest.mark.parametrize(("dtype", "settings"), STORED)
@pytest.mark.parametrize("cls", [optim.AdamW, optim.Lion])
def test_bits_of_every_storage(cls, dtype, settings):
    assert_same(trained(cls, "cuda", dtype, **settings), trained(cls, "cpu", dtype, **settings))


@pytest.mark.parametrize(
    "cls",
    [cls for cls in optim.RULES if "capturable" in cls([torch.zeros(2, 2)]).defaults],
    ids=lambda cls: cls.__name__,
)
def test_numbers_on_the_device(cls):
    """float64 powers of the device may differ in the last place, and so a float32 scalar by one unit."""
    optimizer, params = trained(cls, "cuda", capturable=True)
    _, expected = trained(cls, "cpu")
    for p, q in zip(params, expected, strict=True):
        assert optimizer.state[p]["step"].device.type == "cuda"
        torch.testing.assert_close(p.cpu(), q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (optim.AdamW, {}),
        (optim.AdamW, {"capturable": True}),
        (optim.AdamW, {"capturable": True, "lr": torch.tensor(1e-3)}),
        (optim.AdamW, {"cautious": True}),
        (optim.LAMB, {}),
        (optim.Prodigy, {}),
        (optim.Muon, {}),
    ],
)
def test_a_step_does_not_wait(cls, settings):
    settings = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    optimizer, params = trained(cls, "cuda", **settings)
    grads = [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p in params:
            p.grad = p.grad.clone()  # at other addresses
        optimizer.step()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cls", [optim.AdamW, optim.RAdam, optim.ADOPT, optim.LAMB])
def test_replays_of_a_graph_are_steps(cls):
    lr = torch.tensor(1e-3, device="cuda")
    optimizer, params = make(cls, "cuda", lr=lr, capturable=True)
    _, expected = plain = make(cls, "cuda", lr=1e-3)
    for p in (*params, *expected):
        p.grad = torch.ones_like(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for rate in (1e-3, 1e-3, 5e-2):
        lr.fill_(rate)
        graph.replay()
    optimizer.step()  # and outside of the graph
    for rate in (1e-3, 1e-3, 1e-3, 1e-3, 5e-2, 5e-2):
        for group in plain[0].param_groups:
            group["lr"] = rate
        plain[0].step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_capturing_host_numbers_is_an_error():
    optimizer, params = trained(optim.AdamW, "cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("capturable", [False, True])
def test_gradscaler(capturable):
    """A step with an infinite gradient changes nothing; the others are those without a scale."""
    optimizer, params = make(optim.AdamW, "cuda", capturable=capturable)
    plain, expected = make(optim.AdamW, "cuda", capturable=capturable)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for seed in range(4):
        give_gradients(expected, seed)
        for p, q in zip(params, expected, strict=True):
            p.grad = q.grad * scaler.get_scale()
        scaler.scale(torch.zeros((), device="cuda"))
        if seed == 2:
            params[0].grad[0, 0] = float("inf")
        else:
            plain.step()
        before = copy.deepcopy(optimizer.state_dict()["state"])
        scaler.step(optimizer)
        scaler.update()
        if seed == 2:
            after = optimizer.state_dict()["state"]
            assert all(torch.equal(v, after[i][key]) for i, kept in before.items() for key, v in kept.items())
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_unaligned_and_transposed():
    memory = torch.randn(10_001, device="cuda")
    matrix = torch.randn(90, 70, device="cuda").t()
    optimizers = []
    for device in ("cuda", "cpu"):
        params = [torch.nn.Parameter(memory.to(device)[1:]), torch.nn.Parameter(matrix.to(device))]
        optimizer = optim.AdamW(params)
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.arange(p.numel(), device=device).view(p.shape) / p.numel())
        optimizer.step()
        optimizers.append((optimizer, params))
    assert_same(*optimizers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_several_devices_in_one_optimizer():
    params = [torch.nn.Parameter(torch.randn(5000)) for _ in range(3)]
    moved = [torch.nn.Parameter(p.detach().to(d)) for p, d in zip(params, ("cuda:0", "cuda:1", "cpu"), strict=True)]
    for tensors in (params, moved):
        optimizer = optim.AdamW(tensors)
        for p in tensors:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(torch.equal(p, q.cpu()) for p, q in zip(params, moved, strict=True))
