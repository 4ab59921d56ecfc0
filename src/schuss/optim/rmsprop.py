"""RMSprop."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, sqrt
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class RMSprop(Optimizer):
    r"""Steps divided by the root of a moving average of squared gradients.

    .. math::
        v \leftarrow \alpha v + (1 - \alpha) g^2, \qquad p \leftarrow p - \gamma \frac{g}{\sqrt{v} + \epsilon}

    Centered, the average gradient's square is taken from v: its variance remains. With momentum μ the quotient goes
    into a buffer b ← μ b + ..., and p moves by γ b. ε stands outside the root (TensorFlow's stands inside).

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        alpha: decay rate, in [0, inf).
        eps: added to the root, in [0, inf).
        weight_decay: added to the gradient times p, in [0, inf).
        momentum: μ, in [0, inf); 0 keeps no buffer.
        centered: divide by the standard deviation instead.
        capturable, foreach, maximize, differentiable: as in torch.optim.RMSprop.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Hinton 2012, lecture 6e; centered: Graves 2013, arXiv:1308.0850.
    """

    bounds = {
        "lr": "[0, inf)",
        "alpha": "[0, inf)",
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
        "momentum": "[0, inf)",
    }
    # Centered, the root is of a difference of two states, which 8 bits would make negative.
    states = {
        "v": State("square_avg", nonnegative=True, exact="centered"),
        "a": State("grad_avg", when="centered", exact=True),
        "b": State("momentum_buffer", when="momentum"),
    }
    decay = "l2"
    source = "Hinton 2012, lecture 6e; centered: Graves 2013, arXiv:1308.0850"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, alpha=alpha, eps=eps, centered=centered, weight_decay=weight_decay,
            capturable=capturable, foreach=foreach, maximize=maximize, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(alpha):
        return {"w": 1 - alpha}

    @staticmethod
    def rule(p, g, v, a, b, lr, alpha, w, eps, momentum):
        v = alpha * v + w * (g * g)
        if a is not None:
            a = lerp(a, g, w)
        u = g / (sqrt(v if a is None else v - a * a) + eps)
        if b is not None:
            u = b = momentum * b + u
        return p - lr * u, v, a, b
