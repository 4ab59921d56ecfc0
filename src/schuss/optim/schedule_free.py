"""Schedule-Free SGD, AdamW and RAdam, and what an optimizer needs whose parameters are elsewhere to be evaluated."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch.optim.optimizer import ParamsT

from schuss import bounds
from schuss.engine.process import uninterrupted
from schuss.engine.state import COMPENSATION, Cell, find, parameter_storage, real_view, write
from schuss.engine.storage import Storage
from schuss.formula import lerp, maximum, minimum, sqrt, where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State

LEFT = "y"
"""The key of `optimizer.state[p]` under which a parameter's place in training waits while it is evaluated."""


class TwoPlaces(Optimizer):
    """Base of optimizers whose parameters are in one place in training, y, and in another one in evaluation, x.

    Every group has the mode as `train_mode`, so it is saved, loaded and copied with all else. A subclass says where x
    is.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Any) -> None:
        super().__init__(params, defaults | {"train_mode": True}, **options)

    @abstractmethod
    def _x_of(self, y: torch.Tensor, kept: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
        """Where a parameter is evaluated, from where it is trained and its state."""

    @abstractmethod
    def _y_of(self, x: torch.Tensor, kept: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
        """The inverse of `_x_of`."""

    @property
    def training(self) -> bool:
        """Whether parameters are where gradients are taken."""
        return all(group["train_mode"] for group in self.param_groups)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the parameters where they are to be evaluated, x; those that have not been stepped are there.

        Where they were is kept as the state "y" until `train()`: memory for one more copy of them. Does nothing in
        eval mode.
        """
        moves = [
            (p, kept, group, p.detach().clone(memory_format=torch.preserve_format))
            for p, kept, group in self._stepped(train_mode=True)
        ]
        with uninterrupted():
            try:
                for p, kept, group, y in moves:
                    write(p, self._x_of(self._value(y, kept), kept, group))
            except BaseException:
                for p, _, _, y in moves:
                    p.copy_(y)
                raise
            for _, kept, _, y in moves:
                kept[LEFT] = y
            self._set_mode(train_mode=False)

    @torch.no_grad()
    def train(self) -> None:
        """Put the parameters back where `eval()` found them, bit for bit.

        A parameter that has been changed since is taken for a new x, and its y computed from it: to rounding. So is
        one whose state was saved without a y. Does nothing in train mode.
        """
        moves = [(p, kept, self._back(p, kept, group)) for p, kept, group in self._stepped(train_mode=False)]
        with uninterrupted():
            for p, kept, new in moves:
                y = kept.pop(LEFT, None)
                if new is None:
                    p.copy_(y)
                else:
                    self._cell(p, kept).write(new)
            self._set_mode(train_mode=True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block in eval mode; after it, also when it raises, in the mode of before."""
        before = self.training
        self.eval()
        try:
            yield
        finally:
            if before:
                self.train()

    def _check_ready(self) -> None:
        super()._check_ready()
        if not self.training:
            raise RuntimeError(
                f"{type(self).__name__}: a step in eval mode, where parameters are not at the point that is trained; "
                "call optimizer.train() before the forward pass"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # The others' mode: it has to be one, and what has not been stepped is in both places.
        self.param_groups[-1]["train_mode"] = len(self.param_groups) == 1 or self.param_groups[0]["train_mode"]

    add_param_group.__doc__ = Optimizer.add_param_group.__doc__

    def _set_mode(self, *, train_mode: bool) -> None:
        for group in self.param_groups:
            group["train_mode"] = train_mode

    def _stepped(self, *, train_mode: bool) -> Iterator[tuple[torch.Tensor, dict[str, Any], dict[str, Any]]]:
        """The parameters in two places of groups in a mode, their state, and the group."""
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] == train_mode else ():
                kept = self.state.get(p)
                if kept and all(find(kept, state.name) for state in self._rule.states.values()):
                    yield p, kept, group

    def _cell(self, p: torch.Tensor, kept: Mapping[str, Any]) -> Cell:
        if (storage := parameter_storage(self, p)).kahan and COMPENSATION in kept:
            return Cell(storage, p, kept[COMPENSATION])
        return Cell(Storage(p.dtype), p)

    def _value(self, y: torch.Tensor, kept: Mapping[str, Any]) -> torch.Tensor:
        """A place in training as reals of float32 at least, with what rounding="kahan" has cut off."""
        return self._cell(y, kept).read(_wide(y))

    def _back(self, p: torch.Tensor, kept: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor | None:
        """Where a parameter is to go back to; None: to the y that was kept."""
        if (y := kept.get(LEFT)) is not None:
            x = torch.empty_like(p)
            write(x, self._x_of(self._value(y, kept), kept, group))
            if torch.equal(x, p) or not ((x != p) & ((x == x) | (p == p))).any():  # NaN are alike
                return None
        return self._y_of(real_view(p).to(_wide(p)), kept, group)


def _wide(p: torch.Tensor) -> torch.dtype:
    return torch.promote_types(real_view(p).dtype, torch.float32)


class ScheduleFree(TwoPlaces):
    """What the Schedule-Free optimizers share: the state z, the average's weights, and x from y and z.

    The numbers that the average depends on are kept of each parameter, in float64: a sum of weights in float32 stops
    growing, and β is compared with that of the step before. A subclass gets them from `averaging`.
    """

    scalar_states = {"beta": 0.0, "weight_sum": 0.0, "lr_max": 0.0}

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Any) -> None:
        for name, why in (
            ("ema_decay", "it would average y, where gradients are taken; eval() has an average already, x"),
            ("cautious", "elements of y that stay where they are, while z goes on, would move x"),
        ):
            if options.get(name):
                raise ValueError(f"{type(self).__name__}: {name} cannot be used: {why}; leave it out")
        super().__init__(params, defaults, **options)

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        dtype = self._options.state_dtype.get("z", torch.float32)
        if dtype != torch.float32:
            others = {s.name: str(dtype).removeprefix("torch.") for s in self._rule.states.values() if s.name != "z"}
            raise ValueError(
                f"{type(self).__name__}: state_dtype of 'z' must be float32, since z is a place as the parameter is, "
                f"and would miss steps; got {dtype}" + (f"; pass state_dtype={others}" if others else "")
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            numbers = _of_group(group)
            for p in group["params"]:
                kept = self.state.get(p)
                if kept and numbers:
                    kept |= {name: value.clone() for name, value in numbers.items() if name not in kept}
                if kept:
                    self._widen(kept)
            if numbers:  # the authors' default would choose that back end
                group["foreach"] = self.defaults["foreach"]

    def _make_state(self, p: torch.Tensor, group: Mapping[str, Any]) -> None:
        super()._make_state(p, group)
        self._widen(kept := self.state[p])
        if not kept["beta"]:
            kept["beta"].fill_(_beta({}, group))

    def _widen(self, kept: dict[str, Any]) -> None:
        for name in ScheduleFree.scalar_states:
            if name in kept:
                kept[name] = kept[name].to(torch.float64)

    def _x_of(self, y: torch.Tensor, kept: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
        beta = _beta(kept, group)
        # Each operation is rounded by itself, so that every device finds the same bits.
        return (y - _z(y, kept)).mul_((1 - beta) / beta).add_(y)

    def _y_of(self, x: torch.Tensor, kept: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
        return x + (_z(x, kept) - x) * (1 - _beta(kept, group))


def _z(like: torch.Tensor, kept: Mapping[str, Any]) -> torch.Tensor:
    cell = find(kept, "z")
    assert cell is not None
    return cell.read(like.dtype).to(like.device)


def _beta(kept: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    """The β that y was made with."""
    if (before := kept.get("beta")) is not None:
        return bounds.number(before)
    return bounds.number(group["momentum"] if "momentum" in group else group["betas"][0])


def _of_group(group: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Take out of a group what the authors' package keeps there, where schuss has it per parameter."""
    if not {"k", "weight_sum", "lr_max"} <= group.keys():
        return {}
    found = {"step": group.pop("k"), "weight_sum": group.pop("weight_sum"), "lr_max": group.pop("lr_max")}
    group.pop("scheduled_lr", None)
    dtypes = {"step": torch.float32}
    return {
        name: torch.tensor(max(bounds.number(value), 0.0), dtype=dtypes.get(name, torch.float64))
        for name, value in found.items()
    }


def averaging(
    rate: Any, step: Any, beta: Any, before: Any, weight_sum: Any, lr_max: Any, r: Any, weight_lr_power: Any
) -> dict[str, Any]:
    r"""The scalars of `averaged`, and the new scalar states, of step t.

    .. math::
        w_t = t^r \big(\max_{s \le t} \gamma_s\big)^q, \qquad c_t = w_t \Big/ \sum_{s \le t} w_s

    Args:
        rate: :math:`\gamma_t`, with its warm-up.
        step: t, from 1.
        beta: of this step.
        before: that of the step before, which y was made with.
        weight_sum, lr_max: of the steps before.
        r, weight_lr_power: r and q.
    """
    # Only their ratios count, so weights do not depend on one rate for all steps; earlier ones have no derivative.
    lr_max = maximum(lr_max, rate.detach() if isinstance(rate, torch.Tensor) else rate)
    weight = step**r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    c = weight / maximum(weight_sum, 1e-300)  # 0 as long as the rate is
    return {
        "new": where(step == 1, 1.0, 0.0),
        "beta": beta,
        "weight_sum": weight_sum,
        "lr_max": lr_max,
        "rate": rate,
        "rate_y": rate * (1 - beta * (1 - c)),
        "to_z": 1 - (1 - c) * (beta / before),  # c, if β is what it was
    }


def averaged(y: Any, z: Any, u: Any, new: Any, to_z: Any, rate: Any, rate_y: Any) -> tuple[Any, Any]:
    """The new y and z after a step along u, with x averaged in between but never stored."""
    z = where(new > 0, y, z)  # equal then, but for what autograd knows of it
    return lerp(y, z, to_z) - rate_y * u, z - rate * u


def _warmed(lr: Any, step: Any, warmup_steps: Any) -> Any:
    return lr * minimum(step / maximum(warmup_steps, 1.0), 1.0)


_BOUNDS: dict[str, str | tuple[str, ...]] = {
    "lr": "[0, inf)",
    "weight_decay": "[0, inf)",
    "warmup_steps": "[0, inf)",
    "r": "[0, inf)",
    "weight_lr_power": "[0, inf)",
}
_Z = State("z", init="p", wide=True)
_SOURCE = "Defazio et al. 2024, arXiv:2405.15682"


class ScheduleFreeSGD(ScheduleFree):
    r"""SGD that needs no schedule: gradients are taken between its iterates z and their average x.

    .. math::
        y &= (1 - \beta) z + \beta x, \qquad g = \nabla f(y) + \lambda y \\
        z &\leftarrow z - \gamma_t g, \qquad x \leftarrow (1 - c_t) x + c_t z, \qquad
        c_t = w_t \Big/ \sum_{s \le t} w_s, \qquad w_t = t^r \big(\max_{s \le t} \gamma_s\big)^q

    The parameter is y and z a state. `eval()` puts x in the parameter's place, `train()` puts y back; evaluate, and
    save what is to be used, at x. A rate of 10 to 50 times that of plain SGD is where the authors start; averaging
    takes the place of its decay.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate, in [0, inf).
        momentum: β, in (0, 1]. 1 takes gradients at the average; near 0 x loses 1/β of its precision, and at 0 it
            could not be told from y and z: that is the average of plain SGD, `ASGD(lambd=0, t0=-1)`.
        weight_decay: λ, in [0, inf); added to the gradient times y.
        warmup_steps: over which the rate rises linearly, in [0, inf).
        r: power of t in the weights, in [0, inf); more weighs late steps more.
        weight_lr_power: q, in [0, inf): the power of the largest rate so far, so that steps of a warm-up weigh less.
        foreach, maximize, capturable, differentiable: as in torch.optim.ASGD.
        options: see `schuss.Options`; without ema_decay and cautious.

    Raises:
        ValueError: a hyperparameter out of its bounds, or an option that it cannot be combined with.

    Source: Defazio et al. 2024, arXiv:2405.15682.
    """

    bounds = _BOUNDS | {"momentum": "(0, 1]"}
    states = {"z": _Z}
    decay = "l2"
    source = _SOURCE

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r,
            weight_lr_power=weight_lr_power, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, beta, weight_sum, lr_max, lr, momentum, warmup_steps, r, weight_lr_power):
        rate = _warmed(lr, step, warmup_steps)
        return averaging(rate, step, momentum, beta, weight_sum, lr_max, r, weight_lr_power)

    @staticmethod
    def rule(p, g, z, new, to_z, rate, rate_y):
        return averaged(p, z, g, new, to_z, rate, rate_y)


