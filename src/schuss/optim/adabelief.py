"""AdaBelief."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, maximum, sqrt, where
from schuss.optim.adam import Adam
from schuss.optim.radam import RAdam
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class AdaBelief(Optimizer):
    r"""Adam that divides by how far gradients stray from their average: large steps where they do not.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        s \leftarrow \beta_2 s + (1 - \beta_2) (g - m)^2 + \epsilon \\
        p &\leftarrow p - \gamma \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    ε is added to s at every step and so gathers: the root is at least √(ε / (1 - β₂)), 3e-7 with the defaults. The
    authors advise 1e-16 where Adam beats SGD and 1e-8 where SGD does.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to s at each step, and to the root, in [0, inf).
        weight_decay: in [0, inf); decoupled, or added to the gradient times p.
        amsgrad: divide by the largest s.
        rectify: steps as RAdam's: not divided while the variance of s is intractable, then rectified. The default of
            the authors' later code; not in the paper's algorithm.
        decoupled_weight_decay: multiply p by 1 - γ λ before the step, as AdamW does.
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Zhuang et al. 2020, arXiv:2010.07468.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "eps": "[0, inf)", "weight_decay": "[0, inf)"}
    states = {
        "m": "exp_avg",
        "s": State("exp_avg_var", nonnegative=True),
        "s_max": State("max_exp_avg_var", when="amsgrad", nonnegative=True),
    }
    decay = "decoupled"
    source = "Zhuang et al. 2020, arXiv:2010.07468"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0,
        amsgrad: bool = False,
        rectify: bool = False,
        decoupled_weight_decay: bool = True,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, rectify=rectify,
            decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, lr, betas):
        return {**Adam.scalars(step, lr, betas), "r": RAdam.scalars(step, lr, betas)["rectify"]}

    @staticmethod
    def rule(p, g, m, s, s_max, w1, beta2, w2, step_size, c2, r, eps, amsgrad, rectify):
        m = lerp(m, g, w1)
        surprise = g - m
        s = beta2 * s + w2 * (surprise * surprise) + eps
        s_max = maximum(s_max, s) if amsgrad else s
        if rectify:
            p = p - step_size * m * where(r > 0, r / (sqrt(s_max) + eps), 1)
        else:
            p = p - step_size * m / (sqrt(s_max) * c2 + eps)
        return p, m, s, s_max
