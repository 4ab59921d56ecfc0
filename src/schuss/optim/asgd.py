"""Averaged SGD."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import maximum, where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class ASGD(Optimizer):
    r"""SGD with a falling rate, and the average of its iterates beside it.

    .. math::
        p \leftarrow (1 - \lambda \eta) p - \eta g, \qquad a \leftarrow a + \mu (p - a), \qquad
        \eta = \frac{\gamma}{(1 + \lambda \gamma t)^{\alpha}}, \qquad \mu = \frac{1}{\max(1, t - t_0)}

    The average is `optimizer.state[p]["ax"]`; the parameter itself is not averaged. As in torch, the rate and the
    weight computed after step t are used by step t + 1.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: first learning rate γ, in [0, inf).
        lambd: decay λ, any number.
        alpha: power of the rate's fall, any number.
        t0: step at which averaging starts, any number.
        weight_decay: added to the gradient times p, in [0, inf).
        foreach, maximize, differentiable, capturable: as in torch.optim.ASGD.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Polyak, Juditsky 1992; Bottou 2012.
    """

    bounds = {
        "lr": "[0, inf)",
        "lambd": "(-inf, inf)",
        "alpha": "(-inf, inf)",
        "t0": "(-inf, inf)",
        "weight_decay": "[0, inf)",
    }
    states = {"a": State("ax", exact=True)}
    scalar_states = {"eta": "lr", "mu": 1.0}
    decay = "l2"
    source = "Polyak, Juditsky 1992; Bottou 2012"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay, foreach=foreach, maximize=maximize,
            differentiable=differentiable, capturable=capturable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, eta, mu, lr, lambd, alpha, t0):
        return {
            "shrink": 1 - lambd * eta,
            "rate": eta,
            "weight": mu,
            "eta": lr / (1 + lambd * lr * step) ** alpha,
            "mu": 1 / maximum(1.0, step - t0),
        }

    @staticmethod
    def rule(p, g, a, shrink, rate, weight):
        p = shrink * p - rate * g
        a = where(weight == 1, p, a + weight * (p - a))  # exactly p, even where a is not finite
        return p, a
