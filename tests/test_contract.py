"""What users of torch.optim rely on beside the numbers: checkpoints, scaling, hooks, live state, and errors."""

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import cases
from cases import (
    ALL,
    PLAIN,
    RICH,
    Case,
    assert_close,
    assert_close_params,
    assert_equal,
    drive,
    each,
    exact_matrices,
    gradient,
    lockstep,
    parameters,
    randn,
    set_gradients,
    slack,
    snapshot,
)
from schuss import optim
from schuss.optim import prodigy
from schuss.testing import has_sums

torch_cases = each(ALL, torch_has=True)
torch_rich = each(RICH, torch_has=True)
rich = each(RICH)
backends = pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])


def through_a_file(value: Any) -> Any:
    """Saved by torch.save and loaded without running pickled code."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(params: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Parameters with the same values and memory of their own."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_alike(
    optimizer: torch.optim.Optimizer, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], what: str = ""
) -> None:
    """Parameters agree bit for bit, or to rounding where another kernel may add the elements of sums otherwise."""
    if has_sums(optimizer):
        assert_close_params(ours, theirs, what)
    else:
        assert_equal([p.detach() for p in ours], [p.detach() for p in theirs], what)


def unchanged_but_gradients(optimizer: torch.optim.Optimizer, before: dict[str, Any]) -> None:
    after = snapshot(optimizer)
    for key in ("params", "state", "groups"):
        assert_equal(after[key], before[key], key)


# --- hyperparameters of other types -----------------------------------------------------------------------------------

ENGINE = ("foreach", "fused", "capturable", "differentiable")


def of_numpy(value: Any) -> Any:
    """The same as a number of NumPy, or a tuple of them."""
    if isinstance(value, tuple):
        return tuple(map(of_numpy, value))
    if not isinstance(value, (bool, int, float)):
        return value
    kinds: dict[type, Callable[[Any], Any]] = {bool: np.bool_, int: np.int64, float: np.float64}
    return kinds[type(value)](value)


@each(RICH + PLAIN)
def test_numbers_and_booleans_of_numpy(case: Case) -> None:
    params, others = case.parameters(), case.parameters()
    ours = case.ours(params)
    known = set(inspect.signature(case.cls).parameters) - {*ENGINE}
    given = {name: of_numpy(value) for name, value in ours.defaults.items() if name in known}
    other = case.cls(others, **given)
    drive(ours, params, range(3))
    drive(other, others, range(3))
    assert_equal([p.detach() for p in others], [p.detach() for p in params])
    assert_equal([*other.state.values()], [*ours.state.values()])


@pytest.mark.parametrize("value", [1, 0, None, np.True_, np.False_])
@pytest.mark.parametrize("of_group", [False, True])
def test_flags_may_be_whatever_is_true_or_not(value: Any, of_group: bool) -> None:
    p = parameters()
    group = {"params": p} | ({"amsgrad": value} if of_group else {})
    optimizer = optim.Adam([group], **({} if of_group else {"amsgrad": value}))
    drive(optimizer, p, range(2))
    assert ("max_exp_avg_sq" in optimizer.state[p[0]]) == bool(value)


# --- the class --------------------------------------------------------------------------------------------------------


@torch_rich
def test_signature_is_torchs(case: Case) -> None:
    """Names, kinds and defaults of the arguments, in order; then ours, keyword-only."""
    ours = inspect.signature(case.cls).parameters
    theirs = inspect.signature(case.torch_cls).parameters
    own = cases.OWN.get(case.name, ())
    assert list(ours) == [*theirs, *own, "options"]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)
    assert ours["options"].kind is inspect.Parameter.VAR_KEYWORD
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name


@torch_cases
def test_defaults_groups_and_repr_are_torchs(case: Case) -> None:
    ours, theirs = case.ours(case.parameters()), case.theirs(case.parameters())
    assert isinstance(ours, torch.optim.Optimizer)
    assert cases.common(ours, [ours.defaults]) == [theirs.defaults]
    assert set(cases.common(ours, ours.param_groups)[0]) == set(theirs.param_groups[0])
    own = cases.OWN.get(case.name, ())
    shown = [line for line in repr(ours).splitlines() if line.strip().partition(":")[0] not in own]
    assert shown == repr(theirs).splitlines()
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@rich
def test_groups_may_have_keys_of_their_own(case: Case) -> None:
    """A user's key, or a scheduler's, is kept in the state dict and loaded."""
    params = case.parameters()
    optimizer = case.ours([{"params": params, "label": "backbone"}])
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    drive(optimizer, params, 2)
    saved = through_a_file(optimizer.state_dict())
    other = case.ours(case.parameters())
    other.load_state_dict(saved)
    assert other.param_groups[0]["label"] == "backbone"
    assert other.param_groups[0]["initial_lr"] == optimizer.defaults["lr"]


@rich
def test_state_that_belongs_to_no_parameter_is_kept(case: Case) -> None:
    """Some code keeps state under names of its own; torch saves and loads it."""
    params = case.parameters()
    optimizer = case.ours(params)
    optimizer.state["shared"] = {"count": 3, "sum": torch.ones(2)}
    drive(optimizer, params, 3)
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"]["shared"]["count"] == 3
    other = case.ours(copies(params))
    other.load_state_dict(saved)
    assert_equal(other.state["shared"], {"count": 3, "sum": torch.ones(2)})
    drive(other, other.param_groups[0]["params"], [3])


def test_every_name_of_torch_optim_is_there() -> None:
    """So that the import can be replaced."""
    assert not [name for name in torch.optim.__all__ if not hasattr(optim, name)]


@rich
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(case: Case, set_to_none: bool) -> None:
    params = case.parameters()
    optimizer = case.ours(params)
    drive(optimizer, params, 1)
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none)
    if set_to_none:
        assert [p.grad for p in params] == [None] * len(params)
    else:
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert not any(g.any() for g in grads)
    drive(optimizer, params, [1])


# --- checkpoints ------------------------------------------------------------------------------------------------------


@torch_cases
@pytest.mark.parametrize("direction", ["torch to schuss", "schuss to torch"])
def test_checkpoints_are_exchanged_with_torch_in_mid_run(case: Case, direction: str) -> None:
    """Four steps there, five here, against nine there."""
    first, second = (case.theirs, case.ours) if direction == "torch to schuss" else (case.ours, case.theirs)
    params, oracle = case.parameters(), case.parameters()
    source, uninterrupted = first(params), case.theirs(oracle)
    drive(source, params, 4, missing=True)
    drive(uninterrupted, oracle, 4, missing=True)
    taken_over = copies(params)
    target = second(taken_over)
    target.load_state_dict(through_a_file(source.state_dict()))
    lockstep(target, uninterrupted, taken_over, oracle, range(4, 9), missing=True, loaded_by_torch=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, torch.float32, id=f"float32-{case}") for case in ALL),
        *(pytest.param(c, dtype, id=f"{dtype}-{c}") for dtype in (torch.float64, torch.bfloat16) for c in RICH),
    ],
)
def test_resuming_is_bitwise_the_same_as_not_stopping(case: Case, dtype: torch.dtype) -> None:
    whole = case.parameters(dtype=dtype)
    a = case.ours(whole)
    drive(a, whole, 4, missing=True)
    resumed = copies(whole)
    b = case.ours(resumed)
    b.load_state_dict(through_a_file(a.state_dict()))
    for step in range(4, 9):
        drive(a, whole, [step], missing=True)
        drive(b, resumed, [step], missing=True)
        assert_equal([p.detach() for p in resumed], [p.detach() for p in whole], f"step {step}")
    assert_equal(b.state_dict(), a.state_dict())


@rich
def test_resuming_with_a_scheduler_between_unlike_groups(case: Case) -> None:
    """Groups with hyperparameters of their own and a scheduler, saved and loaded as a whole."""

    def build(params: Sequence[Any]) -> tuple[Any, Any]:
        groups = [{"params": [p], **o} for p, o in zip(params, cases.GROUPS[case.name], strict=True)]
        optimizer = Case(case.name, dict(lr=0.05)).ours(groups)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    layouts = ("contiguous", "transposed", "0-d", "channels-last")
    whole = case.parameters(layouts)
    a, schedule = build(whole)
    for step in range(3):
        drive(a, whole, [step])
        schedule.step()
    resumed = copies(whole)
    b, resumed_schedule = build(resumed)
    b.load_state_dict(through_a_file(a.state_dict()))
    resumed_schedule.load_state_dict(through_a_file(schedule.state_dict()))
    for step in range(3, 6):
        for optimizer, params, scheduler in ((a, whole, schedule), (b, resumed, resumed_schedule)):
            drive(optimizer, params, [step])
            scheduler.step()
    assert_equal([p.detach() for p in resumed], [p.detach() for p in whole])
    assert_equal(b.state_dict(), a.state_dict())


@rich
def test_loading_keeps_the_dtype_of_the_state(case: Case) -> None:
    """float32 state of bfloat16 parameters stays float32 (torch rounds it to bfloat16), and the run goes on with it."""
    wide = case.parameters(dtype=torch.float32)
    source = case.ours(wide)
    drive(source, wide, 3)
    narrow = [torch.nn.Parameter(p.detach().bfloat16()) for p in wide]
    target = case.ours(narrow)
    target.load_state_dict(source.state_dict())
    for (name, a), (_, b) in zip(cases.tensors_of(target), cases.tensors_of(source), strict=True):
        assert_equal(a, b, name)
        assert a.dtype == b.dtype, name
    dtypes = {t.dtype for _, t in cases.tensors_of(source)}
    assert torch.bfloat16 not in dtypes
    drive(target, narrow, [3])
    assert {t.dtype for _, t in cases.tensors_of(target)} == dtypes
    assert {p.dtype for p in narrow} == {torch.bfloat16}


@rich
def test_loaded_state_shares_no_memory_with_its_source(case: Case) -> None:
    params = case.parameters()
    source = case.ours(params, lr=torch.tensor(0.01))
    drive(source, params, 3)
    saved = source.state_dict()
    twin = copies(params)
    target = case.ours(twin)
    target.load_state_dict(saved)
    before = snapshot(target)
    drive(source, params, [3, 4])
    for kept in saved["state"].values():
        for value in kept.values():
            value.zero_()
    saved["param_groups"][0]["lr"].fill_(100.0)
    unchanged_but_gradients(target, before)
    assert not {t.data_ptr() for _, t in cases.tensors_of(source)} & {t.data_ptr() for _, t in cases.tensors_of(target)}


@rich
def test_loading_changes_the_source_in_nothing(case: Case) -> None:
    params = case.parameters()
    source = case.ours(params)
    drive(source, params, 3)
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    target = case.ours(copies(params))
    target.load_state_dict(saved)
    drive(target, target.param_groups[0]["params"], 2)
    target.param_groups[0]["lr"] = 0.5
    assert_equal(saved, before)


def named(case: Case, order: Sequence[str], **more: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """An optimizer of named parameters: names say the shape, so that a mistake cannot go unnoticed."""
    sizes = {"a": (2,), "b": (3,), "c": (4,), "d": (5,)}
    params = {name: torch.nn.Parameter(case.fit(randn(*sizes[name], seed=ord(name)))) for name in order}
    return case.ours(list(params.items()), **more), params


def step_named(optimizer: Any, params: dict[str, torch.nn.Parameter], steps: Sequence[int]) -> None:
    for step in steps:
        for name, p in params.items():
            p.grad = gradient(p, step, ord(name))
        optimizer.step()


@rich
def test_names_match_state_in_another_order(case: Case) -> None:
    """Order alone decides in torch, and gives parameters the state of others."""
    a, there = named(case, "abc")
    step_named(a, there, range(3))
    b, here = named(case, "cab")
    b.load_state_dict(through_a_file(a.state_dict()))
    assert b.param_groups[0]["param_names"] == ["c", "a", "b"]
    for name, p in here.items():
        assert_equal(b.state[p], a.state[there[name]], name)
        p.data.copy_(there[name])
    step_named(a, there, range(3, 6))
    step_named(b, here, range(3, 6))
    for name, p in here.items():
        assert_equal(p.detach(), there[name].detach(), name)


@rich
def test_names_that_do_not_match_are_an_error(case: Case) -> None:
    a, there = named(case, "abd")
    step_named(a, there, range(2))
    b, here = named(case, "abc")
    step_named(b, here, range(3))
    before = snapshot(b)
    with pytest.raises(ValueError, match=rf"{case.name}: parameter names do not match: .*") as error:
        b.load_state_dict(a.state_dict())
    assert "not in the state dict: c" in str(error.value)
    assert "only in the state dict: d" in str(error.value)
    assert_equal(snapshot(b), before)


@rich
def test_not_strict_loads_the_names_that_match(case: Case) -> None:
    a, there = named(case, "abd")
    step_named(a, there, range(2))
    b, here = named(case, "cba")
    step_named(b, here, range(5, 8))
    in_common = prodigy.SHARED if case.name == "Prodigy" else ()  # with those that are loaded
    kept = {k: v.clone() for k, v in b.state[here["c"]].items() if k not in in_common}
    with pytest.warns(UserWarning, match=r"not in the state dict: c; only in the state dict: d"):
        b.load_state_dict(a.state_dict(), strict=False)
    for name in "ab":
        assert_equal(b.state[here[name]], a.state[there[name]], name)
    assert_equal({k: v for k, v in b.state[here["c"]].items() if k not in in_common}, kept, "c")
    step_named(b, here, [8])


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one group more": (
        lambda s: s["param_groups"].append(dict(s["param_groups"][0], params=[])),
        "different number of parameter groups",
    ),
    "one parameter less": (
        lambda s: s["param_groups"][0]["params"].pop(),
        "doesn't match the size of optimizer's group",
    ),
    "other shapes": (
        lambda s: s["state"].__setitem__(1, {k: v.new_zeros(9) if v.dim() else v for k, v in s["state"][1].items()}),
        r"of parameter 1 of group 0 has the shape \(9,\)",
    ),
}


@rich
@pytest.mark.parametrize("wrong", WRONG)
def test_checkpoints_that_do_not_fit_are_refused_whole(case: Case, wrong: str) -> None:
    """The error comes first: parameters, state and groups are as they were, and training goes on."""
    spoil, message = WRONG[wrong]
    params = case.parameters(("contiguous", "transposed", "permuted"))
    source = case.ours(copies(params), lr=0.5)
    drive(source, source.param_groups[0]["params"], 2)
    saved = copy.deepcopy(source.state_dict())
    spoil(saved)
    optimizer = case.ours(params)
    drive(optimizer, params, 3)
    before = snapshot(optimizer)
    identities = {id(t) for _, t in cases.tensors_of(optimizer)}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_equal(snapshot(optimizer), before)
    assert {id(t) for _, t in cases.tensors_of(optimizer)} == identities
    drive(optimizer, params, [3])


@pytest.mark.parametrize(("saved_by", "loaded_by"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_adam_and_adamw_load_each_other_as_in_torch(saved_by: str, loaded_by: str) -> None:
    """AdamW stays decoupled, whatever it loads; Adam becomes what it loads."""
    params = parameters()
    source = Case(saved_by, dict(lr=0.01, weight_decay=0.3)).ours(params)
    drive(source, params, 3)
    saved = through_a_file(source.state_dict())
    ours, theirs = copies(params), copies(params)
    case = Case(loaded_by, dict(lr=0.01))
    a, b = case.ours(ours), case.theirs(theirs)
    a.load_state_dict(copy.deepcopy(saved))
    b.load_state_dict(copy.deepcopy(saved))
    assert a.param_groups[0]["decoupled_weight_decay"] is True
    lockstep(a, b, ours, theirs, range(3, 6))


@torch_rich
def test_old_checkpoints_with_python_numbers(case: Case) -> None:
    """Before 1.12 torch saved `step`, and NAdam and ASGD more, as Python numbers."""
    params = case.parameters()
    source = case.theirs(params)
    drive(source, params, 3)
    old = copy.deepcopy(source.state_dict())
    for kept in old["state"].values():
        for key in ("step", "mu_product", "eta", "mu"):
            if key in kept:
                kept[key] = int(kept[key]) if key == "step" else float(kept[key])
    ours, theirs = copies(params), copies(params)
    a, b = case.ours(ours), case.theirs(theirs)
    a.load_state_dict(copy.deepcopy(old))
    b.load_state_dict(copy.deepcopy(old))
    lockstep(a, b, ours, theirs, range(3, 7), loaded_by_torch=True)


@torch_rich
def test_old_checkpoints_with_keys_missing_in_groups(case: Case) -> None:
    """Keys that older versions did not have get their defaults, as in torch."""
    plain = Case(case.name, {k: v for k, v in case.kwargs.items() if k != "maximize"})
    params = case.parameters()
    source = plain.theirs(params)
    drive(source, params, 3)
    old = copy.deepcopy(source.state_dict())
    keys = ["maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"]
    for key in keys[case.name == "Adafactor" :]:  # which misses `maximize`, having had it from its start
        old["param_groups"][0].pop(key, None)
    ours, theirs = copies(params), copies(params)
    a, b = plain.ours(ours), plain.theirs(theirs)
    if plain.name in ("NAdam", "RAdam"):  # torch takes the missing key for False, whatever the constructor said
        plain = Case(case.name, {k: v for k, v in plain.kwargs.items() if k != "decoupled_weight_decay"})
        a, b = plain.ours(ours), plain.theirs(theirs)
    a.load_state_dict(copy.deepcopy(old))
    b.load_state_dict(copy.deepcopy(old))
    if "fused" in b.defaults:  # torch's SGD and Adagrad put False there, its Adam None
        a.param_groups[0]["fused"] = b.param_groups[0]["fused"] = None
    lockstep(a, b, ours, theirs, range(3, 7), loaded_by_torch=True)


def test_old_checkpoint_with_an_empty_momentum_buffer() -> None:
    """SGD once saved None for a buffer that had not been used."""
    params = parameters()
    case = Case("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3))
    old = case.theirs(params).state_dict()
    old["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    ours, theirs = copies(params), copies(params)
    a, b = case.ours(ours), case.theirs(theirs)
    a.load_state_dict(copy.deepcopy(old))
    b.load_state_dict(copy.deepcopy(old))
    lockstep(a, b, ours, theirs, 4)


def network(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    bias = case.cls.takes(torch.empty(1))
    layers = torch.nn.Linear(4, 5, bias=bias), torch.nn.Tanh(), torch.nn.Linear(5, 2, bias=bias)
    return torch.nn.Sequential(*layers).double()


def train(model: torch.nn.Module, optimizer: Any, steps: Sequence[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(randn(6, 4, seed=step)).square().mean().backward()
        optimizer.step()


@rich
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint_round_trip(case: Case, flatten: bool) -> None:
    """torch makes the state by a step with zero gradients and lr 0, which must not move anything."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = network(case)
    optimizer = case.ours(model.parameters())
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))

    other = network(case)
    other.load_state_dict(model.state_dict())
    fresh = case.ours(other.parameters(), lr=7.0)
    before = [p.detach().clone() for p in other.parameters()]
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert_equal([p.detach() for p in other.parameters()], before)
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    train(model, optimizer, range(3, 6))
    train(other, fresh, range(3, 6))
    assert_equal([p.detach() for p in other.parameters()], [p.detach() for p in model.parameters()])
    assert_equal(fresh.state_dict(), optimizer.state_dict())


