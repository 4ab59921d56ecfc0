"""What SOAP and Shampoo share: square matrices of rows and columns, renewed now and then, after a step."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
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
        self.dtype = dtype
        self.rotate = matrix_function(kronecker.rotate, dtype, listed=True)
        self.rotate_back = matrix_function(kronecker.rotate_back, dtype, listed=True)
        self.surround = matrix_function(kronecker.surround, dtype, listed=True)
        self.left_moment = matrix_function(kronecker.left_moment, dtype, square=True, listed=True)
        self.right_moment = matrix_function(kronecker.right_moment, dtype, square=True, listed=True)


AT_ONCE = 2**20
"""Elements of new matrices that there is memory for at once, if the threads do not need more."""

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
        if not due:
            return
        due.sort(key=lambda one: sum(side**3 for side in _sides(one[0])))  # what is renewed at once ends at once
        with one_each([p for p, *_ in due]) as renew:
            for at_once in _batches(due, torch.get_num_threads()):
                for (p, *_), renewal in zip(at_once, renew(self._renewed, at_once), strict=True):
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


@contextmanager
def one_each(params: Iterable[torch.Tensor]) -> Iterator[Callable[..., list[Any]]]:
    """A `starmap` that gives each call a thread of its own, if the parameters it is about are on the CPU.

    One thread for a matrix makes the same bits whatever `torch.get_num_threads()` is, which LAPACK's threads do not;
    and they would be slower.
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(p.device.type != "cpu" for p in params):
        yield lambda function, arguments: [function(*args) for args in arguments]
        return

    def alone(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        torch.set_num_threads(1)  # torch keeps it for each thread, MKL for all of them
        with torch.no_grad():
            return function(*args)

    try:
        with ThreadPoolExecutor(threads) as pool:
            yield lambda function, arguments: list(pool.map(alone, repeat(function), arguments))
    finally:
        torch.set_num_threads(threads)


def _sides(p: torch.Tensor) -> tuple[int, int]:
    """The rows and columns of a parameter as a matrix."""
    return (p.shape[0], p.numel() // p.shape[0]) if p.numel() and p.dim() else (1, 1)


def _batches(items: Sequence[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """Parameters and what belongs to them: so many, or so many times as many if their matrices are small."""
    batch: list[tuple[Any, ...]] = []
    elements = 0
    for item in items:
        batch.append(item)
        elements += sum(side**2 for side in _sides(item[0]))
        if len(batch) % size == 0 and elements >= AT_ONCE:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch
