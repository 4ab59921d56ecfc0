"""Adafactor."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import column_mean, lerp, maximum, mean_square, minimum, row_mean, sqrt, where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class Adafactor(Optimizer):
    r"""Adam's second moment as the product of a row and a column, and steps relative to the parameter's size.

    .. math::
        r &\leftarrow r + t^{\tau} (\overline{g^2}^{\,\text{row}} - r), \qquad
        c \leftarrow c + t^{\tau} (\overline{g^2}^{\,\text{column}} - c) \\
        v &= \max\!\left(\frac{r\, c}{\max(\bar r, \epsilon_1)}, \epsilon_1^2\right), \qquad u = g / \sqrt{v} \\
        p &\leftarrow (1 - \gamma \lambda) p - \frac{\rho \max(\epsilon_2, \operatorname{RMS}(p))}{\max(1,
        \operatorname{RMS}(u) / d)}\, u, \qquad \rho = \min(\gamma, 1 / \sqrt t)

    Matrices keep one number for each row and each column; with more than two dimensions the last two are a matrix.
    Vectors keep v itself. As in torch v is at least ε₁², where the paper adds ε₁ to g², and weight decay does not
    shrink RMS(p). With a learning rate of your own, that of Adam's size: relative_step=False, scale_parameter=False.

    Args:
        params: tensors of reals, (name, tensor) pairs, or groups as dicts.
        lr: γ, in [0, inf): the largest relative step.
        beta2_decay: τ, in (-inf, 0]; 1 - t^τ is the decay of v.
        eps: ε₁, or None for the epsilon of the parameter's dtype, and ε₂, the smallest RMS of p that steps are relative
            to; each in [0, inf).
        d: RMS that u is clipped to, in [1, inf).
        weight_decay: λ, in [0, inf), decoupled.
        beta1: decay rate of a mean of the steps, in [0, 1), or None: no such state. Not in torch; with it Adafactor
            needs the memory of SGD with momentum.
        relative_step: whether ρ falls as 1 / sqrt(t); False: ρ = γ. Not in torch.
        scale_parameter: whether steps are relative to RMS(p). Not in torch.
        warmup_init: whether ρ starts as 1e-6 t, with relative_step. Not in torch.
        foreach, maximize: as in torch.optim.Adafactor.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds, or a complex parameter.

    Source: Shazeer, Stern 2018, arXiv:1804.04235.
    """

    bounds = {
        "lr": "[0, inf)",
        "beta2_decay": "(-inf, 0]",
        "eps": ("None or [0, inf)", "[0, inf)"),
        "d": "[1, inf)",
        "weight_decay": "[0, inf)",
        "beta1": "None or [0, 1)",
    }
    states = {
        "r": State("row_var", when=lambda group, p: p.dim() > 1, like="rows"),
        "c": State("col_var", when=lambda group, p: p.dim() > 1, like="columns"),
        "v": State("variance", when=lambda group, p: p.dim() < 2, nonnegative=True),
        "m": State("exp_avg", when="beta1", exact=True),
    }
    takes_complex = False
    source = "Shazeer, Stern 2018, arXiv:1804.04235"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        beta1: float | None = None,
        relative_step: bool = True,
        scale_parameter: bool = True,
        warmup_init: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay, foreach=foreach,
            maximize=maximize, beta1=beta1, relative_step=relative_step, scale_parameter=scale_parameter,
            warmup_init=warmup_init,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, lr, beta2_decay, eps, weight_decay, beta1, relative_step, warmup_init, dtype_eps):
        eps1, eps2 = eps
        eps1 = where(eps1 == eps1, eps1, dtype_eps)  # None is NaN among numbers
        largest = where(warmup_init, 1e-6 * step, lr)
        return {
            "w": step**beta2_decay,
            "low": eps1,
            "smallest": eps2,
            "rho": where(relative_step, minimum(largest, 1 / sqrt(step)), lr),
            "shrink": 1 - lr * weight_decay,
            "w1": 1 - beta1,
        }

    @staticmethod
    def rule(p, g, r, c, v, m, w, low, smallest, rho, shrink, w1, d, scale_parameter):
        if v is None:
            r = lerp(r, row_mean(g * g), w)
            c = lerp(c, column_mean(g * g), w)
            # Roots and reciprocals of rows and columns, instead of one of each for every element.
            u = g * minimum(1 / sqrt(r / maximum(column_mean(r), low)) * (1 / sqrt(c)), 1 / low)
        else:
            v = lerp(v, g * g, w)
            u = g / maximum(sqrt(v), low)
        alpha = rho * maximum(smallest, sqrt(mean_square(p))) if scale_parameter else rho
        u = alpha / maximum(1.0, sqrt(mean_square(u)) / d) * u
        if m is not None:
            m = lerp(m, u, w1)
        return shrink * p - (u if m is None else m), r, c, v, m
