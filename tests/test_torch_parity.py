"""Against torch.optim, step by step: same parameters, same state, same failures."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import cases
from cases import (
    ALL,
    DENSE,
    LAYOUTS,
    RICH,
    Case,
    assert_close,
    assert_close_params,
    assert_close_state,
    assert_equal,
    drive,
    each,
    each_with,
    exact_matrices,
    gradient,
    lockstep,
    parameters,
    randn,
    set_gradients,
    slack,
    snapshot,
)
from schuss.testing import has_sums

torch_cases = each(ALL, torch_has=True)
torch_rich = each(RICH, torch_has=True)


def torch_fails(case: Case, layout: str) -> bool:
    """Whether torch's optimizer cannot step such a parameter: its Adafactor divides by the number of elements."""
    return case.name == "Adafactor" and layout == "empty"


def pair(case: Case, layouts: Sequence[str] = ("contiguous", "transposed", "0-d"), dtype: torch.dtype = torch.float64,
         **more: Any) -> tuple[Any, Any, list[Any], list[Any]]:  # fmt: skip
    """Both optimizers, and the parameters of each."""
    layouts = [name for name in layouts if not torch_fails(case, name)]
    ours, theirs = case.parameters(layouts, dtype), case.parameters(layouts, dtype)
    return case.ours(ours, **more), case.theirs(theirs, **more), ours, theirs


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small work in operations that torch always starts its threads for; they cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """`step` and its like are made in float64 then, and torch's arithmetic with them is as exact as ours."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@each_with(ALL, [torch.float64, torch.float32, torch.complex64])
def test_every_configuration_agrees(case: Case, dtype: torch.dtype) -> None:
    lockstep(*pair(case, DENSE, dtype))


@each(RICH, torch_has=True, takes_complex=True)
def test_complex128_agrees(case: Case) -> None:
    lockstep(*pair(case, DENSE, torch.complex128))


def half_pair(case: Case, dtype: torch.dtype, their_dtype: torch.dtype) -> tuple[Any, Any, list[Any], list[Any]]:
    ours = case.parameters(("contiguous", "transposed", "0-d"), dtype)
    theirs = [torch.nn.Parameter(p.detach().to(their_dtype, copy=True)) for p in ours]
    return case.ours(ours), case.theirs(theirs), ours, theirs


def take_over(theirs: Any, ours: Any) -> None:
    """Give torch's optimizer our numbers, in its own dtype, so that errors of earlier steps do not add up."""
    with torch.no_grad():
        for a, b in zip(theirs.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
            a.copy_(b)
            for key, value in theirs.state[a].items():
                value.copy_(ours.state[b][key])


HALF_CASES = [c for c in ALL if c in RICH or c.kwargs == cases.CASES[c.name][0]]


@each(HALF_CASES, torch_has=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_torch_in_float32_rounded_once(case: Case, dtype: torch.dtype) -> None:
    """What is computed from half numbers is float32's result: the nearest half number, or at a tie its neighbour.

    The oracle is torch's optimizer on the same numbers widened to float32, rounded after each step.
    """
    ours, theirs, our_params, their_params = half_pair(case, dtype, torch.float32)
    info = torch.finfo(dtype)
    compared = differ = 0
    for step in range(8):
        set_gradients(our_params, step)
        for p, q in zip(our_params, their_params, strict=True):
            q.grad = p.grad.float()
        take_over(theirs, ours)
        ours.step()
        theirs.step()
        for p, q in zip(our_params, their_params, strict=True):
            checked = {"parameter": (p, q)} | {k: (ours.state[p][k], v) for k, v in theirs.state[q].items()}
            for key, (a, b) in checked.items():
                if a.dtype != dtype:
                    assert_close(a, b, f"step {step}: {key}")
                    continue
                rounded = b.detach().to(dtype)
                ulp = info.eps * rounded.abs().float().clamp(min=info.smallest_normal)
                assert ((a.float() - rounded.float()).abs() <= ulp).all(), (
                    f"step {step}: {key} is off by more than 1 ulp"
                )
                compared += a.numel()
                differ += int((a != rounded).sum())
    assert compared > 400
    assert differ <= 0.005 * compared  # float32's own rounding errors reach a tie about once in 2**13 times


@each(HALF_CASES, torch_has=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_agrees_with_torch_in_half(case: Case, dtype: torch.dtype) -> None:
    """Step for step from the same numbers. torch rounds after each of some six operations, each to half an ulp of what
    it makes, so a few ulps of the largest number remain; `torch.testing` allows two."""
    ours, theirs, our_params, their_params = half_pair(case, dtype, dtype)
    eps = torch.finfo(dtype).eps
    for step in range(8):
        take_over(theirs, ours)
        drive(ours, our_params, [step])
        drive(theirs, their_params, [step])
        for p, q in zip(our_params, their_params, strict=True):
            for key, value in [("parameter", q), *theirs.state[q].items()]:
                mine = p if key == "parameter" else ours.state[p][key]
                atol = 4 * eps * float(value.detach().abs().max()) + torch.finfo(dtype).smallest_normal * 2 * eps
                torch.testing.assert_close(
                    mine.detach(), value.detach(), rtol=4 * eps, atol=atol, check_stride=False,
                    msg=lambda text, key=key, step=step: f"step {step} {key}: {text}",
                )  # fmt: skip


# --- layouts ----------------------------------------------------------------------------------------------------------


@each_with(RICH, [torch.float64, torch.complex64])
def test_every_layout_agrees(case: Case, dtype: torch.dtype) -> None:
    lockstep(*pair(case, tuple(LAYOUTS), dtype))


@exact_matrices
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, id=f"{layout}-{case}")
        for layout in LAYOUTS
        for case in RICH
        if case.name in cases.IN_TORCH and not torch_fails(case, layout)
    ],
)
def test_state_lies_in_memory_as_in_torch(case: Case, layout: str) -> None:
    """What other code reshapes or views in torch's state it can in ours."""
    ours, theirs, our_params, their_params = pair(case, (layout,))
    lockstep(ours, theirs, our_params, their_params, 2)
    mine, others = dict(cases.tensors_of(ours)), dict(cases.tensors_of(theirs))
    assert set(mine) == set(others)
    for name, other in others.items():
        assert mine[name].shape == other.shape, name
        if other.numel() > 1:
            assert mine[name].stride() == other.stride(), name


