"""What a workload is: a function of a seed that gives everything a training run needs but the optimizer."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from schuss.training.step import evaluating


class Batches(Protocol):
    """A list, a DataLoader, or whatever else has a length and can be gone through again and again."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Task:
    """A training run without its optimizer, from one seed.

    Args:
        model: to be trained, with its first weights.
        batches: training batches; each time one goes through them is an epoch, in an order of its own if they are
            shuffled. Whatever is random in them comes from a generator of their own.
        loss: `loss(model, batch)`, a scalar.
        evaluate: `evaluate(model)` on data that are not trained on: values by name, "loss" among them. It is called
            in eval mode and without gradients.
        metric: the name of the value that counts.
        target: of the metric, finite: what a tuned baseline reaches.
        epochs: of a complete run, in [1, inf).
        batch_size: examples in a step, in [1, inf).
        better: whether a "lower" or a "higher" metric is the better one.

    Raises:
        TypeError: model, batches, loss, evaluate or metric is something else.
        ValueError: a number out of its bounds, no batch, or no parameter to train.
    """

    model: nn.Module
    batches: Batches
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    metric: str
    target: float
    epochs: int
    batch_size: int
    better: Literal["lower", "higher"] = "lower"

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"Task: model must be a torch.nn.Module, got {type(self.model).__name__}")
        if not (hasattr(self.batches, "__iter__") and hasattr(self.batches, "__len__")):
            raise TypeError(
                "Task: batches must have a length and can be gone through once per epoch, as a list or a DataLoader "
                f"can, got {type(self.batches).__name__}"
            )
        for name in ("loss", "evaluate"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Task: {name} must be a function, got {type(getattr(self, name)).__name__}")
        if not isinstance(self.metric, str):
            raise TypeError(f"Task: metric must be the name of a value, got {type(self.metric).__name__}")
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"Task: {name} must be an integer in [1, inf), got {value!r}")
        if not math.isfinite(self.target):
            raise ValueError(f"Task: target must be finite, got {self.target}")
        if self.better not in ("lower", "higher"):
            raise ValueError(f"Task: better must be 'lower' or 'higher', got {self.better!r}")
        if len(self.batches) == 0:
            raise ValueError("Task: there is no batch")
        if self.parameters == 0:
            raise ValueError("Task: the model has no parameters that require a gradient")

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def steps(self) -> int:
        """Of a complete run."""
        return self.epochs * len(self.batches)

    def scores(self, optimizer: Optimizer) -> dict[str, float]:
        """The values of `evaluate`, on the weights that `optimizer` would have evaluated; then all is as before."""
        with evaluating(self.model, optimizer):
            return {name: float(value) for name, value in self.evaluate(self.model).items()}

    def lacking(self, scores: Mapping[str, float]) -> str | None:
        """What to say where "loss" or the metric is not among the values of `evaluate`; None if both are."""
        for name in ("loss", self.metric):
            if name not in scores:
                return f"evaluate must give {name!r}, got {', '.join(map(repr, scores)) or 'nothing'}"
        return None

    def reached(self, value: float) -> bool:
        """Whether a value of the metric is as good as the target."""
        return value >= self.target if self.better == "higher" else value <= self.target


@dataclass(frozen=True)
class Workload:
    """A function from a seed to a `Task`, with a name and what it is in a line.

    For equal seeds the tasks are equal to the bit: first weights, order of the data, noise.
    """

    name: str
    description: str
    make: Callable[[int], Task]

    def __call__(self, seed: int) -> Task:
        """The task of a seed."""
        return self.make(seed)

    @classmethod
    def of(cls, make: Callable[[int], Task]) -> "Workload":
        """Named as the function is, and described by the first line of its docstring."""
        name = getattr(make, "__name__", type(make).__name__)
        return cls(name, (inspect.getdoc(make) or "").partition("\n")[0], make)
