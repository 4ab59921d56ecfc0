"""The plan of a step: what it notices, what runs where and why, and what is left when a step is broken off."""

import dis
import itertools
import math
import re
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import schuss
from schuss import optim
from schuss.engine import numba, watch
from schuss.engine.watch import CHANGED, Native, Portable, Watched
from schuss.optimizer import Optimizer

LAUNCH = numba.launch


def routes(optimizer: Optimizer) -> list[tuple[str, str]]:
    """The back end of each parameter and why it is not the fastest."""
    return [(e.route.backend, e.route.reason) for e in optimizer.plan().entries]


def assert_equal_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=["native", "portable"])
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to notice changes: the compiled loop, and Python where torch's C interface is not found."""
    if request.param == "portable":
        monkeypatch.setattr(watch, "find_interface", lambda: None)
    return request.param


# --- noticing changes -------------------------------------------------------------------------------------------------

SHAPES = [(4, 4), (5,), (2, 3, 4, 5), (1, 7), (), (3, 1, 2), (0, 3), (64,)]


class Sub(torch.Tensor):
    """A tensor subclass."""


class World:
    """Tensors as an optimizer holds them, and a comparison of each kind that looks at them."""

    def __init__(self) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        self.params.append(torch.nn.Parameter(torch.zeros(3, 4).t()))
        self.params.append(torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)))
        self.states = [
            {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "step": torch.tensor(0.0)} for p in self.params
        ]
        self.look()

    def look(self) -> None:
        """Gradients that fit, and comparisons made for what is there now, as a new plan makes them."""
        self.grads: list[torch.Tensor | None] = [torch.zeros_like(p.data) for p in self.params]
        interface = watch.find_interface()
        assert interface is not None
        self.portable = Portable(self.watched())
        self.native = Native(self.watched(), interface, numba.driver().unchanged)
        assert [self.native(self.grads), self.portable(self.grads)] == [1, 1]

    def watched(self) -> Watched:
        keys = ("m", "v", "step")
        tensors = [[kept[key] for key in keys] for kept in self.states]
        address = np.zeros((len(self.params), 4), np.int64)
        address[:, 0] = [p.data_ptr() for p in self.params]
        address[:, 2:] = [[t.data_ptr() for t in held[:2]] for held in tensors]
        scalar_address = np.array([[held[2].data_ptr()] for held in tensors])
        active = np.zeros(len(self.params), np.bool_)
        return Watched(self.params, self.states, keys, tensors, address, scalar_address, active, torch.float32)

    def compare(self) -> int:
        """What both say; they must agree, and have taken over the same addresses."""
        answers = [self.native(self.grads), self.portable(self.grads)]
        assert answers[0] == answers[1]
        if answers[0] != CHANGED:
            native, portable = self.native._watched, self.portable._watched
            there = [g is not None for g in self.grads]
            assert native.active.tolist() == portable.active.tolist() == there
            addresses = [g.data_ptr() for g in self.grads if g is not None]
            assert native.address[there, 1].tolist() == portable.address[there, 1].tolist() == addresses
        return answers[0]


def set_grad(make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[World, int], None]:
    def mutate(world: World, t: int) -> None:
        world.grads[t] = make(world.params[t].data)

    return mutate


def set_state(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[World, int], None]:
    def mutate(world: World, t: int) -> None:
        world.states[t][key] = make(world.states[t][key])

    return mutate


def change_state(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[World, int], None]:
    return lambda world, t: change(world.states[t][key])


def change_param(change: Callable[[torch.Tensor], Any]) -> Callable[[World, int], None]:
    return lambda world, t: change(world.params[t])


def set_data(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], None]:
    return lambda tensor: setattr(tensor, "data", make(tensor.data))


def backwards(like: torch.Tensor) -> torch.Tensor:
    """A dense tensor of the same shape with its dimensions in the opposite order in memory."""
    return like.new_zeros(like.shape[::-1]).permute(*reversed(range(like.dim())))


