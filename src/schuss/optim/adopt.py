"""ADOPT."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import clamp, lerp, maximum, sqrt, where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class ADOPT(Optimizer):
    r"""Adam that converges at the optimal rate with any β₂: g is divided by the v that does not contain it.

    .. math::
        u = \operatorname{clip}\!\left(\frac{g}{\max(\sqrt{v}, \epsilon)}, (t - 1)^{c}\right), \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) u, \qquad p \leftarrow p - \gamma m, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2

    The first step only sets v to g²; it moves and decays nothing. The clip is the authors' since November 2024; it
    biases problems whose rare gradients are far larger than the rest, such as their paper's example: clip_exp=None
    leaves it out.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        eps: lower bound of the root, in [0, inf).
        weight_decay: in [0, inf); added to the gradient times p, or decoupled.
        clip_exp: c, in [0, inf), or None: no clipping.
        decoupled_weight_decay: multiply p by 1 - γ λ before the step, as AdamW does.
        foreach, maximize, capturable, differentiable, fused: as in torch.optim.Adam.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Taniguchi et al. 2024, arXiv:2411.02853.
    """

    bounds = {
        "lr": "[0, inf)",
        "betas": ("[0, 1)", "[0, 1)"),
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
        "clip_exp": "None or [0, inf)",
    }
    states = {"m": "exp_avg", "v": State("exp_avg_sq", nonnegative=True)}
    decay = "l2"
    source = "Taniguchi et al. 2024, arXiv:2411.02853"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        clip_exp: float | None = 0.25,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip_exp=clip_exp,
            decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, first, lr, betas, weight_decay, clip_exp, decoupled):
        beta1, beta2 = betas
        return {
            "moves": where(first, 0.0, 1.0),
            "w1": 1 - beta1,
            "keep": where(first, 0.0, beta2),
            "take": where(first, 1.0, 1 - beta2),
            "clip": where(clip_exp == clip_exp, (step - 1) ** clip_exp, float("inf")),  # None arrives as NaN
            "decay": where(first, 1.0, 1 - lr * weight_decay * decoupled),
        }

    @staticmethod
    def rule(p, g, m, v, moves, lr, w1, keep, take, clip, eps):
        u = clamp(g / maximum(sqrt(v), eps), -clip, clip)
        m = where(moves > 0, lerp(m, u, w1), m)
        p = where(moves > 0, p - lr * m, p)
        v = keep * v + take * (g * g)
        return p, m, v
