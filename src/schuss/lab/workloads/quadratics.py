"""Quadratic losses with noise, whose spectra are those that were found in, or assumed of, neural networks."""

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schuss.lab.workload import Task
from schuss.lab.workloads.parts import Drawn, Shuffled, seeded


class Point(nn.Module):
    """The parameters of a function that is not a network."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start)

    def forward(self) -> Tensor:
        """Where it is."""
        return self.theta


@cache
def deep_hessian() -> Tensor:
    """DeepOBS's: of 100 eigenvalues 90 are uniform in (0, 1) and 10 in (30, 60), in directions without preference."""
    random = np.random.RandomState(42)
    eigenvalues = np.concatenate([random.uniform(0, 1, 90), random.uniform(30, 60, 10)])
    turn = rotation(len(eigenvalues), random)
    return torch.from_numpy(turn.T @ np.diag(eigenvalues) @ turn).float()


def rotation(n: int, random: np.random.RandomState) -> NDArray[np.float64]:
    """A rotation of n dimensions, n in [2, inf), distributed evenly.

    One of fewer dimensions is put into the lower corner, and the reflection that takes the first axis to a random
    direction is applied to it. Source: Diaconis, Shahshahani 1987, The subgroup algorithm.
    """
    angle = 2 * math.pi * random.uniform()
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    for size in range(3, n + 1):
        direction = random.normal(size=size)
        mirror = -direction / np.linalg.norm(direction)
        mirror[0] += 1
        mirror /= np.linalg.norm(mirror)
        grown = np.eye(size)
        grown[1:, 1:] = turn
        turn = grown - 2 * np.outer(mirror, mirror @ grown)
    return -turn


@cache
def deep_data() -> tuple[Tensor, Tensor]:
    """1000 points to train and 1000 to test, normal with standard deviation 0.6."""
    train, test = (
        torch.from_numpy(np.random.RandomState(seed).normal(0, 0.6, (1000, 100)).astype(np.float32))
        for seed in (42, 43)
    )
    return train, test


def quadratic_deep(seed: int) -> Task:
    """DeepOBS's quadratic: ten steep directions and ninety flat ones.

    The mean over points x of ½ (θ - x)ᵀ Q (θ - x), θ beginning at 1. Of 1000 points the last 104, which fill no batch
    of 128, are left out as DeepOBS does, in training and in the test.

    Source: Schneider, Balles, Hennig 2019, arXiv:1903.05499, and its code, deepobs/pytorch/testproblems.
    """
    hessian = deep_hessian()
    train, test = deep_data()
    batch_size = 128

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        away: Tensor = model() - batch[0]
        return 0.5 * ((away @ hessian) * away).sum(dim=1).mean()

    kept = (test[: len(test) // batch_size * batch_size],)
    return Task(
        model=Point(torch.ones(100)),
        batches=Shuffled((train,), batch_size, seeded(seed), drop_last=True),
        loss=loss,
        evaluate=lambda model: {"loss": loss(model, kept).item()},
        metric="loss",
        # SGD with Nesterov momentum at 0.01 of six rates: 87.09 at most; AdamW at 0.3: 87.09. The mean of the training
        # points, where the training loss is least, has 87.05.
        target=87.1,
        epochs=100,
        batch_size=batch_size,
    )


def noisy_quadratic(seed: int) -> Task:
    """The noisy quadratic model: curvatures 1, 1/2, ... 1/1000, and noise alike.

    The risk is ½ Σ h θ² with h = 1/i, and θ begins standard normal. A batch of B adds noise ε to the gradient, normal
    with variance h / B; its loss is the risk plus εᵀθ. The paper has 10,000 dimensions, for which complete runs would
    be long.

    Source: Zhang et al. 2019, arXiv:1907.04164.
    """
    curvature = 1 / torch.arange(1, 1001)
    batch_size = 32
    random = seeded(seed)
    scale = (curvature / batch_size).sqrt()

    def risk(model: nn.Module) -> Tensor:
        theta: Tensor = model()
        return 0.5 * (curvature * theta**2).sum()

    return Task(
        model=Point(torch.randn(len(curvature), generator=random)),
        batches=Drawn(100, lambda: scale * torch.randn(len(scale), generator=random)),
        loss=lambda model, batch: risk(model) + (batch * model()).sum(),
        evaluate=lambda model: {"loss": risk(model).item()},
        metric="loss",
        # AdamW at 0.01 of six rates: 0.0147 at most; SGD with Nesterov momentum at 0.3: 0.0185.
        target=0.015,
        epochs=20,
        batch_size=batch_size,
    )
