"""Schedule-Free SGD, AdamW and RAdam: numbers of the paper, and the two places of their parameters."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import schuss
from cases import assert_equal, drive, gradient, parameters, randn, snapshot
from schuss import optim
from schuss.wrappers import Lookahead

Array = np.ndarray[Any, Any]
CLASSES = (optim.ScheduleFreeSGD, optim.ScheduleFreeAdamW, optim.ScheduleFreeRAdam)
each = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
SETTINGS: dict[Any, dict[str, Any]] = {
    optim.ScheduleFreeSGD: dict(lr=0.1, warmup_steps=3),
    optim.ScheduleFreeAdamW: dict(lr=0.05, weight_decay=0.1),
    optim.ScheduleFreeRAdam: dict(lr=0.05, betas=(0.9, 0.9)),
}


def made(cls: Any, params: Any, **more: Any) -> Any:
    return cls(params, **(SETTINGS[cls] | more))


def parameter(value: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value], dtype=dtype))


def values(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def descend(optimizer: Any, p: torch.Tensor, slope: Callable[[float], float], steps: int) -> float:
    """Follow the gradient of a function of one number; where it is evaluated in the end."""
    for _ in range(steps):
        p.grad = torch.full_like(p, slope(p.item()))
        optimizer.step()
    with optimizer.evaluating():
        return p.item()


# --- the paper's numbers ----------------------------------------------------------------------------------------------


def quadratic(beta: float) -> float:
    """x after 50 steps at rate 0.3 from 5 on x²/2."""
    p = parameter(5.0)
    return descend(optim.ScheduleFreeSGD([p], lr=0.3, momentum=beta), p, lambda y: y, 50)


def test_beta_towards_0_is_the_mean_of_plain_sgd() -> None:
    """Without z_0: c is 1 at the first step. x is a polynomial of β, so its value at 0 follows from those near it."""
    rho = 1 - 0.3
    expected = 5 * rho * (1 - rho**50) / (50 * (1 - rho))
    assert expected == pytest.approx(0.23333332913691, rel=1e-13)
    nodes = np.linspace(0.01, 0.06, 6)
    limit = sum(quadratic(b) * np.prod([other / (other - b) for other in nodes if other != b]) for b in nodes.tolist())
    assert limit == pytest.approx(expected, rel=1e-7)
    assert quadratic(0.5) != pytest.approx(expected, rel=0.01)


def test_beta_1_takes_gradients_at_the_average() -> None:
    assert quadratic(1.0) == pytest.approx(0.19996135561402, rel=1e-12)


def test_beta_near_0_is_asgds_average() -> None:
    """Polyak's and Ruppert's average of the iterates, here with noise; ASGD is this with t0=-1."""
    p, q = parameter(2.0), parameter(2.0)
    ours = optim.ScheduleFreeSGD([p], lr=0.1, momentum=1e-6)
    theirs = optim.ASGD([q], lr=0.1, lambd=0.0, t0=-1)
    for step in range(100):
        p.grad, q.grad = (t.detach() + randn(1, seed=step) for t in (p, q))
        ours.step()
        theirs.step()
    ours.eval()
    torch.testing.assert_close(p.detach(), theirs.state[q]["ax"], rtol=0, atol=1e-6)
    assert abs(p.item() - q.item()) > 1e-3


@pytest.mark.parametrize(
    ("beta", "expected"), [(1e-4, 0.0191), (0.5, 0.0055), (0.9, 0.0013), (0.98, 0.0002), (1.0, 0.0135)]
)
def test_the_bound_of_theorem_1(beta: float, expected: float) -> None:
    """|f(x_T) - f*| <= D G / sqrt(T) at the rate D / (G sqrt(T)): here of |x - 1| from 0 in 1000 steps."""
    p = parameter(0.0)
    optimizer = optim.ScheduleFreeSGD([p], lr=1000**-0.5, momentum=beta)
    gap = abs(descend(optimizer, p, lambda y: float(np.sign(y - 1)), 1000) - 1)
    assert gap <= 1000**-0.5
    assert gap == pytest.approx(expected, abs=2e-4)


# --- the paper's algorithms in NumPy, with x itself -------------------------------------------------------------------


class Oracle:
    """Algorithm 1 of the paper with x, y and z as they stand there, weights as in its section on warm-up."""

    def __init__(self, start: Array, **settings: Any) -> None:
        self.x, self.y, self.z, self.v = start.copy(), start.copy(), start.copy(), np.zeros_like(start)
        self.t, self.sum, self.largest = 0, 0.0, 0.0
        self.s: dict[str, Any] = (
            dict(lr=0.1, beta=0.9, beta2=0.999, eps=1e-8, decay=0.0, warmup=0, r=0.0, power=2.0, silent=True) | settings
        )

    def average(self, u: Array, rate: float) -> None:
        s = self.s
        self.z = self.z - rate * u
        self.largest = max(self.largest, rate)
        weight = self.t ** s["r"] * self.largest ** s["power"]
        self.sum += weight
        c = weight / self.sum if self.sum else 0.0
        self.x = (1 - c) * self.x + c * self.z
        self.y = (1 - s["beta"]) * self.z + s["beta"] * self.x

    def warmed(self) -> float:
        return self.s["lr"] * min(1.0, self.t / self.s["warmup"]) if self.s["warmup"] else self.s["lr"]

    def sgd(self, g: Array) -> None:
        self.t += 1
        self.average(g + self.s["decay"] * self.y, self.warmed())

    def divided(self, g: Array) -> Array:
        b = self.s["beta2"]
        self.v = b * self.v + (1 - b) * g**2
        return g / (np.sqrt(self.v / (1 - b**self.t)) + self.s["eps"])

    def adamw(self, g: Array) -> None:
        self.t += 1
        self.average(self.divided(g) + self.s["decay"] * self.y, self.warmed())

    def radam(self, g: Array) -> None:
        self.t += 1
        b = self.s["beta2"]
        longest = 2 / (1 - b) - 1
        length = longest - 2 * self.t * b**self.t / (1 - b**self.t)
        u, rate = self.divided(g), self.s["lr"]
        if length > 4:
            rate *= np.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        else:
            u, rate = g, 0.0 if self.s["silent"] else rate
        self.average(u + self.s["decay"] * self.y, rate)


BOTH = [
    {},
    {"beta": 0.5},
    {"beta": 1.0},
    {"decay": 0.3},
    {"r": 1.0},
    {"r": 0.5, "power": 0.0},
    {"power": 1.0, "decay": 0.1, "beta": 0.98},
]
WARM = [{"warmup": 7}, {"warmup": 4, "power": 0.0, "decay": 0.2}, {"warmup": 7, "r": 2.0, "power": 3.0}]
ORACLES = [
    *(("sgd", s) for s in (*BOTH, *WARM)),
    *(("adamw", s) for s in (*BOTH, *WARM, {"beta2": 0.5, "eps": 0.1})),
    *(("radam", s) for s in (*BOTH, {"silent": False}, {"silent": False, "power": 0.0, "decay": 0.2, "beta2": 0.9})),
    ("radam", {"silent": False, "beta2": 0.5}),
    ("radam", {"beta2": 0.61}),
]


def of_oracle(name: str, s: dict[str, Any], params: Any, **more: Any) -> Any:
    """The optimizer with an oracle's settings."""
    settings = {"lr": s["lr"], "weight_decay": s["decay"], "r": s["r"], "weight_lr_power": s["power"]} | more
    if name == "sgd":
        return optim.ScheduleFreeSGD(params, momentum=s["beta"], warmup_steps=s["warmup"], **settings)
    settings |= {"betas": (s["beta"], s["beta2"]), "eps": s["eps"]}
    if name == "adamw":
        return optim.ScheduleFreeAdamW(params, warmup_steps=s["warmup"], **settings)
    return optim.ScheduleFreeRAdam(params, silent_sgd_phase=s["silent"], **settings)


