"""Functions of two variables to look at: formula, minima, the box that is shown, and where optimizers begin."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schuss import bounds
from schuss.lab.workloads.parts import Shuffled, seeded
from schuss.optim import LBFGS

Array = NDArray[np.float64]
Function = Callable[[Tensor, Tensor], Tensor]
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""From and to of x, from and to of y."""


@dataclass(frozen=True, eq=False)
class Surface:
    """A function of two variables, in float64.

    Attributes:
        name: in a word.
        function: `function(x, y)`, of tensors of one shape, element by element.
        box: what is shown: from and to of x, from and to of y.
        start: where optimizers begin.
        minima: all points where the function is lowest, if they are known.
        formula: as text.
        axes: what x and y are.
        source: of the function.
        batches: from a seed to noisy functions without end, one for each step; None: every step has `function`.
    """

    name: str
    function: Function
    box: Box
    start: Point
    minima: tuple[Point, ...] = ()
    formula: str = ""
    axes: tuple[str, str] = ("x", "y")
    source: str = ""
    batches: Callable[[int], Iterator[Function]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        x0, x1, y0, y1 = self.box
        if not (np.isfinite(self.box).all() and x0 < x1 and y0 < y1):
            raise ValueError(f"Surface: box must be (x from, x to, y from, y to), finite and rising, got {self.box}")
        if not (len(self.start) == 2 and np.isfinite(self.start).all()):
            raise ValueError(f"Surface: start must be two finite numbers, got {self.start}")

    @property
    def lowest(self) -> float | None:
        """The value at the minima; None if they are not known."""
        return min(self.at(point) for point in self.minima) if self.minima else None

    def at(self, point: Point) -> float:
        """The value at a point."""
        x, y = torch.tensor(point, dtype=torch.float64)
        return float(self.function(x, y))

    def gradient(self, point: Point) -> Array:
        """The gradient at a point."""
        p = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(self.function(p[0], p[1]), p)
        return g.numpy()

    def values(self, x: Array, y: Array) -> Array:
        """The values at many points, whose coordinates are two arrays of one shape."""
        a, b = torch.from_numpy(np.array(x, np.float64)), torch.from_numpy(np.array(y, np.float64))
        with torch.no_grad():
            try:
                z = torch.as_tensor(self.function(a, b))
            except (RuntimeError, TypeError, ValueError):
                z = torch.empty(0)
        if z.shape == a.shape:
            return z.numpy().astype(np.float64)
        each = [self.at(point) for point in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
        return np.array(each).reshape(a.shape)  # of a function that has only ever seen one point

    def grid(self, size: int = 121) -> tuple[Array, Array, Array]:
        """x, y and the values z[i, j] at (x[j], y[i]), size × size of them over the box."""
        x, y = np.linspace(*self.box[:2], size), np.linspace(*self.box[2:], size)
        return x, y, self.values(*np.meshgrid(x, y))


def own(
    function: Function,
    *,
    box: Box = (-5.0, 5.0, -5.0, 5.0),
    start: Point | None = None,
    minima: tuple[Point, ...] | None = None,
    name: str | None = None,
) -> Surface:
    """A surface from a function of one's own.

    Args:
        function: `function(x, y)` of two tensors of float64, differentiable.
        box: what is shown: from and to of x, from and to of y.
        start: where optimizers begin; by default a tenth of the box away from its left and upper edge.
        minima: where it is lowest; by default they are looked for: from the lowest points of a grid, downhill.
        name: by default that of the function.

    Raises:
        ValueError: box or start is no box or point, or the function has no gradient at the start.
    """
    x0, x1, y0, y1 = box
    start = (x0 + 0.1 * (x1 - x0), y1 - 0.1 * (y1 - y0)) if start is None else start
    called = name or getattr(function, "__name__", type(function).__name__).replace("<lambda>", "f")
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    surface = Surface(called, function, box, start, () if minima is None else minima, summary)
    try:
        with warnings.catch_warnings():  # torch's, about what is an error here
            warnings.simplefilter("ignore")
            slope = surface.gradient(start)
    except Exception as error:  # of anybody's function
        raise ValueError(
            f"{called}: no gradient at {start}: {error}; write it with torch, for two tensors of one element each"
        ) from error
    if not np.isfinite(slope).all():
        raise ValueError(f"{called}: the gradient at {start} is {slope}; choose another start")
    if minima is not None:
        return surface
    return Surface(called, function, box, start, _lowest_points(surface), summary)


def _lowest_points(surface: Surface) -> tuple[Point, ...]:
    """Where a function is lowest inside of its box, each valley of a grid followed to its bottom."""
    x, y, z = surface.grid()
    if not np.isfinite(z).any():
        return ()
    padded = np.pad(np.where(np.isfinite(z), z, np.inf), 1, constant_values=np.inf)
    around = [np.roll(padded, (i, j), (0, 1))[1:-1, 1:-1] for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    rows, columns = np.nonzero(np.isfinite(z) & (z <= np.min(around, axis=0)))
    order = np.argsort(z[rows, columns])[:8]  # of many valleys the deepest will do
    x0, x1, y0, y1 = surface.box
    apart = 1e-4 * max(x1 - x0, y1 - y0)
    found: list[tuple[float, Point]] = []
    for i, j in zip(rows[order], columns[order], strict=True):
        p = torch.tensor([x[j], y[i]], requires_grad=True)
        optimizer = LBFGS([p], max_iter=30, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

        def closure(p: Tensor = p, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = surface.function(p[0], p[1])
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        a, b = p.tolist()
        value = surface.at((a, b))
        is_inside = x0 <= a <= x1 and y0 <= b <= y1
        if is_inside and np.isfinite(value) and all(np.hypot(a - c, b - d) > apart for _, (c, d) in found):
            found.append((value, (a, b)))
    bottom = min((value for value, _ in found), default=0.0)
    span = float(np.nanmax(np.where(np.isfinite(z), z, np.nan))) - bottom
    return tuple(point for value, point in found if value <= bottom + 1e-8 * span)


# --- the ones that come with schuss ----------------------------------------------------------------------------------


def rosenbrock() -> Surface:
    """Rosenbrock's banana: a curved valley with steep sides and a flat floor."""
    return Surface(
        "rosenbrock",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        box=(-2.0, 2.0, -1.0, 3.0),
        start=(-1.2, 1.0),
        minima=((1.0, 1.0),),
        formula="f(x, y) = (1 - x)² + 100 (y - x²)²",
        source="Rosenbrock 1960, The Computer Journal 3(3)",
    )


def beale() -> Surface:
    """Beale's function: a plateau, walls at its corners, and a narrow valley."""
    return Surface(
        "beale",
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
        box=(-0.5, 4.5, -1.5, 2.0),
        start=(1.0, 1.0),
        minima=((3.0, 0.5),),
        formula="f(x, y) = (1.5 - x + xy)² + (2.25 - x + xy²)² + (2.625 - x + xy³)²",
        source="Beale 1958; start: Moré, Garbow, Hillstrom 1981, ACM TOMS 7(1), problem 5",
    )


def himmelblau() -> Surface:
    """Himmelblau's function: four minima of the same depth round a hill."""
    return Surface(
        "himmelblau",
        lambda x, y: (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2,
        box=(-5.0, 5.0, -5.0, 5.0),
        start=(0.0, -1.0),
        minima=(
            (3.0, 2.0),
            (-2.805118086952745, 3.131312518250573),
            (-3.779310253377747, -3.283185991286170),
            (3.584428340330492, -1.848126526964404),
        ),
        formula="f(x, y) = (x² + y - 11)² + (x + y² - 7)²",
        source="Himmelblau 1972, Applied Nonlinear Programming",
    )


def rastrigin() -> Surface:
    """Rastrigin's function: a bowl full of dents, one at every pair of integers or nearly so."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        return 20 + x**2 - 10 * torch.cos(2 * torch.pi * x) + y**2 - 10 * torch.cos(2 * torch.pi * y)

    return Surface(
        "rastrigin",
        function,
        box=(-5.12, 5.12, -5.12, 5.12),
        start=(-2.0, 3.5),
        minima=((0.0, 0.0),),
        formula="f(x, y) = 20 + x² - 10 cos 2πx + y² - 10 cos 2πy",
        source="Rastrigin 1974, Systems of Extremal Control",
    )


def quadratic(condition: float = 50.0) -> Surface:
    """A quadratic valley whose sides are steeper than its floor, by the condition number.

    Args:
        condition: κ, in [1, inf): gradient descent converges for rates below 2/κ.
    """
    bounds.check("quadratic", "condition", condition, "[1, inf)")
    return Surface(
        "quadratic",
        lambda x, y: 0.5 * (x**2 + condition * y**2),
        box=(-5.0, 5.0, -3.0, 3.0),
        start=(-4.5, 1.0),
        minima=((0.0, 0.0),),
        formula=f"f(x, y) = ½ (x² + {condition:g} y²)",
    )


def linear() -> Surface:
    """Linear regression: weight and bias of one unit, mean squared error, in mini-batches of 10.

    100 points with x uniform in (-1, 3), t = 2x + 1 and noise of standard deviation ½ added. Contours and losses are
    those of all points; a step sees ten.
    """
    random = np.random.RandomState(0)
    xs = random.uniform(-1, 3, 100)
    ts = 2 * xs + 1 + random.normal(0, 0.5, 100)
    (w, b), *_ = np.linalg.lstsq(np.stack([xs, np.ones_like(xs)], axis=1), ts, rcond=None)
    x, t = torch.from_numpy(xs), torch.from_numpy(ts)

    def on(x: Tensor, t: Tensor) -> Function:
        return lambda weight, bias: ((weight[..., None] * x + bias[..., None] - t) ** 2).mean(dim=-1)

    def batches(seed: int) -> Iterator[Function]:
        shuffled = Shuffled((x, t), 10, seeded(seed))
        while True:
            for batch in shuffled:
                yield on(*batch)

    return Surface(
        "linear",
        on(x, t),
        box=(-1.5, 4.5, -1.5, 4.5),
        start=(-1.0, 3.5),
        minima=((float(w), float(b)),),
        formula="f(w, b) = mean of (w x + b - t)² over 100 points; a step sees 10 of them",
        axes=("weight w", "bias b"),
        batches=batches,
    )


SURFACES: Mapping[str, Callable[..., Surface]] = {
    make.__name__: make for make in (rosenbrock, beale, himmelblau, rastrigin, quadratic, linear)
}
"""The functions by name."""


def find(surface: str | Surface | Function, **arguments: Any) -> Surface:
    """A surface by its name; or what it is already; or one from a function of x and y.

    Args:
        surface: one of `SURFACES`, a `Surface`, or a function.
        arguments: of the one that is called so: condition; or of `own`: box, start, minima.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(surface, Surface):
        return surface
    if not isinstance(surface, str):
        return own(surface, **arguments)
    if surface not in SURFACES:
        raise ValueError(f"unknown function {surface!r}: {bounds.nearest(surface, SURFACES)}")
    return SURFACES[surface](**arguments)
