"""MARS."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import maximum, norm, where
from schuss.optim.adam import Adam
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class MARS(Optimizer):
    r"""AdamW on gradients whose noise is reduced by their change since the step before: the authors' MARS-AdamW.

    .. math::
        c = g + \gamma_c \frac{\beta_1}{1 - \beta_1} (g - g_{\text{prev}}), \qquad
        \tilde c = c \min\left(1, \frac{\kappa}{\|c\|}\right), \qquad
        p \leftarrow \operatorname{AdamW}(p, \tilde c)

    The norm is of the whole tensor. The first difference is zero, as in the paper; the authors' code takes the first
    gradient itself. The gradient before is a copy; theirs is the tensor p.grad, which is the gradient of now if it is
    zeroed and filled in place. This is the approximation, MARS-approx, which costs no second gradient.

    Their code leaves tensors other than matrices to AdamW with settings of its own, here
    `{"params": rest, "gamma": 0, "clip": math.inf, "betas": (0.9, 0.95), "weight_decay": 0.1}`.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        gamma: γ_c, how much of the change is added, in [0, inf); 0 keeps no gradient and, with clip=math.inf, is
            AdamW.
        clip: κ, the largest norm of a tensor's c, in (0, inf].
        eps: added to the root, in [0, inf).
        weight_decay: λ, decoupled, in [0, inf).
        amsgrad: keep the largest v.
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Yuan et al. 2024, arXiv:2411.10438.
    """

    bounds = Adam.bounds | {"gamma": "[0, inf)", "clip": "(0, inf]"}
    states = {**Adam.states, "before": State("last_grad", when="gamma")}
    decay = "decoupled"
    source = "Yuan et al. 2024, arXiv:2411.10438"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float = 0.025,
        clip: float = 1.0,
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, gamma=gamma, clip=clip, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, first, lr, betas, gamma):
        beta1, _ = betas
        return {**Adam.scalars(step, lr, betas), "more": where(first, 0.0, gamma * beta1 / (1 - beta1))}

    @staticmethod
    def rule(p, g, m, v, v_max, before, w1, beta2, w2, step_size, c2, eps, more, clip, amsgrad):
        c = g if before is None else g + more * (g - before)
        c = 1 / maximum(norm(c) / clip, 1.0) * c
        return *Adam.rule(p, c, m, v, v_max, w1, beta2, w2, step_size, c2, eps, amsgrad), g
