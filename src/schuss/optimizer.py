"""The one `torch.optim.Optimizer` subclass: torch's contract on top of rules, the engine underneath."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, StateDict

from schuss import bounds
from schuss.engine.clip import SkippedStep
from schuss.engine.pieces import EMA
from schuss.engine.process import uninterrupted
from schuss.options import Options, Settings
from schuss.roles import check_dimensions, names_of
from schuss.rule import Rule, State

if TYPE_CHECKING:
    from schuss.engine.plan import Plan

__all__ = ["Number", "Optimizer", "Options"]

Number = float | torch.Tensor


def _is_number(state: str | State) -> bool:
    return isinstance(state, State) and state.number


def _no_scalars() -> Mapping[str, Any]:
    return {}


class Optimizer(torch.optim.Optimizer):
    """Base of all optimizers: subclass it, declare a rule, and every back end runs it.

    A subclass has an `__init__` that hands its hyperparameters to this one, and these class attributes:

    Attributes:
        rule: static method `rule(p, g, <states>, <scalars>)`: the formula, in the words of `schuss.formula`, for one
            element. Returns the new p, then the new states in the order of its arguments.
        scalars: static method `scalars(step, first, <scalar states>, <hyperparameters>)`, any of them, by name:
            float64 numbers for `rule` that change per step, as a dict. Hyperparameters that the rule takes by name
            need not be returned. The default returns nothing.
        states: letter in `rule` -> name in `optimizer.state[p]`, or a `State`.
        scalar_states: name in `optimizer.state[p]` -> initial value, of numbers that are kept per parameter.
        has_step: whether `optimizer.state[p]["step"]` is kept (default True).
        bounds: hyperparameter -> interval such as "[0, 1)".
        choices: hyperparameters that are no numbers, or are settings of a function of matrices: `rule` is given them as
            they are, and may branch on them.
        decay: what a hyperparameter `weight_decay` means: "l2", "decoupled", or None: the rule's own business.
        dimensions: how many each of its parameters may have, as an interval such as "[2, inf)"; by default any number.
        takes_complex: whether its parameters may be complex (default True).
        source: authors, year and arXiv id.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        defaults: every hyperparameter with its default value.
        options: see `Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds; no parameters, or the same one twice.
        TypeError: an unknown keyword.
    """

    rule: ClassVar[Callable[..., Any]]
    scalars: ClassVar[Callable[..., Mapping[str, Any]]] = staticmethod(_no_scalars)
    states: ClassVar[Mapping[str, str | State]] = {}
    scalar_states: ClassVar[Mapping[str, float | str]] = {}
    has_step: ClassVar[bool] = True
    bounds: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    choices: ClassVar[tuple[str, ...]] = ()
    decay: ClassVar[Literal["l2", "decoupled"] | None] = None
    dimensions: ClassVar[str] = "[0, inf)"
    takes_complex: ClassVar[bool] = True
    source: ClassVar[str] = ""
    after_step: ClassVar[Callable[..., None] | None] = None
    """Method `after_step(params)`: what a rule does to states once all parameters with a gradient, which it is given,
    have been updated; for work that not every step has, such as new bases of matrices."""
    eager_state: ClassVar[bool] = False
    """Whether state is made by the constructor, not by the first step."""

    _step_supports_amp_scaling = True  # GradScaler leaves the unscaling, and skipping a bad step, to `step`

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Any) -> None:
        states = {s if isinstance(s, str) else s.name for s in type(self).states.values() if not _is_number(s)}
        self._options = Settings.parse(type(self).__name__, options, states, own=_own_arguments(type(self)))
        self._reset()
        self._rule = self._declare(defaults)
        self._check(defaults)
        super().__init__(params, defaults)
        self._options.check_parameters(type(self).__name__, [p for g in self.param_groups for p in g["params"]])
        if self._options.backend in ("auto", "numba") and any(
            p.device.type == "cpu" for g in self.param_groups for p in g["params"]
        ):
            from schuss.engine.numba import prepare

            prepare()

    @classmethod
    def declared(cls, defaults: Mapping[str, Any]) -> Rule:
        """What this class declares, as the engine reads it."""
        states = {n: s if isinstance(s, State) else State(s) for n, s in cls.states.items()}
        return Rule(
            cls.__name__,
            cls.rule,
            cls.scalars,
            states,
            cls.scalar_states,
            cls.has_step,
            cls.decay,
            defaults,
            cls.choices,
            [n for n, p in inspect.signature(cls).parameters.items() if isinstance(p.default, bool)],
        )

    def _reset(self) -> None:
        self._plan: Plan | None = None
        self.last_grad_norm: torch.Tensor | None = None
        """With max_norm: the norm of all gradients of the last step, before clipping; on their device."""
        self._skipped, self._is_averaged = 0, False
        self._skipped_there: torch.Tensor | None = None
        self._captured: list[Any] = []
        """What CUDA graphs read when they are replayed; it must outlive the plan that they were captured with."""

    def _declare(self, defaults: Mapping[str, Any]) -> Rule:
        """The rule of this optimizer, with what its options add."""
        return type(self).declared(defaults).with_options(self._options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        """Raise on hyperparameters that are wrong together; each is within its bounds already."""

    @classmethod
    def takes(cls, p: torch.Tensor) -> bool:
        """Whether a tensor can be one of its parameters."""
        return p.dim() in bounds.Interval.parse(cls.dimensions) and (cls.takes_complex or not p.is_complex())

    @classmethod
    def sparse_form(cls, group: Mapping[str, Any]) -> Literal["rows", "dense", "either"] | None:
        """How a sparse gradient is used: only its rows are touched, it is made dense, or (None) it is an error.

        "either" says that the two are the same, since elements whose gradient is 0, and their states, stay as they are:
        its rows are touched, and it is made dense where an average needs all rows.
        """
        return None

    # --- torch's contract -------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # nothing in it is for a tracer; `torch.compiler.disable` would import one with schuss
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, in one pass over memory.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient that does not fit its parameter. Nothing has been changed then.
        """
        self._check_ready()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        skip: torch.Tensor | None = getattr(self, "found_inf", None)
        scale: torch.Tensor | float | None = getattr(self, "grad_scale", None)
        gain: float | torch.Tensor = 1.0
        if all(group.get("capturable") for group in self.param_groups):  # the host need not know: it does not wait
            gain = 1.0 if scale is None else 1.0 / torch.as_tensor(scale, dtype=torch.float64)
        elif skip is not None and skip.item():
            return loss
        else:
            skip, gain = None, 1.0 if scale is None else 1.0 / bounds.number(scale)
        try:
            if self._plan is None or not self._plan.is_current(self) or not self._plan.run(self, gain, skip):
                self._plan_and_run(gain, skip)
        except SkippedStep:
            self._plan = None
            self._skipped += 1
        except BaseException:
            self._plan = None  # whatever it was in the middle of, the next step looks afresh
            raise
        return loss

    def _check_ready(self) -> None:
        """Raise if a step would be refused now, whatever the gradients."""
        if self._is_averaged:
            raise RuntimeError(
                f"{type(self).__name__}: a step inside averaged() would be undone by its end; step before or after it"
            )

    def _check_gradients(self) -> None:
        """Raise on gradients that this optimizer is not for; those that no back end can use are found later."""

    @property
    def skipped_steps(self) -> int:
        """How many steps nonfinite="skip" has left out; waits for the device if capturable=True has counted them."""
        return self._skipped + (0 if self._skipped_there is None else int(self._skipped_there.item()))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages of `ema_decay` in the place of the parameters, for an evaluation.

        After the block the parameters are what they were, bit for bit, also when it raises. Parameters that have not
        been stepped yet stay themselves.

        Raises:
            RuntimeError: the optimizer keeps no averages; or a step inside the block.
        """
        owner = type(self).__name__
        if EMA not in self._rule.states:
            raise RuntimeError(f"{owner}: no averages are kept; make it with ema_decay=0.999, say")
        if self._is_averaged:
            raise RuntimeError(f"{owner}: the parameters are averaged already; leave the inner averaged() out")
        params = [p for group in self.param_groups for p in group["params"]]
        averages = [(p, self.state[p][EMA]) for p in params if EMA in self.state.get(p, {})]
        kept = [p.detach().clone() for p, _ in averages]
        try:
            self._is_averaged = True
            with torch.no_grad():
                for p, average in averages:
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(averages, kept, strict=True):
                    p.copy_(value)
            self._is_averaged = False

    def _count_skip(self, broken: torch.Tensor) -> None:
        """Count a step that is skipped if a device finds it broken."""
        if self._skipped_there is None:
            self._skipped_there = torch.zeros((), dtype=torch.int64, device=broken.device)
        self._skipped_there += broken

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does, after checking it.

        Args:
            param_group: {"params": ..., and hyperparameters that differ from the defaults}.

        Raises:
            ValueError: a hyperparameter out of its bounds, or a parameter that the optimizer has already.
        """
        if isinstance(param_group, dict):
            self._check(self.defaults | {k: v for k, v in param_group.items() if k != "params"})
            given = param_group.get("params")
            if isinstance(given, Iterable) and not isinstance(given, (torch.Tensor, set)):
                param_group = param_group | {"params": (tensors := list(given))}
                identities = {id(t[1] if isinstance(t, tuple) else t) for t in tensors}
                if len(identities) != len(tensors):
                    raise ValueError(f"{type(self).__name__}: a parameter appears twice in one group")
            self._check_parameters(param_group)
        super().add_param_group(param_group)
        if self.eager_state:
            for p in self.param_groups[-1]["params"]:
                self._make_state(p, self.param_groups[-1])
        self._plan = None

    def state_dict(self, *, portable: bool = False) -> StateDict:
        """The state as a dict that `load_state_dict` of this class, or of its torch.optim namesake, takes.

        Args:
            portable: write values for 8-bit states, and leave out what only schuss keeps, so that torch.optim can
                load it. Without it 8-bit states are saved as they are, which torch.optim takes for missing.
        """
        from schuss.checkpoint import portable as make_portable

        state_dict = super().state_dict()
        return make_portable(self, state_dict) if portable else state_dict

    def load_state_dict(self, state_dict: StateDict, *, strict: bool = True) -> None:
        """Load what `state_dict` returned, of this optimizer or of its torch.optim namesake.

        State keeps the dtype that it was saved with and is copied, so it shares nothing with `state_dict`. When both
        sides have parameter names, state is matched by name; else by order.

        Args:
            state_dict: the saved state.
            strict: whether names that are on one side only are an error; else they are left as they are.

        Raises:
            ValueError: other groups, shapes or names than this optimizer has. Nothing has been changed then.
        """
        from schuss.checkpoint import load

        load(self, state_dict, strict=strict)
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        declared = dict(state.get("defaults") or self.defaults)
        super().__setstate__(state)
        self.defaults = declared  # torch adds a key of its own, which would go into every group
        self.__dict__.setdefault("_options", Settings())
        self._reset()
        self._rule = self._declare(self.defaults)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for kept in self.state.values():
            for name in self._rule.scalar_states:  # old checkpoints hold Python numbers
                if isinstance(kept.get(name), (int, float)):
                    kept[name] = self._number(name, float(kept[name]))

    # --- what the engine needs --------------------------------------------------------------------------------------

    def plan(self) -> "Plan":
        """What a step does: print it to see the back end of each tensor and why, and the bytes it keeps and moves."""
        from schuss.engine.plan import Plan

        if self._plan is None or not self._plan.is_current(self):
            self._plan = Plan(self)
        return self._plan

    def _check(self, group: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        for name, bound in self.bounds.items():
            if name in group:
                bounds.check(owner, name, group[name], bound)
        if group.get("fused") and group.get("foreach"):
            raise RuntimeError(f"{owner}: `fused` and `foreach` cannot be `True` together.")
        if group.get("fused") and group.get("differentiable"):
            raise RuntimeError(f"{owner}: `fused` does not support `differentiable`")
        if self._options.cautious_decay and not self._rule.is_decoupled(group):
            raise ValueError(
                f"{owner}: cautious_decay needs decoupled weight decay, which this optimizer does not have"
                + ("; pass decoupled_weight_decay=True" if "decoupled_weight_decay" in group else "")
            )
        self._options.check_exact(owner, self._rule.states.values(), group)
        self.check_group(group)

    def _check_parameters(self, group: Mapping[str, Any]) -> None:
        """Raise on parameters that the rule has no meaning for; those that are no tensors are left to torch."""
        given = group.get("params")
        pairs = [given] if isinstance(given, torch.Tensor) else given or ()
        tensors = [pair[-1] if isinstance(pair, tuple) else pair for pair in pairs]
        if all(not isinstance(t, torch.Tensor) or (self.takes(t) and not t.is_complex()) for t in tensors):
            return
        owner, index = type(self).__name__, len(self.param_groups)
        named = [(name, p) for name, p in names_of(group, index) if isinstance(p, torch.Tensor)]
        check_dimensions(owner, named, self.dimensions)
        settings = self.defaults | dict(group)
        for name, p in named:
            if p.is_complex() and not (self.takes_complex and not self._rule.needs(self._rule.variant(settings, p))):
                raise ValueError(
                    f"{owner}: its parameters must be real, and {name} is {str(p.dtype).removeprefix('torch.')}; give "
                    "it to an optimizer whose rule is about single elements, such as AdamW"
                )

    def _plan_and_run(self, gain: float | torch.Tensor, skip: torch.Tensor | None) -> None:
        from schuss.engine.plan import Plan

        made: list[tuple[torch.Tensor, set[str]]] = []
        plan = None
        try:
            with uninterrupted():
                plan = self._plan = Plan(self, made)
                if not plan.run(self, gain, skip):
                    raise AssertionError("something changed while a step was planned; please report this")
        except BaseException:
            for p, before in made:  # state that has never been stepped would pass for state that has
                if plan is None or not plan.has_run(p):
                    for name in set(self.state[p]) - before:
                        del self.state[p][name]
                    if not self.state[p]:
                        del self.state[p]
            raise

    def _place_scalars(self, p: torch.Tensor) -> None:
        """Move a parameter's numbers to its device, where a captured step reads them."""
        kept = self.state[p]
        for name in self._rule.scalar_states:
            kept[name] = kept[name].to(p.device)

    def _number(self, name: str, value: float) -> torch.Tensor:
        """A number that is kept of a parameter, as it is stored."""
        is_wide = name in self._rule.wide_numbers or torch.get_default_dtype() == torch.float64
        return torch.tensor(value, dtype=torch.float64 if is_wide else torch.float32)

    @torch.no_grad()
    def _make_state(self, p: torch.Tensor, group: Mapping[str, Any]) -> None:
        """Add to `self.state[p]` what is missing there."""
        from schuss.engine.state import COMPENSATION, Cell, chosen, find, make, parameter_storage
        from schuss.engine.storage import Storage

        rule, kept = self._rule, self.state[p]

        def initial(value: float | str) -> float:
            return bounds.number(group[value] if isinstance(value, str) else value)

        has_stepped = any(find(kept, state.name) for state in rule.states.values())
        for name, value in rule.scalar_states.items():
            if kept.get(name) is None:
                # The state of a rule that keeps no step, of torch's say, has been stepped, nobody knows how often.
                known = float(has_stepped) if name == "step" and not self.has_step else initial(value)
                kept[name] = self._number(name, known)
        for state in rule.states.values():
            if state.exists(group, p) and find(kept, state.name) is None:
                cell, tensors = make(state.name, chosen(self, p, state)[0], p, state.shape(group, p))
                reals = Cell(Storage(p.dtype), p).read(torch.float64)
                if state.like != "p":
                    cell.values.fill_(initial(state.init))
                else:
                    cell.write(reals if state.init == "p" else torch.full_like(reals, initial(state.init)))
                kept.update(tensors)
        if parameter_storage(self, p).kahan and kept.get(COMPENSATION) is None:
            kept[COMPENSATION] = torch.zeros_like(p, memory_format=torch.preserve_format).detach()


def _own_arguments(cls: type) -> tuple[str, ...]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    signature = inspect.signature(cls)
    return tuple(n for n, p in signature.parameters.items() if n != "params" and p.kind not in variadic)