@torch_rich
def test_distributed_checkpoint_of_a_fresh_optimizer_is_torchs(case: Case) -> None:
    found = []
    for build in (case.ours, case.theirs):
        model = network(case)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = build(model.parameters())
        found.append(get_optimizer_state_dict(model, optimizer))
        assert_equal([p.detach() for p in model.parameters()], before)
    ours, theirs = found
    assert set(ours["state"]) == set(theirs["state"])
    for name, kept in theirs["state"].items():
        assert set(ours["state"][name]) == set(kept)
        for key, value in kept.items():
            assert_close(ours["state"][name][key], value, f"{key} of {name}")
    assert_equal(cases.common(optimizer, ours["param_groups"]), theirs["param_groups"])


@rich
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_copies_step_like_the_original(case: Case, how: Callable[[Any], Any], backend: str) -> None:
    """And have nothing in common with it; they keep the back end that was chosen."""
    params = case.parameters()
    original = case.ours(params, backend=backend)
    drive(original, params, 3)
    twin = how(original)
    twins = twin.param_groups[0]["params"]
    assert all(p is not q and p.data_ptr() != q.data_ptr() for p, q in zip(params, twins, strict=True))
    drive(original, params, range(3, 6))
    drive(twin, twins, range(3, 6))
    assert_equal([p.detach() for p in twins], [p.detach() for p in params])
    assert_equal(twin.state_dict(), original.state_dict())
    assert twin.defaults == original.defaults
    assert [e.route.backend for e in twin.plan().entries] == [e.route.backend for e in original.plan().entries]


