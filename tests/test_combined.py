"""Several optimizers as one: each does what it would do alone, and all that users of an optimizer rely on holds."""

import copy
import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import schuss
from cases import assert_equal, drive, randn, set_gradients
from schuss import optim, testing
from schuss.schedules import Schedule, cosine, linear
from schuss.training import Groups
from schuss.wrappers import SAM, Combined, Lookahead
from wrapper_contract import Lazy, copies, through_a_file, values

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]

SHAPES = ((4, 6), (6, 3), (5, 5), (7,), (2, 3, 4), (), (9,), (3, 2))
"""The first three for the first optimizer: matrices, since some take no other parameters."""

PAIRS: dict[str, tuple[Make, Make]] = {
    "Muon, AdamW": (lambda p: torch.optim.Muon(p, lr=0.02), lambda p: optim.AdamW(p, lr=0.05)),
    "SGD, torch.AdamW": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.05)),
    "torch.fused, Adagrad": (lambda p: torch.optim.AdamW(p, lr=0.05, fused=True), lambda p: optim.Adagrad(p, lr=0.1)),
    "AdamW, AdamW": (lambda p: optim.AdamW(p, lr=0.05), lambda p: optim.AdamW(p, lr=0.2, betas=(0.5, 0.9))),
    "Lookahead, Lazy": (lambda p: Lookahead(optim.AdamW(p, lr=0.05), k=2), Lazy),
    "Combined, int8": (
        lambda p: Combined([torch.optim.SGD(p[:1], lr=0.1, momentum=0.9), optim.AdamW(p[1:], lr=0.05)]),  # type: ignore[index]
        lambda p: optim.AdamW(p, lr=0.05, state_dtype="int8"),
    ),
}
pairs = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]


def apart(make: tuple[Make, Make], params: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Two optimizers, each with its own parameters."""
    return [make[0](params[:3]), make[1](params[3:])]


def combined(make: tuple[Make, Make], params: Sequence[nn.Parameter], **more: Any) -> Combined:
    return Combined(apart(make, params), **more)


def drive_apart(
    optimizers: Sequence[torch.optim.Optimizer],
    params: Sequence[nn.Parameter],
    steps: Iterable[int],
    *,
    missing: bool = False,
) -> None:
    for step in steps:
        set_gradients(params, step, missing=missing)
        for optimizer in optimizers:
            optimizer.step()


def kept(optimizers: Iterable[torch.optim.Optimizer], params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The state of each parameter, from whichever optimizer has it."""
    optimizers = [*optimizers]
    return [dict(next((o.state[p] for o in optimizers if p in o.state), {})) for p in params]


# --- each steps as it would alone -------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_those_of_each_alone(make: tuple[Make, Make], dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, others = combined(make, ours), apart(make, theirs)
    for step in range(10):
        drive(optimizer, ours, [step], missing=True)
        drive_apart(others, theirs, [step], missing=True)
        assert_equal(values(ours), values(theirs), f"step {step}")
    assert_equal(kept([optimizer], ours), kept(others, theirs))
    assert_equal(kept(optimizer.optimizers.values(), ours), kept(others, theirs))


ONES: list[Make] = [
    lambda p: optim.AdamW(p, lr=0.05),
    lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.RMSprop(p, lr=0.01),
    Lazy,
]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), owners=st.lists(st.integers(0, 3), min_size=1, max_size=len(SHAPES)))
def test_any_split_of_parameters_and_groups(data: st.DataObject, owners: list[int]) -> None:
    """Each optimizer with any parameters, in any groups; saved after some steps and continued in a new one."""
    ours, theirs = (parameters(shapes=SHAPES[: len(owners)]) for _ in range(2))
    there = sorted(set(owners))
    cuts = {i: data.draw(st.integers(1, owners.count(i)), label=f"parameters in the first group of {i}") for i in there}
    stop = data.draw(st.integers(0, 4), label="steps before saving")

    def build(params: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
        optimizers = []
        for i in there:
            own = [p for p, owner in zip(params, owners, strict=True) if owner == i]
            parts = [part for part in (own[: cuts[i]], own[cuts[i] :]) if part]
            optimizers.append(ONES[i]([{"params": part} for part in parts]))
        return optimizers

    optimizer, others = Combined(build(ours)), build(theirs)
    drive(optimizer, ours, range(stop), missing=True)
    saved = through_a_file(optimizer.state_dict())
    assert [n for group in saved["param_groups"] for n in group["params"]] == [*range(len(owners))]
    ours = copies(ours)
    optimizer = Combined(build(ours))
    optimizer.load_state_dict(saved)
    drive(optimizer, ours, range(stop, 6), missing=True)
    drive_apart(others, theirs, range(6), missing=True)
    assert_equal(values(ours), values(theirs))
    assert_equal(kept([optimizer], ours), kept(others, theirs))


@pytest.mark.parametrize("check", [c for c in testing.CHECKS if c.__name__ in {
    "back_ends_agree", "groups_do_not_matter", "threads_do_not_matter", "gradients_stay",
    "missing_gradients_are_skipped", "resuming_is_not_stopping", "copies_continue",
}], ids=lambda c: c.__name__)  # fmt: skip
def test_generic_checks(check: Callable[..., None]) -> None:
    def make(groups: Any, **options: Any) -> Combined:
        (first, *rest), *more = [[*group["params"]] for group in groups]
        return Combined(
            [
                optim.AdamW([first], **options),
                optim.AdamW([{"params": params} for params in (rest, *more) if params], **options),
            ]
        )

    make.takes, make.takes_complex = optim.AdamW.takes, optim.AdamW.takes_complex
    check(make, {"lr": 0.01})


def test_one_is_as_good_as_itself() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, other = Combined([optim.AdamW(ours)]), optim.AdamW(theirs)
    drive(optimizer, ours, 3)
    drive(other, theirs, 3)
    assert_equal(values(ours), values(theirs))
    late = {"params": [nn.Parameter(torch.ones(2))]}
    optimizer.add_param_group(late)  # there is no choice
    assert len(optimizer.param_groups) == 2


# --- groups -----------------------------------------------------------------------------------------------------------


def two(**more: Any) -> tuple[list[nn.Parameter], Combined]:
    params = parameters()
    sgd = optim.SGD([{"params": params[:1]}, {"params": params[1:3], "lr": 0.5}], lr=0.1)
    return params, Combined([sgd, torch.optim.AdamW(params[3:], lr=0.05)], **more)


def test_groups_are_the_inner_optimizers_own() -> None:
    params, optimizer = two()
    sgd, adamw = optimizer.optimizers.values()
    assert [*optimizer.optimizers] == ["SGD", "AdamW"]
    groups = optimizer.param_groups
    assert [id(g) for g in groups] == [id(g) for g in (*sgd.param_groups, *adamw.param_groups)]
    assert optimizer.param_groups is groups
    groups[2]["lr"] = 0.0  # counts at the next step
    before = values(params)
    drive(optimizer, params, 1)
    assert_equal(values(params[3:]), before[3:])
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("key", ["SGD", 0, "named"])
def test_a_new_group_goes_where_it_says_and_comes_last(key: Any) -> None:
    _, optimizer = two()
    if key == "named":
        optimizer = Combined({"named": optimizer.optimizers["SGD"], "other": optimizer.optimizers["AdamW"]})
    groups, sgd = optimizer.param_groups, next(iter(optimizer.optimizers.values()))
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "optimizer": key, "lr": 1.0})
    assert [g["params"][-1] is late for g in groups] == [False, False, False, True]
    assert groups[3] is sgd.param_groups[2]
    assert groups[3]["momentum"] == 0  # the defaults of its optimizer
    assert groups[3]["optimizer"] == next(iter(optimizer.optimizers))
    late.grad = torch.ones(3)
    optimizer.step()
    assert late.tolist() == [0.0] * 3
    later = nn.Parameter(torch.ones(2))
    sgd.add_param_group({"params": [later]})  # behind its back
    assert optimizer.param_groups[4]["params"] == [later]
    assert [len(g["params"]) for g in optimizer.state_dict()["param_groups"]] == [1, 2, 5, 1, 1]


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({}, ValueError, r"^Combined: a new group must say in its key 'optimizer' what it is for: 'SGD', 'AdamW'$"),
        ({"optimizer": "Muon"}, ValueError, r"^Combined: optimizer must be one of 'SGD', 'AdamW', got 'Muon'$"),
        ({"optimizer": 2}, ValueError, r"optimizer must be one of .*, got 2"),
        ({"optimizer": True}, ValueError, r"optimizer must be one of .*, got True"),
        ({"optimizer": "SGD", "lr": -1}, ValueError, r"SGD: lr must be in \[0, inf\), got -1"),
        ({"optimizer": "SGD", "params": {torch.ones(1)}}, TypeError, "params must have an order"),
    ],
    ids=str,
)
def test_new_groups_that_are_refused(group: dict[str, Any], error: type[Exception], message: str) -> None:
    _, optimizer = two()
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **group})
    assert len(optimizer.param_groups) == 3
    with pytest.raises(TypeError, match="a group must be a dict, got list"):
        optimizer.add_param_group([])  # type: ignore[arg-type]


