"""Adamax."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import absolute, lerp, maximum
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class Adamax(Optimizer):
    r"""Adam with the infinity norm in place of the root mean square.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad u \leftarrow \max(\beta_2 u, |g| + \epsilon), \qquad
        p \leftarrow p - \frac{\gamma}{1 - \beta_1^t} \frac{m}{u}

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates, each in [0, 1).
        eps: added to the absolute gradient, in [0, inf).
        weight_decay: added to the gradient times p, in [0, inf).
        foreach, maximize, differentiable, capturable: as in torch.optim.Adamax.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Kingma, Ba 2015, arXiv:1412.6980.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "eps": "[0, inf)", "weight_decay": "[0, inf)"}
    states = {"m": "exp_avg", "u": State("exp_inf", nonnegative=True)}
    decay = "l2"
    source = "Kingma, Ba 2015, arXiv:1412.6980"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach, maximize=maximize,
            differentiable=differentiable, capturable=capturable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, lr, betas):
        return {"w1": 1 - betas[0], "beta2": betas[1], "step_size": lr / (1 - betas[0] ** step)}

    @staticmethod
    def rule(p, g, m, u, w1, beta2, step_size, eps):
        m = lerp(m, g, w1)
        u = maximum(beta2 * u, absolute(g) + eps)
        return p - step_size * m / u, m, u