@pytest.mark.parametrize(("name", "settings"), ORACLES, ids=str)
@pytest.mark.parametrize("falls", [False, True], ids=["one rate", "falling rate"])
def test_every_step_is_the_papers(name: str, settings: dict[str, Any], falls: bool) -> None:
    """y after each step, x where it is asked for, over 30 steps in float64; the largest rate counts if rates fall."""
    p = nn.Parameter(randn(7))
    oracle = Oracle(p.detach().numpy(), **settings)
    optimizer = of_oracle(name, oracle.s, [p])
    for step in range(30):
        g = randn(7, seed=step + 1)
        if falls:
            oracle.s["lr"] = optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        p.grad = g
        optimizer.step()
        getattr(oracle, name)(g.numpy())
        np.testing.assert_allclose(p.detach().numpy(), oracle.y, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[p]["z"].numpy(), oracle.z, rtol=1e-12, atol=1e-12)
        if step % 7 == 6:
            with optimizer.evaluating():
                np.testing.assert_allclose(p.detach().numpy(), oracle.x, rtol=1e-12, atol=1e-12)


@each
def test_another_beta_leaves_x_where_it_is(cls: Any) -> None:
    """y is made with the β of its step; the next one goes from there to the new β. Elsewhere x would jump."""
    name = cls.__name__.removeprefix("ScheduleFree").lower()
    p = nn.Parameter(randn(7))
    oracle = Oracle(p.detach().numpy(), beta2=0.9)
    optimizer = of_oracle(name, oracle.s, [p])
    for step in range(20):
        beta = oracle.s["beta"] = 0.95 - 0.03 * step
        group = optimizer.param_groups[0]
        group.update({"momentum": beta} if name == "sgd" else {"betas": (beta, 0.9)})
        p.grad = randn(7, seed=step + 1)
        optimizer.step()
        getattr(oracle, name)(p.grad.numpy())
        group.update({"momentum": 0.123} if name == "sgd" else {"betas": (0.123, 0.9)})
        with optimizer.evaluating():
            np.testing.assert_allclose(p.detach().numpy(), oracle.x, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(p.detach().numpy(), oracle.y, rtol=1e-12, atol=1e-12)


def test_a_rate_of_0_at_the_start_is_no_division_by_0() -> None:
    """A warm-up of a scheduler often begins so. Those steps have no weight; the first other one has all."""
    p = parameter(1.0)
    optimizer = optim.ScheduleFreeSGD([p], lr=0.0, momentum=0.9)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.5 * step
        p.grad = torch.ones_like(p)
        optimizer.step()
        if step == 0:
            assert p.item() == 1.0
        if step == 1:
            assert (p.item(), optimizer.state[p]["z"].item()) == (0.5, 0.5)
    weights, z = np.array([0.25, 1.0, 2.25]), np.array([0.5, -0.5, -2.0])
    with optimizer.evaluating():
        assert p.item() == pytest.approx((weights * z).sum() / weights.sum(), rel=1e-12)


def test_radam_stands_still_until_the_rectification_and_counts_nothing() -> None:
    p = parameter(1.0)
    optimizer = optim.ScheduleFreeRAdam([p], lr=0.1)
    for step in range(6):
        p.grad = torch.ones_like(p)
        optimizer.step()
        kept = optimizer.state[p]
        assert (p.item() == 1.0) == (kept["weight_sum"].item() == 0.0) == (step < 4)
        assert kept["exp_avg_sq"].item() == pytest.approx(1 - 0.999 ** (step + 1))


def test_weights_go_on_growing_after_many_steps() -> None:
    """A sum in float32 would gain nothing from a weight of 1e-6 beside 64: c would stay what it is."""
    p = parameter(1.0, torch.float32)
    optimizer = optim.ScheduleFreeSGD([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["weight_sum"].fill_(64.0)
    optimizer.step()
    assert optimizer.state[p]["weight_sum"].item() == pytest.approx(64 + 1e-6, rel=1e-14)
    assert np.float32(64) + np.float32(1e-6) == np.float32(64)


# --- the two places ---------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16-kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "bfloat16-stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "float16": (torch.float16, {}),
    "complex64": (torch.complex64, {}),
    "8-bit": (torch.float32, {"state_dtype": {"exp_avg_sq": "int8"}}),
}


@pytest.mark.parametrize("kind", KINDS)
@each
def test_the_round_trip_is_exact(cls: Any, kind: str) -> None:
    """Bit for bit, in every dtype, layout and rounding, and training goes on as if nobody had looked."""
    dtype, options = KINDS[kind]
    if kind == "8-bit" and cls is optim.ScheduleFreeSGD:
        options = {}
    layouts = ("contiguous", "transposed", "0-d", "empty", "gaps")
    params, undisturbed = parameters(layouts, dtype), parameters(layouts, dtype)
    backend = "auto" if kind == "float32" else "reference"
    optimizer, other = (made(cls, of, backend=backend, **options) for of in (params, undisturbed))
    addresses = [p.data_ptr() for p in params]
    for step in range(12):
        drive(optimizer, params, [step], missing=True)
        drive(other, undisturbed, [step], missing=True)
        y = values(params)
        optimizer.eval()
        if step == 11:
            moved = [not torch.equal(p, q) for p, q in zip(params, y, strict=True)]
            moved[2] |= dtype in (torch.bfloat16, torch.float16)  # one number: x and y may round to the same
            assert moved == [True, True, True, False, True]
        optimizer.train()
        assert_equal(values(params), y)
        assert_equal(snapshot(optimizer)["state"], snapshot(other)["state"])
    assert [p.data_ptr() for p in params] == addresses
    assert_equal(values(params), values(undisturbed))


@each
def test_x_is_what_y_and_z_make_it(cls: Any) -> None:
    params = parameters()
    optimizer = made(cls, params)
    drive(optimizer, params, 12)
    y, z = values(params), [optimizer.state[p]["z"] for p in params]
    optimizer.eval()
    for p, q, kept in zip(params, y, z, strict=True):
        torch.testing.assert_close(0.1 * kept + 0.9 * p.detach(), q, rtol=1e-14, atol=1e-15)
        assert not torch.equal(p, q)


@each
def test_modes_are_idempotent_and_those_not_stepped_stay(cls: Any) -> None:
    params = parameters()
    optimizer = made(cls, params)
    start = values(params)
    assert optimizer.training
    optimizer.eval()
    assert not optimizer.training
    assert_equal(values(params), start)
    optimizer.train()
    for step in range(9):
        params[0].grad = gradient(params[0], step)
        optimizer.step()
    optimizer.train()
    y = values(params)
    optimizer.eval()
    x = values(params)
    optimizer.eval()
    assert_equal(values(params), x)
    assert not torch.equal(x[0], y[0])
    assert_equal(x[1:], y[1:])
    assert [list(optimizer.state.get(p, {})) for p in params[1:]] == [[], []]
    optimizer.train()
    optimizer.train()
    assert_equal(values(params), y)
    assert "y" not in optimizer.state[params[0]]


@each
def test_a_step_in_eval_mode_is_an_error(cls: Any) -> None:
    params = parameters()
    optimizer = made(cls, params)
    drive(optimizer, params, 2)
    optimizer.eval()
    before = snapshot(optimizer)
    message = rf"^{cls.__name__}: a step in eval mode, .*; call optimizer\.train\(\) before the forward pass$"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    with pytest.raises(RuntimeError, match=message):
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert_equal(snapshot(optimizer), before)
    optimizer.train()
    drive(optimizer, params, [2])


@each
def test_evaluating_restores_the_mode_also_after_an_error(cls: Any) -> None:
    params = parameters()
    optimizer = made(cls, params)
    drive(optimizer, params, 8)
    y = values(params)
    with optimizer.evaluating():
        x = values(params)
        with optimizer.evaluating():
            pass
        assert not optimizer.training
    with pytest.raises(KeyError), optimizer.evaluating():
        raise KeyError(optimizer.training)
    assert optimizer.training
    assert_equal(values(params), y)
    optimizer.eval()
    with optimizer.evaluating():
        assert_equal(values(params), x)
    assert not optimizer.training


@each
def test_memory_that_is_missing_leaves_all_as_it_was(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle: no parameter is at x while others are at y."""
    params = parameters()
    optimizer = made(cls, params)
    drive(optimizer, params, 8)
    before, calls, x_of = snapshot(optimizer), iter(range(9)), cls._x_of

    def fails(self: Any, *args: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise MemoryError
        return x_of(self, *args)

    monkeypatch.setattr(cls, "_x_of", fails)
    with pytest.raises(MemoryError):
        optimizer.eval()
    assert_equal(snapshot(optimizer), before)
    assert optimizer.training


@each
def test_modes_inside_of_inference_mode(cls: Any) -> None:
    """Evaluations often run there; what they leave behind must be good for training."""
    params = parameters()
    optimizer = made(cls, params)
    drive(optimizer, params, 8)
    y = values(params)
    with torch.inference_mode():
        optimizer.eval()
    optimizer.train()
    assert_equal(values(params), y)
    drive(optimizer, params, [8])
    sum(p.square().sum() for p in params).backward()  # type: ignore[union-attr]


@each
def test_groups_that_join_have_the_mode_of_the_others(cls: Any) -> None:
    """Else eval() would leave out the new ones, and a step would find two modes."""
    params = parameters(("contiguous", "transposed"))
    optimizer = made(cls, params[:1])
    drive(optimizer, params[:1], 8)
    optimizer.eval()
    optimizer.add_param_group({"params": params[1:], "train_mode": True})
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
    optimizer.train()
    assert optimizer.training
    drive(optimizer, params, range(8, 16))
    y = values(params)
    optimizer.eval()
    assert not any(map(torch.equal, values(params), y))
    assert all(not torch.equal(p, optimizer.state[p]["z"]) for p in params)


@pytest.mark.parametrize(
    ("dtype", "rounding", "bound"),
    [(torch.float64, "nearest", 4e-15), (torch.bfloat16, "nearest", 2**-8), (torch.bfloat16, "kahan", 1e-5)],
)
def test_what_is_written_in_eval_mode_is_a_new_x(dtype: torch.dtype, rounding: Any, bound: float) -> None:
    """The other parameters go back to the bit; this one to the y that belongs to what was written."""
    params = parameters(("contiguous", "transposed"), dtype)
    optimizer = optim.ScheduleFreeSGD(params, lr=0.1, rounding=rounding, backend="reference")
    drive(optimizer, params, 6)
    y = values(params)
    optimizer.eval()
    with torch.no_grad():
        params[0].clamp_(-0.5, 0.5)
    written = params[0].detach().to(torch.float64, copy=True)
    optimizer.train()
    assert_equal(params[1].detach(), y[1])
    kept = optimizer.state[params[0]]
    value = params[0].detach().double() + (kept["compensation"].double() if rounding == "kahan" else 0)
    error = (value - (0.9 * written + 0.1 * kept["z"].double())).abs().max().item()
    assert error <= bound
    optimizer.eval()
    assert (params[0].detach().double() - written).abs().max() <= (4e-15 if dtype == torch.float64 else 2**-7)


def test_a_rounding_that_keeps_what_is_cut_off_is_part_of_x() -> None:
    """With Kahan's sum y has twice the bits of the parameter, and x is made of all of them."""
    p = nn.Parameter(torch.full((1000,), 1.0, dtype=torch.bfloat16))
    q = nn.Parameter(torch.full((1000,), 1.0))
    narrow = optim.ScheduleFreeSGD([p], lr=1e-4, rounding="kahan")
    exact = optim.ScheduleFreeSGD([q], lr=1e-4)
    for step in range(100):
        g = randn(1000, seed=step).bfloat16().abs()
        p.grad, q.grad = g, g.float()
        narrow.step()
        exact.step()
    exact.eval()
    narrow.eval()
    assert (p.float() - q).abs().max() <= 2**-9 * 1.01  # one rounding of x to bfloat16
    assert q.max() < 1 - 2**-9  # nearest rounding would have stayed at 1


# --- saving and loading -----------------------------------------------------------------------------------------------


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_the_mode_is_kept_and_training_goes_on_with_the_same_bits(
    cls: Any, dtype: torch.dtype, mode: str, how: str
) -> None:
    whole = parameters(dtype=dtype)
    options = {"backend": "auto" if dtype == torch.float32 else "reference"}
    a = made(cls, whole, **options)
    drive(a, whole, 8)
    if mode == "eval":
        a.eval()
    if how == "state_dict":
        resumed = [nn.Parameter(p.detach().clone()) for p in whole]
        b = made(cls, resumed, **options)
        b.load_state_dict(through_a_file(a.state_dict()))
    elif how == "deepcopy":
        b, resumed = copy.deepcopy((a, whole))
    else:
        b, resumed = pickle.loads(pickle.dumps((a, whole)))
    assert b.training == (mode == "train")
    assert_equal(b.state_dict(), a.state_dict())
    for optimizer, params in ((a, whole), (b, resumed)):
        optimizer.train()
        drive(optimizer, params, range(8, 12))
    assert_equal(values(resumed), values(whole))
    assert_equal(b.state_dict(), a.state_dict())


def model_of(cls: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, made(cls, model.named_parameters())


def train(model: nn.Module, optimizer: Any, steps: Sequence[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = randn(16, 3, dtype=torch.float32, seed=step)
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


@each
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_checkpoints_of_a_run(cls: Any, mode: str, tmp_path: Path) -> None:
    """Saved in the middle of an evaluation, a file holds x for who wants the model, and all to go on exactly."""
    model, optimizer = model_of(cls)
    train(model, optimizer, range(8))
    if mode == "eval":
        optimizer.eval()
    file = schuss.save_checkpoint(tmp_path / "run.schuss", model=model, optimizer=optimizer)
    weights = values([*model.parameters()])
    other, resumed = model_of(cls)
    train(other, resumed, range(20, 23))
    resumed.eval()
    schuss.load_checkpoint(file, model=other, optimizer=resumed)
    assert_equal(values([*other.parameters()]), weights)
    assert resumed.training == (mode == "train")
    for one, of in ((model, optimizer), (other, resumed)):
        of.train()
        train(one, of, range(8, 11))
    assert_equal(values([*other.parameters()]), values([*model.parameters()]))


def test_a_state_without_y_is_at_x() -> None:
    """What other code saves in eval mode; y follows from x and z to rounding."""
    params = parameters()
    optimizer = optim.ScheduleFreeSGD(params, lr=0.1)
    drive(optimizer, params, 8)
    y = values(params)
    optimizer.eval()
    saved = optimizer.state_dict()
    saved["state"] = {i: {k: v for k, v in kept.items() if k != "y"} for i, kept in saved["state"].items()}
    optimizer.load_state_dict(saved)
    optimizer.train()
    for p, q in zip(params, y, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-15, atol=1e-15)


@each
def test_checkpoints_of_the_authors_package_go_on(cls: Any) -> None:
    """They count per group, and leave parameters at x; loaded as they are, the average would begin anew."""
    params = parameters()
    optimizer = made(cls, params)
    drive(optimizer, params, 8)
    copied = [nn.Parameter(p.detach().clone()) for p in params]
    states = ("z", "exp_avg_sq")
    saved = copy.deepcopy(optimizer.state_dict())
    kept = saved["state"][0]
    [group] = saved["param_groups"]
    for name in ("maximize", "capturable", "differentiable"):
        group.pop(name, None)
    group |= {"k": 8, "weight_sum": kept["weight_sum"].item(), "lr_max": kept["lr_max"].item(), "scheduled_lr": 0.1}
    group |= {"train_mode": False, "foreach": True}
    saved["state"] = {i: {k: v for k, v in of.items() if k in states} for i, of in saved["state"].items()}
    with optimizer.evaluating(), torch.no_grad():
        for p, q in zip(copied, params, strict=True):
            p.copy_(q)
    other = made(cls, copied)
    other.load_state_dict(saved)
    assert not other.training
    assert not {"k", "weight_sum", "lr_max", "scheduled_lr"} & set(other.param_groups[0])
    other.train()
    drive(optimizer, params, range(8, 12))
    drive(other, copied, range(8, 12))
    assert {e.route.backend for e in other.plan().entries} == {"numba"}
    for p, q in zip(copied, params, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-13, atol=1e-14)


# --- with all else ----------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """Predicts its weight, and takes down where it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([1.0]))
        self.seen: list[tuple[bool, float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, self.weight.item()))
        return self.weight * x + self.bias


def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for seed in range(6):
        x = randn(4, dtype=torch.float32, seed=seed)
        yield x, 2 * x


@pytest.mark.parametrize("combined", [False, True])
def test_fit_trains_at_y_and_evaluates_at_x(combined: bool) -> None:
    """And ends at y, from where it could go on; also for one that was given in eval mode, and inside of another."""
    runs = []
    for evaluates in (False, True):
        model = Line()
        optimizer = optim.ScheduleFreeSGD([model.weight], lr=0.5)
        outer = schuss.Combined([optimizer, optim.SGD([model.bias], lr=0.1)]) if combined else optimizer
        optimizer.eval()
        x: list[float] = []

        def evaluate(model: nn.Module, optimizer: Any = optimizer, x: list[float] = x) -> float:
            assert not optimizer.training
            x.append(model.weight.item())
            return model.weight.item()

        options: dict[str, Any] = {"evaluate": evaluate, "evaluate_every": 2} if evaluates else {}
        schuss.fit(model, [*pairs()], nn.functional.mse_loss, outer, epochs=1, progress=False, **options)
        assert optimizer.training
        runs.append([w for training, w in model.seen if training] + [model.weight.item()])
        if evaluates:
            assert len(x) == 3
            with optimizer.evaluating():
                assert x[-1] == model.weight.item() != runs[-1][-1]
    assert runs[0] == runs[1]


@each
def test_lookahead_would_move_y_away_from_its_average(cls: Any) -> None:
    with pytest.raises(TypeError, match=rf"^Lookahead: {cls.__name__} "):
        Lookahead(cls([parameter(1.0)]))


@each
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 0.9}, r"ema_decay cannot be used: it would average y, .*; leave it out$"),
        ({"state_dtype": "int8"}, r"state_dtype of 'z' must be float32, .*; got torch\.int8"),
        ({"state_dtype": {"z": "bfloat16"}}, r"state_dtype of 'z' must be float32, .*; got torch\.bfloat16"),
    ],
    ids=str,
)
def test_options_that_have_no_meaning(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: {message}"):
        cls([parameter(1.0)], **options)


def test_the_message_about_z_says_what_goes() -> None:
    with pytest.raises(ValueError, match=r"pass state_dtype=\{'exp_avg_sq': 'int8'\}$"):
        optim.ScheduleFreeAdamW([parameter(1.0)], state_dtype="int8")
    optim.ScheduleFreeAdamW([parameter(1.0)], state_dtype={"exp_avg_sq": "int8", "z": "float32"})


def test_a_float32_step_is_one_pass() -> None:
    """p, z and v read and written, g read: 28 bytes of each element, as AdamW."""
    params = [nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]
    optimizer = optim.ScheduleFreeAdamW(params)
    drive(optimizer, params, 1)
    plan = optimizer.plan()
    assert {e.route.backend for e in plan.entries} == {"numba"}
    assert plan.traffic_bytes == 28 * 3 * 64 * 64


def test_z_of_a_bfloat16_parameter_is_float32() -> None:
    """Steps of 1e-4 beside 1 are lost in bfloat16."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = optim.ScheduleFreeSGD([p], lr=1e-4)
    for _ in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["z"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[p]["z"], torch.full((3,), 1 - 1e-3), rtol=1e-6, atol=0)
