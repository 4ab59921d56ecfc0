"""Lookahead against its paper's recursion, and the contract of wrappers."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import wrapper_contract
from cases import assert_equal, drive, parameters, randn, set_gradients
from schuss import optim
from schuss.schedules import Schedule, linear
from schuss.wrappers import Lookahead
from wrapper_contract import Lazy, Make, WrapperContract, copies, through_a_file, values

INNERS = {name: make for name, make in wrapper_contract.INNERS.items() if name != "SAM"}
inners = pytest.mark.parametrize("make", INNERS.values(), ids=INNERS.keys())


class TestContract(WrapperContract):
    """What holds for every wrapper."""

    cls = checked = Lookahead
    settings = {"k": 3, "alpha": 0.7}


class Paper:
    """Algorithm 1 round an optimizer, written out."""

    def __init__(self, inner: torch.optim.Optimizer, params: Sequence[torch.Tensor], k: int, alpha: float) -> None:
        self.inner, self.params, self.k, self.alpha = inner, params, k, alpha
        self.slow = [p.detach().clone() for p in params]
        self.i = 0

    def step(self) -> None:
        self.inner.step()
        self.i += 1
        if self.i % self.k == 0:
            with torch.no_grad():
                for phi, theta in zip(self.slow, self.params, strict=True):
                    phi.copy_(torch.lerp(phi, theta, self.alpha))
                    theta.copy_(phi)


def slow_of(optimizer: Lookahead, params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [optimizer.state[p]["lookahead_slow"] for p in params]


# --- the algorithm ----------------------------------------------------------------------------------------------------


@inners
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (3, 0.8), (5, 0.5)])
def test_is_the_papers_recursion_to_the_last_bit(make: Make, k: int, alpha: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, paper = Lookahead(make(ours), k, alpha), Paper(make(theirs), theirs, k, alpha)
    depth = "lookahead2_slow" if isinstance(optimizer.inner, Lookahead) else "lookahead_slow"
    for step in range(11):
        set_gradients(ours, step, missing=True)
        set_gradients(theirs, step, missing=True)
        optimizer.step()
        paper.step()
        assert_equal(values(ours), values(theirs), f"fast, step {step}")
        assert_equal([optimizer.state[p][depth] for p in ours], paper.slow, f"slow, step {step}")


def test_the_formula_by_hand() -> None:
    """f = p²/2 from p = 1 with lr 0.1: 0.9 and 0.81, halfway from 1 to 0.81 is 0.905; and so on with (0.905)²."""
    p = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = Lookahead(optim.SGD([p], lr=0.1), k=2, alpha=0.5)
    seen = []
    for _ in range(4):
        p.grad = p.detach().clone()
        optimizer.step()
        seen.append(p.item())
    assert seen == pytest.approx([0.9, 0.905, 0.8145, 0.905**2], rel=1e-15)


@pytest.mark.parametrize(
    ("lr", "a", "sigma", "k", "alpha", "ratio"),
    [
        (0.5, 1, 1, 5, 0.5, 0.34021),
        (0.1, 1, 1, 5, 0.5, 0.44297),
        (0.5, 1, 1, 10, 0.8, 0.66688),
        (0.3, 2, 1.5, 5, 0.5, 0.3356),
    ],
)
def test_stationary_variance_on_the_noisy_quadratic(
    lr: float, a: float, sigma: float, k: int, alpha: float, ratio: float
) -> None:
    """Zhang et al., proposition 2: SGD on a(x - c)²/2 with c ~ N(0, σ²); 2e5 chains, so 0.3 % of noise."""
    p = torch.nn.Parameter(torch.zeros(200_000))
    optimizer = Lookahead(optim.SGD([p], lr=lr), k, alpha)
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty_like(p)
    shrink = (1 - lr * a) ** k
    rounds = int(4 / -torch.tensor(1 - alpha + alpha * shrink).log().item()) + 1  # what is left of the start: e^-8
    for _ in range(rounds * k):
        p.grad = a * (p.detach() - noise.normal_(generator=generator).mul_(sigma))
        optimizer.step()
    inner = lr**2 * a**2 * sigma**2 / (1 - (1 - lr * a) ** 2)
    formula = alpha**2 * (1 - shrink**2)
    formula /= formula + 2 * alpha * (1 - alpha) * (1 - shrink)
    assert formula == pytest.approx(ratio, abs=2e-5)
    assert p.detach().var().item() == pytest.approx(ratio * inner, rel=0.015)


@inners
def test_alpha_of_one_is_the_inner_optimizer(make: Make) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, inner = Lookahead(make(ours), k=2, alpha=1.0), make(theirs)
    for step in range(7):
        drive(optimizer, ours, [step])
        drive(inner, theirs, [step])
        assert_equal(values(ours), values(theirs), f"step {step}")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alpha_of_one_is_the_inner_optimizer_in_half_types(rounding: Any, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    inner = optim.AdamW(theirs, lr=0.05, rounding=rounding)
    optimizer = Lookahead(optim.AdamW(ours, lr=0.05, rounding=rounding), k=2, alpha=1.0)
    for step in range(9):
        drive(optimizer, ours, [step])
        drive(inner, theirs, [step])
        assert_equal(values(ours), values(theirs), f"step {step}")


@inners
def test_after_a_synchronization_fast_is_slow_and_between_slow_stays(make: Make) -> None:
    params = parameters()
    optimizer = Lookahead(make(params), k=3)
    key = optimizer._key("slow")
    before = values(params)
    for step in range(9):
        drive(optimizer, params, [step])
        slow = [optimizer.state[p][key] for p in params]
        if step % 3 == 2:
            assert_equal(values(params), slow)
            before = [s.clone() for s in slow]
        assert_equal(slow, before)


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 6),
    alpha=st.floats(0, 1),
    present=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=12),
    name=st.sampled_from(["SGD", "torch.AdamW", "Lazy"]),
)
def test_any_k_alpha_and_missing_gradients(k: int, alpha: float, present: list[list[bool]], name: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, paper = Lookahead(INNERS[name](ours), k, alpha), Paper(INNERS[name](theirs), theirs, k, alpha)
    for step, there in enumerate(present):
        for params in (ours, theirs):
            set_gradients(params, step)
            for p, has in zip(params, there, strict=True):
                p.grad = p.grad if has else None
        optimizer.step()
        paper.step()
    assert_equal(values(ours), values(theirs))


def test_what_has_moved_is_synchronized_without_a_gradient_too() -> None:
    """Whoever leaves out parameters without a gradient at the k-th step, leaves them with fast weights."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Lookahead(optim.SGD([p], lr=1.0), k=2)
    p.grad = torch.ones(3)
    optimizer.step()
    p.grad = None
    optimizer.step()
    assert p.tolist() == [0.5] * 3