def test_a_parameter_that_another_optimizer_has_is_refused() -> None:
    params, optimizer = two()
    with pytest.raises(ValueError, match="parameter 0 of group 3 is in SGD and in AdamW"):
        optimizer.add_param_group({"params": params[:1], "optimizer": "AdamW"})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[:1], "optimizer": "SGD"})
    assert len(optimizer.param_groups) == 3


def test_vectors_among_matrices_are_refused_by_name() -> None:
    """torch's Muon looks at its first groups alone."""
    optimizer = Combined([torch.optim.Muon([("w", nn.Parameter(torch.ones(2, 2)))])])
    message = (
        r"Muon: its parameters must be matrices.*1 of 1 are not: bias \(3,\).*schuss\.param_groups\(model, matrices"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("bias", nn.Parameter(torch.ones(3)))]})
    assert len(optimizer.param_groups) == 1
    nested = Combined(
        [Combined([torch.optim.Muon([nn.Parameter(torch.ones(2, 2))]), optim.SGD([nn.Parameter(torch.ones(2))])])]
    )
    nested.add_param_group({"params": [nn.Parameter(torch.ones(3))], "optimizer": "SGD"})
    with pytest.raises(ValueError, match="Muon: its parameters must be matrices"):
        nested.add_param_group({"params": [nn.Parameter(torch.ones(3))], "optimizer": "Muon"})
    muon = torch.optim.Muon([nn.Parameter(torch.ones(2, 2))])
    muon.add_param_group({"params": [nn.Parameter(torch.ones(n)) for n in range(1, 8)]})
    with pytest.raises(ValueError, match=r"7 of 8 are not: parameter 0 of group 1 \(1,\).* and 2 more"):
        Combined([muon])
    with pytest.raises(ValueError, match=r"1 of 1 are not: b \(2,\)"):
        Combined.of([{"params": [("b", nn.Parameter(torch.ones(2)))], "optimizer": "m"}], m=partial(torch.optim.Muon))


def test_what_is_done_to_the_list_of_groups_is_done_to_the_optimizers() -> None:
    params, optimizer = two()
    sgd, adamw = optimizer.optimizers.values()
    del optimizer.param_groups[1:]
    before = values(params)
    drive(optimizer, params, 1)
    assert (len(sgd.param_groups), len(adamw.param_groups)) == (1, 0)
    assert_equal(values(params[1:]), before[1:])
    assert not torch.equal(params[0], before[0])
    optimizer.param_groups.append({**sgd.defaults, "params": params[1:3], "optimizer": "SGD"})
    optimizer.param_groups = [{**group} for group in optimizer.param_groups]  # by the parameters, or by the key
    assert [len(g["params"]) for g in sgd.param_groups] == [1, 2]
    with pytest.raises(ValueError, match="must say in its key 'optimizer'"):
        optimizer.param_groups = [{"params": [nn.Parameter(torch.ones(1))]}]
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 2]
    optimizer.param_groups.clear()
    assert optimizer.param_groups == []
    assert sgd.param_groups == []


def test_defaults_are_the_union_and_what_is_written_arrives() -> None:
    _, optimizer = two()
    sgd, adamw = optimizer.optimizers.values()
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults["momentum"], defaults["betas"]) == (0.1, 0, (0.9, 0.999))
    assert set(defaults) == {*sgd.defaults, *adamw.defaults}
    defaults["lr"] = 0.3
    defaults.update(betas=(0.5, 0.5), mine=1)
    assert defaults.setdefault("lr", 5) == 0.3
    assert (sgd.defaults["lr"], adamw.defaults["lr"], adamw.defaults["betas"]) == (0.3, 0.3, (0.5, 0.5))
    assert "betas" not in sgd.defaults
    assert (sgd.defaults["mine"], adamw.defaults["mine"]) == (1, 1)
    optimizer.defaults = {"lr": 0.4}
    assert adamw.defaults["lr"] == 0.4
    assert optimizer.defaults_of(optimizer.param_groups[2]) is adamw.defaults
    assert type(copy.deepcopy(defaults)) is dict