class ScheduleFreeAdamW(ScheduleFree):
    r"""AdamW that needs no schedule: averaging and interpolation in the place of momentum and of a falling rate.

    .. math::
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        u = \frac{g}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda y, \qquad y = (1 - \beta_1) z + \beta_1 x \\
        z &\leftarrow z - \gamma_t u, \qquad x \leftarrow (1 - c_t) x + c_t z, \qquad
        c_t = w_t \Big/ \sum_{s \le t} w_s, \qquad w_t = t^r \big(\max_{s \le t} \gamma_s\big)^q

    The parameter is y and z a state, in the place of Adam's m. `eval()` puts x in the parameter's place, `train()`
    puts y back; evaluate, and save what is to be used, at x. The authors find rates of 1 to 10 times AdamW's, and
    advise a warm-up.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate, in [0, inf).
        betas: β₁ of the interpolation, in (0, 1], more for very long runs; β₂ of the second moment, in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: λ, in [0, inf); decoupled, of y.
        warmup_steps: over which the rate rises linearly, in [0, inf).
        r: power of t in the weights, in [0, inf); more weighs late steps more.
        weight_lr_power: q, in [0, inf): the power of the largest rate so far, so that steps of a warm-up weigh less.
        foreach, maximize, capturable, differentiable: as in torch.optim.AdamW.
        options: see `schuss.Options`; without ema_decay and cautious.

    Raises:
        ValueError: a hyperparameter out of its bounds, or an option that it cannot be combined with.

    Source: Defazio et al. 2024, arXiv:2405.15682.
    """

    bounds = _BOUNDS | {"betas": ("(0, 1]", "[0, 1)"), "eps": "[0, inf)"}
    states = {"z": _Z, "v": State("exp_avg_sq", nonnegative=True)}
    source = _SOURCE

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r,
            weight_lr_power=weight_lr_power, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, beta, weight_sum, lr_max, lr, betas, weight_decay, warmup_steps, r, weight_lr_power):
        beta1, beta2 = betas
        rate = _warmed(lr, step, warmup_steps)
        return averaging(rate, step, beta1, beta, weight_sum, lr_max, r, weight_lr_power) | {
            "beta2": beta2,
            "w2": 1 - beta2,
            "c2": 1 / sqrt(1 - beta2**step),
            "wd": weight_decay,
        }

    @staticmethod
    def rule(p, g, z, v, beta2, w2, c2, eps, wd, new, to_z, rate, rate_y):
        v = beta2 * v + w2 * (g * g)
        u = g / (sqrt(v) * c2 + eps) + wd * p
        y, z = averaged(p, z, u, new, to_z, rate, rate_y)
        return y, z, v


