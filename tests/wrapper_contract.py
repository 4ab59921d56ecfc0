"""What users of an optimizer rely on, of a wrapper round any optimizer: subclass `WrapperContract` to test one."""

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cases import assert_equal, parameters, randn, set_gradients
from schuss import optim, testing
from schuss.wrappers import SAM, Lookahead, Wrapper
from schuss.wrappers.base import _chain

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


class Lazy(torch.optim.Optimizer):
    """As many are written: any state at all means that it has been made, and `step` takes no closure."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = self.state[p]
                if len(kept) == 0:
                    kept["sum"], kept["count"] = torch.zeros_like(p), 0
                kept["sum"] += p.grad
                kept["count"] += 1
                p.sub_(kept["sum"], alpha=group["lr"] / kept["count"])


INNERS: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: optim.AdamW(p, lr=0.05),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "int8": lambda p: optim.AdamW(p, lr=0.05, state_dtype="int8"),
    "torch.SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "torch.AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "torch.fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "torch.RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "torch.Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Lazy": Lazy,
    "Lookahead": lambda p: Lookahead(optim.AdamW(p, lr=0.05), k=2, alpha=0.8),
    "SAM": lambda p: SAM(optim.AdamW(p, lr=0.05), rho=0.5),
}
inners = pytest.mark.parametrize("make", INNERS.values(), ids=INNERS.keys())
stateful = pytest.mark.parametrize(
    "make",
    [INNERS[name] for name in ("SGD", "torch.AdamW", "Lookahead", "SAM")],
    ids=["SGD", "torch.AdamW", "Lookahead", "SAM"],
)


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(params: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def values(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def second_pass(optimizer: torch.optim.Optimizer) -> None:
    """For a SAM at any depth: the gradients that there are, once more."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for sam in _chain(optimizer):
        if isinstance(sam, SAM) and any(p.grad is not None for p in params):
            gradients = [p.grad for p in params]
            with sam.perturbed():
                for p, g in zip(params, gradients, strict=True):
                    p.grad = g


def drive(
    optimizer: torch.optim.Optimizer,
    params: Sequence[torch.Tensor],
    steps: Iterable[int] | int = 8,
    *,
    missing: bool = False,
) -> None:
    """Make steps with given gradients, in as many passes as the optimizer wants."""
    for step in range(steps) if isinstance(steps, int) else steps:
        set_gradients(params, step, missing=missing)
        second_pass(optimizer)
        optimizer.step()