def test_state_is_live_and_finds_the_inner_one() -> None:
    params, optimizer = two()
    assert not optimizer.state
    assert optimizer.state.get(params[0], 5) == 5
    drive(optimizer, params, 2)
    adamw = optimizer.optimizers["AdamW"]
    assert set(optimizer.state) == {p for p in params[3:]}
    assert optimizer.state[params[3]] is adamw.state[params[3]]
    optimizer.state[params[3]]["step"].fill_(7)
    assert adamw.state[params[3]]["step"].item() == 7
    optimizer.state[params[0]] = {"momentum_buffer": None}
    assert params[0] in optimizer.optimizers["SGD"].state
    del optimizer.state[params[0]]
    assert params[0] not in optimizer.state
    with pytest.raises(KeyError):
        del optimizer.state[params[0]]
    assert repr(optimizer.state).startswith("{")
    optimizer.state = {p: {**entry} for p, entry in optimizer.state.items()}
    assert len(adamw.state) == len(optimizer.state) == 5
    optimizer.state = {}
    assert not adamw.state


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pairs
def test_resuming_is_not_stopping(make: tuple[Make, Make]) -> None:
    params = parameters()
    optimizer = combined(make, params)
    drive(optimizer, params, 4, missing=True)
    saved = through_a_file(optimizer.state_dict())
    resumed = combined(make, theirs := copies(params))
    resumed.load_state_dict(saved)
    drive(optimizer, params, range(4, 8), missing=True)
    drive(resumed, theirs, range(4, 8), missing=True)
    assert_equal(values(theirs), values(params))
    assert_equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_the_state_dict_is_torchs_with_one_running_number() -> None:
    params, optimizer = two()
    drive(optimizer, params, 2)
    saved = through_a_file(optimizer.state_dict())
    assert [g["params"] for g in saved["param_groups"]] == [[0], [1, 2], [3, 4, 5, 6, 7]]
    inner = optimizer.optimizers["AdamW"].state_dict()
    assert_equal({n: saved["state"][n + 3] for n in range(5)}, inner["state"])
    assert set(saved["state"]) == {3, 4, 5, 6, 7}
    assert saved["optimizers"] == {"SGD": {"groups": [0, 1]}, "AdamW": {"groups": [2]}}
    plain = {key: saved[key] for key in ("state", "param_groups")}  # of one who put them together by hand
    drive(optimizer, params, [2])
    expected = values(params)
    params, optimizer = two()
    drive(optimizer, params, 2)
    again = Combined([optim.SGD([{"params": (q := copies(params))[:1]}, {"params": q[1:3]}]), optim.AdamW(q[3:])])
    again.load_state_dict(plain)
    drive(again, q, [2])
    torch.testing.assert_close(values(q), expected)


def test_checkpoints_of_torchs_optimizers_and_of_ours_are_exchanged() -> None:
    def ours(p: Sequence[nn.Parameter]) -> Combined:
        return Combined([optim.SGD(p[:3], lr=0.1, momentum=0.9), optim.AdamW(p[3:], lr=0.05)])

    def theirs(p: Sequence[nn.Parameter]) -> Combined:
        return Combined([torch.optim.SGD(p[:3], lr=0.1, momentum=0.9), torch.optim.AdamW(p[3:], lr=0.05)])

    for before, after in ((ours, theirs), (theirs, ours)):
        params = parameters(torch.float64)
        first = before(params)
        drive(first, params, 3)
        q = copies(params)
        second = after(q)
        second.load_state_dict(through_a_file(first.state_dict()))
        drive(first, params, range(3, 6))
        drive(second, q, range(3, 6))
        torch.testing.assert_close(values(q), values(params), rtol=1e-12, atol=1e-13)


def test_a_group_that_was_added_in_between_finds_its_optimizer() -> None:
    """Saved as SGD, AdamW, SGD; loaded by one that has the groups of SGD one after the other."""
    params, optimizer = two()
    late = nn.Parameter(torch.ones(3, 2))
    optimizer.add_param_group({"params": [late], "optimizer": "SGD", "momentum": 0.5})
    drive(optimizer, [*params, late], 3)
    saved = through_a_file(optimizer.state_dict())
    q = copies([*params, late])
    groups = [{"params": q[:1]}, {"params": q[1:3]}, {"params": q[8:], "momentum": 0.5}]
    resumed = Combined([optim.SGD(groups), torch.optim.AdamW(q[3:8])])
    resumed.load_state_dict(saved)
    assert [g["lr"] for g in resumed.param_groups] == [0.1, 0.5, 0.1, 0.05]
    drive(optimizer, [*params, late], range(3, 6))
    drive(resumed, q, range(3, 6))
    assert_equal(values(q), values([*params, late]))


def test_names_match_in_another_order() -> None:
    named = [(f"p{i}", p) for i, p in enumerate(parameters())]
    source = Combined([optim.SGD(named[:3], momentum=0.9), optim.AdamW(named[3:])])
    drive(source, [p for _, p in named], 2)
    other = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    target = Combined([optim.SGD(other[2::-1], momentum=0.9), optim.AdamW(other[:2:-1])])
    target.load_state_dict(through_a_file(source.state_dict()))
    for name, p in other:
        assert_equal(dict(target.state[p]), dict(source.state[dict(named)[name]]), name)
    lenient = Combined([optim.SGD(other[:3]), optim.AdamW([("new", nn.Parameter(torch.ones(2))), *other[4:]])])
    with pytest.raises(ValueError, match="parameter names do not match"):
        lenient.load_state_dict(source.state_dict())
    with pytest.warns(UserWarning, match="loaded only what has the same name"):
        lenient.load_state_dict(source.state_dict(), strict=False)
    assert_equal(dict(lenient.state[other[7][1]]), dict(source.state[named[7][1]]))