class ScheduleFreeRAdam(ScheduleFree):
    r"""Schedule-Free AdamW whose warm-up is RAdam's rectification: neither a schedule nor warmup_steps to set.

    .. math::
        \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        \gamma_t = \gamma \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}

    While ρ is at most 4, four steps with the default betas, only v moves, or with silent_sgd_phase=False steps of
    ScheduleFreeSGD are made; all else is as in `ScheduleFreeAdamW`.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: β₁ of the interpolation, in (0, 1], more for very long runs; β₂ of the second moment, in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: λ, in [0, inf); decoupled, of y.
        r: power of t in the weights, in [0, inf); more weighs late steps more.
        weight_lr_power: q, in [0, inf): the power of the largest rate so far, so that steps of a warm-up weigh less.
        silent_sgd_phase: whether steps before the rectification are left out; needs β₂ above 0.6.
        foreach, maximize, capturable, differentiable: as in torch.optim.RAdam.
        options: see `schuss.Options`; without ema_decay and cautious.

    Raises:
        ValueError: a hyperparameter out of its bounds, or an option that it cannot be combined with.

    Source: Defazio et al. 2024, arXiv:2405.15682; Liu et al. 2020, arXiv:1908.03265.
    """

    bounds = {key: bound for key, bound in ScheduleFreeAdamW.bounds.items() if key != "warmup_steps"}
    states = ScheduleFreeAdamW.states
    source = f"{_SOURCE}; Liu et al. 2020, arXiv:1908.03265"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, r=r, weight_lr_power=weight_lr_power,
            silent_sgd_phase=silent_sgd_phase, foreach=foreach, maximize=maximize, capturable=capturable,
            differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        if group["silent_sgd_phase"] and bounds.number(group["betas"][1]) <= 0.6:
            raise ValueError(
                f"{cls.__name__}: betas[1] must be above 0.6 if silent_sgd_phase is true, or no step would ever be "
                f"made, got {group['betas'][1]!r}; set silent_sgd_phase=False"
            )

    @staticmethod
    def scalars(step, beta, weight_sum, lr_max, lr, betas, weight_decay, r, weight_lr_power, silent_sgd_phase):
        beta1, beta2 = betas
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
        tractable = rho > 4
        safe = where(tractable, rho, 5.0)  # keeps the root real where it is not used
        rectified = sqrt((safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe))
        rate = where(tractable, lr * rectified, lr * (1.0 - silent_sgd_phase))
        return averaging(rate, step, beta1, beta, weight_sum, lr_max, r, weight_lr_power) | {
            "beta2": beta2,
            "w2": 1 - beta2,
            "c2": where(tractable, 1 / sqrt(1 - beta2**step), 0.0),
            "wd": weight_decay,
        }

    @staticmethod
    def rule(p, g, z, v, beta2, w2, c2, eps, wd, new, to_z, rate, rate_y):
        v = beta2 * v + w2 * (g * g)
        u = where(c2 > 0, g / (sqrt(v) * c2 + eps), g) + wd * p
        y, z = averaged(p, z, u, new, to_z, rate, rate_y)
        return y, z, v