@torch_rich
def test_gradients_with_other_strides(case: Case) -> None:
    """A gradient may lie in memory in another order than its parameter, with gaps, or as an expanded number."""
    ours, theirs, our_params, their_params = pair(case, ("contiguous", "transposed", "channels-last", "contiguous"))

    def strange(params: list[Any], step: int) -> None:
        set_gradients(params, step)
        params[0].grad = params[0].grad.t().contiguous().t()
        params[1].grad = params[1].grad.contiguous()
        params[2].grad = params[2].grad.contiguous() if step % 2 else params[2].grad
        if step % 3 == 0:
            params[3].grad = torch.tensor(0.3 + step, dtype=params[3].dtype).expand(params[3].shape)
        elif step % 3 == 1:
            params[3].grad = gradient(torch.zeros(5, 14, dtype=params[3].dtype), step)[:, ::2]

    for step in range(8):
        for optimizer, params in ((ours, our_params), (theirs, their_params)):
            strange(params, step)
            before = [p.grad.clone() for p in params]
            optimizer.step()
            assert_equal([p.grad for p in params], before, "gradients")
        assert_close_params(our_params, their_params, f"step {step}:", slack=slack(theirs))
    assert_close_state(ours, theirs)


def conjugated(p: torch.Tensor, step: int) -> torch.Tensor:
    g = gradient(p, step).conj()
    assert g.is_conj()
    return g


def negated(p: torch.Tensor, step: int) -> torch.Tensor:
    g = gradient(torch.zeros(p.shape, dtype=torch.complex128), step).conj().imag
    assert g.is_neg()
    return g


def negated_and_dense(p: torch.Tensor, step: int) -> torch.Tensor:
    g = negated(p, step).as_strided(p.shape, p.stride())
    assert g.is_neg()
    return g


LAZY = {
    "conjugated": (conjugated, (5, 7), torch.complex64),
    "conjugated-0-d": (conjugated, (), torch.complex64),
    "negated-one-element": (negated, (1,), torch.float64),
    "negated-0-d": (negated, (), torch.float64),
    "negated": (negated, (5, 7), torch.float64),
    "negated-dense": (negated_and_dense, (5, 7), torch.float64),
}