def with_gaps(like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros((*like.shape, 2))[..., 0]


MUTATIONS: dict[str, tuple[int, Callable[[World, int], Any]]] = {
    "nothing": (0, lambda world, t: None),
    "no gradient": (1, set_grad(lambda p: None)),
    "another gradient": (0, set_grad(torch.ones_like)),
    "gradient of other strides": (CHANGED, set_grad(backwards)),
    "gradient with gaps": (CHANGED, set_grad(with_gaps)),
    "expanded gradient": (CHANGED, set_grad(lambda p: torch.ones(()).expand(p.shape))),
    "float64 gradient": (CHANGED, set_grad(lambda p: torch.zeros_like(p, dtype=torch.float64))),
    "bfloat16 gradient": (CHANGED, set_grad(lambda p: torch.zeros_like(p, dtype=torch.bfloat16))),
    "gradient of a subclass": (CHANGED, set_grad(lambda p: torch.zeros_like(p).as_subclass(Sub))),
    "gradient is a Parameter": (CHANGED, set_grad(lambda p: torch.nn.Parameter(torch.zeros_like(p)))),
    "sparse gradient": (CHANGED, set_grad(lambda p: torch.zeros(p.shape).to_sparse())),
    "meta gradient": (CHANGED, set_grad(lambda p: torch.zeros_like(p, device="meta"))),
    "param in place": (0, change_param(lambda p: p.data.fill_(1.0))),
    "param.data replaced": (CHANGED, change_param(set_data(torch.clone))),
    "param.data transposed": (CHANGED, change_param(set_data(lambda p: p.transpose(0, -1)))),
    "param.data reshaped": (CHANGED, change_param(set_data(lambda p: p.view(-1, 2)))),
    "state in place": (0, change_state("m", lambda m: m.fill_(1.0))),
    "state rebound": (CHANGED, set_state("m", torch.clone)),
    "last state rebound": (CHANGED, set_state("v", torch.clone)),
    "state.data replaced": (CHANGED, change_state("v", set_data(torch.clone))),
    "state moved by resizing": (CHANGED, change_state("m", lambda m: m.untyped_storage().resize_(0))),
    "state is no tensor": (CHANGED, set_state("m", lambda m: 0.0)),
    "state removed": (CHANGED, lambda world, t: world.states[t].pop("v")),
    "another state added": (0, lambda world, t: world.states[t].update(other=torch.zeros(3))),
    "step in place": (0, change_state("step", lambda step: step.add_(1))),
    "step rebound": (CHANGED, set_state("step", torch.clone)),
    "step.data replaced": (CHANGED, change_state("step", set_data(torch.clone))),
}


def fits(mutation: str, p: torch.Tensor) -> bool:
    """Whether a mutation does to a tensor of this shape what it is called."""
    if mutation == "gradient of other strides":
        return sum(n > 1 for n in p.shape) > 1 and backwards(p).stride() != p.stride()
    if mutation == "param.data transposed":
        return p.dim() == 2 and p.shape[0] == p.shape[1]
    if mutation in ("gradient with gaps", "expanded gradient"):
        return p.numel() > 1
    if mutation == "param.data reshaped":
        return p.is_contiguous() and p.dim() == 2 and p.numel() % 2 == 0 and p.shape[1] > 2
    moved = ("param.data replaced", "state.data replaced", "state moved by resizing")
    return mutation not in moved or p.numel() > 0  # an empty tensor lies nowhere


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_both_comparisons_notice_every_kind_of_change(mutation: str) -> None:
    answer, mutate = MUTATIONS[mutation]
    world = World()
    tried = [t for t, p in enumerate(world.params) if fits(mutation, p)]
    assert tried
    for t in tried:
        world = World()
        assert world.compare() == 0
        mutate(world, t)
        assert world.compare() == answer, tuple(world.params[t].shape)
        if answer == 1:
            assert world.compare() == 0
            world.grads[t] = torch.ones_like(world.params[t].data)
            assert world.compare() == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(sorted(MUTATIONS)), st.integers(0, len(SHAPES) + 1)), max_size=25))
def test_both_comparisons_agree_on_any_sequence_of_changes(changes: list[tuple[str, int]]) -> None:
    world = World()
    for mutation, t in changes:
        expected, mutate = MUTATIONS[mutation]
        before = world.grads[t]
        if not fits(mutation, world.params[t]):
            continue
        mutate(world, t)
        answer = world.compare()
        if expected == CHANGED:
            assert answer == CHANGED
            world.__init__()  # type: ignore[misc]
        else:
            assert answer == int((before is None) != (world.grads[t] is None))


def pair(
    make: Callable[[], list[torch.Tensor]], cls: type[Optimizer] = optim.AdamW, **options: Any
) -> tuple[tuple[list[torch.Tensor], Optimizer], tuple[list[torch.Tensor], torch.optim.Optimizer]]:
    """The same parameters twice, under schuss and under torch."""
    ours, theirs = make(), make()
    return (ours, cls(ours, **options)), (theirs, getattr(torch.optim, cls.__name__)(theirs, foreach=False, **options))


