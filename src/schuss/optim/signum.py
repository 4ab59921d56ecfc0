"""Signum, SignSGD with momentum."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, sign
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class Signum(Optimizer):
    r"""The sign of the momentum: every element moves by exactly lr. With momentum=0 it is SignSGD, without a state.

    .. math::
        m \leftarrow \mu m + (1 - \mu) g, \qquad
        p \leftarrow (1 - \gamma \lambda) p - \gamma \operatorname{sign}(m)

    It is `Lion` with both betas μ.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf): the size of a step of each element.
        momentum: μ, in [0, 1); 0 keeps no average.
        weight_decay: λ, decoupled, in [0, inf).
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Bernstein et al. 2018, arXiv:1802.04434.
    """

    bounds = {"lr": "[0, inf)", "momentum": "[0, 1)", "weight_decay": "[0, inf)"}
    states = {"m": State("momentum_buffer", when="momentum")}
    has_step = False
    decay = "decoupled"
    source = "Bernstein et al. 2018, arXiv:1802.04434"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(momentum):
        return {"w": 1 - momentum}

    @staticmethod
    def rule(p, g, m, lr, w):
        if m is not None:
            m = lerp(m, g, w)
        return p - lr * sign(g if m is None else m), m