# --- where the slow weights begin -------------------------------------------------------------------------------------


@inners
def test_parameters_may_be_loaded_before_the_first_step(make: Make) -> None:
    params, fresh = parameters(), parameters(seed=5)
    optimizer = Lookahead(make(params), k=1, alpha=0.0)
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            p.copy_(q)
    drive(optimizer, params, 1)
    assert_equal(values(params), values(fresh))


@inners
def test_parameters_may_be_loaded_before_the_first_checkpoint(make: Make) -> None:
    params, fresh = parameters(), parameters(seed=5)
    optimizer = Lookahead(make(params), k=1, alpha=0.0)
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            p.copy_(q)
    saved = through_a_file(optimizer.state_dict())
    resumed = Lookahead(make(fresh), k=1, alpha=0.0)
    resumed.load_state_dict(saved)
    drive(resumed, fresh, 1)
    assert_equal(values(fresh), values(params))


def test_a_first_step_that_fails_or_is_skipped_begins_nothing() -> None:
    params, fresh = parameters(), parameters(seed=5)
    optimizer = Lookahead(optim.SGD(params, lr=0.1), k=1, alpha=0.0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    optimizer.found_inf = torch.ones(())
    drive(optimizer, params, 1)
    del optimizer.found_inf
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            p.copy_(q)
    drive(optimizer, params, 1)
    assert_equal(values(params), values(fresh))


@inners
def test_the_first_synchronization_goes_back(make: Make) -> None:
    """Who makes slow weights at the first synchronization, skips it."""
    params = parameters()
    start = values(params)
    optimizer = Lookahead(make(params), k=2, alpha=0.0)
    drive(optimizer, params, 2)
    assert_equal(values(params), start)


@inners
def test_wrapping_in_mid_run_starts_there(make: Make) -> None:
    params = parameters()
    inner = make(params)
    drive(inner, params, 3)
    start = values(params)
    drive(Lookahead(inner, k=2, alpha=0.0), params, [3, 4])
    assert_equal(values(params), start)


def test_wrapping_anew_forgets_the_wrapper_before() -> None:
    params = parameters()
    inner = optim.SGD(params, lr=0.1)
    first = Lookahead(inner, k=5)
    drive(first, params, 2)
    inner.load_state_dict(first.state_dict())
    second = Lookahead(inner, k=2)
    assert {g["lookahead_k"] for g in inner.param_groups} == {2}
    assert_equal([kept["lookahead_slow"] for kept in second.state_dict()["state"].values()], values(params))
    drive(second, params, 2)
    assert_equal(values(params), slow_of(second, params))


@pytest.mark.parametrize("through_inner", [False, True], ids=["wrapper", "inner"])
@inners
def test_a_group_added_between_synchronizations(make: Make, through_inner: bool) -> None:
    """Its slow weights are its value then, and it is synchronized with the others."""
    params, late = parameters(), parameters(("contiguous",), seed=9)
    optimizer = Lookahead(make(params), k=4, alpha=0.0)
    drive(optimizer, params, 2)
    (optimizer.inner if through_inner else optimizer).add_param_group({"params": late})
    start = values(late)
    drive(optimizer, [*params, *late], [2])
    assert not torch.equal(late[0], start[0])
    drive(optimizer, [*params, *late], [3])
    assert_equal(values(late), start)
    assert optimizer.param_groups is optimizer.inner.param_groups


def test_a_parameter_exchanged_in_its_group_gets_slow_weights() -> None:
    params = parameters()
    optimizer = Lookahead(optim.SGD(params, lr=0.1), k=2)
    drive(optimizer, params, 1)
    params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(randn(5, 7, seed=3))
    drive(optimizer, params, [1, 2, 3])
    assert_equal(values(params), slow_of(optimizer, params))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@inners
def test_state_dict_is_torchs_layout(make: Make) -> None:
    params = parameters()
    optimizer = Lookahead(make(params), k=2)
    drive(optimizer, params, 3)
    saved = optimizer.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert set(saved["state"]) == {0, 1, 2}
    assert all(type(kept) is dict for kept in saved["state"].values())
    assert saved["param_groups"][0]["params"] == [0, 1, 2]
    key = optimizer._prefix
    assert all(kept[key + "step"].item() == 1 for kept in saved["state"].values())
    assert (saved["param_groups"][0][key + "k"], saved["param_groups"][0][key + "alpha"]) == (2, 0.5)
    inner = optimizer.inner.state_dict()
    for index, kept in inner["state"].items():
        assert_equal({k: saved["state"][index][k] for k in kept}, kept)
    assert not any(k.startswith(key) for kept in inner["state"].values() for k in kept)


def test_hyperparameters_are_loaded_as_torch_loads_them() -> None:
    params = parameters()
    source = Lookahead(optim.SGD(params, lr=0.1), k=4, alpha=0.25)
    drive(source, params, 1)
    target = Lookahead(optim.SGD(parameters(), lr=0.3))
    target.load_state_dict(source.state_dict())
    assert {key: target.param_groups[0][key] for key in ("lr", "lookahead_k", "lookahead_alpha")} == {
        "lr": 0.1, "lookahead_k": 4, "lookahead_alpha": 0.25,
    }  # fmt: skip


@inners
def test_the_inner_optimizers_checkpoint_starts_lookahead_anew(make: Make) -> None:
    """The inner state goes on; slow weights begin where the parameters are at the next step."""
    params = parameters()
    inner = make(params)
    drive(inner, params, 3)
    ours, theirs = copies(params), copies(params)
    optimizer, continued = Lookahead(make(ours), k=2), make(theirs)
    drive(optimizer, ours, [7])  # to have something to forget
    with torch.no_grad():
        for p, q in zip(ours, params, strict=True):
            p.copy_(q)
    optimizer.load_state_dict(through_a_file(inner.state_dict()))
    assert_equal(optimizer.state_dict()["state"], inner.state_dict()["state"])
    continued.load_state_dict(through_a_file(inner.state_dict()))
    paper = Paper(continued, theirs, 2, 0.5)
    for step in range(3, 9):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        paper.step()
        assert_equal(values(ours), values(theirs), f"step {step}")


def test_names_on_one_side_only_may_be_left_out() -> None:
    there = {name: torch.nn.Parameter(randn(n, seed=n)) for name, n in (("a", 2), ("b", 3))}
    here = {name: torch.nn.Parameter(randn(n, seed=9)) for name, n in (("a", 2), ("c", 4))}
    source, target = (Lookahead(optim.SGD(list(p.items()), lr=0.1), k=4) for p in (there, here))
    for p in (*there.values(), *here.values()):
        p.grad = torch.ones_like(p)
    for _ in range(2):
        source.step()
    target.step()
    kept = target.state[here["c"]]["lookahead_slow"].clone()
    with pytest.raises(ValueError, match="parameter names do not match"):
        target.load_state_dict(source.state_dict())
    with pytest.warns(UserWarning, match="loaded only what has the same name"):
        target.load_state_dict(source.state_dict(), strict=False)
    assert_equal(target.state[here["a"]]["lookahead_slow"], source.state[there["a"]]["lookahead_slow"])
    assert_equal(target.state[here["c"]]["lookahead_slow"], kept)
    assert target.state[here["c"]]["lookahead_step"].item() == 2


def test_slow_weights_of_another_shape_are_an_error() -> None:
    source = Lookahead(optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1))
    source.param_groups[0]["params"][0].grad = torch.ones(3)
    source.step()
    target = Lookahead(optim.SGD([torch.nn.Parameter(torch.ones(4))], lr=0.1))
    with pytest.raises(ValueError, match=r"Lookahead: 'lookahead_slow' of parameter 0 has the shape \(3,\).*\(4,\)"):
        target.load_state_dict(source.state_dict())


