"""The loss of a network on the plane that fits the ways of its weights best: Li et al. 2018, arXiv:1712.09913."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schuss.lab.landscape.surface import Array, Box
from schuss.lab.landscape.trajectory import Build, made
from schuss.lab.workload import Workload
from schuss.training.step import in_eval_mode

SNAPSHOTS = 100
"""Points of a trajectory, beside the first: of more steps every second, third, ... is kept."""
EXAMPLES = 512
"""Of the training set, on which the loss is computed."""
CHUNK = 65_536
"""Weights whose products are summed at once in float64."""

Weights = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Path:
    """Where the weights of a network were: one row for each of `steps`, the losses there, gradients up to there."""

    steps: tuple[int, ...]
    weights: Weights
    losses: tuple[float, ...]
    evaluations: tuple[int, ...]
    diverged: bool

    @property
    def score(self) -> float:
        """The mean of the logarithm of the loss, over the last tenth; infinite if it diverged."""
        if self.diverged:
            return math.inf
        last = np.asarray(self.losses[-max(1, len(self.losses) // 10) :])
        return float(np.log(last).mean() if (last > 0).all() else last.mean())


class Probe:
    """The training loss as a function of the weights alone: always on the same examples.

    Modules are in train mode, so that BatchNorm uses the statistics of a batch; dropout is off, buffers are put back,
    and what else is random is the same each time.
    """

    def __init__(self, workload: Workload, seed: int) -> None:
        self._seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            task = workload(seed)
            self._model, self._loss = task.model, task.loss
            self._params = [p for p in task.model.parameters() if p.requires_grad]
            self._batches: list[Any] = []
            for batch in task.batches:
                self._batches.append(batch)
                if len(self._batches) * task.batch_size >= EXAMPLES:
                    break

    def __call__(self, weights: Tensor) -> float:
        """The mean loss over the batches."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _buffers_kept(self._model):
            torch.manual_seed(self._seed)
            torch.nn.utils.vector_to_parameters(weights.to(self._params[0].dtype), self._params)
            self._model.train()
            for module in self._model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.eval()
            return sum(float(self._loss(self._model, batch)) for batch in self._batches) / len(self._batches)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


def follow(
    workload: Workload,
    name: str,
    build: Build,
    *,
    lr: float | None,
    settings: Mapping[str, Any],
    steps: int,
    seed: int,
    probe: Callable[[Tensor], float],
) -> Path:
    """Train so many steps from the workload's first weights, and note the weights on the way.

    Raises:
        ValueError: an optimizer that cannot be made for this model, or cannot step.
    """
    every = math.ceil(steps / SNAPSHOTS)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        task = workload(seed)
        params = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = made(name, build, params, lr, settings, task.model)
        first = torch.nn.utils.parameters_to_vector(params).detach().clone()
        rows, losses, evaluations, taken, count, diverged = [_array(first)], [probe(first)], [0], [0], 0, False
        task.model.train()
        batches = _cycled(task.batches)
        for i in range(1, steps + 1):
            batch = next(batches)

            def closure(batch: Any = batch) -> Tensor:
                nonlocal count
                count += 1
                optimizer.zero_grad()
                loss = task.loss(task.model, batch)
                loss.backward()
                return loss

            try:
                optimizer.step(closure)
            except (TypeError, RuntimeError) as error:
                if i > 1:
                    raise
                raise ValueError(f"{name} cannot train {workload.name}: {error}") from error
            if i % every and i != steps:
                continue
            with in_eval_mode(optimizer):
                here = torch.nn.utils.parameters_to_vector(params).detach().clone()
            loss = probe(here)
            if not (math.isfinite(loss) and bool(here.isfinite().all())):
                diverged = True
                break
            rows.append(_array(here))
            losses.append(loss)
            evaluations.append(count)
            taken.append(i)
    return Path(tuple(taken), np.stack(rows), tuple(losses), tuple(evaluations), diverged)