def test_state_dicts_that_do_not_fit_change_nothing() -> None:
    params, optimizer = two()
    drive(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict())
    groups = [*optimizer.param_groups]
    other = Combined({"a": optim.SGD(parameters())})
    with pytest.raises(ValueError, match="saved of 'a', and here are 'SGD', 'AdamW'; name them alike"):
        optimizer.load_state_dict(other.state_dict())
    bare = {"state": {}, "param_groups": before["param_groups"][:2]}
    with pytest.raises(ValueError, match="different number of parameter groups: 2 saved, 3 here"):
        optimizer.load_state_dict(bare)
    moved = {**before, "optimizers": {"SGD": {"groups": [0]}, "AdamW": {"groups": [1, 2]}}}
    with pytest.raises(ValueError, match="SGD was saved with 1 parameter groups, and has 2"):
        optimizer.load_state_dict(moved)
    small = copy.deepcopy(before)
    small["param_groups"][0]["lr"] = 9.0
    small["param_groups"][2]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size"):  # of the second, when the first is loaded already
        optimizer.load_state_dict(small)
    assert_equal(optimizer.state_dict(), before)
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))


class Counting(torch.optim.SGD):
    """One whose state dict has more than torch's."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]


def test_what_else_an_optimizer_saves_is_kept() -> None:
    params = parameters()
    optimizer = Combined([optim.AdamW(params[3:]), Counting(params[:3], lr=0.1)])
    drive(optimizer, params, 3)
    resumed = Combined([optim.AdamW(params[3:]), Counting(params[:3], lr=0.1)])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.optimizers["Counting"].count == 3  # type: ignore[attr-defined]


def model_of(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


DISTRIBUTED: dict[str, tuple[Make, Make]] = {
    "Muon, AdamW": PAIRS["Muon, AdamW"],
    "Adagrad, AdamW": (lambda p: optim.Adagrad(p, lr=0.1), lambda p: optim.AdamW(p, lr=0.05)),
    "plain SGD, AdamW": (lambda p: optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.05)),
}


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("make", DISTRIBUTED.values(), ids=DISTRIBUTED.keys())
@pytest.mark.parametrize("way", ["combined", "to apart", "from apart"])
def test_distributed_checkpoints(make: tuple[Make, Make], flatten: bool, way: str) -> None:
    """By names, into one that has not stepped; and exchanged with the two optimizers as a list."""
    # torch refuses, if it is strict, that some parameters have state and others have none
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, strict=make is not DISTRIBUTED["plain SGD, AdamW"])

    def build(kind: str) -> tuple[nn.Module, Any]:
        model = model_of(3, 4, 2)
        parts = [make[0]([model[0].weight]), make[1]([model[0].bias, *model[1].parameters()])]
        return model, parts if kind == "apart" else Combined(parts)

    def go(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> None:
        drive_apart(optimizer if isinstance(optimizer, list) else [optimizer], [*model.parameters()], steps)

    model, optimizer = build("apart" if way == "from apart" else "combined")
    go(model, optimizer, range(4))
    saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
    twin, other = build("apart" if way == "to apart" else "combined")
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, saved, options=options)
    go(model, optimizer, range(4, 8))
    go(twin, other, range(4, 8))
    assert_equal(values([*twin.parameters()]), values([*model.parameters()]))


def test_saving_by_names_makes_no_step_of_one_that_has_stepped() -> None:
    """Plain SGD has no state, which must not pass for never having stepped."""
    model = model_of(3, 4, 2)
    optimizer = Combined([optim.SGD([model[0].weight], lr=0.1), optim.AdamW([model[0].bias, *model[1].parameters()])])
    drive(optimizer, [*model.parameters()], 2)
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved["state"]["0.bias"]["step"].item() == 2


@pairs
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_continue(make: tuple[Make, Make], duplicate: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = combined(make, params, max_norm=3.0)
    lr_scheduler.StepLR(optimizer, 10)  # puts a function into the instance
    drive(optimizer, params, 4)
    twin, theirs = duplicate((optimizer, params))
    drive(optimizer, params, range(4, 9))
    drive(twin, theirs, range(4, 9))
    assert_equal(values(theirs), values(params))
    assert {p for g in twin.param_groups for p in g["params"]} == set(theirs)
    assert_equal(twin.state_dict()["state"], optimizer.state_dict()["state"])


# --- torch's contract -------------------------------------------------------------------------------------------------


def test_it_is_an_optimizer_with_all_that_torchs_constructor_makes() -> None:
    _, optimizer = two()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not [name for name in vars(torch.optim.SGD(parameters())) if not hasattr(optimizer, name)]
    assert repr(optimizer).splitlines() == [
        "Combined of",
        "  SGD: 3 tensors, 67 elements",
        "    group 0: lr=0.1, weight_decay=0, 1 tensor, 24 elements",
        "    group 1: lr=0.5, weight_decay=0, 2 tensors, 43 elements",
        "  AdamW: 5 tensors, 47 elements",
        "    group 2: lr=0.05, weight_decay=0.01, 5 tensors, 47 elements",
    ]


@pairs
def test_a_closure_is_called_once_with_gradients_and_its_loss_returned(make: tuple[Make, Make]) -> None:
    params, calls = parameters(), 0
    optimizer = combined(make, params)

    def closure() -> Any:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss.detach()

    first = closure()
    with torch.no_grad():
        assert optimizer.step(closure) == first
    assert calls == 2
    assert optimizer.step() is None
    before = values(params)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_equal(values(params), before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params, optimizer = two()
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)


def test_hooks_fire_once_and_so_do_the_inner_ones() -> None:
    params, optimizer = two()
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda hooked, *rest: seen.append(f"{name} {type(hooked).__name__}")

    for one in (optimizer, *optimizer.optimizers.values()):
        one.register_step_pre_hook(note("pre"))
        one.register_step_post_hook(note("post"))
        one.register_state_dict_pre_hook(note("saves"))
        one.register_load_state_dict_post_hook(note("loaded"))
    drive(optimizer, params, 1)
    assert seen == ["pre Combined", "pre SGD", "post SGD", "pre AdamW", "post AdamW", "post Combined"]
    seen.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saves Combined", "saves SGD", "saves AdamW", "loaded SGD", "loaded AdamW", "loaded Combined"]
    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 42.0), kwargs))
    assert optimizer.step() == 42.0
    optimizer.register_state_dict_post_hook(lambda o, d: d | {"more": 1})
    assert optimizer.state_dict()["more"] == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: lr_scheduler.LambdaLR(o, [lambda t: 1 / (t + 1)] * 2),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 1.0], total_steps=20, cycle_momentum=False),
        lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.01),
        lambda o: Schedule(o, lr=cosine(10)),
        lambda o: Schedule(o, weight_decay=linear(10)),
    ],
    ids=["step", "cosine", "lambda", "sequential", "one cycle", "ours", "Schedule", "weight decay"],
)
def test_one_schedule_drives_groups_of_different_rates(make: Callable[[Any], Any]) -> None:
    """As one over an ordinary optimizer with such groups."""

    def groups() -> list[dict[str, Any]]:
        params = parameters()
        return [{"params": params[:3], "lr": 0.02, "weight_decay": 0.1}, {"params": params[3:], "lr": 0.5}]

    first, second = groups()
    optimizer = Combined([torch.optim.Muon([first]), optim.AdamW([second])])
    other = optim.AdamW(groups())
    ours, theirs = make(optimizer), make(other)
    for _ in range(8):
        for one, schedule in ((optimizer, ours), (other, theirs)):
            one.step()
            schedule.step()
        for key in ("lr", "weight_decay"):
            assert [g[key] for g in optimizer.param_groups] == pytest.approx([g[key] for g in other.param_groups])
    assert optimizer.optimizers["Muon"].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(optimizer.state_dict())  # new dicts
    ours.step()
    theirs.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([g["lr"] for g in other.param_groups])


def test_plateaus_and_followers() -> None:
    params, optimizer = two()
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        plateau.step(1.0)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.001, 0.005, 0.0005])
    follower = Schedule(optimizer, lr=linear(4), follow=True)
    own = Schedule(optimizer.optimizers["AdamW"], betas=(linear(4), None), follow=True)
    drive(optimizer, params, 2)
    assert (follower.last_epoch, own.last_epoch) == (2, 2)
    assert optimizer.param_groups[2]["betas"] == pytest.approx((0.45, 0.999))


# --- scaling and clipping ---------------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("unscale_first", [False, True], ids=["step", "unscale"])
@pytest.mark.parametrize("max_norm", [None, 2.0])
def test_a_grad_scaler_scales_and_skips(make: tuple[Make, Make], unscale_first: bool, max_norm: float | None) -> None:
    """A power of two changes no bits; an infinite gradient changes nothing, in either optimizer."""
    ours, theirs = parameters(), parameters()
    optimizer, others = combined(make, ours, max_norm=max_norm), combined(make, theirs, max_norm=max_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    scaler.scale(torch.ones(()))
    for step in range(7):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for p in ours:
            p.grad.mul_(scaler.get_scale())
        if broken := step in (2, 3):
            ours[step * 2].grad.view(-1)[0] = float("inf")
        before = copy.deepcopy((optimizer.state_dict()["state"], values(ours)))
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if broken:
            assert_equal((optimizer.state_dict()["state"], values(ours)), before)
        else:
            others.step()
        assert_equal(values(ours), values(theirs), f"step {step}")
    assert scaler.get_scale() == 1.0
    for one in (optimizer, *optimizer.optimizers.values()):
        assert not hasattr(one, "found_inf")
        assert not hasattr(one, "grad_scale")


def test_who_unscales_leaves_its_gradients_as_they_are() -> None:
    params = parameters()
    optimizer = combined(PAIRS["SGD, torch.AdamW"], params)
    assert optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    scaler.step(optimizer)
    assert [p.grad.unique().item() for p in params] == [4.0] * 3 + [1.0] * 5
    assert not Combined(
        [torch.optim.SGD(params), torch.optim.Muon([nn.Parameter(torch.ones(2, 2))])]
    )._step_supports_amp_scaling


def test_a_scale_set_by_hand_reaches_all_and_counts_together_with_theirs() -> None:
    ours, theirs = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Combined([optim.SGD([ours], lr=1.0), torch.optim.SGD([theirs], lr=1.0)])
    optimizer.grad_scale = 4.0
    ours.grad, theirs.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert (ours.tolist(), theirs.tolist()) == ([0.75] * 2, [0.75] * 2)
    [own, _] = optimizer.optimizers.values()
    own.grad_scale = 2.0  # type: ignore[attr-defined]
    ours.grad, theirs.grad = torch.ones(2), None
    optimizer.step()
    assert ours.tolist() == [0.625] * 2
    assert own.grad_scale == 2.0  # type: ignore[attr-defined]


@pairs
def test_max_norm_clips_by_the_norm_of_all(make: tuple[Make, Make]) -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer, others = combined(make, ours, max_norm=2.0), apart(make, theirs)
    for step in range(6):
        set_gradients(ours, step, missing=True)
        set_gradients(theirs, step, missing=True)
        for p in (*ours, *theirs):
            if step == 4 and p.grad is not None:
                p.grad.mul_(0.01)  # below the limit
        norm = nn.utils.clip_grad_norm_(theirs, 2.0)
        for other in others:
            other.step()
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        assert optimizer.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        torch.testing.assert_close(values(ours), values(theirs), rtol=1e-9, atol=1e-10)
        assert (norm.item() > 2.0) == (step != 4)


def test_numbers_on_a_device_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """There they stay tensors, for which the host does not wait: here on the CPU."""
    results = []
    for there in (False, True):
        if there:
            monkeypatch.setattr("schuss.wrappers.combined._host", lambda n: torch.as_tensor(n, dtype=torch.float64))
        params = parameters(torch.float64)
        optimizer = combined(PAIRS["SGD, torch.AdamW"], params, max_norm=2.0)
        optimizer.grad_scale = torch.tensor(4.0)
        drive(optimizer, params, 3)
        for p in params:
            p.grad = torch.full_like(p, float("inf"))
        results.append((values(params), optimizer.last_grad_norm))
        optimizer.step()
        assert all(p.isnan().all() for p in params)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-12)


def test_gradients_are_scaled_in_place_for_torchs_optimizers_only() -> None:
    params, optimizer = two(max_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    factor = 1 / (114**0.5 + 1e-6)
    assert optimizer.last_grad_norm == pytest.approx(114**0.5)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params[:3])
    assert all(p.grad.unique().item() == pytest.approx(factor) for p in params[3:])


def test_a_norm_that_is_no_number() -> None:
    for which in (0, 5):
        params, optimizer = two(max_norm=1.0, nonfinite="skip")
        drive(optimizer, params, 1)
        params[which].grad.fill_(float("nan"))
        before = copy.deepcopy((optimizer.state_dict()["state"], values(params)))
        optimizer.step()
        assert_equal((optimizer.state_dict()["state"], values(params)), before)
        assert optimizer.skipped_steps == 1
        assert optimizer.last_grad_norm.isnan()
        params, optimizer = two(max_norm=1.0, nonfinite="raise")
        set_gradients(params, 0)
        params[which].grad.fill_(float("inf"))
        before = values(params)
        with pytest.raises(RuntimeError, match="Combined: the norm of the gradients is inf, and nothing was changed"):
            optimizer.step()
        assert_equal(values(params), before)
        params, optimizer = two(max_norm=1.0)
        set_gradients(params, 0)
        params[which].grad.fill_(float("nan"))
        optimizer.step()
        assert all(p.isnan().all() for p in params)


def test_an_infinite_norm_does_what_torch_does() -> None:
    params, optimizer = two(max_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[0, 0] = float("inf")
    before = values(params)
    optimizer.step()
    assert params[0][0, 0].isnan()
    assert_equal(params[1].detach(), before[1])  # times 0


def test_clipping_with_mixed_precision_and_sparse_gradients() -> None:
    embedding = nn.Embedding(6, 2, sparse=True)
    half = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = Combined([torch.optim.SparseAdam([embedding.weight], lr=0.1), optim.SGD([half], lr=1.0)], max_norm=1.0)
    embedding(torch.tensor([1, 1])).sum().backward()  # four twos in a row would be a norm of 8**0.5
    half.grad = torch.full((4,), 2.0, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.last_grad_norm == pytest.approx(24**0.5)
    torch.testing.assert_close(half.detach().float(), torch.full((4,), -2 / 24**0.5), rtol=2**-8, atol=0)


# --- all or none ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [
    lambda p: optim.Adam(p), lambda p: torch.optim.Adam(p), lambda p: torch.optim.Adam(p, fused=True),
    lambda p: Lookahead(torch.optim.RMSprop(p)),
], ids=["ours", "torch", "fused", "wrapped"])  # fmt: skip
def test_a_gradient_that_the_second_refuses_is_found_before_the_first_steps(second: Make) -> None:
    p, embedding = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    optimizer = Combined([optim.SGD([p], lr=0.1), second([("table", embedding.weight)])])
    p.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients, and table has one"):
        optimizer.step()
    assert_equal((p.tolist(), embedding.weight.detach()), ([1.0, 1.0], before))
    assert not optimizer.state


def test_dense_gradients_of_who_takes_sparse_ones() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Combined([optim.SGD([p], lr=0.1), torch.optim.SparseAdam([q])])
    p.grad, q.grad = torch.ones(2), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients, and parameter 0 of group 0"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]


def test_dense_gradients_of_schuss_s_own_who_takes_sparse_ones() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Combined([optim.SGD([p], lr=0.1), optim.SparseAdam([q])])
    p.grad, q.grad = torch.ones(2), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]


def in_eval_mode(q: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = optim.ScheduleFreeSGD([q], lr=0.1)
    q.grad = torch.ones(2)
    optimizer.step()
    optimizer.eval()
    return optimizer


def at_its_averages(q: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = optim.SGD([q], lr=0.1, ema_decay=0.5)
    optimizer.inside = optimizer.averaged()  # type: ignore[attr-defined]
    optimizer.inside.__enter__()  # type: ignore[attr-defined]
    return optimizer


def at_its_slow_weights(q: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = Lookahead(optim.SGD([q], lr=0.1))
    optimizer.inside = optimizer.slow_weights()  # type: ignore[attr-defined]
    optimizer.inside.__enter__()  # type: ignore[attr-defined]
    return Lookahead(optimizer)


def without_a_second_pass(q: nn.Parameter) -> torch.optim.Optimizer:
    return SAM(optim.SGD([q], lr=0.1))


def after_a_broken_first_pass(q: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = SAM(optim.SGD([q], lr=0.1))

    def closure() -> float:
        q.grad = torch.full((2,), torch.inf)
        return 0.0

    optimizer.backward(closure)
    return optimizer


def with_several_rates(q: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = optim.Prodigy([{"params": [q]}, {"params": [nn.Parameter(torch.ones(2))]}])
    optimizer.param_groups[1]["lr"] = 2.0
    return optimizer


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (in_eval_mode, r"ScheduleFreeSGD: a step in eval mode, .* call optimizer\.train\(\)"),
        (at_its_averages, r"SGD: a step inside averaged\(\) would be undone"),
        (at_its_slow_weights, r"Lookahead: a step inside slow_weights\(\) would be undone"),
        (without_a_second_pass, r"SAM: step\(\) takes gradients of the perturbed parameters"),
        (after_a_broken_first_pass, "SAM: the norm of the gradients of the first pass is not finite"),
        (with_several_rates, "Prodigy: lr must be the same in all groups"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("nested", [False, True])
def test_who_is_not_ready_is_found_before_the_first_steps(second: Any, message: str, nested: bool) -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    inner = second(q)
    optimizer = Combined([optim.SGD([p], lr=0.5), Combined([inner]) if nested else inner])
    p.grad = torch.ones(2)
    q.grad = torch.ones(2) if q.grad is None else q.grad
    before, entries = q.tolist(), [*optimizer.state]
    with pytest.raises(RuntimeError if "Prodigy" not in message else ValueError, match=message) as caught:
        optimizer.step()
    assert not hasattr(caught.value, "__notes__")
    assert (p.tolist(), q.tolist()) == ([1.0, 1.0], before)
    assert [*optimizer.state] == entries


def test_a_broken_first_pass_that_a_scaler_skips() -> None:
    """It is the scaler that finds the infinity, as it would without Combined."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    sam = SAM(optim.SGD([q], lr=0.5))
    optimizer = Combined([optim.SGD([p], lr=0.5), sam])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))

    def closure() -> float:
        p.grad, q.grad = torch.ones(2), torch.full((2,), torch.inf)
        return 0.0

    sam.backward(closure)
    scaler.step(optimizer)
    scaler.update()
    assert (p.tolist(), q.tolist(), scaler.get_scale()) == ([1.0, 1.0], [1.0, 1.0], 2.0)


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise OSError("no more memory")


