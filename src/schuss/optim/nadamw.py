"""NAdamW."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, sqrt
from schuss.optim.adam import Adam
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class NAdamW(Optimizer):
    r"""AdamW with Nesterov's momentum, as the AlgoPerf benchmark and timm have it.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow (1 - \gamma \lambda) p - \gamma
            \frac{(\beta_1 m + (1 - \beta_1) g) / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    It is not `NAdam(decoupled_weight_decay=True)`: the momentum does not warm up, and both terms have Adam's bias
    correction. So the first step is γ (1 + β₁), 1.9 γ with the defaults.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: λ, decoupled, in [0, inf).
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Dozat 2016; in this form Choi et al. 2019, arXiv:1910.05446; Dahl et al. 2023, arXiv:2306.07179.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "eps": "[0, inf)", "weight_decay": "[0, inf)"}
    states = {"m": "exp_avg", "v": State("exp_avg_sq", nonnegative=True)}
    decay = "decoupled"
    source = "Dozat 2016; in this form Choi et al. 2019, arXiv:1910.05446; Dahl et al. 2023, arXiv:2306.07179"
    scalars = staticmethod(Adam.scalars)

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
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
    def rule(p, g, m, v, w1, beta2, w2, step_size, c2, eps):
        m = lerp(m, g, w1)
        v = beta2 * v + w2 * (g * g)
        p = p - step_size * lerp(m, g, w1) / (sqrt(v) * c2 + eps)
        return p, m, v
