"""Adadelta."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import sqrt
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class Adadelta(Optimizer):
    r"""Steps in the units of the parameter: the gradient times the ratio of two root mean squares.

    .. math::
        v \leftarrow \rho v + (1 - \rho) g^2, \qquad
        \Delta = \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} g, \qquad
        u \leftarrow \rho u + (1 - \rho) \Delta^2, \qquad p \leftarrow p - \gamma \Delta

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: factor γ of the step, in [0, inf).
        rho: decay rate of both averages, in [0, 1].
        eps: added inside the roots, in [0, inf).
        weight_decay: added to the gradient times p, in [0, inf).
        foreach, capturable, maximize, differentiable: as in torch.optim.Adadelta.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Zeiler 2012, arXiv:1212.5701.
    """

    bounds = {"lr": "[0, inf)", "rho": "[0, 1]", "eps": "[0, inf)", "weight_decay": "[0, inf)"}
    states = {"v": State("square_avg", nonnegative=True), "u": State("acc_delta", nonnegative=True)}
    decay = "l2"
    source = "Zeiler 2012, arXiv:1212.5701"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize, capturable=capturable,
            foreach=foreach, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(rho):
        return {"w": 1 - rho}

    @staticmethod
    def rule(p, g, v, u, lr, rho, w, eps):
        v = rho * v + w * (g * g)
        delta = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho * u + w * (delta * delta)
        return p - lr * delta, v, u
