"""The vocabulary of rules.

A rule is written with Python's operators and the words below, and runs on whatever it is given: tensors (eager
torch), lists of tensors (the foreach back end), float64 numbers and arrays (the scalars of a step), or symbols (from
which kernels are generated and formulas printed). Every word means on each of them what torch means by it.

Most words are about one element. `dot`, `total`, `row_mean` and `column_mean`, and what is made of them, are about a
whole tensor: a rule that uses them is cut into passes there, one that finds the sums and one that uses them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = [
    "Operand", "absolute", "clamp", "column_mean", "columns", "dot", "everywhere", "exp", "lerp", "log", "logical_and",
    "matrix_function", "maximum", "mean", "mean_square", "minimum", "norm", "row_mean", "rows", "sign", "size", "sqrt",
    "total", "where",
]  # fmt: skip


class Operand:
    """What rules compute with besides tensors and numbers: operators and words become `__formula__(word, args)`."""

    __slots__ = ()
    __array_ufunc__ = None  # a NumPy number on the left hands the operation to us

    def __formula__(self, word: Any, args: tuple[Any, ...]) -> Any:
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return self.__formula__("add", (self, other))

    def __radd__(self, other: Any) -> Any:
        return self.__formula__("add", (other, self))

    def __sub__(self, other: Any) -> Any:
        return self.__formula__("sub", (self, other))

    def __rsub__(self, other: Any) -> Any:
        return self.__formula__("sub", (other, self))

    def __mul__(self, other: Any) -> Any:
        return self.__formula__("mul", (self, other))

    def __rmul__(self, other: Any) -> Any:
        return self.__formula__("mul", (other, self))

    def __truediv__(self, other: Any) -> Any:
        return self.__formula__("div", (self, other))

    def __rtruediv__(self, other: Any) -> Any:
        return self.__formula__("div", (other, self))

    def __pow__(self, other: Any) -> Any:
        return self.__formula__("pow", (self, other))

    def __rpow__(self, other: Any) -> Any:
        return self.__formula__("pow", (other, self))

    def __neg__(self) -> Any:
        return self.__formula__("neg", (self,))

    def __abs__(self) -> Any:
        return self.__formula__("absolute", (self,))

    def __lt__(self, other: Any) -> Any:
        return self.__formula__("lt", (self, other))

    def __le__(self, other: Any) -> Any:
        return self.__formula__("le", (self, other))

    def __gt__(self, other: Any) -> Any:
        return self.__formula__("gt", (self, other))

    def __ge__(self, other: Any) -> Any:
        return self.__formula__("ge", (self, other))

    def __eq__(self, other: object) -> Any:
        return self.__formula__("eq", (self, other))

    def __ne__(self, other: object) -> Any:
        return self.__formula__("ne", (self, other))

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("a rule cannot branch on values (`if`, `and`, `or`, `not` on an array): use where(...)")

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a rule sees one element at a time: it cannot unpack or iterate over an array")


def word(on_tensors: Callable[..., Any], on_numbers: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A word that dispatches on its arguments."""
    name = on_tensors.__name__

    def apply(*args: Any) -> Any:
        for arg in args:
            if isinstance(arg, Operand):
                return arg.__formula__(name, args)
        if on_numbers is None or any(isinstance(arg, torch.Tensor) for arg in args):
            return on_tensors(*args)
        return on_numbers(*args)

    apply.__name__ = apply.__qualname__ = name
    return apply