@exact_matrices
@pytest.mark.parametrize(
    ("case", "lazy", "shape", "dtype"),
    [
        pytest.param(case, *what, id=f"{name}-{case}")
        for name, what in LAZY.items()
        for case in RICH
        if case.name in cases.IN_TORCH and (case.cls.takes_complex or not what[2].is_complex)
    ],
)
def test_lazy_gradients(
    case: Case, lazy: Callable[[torch.Tensor, int], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The sign or conjugation that a view only promises counts, also where plain gradients came before."""
    start = case.fit(randn(*shape, dtype=dtype))
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours, theirs = case.ours([p]), case.theirs([q])
    for step in range(6):
        for optimizer, param in ((ours, p), (theirs, q)):
            param.grad = gradient(param, step) if step % 3 == 0 else lazy(param, step)
            optimizer.step()
        assert_close(p, q, f"step {step}", slack=slack(theirs))
    assert_close_state(ours, theirs)


@each(RICH, torch_has=True, takes_complex=True)
def test_lazily_conjugated_parameter(case: Case) -> None:
    """torch's optimizers fail on one; here it is updated as its resolved twin is."""
    start = randn(3, 4, dtype=torch.complex128)
    p, q = start.clone().conj().requires_grad_(), start.conj().resolve_conj().clone().requires_grad_()
    assert p.is_conj()
    assert not q.is_conj()
    lockstep(case.ours([p]), case.theirs([q]), [p], [q])


# --- which parameters, which groups -----------------------------------------------------------------------------------


@torch_cases
def test_missing_gradients(case: Case) -> None:
    """Another third of the parameters has no gradient at each step: each counts its own steps."""
    lockstep(*pair(case, ("contiguous", "transposed", "0-d", "permuted")), 12, missing=True)


@torch_rich
def test_parameter_without_any_gradient_gets_no_state(case: Case) -> None:
    ours, theirs, our_params, their_params = pair(case)
    for step in range(3):
        for optimizer, params in ((ours, our_params), (theirs, their_params)):
            set_gradients(params, step)
            params[1].grad = None
            optimizer.step()
    assert_close_params(our_params, their_params, slack=slack(theirs))
    assert_close_state(ours, theirs)
    assert_equal(our_params[1], case.parameters()[1])


@torch_rich
def test_no_gradients_at_all(case: Case) -> None:
    ours, theirs, our_params, their_params = pair(case)
    before = snapshot(ours)
    ours.step()
    theirs.step()
    assert_equal(snapshot(ours), before)
    assert_close_state(ours, theirs)
    lockstep(ours, theirs, our_params, their_params, 3)


def group_pair(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[Any, Any, list[Any], list[Any]]:
    """Both optimizers with four unlike groups of three parameters each, and all parameters."""
    case, made = Case(name, dict(lr=0.05)), []
    for build in (case.ours, case.theirs):
        groups = [
            {"params": case.parameters(dtype=dtype, seed=10 * i), **overrides}
            for i, overrides in enumerate(cases.GROUPS[name])
        ]
        made.append((build(groups, **more), [p for group in groups for p in group["params"]]))
    (ours, our_params), (theirs, their_params) = made
    return ours, theirs, our_params, their_params


@exact_matrices
@pytest.mark.parametrize("name", cases.IN_TORCH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_unlike_groups(name: str, dtype: torch.dtype) -> None:
    """lr, decay or none, maximize or not, with or without a state, in one optimizer."""
    lockstep(*group_pair(name, dtype), 10, missing=True)


@exact_matrices
@pytest.mark.parametrize("name", cases.IN_TORCH)
@pytest.mark.parametrize("options", [dict(backend="foreach"), dict(backend="reference")], ids=lambda o: o["backend"])
def test_unlike_groups_on_other_backends(name: str, options: dict[str, Any]) -> None:
    case = Case(name, dict(lr=0.05))
    _, theirs, _, their_params = group_pair(name)
    groups = [{"params": case.parameters(seed=10 * i), **o} for i, o in enumerate(cases.GROUPS[name])]
    ours = case.ours(groups, **options)
    lockstep(ours, theirs, [p for g in groups for p in g["params"]], their_params, 7, missing=True)


@exact_matrices
@pytest.mark.parametrize("name", [name for name in cases.IN_TORCH if name != "Adafactor"])
def test_decay_of_some_groups_leaves_infinite_parameters_of_others_alone(name: str) -> None:
    """Weight decay 0 is no decay: 0 * inf would make the gradient NaN. (Adafactor's steps are infinite there.)"""
    if name == "Rprop":
        decayed: dict[str, Any] = {}  # it has no decay
    else:
        decayed = {"weight_decay": 0.1}
    case, results = Case(name, dict(lr=0.05)), []
    for build in (case.ours, case.theirs):
        plain, other = torch.tensor([1.0, torch.inf, -torch.inf, 2.0]), torch.tensor([1.0, -2.0, 3.0, 4.0])
        params = [torch.nn.Parameter(case.fit(t.double())) for t in (plain, other)]
        undecayed = {"weight_decay": 0.0} if decayed else {}
        optimizer = build([{"params": params[:1], **undecayed}, {"params": params[1:], **decayed}])
        drive(optimizer, params, 3)
        results.append((optimizer, params))
    (ours, our_params), (theirs, their_params) = results
    assert_close_params(our_params, their_params, slack=slack(theirs))
    assert_close_state(ours, theirs)


# --- hyperparameters that change --------------------------------------------------------------------------------------


@torch_rich
def test_lr_changed_by_hand(case: Case) -> None:
    ours, theirs, our_params, their_params = pair(case)

    def change(step: int) -> None:
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] *= 0.5 if step % 2 else 3
            if step == 4:
                optimizer.param_groups[0]["lr"] = 0.0

    lockstep(ours, theirs, our_params, their_params, 8, then=change)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t) ** 0.5),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [3],
    ),
}


