"""Adan."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, sqrt, where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class Adan(Optimizer):
    r"""Adam with Nesterov's momentum by differences of gradients: no gradient at a point ahead is needed.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) (g - g_{\text{prev}}), \qquad
        n \leftarrow \beta_3 n + (1 - \beta_3) \left(g + \beta_2 (g - g_{\text{prev}})\right)^2 \\
        p &\leftarrow \frac{1}{1 + \gamma \lambda} \left(p - \frac{\gamma}{\sqrt{n / (1 - \beta_3^t)} + \epsilon}
            \left(\frac{m}{1 - \beta_1^t} + \frac{\beta_2 v}{1 - \beta_2^t}\right)\right)

    The first difference is zero. Each β is 1 minus the paper's, as in the authors' code, which has also added the bias
    corrections.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf). The authors use 5 to 10 times AdamW's.
        betas: decay rates β₁ of the gradients, β₂ of their differences and β₃ of the squares, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: λ, in [0, inf), decoupled; the authors use 0.02 throughout.
        no_prox: decay as AdamW does, p multiplied by 1 - γ λ before the step, instead of divided by 1 + γ λ after it.
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Xie et al. 2022, arXiv:2208.06677.
    """

    bounds = {
        "lr": "[0, inf)",
        "betas": ("[0, 1)", "[0, 1)", "[0, 1)"),
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
    }
    states = {"m": "exp_avg", "v": "exp_avg_diff", "n": State("exp_avg_sq", nonnegative=True), "g_prev": "prev_grad"}
    source = "Xie et al. 2022, arXiv:2208.06677"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0,
        no_prox: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_prox=no_prox, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, first, lr, betas, weight_decay):
        beta1, beta2, beta3 = betas
        return {
            "later": where(first, 0.0, 1.0),
            "w1": 1 - beta1,
            "beta2": beta2,
            "w2": 1 - beta2,
            "beta3": beta3,
            "w3": 1 - beta3,
            "c3": 1 / sqrt(1 - beta3**step),
            "step_m": lr / (1 - beta1**step),
            "step_v": lr * beta2 / (1 - beta2**step),
            "keep": 1 - lr * weight_decay,
            "shrink": 1 / (1 + lr * weight_decay),
        }

    @staticmethod
    def rule(p, g, m, v, n, g_prev, later, w1, beta2, w2, beta3, w3, c3, step_m, step_v, keep, shrink, eps, no_prox):
        difference = later * (g - g_prev)
        ahead = g + beta2 * difference
        m = lerp(m, g, w1)
        v = lerp(v, difference, w2)
        n = beta3 * n + w3 * (ahead * ahead)
        u = (step_m * m + step_v * v) / (sqrt(n) * c3 + eps)
        p = keep * p - u if no_prox else shrink * (p - u)
        return p, m, v, n, g