def _of_two(choose: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch's maximum and minimum take tensors only."""

    def chosen(a: Any, b: Any) -> torch.Tensor:
        if not isinstance(a, torch.Tensor):
            a = b.new_full((), a)
        return choose(a, b if isinstance(b, torch.Tensor) else a.new_full((), b))

    chosen.__name__ = choose.__name__
    return chosen


def _choice(condition: torch.Tensor, yes: Any, no: Any) -> torch.Tensor:
    """`torch.where`, which would round two Python numbers to torch's default dtype."""
    if not isinstance(yes, torch.Tensor) and not isinstance(no, torch.Tensor):
        yes = torch.full((), yes, dtype=torch.float64, device=torch.as_tensor(condition).device)
    return torch.where(torch.as_tensor(condition), yes, no)


_choice.__name__ = "where"


def _both(a: Any, b: Any) -> torch.Tensor:
    """`torch.logical_and`, which takes no Python boolean."""
    return torch.logical_and(torch.as_tensor(a), torch.as_tensor(b))


_both.__name__ = "logical_and"


def _towards(choose: Callable[..., Any]) -> Callable[..., Any]:
    """torch's lerp, which starts from the nearer end; its own takes no numbers as ends."""

    def lerp(a: Any, b: Any, weight: Any) -> Any:
        near, far = a + weight * (b - a), b + (weight - 1) * (b - a)
        if isinstance(weight, (int, float, np.number)):
            return near if abs(float(weight)) < 0.5 else far
        return choose(abs(weight) < 0.5, near, far)

    return lerp


sqrt = word(torch.sqrt, np.sqrt)
sqrt.__doc__ = "The square root."
exp = word(torch.exp, np.exp)
exp.__doc__ = "e to the power of it."
log = word(torch.log, np.log)
log.__doc__ = "The natural logarithm."
absolute = word(torch.absolute, np.abs)
absolute.__doc__ = "The absolute value; `abs(x)` says the same."
sign = word(torch.sign, lambda x: 1.0 * (np.asarray(x) > 0) - 1.0 * (np.asarray(x) < 0))
sign.__doc__ = "1, 0 or -1; 0 for NaN, as in torch."
maximum = word(_of_two(torch.maximum), np.maximum)
maximum.__doc__ = "The larger of two; NaN if either is NaN."
minimum = word(_of_two(torch.minimum), np.minimum)
minimum.__doc__ = "The smaller of two; NaN if either is NaN."
where = word(_choice, np.where)
where.__doc__ = "`where(condition, yes, no)`: elementwise choice. What is not chosen has no influence, NaN included."
lerp = word(_towards(torch.where), _towards(np.where))
lerp.__doc__ = "`lerp(a, b, weight)`: a moved towards b, a + weight (b - a); from b's side where weight is 0.5 or more."
logical_and = word(_both, np.logical_and)
logical_and.__doc__ = "Both conditions hold."


def clamp(x: Any, low: Any, high: Any) -> Any:
    """`x` limited to [low, high]; NaN stays NaN."""
    return minimum(maximum(x, low), high)


# --- words about a whole tensor ---------------------------------------------------------------------------------------

# Sums are float64 numbers, so that a long one is as exact as a short one, and does not overflow where its elements do
# not (the CPU's kernels multiply and add blocks of elements in float32); what they are multiplied with keeps its dtype,
# as torch's tensors do with one of no dimensions.


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.sum(a.to(torch.float64) * b.to(torch.float64))


def _total(x: torch.Tensor) -> torch.Tensor:
    return x.sum(dtype=torch.float64)


def _row_mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=-1, keepdim=True) if x.shape[-1] else x.sum(dim=-1, keepdim=True)  # of nothing: 0


def _column_mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=-2, keepdim=True) if x.shape[-2] else x.sum(dim=-2, keepdim=True)


def _everywhere(x: torch.Tensor) -> torch.Tensor:
    raise TypeError("everywhere() is a sum over all tensors of an optimizer: one tensor does not know it")


def _size(x: torch.Tensor) -> int:
    return x.numel()


def _rows(x: torch.Tensor) -> int:
    return x.shape[0]


def _columns(x: torch.Tensor) -> int:
    return math.prod(x.shape[1:])


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = function.__name__.removeprefix("_")
    return word(function)


