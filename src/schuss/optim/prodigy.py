"""Prodigy."""

from collections.abc import Mapping
from math import inf
from typing import Any, Unpack

import torch
from torch.optim.optimizer import ParamsT

from schuss import bounds
from schuss.formula import dot, everywhere, lerp, maximum, minimum, sqrt, total, where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State

SHARED = ("d", "d_max", "d_numerator", "d_denom")
"""The numbers that all parameters have in common, as one tensor."""
ALIKE = ("d0", "d_coef", "growth_rate", "beta3")
"""The hyperparameters that their one estimate is made with."""


class Prodigy(Optimizer):
    r"""Adam that finds its learning rate: lr=1 is multiplied by an estimate d of the distance to the solution.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) d g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) d^2 g^2 \\
        r &\leftarrow \beta_3 r + \gamma \frac{d^2}{d_0} \langle g, p_0 - p \rangle, \qquad
        s \leftarrow \beta_3 s + \gamma \frac{d^2}{d_0} g, \qquad
        \hat d = c \, \frac{r}{\|s\|_1} \\
        p &\leftarrow (1 - \gamma d \lambda) p - \gamma d \frac{m}{\sqrt{v} + d \epsilon}, \qquad
        d \leftarrow \max(d, \hat d)

    The product and the norm are over all tensors. For convex problems, d never exceeds the largest distance of an
    element from the solution, since steps with large d weigh most; it never falls. `optimizer.d` is its value.

    lr is a multiple of d: leave it at 1, and change d_coef if the steps are too long or too short. Cosine schedules
    without restarts go with it, and with a warm-up safeguard_warmup. There is one d, so all groups have the same lr;
    those with lr 0 rest, and their gradients do not count.

    A tensor without a gradient rests, and its part of ‖s‖₁ stays in the sum, so that d keeps its bound; the authors'
    code leaves it out, while r keeps what it gave.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: γ, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        beta3: decay rate of r and s, in [0, 1), or None: the root of β₂.
        eps: added to the root times d, in [0, inf).
        weight_decay: λ, in [0, inf).
        decouple: multiply p by 1 - γ d λ, as AdamW does; without, λ p is added to the gradient.
        use_bias_correction: multiply γ, but for the decay, by √(1 - β₂ᵗ) / (1 - β₁ᵗ), as Adam does.
        safeguard_warmup: leave γ out of s, so that the small γ of a warm-up does not make d large.
        d0: the first d, in (0, inf): less than the distance, the closer the fewer steps are lost.
        d_coef: c, in (0, inf); 0.5 and 2 are usual, too.
        growth_rate: d grows by at most this factor a step once it has grown, in [1, inf].
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`. Of the states, p0 and s cannot be stored in 8 bits. With float16 parameters use
            state_dtype="float32": d g is too small for float16 at first.

    Raises:
        ValueError: a hyperparameter out of its bounds, or one that differs between groups and must not.

    Source: Mishchenko, Defazio 2023, arXiv:2306.06101.
    """

    bounds = {
        "lr": "[0, inf)",
        "betas": ("[0, 1)", "[0, 1)"),
        "beta3": "None or [0, 1)",
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
        "d0": "(0, inf)",
        "d_coef": "(0, inf)",
        "growth_rate": "[1, inf]",
    }
    states = {
        "m": "exp_avg",
        "v": State("exp_avg_sq", nonnegative=True),
        "s": State("s", wide=True, exact=True),
        "p0": State("p0", init="p", exact=True),
        "d": State("d", init="d0", number=True),
        "d_max": State("d_max", init="d0", number=True),
        "r": State("d_numerator", number=True),
        "all_s": State("d_denom", number=True),
        "own_s": State("s_norm", number=True),
    }
    source = "Mishchenko, Defazio 2023, arXiv:2306.06101"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = inf,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, beta3=beta3, eps=eps, weight_decay=weight_decay, decouple=decouple,
            use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup, d0=d0, d_coef=d_coef,
            growth_rate=growth_rate, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @property
    def d(self) -> float:
        """The estimate, by which the next step multiplies lr; waits for the device."""
        known = next((kept["d"] for kept in self.state.values() if "d" in kept), self.param_groups[0]["d0"])
        return bounds.number(known)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_alike()
        except ValueError:
            self.param_groups.pop()
            raise

    add_param_group.__doc__ = Optimizer.add_param_group.__doc__

    def _check_ready(self) -> None:
        super()._check_ready()
        self._check_alike()

    def _check_alike(self) -> None:
        """Raise if groups have not the hyperparameters in common that their one d needs."""
        groups = self.param_groups
        if len(groups) < 2:
            return
        rates = {rate for group in groups if (rate := _host_number(group["lr"]))}
        if len(rates) > 1:
            raise ValueError(
                f"{type(self).__name__}: lr must be the same in all groups, or 0 where they are to rest, since it "
                f"multiplies one estimate d for all; got {', '.join(map(str, sorted(rates)))}. Give tensors that need "
                "another one an optimizer of their own; schuss.Combined steps several"
            )
        for name in ALIKE:
            values = {_beta3(group) if name == "beta3" else group[name] for group in groups}
            if len(values) > 1:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be the same in all groups, since they have one estimate d; "
                    f"got {', '.join(map(str, sorted(values)))}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for p in [p for group in self.param_groups for p in group["params"] if self.state.get(p)]:
            self._share(p)

    def _make_state(self, p: torch.Tensor, group: Mapping[str, Any]) -> None:
        is_new = "d" not in self.state[p]
        super()._make_state(p, group)
        for name in ("d", "d_max") if is_new else ():
            self.state[p][name] = torch.tensor(bounds.number(group["d0"]), dtype=torch.float64)
        self._share(p)

    def _place_scalars(self, p: torch.Tensor) -> None:
        super()._place_scalars(p)
        self._share(p)

    def _share(self, p: torch.Tensor) -> None:
        """Let a parameter have the tensors of the others, so that d goes on where it takes no step, or joins late."""
        kept = self.state[p]
        for name in (name for name in SHARED if name in kept):
            theirs = next((other[name] for other in self.state.values() if other is not kept and name in other), None)
            # Not float32, in which r and the sum of |s| would stop changing where one step adds little.
            kept[name] = (kept[name] if theirs is None else theirs).to(kept[name].device, torch.float64)
        if "s_norm" in kept:
            kept["s_norm"] = kept["s_norm"].to(torch.float64)

    @staticmethod
    def scalars(step, d, lr, betas, beta3, weight_decay, d0):
        beta1, beta2 = betas
        beta3 = where(beta3 == beta3, beta3, sqrt(beta2))  # None arrives as NaN
        moves = where(lr > 0, 1.0, 0.0)
        return {
            "moves": moves,
            "w1": moves * (1 - beta1),
            "keep_v": 1 - moves * (1 - beta2),
            "w2": moves * (1 - beta2),
            "beta3": beta3,
            "keep_s": 1 - moves * (1 - beta3),
            "weight": moves * d * d / d0,
            "rate": d * lr,
            "correction": sqrt(1 - beta2**step) / (1 - beta1**step),
            "lam": weight_decay,
            "keep": 1 - d * lr * weight_decay,
        }

    @staticmethod
    def rule(
        p, g, m, v, s, p0, d, d_max, r, all_s, own_s, lr, moves, w1, keep_v, w2, beta3, keep_s, weight, rate,
        correction, lam, keep, eps, d0, d_coef, growth_rate, decouple, use_bias_correction, safeguard_warmup,
    ):  # fmt: skip
        if use_bias_correction:
            lr, rate = correction * lr, correction * rate
        if not decouple:
            g = g + lam * p
        any_moves = everywhere(moves) > 0
        r = where(any_moves, beta3 * r + everywhere(weight * lr * dot(g, p0 - p)), r)
        s = keep_s * s + weight * (1.0 if safeguard_warmup else lr) * g
        s_norm = total(abs(s))
        all_s = all_s + everywhere(s_norm - own_s)
        found = where(all_s == 0, 0.0, d_coef * r / all_s)
        d_max = maximum(d_max, found)
        larger = minimum(d_max, growth_rate * where(d == d0, maximum(d, found), d))

        m = lerp(m, d * g, w1)
        v = keep_v * v + w2 * ((d * g) * (d * g))
        p = (keep * p if decouple else p) - rate * m / (sqrt(v) + d * eps)
        return p, m, v, s, p0, where(any_moves, larger, d), d_max, r, all_s, s_norm


def _host_number(value: Any) -> float | None:
    """A rate that can be read without waiting for a device."""
    return None if isinstance(value, torch.Tensor) and value.device.type != "cpu" else bounds.number(value)


def _beta3(group: Mapping[str, Any]) -> float:
    return bounds.number(group["betas"][1]) ** 0.5 if group["beta3"] is None else bounds.number(group["beta3"])
