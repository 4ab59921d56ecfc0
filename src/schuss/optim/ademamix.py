"""AdEMAMix."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import exp, lerp, log, minimum, sqrt, where
from schuss.optim.adam import Adam
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class AdEMAMix(Optimizer):
    r"""AdamW with a second, slow average of gradients beside the fast one: old gradients keep their say.

    .. math::
        m_1 &\leftarrow \beta_1 m_1 + (1 - \beta_1) g, \qquad
        m_2 \leftarrow \beta_3 m_2 + (1 - \beta_3) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow (1 - \gamma \lambda) p - \gamma
            \frac{m_1 / (1 - \beta_1^t) + \alpha m_2}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    The slow average starts at zero and is not corrected for it. While t is below T, α is αt/T and β₃ grows from β₁ so
    that its half-life does so linearly, ln β₃(t) = 1 / ((1 - t/T) / ln β₁ + t/T / ln β₃); each has a T of its own.
    Without these schedules a large α makes early steps diverge: they tend to 1 + α times γ.

    Simplified-AdEMAMix (Morwani et al. 2025, arXiv:2502.02431) with a constant β₁ = β and its α = a > 0 is this rule
    with betas (0, β₂, β), alpha 1 / (a (1 - β)), lr aγ and weight_decay λ / a.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates β₁ of the fast average, β₂ of the squares and, at the end of its schedule, β₃ of the slow
            average, each in [0, 1).
        alpha: weight α of the slow average, in [0, inf); at the end of its schedule. The authors' example has 8.
        beta3_warmup, alpha_warmup: lengths T of the schedules in steps, in [0, inf), or None: none. The authors take
            the whole training.
        eps: added to the root, in [0, inf).
        weight_decay: λ, decoupled, in [0, inf).
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`. The slow average is kept in float32 at least, and not in 8 bits: its changes
            are smaller than the gaps between their values.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Pagliardini, Ablin, Grangier 2024, arXiv:2409.03137.
    """

    bounds = {
        "lr": "[0, inf)",
        "betas": ("[0, 1)", "[0, 1)", "[0, 1)"),
        "alpha": "[0, inf)",
        "beta3_warmup": "None or [0, inf)",
        "alpha_warmup": "None or [0, inf)",
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
    }
    states = {
        "m1": "exp_avg_fast",
        "m2": State("exp_avg_slow", wide=True, exact=True),
        "v": State("exp_avg_sq", nonnegative=True),
    }
    decay = "decoupled"
    source = "Pagliardini, Ablin, Grangier 2024, arXiv:2409.03137"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: float | None = None,
        alpha_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, alpha=alpha, beta3_warmup=beta3_warmup, alpha_warmup=alpha_warmup, eps=eps,
            weight_decay=weight_decay, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, lr, betas, alpha, beta3_warmup, alpha_warmup):
        beta1, beta2, beta3 = betas
        # None arrives as NaN, and no step is below it.
        share = step / beta3_warmup
        grown = exp(1 / ((1 - share) / log(beta1) + share / log(beta3)))
        now = where(step < beta3_warmup, minimum(grown, beta3), beta3)
        weight = alpha * where(step < alpha_warmup, step / alpha_warmup, 1.0)
        return {**Adam.scalars(step, lr, (beta1, beta2)), "w3": 1 - now, "slow_size": lr * weight}

    @staticmethod
    def rule(p, g, m1, m2, v, w1, beta2, w2, w3, step_size, slow_size, c2, eps):
        m1 = lerp(m1, g, w1)
        m2 = lerp(m2, g, w3)
        v = beta2 * v + w2 * (g * g)
        p = p - (step_size * m1 + slow_size * m2) / (sqrt(v) * c2 + eps)
        return p, m1, m2, v
