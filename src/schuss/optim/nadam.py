"""NAdam."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, sqrt
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class NAdam(Optimizer):
    r"""Adam with Nesterov's momentum and a momentum that warms up.

    .. math::
        \mu_t &= \beta_1 (1 - \tfrac12\, 0.96^{t \psi}), \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
            \left(\frac{\mu_{t+1} m}{1 - \prod_{i \le t+1} \mu_i}
            + \frac{(1 - \mu_t) g}{1 - \prod_{i \le t} \mu_i}\right)

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: in [0, inf); added to the gradient times p, or decoupled.
        momentum_decay: ψ, in [0, inf).
        decoupled_weight_decay: multiply p by 1 - γ λ before the step, as AdamW does.
        foreach, maximize, capturable, differentiable: as in torch.optim.NAdam.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Dozat 2016, Incorporating Nesterov momentum into Adam.
    """

    bounds = {
        "lr": "[0, inf)",
        "betas": ("[0, 1)", "[0, 1)"),
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
        "momentum_decay": "[0, inf)",
    }
    states = {"m": "exp_avg", "v": State("exp_avg_sq", nonnegative=True)}
    scalar_states = {"mu_product": 1.0}
    decay = "l2"
    source = "Dozat 2016, Incorporating Nesterov momentum into Adam"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, mu_product, lr, betas, momentum_decay):
        beta1, beta2 = betas
        mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
        mu_product = mu_product * mu
        return {
            "mu_product": mu_product,
            "w1": 1 - beta1,
            "beta2": beta2,
            "w2": 1 - beta2,
            "c2": 1 / sqrt(1 - beta2**step),
            "step_g": lr * (1 - mu) / (1 - mu_product),
            "step_m": lr * mu_next / (1 - mu_product * mu_next),
        }

    @staticmethod
    def rule(p, g, m, v, w1, beta2, w2, c2, step_g, step_m, eps):
        m = lerp(m, g, w1)
        v = beta2 * v + w2 * (g * g)
        p = p - (step_g * g + step_m * m) / (sqrt(v) * c2 + eps)
        return p, m, v