def test_who_has_stepped_when_one_fails_is_said() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    p.grad = q.grad = torch.ones(2)
    with pytest.raises(OSError, match="no more memory") as caught:
        Combined([optim.SGD([p], lr=0.5), Failing([q])]).step()
    assert caught.value.__notes__ == ["Combined: SGD made this step already, Failing did not finish it"]
    assert p.tolist() == [0.5, 0.5]
    with pytest.raises(OSError, match="no more memory") as caught:
        Combined([Failing([q]), optim.SGD([p], lr=0.5)]).step()
    assert not hasattr(caught.value, "__notes__")
    assert p.tolist() == [0.5, 0.5]


# --- with wrappers, and what schuss's optimizers have beside ----------------------------------------------------------


@pairs
def test_lookahead_round_it_is_lookahead_round_each(make: tuple[Make, Make]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Lookahead(combined(make, ours), k=2, alpha=0.3)
    others = [Lookahead(one, k=2, alpha=0.3) for one in apart(make, theirs)]
    drive(optimizer, ours, 3)
    drive_apart(others, theirs, range(3))
    resumed = Lookahead(combined(make, ours), k=2, alpha=0.3)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    drive(resumed, ours, range(3, 7))
    drive_apart(others, theirs, range(3, 7))
    assert_equal(values(ours), values(theirs))
    assert resumed.param_groups is resumed.inner.param_groups
    late = nn.Parameter(torch.ones(2, 2))
    resumed.add_param_group({"params": [late], "optimizer": "SGD" if make is PAIRS["Combined, int8"] else 0})
    assert resumed.param_groups[-1]["params"] == [late]
    assert resumed._key("k") in resumed.param_groups[-1]


def test_lookahead_round_a_lookahead_inside_has_keys_of_its_own() -> None:
    params = parameters()
    optimizer = Lookahead(Combined([Lookahead(optim.SGD(params[:3], lr=0.1)), optim.AdamW(params[3:])]), k=3)
    drive(optimizer, params, 4)
    counts = [optimizer.state[p].get("lookahead2_step").item() for p in params]
    assert counts == [1] * 8
    assert [("lookahead_step" in optimizer.state[p]) for p in params] == [True] * 3 + [False] * 5


def test_lookahead_round_it_keeps_what_rounding_saves() -> None:
    """500 steps of 1e-4 that each vanish in bfloat16: halved by alpha they are 0.025."""
    p, q = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = Lookahead(Combined([optim.SGD([p], lr=1e-4, rounding="kahan"), torch.optim.SGD([q], lr=0.0)]), k=5)
    for _ in range(500):
        p.grad = q.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["lookahead_slow"].mean().item() == pytest.approx(0.975, abs=3e-4)


def test_sam_round_it_is_sam_round_one_optimizer_of_all() -> None:
    def closure(params: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def evaluate() -> Any:
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss.detach()

        return evaluate

    ours, theirs = parameters(), parameters()
    a = SAM(Combined([optim.AdamW(ours[:3], lr=0.05), optim.AdamW(ours[3:], lr=0.05)]), rho=0.5)
    b = SAM(optim.AdamW(theirs, lr=0.05), rho=0.5)
    for _ in range(4):
        assert a.step(closure(ours, a)) == b.step(closure(theirs, b))
    assert_equal(values(ours), values(theirs))


def test_plans_of_all() -> None:
    params = parameters()
    optimizer = Combined({"big": torch.optim.Muon(params[:3]), "AdamW": optim.AdamW(params[3:])})
    plan = optimizer.plan()
    assert str(plan).splitlines()[:3] == [
        "big = Muon: 3 tensors, 67 elements, which its own code steps",
        "",
        "AdamW: 5 tensors with 47 elements in 1 group",
    ]
    assert [*plan] == ["big", "AdamW"]
    assert plan["big"] is None
    assert (len(plan), plan.state_bytes, plan.traffic_bytes) == (2, 8 * 47, 28 * 47)
    outer = Lookahead(Combined([Lookahead(optimizer), optim.SGD([nn.Parameter(torch.ones(2))])])).plan()
    assert "SGD: 1 tensor" in str(outer)
    assert outer.state_bytes == 8 * 47


def test_averages_of_all_or_none() -> None:
    params = parameters()
    optimizer = Combined([optim.SGD(params[:3], lr=0.1, ema_decay=0.5), optim.AdamW(params[3:], ema_decay=0.9)])
    drive(optimizer, params, 3)
    fast = values(params)
    with optimizer.averaged():
        assert_equal(values(params), [optimizer.state[p]["ema"] for p in params])
        with pytest.raises(RuntimeError, match="inside averaged"):
            optimizer.step()
    assert_equal(values(params), fast)
    with optimizer.optimizers["AdamW"].averaged():  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match=r"AdamW: a step inside averaged\(\)"):
            optimizer.step()
        assert_equal(values(params[:3]), fast[:3])
    half = Combined([optim.SGD(params[:3], ema_decay=0.5), torch.optim.AdamW(params[3:])])
    with pytest.raises(RuntimeError, match="no averages are kept by AdamW"), half.averaged():
        pass


# --- errors of the constructor ----------------------------------------------------------------------------------------


def test_what_is_no_list_of_optimizers() -> None:
    sgd = optim.SGD(parameters())
    for wrong, name in ((sgd, "SGD"), (optim.SGD, "SGD"), ("SGD", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^Combined: optimizers must be a list.*got {name}$"):
            Combined(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer 1 must be a torch\.optim\.Optimizer that has been made, got AdamW"):
        Combined([sgd, optim.AdamW])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="optimizer rest must be a torch"):
        Combined({"rest": parameters()})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="an optimizer's name must be a string, got 1"):
        Combined({1: sgd})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"^Combined: there must be one optimizer at least, got none$"):
        Combined([])


def test_a_parameter_in_two_optimizers() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="parameter 1 of group 0 is in SGD and in AdamW; a parameter must be in one"):
        Combined([optim.SGD(params[:3]), optim.AdamW([params[4], params[0]])])
    named = [("w", params[0])]
    with pytest.raises(ValueError, match=r"^Combined: w is in SGD and in SGD2"):
        Combined([optim.SGD(named), optim.SGD(named)])