@torch_rich
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_of_torch(case: Case, scheduler: str) -> None:
    ours, theirs, our_params, their_params = pair(case)
    schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer in (ours, theirs)]
    lockstep(ours, theirs, our_params, their_params, 8, then=lambda step: [s.step() for s in schedulers])


@each(
    [c for c in ALL if "momentum" in c.kwargs or c.name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")],
    torch_has=True,
)
@pytest.mark.parametrize("kind", ["one-cycle", "cyclic"])
def test_schedulers_that_cycle_momentum(case: Case, kind: str) -> None:
    """They write group["momentum"] or group["betas"]."""
    ours, theirs, our_params, their_params = pair(case)

    def scheduler(optimizer: Any) -> Any:
        if kind == "one-cycle":
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12, cycle_momentum=True)
        return torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=True)

    schedulers = [scheduler(optimizer) for optimizer in (ours, theirs)]
    lockstep(ours, theirs, our_params, their_params, 10, then=lambda step: [s.step() for s in schedulers])


def test_momentum_switched_on_and_off_while_training() -> None:
    """The buffer starts as the gradient of the first step that uses it, and keeps what it holds while unused."""
    ours, theirs, our_params, their_params = pair(Case("SGD", dict(lr=0.1, dampening=0.3)))

    def change(step: int) -> None:
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["momentum"] = (0.0, 0.9, 0.9, 0.5, 0.0, 0.0, 0.7, 0.7)[step]

    lockstep(ours, theirs, our_params, their_params, 8, then=change)


