"""LaProp."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, sqrt
from schuss.optim.adam import Adam
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class LaProp(Optimizer):
    r"""Adam with the order changed: gradients are divided by their root mean square, then averaged.

    .. math::
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) \frac{g}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \\
        p &\leftarrow (1 - \gamma \lambda) p - \gamma \frac{m}{1 - \beta_1^t}

    The authors' code gathers γ in m, which differs after a change of lr, and decays by λ, not by γ λ.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf): about the size of a step of each element.
        betas: decay rates of the averages, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: λ, decoupled, in [0, inf).
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Ziyin, Wang, Ueda 2020, arXiv:2002.04839.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "eps": "[0, inf)", "weight_decay": "[0, inf)"}
    states = {"v": State("exp_avg_sq", nonnegative=True), "m": "exp_avg"}
    decay = "decoupled"
    source = "Ziyin, Wang, Ueda 2020, arXiv:2002.04839"
    scalars = staticmethod(Adam.scalars)

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0,
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
    def rule(p, g, v, m, w1, beta2, w2, step_size, c2, eps):
        v = beta2 * v + w2 * (g * g)
        m = lerp(m, g / (sqrt(v) * c2 + eps), w1)
        return p - step_size * m, v, m
