"""Rprop."""

from typing import Unpack

from torch.optim.optimizer import ParamsT

from schuss.formula import clamp, sign, where
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State


class Rprop(Optimizer):
    r"""Resilient backpropagation: only the gradient's sign, and a step size for each element.

    .. math::
        s \leftarrow \begin{cases} \min(\eta^+ s, s_{\max}) & g\, g_{\text{prev}} > 0 \\
        \max(\eta^- s, s_{\min}),\; g \leftarrow 0 & g\, g_{\text{prev}} < 0 \\ s & \text{otherwise} \end{cases}
        \qquad p \leftarrow p - s \operatorname{sign}(g)

    For full batches: the noise of mini-batches flips signs.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: first step size of each element, in [0, inf).
        etas: factors η⁻ in (0, 1) and η⁺ in (1, inf).
        step_sizes: smallest and largest step size, each in [0, inf).
        capturable, foreach, maximize, differentiable: as in torch.optim.Rprop.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds.

    Source: Riedmiller, Braun 1993.
    """

    bounds = {"lr": "[0, inf)", "etas": ("(0, 1)", "(1, inf)"), "step_sizes": ("[0, inf)", "[0, inf)")}
    states = {"g_prev": State("prev", exact=True), "s": State("step_size", init="lr", exact=True)}
    source = "Riedmiller, Braun 1993"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, etas=etas, step_sizes=step_sizes, foreach=foreach, maximize=maximize,
            differentiable=differentiable, capturable=capturable,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @staticmethod
    def scalars(etas, step_sizes):
        return {"shrink": etas[0], "grow": etas[1], "s_min": step_sizes[0], "s_max": step_sizes[1]}

    @staticmethod
    def rule(p, g, g_prev, s, shrink, grow, s_min, s_max):
        agreement = g * g_prev
        s = clamp(s * where(agreement > 0, grow, where(agreement < 0, shrink, 1)), s_min, s_max)
        g = where(agreement < 0, 0, g)  # and so the next step neither grows nor shrinks
        return p - s * sign(g), g, s
