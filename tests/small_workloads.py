"""Workloads and optimizers of the tests of comparisons: small, and importable by other processes."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import schuss
from schuss import optim
from schuss.lab.workload import Task

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
Y = X.sin().sum(1, keepdim=True)


def plane(seed: int) -> Task:
    """A plane through <waves> & noise."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(4, 1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    order = torch.randperm(64, generator=generator)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()  # type: ignore[no-any-return]

    def evaluate(model: nn.Module) -> dict[str, float]:
        error = model(X) - Y
        return {"loss": error.square().mean().item(), "error": error.abs().mean().item()}

    return Task(
        model=model, batches=[(X[rows], Y[rows]) for rows in order.split(16)], loss=loss, evaluate=evaluate,
        metric="error", target=0.5, epochs=4, batch_size=16,
    )  # fmt: skip


def ravine(seed: int) -> Task:
    """Two numbers, of curvatures 1 and 30."""
    model = nn.Module()
    model.theta = nn.Parameter(torch.tensor([1.0, 1.0]) + 0.1 * seed)
    curvatures = torch.tensor([1.0, 30.0])

    def loss(model: nn.Module, noise: Tensor) -> Tensor:
        return 0.5 * (curvatures * (model.theta - noise).square()).sum()  # type: ignore[operator]

    generator = torch.Generator().manual_seed(seed)
    return Task(
        model=model, batches=list(0.01 * torch.randn(5, 2, generator=generator)), loss=loss,
        evaluate=lambda model: {"loss": loss(model, torch.zeros(2)).item()}, metric="loss", target=0.1, epochs=4,
        batch_size=1,
    )  # fmt: skip


def scores(seed: int, better: str = "higher") -> Task:
    """The plane, judged by a value of which higher is better."""
    from dataclasses import replace

    task = plane(seed)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": task.evaluate(model)["loss"], "fit": 1 / (1 + task.evaluate(model)["loss"])}

    return replace(task, evaluate=evaluate, metric="fit", better=better, target=0.5)


def unchanged(params: Any, lr: float) -> torch.optim.Optimizer:
    """Torch's SGD, without a default learning rate."""
    return torch.optim.SGD(params, lr=lr)


def both(model: nn.Module, lr: float = 0.003) -> torch.optim.Optimizer:
    """Two groups of different rates."""
    weight, bias = model.parameters()
    return torch.optim.SGD([{"params": [weight], "lr": lr}, {"params": [bias], "lr": 10 * lr}])


class Seen(torch.optim.SGD):
    """Notes its learning rates."""

    rates: list[list[float]]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.rates = [*getattr(self, "rates", []), [group["lr"] for group in self.param_groups]]
        LAST[:] = self.rates
        super().step()


LAST: list[list[float]] = []
"""What the `Seen` that stepped last has seen."""


class Tired(torch.optim.SGD):
    """Takes five steps."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.count = getattr(self, "count", 0) + 1
        if self.count > 5:
            raise RuntimeError("no more\nsteps: rest")
        super().step()


class Deadly(torch.optim.SGD):
    """Kills its process in its sixth step."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.count = getattr(self, "count", 0) + 1
        if self.count > 5:
            os.kill(os.getpid(), signal.SIGKILL)
        super().step()


class Greedy(torch.optim.SGD):
    """Its step needs a closure."""

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


def nothing(params: Any, lr: float = 0.1) -> None:
    """No optimizer."""


def averaging(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    """Schedule-Free under another name."""
    return optim.ScheduleFreeSGD(model.parameters(), lr=lr)


def wrapped(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    """SAM, which needs a closure though its step has a default for it."""
    return schuss.SAM(optim.SGD(model.parameters(), lr=lr))


def endless(seed: int) -> Iterator[int]:
    """No task."""
    yield seed
