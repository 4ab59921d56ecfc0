"""SparseAdam."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from torch.optim.optimizer import ParamsT, StateDict

from schuss import bounds
from schuss.formula import sqrt
from schuss.optimizer import Number, Optimizer, Options
from schuss.roles import names_of
from schuss.rule import State


class SparseAdam(Optimizer):
    r"""Adam on those rows that a sparse gradient has; other rows, and their moments, stay as they are.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow (1 - \gamma \lambda) p
            - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt{v} + \epsilon}

    t counts the steps of the tensor, not of the row. As in torch ε stands beside the root of v before its bias is
    corrected, so at the first step it weighs 1 / sqrt(1 - β₂) times as much as in Adam.

    Args:
        params: real tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root, in (0, inf).
        maximize: climb instead of descend.
        weight_decay: λ, in [0, inf), decoupled: at each step that has a gradient for a row, the row decays.
        options: see `schuss.Options`; there is no ema_decay.

    Raises:
        ValueError: a hyperparameter out of its bounds, a parameter that is sparse or complex, or ema_decay.

    Source: Kingma, Ba 2015, arXiv:1412.6980.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "eps": "(0, inf)", "weight_decay": "[0, inf)"}
    states = {"m": "exp_avg", "v": State("exp_avg_sq", nonnegative=True)}
    decay = "decoupled"
    takes_complex = False
    source = "Kingma, Ba 2015, arXiv:1412.6980"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        if options.get("ema_decay") is not None:
            raise ValueError(
                f"{type(self).__name__}: ema_decay is not for it, since an average moves in every row at each step; "
                "use torch.optim.swa_utils.AveragedModel"
            )
        defaults = dict(lr=lr, betas=betas, eps=eps, maximize=maximize, weight_decay=weight_decay)
        options.setdefault("backend", "reference")  # no kernel takes rows: none needs to be loaded
        super().__init__(params, defaults, **options)

    @classmethod
    def sparse_form(cls, group: Mapping[str, Any]) -> Literal["rows"]:
        return "rows"

    @staticmethod
    def scalars(step, lr, betas):
        beta1, beta2 = betas
        return {"w1": 1 - beta1, "w2": 1 - beta2, "step_size": lr * sqrt(1 - beta2**step) / (1 - beta1**step)}

    @staticmethod
    def rule(p, g, m, v, w1, w2, step_size, eps):
        m = m + w1 * (g - m)
        v = v + w2 * (g * g - v)
        return p - step_size * m / (sqrt(v) + eps), m, v

    def _check_parameters(self, group: Mapping[str, Any]) -> None:
        super()._check_parameters(group)
        for name, p in names_of(group, len(self.param_groups)):
            if isinstance(p, torch.Tensor) and p.layout != torch.strided:
                raise ValueError(
                    f"{type(self).__name__}: its parameters must be dense, and {name} is sparse; only gradients may be"
                )

    def _check_gradients(self) -> None:
        for name, p in (pair for i, group in enumerate(self.param_groups) for pair in names_of(group, i)):
            if p.grad is not None and p.grad.layout == torch.strided and not self._makes_state_only(p.grad):
                raise RuntimeError(
                    f"{type(self).__name__} does not support dense gradients, please consider Adam instead: {name} has "
                    "one; or make its layer with sparse=True"
                )

    def _makes_state_only(self, g: torch.Tensor) -> bool:
        """Whether the dense gradient is one with which distributed checkpoints make state: zero, with lr 0."""
        return all(bounds.number(g["lr"]) == 0 for g in self.param_groups) and not bool(g.any())

    def state_dict(self, *, portable: bool = False) -> StateDict:
        """The state as a dict that `load_state_dict` of this class, or of torch.optim.SparseAdam, takes.

        As there, `step` is an int in it.

        Args:
            portable: see `schuss.Optimizer.state_dict`.
        """
        state_dict = super().state_dict(portable=portable)
        state = {
            index: {key: int(value) if key == "step" else value for key, value in kept.items()}
            for index, kept in state_dict["state"].items()
        }
        return {**state_dict, "state": state}
