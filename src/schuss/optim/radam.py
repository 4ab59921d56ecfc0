"""RAdam."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, maximum, sqrt, where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class RAdam(Optimizer):
    r"""Rectified Adam: no adaptive step until its variance is tractable, then Adam's, rectified by r.

    .. math::
        \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        r = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}

    While ρ is at most 5 the step is γ m / (1 - β₁ᵗ), not divided by anything: with the default betas the first five
    steps are as large as the gradients. So does torch; the authors' code by default leaves these steps out. Both use 5
    where the paper says 4.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: in [0, inf); added to the gradient times p, or decoupled.
        decoupled_weight_decay: multiply p by 1 - γ λ before the step, as AdamW does.
        foreach, maximize, capturable, differentiable: as in torch.optim.RAdam.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Liu et al. 2020, arXiv:1908.03265.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "eps": "[0, inf)", "weight_decay": "[0, inf)"}
    states = {"m": "exp_avg", "v": State("exp_avg_sq", nonnegative=True)}
    decay = "l2"
    source = "Liu et al. 2020, arXiv:1908.03265"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, lr, betas):
        beta1, beta2 = betas
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
        tractable = rho > 5
        safe = maximum(rho, 5.0)  # keeps the root real where it is not used
        r = sqrt((safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe))
        return {
            "w1": 1 - beta1,
            "beta2": beta2,
            "w2": 1 - beta2,
            "step_size": lr / (1 - beta1**step),
            "rectify": where(tractable, r * sqrt(1 - beta2**step), 0.0),
        }

    @staticmethod
    def rule(p, g, m, v, w1, beta2, w2, step_size, rectify, eps):
        m = lerp(m, g, w1)
        v = beta2 * v + w2 * (g * g)
        p = p - step_size * m * where(rectify > 0, rectify / (sqrt(v) + eps), 1)
        return p, m, v