# --- gradient scaling -------------------------------------------------------------------------------------------------


def scaled_step(scaler: Any, optimizer: Any, params: Sequence[Any], step: int, *, unscale: bool, spoil: bool) -> None:
    """A step of mixed precision training; the loss's gradient is that of `set_gradients`."""
    optimizer.zero_grad()
    loss = sum((p * gradient(p, 7, step, i)).sum() for i, p in enumerate(params))
    scaler.scale(loss).backward()
    if spoil:
        params[1].grad[0, 0] = torch.inf
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@each(RICH + PLAIN)
@pytest.mark.parametrize("unscale", [False, True], ids=["scaler-unscales", "unscaled-by-hand"])
@backends
def test_grad_scaler(case: Case, unscale: bool, backend: str) -> None:
    """A power of two as scale changes no bit, but of sums, which another kernel may add in another order; a step with
    an infinite gradient changes nothing at all, not even `step`, and halves the scale."""
    layouts = ("contiguous", "transposed")
    plain, scaled = (case.parameters(layouts, torch.float32, backend=backend) for _ in range(2))
    a, b = case.ours(plain, backend=backend), case.ours(scaled, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(7):
        if step in (0, 3):
            before, scale = snapshot(b), scaler.get_scale()
            scaled_step(scaler, b, scaled, step, unscale=unscale, spoil=True)
            unchanged_but_gradients(b, before)
            assert scaler.get_scale() == scale / 2
        drive(a, plain, [step])
        scaled_step(scaler, b, scaled, step, unscale=unscale, spoil=False)
        assert_alike(a, scaled, plain, f"step {step}")
    if not has_sums(a):
        assert_equal(b.state_dict(), a.state_dict())
    assert not hasattr(b, "grad_scale")
    assert not hasattr(b, "found_inf")


@rich
def test_users_own_grad_scale(case: Case) -> None:
    """`optimizer.grad_scale` divides the gradients of the steps to come: a clipping coefficient can go there."""
    plain, scaled = case.parameters(), case.parameters()
    a, b = case.ours(plain), case.ours(scaled)
    for step in range(4):
        set_gradients(plain, step)
        set_gradients(scaled, step)
        for p in plain:
            p.grad = p.grad / 4
        b.grad_scale = torch.tensor(4.0)
        a.step()
        b.step()
    assert_alike(a, scaled, plain)


# --- hooks and closures -----------------------------------------------------------------------------------------------


def events(case: Case, build: Callable[..., Any]) -> list[Any]:
    """What hooks see, in order."""
    seen: list[Any] = []
    params = case.parameters()
    optimizer = build(params)
    handles = [
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("global post")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("global pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("own post", params[2].item() != start))),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("own pre", params[2].item() != start))),
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("state_dict pre")),
        optimizer.register_state_dict_post_hook(lambda o, s: seen.append(("state_dict post", sorted(s)))),
        optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append(("load pre", sorted(s)))),
        optimizer.register_load_state_dict_post_hook(
            lambda o: seen.append(("load post", o.param_groups[0]["lr"], len(o.state)))
        ),
    ]
    start = params[2].item()
    drive(optimizer, params, 1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.125
    optimizer.load_state_dict(saved)
    drive(optimizer, params, [1])
    for handle in handles:
        handle.remove()
    drive(optimizer, params, [2])
    return seen


@torch_rich
def test_hooks_fire_in_torchs_order(case: Case) -> None:
    ours, theirs = events(case, case.ours), events(case, case.theirs)
    assert ours == theirs
    assert ours[:4] == ["global pre", ("own pre", False), ("own post", True), "global post"]
    assert ("load post", 0.125, 3) in ours


@rich
def test_hooks_may_replace_what_they_are_given(case: Case) -> None:
    """A step pre-hook the arguments; the others the state dict."""
    params = case.parameters()
    optimizer = case.ours(params)
    set_gradients(params, 0)
    calls: list[str] = []

    def closure(name: str) -> Callable[[], float]:
        return lambda: (calls.append(name), 2.5)[1]

    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure("theirs")), {}))
    assert optimizer.step(closure("mine")) == 2.5
    assert calls == ["theirs"]
    handle.remove()
    assert optimizer.step(closure("mine")) == 2.5
    assert calls == ["theirs", "mine"]
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1
    half = copy.deepcopy(optimizer.state_dict())
    half["param_groups"][0]["lr"] = 0.5
    optimizer.register_load_state_dict_pre_hook(lambda o, s: half)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


