"""Lion."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, sign
from schuss.optimizer import Number, Optimizer, Options


class Lion(Optimizer):
    r"""Evolved sign momentum: every element moves by exactly lr, and one state is kept.

    .. math::
        p \leftarrow (1 - \gamma \lambda) p - \gamma \operatorname{sign}(\beta_1 m + (1 - \beta_1) g), \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    Since its steps are larger than Adam's, the authors use a 3 to 10 times smaller lr and a weight_decay larger by
    the same factor.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf): the size of a step of each element.
        betas: β₁ of the direction and β₂ of the momentum, each in [0, 1).
        weight_decay: λ, decoupled, in [0, inf).
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Chen et al. 2023, arXiv:2302.06675.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "weight_decay": "[0, inf)"}
    states = {"m": "exp_avg"}
    has_step = False
    decay = "decoupled"
    source = "Chen et al. 2023, arXiv:2302.06675"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(betas):
        return {"w1": 1 - betas[0], "w2": 1 - betas[1]}

    @staticmethod
    def rule(p, g, m, lr, w1, w2):
        p = p - lr * sign(lerp(m, g, w1))
        return p, lerp(m, g, w2)
