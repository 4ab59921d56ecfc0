"""The tasks on which optimizers are compared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A supervised classification task, held in memory.

    Args:
        name: short name, as used on the command line.
        description: one sentence for the head of a report.
        train: inputs and class indices to train on, each of length n.
        test: the same for evaluation.
        model: builds a freshly initialised model from torch's global random state.
        loss: mean loss of (logits, class indices).
        batch_size: training examples per step; the last batch of an epoch may be smaller.
    """

    name: str
    description: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of batches, in an order drawn from `generator`."""
        inputs, targets = self.train
        for rows in torch.randperm(len(targets), generator=generator).split(self.batch_size):
            yield inputs[rows], targets[rows]

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy, in [0, 1], on the test set."""
        inputs, targets = self.test
        model.eval()
        with torch.no_grad():
            logits = model(inputs)
            loss = self.loss(logits, targets).item()
            accuracy = (logits.argmax(dim=1) == targets).double().mean().item()
        model.train()
        return loss, accuracy


def digits() -> Workload:
    """Handwritten digits of 8×8 pixels that ship with scikit-learn, and a small convolutional network."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    # The split is part of the task, so it does not change with the seed of a run.
    train_x, test_x, train_y, test_y = train_test_split(
        data.images, data.target, test_size=0.2, stratify=data.target, random_state=0
    )
    mean, std = train_x.mean(), train_x.std()

    def images(pixels: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy((pixels - mean) / std).float().unsqueeze(1)

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    return Workload(
        name="digits",
        description=(
            f"Convolutional network on scikit-learn's handwritten digits: "
            f"{len(train_y)} training and {len(test_y)} test images of 8×8 pixels, batches of 64."
        ),
        train=(images(train_x), torch.from_numpy(train_y)),
        test=(images(test_x), torch.from_numpy(test_y)),
        model=model,
        loss=nn.functional.cross_entropy,
        batch_size=64,
    )