@inners
def test_loaded_slow_weights_share_no_memory_with_their_source(make: Make) -> None:
    params = parameters()
    source = Lookahead(make(params), k=2)
    drive(source, params, 1)
    target = Lookahead(make(copies(params)), k=2)
    saved = source.state_dict()
    target.load_state_dict(saved)
    before = copy.deepcopy(target.state_dict()["state"])
    for kept in saved["state"].values():
        kept[source._key("slow")].zero_()
        kept[source._key("step")].fill_(7)
    for index, kept in target.state_dict()["state"].items():
        for key in ("slow", "step"):
            assert_equal(kept[source._key(key)], before[index][source._key(key)])


# --- torch's contract -------------------------------------------------------------------------------------------------


def test_alpha_is_a_hyperparameter_of_each_group_and_may_follow_a_schedule() -> None:
    a, b = parameters(("contiguous",)), parameters(("0-d",))
    optimizer = Lookahead(optim.SGD([{"params": a}, {"params": b}], lr=0.1), k=1, alpha=1.0)
    optimizer.param_groups[1]["lookahead_alpha"] = 0.0
    optimizer.add_param_group({"params": (c := parameters(("one element",))), "lookahead_alpha": 0.5})
    start = values([*a, *b, *c])
    drive(optimizer, [*a, *b, *c], 1)
    fast = [s - 0.1 * p.grad for s, p in zip(start, [*a, *b, *c], strict=True)]
    assert_equal(values([*a, *b, *c]), [fast[0], start[1], torch.lerp(start[2], fast[2], 0.5)])
    schedule = Schedule(optimizer, lookahead_alpha=linear(4))
    schedule.step()
    assert optimizer.param_groups[0]["lookahead_alpha"] == pytest.approx(0.75)