@torch_rich
def test_flags_changed_while_training(case: Case) -> None:
    """maximize, weight decay and the like count from the next step on."""
    ours, theirs, our_params, their_params = pair(case)

    def change(step: int) -> None:
        for optimizer in (ours, theirs):
            group = optimizer.param_groups[0]
            if step == 1 and "maximize" not in cases.OWN.get(case.name, ()):
                group["maximize"] = not group["maximize"]
            for key, value in {"weight_decay": (0.0, 0.2), "nesterov": (False, True)}.items():
                if key in group and step in (2, 4):
                    group[key] = value[step // 2 - 1]
            if step == 3 and "decoupled_weight_decay" in group:
                group["decoupled_weight_decay"] = not group["decoupled_weight_decay"]

    lockstep(ours, theirs, our_params, their_params, 8, then=change)


@torch_rich
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_lr_tensor_changed_in_place(case: Case, shape: tuple[int, ...]) -> None:
    """A tensor lr is read anew at each step, whatever wrote into it."""
    rates = [torch.full(shape, case.kwargs.get("lr", 1.0), dtype=torch.float64) for _ in range(2)]
    ours, theirs = case.parameters(), case.parameters()
    a, b = case.ours(ours, lr=rates[0]), case.theirs(theirs, lr=rates[1])

    def change(step: int) -> None:
        for rate in rates:
            rate.mul_(0.5) if step % 2 else rate.fill_(0.03 * (step + 1))

    lockstep(a, b, ours, theirs, 8, then=change)
    assert a.param_groups[0]["lr"] is rates[0]


@torch_rich
def test_lr_tensor_with_a_scheduler(case: Case) -> None:
    ours, theirs = case.parameters(), case.parameters()
    lr = torch.tensor(case.kwargs.get("lr", 1.0), dtype=torch.float64)
    a, b = case.ours(ours, lr=lr.clone()), case.theirs(theirs, lr=lr.clone())
    schedulers = [SCHEDULERS["cosine"](o) for o in (a, b)]
    lockstep(a, b, ours, theirs, 6, then=lambda step: [s.step() for s in schedulers])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_as_tensors(name: str) -> None:
    """Both tensors, read anew at each step."""
    betas = [tuple(torch.tensor(b, dtype=torch.float64) for b in (0.8, 0.9)) for _ in range(2)]
    ours, theirs = parameters(), parameters()
    case = Case(name, dict(lr=0.01))
    a, b = case.ours(ours, betas=betas[0]), case.theirs(theirs, betas=betas[1])

    def change(step: int) -> None:
        for beta1, beta2 in betas:
            beta1.mul_(0.9)
            beta2.fill_(0.5 + 0.05 * step)

    lockstep(a, b, ours, theirs, 6, then=change)


def test_weight_decay_as_a_tensor() -> None:
    decays = [torch.tensor(0.1, dtype=torch.float64) for _ in range(2)]
    ours, theirs = parameters(), parameters()
    case = Case("SGD", dict(lr=0.1, momentum=0.9))
    a, b = case.ours(ours, weight_decay=decays[0]), case.theirs(theirs, weight_decay=decays[1])
    lockstep(a, b, ours, theirs, 6, then=lambda step: [d.mul_(0.5) for d in decays])


# --- gradients that are not finite ------------------------------------------------------------------------------------


@torch_cases
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("auto", torch.float64), ("auto", torch.float32), ("foreach", torch.float64), ("reference", torch.float64)],
    ids=["numba-float64", "numba-float32", "foreach", "reference"],
)
def test_nan_and_infinite_gradients_spread_as_in_torch(case: Case, dtype: torch.dtype, backend: str) -> None:
    """NaN and Inf end up in the same places of parameters and state, during the step and ever after."""
    layouts = ("contiguous",)
    ours, theirs = case.parameters(layouts, dtype), case.parameters(layouts, dtype)
    a, b = case.ours(ours, backend=backend), case.theirs(theirs)
    for step in range(7):
        for optimizer, params in ((a, ours), (b, theirs)):
            set_gradients(params, step)
            if step in (0, 3):
                params[0].grad[step, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
                params[0].grad[:, 3] = 0
            optimizer.step()
        assert_close_params(ours, theirs, f"step {step}:", slack=slack(b))
        mine, others = dict(cases.tensors_of(a)), dict(cases.tensors_of(b))
        assert set(mine) == set(others)
        for name, other in others.items():
            assert torch.equal(mine[name].isnan(), other.isnan()), f"step {step}: NaN in {name}"
            assert torch.equal(mine[name].isinf(), other.isinf()), f"step {step}: Inf in {name}"
    assert_close_state(a, b)


# --- sparse gradients -------------------------------------------------------------------------------------------------

SPARSE = [
    Case("SGD", dict(lr=0.1)),
    Case("SGD", dict(lr=0.1, maximize=True)),
    Case("Adagrad", dict(lr=0.1)),
    Case("Adagrad", dict(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5, maximize=True)),
]
SPARSE_MOMENTUM = [
    Case("SGD", dict(lr=0.1, momentum=0.9)),
    Case("SGD", dict(lr=0.1, momentum=0.9, dampening=0.5)),
    Case("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True)),
]


@pytest.fixture
def checked_sparse(one_thread: None) -> Iterator[None]:
    """torch warns unless one says whether sparse tensors are to be checked."""
    with torch.sparse.check_sparse_tensor_invariants(True):
        yield


def sparse_gradient(p: torch.Tensor, step: int, *, dense_dims: int) -> torch.Tensor:
    """A sparse gradient with a coordinate that occurs twice."""
    sparse_dims = p.dim() - dense_dims
    count = 5
    indices = torch.stack(
        [torch.randint(n, (count,), generator=cases.generator(step, n)) for n in p.shape[:sparse_dims]]
    )
    indices[:, 1] = indices[:, 0]
    values = randn(count, *p.shape[sparse_dims:], dtype=p.dtype, seed=step)
    if step == 3:  # no row at all
        indices, values = indices[:, :0], values[:0]
    return torch.sparse_coo_tensor(indices, values, p.shape)


@pytest.mark.usefixtures("checked_sparse")
@each(SPARSE + SPARSE_MOMENTUM)
@pytest.mark.parametrize("dense_dims", [0, 1])
@pytest.mark.parametrize("coalesced", [False, True], ids=["repeated", "coalesced"])
def test_sparse_gradients(case: Case, dense_dims: int, coalesced: bool) -> None:
    """The parameters are torch's. (torch keeps a sparse momentum buffer; ours is dense, with the same numbers.)"""
    ours, theirs = case.parameters(("contiguous",)), case.parameters(("contiguous",))
    a, b = case.ours(ours), case.theirs(theirs)
    for step in range(6):
        for optimizer, params in ((a, ours), (b, theirs)):
            grad = sparse_gradient(params[0], step, dense_dims=dense_dims)
            params[0].grad = grad.coalesce() if coalesced else grad
            optimizer.step()
        assert_close_params(ours, theirs, f"step {step}:", slack=slack(b))
    if case in SPARSE:
        assert_close_state(a, b)
    else:
        buffers = [o.state[p[0]]["momentum_buffer"].to_dense() for o, p in ((a, ours), (b, theirs))]
        assert_close(*buffers)


@pytest.mark.usefixtures("checked_sparse")
@each(SPARSE)
def test_sparse_and_dense_gradients_take_turns(case: Case) -> None:
    ours, theirs = case.parameters(("contiguous", "transposed")), case.parameters(("contiguous", "transposed"))
    a, b = case.ours(ours), case.theirs(theirs)
    for step in range(7):
        for optimizer, params in ((a, ours), (b, theirs)):
            set_gradients(params, step)
            if step % 3:
                params[0].grad = sparse_gradient(params[0], step, dense_dims=1)
            optimizer.step()
        assert_close_params(ours, theirs, f"step {step}:", slack=slack(b))
    assert_close_state(a, b)


@pytest.mark.usefixtures("checked_sparse")
@each([c for c in RICH if c.name not in ("SGD", "Adagrad")])
def test_sparse_gradients_are_refused_as_in_torch(case: Case) -> None:
    params = case.parameters(("contiguous", "transposed"))
    optimizer = case.ours(params)
    set_gradients(params, 0)
    params[1].grad = sparse_gradient(params[1], 0, dense_dims=1)
    before = snapshot(optimizer)["params"]
    with pytest.raises(
        RuntimeError, match=rf"{case.name} does not support sparse gradients, and parameter 1 of group 0"
    ):
        optimizer.step()
    assert_equal([p.detach() for p in params], before)
    assert not optimizer.state


@pytest.mark.usefixtures("checked_sparse")
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_weight_decay_refuses_sparse_gradients(name: str) -> None:
    """torch's Adagrad refuses; its SGD fails in the addition. Here both refuse, and nothing has changed."""
    params = parameters(("contiguous",))
    optimizer = Case(name, dict(lr=0.1, weight_decay=0.1)).ours(params)
    params[0].grad = sparse_gradient(params[0], 0, dense_dims=1)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients"):
        optimizer.step()
    after = snapshot(optimizer)
    assert_equal(after["params"], before["params"])
    assert_equal(after["state"], before["state"])


# --- back ends and the keywords that choose one in torch --------------------------------------------------------------


@torch_cases
@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
def test_every_backend_agrees(case: Case, backend: str) -> None:
    ours, theirs = case.parameters(backend=backend), case.parameters(backend=backend)
    a, b = case.ours(ours, backend=backend), case.theirs(theirs)
    lockstep(a, b, ours, theirs, 7)
    assert {entry.route.backend for entry in a.plan().entries} == {backend}


@each([c for c in RICH if c.accepts("foreach")], torch_has=True)
def test_foreach(case: Case) -> None:
    """foreach=True chooses that back end, and the state dict says so as torch's does."""
    ours, theirs, our_params, their_params = pair(case, foreach=True)
    lockstep(ours, theirs, our_params, their_params)
    assert {entry.route.backend for entry in ours.plan().entries} == {"foreach"}


@each([c for c in ALL if c.name in ("SGD", "Adagrad", "Adam", "AdamW")])
def test_fused(case: Case) -> None:
    ours, theirs, our_params, their_params = pair(case, fused=True)
    lockstep(ours, theirs, our_params, their_params)


@each([c for c in RICH if c.accepts("capturable")])
@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_capturable_on_the_cpu_is_refused_as_in_torch(case: Case, backend: str) -> None:
    """AssertionError at the step, and nothing has changed."""
    message = "If capturable=True, params.* must be on supported devices"
    if case.name in cases.IN_TORCH:
        theirs = case.parameters()
        set_gradients(theirs, 0)
        with pytest.raises(AssertionError, match=message):
            case.theirs(theirs, capturable=True).step()
    params = case.parameters()
    optimizer = case.ours(params, capturable=True, backend=backend)
    set_gradients(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(AssertionError, match=message):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)


@each(ALL)
@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
def test_maximize_is_the_step_on_negated_gradients(case: Case, backend: str) -> None:
    """To the last bit of parameters, and of states that are even in the gradient or flip with it; of rules with sums to
    rounding, since a kernel that negates the gradient may add in another order."""
    up, down = case.parameters(backend=backend), case.parameters(backend=backend)
    flipped = case.kwargs.get("maximize", False)
    a, b = case.ours(up, backend=backend, maximize=not flipped), case.ours(down, backend=backend, maximize=flipped)
    exact = not has_sums(a)
    for step in range(7):
        set_gradients(up, step)
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad
        a.step()
        b.step()
        if exact:
            assert_equal([p.detach() for p in up], [q.detach() for q in down], f"step {step}")
        else:
            assert_close_params(up, down, f"step {step}")
    if exact:
        assert_equal(a.state_dict()["state"], b.state_dict()["state"])


# --- differentiable=True ----------------------------------------------------------------------------------------------


def derivatives(build: Callable[..., Any], case: Case, lr_is_tensor: bool) -> dict[str, torch.Tensor | None]:
    """Of a function of the parameter and the state after one step, as torch's own tests take them: with respect to
    the parameter, the gradient, the state before the step, and a tensor lr."""
    ready = case.theirs([first := torch.nn.Parameter(randn(4, 3, seed=1))])
    drive(ready, [first], 6)  # a state from the middle of a training; torch made it
    rate = case.kwargs.get("lr", 1.0)
    inputs = {"p": first.detach().clone().requires_grad_(), "g": randn(4, 3, seed=2).requires_grad_()}
    if lr_is_tensor:
        inputs["lr"] = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    state = ready.state[first]
    inputs |= {k: v.detach().clone().requires_grad_() for k, v in state.items() if v.dim()}
    p = inputs["p"].clone()
    p.grad = inputs["g"]
    optimizer = build([p], lr=inputs.get("lr", rate), differentiable=True)
    optimizer.state[p].update({k: inputs[k].clone() if k in inputs else v.clone() for k, v in state.items()})
    optimizer.step()
    after = {"p": p} | {k: v for k, v in optimizer.state[p].items() if v.dim()}
    loss = sum((value * randn(4, 3, seed=20 + i)).sum() for i, (_, value) in enumerate(sorted(after.items())))
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {f"new {k}": v for k, v in after.items()} | dict(zip(inputs, found, strict=True))


TAKES_A_TENSOR_LR = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "ASGD", "Rprop")  # torch's others fail with TypeError
DERIVATIVES = [
    pytest.param(case, is_tensor, id=f"{case}-{'tensor' if is_tensor else 'number'}")
    for case in ALL
    for is_tensor in (False, True)
    if case.name in cases.IN_TORCH
    and case.accepts("differentiable")
    and not {"t0", "step_sizes"} & set(case.kwargs)
    and (case.name in TAKES_A_TENSOR_LR or not is_tensor)
]


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize(("case", "lr_is_tensor"), DERIVATIVES)
def test_differentiable_has_torchs_derivatives(case: Case, lr_is_tensor: bool) -> None:
    """Left out: ASGD's average, where torch fails, and Rprop's step exactly at a limit, where both sides are right."""
    ours, theirs = (derivatives(build, case, lr_is_tensor) for build in (case.ours, case.theirs))
    assert set(ours) == set(theirs)
    for key, expected in theirs.items():
        mine = ours[key]
        if expected is None or mine is None:  # no influence
            present = mine if expected is None else expected
            assert present is None or not present.any(), key
        else:
            assert_close(mine, expected, key)


def unrolled(case: Case, lr: Any, start: torch.Tensor, *grads: torch.Tensor) -> torch.Tensor:
    """Steps through which autograd can go, as in meta-learning."""
    p = start.clone()
    optimizer = case.ours([p], lr=lr, differentiable=True)
    for g in grads:
        p.grad = g
        optimizer.step()
    return p


@each([c for c in ALL if c.name not in ("Lion", "Rprop") and c.accepts("differentiable")])
def test_differentiable_passes_gradcheck(case: Case) -> None:
    """Autograd's derivatives of three steps, with respect to start, gradients and lr, are those of finite differences.

    torch's cannot go through a second step of most of its optimizers, and cuts SGD's buffer off its first gradient.
    Lion and Rprop take signs, which have no derivative; ASGD keeps its rate as a number, as torch does.
    """
    rate = case.kwargs.get("lr", 1.0)
    inputs = [randn(3, seed=1 + i).requires_grad_() for i in range(4)]
    if case.name == "ASGD":
        assert torch.autograd.gradcheck(lambda *args: unrolled(case, rate, *args), inputs)
    else:
        lr = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *args: unrolled(case, *args), [lr, *inputs])


