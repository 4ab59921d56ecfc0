"""LAMB."""

from collections.abc import Mapping
from math import inf
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import clamp, lerp, norm, sqrt
from schuss.optim._trust import trust_ratio
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class LAMB(Optimizer):
    r"""Adam for large batches: each tensor's step is as long as lr times the tensor itself.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda p \\
        p &\leftarrow p - \gamma \frac{\phi(\|p\|)}{\|u\|} u, \qquad
        \phi(z) = \min(\max(z, \gamma_l), \gamma_u)

    The norms are of the whole tensor. Where one of them is 0, the ratio is 1. The ratio does not know how reliable a
    gradient is: a tensor whose gradients have become zero goes on at full length along its old average, for as long as
    float32 can hold that.

    Biases and the scales of norms are best left out of it, as by the authors: `adapt=False` in their group, and no
    weight decay. `schuss.param_groups(model, overrides={lambda name, p: p.dim() < 2: {"adapt": False}})` does both.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf): the relative length of a step.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: λ, in [0, inf); a part of the update, and of its norm.
        bias_correction: divide the moments by 1 - βᵗ, as in the paper's algorithm; its first code, and packages after
            it, do not.
        phi: the bounds (γₗ, γᵤ) of φ, in [0, inf) and (0, inf]. Without bounds, (0, inf), φ is the norm itself.
        adapt: multiply by the ratio; without, the step is AdamW's.
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds, or bounds of φ in the wrong order.

    Source: You et al. 2020, arXiv:1904.00962.
    """

    bounds = {
        "lr": "[0, inf)",
        "betas": ("[0, 1)", "[0, 1)"),
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
        "phi": ("[0, inf)", "(0, inf]"),
    }
    states = {"m": "exp_avg", "v": State("exp_avg_sq", nonnegative=True)}
    source = "You et al. 2020, arXiv:1904.00962"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        bias_correction: bool = True,
        phi: tuple[float, float] = (0.0, inf),
        adapt: bool = True,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction, phi=phi,
            adapt=adapt, maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        low, high = group["phi"]
        if low > high:
            raise ValueError(f"{cls.__name__}: phi must be a lower bound and then an upper one, got {group['phi']}")

    @staticmethod
    def scalars(step, betas, weight_decay, phi):
        beta1, beta2 = betas
        return {
            "w1": 1 - beta1,
            "beta2": beta2,
            "w2": 1 - beta2,
            "c1": 1 / (1 - beta1**step),
            "c2": 1 / sqrt(1 - beta2**step),
            "lam": weight_decay,
            "low": phi[0],
            "high": phi[1],
        }

    @staticmethod
    def rule(p, g, m, v, lr, w1, beta2, w2, c1, c2, eps, lam, low, high, bias_correction, adapt):
        m = lerp(m, g, w1)
        v = beta2 * v + w2 * (g * g)
        u = c1 * m / (sqrt(v) * c2 + eps) if bias_correction else m / (sqrt(v) + eps)
        u = u + lam * p
        if adapt:
            lr = lr * trust_ratio(clamp(norm(p), low, high), norm(u))
        return p - lr * u, m, v
