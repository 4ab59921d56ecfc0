"""Shampoo."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from torch.optim.optimizer import ParamsT

from schuss.bounds import number
from schuss.engine.state import find
from schuss.formula import lerp, norm, sqrt, where
from schuss.matrices import kronecker
from schuss.optim._preconditioned import WORDS, Precision, Preconditioned, Renewal, blemish, of_side
from schuss.optimizer import Number, Options
from schuss.rule import Shape, State

Grafting = Literal["sgd", "adagrad", "rmsprop", "adam"] | None
_GRAFTING = (None, "sgd", "adagrad", "rmsprop", "adam")


def _squares(dim: int) -> Shape:
    """The shape of the square matrices of the rows (0) or columns (1) of a parameter's blocks."""

    def shape(group: Mapping[str, Any], p: torch.Tensor) -> tuple[int, ...]:
        counts, lengths = zip(
            *(kronecker.cut(side, int(group["block_size"])) for side in (p.shape[0], math.prod(p.shape[1:]))),
            strict=True,
        )
        return (math.prod(counts), lengths[dim], lengths[dim])

    return shape


def _divides(group: Mapping[str, Any], _: torch.Tensor) -> bool:
    """Whether the grafted step divides by a root."""
    return group["grafting"] not in (None, "sgd")


class Shampoo(Preconditioned):
    r"""Steps preconditioned on either side of a matrix, as long as those of a method that is grafted on.

    .. math::
        L &\leftarrow \beta_2 L + (1 - \beta_2) g g^T, \qquad R \leftarrow \beta_2 R + (1 - \beta_2) g^T g, \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) g \\
        d &= (L + \epsilon_L I)^{-1/4} \, \hat m \, (R + \epsilon_R I)^{-1/4}, \qquad
        \hat m = m / (1 - \beta_1^t), \qquad \epsilon_A = \epsilon \lambda_{\max}(A) \\
        p &\leftarrow p - \gamma \frac{\lVert a \rVert_F}{\lVert d \rVert_F} d, \qquad
        a = \frac{\hat m}{\sqrt{v / (1 - \beta_g^t)} + \epsilon_g} \text{ for grafting="adam"}, \qquad
        v \leftarrow \beta_g v + (1 - \beta_g) g^2

    The roots are computed after every `precondition_frequency`-th step, from the gradients up to it, and used from the
    next step on; up to then a parameter takes the steps a. So it does where d is zero, and where there are no roots.
    If only one side has any, the power is -1/2.

    Sides longer than `block_size` are cut into blocks, as few as can be and of one length, each with an L and an R of
    its own; the norms are of the whole tensor. A tensor of more than two dimensions is a matrix with a row for each
    element of its first one. Sides of length 1, and complex tensors, get no roots.

    `optimizer.fallbacks` counts how often roots had to be kept because their L or R had NaN or infinity in it, or
    because its eigenvectors were not found.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf): that of the grafted method.
        betas: decay rates (β₁, β₂) of m and of L and R, in [0, 1) and [0, 1]; with β₂ = 1 they are sums, as in Gupta's
            paper, else averages, divided by 1 - β₂ᵗ.
        eps: ε, what is added to eigenvalues in terms of the largest one, in (0, inf).
        weight_decay: λ, decoupled, in [0, inf).
        momentum: of the steps, in [0, 1).
        nesterov: look ahead in them.
        block_size: the longest side of a block, in [1, inf).
        precondition_frequency: steps between two computations of the roots, in [1, inf).
        start_preconditioning_step: the first step after which roots are computed, in [1, inf).
        exponent: powers -exponent instead of -1/4 or -1/2, in (0, inf).
        grafting: what the steps are as long as: "adam", "rmsprop" (without 1 - β_gᵗ), "adagrad" (v is a sum), "sgd"
            (a is m̂), or None: p moves by d itself, and does not move before there are roots.
        grafting_beta2: β_g, in [0, 1).
        grafting_eps: ε_g, in [0, inf).
        precondition_1d: whether vectors get roots, too.
        precision: None for products of matrices in what is computed in, float32 or float64; or "bfloat16", which takes
            less than half the time. Roots are computed in float32 at least.
        foreach, maximize: as in torch.optim.
        capturable: must be False: the host computes the roots.
        options: see `schuss.Options`. Of the states, L, R and the roots stay float32 at least.

    Raises:
        ValueError: a hyperparameter out of its bounds; an unknown grafting or precision; nesterov without momentum;
            capturable=True.

    Source: Gupta, Koren, Singer 2018, arXiv:1802.09568; blocks and grafting: Anil et al. 2020, arXiv:2002.09018; Shi et
        al. 2023, arXiv:2309.06497.
    """

    bounds = {
        "lr": "[0, inf)",
        "betas": ("[0, 1)", "[0, 1]"),
        "eps": "(0, inf)",
        "weight_decay": "[0, inf)",
        "momentum": "[0, 1)",
        "block_size": "[1, inf)",
        "precondition_frequency": "[1, inf)",
        "start_preconditioning_step": "[1, inf)",
        "exponent": "None or (0, inf)",
        "grafting_beta2": "[0, 1)",
        "grafting_eps": "[0, inf)",
    }
    states = {
        "m": "exp_avg",
        "v": State("grafting_sq", when=_divides, nonnegative=True),
        "b": State("momentum_buffer", when="momentum"),
        "L": State("left_moment", when=of_side(0), wide=True, like=_squares(0)),
        "R": State("right_moment", when=of_side(1), wide=True, like=_squares(1)),
        "PL": State("left_root", when=of_side(0), wide=True, like=_squares(0)),
        "PR": State("right_root", when=of_side(1), wide=True, like=_squares(1)),
    }
    choices = ("grafting", "block_size", "precision")
    decay = "decoupled"
    source = (
        "Gupta, Koren, Singer 2018, arXiv:1802.09568; blocks and grafting: Anil et al. 2020, arXiv:2002.09018; "
        "Shi et al. 2023, arXiv:2309.06497"
    )

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        momentum: float = 0,
        nesterov: bool = False,
        block_size: int = 1024,
        precondition_frequency: int = 10,
        start_preconditioning_step: int = 10,
        exponent: float | None = None,
        grafting: Grafting = "adam",
        grafting_beta2: float = 0.999,
        grafting_eps: float = 1e-8,
        precondition_1d: bool = False,
        *,
        precision: Precision = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            block_size=block_size, precondition_frequency=precondition_frequency,
            start_preconditioning_step=start_preconditioning_step, exponent=exponent, grafting=grafting,
            grafting_beta2=grafting_beta2, grafting_eps=grafting_eps, precondition_1d=precondition_1d,
            precision=precision, foreach=foreach, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, capturable=capturable, **options)

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group["grafting"] not in _GRAFTING:
            raise ValueError(
                f"{cls.__name__}: grafting must be None, 'sgd', 'adagrad', 'rmsprop' or 'adam', "
                f"got {group['grafting']!r}"
            )
        if group["nesterov"] and not group["momentum"]:
            raise ValueError(f"{cls.__name__}: nesterov=True needs momentum, got momentum={group['momentum']}")

    @staticmethod
    def scalars(step, betas, grafting_beta2):
        beta1, beta2 = betas
        return {
            "w1": 1 - beta1,
            "c1": 1 / (1 - beta1**step),
            "keep": beta2,
            "weight": where(beta2 == 1, 1.0, 1 - beta2),
            "keep_v": grafting_beta2,
            "w_v": 1 - grafting_beta2,
            "c_v": 1 / sqrt(1 - grafting_beta2**step),
        }

    @staticmethod
    def rule(
        p, g, m, v, b, L, R, PL, PR, lr, w1, c1, keep, weight, keep_v, w_v, c_v, grafting_eps, momentum, nesterov,
        grafting, block_size, precision,
    ):  # fmt: skip
        words, block = WORDS[precision], int(block_size)
        m = lerp(m, g, w1)
        a = u = c1 * m
        if v is not None:
            v = v + g * g if grafting == "adagrad" else keep_v * v + w_v * (g * g)
            a = a / ((sqrt(v) * c_v if grafting == "adam" else sqrt(v)) + grafting_eps)
        if PL is None and PR is None:
            u = a
        else:
            u = words.surround(u, PL, PR, block=block)
            if grafting is not None:
                length = norm(u)
                u = where(length > 0, norm(a) / length, 0.0) * u + where(length > 0, 0.0, 1.0) * a
        if b is not None:
            b = momentum * b + u
            u = u + momentum * b if nesterov else b
        if L is not None:
            L = words.left_moment(g, L, keep, weight, block=block)
        if R is not None:
            R = words.right_moment(g, R, keep, weight, block=block)
        return p - lr * u, m, v, b, L, R, PL, PR

    @staticmethod
    def _is_due(group: Mapping[str, Any], step: int) -> bool:
        after = number(group["start_preconditioning_step"])
        return step >= after and step % int(group["precondition_frequency"]) == 0

    def _renewed(self, p: torch.Tensor, group: Mapping[str, Any], step: int) -> Renewal:
        kept, renewal = self.state[p], Renewal()
        roots = {side: cell for side in ("left", "right") if (cell := find(kept, f"{side}_root")) is not None}
        beta2, eps = number(group["betas"][1]), number(group["eps"])
        for side, cell in roots.items():
            moment = kept[f"{side}_moment"]
            exponent = 0.5 / len(roots) if group["exponent"] is None else number(group["exponent"])
            root = kronecker.inverse_root(moment if beta2 == 1 else moment / (1 - beta2**step), exponent, eps)
            if root is None:
                renewal.complaints.append(f"{blemish(moment)}; the roots of that side stay as they were")
            else:
                renewal.values.append((cell, root))
        return renewal
