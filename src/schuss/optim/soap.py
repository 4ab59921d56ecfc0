"""SOAP."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch.optim.optimizer import ParamsT

from schuss.engine.state import Cell, find
from schuss.formula import lerp, mean_square, sqrt, where
from schuss.matrices import kronecker
from schuss.optim._preconditioned import WORDS, Precision, Preconditioned, Renewal, blemish, of_side
from schuss.optimizer import Number, Options
from schuss.rule import State


class SOAP(Preconditioned):
    r"""Adam in the eigenbasis of Shampoo's preconditioners. For matrices; other tensors take Adam itself.

    .. math::
        g' = Q_L^T g\, Q_R, \qquad
        m &\leftarrow \beta_1 m + (1 - \beta_1) g', \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g'^2 \\
        p &\leftarrow p - \gamma\, Q_L \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} Q_R^T \\
        L &\leftarrow \beta_3 L + (1 - \beta_3) g g^T, \qquad R \leftarrow \beta_3 R + (1 - \beta_3) g^T g

    :math:`Q_L` and :math:`Q_R` are the eigenvectors of L and R: found at the first step, which does nothing else and is
    not counted in t, and brought closer by one power iteration and a QR decomposition after every
    `precondition_frequency`-th step. Its columns are put in the order of their eigenvalues before, and v with them; m
    is turned into the new basis.

    A tensor of more than two dimensions is a matrix with a row for each element of its first one. Sides of length 1, or
    longer than `max_precond_dim`, and complex tensors get no basis.

    `optimizer.fallbacks` counts how often a basis had to be kept because its L or R had NaN or infinity in it, or
    because its eigenvectors were not found.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: learning rate γ, in [0, inf).
        betas: decay rates of the moments, each in [0, 1).
        shampoo_beta: decay rate β₃ of L and R, in [0, 1); None: betas[1].
        eps: added to the root, in [0, inf).
        weight_decay: λ, decoupled, in [0, inf).
        precondition_frequency: steps between two bases, in [1, inf).
        max_precond_dim: the longest side that gets a basis, in [0, inf).
        precondition_1d: whether vectors get one, too.
        normalize_grads: divide the update of each tensor by the root of its mean square. For bases that are renewed
            every hundred steps, say.
        correct_bias: divide the moments by 1 - βᵗ.
        precision: None for products of matrices in what is computed in, float32 or float64; or "bfloat16", which takes
            less than half the time, and loses what is a thousand times smaller than the rest of a gradient.
        foreach, maximize: as in torch.optim.
        capturable: must be False: the host renews the bases.
        options: see `schuss.Options`. Of the states, L, R and the bases stay float32 at least.

    Raises:
        ValueError: a hyperparameter out of its bounds; capturable=True.

    Source: Vyas et al. 2024, arXiv:2409.11321.
    """

    bounds = {
        "lr": "[0, inf)",
        "betas": ("[0, 1)", "[0, 1)"),
        "shampoo_beta": "None or [0, 1)",
        "eps": "[0, inf)",
        "weight_decay": "[0, inf)",
        "precondition_frequency": "[1, inf)",
        "max_precond_dim": "[0, inf)",
    }
    states = {
        "m": "exp_avg",
        "v": State("exp_avg_sq", nonnegative=True),
        "L": State("left_moment", when=of_side(0), wide=True, like="left"),
        "R": State("right_moment", when=of_side(1), wide=True, like="right"),
        "QL": State("left_basis", when=of_side(0), wide=True, like="left"),
        "QR": State("right_basis", when=of_side(1), wide=True, like="right"),
    }
    choices = ("precision",)
    decay = "decoupled"
    source = "Vyas et al. 2024, arXiv:2409.11321"

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        *,
        precision: Precision = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, shampoo_beta=shampoo_beta, eps=eps, weight_decay=weight_decay,
            precondition_frequency=precondition_frequency, max_precond_dim=max_precond_dim,
            precondition_1d=precondition_1d, normalize_grads=normalize_grads, correct_bias=correct_bias,
            precision=precision, foreach=foreach, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, capturable=capturable, **options)

    @staticmethod
    def scalars(step, first, lr, betas, shampoo_beta, weight_decay, decoupled):
        beta1, beta2 = betas
        keep = where(shampoo_beta == shampoo_beta, shampoo_beta, beta2)  # None arrives as NaN
        return {
            "moves": where(first, 0.0, 1.0),
            "w1": 1 - beta1,
            "beta2": beta2,
            "w2": 1 - beta2,
            "c1": 1 / (1 - beta1 ** (step - 1)),
            "c2": 1 / sqrt(1 - beta2 ** (step - 1)),
            "keep": keep,
            "weight": 1 - keep,
            "decay": where(first, 1.0, 1 - lr * weight_decay * decoupled),
        }

    @staticmethod
    def rule(
        p, g, m, v, L, R, QL, QR, moves, lr, w1, beta2, w2, c1, c2, eps, keep, weight, normalize_grads, correct_bias,
        precision,
    ):  # fmt: skip
        words, turns = WORDS[precision], QL is not None or QR is not None
        x = words.rotate(g, QL, QR) if turns else g
        m = where(moves > 0, lerp(m, x, w1), m)
        v = where(moves > 0, beta2 * v + w2 * (x * x), v)
        u = c1 * m / (sqrt(v) * c2 + eps) if correct_bias else m / (sqrt(v) + eps)
        if turns:
            u = words.rotate_back(u, QL, QR)
        if normalize_grads:
            u = u / (sqrt(mean_square(u)) + 1e-30)
        p = where(moves > 0, p - lr * u, p)
        if L is not None:
            L = words.left_moment(g, L, keep, weight)
        if R is not None:
            R = words.right_moment(g, R, keep, weight)
        return p, m, v, L, R, QL, QR

    @staticmethod
    def _is_due(group: Mapping[str, Any], step: int) -> bool:
        return step == 1 or (step - 1) % int(group["precondition_frequency"]) == 0

    def _renewed(self, p: torch.Tensor, group: Mapping[str, Any], step: int) -> Renewal:
        kept, renewal = self.state[p], Renewal()
        turns: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        orders: dict[str, torch.Tensor] = {}
        for side in ("left", "right"):
            moment, cell = kept.get(f"{side}_moment"), find(kept, f"{side}_basis")
            if moment is None or cell is None:
                continue
            basis = cell.values
            if not basis[0].any():  # the first one: no row of a basis is 0
                new = kronecker.eigenbasis(moment)
                if new is None:
                    renewal.complaints.append(f"{blemish(moment)}; its basis is the identity until the next one")
                    new = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
            elif (found := kronecker.next_basis(moment, basis)) is None:
                renewal.complaints.append(f"{blemish(moment)}; its basis stays as it was")
                continue
            else:
                new, orders[side] = found
                turns[side] = basis, new
            renewal.values.append((cell, new))
        if turns:
            renewal.values += self._turned(p, group, turns, orders)
        return renewal

    def _turned(
        self,
        p: torch.Tensor,
        group: Mapping[str, Any],
        turns: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        orders: Mapping[str, torch.Tensor],
    ) -> list[tuple[Cell, torch.Tensor]]:
        """The cells of m and v with their values in new bases.

        Args:
            p, group: the parameter and its group.
            turns: side -> its old basis and its new one.
            orders: side -> the places of its old directions in the new basis.
        """
        m, v = (find(self.state[p], name) for name in ("exp_avg", "exp_avg_sq"))
        assert m is not None
        assert v is not None
        dtype = next(iter(turns.values()))[0].dtype
        of_m, of_v = (cell.read(dtype).reshape(p.shape[0], -1) for cell in (m, v))
        of_m = kronecker.turn(of_m, turns.get("left"), turns.get("right"), WORDS[group["precision"]].dtype)
        for dim, side in enumerate(("left", "right")):
            if side in orders:
                of_v = of_v.index_select(dim, orders[side])
        return [(m, of_m.view(p.shape)), (v, of_v.view(p.shape))]