def test_k_may_be_changed_while_running() -> None:
    params = parameters()
    optimizer = Lookahead(optim.SGD(params, lr=0.1), k=5)
    drive(optimizer, params, 3)
    optimizer.param_groups[0]["lookahead_k"] = 2
    drive(optimizer, params, [3])
    assert_equal(values(params), slow_of(optimizer, params))
    assert optimizer.state[params[0]]["lookahead_step"].item() == 0


def test_a_closure_that_raises_does_not_count() -> None:
    params = parameters()
    optimizer = Lookahead(optim.SGD(params, lr=0.1), k=2)
    drive(optimizer, params, 1)
    before = values(params)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_equal(values(params), before)
    assert optimizer.state[params[0]]["lookahead_step"].item() == 1


def test_lbfgs_calls_the_closure_as_often_as_it_wants() -> None:
    def build() -> tuple[torch.nn.Parameter, torch.optim.Optimizer, Callable[[], Any], list[int]]:
        p, calls = torch.nn.Parameter(randn(6)), [0]
        inner = torch.optim.LBFGS([p], lr=0.3, max_iter=4)

        def closure() -> Any:
            calls[0] += 1
            p.grad = None
            loss = ((p - 1) ** 4).sum()
            loss.backward()
            return loss.detach()

        return p, inner, closure, calls

    p, inner, closure, calls = build()
    optimizer = Lookahead(inner, k=2)
    q, other, their_closure, their_calls = build()
    slow = q.detach().clone()
    for step in range(6):
        assert optimizer.step(closure) == other.step(their_closure)
        if step % 2:
            slow.lerp_(q.detach(), 0.5)
            with torch.no_grad():
                q.copy_(slow)
        assert_equal(p.detach(), q.detach())
    assert calls == their_calls
    assert calls[0] > 6
    resumed = Lookahead(torch.optim.LBFGS([torch.nn.Parameter(p.detach().clone())]), k=2)
    resumed.load_state_dict(optimizer.state_dict())
    assert_equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_capturing_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would repeat one step, without counting."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer = Lookahead(Lazy(parameters()))
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(RuntimeError, match="cannot be captured"):
        optimizer.step()


