"""Adam and AdamW."""

from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import lerp, maximum, sqrt
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class Adam(Optimizer):
    r"""Adaptive moment estimation.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    AMSGrad divides by the largest v so far instead; as in torch it is taken before the bias correction, which the
    paper does not have.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf): about the size of a step of each element.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: added to the gradient times p, in [0, inf). Divided by the root like the gradient it does not
            decay weights evenly: use AdamW.
        amsgrad: keep the largest v.
        decoupled_weight_decay: decay as AdamW does.
        foreach, maximize, capturable, differentiable, fused: as in torch.optim.Adam.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Kingma, Ba 2015, arXiv:1412.6980; AMSGrad: Reddi, Kale, Kumar 2018, arXiv:1904.09237.
    """

    bounds = {"lr": "[0, inf)", "betas": ("[0, 1)", "[0, 1)"), "eps": "[0, inf)", "weight_decay": "[0, inf)"}
    states = {
        "m": "exp_avg",
        "v": State("exp_avg_sq", nonnegative=True),
        "v_max": State("max_exp_avg_sq", when="amsgrad", nonnegative=True),
    }
    decay = "l2"
    source = "Kingma, Ba 2015, arXiv:1412.6980; AMSGrad: Reddi, Kale, Kumar 2018, arXiv:1904.09237"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(step, lr, betas):
        beta1, beta2 = betas
        return {
            "w1": 1 - beta1,
            "beta2": beta2,
            "w2": 1 - beta2,
            "step_size": lr / (1 - beta1**step),
            "c2": 1 / sqrt(1 - beta2**step),
        }

    @staticmethod
    def rule(p, g, m, v, v_max, w1, beta2, w2, step_size, c2, eps, amsgrad):
        m = lerp(m, g, w1)
        v = beta2 * v + w2 * (g * g)
        v_max = maximum(v_max, v) if amsgrad else v
        p = p - step_size * m / (sqrt(v_max) * c2 + eps)
        return p, m, v, v_max


class AdamW(Adam):
    r"""Adam with decoupled weight decay: p is multiplied by 1 - γ λ before Adam's step.

    The decay time is 1 / (γ λ) steps, whatever the gradients; `Adam(weight_decay=λ)` is another optimizer.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf): about the size of a step of each element.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: λ, in [0, inf).
        amsgrad: keep the largest v.
        maximize, foreach, capturable, differentiable, fused: as in torch.optim.AdamW.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Loshchilov, Hutter 2019, arXiv:1711.05101.
    """

    source = "Loshchilov, Hutter 2019, arXiv:1711.05101"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=True, **options,
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of Adam continues as AdamW, as in torch
            group["decoupled_weight_decay"] = True