@each([c for c in RICH if c.accepts("differentiable")], torch_has=True)
def test_differentiable_changes_no_number(case: Case) -> None:
    """A step that can be differentiated moves the parameters as one that cannot."""
    results = []
    for differentiable in (False, True):
        p = randn(4, 3, seed=1)
        optimizer = case.ours([p], differentiable=differentiable)
        for step in range(6):
            p.grad = gradient(p, step)
            optimizer.step()
        results.append(p)
    assert_close(*results)


# --- the default dtype ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64_by_default")
@each([c for c in ALL if c in RICH or c.name in ("NAdam", "ASGD")], torch_has=True)
def test_float64_as_the_default_dtype(case: Case) -> None:
    """`step` and its like are float64 then; NAdam and ASGD, which keep more of them, agree to the last digits."""
    lockstep(*pair(case), missing=True)


@each([Case("Adam", dict(lr=0.01, betas=betas)) for betas in ((0.0, 0.9), (0.3, 0.9), (0.5, 0.5))])
@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
def test_momentum_forgets_a_huge_gradient(case: Case, backend: str) -> None:
    """With β₁ at most 1/2, a gradient of 1e8 followed by one of 1 leaves no rounding error of 1e8 in the average."""
    ours, theirs = case.parameters(("contiguous",), torch.float32), case.parameters(("contiguous",), torch.float32)
    a, b = case.ours(ours, backend=backend), case.theirs(theirs)
    for step in range(4):
        for optimizer, params in ((a, ours), (b, theirs)):
            set_gradients(params, step)
            if step == 0:
                params[0].grad *= 1e8
            optimizer.step()
        assert_close(a.state[ours[0]]["exp_avg"], b.state[theirs[0]]["exp_avg"], f"step {step}")