def test_steps_that_nonfinite_skips_do_not_count() -> None:
    params = parameters()
    optimizer = Lookahead(Lookahead(optim.SGD(params, lr=0.1, max_norm=1.0, nonfinite="skip"), k=3), k=2)
    drive(optimizer, params, 1)
    params[0].grad.fill_(float("nan"))
    before = values(params)
    optimizer.step()
    assert_equal(values(params), before)
    assert optimizer.skipped_steps == optimizer.inner.skipped_steps == 1
    kept = optimizer.state[params[0]]
    assert (kept["lookahead_step"].item(), kept["lookahead2_step"].item()) == (1, 1)
    assert optimizer.last_grad_norm is optimizer.inner.inner.last_grad_norm is not None


@inners
def test_state_is_live_and_shows_both(make: Make) -> None:
    params = parameters()
    optimizer = Lookahead(make(params), k=3)
    if not optimizer.inner.state:
        assert not optimizer.state
        assert len(optimizer.state) == 0
    drive(optimizer, params, 1)
    assert set(optimizer.state) == set(params)
    slow, key = optimizer.state[params[0]][optimizer._key("slow")], optimizer._key("step")
    for p in params:
        assert p in optimizer.state
        for name, value in optimizer.inner.state[p].items():
            assert optimizer.state[p][name] is value
    optimizer.state[params[0]]["note"] = 1
    assert optimizer.inner.state[params[0]].pop("note") == 1
    optimizer.state[params[0]][key].fill_(2)  # counts at the next step
    drive(optimizer, params, [1])
    assert optimizer.state[params[0]][key].item() == 0
    assert_equal(params[0].detach(), slow)


# --- dtypes -----------------------------------------------------------------------------------------------------------


def ones(dtype: torch.dtype, n: int = 1) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(n, dtype=dtype))