def params_of(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> Callable[[], list[torch.Tensor]]:
    def make() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    return make


def give_gradients(params: Sequence[torch.Tensor], seed: int, missing: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = None
        g = torch.randn(p.shape, generator=generator)
        if torch.rand((), generator=generator) >= missing:
            p.grad = torch.empty_like(p.data).copy_(g)


def assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    """Parameters and states agree."""
    for p, q in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerance)
        mine, other = (dict(optimizer.state.get(x, {})) for x, optimizer in ((p, ours[1]), (q, theirs[1])))
        assert mine.keys() == other.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], other[key], **tolerance)


def test_lock_step_with_torch_over_gradients_that_come_and_go(comparison: str) -> None:
    ours, theirs = pair(params_of([*SHAPES[:-2], (40,) * 2] * 3), lr=0.01, weight_decay=0.1)
    for seed in range(25):
        for side in (ours, theirs):
            give_gradients(side[0], seed, missing=0.3)
            side[1].step()
        assert_same(ours, theirs)
    assert {backend for backend, _ in routes(ours[1])} == {"numba"}
    kind = type(ours[1].plan()._buckets[0]._watch)
    assert kind is {"native": Native, "portable": Portable}[comparison]


def test_both_comparisons_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    for interface in (watch.find_interface(), None):
        monkeypatch.setattr(watch, "find_interface", lambda interface=interface: interface)
        params = params_of([(33, 7)] * 20)()
        optimizer = optim.NAdam(params, lr=0.01)
        for seed in range(10):
            give_gradients(params, seed, missing=0.2)
            optimizer.step()
        sides.append((params, optimizer))
    assert_same(*sides, rtol=0, atol=0)


LIVE: dict[str, Callable[[torch.Tensor, dict[str, Any], Any], Any]] = {
    "state in place": lambda p, kept, optimizer: kept["exp_avg"].zero_(),
    "state rebound": lambda p, kept, optimizer: kept.update(exp_avg=kept["exp_avg"] * 2),
    "state.data replaced": lambda p, kept, optimizer: setattr(kept["exp_avg_sq"], "data", kept["exp_avg_sq"] * 2),
    "state dict replaced": lambda p, kept, optimizer: optimizer.state.update(
        {p: {key: value * 2 for key, value in kept.items()}}
    ),
    "state of one removed": lambda p, kept, optimizer: optimizer.state.pop(p),
    "all state cleared": lambda p, kept, optimizer: optimizer.state.clear(),
    "step in place": lambda p, kept, optimizer: kept["step"].fill_(100),
    "step rebound": lambda p, kept, optimizer: kept.update(step=torch.tensor(7.0)),
    "step rebound as float64": lambda p, kept, optimizer: kept.update(step=torch.tensor(7.0, dtype=torch.float64)),
    "param in place": lambda p, kept, optimizer: p.data.mul_(2),
    "param.data replaced": lambda p, kept, optimizer: setattr(p, "data", p.data * 2),
    "param.data transposed": lambda p, kept, optimizer: setattr(p, "data", p.data.t()),
    "gradient transposed": lambda p, kept, optimizer: setattr(p, "grad", p.grad.t()),
    "gradient in place": lambda p, kept, optimizer: p.grad.mul_(2),
    "gradient expanded": lambda p, kept, optimizer: setattr(p, "grad", torch.ones(6, 1).expand(6, 6)),
    "gradient conjugated and negated": lambda p, kept, optimizer: setattr(
        p, "grad", torch.complex(p.grad, p.grad).conj().imag.detach()
    ),
    "lr changed": lambda p, kept, optimizer: optimizer.param_groups[0].update(lr=0.5),
    "form changed": lambda p, kept, optimizer: optimizer.param_groups[0].update(maximize=True),
    "group added": lambda p, kept, optimizer: optimizer.add_param_group({"params": [p.detach().clone()], "lr": 0.3}),
    "parameter removed": lambda p, kept, optimizer: optimizer.param_groups[0]["params"].pop(),
    "parameters in another order": lambda p, kept, optimizer: optimizer.param_groups[0]["params"].reverse(),
}


@pytest.mark.parametrize("count", [3, 20], ids="{}".format)  # lists of 16 and more are compared by the compiled loop
@pytest.mark.parametrize("change", LIVE)
def test_what_other_code_changes_counts_at_the_next_step(change: str, count: int, comparison: str) -> None:
    ours, theirs = pair(params_of([(6, 6)] * count), lr=0.1, weight_decay=0.1)
    for params, optimizer in (ours, theirs):
        for seed in range(2):
            give_gradients(params, seed)
            optimizer.step()
        p = params[1]
        LIVE[change](p, optimizer.state[p], optimizer)
        optimizer.step()  # with the gradients that are there
        optimizer.step()
        give_gradients(params, 5)
        optimizer.step()
    assert_same(ours, theirs)


