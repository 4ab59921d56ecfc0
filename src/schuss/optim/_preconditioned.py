"""What SOAP and Shampoo share: square matrices of rows and columns, renewed now and then, after a step."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from schuss.bounds import number
from schuss.engine.process import uninterrupted
from schuss.engine.state import Cell
from schuss.formula import matrix_function
from schuss.matrices import kronecker
from schuss.optimizer import Optimizer
from schuss.roles import names_of

Precision = Literal["bfloat16"] | None


class _Words:
    """The functions of matrices as words of rules.

    Args:
        dtype: of their products; None: what a rule computes in.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.rotate = matrix_function(kronecker.rotate, dtype)
        self.rotate_back = matrix_function(kronecker.rotate_back, dtype)
        self.surround = matrix_function(kronecker.surround, dtype)
        self.left_moment = matrix_function(kronecker.left_moment, dtype, square=True)
        self.right_moment = matrix_function(kronecker.right_moment, dtype, square=True)


WORDS: Mapping[Precision, _Words] = {None: _Words(None), "bfloat16": _Words(torch.bfloat16)}


def of_side(dim: int) -> Callable[[Mapping[str, Any], torch.Tensor], bool]:
    """Whether the rows (0) or columns (1) of a parameter, as a matrix, have square matrices."""

    def exists(group: Mapping[str, Any], p: torch.Tensor) -> bool:
        if p.is_complex() or not p.numel() or p.dim() < (1 if group["precondition_1d"] else 2):
            return False
        return bool(1 < (p.shape[0], math.prod(p.shape[1:]))[dim] <= group.get("max_precond_dim", math.inf))

    return exists


@dataclass
class Renewal:
    """What becomes of the matrices of a parameter.

    Args:
        values: new values of states, and the cells that hold them.
        complaints: why others go on as they are.
    """

    values: list[tuple[Cell, torch.Tensor]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Preconditioned(Optimizer):
    """Base of optimizers that renew square matrices of a parameter now and then, after a step.

    Args:
        params, defaults: as for `Optimizer`; precondition_1d and precision are among the defaults.
        capturable: must be False.
        options: see `schuss.Options`.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, capturable: bool, **options: Any) -> None:
        self.check_group(defaults | {"capturable": capturable})
        super().__init__(params, defaults, **options)

    def _reset(self) -> None:
        super()._reset()
        self.fallbacks = 0
        """How often matrices could not be renewed and were kept; the first time of each parameter there is a warning"""
        self._warned: set[int] = set()

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        for option in ("capturable", "differentiable"):
            if group.get(option):
                raise ValueError(
                    f"{cls.__name__}: {option} must be False, since the host renews matrices after a step; "
                    f"got {group[option]!r}"
                )
        if group["precision"] not in WORDS:
            raise ValueError(f"{cls.__name__}: precision must be None or 'bfloat16', got {group['precision']!r}")

    def after_step(self, params: Iterable[torch.Tensor]) -> None:
        """Renew the matrices of the parameters whose turn it is."""
        updated = {id(p) for p in params}
        due = [
            (p, group, step)
            for group in self.param_groups
            for p in group["params"]
            if id(p) in updated and self._is_due(group, step := int(number(self.state[p]["step"])))
        ]
        for at_once in batched(due, torch.get_num_threads()):  # for no more of them memory is needed
            for (p, *_), renewal in zip(at_once, one_each(self._renewed, at_once), strict=True):
                with uninterrupted():  # what is renewed belongs together
                    for cell, value in renewal.values:
                        cell.write(value)
                for why in renewal.complaints:
                    self._complain(p, why)

    @staticmethod
    def _is_due(group: Mapping[str, Any], step: int) -> bool:
        """Whether matrices are renewed after a step, counted from 1."""
        raise NotImplementedError

    def _renewed(self, p: torch.Tensor, group: Mapping[str, Any], step: int) -> Renewal:
        """The new matrices of a parameter after a step, counted from 1; nothing is changed yet."""
        raise NotImplementedError

    def _complain(self, p: torch.Tensor, why: str) -> None:
        """Count, and at first tell, that a parameter goes on with matrices that it had."""
        self.fallbacks += 1
        if id(p) not in self._warned:
            self._warned.add(id(p))
            groups = enumerate(self.param_groups)
            name = next(name for i, group in groups for name, q in names_of(group, i) if q is p)
            warnings.warn(
                f"{type(self).__name__}: a preconditioner of {name}, of shape {tuple(p.shape)}, {why}. `fallbacks` "
                "counts how often, and this is the only warning about this parameter",
                stacklevel=2,
            )


def blemish(matrix: torch.Tensor) -> str:
    """Why a matrix has no eigenvectors."""
    return "has no eigenvectors that can be found" if matrix.isfinite().all() else "has NaN or infinity in it"


def one_each(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """A function's value for each tuple of arguments, the first of which is a tensor: each in a thread of its own.

    One thread for a matrix makes the same bits whatever `torch.get_num_threads()` is, which LAPACK's threads do not;
    and they would be slower.
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(args[0].device.type != "cpu" for args in arguments):
        return [function(*args) for args in arguments]

    def alone(args: tuple[Any, ...]) -> Any:
        torch.set_num_threads(1)  # torch keeps it for each thread, MKL for all of them
        with torch.no_grad():
            return function(*args)

    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(alone, arguments))
    finally:
        torch.set_num_threads(threads)


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Stretches of so many."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