def test_settings_that_one_of_several_cannot_have() -> None:
    params = parameters()
    with pytest.raises(
        ValueError, match=r"AdamW must have no max_norm of its own, got 1\.0.*Combined\(\.\.\., max_norm"
    ):
        Combined([optim.SGD(params[:3]), Lookahead(optim.AdamW(params[3:], max_norm=1.0))])
    with pytest.raises(ValueError, match="Combined must have no max_norm of its own"):
        Combined([Combined([optim.SGD(params)], max_norm=1.0)])
    for lbfgs in (torch.optim.LBFGS, optim.LBFGS):
        with pytest.raises(TypeError, match="LBFGS evaluates the loss several times in a step"):
            Combined([optim.SGD(params[:3]), lbfgs(params[3:])])
    with pytest.raises(ValueError, match=r"^Combined: max_norm must be None or in \(0, inf\], got -1$"):
        Combined([optim.SGD(params)], max_norm=-1)
    with pytest.raises(ValueError, match="nonfinite='skip' has no meaning without max_norm"):
        Combined([optim.SGD(params)], nonfinite="skip")


def test_of_makes_optimizers_from_groups_that_name_them() -> None:
    a, b, c = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    groups = [
        {"params": [b], "optimizer": "others", "lr": 0.3},
        {"params": iter([a]), "optimizer": "matrices"},
        {"params": c, "optimizer": "others"},
    ]
    optimizer = Combined.of(
        groups, matrices=optim.Muon, others=partial(optim.AdamW, lr=0.1), later=optim.SGD, max_norm=1.0
    )
    assert [[*g["params"]] for g in optimizer.param_groups] == [[b], [a], [c]]
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 1e-3, 0.1]
    assert [len(one.param_groups) for one in optimizer.optimizers.values()] == [1, 2, 0]
    assert [g["params"] for g in optimizer.state_dict()["param_groups"]] == [[0], [1], [2]]
    for p in (a, b, c):
        p.grad = torch.ones(2, 2)
    optimizer.step()
    optimizer.add_param_group({"params": [late := nn.Parameter(torch.ones(1))], "optimizer": "later", "lr": 1.0})
    late.grad = torch.ones(1)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    resumed = Combined.of(optimizer.param_groups, matrices=optim.Muon, others=optim.AdamW, later=optim.SGD)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="group 1 is for 'matrices', and there are 'others'; give matrices="):
        Combined.of(optimizer.param_groups, others=optim.AdamW)
    with pytest.raises(ValueError, match=r"group 0 has no key 'optimizer'.*param_groups"):
        Combined.of([{"params": [a]}], others=optim.AdamW)
    with pytest.raises(TypeError, match="optimizer x must be a torch"):
        Combined.of([{"params": [a], "optimizer": "x"}], x=lambda groups: None)  # type: ignore[arg-type,return-value]


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(x)))