def _array(weights: Tensor) -> Weights:
    return (weights if weights.dtype == torch.float64 else weights.float()).numpy()


def _cycled(batches: Any) -> Iterator[Any]:
    while True:
        yield from batches


@dataclass(frozen=True, eq=False)
class Plane:
    """An affine plane in the space of the weights.

    Attributes:
        origin: the mean of all weights it was fitted to.
        axes: two orthonormal directions, one in each row.
        explained: the part of the variance of those weights along each of them.
    """

    origin: Array
    axes: Array
    explained: tuple[float, float]

    @classmethod
    def of(cls, weights: Sequence[Weights]) -> "Plane":
        """The plane of the two largest principal components of all rows together.

        The first row of all has no positive coordinate, so that ways begin on the left and below.
        """
        counts, size = [len(rows) for rows in weights], weights[0].shape[1]
        if size < 2:
            raise ValueError("a plane needs a model with two weights or more")
        total = sum(counts)
        origin = sum((rows.sum(axis=0, dtype=np.float64) for rows in weights), np.zeros(size)) / total

        def centred(begin: int) -> Array:
            part = slice(begin, begin + CHUNK)
            return np.concatenate([rows[:, part] for rows in weights]).astype(np.float64) - origin[part]

        # Of far fewer points than weights, their products with one another are the smaller matrix.
        gram = np.zeros((total, total))
        for begin in range(0, size, CHUNK):
            gram += (part := centred(begin)) @ part.T
        values, vectors = np.linalg.eigh(gram)
        if values[-1] <= 0:
            raise ValueError("no optimizer has moved a weight: there is no plane; raise lr or steps")
        top = vectors[:, :-3:-1]
        spanned = np.concatenate([centred(begin).T @ top for begin in range(0, size, CHUNK)])
        if values[-2] <= 1e-12 * values[-1]:  # all on one line: any second direction will do
            spanned[:, 1] = 0.0
            spanned[int(np.argmin(np.abs(spanned[:, 0]))), 1] = 1.0
        axes, _ = np.linalg.qr(spanned)
        first = (weights[0][0].astype(np.float64) - origin) @ axes
        axes = axes * np.where(first > 0, -1.0, 1.0)
        variance = np.clip(values[:-3:-1], 0, None) / gram.trace()
        return cls(origin, np.ascontiguousarray(axes.T), (float(variance[0]), float(variance[1])))

    def project(self, weights: Weights) -> Array:
        """The two coordinates of each row."""
        found: Array = (weights.astype(np.float64) - self.origin) @ self.axes.T
        return found

    def share(self, weights: Weights) -> float:
        """Of the squared distances of the rows from the origin, the part that lies in the plane."""
        away = weights.astype(np.float64) - self.origin
        total = float((away**2).sum())
        return float((self.project(weights) ** 2).sum()) / total if total > 0 else 1.0

    def at(self, a: float, b: float) -> Array:
        """The weights at a point of the plane."""
        found: Array = self.origin + a * self.axes[0] + b * self.axes[1]
        return found


def box_of(points: Array, margin: float = 0.12, slimmest: float = 0.5) -> Box:
    """A box round points, wide enough to see something beside them and no slimmer than so."""
    low, high = points.min(axis=0), points.max(axis=0)
    middle, half = (low + high) / 2, (0.5 + margin) * (high - low)
    half = np.maximum(half, slimmest * half.max())
    (x0, y0), (x1, y1) = middle - half, middle + half
    return float(x0), float(x1), float(y0), float(y1)


def grid_on(plane: Plane, probe: Callable[[Tensor], float], box: Box, size: int) -> tuple[Array, Array, Array]:
    """x, y and the losses z[i, j] at (x[j], y[i]) of the plane."""
    x, y = np.linspace(*box[:2], size), np.linspace(*box[2:], size)
    z = np.array([[probe(torch.from_numpy(plane.at(a, b))) for a in x] for b in y])
    return x, y, z