dot = _named(_dot)
dot.__doc__ = "`dot(a, b)`: the sum of a b over all elements of the tensor."
total = _named(_total)
total.__doc__ = "The sum over all elements of the tensor."
row_mean = _named(_row_mean)
row_mean.__doc__ = "The mean of each row of a matrix, or of a batch's matrices: over the last dimension."
column_mean = _named(_column_mean)
column_mean.__doc__ = "The mean of each column of a matrix, or of a batch's matrices: over the last dimension but one."
size = _named(_size)
size.__doc__ = "How many elements the tensor has; of a complex one, twice as many."
rows = _named(_rows)
rows.__doc__ = "How many rows the tensor has as a matrix: its first dimension."
columns = _named(_columns)
columns.__doc__ = (
    "How many columns the tensor has as a matrix: its other dimensions as one, as in a convolution's kernel."
)
everywhere = _named(_everywhere)
everywhere.__doc__ = "The sum of a number that each tensor has, such as a `dot`, over all tensors that take this step."


def norm(x: Any) -> Any:
    """The root of the sum of the squares of all elements of the tensor."""
    return sqrt(dot(x, x))


def mean(x: Any) -> Any:
    """The mean over all elements of the tensor."""
    return total(x) / maximum(size(x), 1)


def mean_square(x: Any) -> Any:
    """The mean of the squares of all elements of the tensor."""
    return dot(x, x) / maximum(size(x), 1)


# --- functions of matrices --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixCall:
    """A function of matrices with its settings, in the place of a word.

    Args:
        function: takes a batch of matrices, and of each other argument, and the settings; returns a batch like the
            first.
        dtype: of the matrices that it is given and returns; None: what the rule computes in.
        settings: keyword arguments.
        there: which of its other arguments are not None.
        square: whether the value is not like the first argument, but a square matrix.
        listed: whether states may come as lists, and a square value may be written to tensors.
    """

    function: Callable[..., Any]
    dtype: torch.dtype | None
    square: bool
    listed: bool
    settings: tuple[tuple[str, Any], ...]
    there: tuple[bool, ...]

    def __call__(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """The value, in the dtype of x; x of more dimensions is a matrix whose rows are its first one."""
        matrices = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        value: torch.Tensor = self.batch(matrices.to(self.dtype or x.dtype)[None], *(o[None] for o in others))[0].to(
            x.dtype
        )
        return value if self.square else value.view_as(x)

    def batch(self, x: torch.Tensor, *others: Any, **settings: Any) -> Any:
        """The function's value, of matrices [batch, rows, columns] in its dtype."""
        given = iter(others)
        args = (next(given) if there else None for there in self.there)
        return self.function(x, *args, **dict(self.settings), **settings)


def matrix_function(
    function: Callable[..., Any],
    dtype: torch.dtype | None = None,
    *,
    square: bool = False,
    listed: bool = False,
) -> Callable[..., Any]:
    """A word for rules that is a function of whole matrices, run by torch between two passes.

    Args:
        function: `function(x, *others, **settings)`, x: [batch, rows, columns]; others: states that are like "left" or
            "right", or None. It returns something like x, and changes nothing.
        dtype: of x, and of a value like it; None: what the rule computes in.
        square: the value is a square matrix, for a state that is like "left" or "right".
        listed: a state may come as a list with a tensor for each matrix, instead of a batch: so it is not copied. With
            square the function has an argument `out`, too, None or such a list: the values are written to its tensors,
            which may be those that they are computed from; None among them: of that matrix no value is wanted.
    """

    def apply(x: Any, *others: Any, **settings: Any) -> Any:
        there = tuple(other is not None for other in others)
        call = MatrixCall(function, dtype, square, listed, tuple(sorted(settings.items())), there)
        args = (x, *(o for o in others if o is not None))
        return x.__formula__(call, args) if isinstance(x, Operand) else call(*args)

    apply.__name__ = apply.__qualname__ = function.__name__
    apply.__doc__ = function.__doc__
    return apply