class GPT(nn.Module):
    def __init__(self, tokens: int = 11, d: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, d), nn.Embedding(16, d)
        self.blocks = nn.Sequential(*(Block(d) for _ in range(blocks)))
        self.norm = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, tokens, bias=False)

    def forward(self, x: Tensor) -> Any:
        h = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return self.lm_head(self.norm(self.blocks(h)))


def gpt_run(**arguments: Any) -> tuple[GPT, Groups, Combined]:
    torch.manual_seed(0)
    model = GPT()
    groups = schuss.param_groups(model, lr=3e-3, matrices={"lr": 0.02, "weight_decay": 0.1}, **arguments)
    return model, groups, Combined.of(groups, matrices=optim.Muon, others=optim.AdamW, max_norm=1.0)


def loss_of(model: GPT, step: int) -> Tensor:
    x = torch.randint(11, (4, 1), generator=torch.Generator().manual_seed(step)).repeat(1, 9) + torch.arange(9)
    x = x % 11  # each token is the one before, and one
    return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def test_a_language_model_learns_with_muon_and_adamw() -> None:
    model, groups, optimizer = gpt_run()
    assert {
        a.names[0] for a in groups.assignments if a.settings["optimizer"] == "matrices"
    } == {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("qkv", "out", "up", "down")}  # fmt: skip
    first = loss_of(model, 0).item()
    for step in range(80):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert first > 2.2
    assert loss_of(model, 99).item() < 0.5 * first


