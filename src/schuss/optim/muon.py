"""Muon and NorMuon."""

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
from torch.optim.optimizer import ParamsT

from schuss.bounds import nearest
from schuss.formula import columns, lerp, matrix_function, maximum, norm, row_mean, rows, sqrt
from schuss.matrices.newton_schulz import PRESETS, Coefficients
from schuss.matrices.newton_schulz import orthogonalize as _orthogonalize
from schuss.optimizer import Number, Optimizer, Options
from schuss.rule import State

orthogonalize = matrix_function(_orthogonalize, torch.bfloat16)
"""The word for U Vᵀ of U S Vᵀ, in bfloat16."""

AdjustLr = Literal["original", "match_rms_adamw"]
_ADJUST = (None, "original", "match_rms_adamw")


class Muon(Optimizer):
    r"""Momentum whose step is made orthogonal: all its singular values become about 1. For matrices of hidden layers.

    .. math::
        m &\leftarrow \mu m + (1 - \mu) g, \qquad x = \mu m + (1 - \mu) g \text{ (nesterov) or } m \\
        p &\leftarrow (1 - \gamma \lambda) p - \gamma\, s\, U V^T, \qquad x = U S V^T \text{ by Newton-Schulz}

    with s = sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)) for steps as large as AdamW's
    (adjust_lr_fn="match_rms_adamw"). A convolution's kernel is a matrix with a row for each output channel.

    Embeddings, output heads, norms and biases belong to another optimizer: `schuss.param_groups(model, matrices={...})`
    tells them apart, and `schuss.Combined.of` steps both.

    Args:
        params: tensors of two dimensions or more, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        weight_decay: λ, in [0, inf), decoupled.
        momentum: μ, in [0, 1].
        nesterov: look ahead.
        ns_coefficients: (a, b, c) of each Newton-Schulz iteration; or "jordan", these same numbers, or "polar_express",
            others for each of the iterations, which bring singular values closer to 1; or a sequence of triples.
        eps: the smallest Frobenius norm that x is divided by, in [0, inf).
        ns_steps: iterations, in [0, 100).
        adjust_lr_fn: "original" (as None) or "match_rms_adamw".
        maximize: climb. Not in torch.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds; a parameter that is no matrix, or complex.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; adjust_lr_fn="match_rms_adamw":
        Liu et al. 2025, arXiv:2502.16982; "polar_express": Amsel, Persson, Musco, Gower 2025, arXiv:2505.16932.
    """

    bounds = {
        "lr": "[0, inf)",
        "weight_decay": "[0, inf)",
        "momentum": "[0, 1]",
        "eps": "[0, inf)",
        "ns_steps": "[0, 100)",
    }
    states = {"m": "momentum_buffer"}
    has_step = False
    decay = "decoupled"
    dimensions = "[2, inf)"
    takes_complex = False
    choices = ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    source = "Jordan et al. 2024, https://kellerjordan.github.io/posts/muon"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | tuple[float, float, float] | Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients,
            eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, **options)

    @classmethod
    def check_group(cls, group: Any) -> None:
        _coefficients(cls.__name__, group["ns_coefficients"], group["ns_steps"])
        if group["adjust_lr_fn"] not in _ADJUST:
            raise ValueError(
                f"{cls.__name__}: adjust_lr_fn must be None, 'original' or 'match_rms_adamw', "
                f"got {group['adjust_lr_fn']!r}"
            )

    @staticmethod
    def scalars(momentum):
        return {"w": 1 - momentum}

    @staticmethod
    def rule(p, g, m, lr, momentum, w, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn):
        u, m = _direction(g, m, momentum, w, nesterov, ns_coefficients, eps, ns_steps)
        return p - lr * _scale(p, adjust_lr_fn) * u, m


class NorMuon(Muon):
    r"""Muon whose rows, one for each neuron, are divided by the root of their second moment.

    .. math::
        u = U V^T \text{ of Muon}, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) \overline{u^2}^{\,\text{row}}, \qquad
        w = \frac{u}{\sqrt v + \epsilon_2}, \qquad
        p \leftarrow (1 - \gamma \lambda) p - \gamma\, s \frac{\lVert u \rVert_F}{\lVert w \rVert_F}\, w

    Args:
        params: tensors of two dimensions, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        weight_decay: λ, in [0, inf), decoupled.
        momentum: μ, in [0, 1].
        nesterov: look ahead.
        ns_coefficients, eps, ns_steps, adjust_lr_fn: as for `Muon`.
        beta2: decay rate of the rows' second moment, in [0, 1).
        eps2: ε₂, in [0, inf).
        maximize: climb.
        options: see `schuss.Options`.

    Raises:
        ValueError: a hyperparameter out of its bounds; a parameter that is no matrix, or complex.

    Source: Li et al. 2025, arXiv:2510.05491.
    """

    bounds = Muon.bounds | {"beta2": "[0, 1)", "eps2": "[0, inf)"}
    states = Muon.states | {"v": State("second_momentum", like="rows")}
    dimensions = "[2, 2]"
    source = "Li et al. 2025, arXiv:2510.05491"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | tuple[float, float, float] | Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        beta2: float = 0.95,
        eps2: float = 1e-10,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients,
            eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn, beta2=beta2, eps2=eps2, maximize=maximize,
        )  # fmt: skip
        super(Muon, self).__init__(params, defaults, **options)

    @staticmethod
    def scalars(momentum, beta2):
        return {"w": 1 - momentum, "w2": 1 - beta2}

    @staticmethod
    def rule(p, g, m, v, lr, momentum, w, w2, eps2, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn):
        u, m = _direction(g, m, momentum, w, nesterov, ns_coefficients, eps, ns_steps)
        v = lerp(v, row_mean(u * u), w2)
        divided = u / (sqrt(v) + eps2)
        length = norm(u) / (norm(divided) + 1e-10)
        return p - lr * _scale(p, adjust_lr_fn) * length * divided, m, v


def _direction(
    g: Any, m: Any, momentum: Any, w: Any, nesterov: bool, ns_coefficients: Any, eps: float, ns_steps: int
) -> tuple[Any, Any]:
    """The orthogonal step, and the new momentum."""
    m = lerp(m, g, w)
    x = lerp(g, m, momentum) if nesterov else m
    return orthogonalize(x, coefficients=_coefficients("Muon", ns_coefficients, ns_steps), eps=eps), m


def _scale(p: Any, adjust_lr_fn: str | None) -> Any:
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * sqrt(maximum(rows(p), columns(p)))
    return sqrt(maximum(1.0, rows(p) / maximum(columns(p), 1)))


def _coefficients(owner: str, given: Any, steps: int) -> tuple[tuple[float, float, float], ...]:
    """The coefficients of each iteration.

    Raises:
        ValueError: they are none.
    """
    steps = int(steps)
    if isinstance(given, str):
        if given not in PRESETS:
            raise ValueError(f"{owner}: ns_coefficients are no preset of coefficients: {nearest(given, PRESETS)}")
        given = PRESETS[given]
    several = isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Sequence)
    try:
        triples = [(float(a), float(b), float(c)) for a, b, c in (given if several else [given])]
    except (TypeError, ValueError):
        raise ValueError(
            f"{owner}: ns_coefficients must be three numbers, or such triples, or one of {', '.join(PRESETS)}, "
            f"got {given!r}"
        ) from None
    triples += triples[-1:] * (steps - len(triples))
    return tuple(triples[:steps])
