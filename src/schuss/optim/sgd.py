"""Stochastic gradient descent."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class SGD(Optimizer):
    r"""Stochastic gradient descent, with momentum or Nesterov's.

    .. math::
        b &\leftarrow \mu b + (1 - \tau) g \\
        p &\leftarrow p - \gamma b \quad\text{(Nesterov: } p - \gamma (g + \mu b)\text{)}

    The buffer b starts as the first gradient, undampened. The rate multiplies b when it is used, not when it is
    gathered: after a change of lr this differs from the form of Sutskever et al.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        momentum: μ, in [0, inf); 0 keeps no buffer.
        dampening: τ, any number.
        weight_decay: added to the gradient times p, in [0, inf).
        nesterov: look ahead along the buffer; needs momentum > 0 and dampening 0.
        maximize, foreach, differentiable, fused: as in torch.optim.SGD.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds, or nesterov without what it needs.

    Source: Robbins, Monro 1951; Polyak 1964; Nesterov 1983.
    """

    bounds = {
        "lr": "[0, inf)",
        "momentum": "[0, inf)",
        "dampening": "(-inf, inf)",
        "weight_decay": "[0, inf)",
    }
    states = {"b": State("momentum_buffer", when="momentum")}
    has_step = False
    decay = "l2"
    source = "Robbins, Monro 1951; Polyak 1964; Nesterov 1983"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{cls.__name__}: Nesterov momentum requires a momentum and zero dampening, got "
                f"momentum={group['momentum']}, dampening={group['dampening']}"
            )

    @classmethod
    def sparse_form(cls, group: Mapping[str, Any]) -> Literal["dense", "either"]:
        return "dense" if group["momentum"] else "either"  # a buffer moves the rows without a gradient, too

    @staticmethod
    def scalars(first, dampening):
        return {"gather": where(first, 1.0, 1 - dampening)}

    @staticmethod
    def rule(p, g, b, lr, momentum, gather, nesterov):
        if b is None:
            return p - lr * g, b
        b = momentum * b + gather * g
        return p - lr * (g + momentum * b if nesterov else b), b