def test_a_run_with_a_checkpoint_in_it_continues(tmp_path: Any) -> None:
    def steps(model: GPT, optimizer: Combined, schedule: Any, numbers: Iterable[int]) -> None:
        for step in numbers:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()

    def build() -> tuple[GPT, Combined, Any]:
        model, _, optimizer = gpt_run()
        return model, optimizer, Schedule(optimizer, lr=cosine(20))

    model, optimizer, schedule = build()
    steps(model, optimizer, schedule, range(5))
    schuss.save_checkpoint(tmp_path / "run.schuss", model=model, optimizer=optimizer, schedule=schedule)
    steps(model, optimizer, schedule, range(5, 9))
    twin, other, again = build()
    schuss.load_checkpoint(tmp_path / "run.schuss", model=twin, optimizer=other, schedule=again)
    steps(twin, other, again, range(5, 9))
    assert_equal(values([*twin.parameters()]), values([*model.parameters()]))


def test_fit_trains_with_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    data = [(x[i : i + 16], x[i : i + 16].sum(1, keepdim=True)) for i in range(0, 64, 16)]
    groups = schuss.param_groups(model, lr=0.01, matrices={"lr": 0.05})
    optimizer = Combined.of(groups, matrices=optim.Muon, others=optim.AdamW)
    history = schuss.fit(
        model, data, nn.functional.mse_loss, optimizer, epochs=10, schedule=Schedule(optimizer, lr=linear(40))
    )
    assert history.losses[-1] < 0.2 * history.losses[0]


def test_matrices_that_are_frozen_at_first_join_their_optimizer() -> None:
    """Muon starts with nothing. New groups have the rate of their own optimizer, at the schedule's place."""
    torch.manual_seed(0)
    model = GPT()
    groups = schuss.param_groups(model, matrices={"weight_decay": 0.1}, freeze="blocks")
    optimizer = Combined.of(groups, matrices=partial(optim.Muon, lr=0.02), others=partial(optim.AdamW, lr=0.004))
    assert not optimizer.optimizers["matrices"].param_groups
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    loss_of(model, 0).backward()
    optimizer.step()
    schedule.step()
    before = len(groups)
    new = schuss.unfreeze(optimizer, groups, scheduler=schedule)
    assert optimizer.param_groups[before:] == new
    rates = {group["optimizer"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"matrices": pytest.approx(0.01), "others": pytest.approx(0.002)}
    assert [*optimizer.optimizers["matrices"].param_groups[0]["param_names"]] == [
        f"blocks.{i}.{name}.weight" for i in range(2) for name in ("qkv", "out", "up", "down")
    ]
    weight = model.blocks[0].qkv.weight
    start = weight.detach().clone()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    assert not torch.equal(weight, start)
    with pytest.raises(ValueError, match="no parameter of these groups is frozen"):
        schuss.unfreeze(optimizer, groups, scheduler=schedule)
