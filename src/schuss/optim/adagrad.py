"""Adagrad."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack

from torch.optim.optimizer import ParamsT

from schuss import bounds
from schuss.formula import sqrt
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class Adagrad(Optimizer):
    r"""Steps divided by the root of the sum of all squared gradients.

    .. math::
        s \leftarrow s + g^2, \qquad
        p \leftarrow p - \frac{\gamma}{1 + (t - 1) \eta} \frac{g}{\sqrt{s} + \epsilon}

    Of a sparse gradient only the rows that it has are touched.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        lr_decay: η, in [0, inf).
        weight_decay: added to the gradient times p, in [0, inf); not with sparse gradients.
        initial_accumulator_value: what s starts as, in [0, inf).
        eps: added to the root, in [0, inf).
        foreach, maximize, differentiable, fused: as in torch.optim.Adagrad.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Duchi, Hazan, Singer 2011, JMLR 12.
    """

    bounds = {
        "lr": "[0, inf)",
        "lr_decay": "[0, inf)",
        "weight_decay": "[0, inf)",
        "initial_accumulator_value": "[0, inf)",
        "eps": "[0, inf)",
    }
    states = {"s": State("sum", init="initial_accumulator_value", nonnegative=True)}
    decay = "l2"
    eager_state = True
    source = "Duchi, Hazan, Singer 2011, JMLR 12"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, foreach=foreach, maximize=maximize,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    def share_memory(self) -> None:
        """Move the state to shared memory, for training by several processes."""
        for kept in self.state.values():
            kept["sum"].share_memory_()

    @classmethod
    def sparse_form(cls, group: Mapping[str, Any]) -> Literal["rows", "either"]:
        return "either" if bounds.number(group["eps"]) > 0 else "rows"  # 0 / 0 would not stay

    @staticmethod
    def scalars(step, lr, lr_decay):
        return {"step_size": lr / (1 + (step - 1) * lr_decay)}

    @staticmethod
    def rule(p, g, s, step_size, eps):
        s = s + g * g
        return p - step_size * g / (sqrt(s) + eps), s