class WrapperContract:
    """Tests of a wrapper.

    Attributes:
        cls: the class.
        settings: its arguments.
        checked: the class, or one whose `step` needs one pass alone.
        evaluations: how often a step calls its closure.
    """

    cls: ClassVar[Callable[..., Wrapper]]
    settings: ClassVar[Mapping[str, Any]] = {}
    checked: ClassVar[Callable[..., Wrapper]]
    evaluations: ClassVar[int] = 1

    def wrap(self, inner: torch.optim.Optimizer, **settings: Any) -> Wrapper:
        return type(self).cls(inner, **{**self.settings, **settings})

    @pytest.mark.parametrize("check", [c for c in testing.CHECKS if c.__name__ in {
        "back_ends_agree", "groups_do_not_matter", "threads_do_not_matter", "layout_does_not_matter", "gradients_stay",
        "maximize_is_the_negated_gradient", "resuming_is_not_stopping", "copies_continue",
    }], ids=lambda c: c.__name__)  # fmt: skip
    def test_generic_checks(self, check: Callable[..., None]) -> None:
        def make(groups: Any, **options: Any) -> Wrapper:
            return type(self).checked(optim.AdamW(groups, **options), **self.settings)

        make.takes, make.takes_complex = optim.AdamW.takes, optim.AdamW.takes_complex
        check(make, {"lr": 0.01})

    # --- checkpoints and copies -------------------------------------------------------------------------------------

    @inners
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_resuming_after_any_step_is_not_stopping(self, make: Make, dtype: torch.dtype) -> None:
        whole = parameters(dtype=dtype)
        optimizer = self.wrap(make(whole))
        saved = []
        for step in range(8):
            saved.append((through_a_file(optimizer.state_dict()), copies(whole)))
            drive(optimizer, whole, [step], missing=True)
        for step, (state, params) in enumerate(saved):
            resumed = self.wrap(make(params))
            resumed.load_state_dict(state)
            assert resumed.param_groups is resumed.inner.param_groups
            assert all(resumed.inner.state.values())  # an empty one may pass for state that has been made
            drive(resumed, params, range(step, 8), missing=True)
            assert_equal(values(params), values(whole), f"after step {step}")
            assert_equal(resumed.state_dict()["state"], optimizer.state_dict()["state"], f"after step {step}")

    @inners
    def test_state_dict_is_torchs_layout(self, make: Make) -> None:
        params = parameters()
        optimizer = self.wrap(make(params))
        drive(optimizer, params, 3)
        saved, inner, prefix = optimizer.state_dict(), optimizer.inner.state_dict(), optimizer._prefix
        assert list(saved) == ["state", "param_groups"]
        assert set(inner["state"]) <= set(saved["state"]) <= {0, 1, 2}
        assert saved["param_groups"][0]["params"] == [0, 1, 2]
        assert_equal(saved["param_groups"], inner["param_groups"])
        for index, kept in saved["state"].items():
            assert type(kept) is dict
            theirs = {key: value for key, value in kept.items() if not key.startswith(prefix)}
            assert_equal(theirs, inner["state"].get(index, {}))
        group = saved["param_groups"][0]
        assert {name: group[prefix + name] for name in self.settings} == self.settings

    @inners
    def test_the_inner_optimizers_checkpoint_loads(self, make: Make) -> None:
        params = parameters()
        inner = make(params)
        drive(inner, params, 3)
        optimizer = self.wrap(make(ours := copies(params)))
        drive(optimizer, ours, [7])  # to have something to forget
        optimizer.load_state_dict(through_a_file(inner.state_dict()))
        assert_equal(optimizer.state_dict()["state"], inner.state_dict()["state"])
        assert set(optimizer._settings) <= set(optimizer.param_groups[0])
        drive(optimizer, ours, 2)

    @inners
    def test_its_checkpoint_continues_the_inner_optimizer_alone(self, make: Make) -> None:
        params = parameters()
        optimizer = self.wrap(make(params))
        drive(optimizer, params, 3)
        theirs, oracle = copies(params), copies(params)
        inner, expected = make(theirs), make(oracle)
        inner.load_state_dict(through_a_file(optimizer.state_dict()))
        expected.load_state_dict(optimizer.inner.state_dict())
        drive(inner, theirs, range(3, 6))
        drive(expected, oracle, range(3, 6))
        assert_equal(values(theirs), values(oracle))

    def test_a_torch_checkpoint_goes_into_ours_and_back(self) -> None:
        params = parameters()
        source = self.wrap(torch.optim.AdamW(params, lr=0.05))
        drive(source, params, 6)
        target = self.wrap(optim.AdamW(ours := copies(params), lr=0.05))
        target.load_state_dict(through_a_file(source.state_dict()))
        drive(source, params, range(6, 10))
        drive(target, ours, range(6, 10))
        for p, q in zip(ours, params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)

    def test_names_match_state_in_another_order(self) -> None:
        there = {name: torch.nn.Parameter(randn(n, seed=n)) for name, n in (("a", 2), ("b", 3))}
        here = {name: torch.nn.Parameter(there[name].detach().clone()) for name in ("b", "a")}
        source = self.wrap(optim.AdamW(list(there.items())))
        target = self.wrap(optim.AdamW(list(here.items())))
        drive(source, [*there.values()], 1)
        target.load_state_dict(through_a_file(source.state_dict()))
        for name, p in here.items():
            assert_equal(dict(target.state[p]), dict(source.state[there[name]]), name)

    @pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
    @inners
    def test_distributed_checkpoint_state_dicts(self, make: Make, flatten: bool) -> None:
        """By names, into an optimizer that has not stepped yet; continuing is not stopping."""
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)

        def build() -> tuple[torch.nn.Module, Wrapper]:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
            return model, self.wrap(make(model.parameters()))

        model, optimizer = build()
        drive(optimizer, [*model.parameters()], 4)
        saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
        twin, other = build()
        twin.load_state_dict(model.state_dict())
        set_optimizer_state_dict(twin, other, saved, options=options)
        drive(optimizer, [*model.parameters()], range(4, 10))
        drive(other, [*twin.parameters()], range(4, 10))
        assert_equal(values([*twin.parameters()]), values([*model.parameters()]))

    @inners
    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
    )
    def test_copies_continue(self, make: Make, duplicate: Callable[[Any], Any]) -> None:
        params = parameters()
        optimizer = self.wrap(make(params))
        torch.optim.lr_scheduler.StepLR(optimizer, 10)  # puts a function into the instance
        drive(optimizer, params, 4)
        twin, theirs = duplicate((optimizer, params))
        drive(optimizer, params, range(4, 9))
        drive(twin, theirs, range(4, 9))
        assert_equal(values(theirs), values(params))
        assert {p for g in twin.param_groups for p in g["params"]} == set(theirs)
        assert_equal(twin.state_dict()["state"], optimizer.state_dict()["state"])

    # --- torch's contract -------------------------------------------------------------------------------------------

    @inners
    def test_it_is_an_optimizer_with_all_that_torchs_constructor_makes(self, make: Make) -> None:
        optimizer = self.wrap(make(parameters()))
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert not [name for name in vars(torch.optim.SGD(parameters())) if not hasattr(optimizer, name)]
        assert optimizer.param_groups is optimizer.inner.param_groups
        assert optimizer.defaults is optimizer.inner.defaults
        assert repr(optimizer).startswith(f"{type(optimizer).__name__} of {type(optimizer.inner).__name__} ")
        assert all(f"{key}: {value}" in repr(optimizer) for key, value in optimizer._settings.items())

    def test_what_is_assigned_reaches_the_inner_optimizer(self) -> None:
        optimizer = self.wrap(optim.SGD(parameters(), lr=0.1))
        groups = optimizer.param_groups = [*optimizer.param_groups]
        defaults = optimizer.defaults = optimizer.defaults | {"lr": 0.2}
        assert optimizer.inner.param_groups is groups
        assert optimizer.inner.defaults is defaults

    @inners
    def test_parameters_keep_their_memory(self, make: Make) -> None:
        """Views, CUDA graphs and buckets hold addresses; and autograd notices each write."""
        params = parameters(("contiguous", "transposed", "gaps", "offset", "channels-last", "empty", "0-d"))
        optimizer = self.wrap(make(params))
        addresses, versions = [p.data_ptr() for p in params], [p._version for p in params]
        drive(optimizer, params, 3)
        assert [p.data_ptr() for p in params] == addresses
        moved = [p for p in params if p.numel()]
        assert all(p._version > v for p, v in zip(params, versions, strict=True) if p in set(moved))

    @pytest.mark.parametrize("through_inner", [False, True], ids=["wrapper", "inner"])
    @stateful
    def test_groups_added_to_either_are_in_both(self, make: Make, through_inner: bool) -> None:
        params, late = parameters(), parameters(("contiguous",), seed=9)
        optimizer = self.wrap(make(params))
        drive(optimizer, params, 2)
        (optimizer.inner if through_inner else optimizer).add_param_group({"params": late})
        assert optimizer.param_groups is optimizer.inner.param_groups
        assert {key: optimizer.param_groups[1][key] for key in optimizer._settings} == optimizer._settings
        before = values(late)
        drive(optimizer, [*params, *late], [2])
        assert not torch.equal(late[0], before[0])

    @stateful
    @pytest.mark.parametrize("on", ["wrapper", "inner"])
    def test_schedulers_of_either_drive_both(self, make: Make, on: str) -> None:
        params = parameters()
        optimizer = self.wrap(make(params))
        driven = optimizer if on == "wrapper" else optimizer.inner
        schedule = torch.optim.lr_scheduler.StepLR(driven, 1, gamma=0.5)
        lr = optimizer.param_groups[0]["lr"]
        drive(optimizer, params, 1)
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == optimizer.inner.param_groups[0]["lr"] == lr / 2
        cycle = torch.optim.lr_scheduler.OneCycleLR(driven, max_lr=1.0, total_steps=10)
        drive(optimizer, params, [1])
        cycle.step()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(driven, patience=0)
        for _ in range(3):
            plateau.step(1.0)
        assert plateau.get_last_lr() == [optimizer.param_groups[0]["lr"]]

    def test_schedulers_reach_a_loaded_optimizer(self) -> None:
        params = parameters()
        optimizer = self.wrap(torch.optim.AdamW(params, lr=0.4))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        drive(optimizer, params, 1)
        schedule.step()
        optimizer.load_state_dict(optimizer.state_dict())
        schedule.step()
        assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.1)

    @inners
    def test_hooks_of_the_wrapper_fire_once_and_so_do_the_inner_ones(self, make: Make) -> None:
        params = parameters()
        optimizer = self.wrap(make(params))
        seen: list[str] = []

        def note(name: str) -> Callable[..., None]:
            return lambda hooked, *rest: seen.append(f"{name} {type(hooked).__name__}")

        handles = [register_optimizer_step_pre_hook(note("any")), register_optimizer_step_post_hook(note("any"))]
        optimizer.register_step_pre_hook(note("pre"))
        optimizer.register_step_post_hook(note("post"))
        optimizer.inner.register_step_pre_hook(note("pre inner"))
        optimizer.inner.register_step_post_hook(note("post inner"))
        try:
            drive(optimizer, params, 1)
        finally:
            for handle in handles:
                handle.remove()
        outer, inner = type(optimizer).__name__, type(optimizer.inner).__name__
        innermost = type(getattr(optimizer.inner, "inner", optimizer.inner)).__name__
        assert sorted(seen) == sorted(
            [f"pre {outer}", f"post {outer}", f"pre inner {inner}", f"post inner {inner}", *[f"any {innermost}"] * 2]
        )
        assert seen[0].startswith(("pre", "any"))
        assert seen[-1] == f"post {outer}" or seen[-1].startswith("any")

    def test_a_step_hook_sees_and_replaces_the_arguments(self) -> None:
        params = parameters()
        optimizer = self.wrap(optim.SGD(params, lr=0.1))
        optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 42.0), kwargs))
        assert optimizer.step() == 42.0
        assert optimizer.step(lambda: 1.0) == 42.0

    def test_hooks_of_checkpoints(self) -> None:
        params = parameters()
        optimizer = self.wrap(optim.SGD(params, lr=0.1))
        seen = []
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
        optimizer.register_state_dict_post_hook(lambda o, d: d | {"more": 1})
        optimizer.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "more"})
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
        optimizer.inner.register_state_dict_pre_hook(lambda o: seen.append("inner"))
        saved = optimizer.state_dict()
        assert saved["more"] == 1
        optimizer.load_state_dict(saved)
        assert seen == ["pre", "inner", "loaded"]

    @inners
    def test_a_closure_is_called_with_gradients_and_its_first_loss_returned(self, make: Make) -> None:
        params = parameters()
        optimizer = self.wrap(make(params))
        takes_none = isinstance(optimizer.inner, Lazy) and self.evaluations == 1
        calls = 0

        def closure() -> Any:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss.detach()

        before = closure()
        optimizer.zero_grad()
        calls = 0
        if takes_none:
            with pytest.raises(TypeError):
                optimizer.step(closure)
        else:
            start = values(params)
            with torch.no_grad():
                assert optimizer.step(closure) == before
            twice = any(isinstance(inner, SAM) for inner in _chain(optimizer.inner))
            assert calls == self.evaluations * (2 if twice else 1)
            assert not any(torch.equal(p, old) for p, old in zip(params, start, strict=True))
        optimizer.zero_grad()
        assert optimizer.step() is None

    def test_a_closure_that_raises_changes_nothing(self) -> None:
        params = parameters()
        optimizer = self.wrap(optim.SGD(params, lr=0.1, momentum=0.9))
        drive(optimizer, params, 1)
        before = copy.deepcopy((values(params), optimizer.state_dict()["state"]))
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)
        assert_equal((values(params), optimizer.state_dict()["state"]), before)

    @inners
    @pytest.mark.parametrize("unscale_first", [False, True], ids=["step", "unscale"])
    def test_a_grad_scaler_scales_and_skips(self, make: Make, unscale_first: bool) -> None:
        """An infinite gradient changes nothing: parameters, state of either, or what is counted."""
        ours, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
        optimizer, unscaled = self.wrap(make(ours)), self.wrap(make(theirs))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        scaler.scale(torch.ones(()))
        for step in range(7):
            set_gradients(ours, step)
            broken = step in (0, 2, 3)
            for p in ours:
                p.grad.mul_(scaler.get_scale())
            if broken:
                ours[0].grad.view(-1)[0] = float("inf")
            before = copy.deepcopy((optimizer.state_dict()["state"], values(ours), scaler.get_scale()))
            second_pass(optimizer)
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if broken:
                if step:  # before the first step fused optimizers make their state whatever happens
                    assert_equal((optimizer.state_dict()["state"], values(ours)), before[:2])
                assert scaler.get_scale() == before[2] / 2
            else:
                drive(unscaled, theirs, [step])
            assert_equal(values(ours), values(theirs), f"step {step}")
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer.inner, "grad_scale")

    def test_who_unscales_in_its_step_is_asked_to(self) -> None:
        assert self.wrap(optim.SGD(parameters()))._step_supports_amp_scaling
        assert self.wrap(Lookahead(torch.optim.AdamW(parameters(), fused=True)))._step_supports_amp_scaling
        assert not self.wrap(torch.optim.AdamW(parameters()))._step_supports_amp_scaling

    def test_a_scale_set_by_hand_reaches_the_inner_optimizer(self) -> None:
        p = torch.nn.Parameter(torch.ones(2))
        optimizer = self.wrap(self.wrap(optim.SGD([p], lr=1.0)))
        optimizer.grad_scale = 4.0
        p.grad = torch.ones(2)
        second_pass(optimizer)
        optimizer.step()
        assert p.tolist() == [0.75] * 2
        assert optimizer.inner.inner.grad_scale == 4.0

    def test_steps_that_the_inner_optimizer_skips_are_told(self) -> None:
        params = parameters()
        optimizer = self.wrap(Lookahead(optim.SGD(params, lr=0.1, max_norm=1.0, nonfinite="skip")))
        drive(optimizer, params, 1)
        second_pass(optimizer)
        params[0].grad.fill_(float("nan"))
        before = values(params)
        optimizer.step()
        assert_equal(values(params), before)
        assert optimizer.skipped_steps == optimizer.inner.skipped_steps == 1

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad(self, set_to_none: bool) -> None:
        params = parameters()
        optimizer = self.wrap(optim.SGD(params))
        set_gradients(params, 0)
        optimizer.zero_grad(set_to_none)
        assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)

    @inners
    def test_state_is_live_and_shows_both(self, make: Make) -> None:
        params = parameters()
        optimizer = self.wrap(make(params))
        if not optimizer.inner.state:
            assert not optimizer.state
            assert len(optimizer.state) == 0
        drive(optimizer, params, 1)
        assert set(optimizer.state) == set(optimizer.inner.state) | set(optimizer._own)
        for p in optimizer.inner.state:
            assert p in optimizer.state
            for name, value in optimizer.inner.state[p].items():
                assert optimizer.state[p][name] is value
            optimizer.state[p]["note"] = 1
            assert optimizer.inner.state[p].pop("note") == 1

    @inners
    def test_state_that_is_replaced_counts(self, make: Make) -> None:
        """As trainers do that move it to another device, one parameter after the other or at once."""
        ours, theirs = parameters(), parameters()
        a, b = (self.wrap(make(params)) for params in (ours, theirs))
        drive(a, ours, 2)
        drive(b, theirs, 2)
        for p, kept in b.state.items():
            b.state[p] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kept.items()}
        drive(a, ours, [2, 3])
        drive(b, theirs, [2, 3])
        b.state = {p: {**kept} for p, kept in b.state.items()}
        assert_equal(a.state_dict()["state"], b.state_dict()["state"])
        drive(a, ours, range(4, 8))
        drive(b, theirs, range(4, 8))
        assert_equal(values(theirs), values(ours))
        if b.state:
            del b.state[theirs[0]]
        assert theirs[0] not in b.state
        assert b.state.get(theirs[0], 5) == 5
        with pytest.raises(KeyError):
            del b.state[theirs[0]]
        assert repr(b.state).startswith("{")
        b.state = {}
        assert not b.state
        assert not b.state_dict()["state"]

    def test_it_keeps_nothing_alive(self) -> None:
        params = parameters()
        optimizer = self.wrap(torch.optim.AdamW(params))
        drive(optimizer, params, 2)
        dead = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert dead() is None

    def test_torch_does_not_hook_its_step_a_second_time(self) -> None:
        optimizer = self.wrap(optim.SGD(parameters()))
        assert type(optimizer).step is Wrapper.step
        assert list(inspect.signature(type(optimizer).step).parameters) == ["self", "closure"]

    # --- what schuss's optimizers have beside, and errors -----------------------------------------------------------

    def test_what_only_schuss_has_is_handed_on(self) -> None:
        params = parameters()
        optimizer = self.wrap(self.wrap(optim.SGD(params, lr=0.1, ema_decay=0.5, max_norm=1.0)))
        drive(optimizer, params, 2)
        assert "SGD" in str(optimizer.plan())
        assert optimizer.last_grad_norm is optimizer.inner.inner.last_grad_norm is not None
        fast = values(params)
        with optimizer.averaged():
            assert_equal(values(params), [optimizer.state[p]["ema"] for p in params])
            with pytest.raises(RuntimeError, match="inside averaged"):
                drive(optimizer, params, 1)
        assert_equal(values(params), fast)
        other = self.wrap(torch.optim.SGD(parameters()))
        owner = type(other).__name__
        assert (other.last_grad_norm, other.skipped_steps) == (None, 0)
        with pytest.raises(AttributeError, match=rf"{owner}: plan\(\) is of schuss's optimizers; SGD has none"):
            other.plan()
        with pytest.raises(AttributeError, match=r"averaged\(\)"):
            other.averaged()

    def test_what_is_no_optimizer_is_an_error(self) -> None:
        with pytest.raises(TypeError, match=r": the inner optimizer must be a torch\.optim\.Optimizer.*got SGD"):
            self.wrap(optim.SGD)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"got list"):
            self.wrap(parameters())  # type: ignore[arg-type]

    def test_groups_that_the_inner_optimizer_refuses_are_not_added(self) -> None:
        optimizer = self.wrap(optim.SGD(parameters()))
        late = {"params": parameters(("0-d",))}
        with pytest.raises(ValueError, match=r"SGD: lr must be in"):
            optimizer.add_param_group({**late, "lr": -1})
        with pytest.raises(TypeError):
            optimizer.add_param_group(late["params"])  # type: ignore[arg-type]
        assert len(optimizer.param_groups) == 1