# --- routes -----------------------------------------------------------------------------------------------------------


def gaps() -> torch.Tensor:
    return torch.nn.Parameter(torch.arange(24.0).reshape(4, 6)[:, ::2])


class Named(torch.nn.Parameter):
    """A parameter subclass."""


def with_grad(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    p.grad = g
    return p


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 2, math.prod(shape)).reshape(shape).to(dtype)


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        p = ramp(3, 4)
        p.grad = ramp(3, 4)
    return p


NUMBA = ("numba", "")
EXOTIC: dict[str, tuple[tuple[str, str], Callable[[], torch.Tensor]]] = {
    "contiguous": (NUMBA, lambda: torch.nn.Parameter(ramp(3, 4))),
    "plain leaf tensor": (NUMBA, lambda: ramp(3, 4).requires_grad_()),
    "scalar": (NUMBA, lambda: torch.nn.Parameter(torch.tensor(2.0))),
    "empty": (NUMBA, lambda: torch.nn.Parameter(torch.zeros(0, 3))),
    "transposed": (NUMBA, lambda: torch.nn.Parameter(ramp(3, 4).t())),
    "channels last": (NUMBA, lambda: torch.nn.Parameter(ramp(2, 3, 4, 5).to(memory_format=torch.channels_last))),
    "dense slice of a larger one": (NUMBA, lambda: torch.nn.Parameter(ramp(9, 4)[3:5])),
    "float64": (NUMBA, lambda: torch.nn.Parameter(ramp(3, 4, dtype=torch.float64))),
    "bfloat16": (NUMBA, lambda: torch.nn.Parameter(ramp(3, 4, dtype=torch.bfloat16))),
    "float16": (
        NUMBA if numba.supports(torch.float16) else ("reference", "dtype float16"),
        lambda: torch.nn.Parameter(ramp(3, 4, dtype=torch.float16)),
    ),
    "complex64": (NUMBA, lambda: torch.nn.Parameter(torch.complex(ramp(3, 4), ramp(3, 4) ** 2))),
    "complex128": (NUMBA, lambda: torch.nn.Parameter(torch.complex(ramp(3, 4), ramp(3, 4) ** 2).to(torch.complex128))),
    "view with gaps": (("reference", "view with gaps or overlaps"), gaps),
    "strided vector": (("reference", "view with gaps or overlaps"), lambda: torch.nn.Parameter(ramp(10)[::3])),
    "subclass": (("reference", "tensor subclass Named"), lambda: Named(ramp(3, 4))),
    "subclass of Tensor": (
        ("reference", "tensor subclass Sub"), lambda: ramp(3, 4).as_subclass(Sub).requires_grad_(),
    ),
    "gradient of a subclass": (
        ("reference", "gradient is a tensor subclass, Sub"),
        lambda: with_grad(torch.nn.Parameter(ramp(3, 4)), ramp(3, 4).as_subclass(Sub)),
    ),
    "gradient in another order": (
        ("reference", "gradient lies in another order than the parameter"),
        lambda: with_grad(torch.nn.Parameter(ramp(3, 4)), ramp(4, 3).t()),
    ),
    "expanded gradient": (
        ("reference", "gradient lies in another order than the parameter"),
        lambda: with_grad(torch.nn.Parameter(ramp(3, 4)), torch.ones(()).expand(3, 4)),
    ),
    "negated view": (
        ("reference", "lazily conjugated or negated"),
        lambda: torch.nn.Parameter(torch.complex(ramp(3, 4), ramp(3, 4)).conj().imag),
    ),
    "differentiable": (("reference", "differentiable=True"), lambda: torch.nn.Parameter(ramp(3, 4))),
    "foreach": (("foreach", "foreach=True"), lambda: torch.nn.Parameter(ramp(3, 4))),
    "inference tensor": (("reference", "inference tensor"), inference_tensor),
}  # fmt: skip
TOLERANCE = {torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2}, torch.float16: {"rtol": 4e-3, "atol": 2e-3}}


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("kind", EXOTIC)
def test_the_plan_names_the_back_end_and_why_and_the_numbers_are_torchs(kind: str) -> None:
    route, make = EXOTIC[kind]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}
    results = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        special = {"differentiable": True} if kind == "differentiable" else {"foreach": kind == "foreach"}
        if kind == "differentiable" and cls is torch.optim.AdamW:
            special = {"foreach": False}
        p, plain = make(), torch.nn.Parameter(torch.ones(5))
        g = p.grad if p.grad is not None else torch.empty_like(p.detach()).copy_(p.detach() * 0.5 + 1)
        p.grad, plain.grad = g, torch.ones(5)
        if kind == "differentiable":
            p, plain = (with_grad(x.detach(), x.grad) for x in (p, plain))  # type: ignore[arg-type]
        optimizer = cls([("odd", p), ("plain", plain)], **options, **special)
        before = g.clone()
        with torch.inference_mode(kind == "inference tensor"):
            for _ in range(3):
                optimizer.step()
        assert torch.equal(p.grad.to_dense(), before.to_dense()), "the gradient is left alone"
        results.append(([p, plain], optimizer))
        if isinstance(optimizer, Optimizer):
            assert routes(optimizer)[0] == route
            assert routes(optimizer)[1] == (NUMBA if kind not in ("differentiable", "foreach") else route)
    assert_same(*results, **TOLERANCE.get(results[0][0][0].dtype, {}))