@torch_rich
def test_many_parameters_in_one_optimizer(case: Case) -> None:
    """A hundred tensors of 1 to 300 elements, two of a chunk or more: none is left out, none is updated twice."""
    sizes = [1 + (37 * i) % 300 for i in range(100)] + [16384, 16385]
    ours = [torch.nn.Parameter(case.fit(randn(n, seed=i))) for i, n in enumerate(sizes)]
    theirs = [torch.nn.Parameter(case.fit(randn(n, seed=i))) for i, n in enumerate(sizes)]
    lockstep(case.ours(ours), case.theirs(theirs), ours, theirs, 3, missing=True)


@torch_rich
@pytest.mark.parametrize("spans", [((0, 20), (10, 30)), ((0, 30), (5, 15), (20, 40)), ((0, 20), (0, 20))], ids=str)
def test_parameters_that_share_memory(case: Case, spans: Sequence[tuple[int, int]]) -> None:
    """They are updated one after the other, as in torch."""
    made = []
    for build in (case.ours, case.theirs):
        storage = randn(40)
        params = [torch.nn.Parameter(case.fit(storage[a:b])) for a, b in spans] + case.parameters(("contiguous",))
        made.append((build(params), params))
    (a, ours), (b, theirs) = made
    lockstep(a, b, ours, theirs, 5)


