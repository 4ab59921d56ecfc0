"""StableAdamW."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, maximum, mean_square, sqrt
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class StableAdamW(Optimizer):
    r"""AdamW that slows down a tensor whose gradients have outgrown their average: no clipping is needed.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        \hat m = \frac{m}{1 - \beta_1^t}, \qquad \hat v = \frac{v}{1 - \beta_2^t} \\
        r &= \sqrt{\operatorname{mean}\left(g^2 / \max(\hat v, \epsilon^2)\right)}, \qquad
        \eta = \frac{\gamma}{\max(1, r)}, \qquad
        p \leftarrow (1 - \eta \lambda) p - \eta \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    The mean is over the whole tensor, and v contains the gradient already. As long as r is at most 1, this is AdamW.
    The paper corrects β instead of m and v, which gives the same numbers; so states are those of AdamW, and its
    checkpoints go on here.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: λ, in [0, inf); decoupled, and slowed down as the step is.
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Wortsman et al. 2023, arXiv:2304.13013.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "eps": "[0, inf)", "weight_decay": "[0, inf)"}
    states = {"m": "exp_avg", "v": State("exp_avg_sq", nonnegative=True)}
    source = "Wortsman et al. 2023, arXiv:2304.13013"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, betas, weight_decay):
        beta1, beta2 = betas
        return {
            "w1": 1 - beta1,
            "beta2": beta2,
            "w2": 1 - beta2,
            "c1": 1 / (1 - beta1**step),
            "c2": 1 / sqrt(1 - beta2**step),
            "lam": weight_decay,
        }

    @staticmethod
    def rule(p, g, m, v, lr, w1, beta2, w2, c1, c2, eps, lam):
        m = lerp(m, g, w1)
        v = beta2 * v + w2 * (g * g)
        root = sqrt(v) * c2
        rate = lr / maximum(sqrt(mean_square(g / maximum(root, eps))), 1.0)
        p = (1 - rate * lam) * p - rate * c1 * m / (root + eps)
        return p, m, v