def sparse(values: Sequence[float], rows: Sequence[int]) -> torch.Tensor:
    columns = torch.tensor(values)[:, None] * torch.tensor([1.0, -2.0])
    return torch.sparse_coo_tensor(torch.tensor([rows]), columns, (5, 2), check_invariants=True)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's Adagrad
@pytest.mark.parametrize(
    ("cls", "options", "form"),
    [
        (optim.SGD, {}, "only its rows"),
        (optim.SGD, {"maximize": True}, "only its rows"),
        (optim.SGD, {"momentum": 0.9, "dampening": 0.5}, "made dense"),
        (optim.SGD, {"momentum": 0.9, "nesterov": True}, "made dense"),
        (optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}, "only its rows"),
    ],
    ids=["SGD", "maximize", "momentum", "nesterov", "Adagrad"],
)
def test_sparse_gradients(cls: type[Optimizer], options: dict[str, Any], form: str) -> None:
    sides = pair(lambda: [torch.nn.Parameter(torch.ones(5, 2)) for _ in range(2)], cls, lr=0.1, **options)
    gradients = [sparse([1, 2, 3], [0, 3, 3]), sparse([1], [4]), None, sparse([], []), sparse([-1, 5], [3, 1])]
    for params, optimizer in sides:
        for g in [*gradients, torch.ones(5, 2), *gradients]:  # now and then a dense one
            params[0].grad, params[1].grad = g, torch.ones(5, 2)
            if form == "made dense" and g is not None and not isinstance(optimizer, Optimizer):
                params[0].grad = g.to_dense()  # torch's buffer would be sparse, and fail on a dense gradient
            optimizer.step()
            if isinstance(optimizer, Optimizer) and g is not None:
                assert routes(optimizer) == [("reference", f"sparse gradient, {form}") if g.is_sparse else NUMBA, NUMBA]
    assert_same(*sides)


def test_a_lazily_conjugated_parameter_moves_as_its_resolved_twin() -> None:
    z = torch.complex(ramp(3, 4), ramp(3, 4) ** 2)
    start = z.conj().resolve_conj()
    lazy, resolved = torch.nn.Parameter(z.conj()), torch.nn.Parameter(start.clone())
    for p in (lazy, resolved):
        p.grad = torch.ones_like(resolved)
    optimizer = optim.AdamW([lazy, resolved], lr=0.1)
    optimizer.step()
    assert routes(optimizer) == [("reference", "lazily conjugated or negated"), NUMBA]
    assert (resolved.detach() - start).abs().min() > 0.05
    torch.testing.assert_close(lazy.detach().resolve_conj(), resolved.detach())


def test_an_expanded_parameter_is_an_error_as_in_torch() -> None:
    for optimizer_class in (optim.SGD, torch.optim.SGD):
        p = torch.nn.Parameter(torch.ones(1).expand(3))
        p.grad = torch.ones(3)
        optimizer = optimizer_class([p], lr=0.5)
        with pytest.raises(RuntimeError, match="refers to a single memory location"):
            optimizer.step()
        assert p.tolist() == [1.0, 1.0, 1.0]
    assert routes(optim.SGD([p])) == [("reference", "view with gaps or overlaps")]