@rich
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad], ids=["grad", "no-grad"])
def test_closure(case: Case, outside: Callable[[], Any]) -> None:
    """Called once, before anything moves, with gradients enabled; its loss is returned."""
    params, expected = case.parameters(), case.parameters()
    optimizer, oracle = case.ours(params), case.ours(expected)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        assert_equal([p.detach() for p in params], [p.detach() for p in case.parameters()])
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with outside():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == pytest.approx(sum(p.square().sum().item() for p in case.parameters()), rel=1e-12)
    for p in expected:
        p.grad = 2 * p.detach()
    assert oracle.step() is None
    assert_equal([p.detach() for p in params], [p.detach() for p in expected])


@rich
def test_closure_that_raises_changes_nothing(case: Case) -> None:
    params = case.parameters()
    optimizer = case.ours(params)
    drive(optimizer, params, 2)
    before = snapshot(optimizer)

    def closure() -> float:
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError, match="no loss"):
        optimizer.step(closure)
    assert_equal(snapshot(optimizer), before)


# --- groups -----------------------------------------------------------------------------------------------------------


@torch_rich
def test_adding_a_group_while_training(case: Case) -> None:
    """Unfreezing: the new parameters start from their first step, with hyperparameters of their own."""
    made = []
    for build in (case.ours, case.theirs):
        old, new = case.parameters(), case.parameters(seed=20)
        optimizer = build(old)
        drive(optimizer, old, 3)
        optimizer.add_param_group({"params": new[:2], "lr": 0.25})
        optimizer.add_param_group({"params": new[2]})
        made.append((optimizer, old + new))
    (ours, our_params), (theirs, their_params) = made
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
    lockstep(ours, theirs, our_params, their_params, range(3, 8), missing=True)


