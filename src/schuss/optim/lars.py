"""LARS."""

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import norm
from schuss.optim._trust import trust_ratio
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class LARS(Optimizer):
    r"""SGD for large batches: each tensor has a rate in proportion to its norm over that of its gradient.

    .. math::
        b \leftarrow \mu b + \frac{\eta \|p\|}{\|g\| + \lambda \|p\| + \epsilon} (g + \lambda p), \qquad
        p \leftarrow p - \gamma b

    Nesterov's momentum takes γ (d + μ b) instead of γ b, where d is what was added to b. As in torch's SGD γ multiplies
    the buffer when it is used; the paper's, which gathers γ d, is the same as long as γ is. Where a tensor is all
    zeros, the ratio is 1.

    Biases and the scales of norms are best left out of it, as by all who have reproduced the paper: `adapt=False` in
    their group, and no weight decay. Their steps are SGD's then, and want a smaller lr.
    `schuss.param_groups(model, overrides={lambda name, p: p.dim() < 2: {"adapt": False, "lr": 0.1}})` does it.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf). Tensors that adapt move by γ η of their norm, if there is no momentum.
        momentum: μ, in [0, inf); 0 keeps no buffer.
        weight_decay: λ, in [0, inf); added to the gradient times p, in the norm, too.
        nesterov: Nesterov's momentum; needs momentum.
        trust_coefficient: η, in [0, inf).
        eps: added to the norm, in [0, inf). The paper has none.
        adapt: multiply by the ratio; without, the step is SGD's.
        foreach, maximize, capturable, differentiable: as in torch.optim.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds, or Nesterov's momentum without momentum.

    Source: You, Gitman, Ginsburg 2017, arXiv:1708.03888.
    """

    bounds = {
        "lr": "[0, inf)",
        "momentum": "[0, inf)",
        "weight_decay": "[0, inf)",
        "trust_coefficient": "[0, inf)",
        "eps": "[0, inf)",
    }
    states = {"b": State("momentum_buffer", when="momentum")}
    has_step = False
    source = "You, Gitman, Ginsburg 2017, arXiv:1708.03888"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        adapt: bool = True,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov,
            trust_coefficient=trust_coefficient, eps=eps, adapt=adapt, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        if group["nesterov"] and not group["momentum"]:
            raise ValueError(f"{cls.__name__}: nesterov=True needs momentum, got momentum={group['momentum']}")

    @staticmethod
    def scalars(weight_decay, trust_coefficient):
        return {"lam": weight_decay, "eta": trust_coefficient}

    @staticmethod
    def rule(p, g, b, lr, momentum, lam, eta, eps, nesterov, adapt):
        d = g + lam * p
        if adapt:
            length = norm(p)
            d = trust_ratio(eta * length, norm(g) + lam * length + eps) * d
        if b is None:
            return p - lr * d, b
        b = momentum * b + d
        return p - lr * (d + momentum * b if nesterov else b), b