OVERLAPS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "the same memory": lambda base: [base, base.view(4, 6)],
    "partly": lambda base: [base[:10], base[5:15], base[14:], base.new_ones(3)],
    "one in another": lambda base: [base, base[3:4], base[20:]],
    "as other dtype": lambda base: [torch.view_as_complex(base.view(-1, 2)), base[2:5]],
    "gaps first": lambda base: [base[::2], base[1:8]],
    "gaps last": lambda base: [base[1:8], base[::2]],
    "interleaved": lambda base: [base[::2], base[1::2]],
}


@pytest.mark.parametrize("kind", OVERLAPS)
def test_parameters_that_share_memory_are_updated_one_after_the_other(kind: str) -> None:
    def make() -> list[torch.Tensor]:
        return [torch.nn.Parameter(view) for view in OVERLAPS[kind](ramp(24))]

    ours, theirs = pair(make, lr=0.5, weight_decay=0.5)
    for params, optimizer in (ours, theirs):
        for scale in (1.0, -2.0, 3.0):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p.data, scale * (-2) ** i)
            optimizer.step()
    assert_same(ours, theirs)
    if not kind.startswith(("gaps", "interleaved")):
        assert ("reference", "shares memory with another parameter") in routes(ours[1])


def test_neighbours_in_one_buffer_do_not_share_memory() -> None:
    pieces = [torch.nn.Parameter(piece) for piece in ramp(24).split([5, 0, 7, 12])]
    for p in pieces:
        p.grad = torch.ones_like(p)
    optimizer = optim.SGD(pieces, lr=1.0)
    optimizer.step()
    assert routes(optimizer) == [NUMBA] * 4
    assert_equal_bits(torch.cat([p.detach() for p in pieces]), ramp(24) - 1)


IMPOSSIBLE = [k for k, (route, _) in EXOTIC.items() if route[0] == "reference" and k != "differentiable"]


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_numba_by_name_raises_on_what_it_cannot_do_and_names_the_parameter(kind: str) -> None:
    (_, reason), make = EXOTIC[kind]
    for named in (False, True):
        plain, p = torch.nn.Parameter(torch.ones(5)), make()
        plain.grad = torch.ones(5)
        if p.grad is None:
            p.grad = torch.empty_like(p.detach()).fill_(1)
        params = [("plain", plain), ("layer.odd", p)] if named else [plain, p]
        optimizer = optim.AdamW(params, backend="numba")
        name = "layer.odd" if named else "parameter 1 of group 0"
        message = f"AdamW: backend='numba' cannot update {name}: {reason}; use backend='auto'"
        before = p.detach().clone()
        for act in (optimizer.step, optimizer.plan):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                act()
        assert torch.equal(p.detach(), before)
        assert plain.tolist() == [1.0] * 5
        assert not optimizer.state


def test_numba_by_name_raises_on_a_sparse_gradient_of_a_rule_without_a_form_for_it() -> None:
    p = torch.nn.Parameter(torch.ones(5, 2))
    p.grad = sparse([1.0], [2])
    with pytest.raises(
        RuntimeError, match="AdamW does not support sparse gradients, and parameter 0 of group 0 has one"
    ):
        optim.AdamW([p], backend="numba").step()


# --- one launch, no temporaries ---------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each launch updated."""
    seen: list[int] = []
    monkeypatch.setattr(numba, "launch", lambda *args: (seen.append(int(args[7].sum())), LAUNCH(*args)))
    return seen


def test_two_hundred_groups_are_one_launch(launches: list[int]) -> None:
    def make() -> list[torch.Tensor]:
        return params_of([(7,), (3, 5)] * 200)()

    sides = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        params = make()
        groups = [
            {"params": params[2 * i : 2 * i + 2], "lr": 0.001 * (i + 1), "weight_decay": 0.0 if i % 3 else 0.1}
            for i in range(200)
        ]
        optimizer = cls(groups)
        for seed in range(3):
            give_gradients(params, seed)
            optimizer.step()
        sides.append((params, optimizer))
    assert launches == [400, 400, 400]
    assert_same(*sides)


def test_there_is_one_launch_a_dtype_and_form(launches: list[int]) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    params = [torch.nn.Parameter(torch.ones(9, dtype=d)) for d in dtypes * 40]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optim.Adam([{"params": [p], "lr": 0.001 * i} for i, p in enumerate(params)])
    for _ in range(2):
        optimizer.step()
    assert launches == [40] * 6
    for group in optimizer.param_groups[::2]:
        group["amsgrad"] = True
    launches.clear()
    optimizer.step()
    assert launches == [20] * 6
    launches.clear()
    optimizer.zero_grad()
    optimizer.step()
    assert launches == []