@torch_rich
def test_groups_as_iterators_and_with_names(case: Case) -> None:
    made = []
    for build in (case.ours, case.theirs):
        params = case.parameters()
        names = ["w", "v", "bias"]
        optimizer = build(
            [{"params": iter(list(zip(names, params, strict=True))[:2])}, {"params": [("bias", params[2])]}]
        )
        assert [g["param_names"] for g in optimizer.param_groups] == [["w", "v"], ["bias"]]
        made.append((optimizer, params))
    (ours, our_params), (theirs, their_params) = made
    lockstep(ours, theirs, our_params, their_params, 3)


# --- live state -------------------------------------------------------------------------------------------------------


def first_state(optimizer: Any, p: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A state that is no number, the same one in both libraries."""
    return next((k, v) for k, v in sorted(optimizer.state[p].items()) if v.dim())


def write_in_place(o: Any, params: list[Any]) -> None:
    first_state(o, params[0])[1].mul_(0.25)


def rebind(o: Any, params: list[Any]) -> None:
    key, value = first_state(o, params[0])
    o.state[params[0]][key] = value * 0.25


def replace_all_state_of_a_parameter(o: Any, params: list[Any]) -> None:
    o.state[params[0]] = {k: v.clone() * (0.5 if v.dim() else 1) for k, v in o.state[params[0]].items()}


def update_state_dict_in_place(o: Any, params: list[Any]) -> None:
    o.state[params[0]].update({k: v.clone() * 0.5 for k, v in o.state[params[0]].items() if v.dim()})


def give_the_state_of_another(o: Any, params: list[Any]) -> None:
    """One tensor under two parameters of one shape."""
    o.state[params[0]] = {k: v.clone() for k, v in o.state[params[3]].items()}


def set_scalars(o: Any, params: list[Any]) -> None:
    for key, value in {"step": 9.0, "mu_product": 0.5, "eta": 0.03, "mu": 0.25}.items():
        if key in o.state[params[0]]:
            o.state[params[0]][key].fill_(value)


def rebind_scalars(o: Any, params: list[Any]) -> None:
    kept = o.state[params[1]]
    kept.update({k: v + 2 for k, v in kept.items() if k == "step"})


def delete_state(o: Any, params: list[Any]) -> None:
    del o.state[params[0]]


def replace_state(o: Any, params: list[Any]) -> None:
    o.state = defaultdict(dict)


def state_from_copies(o: Any, params: list[Any]) -> None:
    o.state = defaultdict(dict, {p: {k: v.clone() for k, v in kept.items()} for p, kept in o.state.items()})


def new_data(o: Any, params: list[Any]) -> None:
    params[0].data = randn(*params[0].shape, seed=5)


def new_data_in_another_layout(o: Any, params: list[Any]) -> None:
    params[0].data = params[0].data.t().contiguous().t()
    params[1].data = randn(*params[1].shape, seed=6)


def new_data_of_state(o: Any, params: list[Any]) -> None:
    _, value = first_state(o, params[0])
    value.data = value.data.clone() * 0.5


def write_into_a_parameter(o: Any, params: list[Any]) -> None:
    with torch.no_grad():
        params[0].mul_(0.5)
        params[1].copy_(randn(*params[1].shape, seed=8))


def replace_a_parameter(o: Any, params: list[Any]) -> None:
    """As Gaussian splatting densifies: more rows, the state of the new ones zero."""
    group = o.param_groups[0]
    old = group["params"][0]
    kept = o.state.pop(old)
    for key, value in kept.items():
        if value.shape[:1] == old.shape[:1]:
            kept[key] = torch.cat([value, torch.full((2, *value.shape[1:]), 0.5, dtype=old.dtype)])
    new = torch.nn.Parameter(torch.cat([old.detach(), randn(2, old.shape[1], seed=9)]))
    group["params"][0] = params[0] = new
    o.state[new] = kept


def replace_a_parameter_without_its_state(o: Any, params: list[Any]) -> None:
    o.state.pop(params[0], None)
    o.param_groups[0]["params"][0] = params[0] = torch.nn.Parameter(randn(3, 3, seed=9))


def remove_a_parameter(o: Any, params: list[Any]) -> None:
    del o.state[o.param_groups[0]["params"].pop(1)]
    del params[1]


def swap_two_parameters(o: Any, params: list[Any]) -> None:
    inside = o.param_groups[0]["params"]
    inside[0], inside[1] = inside[1], inside[0]


def make_scalars_float64(o: Any, params: list[Any]) -> None:
    kept = o.state[params[1]]
    kept.update({k: v.double() for k, v in kept.items() if k in ("step", "mu_product")})


def make_step_an_integer(o: Any, params: list[Any]) -> None:
    kept = o.state[params[0]]
    kept.update({k: v.long() for k, v in kept.items() if k == "step"})


def add_a_key_of_ones_own(o: Any, params: list[Any]) -> None:
    o.state[params[0]]["mine"] = torch.ones(3)


def replace_groups(o: Any, params: list[Any]) -> None:
    o.param_groups = [dict(g, lr=g["lr"] * 0.5) for g in o.param_groups]


def replace_the_list_of_parameters(o: Any, params: list[Any]) -> None:
    o.param_groups[0]["params"] = list(o.param_groups[0]["params"][::-1])


def append_a_parameter(o: Any, params: list[Any]) -> None:
    params.append(torch.nn.Parameter(randn(3, 3, seed=len(params))))
    o.param_groups[0]["params"].append(params[-1])


def move_a_parameter_to_a_new_group(o: Any, params: list[Any]) -> None:
    moved = o.param_groups[0]["params"].pop(0)
    o.add_param_group({"params": [moved], "lr": 0.02})


def give_pairs_as_lists(o: Any, params: list[Any]) -> None:
    for group in o.param_groups:
        group.update({k: list(v) for k, v in group.items() if isinstance(v, tuple)})


CHANGES = [
    write_in_place, rebind, replace_all_state_of_a_parameter, update_state_dict_in_place, give_the_state_of_another,
    set_scalars, rebind_scalars, delete_state, replace_state, state_from_copies, new_data, new_data_in_another_layout,
    new_data_of_state, write_into_a_parameter, replace_a_parameter, replace_a_parameter_without_its_state,
    remove_a_parameter, swap_two_parameters, make_scalars_float64, make_step_an_integer, add_a_key_of_ones_own,
    replace_groups, replace_the_list_of_parameters, append_a_parameter, move_a_parameter_to_a_new_group,
    give_pairs_as_lists,
]  # fmt: skip
RESTARTS = (delete_state, replace_state, replace_a_parameter_without_its_state, append_a_parameter)


@exact_matrices
@pytest.mark.parametrize(
    ("case", "change"),
    [
        pytest.param(case, change, id=f"{change.__name__}-{case.name}")
        for change in CHANGES
        for case in RICH
        if case.name in cases.IN_TORCH and not (case.name == "Adagrad" and change in RESTARTS)
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_others_write_counts_at_the_next_step(case: Case, change: Callable[..., None], backend: str) -> None:
    """Adagrad is told apart below where its state goes: torch makes it in the constructor only, and fails."""
    layouts = ("contiguous", "transposed", "0-d", "contiguous")
    ours, theirs = case.parameters(layouts), case.parameters(layouts)
    a, b = case.ours(ours, backend=backend), case.theirs(theirs)
    lockstep(a, b, ours, theirs, 3)
    for round_ in range(2):
        change(a, ours)
        change(b, theirs)
        lockstep(a, b, ours, theirs, range(3 + 2 * round_, 5 + 2 * round_))


@pytest.mark.parametrize("change", RESTARTS, ids=lambda c: c.__name__)
def test_adagrad_starts_again_without_its_state(change: Callable[..., None]) -> None:
    """As if it were new."""
    case = next(c for c in RICH if c.name == "Adagrad")
    params = case.parameters()
    optimizer = case.ours(params)
    drive(optimizer, params, 3)
    change(optimizer, params)
    new = params[-1] if change is append_a_parameter else params[0]
    fresh = copies([new])
    other = case.ours(fresh)
    for step in range(2):
        for optimizer_, p in ((optimizer, new), (other, fresh[0])):
            p.grad = gradient(p, step)
            optimizer_.step()
    assert_equal(new.detach(), fresh[0].detach())


@rich
@backends
def test_a_step_writes_into_the_tensors_that_are_there(case: Case, backend: str) -> None:
    """Parameters and state keep their memory and identity, gradients every bit; versions of parameters grow."""
    layouts = ("contiguous", "0-d") if backend == "numba" else ("contiguous", "transposed", "gaps", "0-d")
    params = case.parameters(layouts)
    optimizer = case.ours(params, backend=backend)
    drive(optimizer, params, 1)
    held = dict(cases.tensors_of(optimizer))
    addresses = {name: t.data_ptr() for name, t in held.items()}
    set_gradients(params, 1)
    grads, before = [p.grad for p in params], [p.grad.clone() for p in params]
    pointers, versions = [p.data_ptr() for p in params], [p._version for p in params]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert_equal(grads, before)
    assert [p.data_ptr() for p in params] == pointers
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    for name, t in cases.tensors_of(optimizer):
        assert t is held[name]
        assert t.data_ptr() == addresses[name]
        assert not t.requires_grad
    params[0].grad = None
    set_gradients(params[1:], 2)
    version = params[0]._version
    optimizer.step()
    assert params[0]._version == version


@rich
@backends
def test_stepping_between_forward_and_backward_is_torchs_error(case: Case, backend: str) -> None:
    w = torch.nn.Parameter(randn(3, 3))
    optimizer = case.ours([w], backend=backend)
    (w * w).sum().backward()
    optimizer.step()  # the first step of ADOPT does not move
    loss = (w * w).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
@rich
@backends
def test_dropping_an_optimizer_frees_its_state(case: Case, backend: str) -> None:
    """At once, without the collector of cycles: state is as large as the model."""
    params = case.parameters(("contiguous", "transposed"), backend=backend)
    optimizer = case.ours(params, backend=backend)
    drive(optimizer, params, 3)
    optimizer.plan()
    held = [weakref.ref(t) for _, t in cases.tensors_of(optimizer)]
    assert held
    del optimizer
    assert [ref() for ref in held] == [None] * len(held)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [pytest.param(*row, id=str(Case(row[0], row[1]))) for row in cases.ERRORS],
)
def test_arguments_out_of_bounds(name: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    """In the constructor, and in a group that is added later, which leaves the optimizer as it was."""
    params = Case(name, {}).parameters()
    with pytest.raises(error, match=message):
        Case(name, {}).ours(params, **kwargs)
    if "backend" in kwargs:
        return
    with pytest.raises(error, match=message):
        Case(name, {}).ours([{"params": params, **kwargs}])
    optimizer = Case(name, {}).ours(params)
    drive(optimizer, params, 2)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": Case(name, {}).parameters(seed=5), **kwargs})
    assert_equal(snapshot(optimizer), before)
    drive(optimizer, params, [2])


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("Adam", "weigth_decay", "Adam: unknown argument 'weigth_decay'; did you mean 'weight_decay'?"),
        ("AdamW", "LR", "AdamW: unknown argument 'LR'; did you mean 'lr'?"),
        ("SGD", "momentun", "SGD: unknown argument 'momentun'; did you mean 'momentum'?"),
        ("Lion", "back_end", "Lion: unknown argument 'back_end'; did you mean 'backend'?"),
        ("Rprop", "eta", "Rprop: unknown argument 'eta'; did you mean 'etas'?"),
        ("ADOPT", "clip_lambda", "ADOPT: unknown argument 'clip_lambda'; "),
        ("Adadelta", "zzz", "Adadelta: unknown argument 'zzz'; choose from lr, rho, eps,"),
    ],
)
def test_unknown_keywords_name_the_nearest(name: str, wrong: str, message: str) -> None:
    with pytest.raises(TypeError) as error:
        Case(name, {}).ours(parameters(), **{wrong: 0.1})
    assert message in str(error.value)


@rich
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda case: [], ValueError, "empty parameter list", id="none"),
        pytest.param(lambda case: torch.zeros(2), TypeError, "should be an iterable of Tensors", id="bare-tensor"),
        pytest.param(lambda case: [{"params": set(case.parameters())}], TypeError, "ordered", id="set"),
        pytest.param(lambda case: [1.0], TypeError, "optimizer can only optimize Tensors", id="number"),
        pytest.param(
            lambda case: [case.fit(torch.zeros(2, requires_grad=True) * 2)], ValueError, "non-leaf", id="non-leaf"
        ),
        pytest.param(
            lambda case: case.parameters()[:1] * 2, ValueError, "a parameter appears twice in one group", id="twice"
        ),
        pytest.param(
            lambda case: [("a", case.fit(torch.zeros(1))), case.fit(torch.zeros(1))],
            ValueError,
            "with/without names",
            id="some-named",
        ),
        pytest.param(
            lambda case: [{"params": (same := case.parameters())}, {"params": same[1:]}],
            ValueError,
            "some parameters appear in more than one parameter group",
            id="in-two-groups",
        ),
    ],
)
def test_parameters_that_are_none(
    case: Case, make: Callable[[Case], Any], error: type[Exception], message: str
) -> None:
    given = make(case)
    with pytest.raises(error, match=message):
        case.ours(given)


@rich
def test_groups_that_are_refused_leave_the_optimizer_as_it_was(case: Case) -> None:
    params = case.parameters()
    optimizer = case.ours(params)
    drive(optimizer, params, 2)
    before = snapshot(optimizer)
    new = torch.nn.Parameter(case.fit(torch.zeros(2)))
    for group, error, message in (
        ({"params": [new, params[0]]}, ValueError, "more than one parameter group"),
        ({"params": [new, new]}, ValueError, "twice in one group"),
        ({"params": {new}}, TypeError, "ordered"),
        ({"params": [new, new * 2]}, ValueError, "non-leaf"),
        ([new], TypeError, "must be a dict"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
        assert_equal(snapshot(optimizer), before)
    drive(optimizer, params, [2])


def wrong_size(p: torch.Tensor) -> None:
    p.data = torch.zeros(4, 4, dtype=p.dtype)


def transposed(p: torch.Tensor) -> None:
    p.data = p.data.t()


def reshaped(p: torch.Tensor) -> None:
    p.data = p.data.view(7, 5)


def made_one_dimensional(p: torch.Tensor) -> None:
    p.data = p.data.view(35)


@rich
@pytest.mark.parametrize("swap", [wrong_size, transposed, reshaped, made_one_dimensional], ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps_before", [0, 2])
@backends
def test_gradients_of_the_wrong_shape(
    case: Case, swap: Callable[[torch.Tensor], None], steps_before: int, backend: str
) -> None:
    """torch lets a parameter's memory be exchanged while its gradient stays. An error names it; nothing has moved, the
    parameters before it and after it neither."""
    params = case.parameters(("transposed", "contiguous", "0-d"), backend=backend)
    optimizer = case.ours(params, backend=backend)
    drive(optimizer, params, steps_before)
    set_gradients(params, 3)
    swap(params[1])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"{case.name}: the gradient of parameter 1 of group 0 must have its shape"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)


@torch_rich
def test_a_parameter_transposed_in_its_place(case: Case) -> None:
    """The same memory and number of elements, in another order: a contiguous gradient no longer fits it element by
    element in memory, and is added by coordinates, as in torch."""
    made = []
    for build in (case.ours, case.theirs):
        p = torch.nn.Parameter(randn(4, 4))
        optimizer = build([p])
        for step in range(4):
            if step == 2:
                p.data = p.data.t()
            p.grad = randn(4, 4, seed=step)
            optimizer.step()
        made.append((optimizer, [p]))
    (ours, our_params), (theirs, their_params) = made
    assert_close_params(our_params, their_params, slack=slack(theirs))
    cases.assert_close_state(ours, theirs)


@rich
def test_the_error_about_a_gradient_names_the_parameter(case: Case) -> None:
    params = case.parameters(("contiguous", "transposed"))
    optimizer = case.ours([("first.weight", params[0]), ("second.weight", params[1])])
    set_gradients(params, 0)
    wrong_size(params[1])
    with pytest.raises(
        RuntimeError, match=r"the gradient of second\.weight must have .* \(4, 4\) on cpu; got \(3, 6\)"
    ):
        optimizer.step()


@rich
def test_numba_refuses_what_it_cannot_update(case: Case) -> None:
    """A back end that is asked for by name is never replaced in silence."""
    params = case.parameters(("contiguous", "gaps"))
    optimizer = case.ours(params, backend="numba")
    set_gradients(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"backend='numba' cannot update parameter 1 of group 0: view with gaps"):
        optimizer.step()
    assert_equal(snapshot(optimizer), before)


@each(RICH, torch_has=True)
def test_state_of_a_custom_dtype_is_used(case: Case) -> None:
    """State that a user has put into float64 stays so, and the step computes with it: more exactly, never less."""
    params, theirs = case.parameters(dtype=torch.float32), case.parameters(dtype=torch.float64)
    for p, q in zip(params, theirs, strict=True):
        q.data.copy_(p)
    a, b = case.ours(params), case.theirs(theirs)
    drive(a, params, 1)
    for q, p in zip(theirs, params, strict=True):
        q.grad = p.grad.double()
    b.step()
    for kept in a.state.values():
        kept.update({k: v.double() for k, v in kept.items() if k not in ("step", "eta", "mu", "mu_product")})
    for p, q in zip(params, theirs, strict=True):
        q.data.copy_(p)
        for key, value in b.state[q].items():
            value.copy_(a.state[p][key])
    drive(a, params, [1])
    for q, p in zip(theirs, params, strict=True):
        q.grad = p.grad.double()
    b.step()
    for p, q in zip(params, theirs, strict=True):
        assert_close(p, q.detach().float(), "parameter")
        for key, value in b.state[q].items():
            mine = a.state[p][key]
            assert mine.dtype == value.dtype
            # Numbers of rows and columns are no reason to compute elements in float64.
            assert_close(mine, value, key, slack=1e-6 if value.shape != p.shape else slack(b))
    assert_close_params(params, [q.detach().float() for q in theirs])