def test_slow_weights_of_half_types_are_float32_and_lose_nothing() -> None:
    """Steps of one bfloat16 below 1, 2^-8, halved: slow weights go down by 2^-9 each time, parameters round them."""
    p = ones(torch.bfloat16)
    optimizer = Lookahead(torch.optim.SGD([p], lr=2.0**-8), k=1)
    for step in range(1, 40):
        p.grad = torch.ones_like(p)
        optimizer.step()
        slow = optimizer.state[p]["lookahead_slow"]
        assert slow.dtype == torch.float32
        assert slow.item() == 1 - step * 2.0**-9
        assert p.item() == slow.bfloat16().item()


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_lookahead_keeps_what_rounding_saves(rounding: Any) -> None:
    """500 steps of 1e-4 that each vanish in bfloat16: halved by alpha they are 0.025."""
    p = ones(torch.bfloat16, 4096)
    optimizer = Lookahead(optim.SGD([p], lr=1e-4, rounding=rounding), k=5)
    for _ in range(500):
        p.grad = torch.ones_like(p)
        optimizer.step()
    slow = optimizer.state[p]["lookahead_slow"]
    assert slow.mean().item() == pytest.approx(0.975, abs=3e-4)
    assert_equal(p.detach(), slow.bfloat16())
    if rounding == "kahan":
        value = p.detach().float() + optimizer.state[p]["compensation"].float()
        torch.testing.assert_close(value, slow, rtol=2**-16, atol=0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer = Lookahead(optim.AdamW(ours, lr=0.05), k=2)
    paper = Paper(optim.AdamW(theirs, lr=0.05), theirs, 2, 0.5)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        paper.step()
    assert_equal(values(ours), values(theirs))


@pytest.mark.parametrize("cls", [torch.optim.SparseAdam, optim.SGD, optim.Adagrad])
def test_sparse_gradients(cls: Any) -> None:
    """Rows without a gradient are synchronized, too: they have moved in the k steps, or are where they were."""
    embeddings = [torch.nn.Embedding(6, 2, sparse=True) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    a, b = (e.weight for e in embeddings)
    optimizer, paper = Lookahead(cls([a], lr=0.1), k=2), Paper(cls([b], lr=0.1), [b], 2, 0.5)
    for step in range(5):
        for e, o in zip(embeddings, (optimizer, paper), strict=True):
            e.weight.grad = None
            e(torch.tensor([step, step, 0])).pow(2).sum().backward()
            o.step()
    assert_equal(a.detach(), b.detach())


class Marked(torch.nn.Parameter):
    """A subclass, as sharded tensors are."""


def test_tensor_subclasses_one_after_the_other() -> None:
    ours, theirs = [Marked(randn(3))], [torch.nn.Parameter(randn(3))]
    a, b = (Lookahead(torch.optim.SGD(p, lr=0.1), k=2) for p in (ours, theirs))
    drive(a, ours, 5)
    drive(b, theirs, 5)
    assert_equal(values(ours), values(theirs))


# --- the inner optimizer's momentum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pullback", ["reset", "interpolate"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "torch.AdamW"])
def test_pullback(name: str, pullback: Any) -> None:
    """Momentum becomes 0, or is treated as the weights are, from the 0 where it began."""
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    ours, theirs = parameters(), parameters()
    optimizer = Lookahead(INNERS[name](ours), k=2, alpha=0.25, pullback=pullback)
    inner = INNERS[name](theirs)
    paper = Paper(inner, theirs, 2, 0.25)
    momenta = [torch.zeros_like(p) for p in theirs]
    for step in range(7):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        paper.step()
        if step % 2:
            for p, m in zip(theirs, momenta, strict=True):
                buffer = inner.state[p][key]
                buffer.copy_(m.lerp_(buffer, 0.25) if pullback == "interpolate" else torch.zeros_like(m))
        assert_equal(values(ours), values(theirs), f"step {step}")


@pytest.mark.parametrize("pullback", ["reset", "interpolate"])
@pytest.mark.parametrize("options", [{"state_dtype": "int8"}, {"state_dtype": "bfloat16"}], ids=str)
def test_pullback_of_state_in_fewer_bits(pullback: Any, options: Any) -> None:
    p = torch.nn.Parameter(randn(5000, dtype=torch.float32))
    optimizer = Lookahead(optim.SGD([p], lr=0.1, momentum=0.9, **options), k=1, alpha=0.5, pullback=pullback)
    p.grad = torch.linspace(-1, 1, 5000)
    optimizer.step()
    momentum = optimizer.inner.state_dict(portable=True)["state"][0]["momentum_buffer"]
    expected = 0.5 * p.grad if pullback == "interpolate" else torch.zeros(5000)
    torch.testing.assert_close(momentum.float(), expected, rtol=0, atol=0.01)
    drive(optimizer, [p], 3)


@pytest.mark.parametrize("by", ["itself", "torch.distributed"])
def test_pullback_resumes(by: str) -> None:
    def build() -> tuple[torch.nn.Module, Lookahead]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 4)
        return model, Lookahead(optim.SGD(model.parameters(), lr=0.1, momentum=0.9), k=3, pullback="interpolate")

    model, optimizer = build()
    drive(optimizer, [*model.parameters()], 4)
    twin, resumed = build()
    twin.load_state_dict(model.state_dict())
    if by == "itself":
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=flat))
        set_optimizer_state_dict(twin, resumed, saved, options=flat)
    drive(optimizer, [*model.parameters()], range(4, 10))
    drive(resumed, [*twin.parameters()], range(4, 10))
    assert_equal(values([*twin.parameters()]), values([*model.parameters()]))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=str)