def test_an_infinite_parameter_without_decay_does_not_spoil_its_gradient_beside_others_with_decay() -> None:
    params = [torch.nn.Parameter(torch.tensor([math.inf, 1.0])) for _ in range(2)]
    for p in params:
        p.grad = torch.tensor([2.0, 2.0])
    optimizer = optim.Adam([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}], betas=(0.75, 0.5))
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].tolist() == [0.5, 0.5]
    assert optimizer.state[params[1]]["exp_avg"].tolist() == [math.inf, 0.625]


def allocated(step: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that a call asks of torch's allocator, all of them added up, and the peak of Python's and NumPy's."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    by_torch = sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]")
    tracemalloc.start()
    step()
    by_python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return by_torch, by_python


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.RAdam], ids=lambda cls: cls.__name__)
def test_a_step_allocates_nothing_of_the_size_of_the_parameters(cls: type[Optimizer]) -> None:
    """The whole process's memory is looked at in test_processes."""
    params = [torch.nn.Parameter(torch.ones(1024, 1024)) for _ in range(32)]
    grads = torch.ones(1024, 1024)
    for p in params:
        p.grad = grads
    optimizer = cls(params)
    for _ in range(2):
        optimizer.step()
    by_torch, by_python = allocated(optimizer.step)
    assert by_torch < 100_000
    assert by_python < 900_000


def test_the_meter_of_allocations_sees_temporaries() -> None:
    p = torch.nn.Parameter(torch.ones(1024, 1024))
    p.grad = torch.ones(1024, 1024)
    optimizer = optim.AdamW([p], backend="foreach")
    optimizer.step()
    assert allocated(optimizer.step)[0] > 2**22
    assert allocated(lambda: np.ones(2**20))[1] > 2**22


# --- a step that is broken off ----------------------------------------------------------------------------------------


def test_a_step_that_raised_changes_nothing_and_the_next_one_sees_the_gradients_of_then(comparison: str) -> None:
    """Gradients came and went before the error: the step after it goes by what is there, not by what was."""
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    optimizer = optim.Adam(params, lr=1.0)
    params[0].grad, params[2].grad = torch.ones(4), torch.ones(4)
    params[1].grad = torch.ones(4)
    optimizer.step()
    params[1].grad = None
    optimizer.step()
    before = [p.tolist() for p in params]
    params[0].grad, params[1].grad, params[2].grad = None, torch.ones(4), torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert [p.tolist() for p in params] == before
    params[2].grad = torch.ones(4)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 3]
    for p, steps in zip(params, (2, 2, 3), strict=True):
        torch.testing.assert_close(p.detach(), torch.full((4,), -float(steps)))


def test_step_counts_of_one_optimizer_may_have_different_dtypes() -> None:
    """A parameter added while torch's default dtype is float64 counts in float64."""

    def train(module: Any) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
        for p in params:
            p.grad = torch.ones(4)
        optimizer = module.AdamW(params[:2], lr=1.0)
        optimizer.step()
        torch.set_default_dtype(torch.float64)
        try:
            optimizer.add_param_group({"params": params[2:]})
            for _ in range(3):
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert [optimizer.state[p]["step"].dtype for p in params] == [torch.float32] * 2 + [torch.float64]
        assert [optimizer.state[p]["step"].item() for p in params] == [4.0, 4.0, 3.0]
        return [p.detach() for p in params]

    for ours, theirs in zip(train(optim), train(torch.optim), strict=True):
        torch.testing.assert_close(ours, theirs)


PACKAGE = Path(schuss.__file__).parent
STATEFUL = (str(PACKAGE / "optimizer.py"), *(str(PACKAGE / "engine" / f"{n}.py") for n in ("plan", "bucket", "watch")))
"""Where a step changes something outside of the function that runs."""


@cache
def interruptible(code: Any) -> set[int]:
    """The instructions of a function before which signals are handled: the first, and those after a call."""
    pairs = itertools.pairwise(dis.get_instructions(code))
    return {after.offset for before, after in pairs if before.opname.startswith(("CALL", "RESUME"))}