class Tagged(torch.nn.Parameter):
    """A parameter of a class of its own."""


@torch_rich
def test_subclasses_of_parameter(case: Case) -> None:
    made = []
    for build in (case.ours, case.theirs):
        params = [Tagged(randn(3, 4)), *case.parameters(("contiguous",))]
        assert type(params[0]) is Tagged
        made.append((build(params), params))
    (a, ours), (b, theirs) = made
    lockstep(a, b, ours, theirs, 5)


@each(RICH)
@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
def test_gradients_that_require_gradients(case: Case, backend: str) -> None:
    """As backward(create_graph=True) leaves them: the step is not recorded, and holds no graph."""
    plain, recorded = case.parameters(backend=backend), case.parameters(backend=backend)
    a, b = case.ours(plain, backend=backend), case.ours(recorded, backend=backend)
    for step in range(3):
        for optimizer, params in ((a, plain), (b, recorded)):
            set_gradients(params, step)
            for p in params if optimizer is b else ():
                p.grad = (p.grad.requires_grad_() * 1.0).clone()
                assert p.grad.grad_fn is not None
            optimizer.step()
    assert_equal([p.detach() for p in recorded], [p.detach() for p in plain])
    assert all(p.is_leaf and p.grad_fn is None for p in recorded)
    assert not any(t.requires_grad for _, t in cases.tensors_of(b))


@torch_rich
def test_numbers_of_other_types(case: Case) -> None:
    """NumPy's and integers are numbers, too."""
    for lr in (np.float64(0.01), np.int64(1), 1):
        lockstep(*pair(case, ("contiguous",), lr=lr), 3)


@torch_rich
def test_mixed_dtypes_in_one_optimizer(case: Case) -> None:
    """float64, float32 and complex64 parameters side by side, if it takes these."""
    made = []
    for build in (case.ours, case.theirs):
        dtypes = (torch.float64, torch.float32, *([torch.complex64] if case.cls.takes_complex else []))
        params = [p for dtype in dtypes for p in case.parameters(dtype=dtype)]
        made.append((build(params), params))
    (a, ours), (b, theirs) = made
    lockstep(a, b, ours, theirs, 6, missing=True)


@pytest.mark.usefixtures("one_thread")
@torch_rich
def test_training_a_model(case: Case) -> None:
    """Gradients of a real backward pass; the losses stay together."""
    losses = []
    for build in (case.ours, case.theirs):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Tanh(), torch.nn.Flatten(),
            torch.nn.Linear(144, 10),
        ).double().to(memory_format=torch.channels_last)  # fmt: skip
        x, y = randn(16, 1, 8, 8, seed=3), torch.arange(16) % 10
        trained = [p for p in model.parameters() if case.fit(p) is p]
        optimizer = build(trained, **dict.fromkeys(case.kwargs.keys() & {"maximize"}, False))
        for _ in range(12):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:12] == pytest.approx(losses[12:], rel=1e-9 if case.name != "NAdam" else 1e-7)
    assert losses[11] != pytest.approx(losses[0], rel=1e-6)