def test_pullback_begins_with_the_momentum_that_there_is(options: Any) -> None:
    """Wrapped in mid-run with alpha = 0, two steps lead back to where they began, momentum included."""
    p = torch.nn.Parameter(randn(5000, dtype=torch.float32))
    inner = optim.SGD([p], lr=0.1, momentum=0.9, **options)
    drive(inner, [p], 3)
    before = copy.deepcopy(inner.state_dict(portable=True)["state"][0]), p.detach().clone()
    drive(Lookahead(inner, k=2, alpha=0.0, pullback="interpolate"), [p], [3, 4])
    after = inner.state_dict(portable=True)["state"][0], p.detach()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 if options else 0)


def test_pullback_of_no_momentum_is_an_error() -> None:
    params = parameters()
    optimizer = Lookahead(optim.SGD(params, lr=0.1), k=1, pullback="reset")
    with pytest.raises(RuntimeError, match="pullback='reset' found no momentum_buffer or exp_avg in the state of SGD"):
        drive(optimizer, params, 1)


# --- evaluating, and what schuss's optimizers have beside -------------------------------------------------------------


@inners
def test_slow_weights_in_the_place_of_the_parameters(make: Make) -> None:
    params = parameters()
    optimizer = Lookahead(make(params), k=5)
    start = values(params)
    with optimizer.slow_weights():  # there are none yet: they are the parameters
        assert_equal(values(params), start)
    drive(optimizer, params, 3)
    fast = values(params)
    with pytest.raises(ZeroDivisionError), optimizer.slow_weights():  # noqa: PT012
        assert_equal(values(params), start)
        with pytest.raises(RuntimeError, match="would be undone"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="in place already"), optimizer.slow_weights():
            pass
        assert_equal(values(params), start)
        raise ZeroDivisionError
    assert_equal(values(params), fast)
    drive(optimizer, params, [3])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(k=0), ValueError, r"^Lookahead: k must be in \[1, inf\), got 0$"),
        (dict(k=float("inf")), ValueError, r"k must be in \[1, inf\), got inf"),
        (dict(k=2.5), ValueError, r"k must be an integer in \[1, inf\), got 2\.5"),
        (dict(k="5"), TypeError, r"k must be a number in \[1, inf\), got '5'"),
        (dict(k=True), TypeError, r"k must be a number"),
        (dict(alpha=-0.1), ValueError, r"^Lookahead: alpha must be in \[0, 1\], got -0\.1$"),
        (dict(alpha=1.5), ValueError, r"alpha must be in \[0, 1\], got 1\.5"),
        (dict(alpha=float("nan")), ValueError, r"alpha must be in \[0, 1\], got nan"),
        (dict(pullback="zero"), ValueError, r"pullback must be one of none, reset, interpolate, got 'zero'"),
    ],
    ids=str,
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    inner = optim.SGD(parameters())
    with pytest.raises(error, match=message):
        Lookahead(inner, **arguments)
    assert "lookahead_k" not in inner.param_groups[0]


def test_groups_out_of_bounds_are_an_error() -> None:
    optimizer = Lookahead(optim.SGD(parameters()))
    late = {"params": parameters(("0-d",))}
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        optimizer.add_param_group({**late, "lookahead_alpha": 2})
    with pytest.raises(ValueError, match=r"k must be that of the other groups, 5; got 3"):
        optimizer.add_param_group({**late, "lookahead_k": 3})
    with pytest.raises(ValueError, match=r"SGD: lr must be in"):
        optimizer.add_param_group({**late, "lr": -1})
    with pytest.raises(TypeError):
        optimizer.add_param_group(late["params"])  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1


def test_nesting_three_deep() -> None:
    params = parameters()
    optimizer = Lookahead(Lookahead(Lookahead(torch.optim.RMSprop(params, alpha=0.5), k=2), k=2, alpha=0.25), k=3)
    drive(optimizer, params, 7)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in group if key.endswith(("alpha", "_k"))} == {
        "alpha": 0.5, "lookahead_k": 2, "lookahead_alpha": 0.5, "lookahead2_k": 2, "lookahead2_alpha": 0.25,
        "lookahead3_k": 3, "lookahead3_alpha": 0.5,
    }  # fmt: skip
    assert [optimizer.state[params[0]][f"lookahead{n}_step"].item() for n in ("", "2", "3")] == [1, 1, 1]
    again = pickle.loads(pickle.dumps(optimizer))
    assert_equal(again.state_dict()["state"], optimizer.state_dict()["state"])