def moments(step: Callable[[], Any], at: int | None = None) -> list[str]:
    """Call `step` and tell at which places in schuss an interrupt can reach it; at the `at`-th, send one."""
    places: list[str] = []

    def reached(frame: FrameType, what: str) -> None:
        code = frame.f_code
        places.append(f"{code.co_qualname}, line {frame.f_lineno}, {what} {frame.f_lasti}")
        if len(places) - 1 == at:
            raise KeyboardInterrupt

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call":
            if not frame.f_code.co_filename.startswith(STATEFUL):
                if frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(STATEFUL):
                    reached(frame.f_back, f"in {frame.f_code.co_name} at instruction")
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode" and frame.f_lasti in interruptible(frame.f_code):
            reached(frame, "instruction")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        assert len(places) - 1 == at
    finally:
        sys.settrace(before)
    return places


def snapshot(optimizer: Optimizer, p: torch.Tensor) -> list[list[float]]:
    kept = optimizer.state.get(p, {})
    return [p.tolist(), *(kept[key].reshape(-1).tolist() for key in kept)]


class Scenario:
    """Three tensors with constant gradients, so that values tell how often a tensor has been updated."""

    gradients: ClassVar = [1.0, -2.0, 0.5]

    def __init__(self, cls: type[Optimizer], options: dict[str, Any]) -> None:
        self.params = [torch.nn.Parameter(torch.tensor([0.5, -3.0])) for _ in self.gradients]
        self.optimizer = cls([{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.25}], **options)

    def step(self, which: Sequence[int], at: int | None = None, *, watched: bool = False) -> list[str]:
        """One step in which these tensors have a gradient; `moments` of it if watched or interrupted."""
        for i, p in enumerate(self.params):
            p.grad = torch.full((2,), self.gradients[i]) if i in which else None
        if watched or at is not None:
            return moments(self.optimizer.step, at)
        self.optimizer.step()
        return []

    def snapshots(self) -> list[list[list[float]]]:
        return [snapshot(self.optimizer, p) for p in self.params]


ALL = (0, 1, 2)
SCENARIOS: dict[str, tuple[list[Sequence[int]], Sequence[int], list[Sequence[int]]]] = {
    "first step": ([], ALL, [ALL, ALL]),
    "steady step": ([ALL, ALL], ALL, [ALL, (0,), ALL]),
    "gradients come and go": ([ALL, (0, 2)], (1, 2), [(1, 2), (0,), ALL]),
    "step counts part": ([ALL, (0, 2)], ALL, [ALL, (1,), ALL]),
    "a tensor joins": ([(0,), (0,)], (0, 1), [(0, 1), ALL]),
}


@pytest.mark.parametrize(
    ("cls", "options"),
    [(optim.Adam, {"lr": 0.5}), (optim.SGD, {"lr": 0.5, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.125})],
    ids=["Adam", "SGD with momentum"],
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_interrupt_at_any_moment_leaves_whole_steps(
    scenario: str, cls: type[Optimizer], options: dict[str, Any]
) -> None:
    """Each tensor has been updated as if the interrupted step had been done, or not; and so it goes on."""
    before, interrupted, after = SCENARIOS[scenario]
    run = Scenario(cls, options)
    trajectory = [run.snapshots()]
    for _ in range(8):
        run.step(ALL)
        trajectory.append(run.snapshots())

    def counts(run: Scenario) -> list[int]:
        """How often each tensor has been updated; -1 for one in a state that no number of updates leads to."""
        found = []
        for i, now in enumerate(run.snapshots()):
            # State may have been made, and nothing else have happened.
            at_start = run.params[i] in run.optimizer.state and now[0] == trajectory[0][i][0]
            found.append(0 if at_start else next((n for n, then in enumerate(trajectory) if then[i] == now), -1))
        return found

    def run_before() -> Scenario:
        run = Scenario(cls, options)
        for which in before:
            run.step(which)
        return run

    places = run_before().step(interrupted, watched=True)
    first_time = {place: at for at, place in reversed(list(enumerate(places)))}
    assert len(first_time) > 30
    wrong, outcomes = {}, set()
    for at in first_time.values():
        run = run_before()
        expected = [sum(i in which for which in before) for i in ALL]
        assert counts(run) == expected
        place = run.step(interrupted, at)[-1]
        done = [n - m for n, m in zip(counts(run), expected, strict=True)]
        if done not in ([int(i in interrupted) for i in ALL], [0, 0, 0]):
            wrong[place] = f"left {done}"
            continue
        outcomes.add(any(done))
        expected = counts(run)
        for which in after:
            try:
                run.step(which)
            except Exception as error:
                wrong[place] = f"a later step raised {error!r}"
                break
            expected = [n + (i in which) for i, n in enumerate(expected)]
            if counts(run) != expected:
                wrong[place] = f"later {counts(run)} updates instead of {expected}"
                break
    assert wrong == {}
    assert outcomes == {False, True}
