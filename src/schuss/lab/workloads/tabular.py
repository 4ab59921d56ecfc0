"""Tables that come with scikit-learn, and small networks on their standardised columns."""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from schuss.lab.workload import Task
from schuss.lab.workloads.parts import (
    Shuffled,
    initialised,
    loss_and_accuracy,
    mean_loss,
    seeded,
    supervised,
)

Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@cache
def data(name: str) -> Split:
    """Rows and targets of the set that scikit-learn's `load_<name>` has: four fifths to train, one to test.

    Columns, and a target of numbers, have mean 0 and variance 1 in the training set.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    classes = y.dtype.kind == "i"
    # The split is part of the task, so it does not change with the seed of a run.
    train_x, test_x, train_y, test_y = (
        torch.from_numpy(part)
        for part in train_test_split(x, y, test_size=0.2, stratify=y if classes else None, random_state=0)
    )

    def scaled(part: Tensor, train: Tensor) -> Tensor:
        return ((part - train.mean(dim=0)) / train.std(dim=0, correction=0)).float()

    def targets(part: Tensor) -> Tensor:
        return part if classes else scaled(part, train_y).unsqueeze(1)

    return (scaled(train_x, train_x), targets(train_y)), (scaled(test_x, train_x), targets(test_y))


def _network(*widths: int) -> nn.Module:
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def breast_cancer(seed: int) -> Task:
    """Benign or malignant, by 30 measures of a tumour: three linear layers."""
    train, test = data("breast_cancer")
    return Task(
        model=initialised(lambda: _network(30, 32, 16, 2), seeded(seed)),
        batches=Shuffled(train, 32, seeded(seed)),
        loss=supervised(cross_entropy),
        evaluate=loss_and_accuracy(test),
        metric="loss",
        # SGD with Nesterov momentum at 0.01 of six rates: 0.107 at most; AdamW at 0.001: 0.112.
        target=0.11,
        epochs=20,
        batch_size=32,
    )


def diabetes(seed: int) -> Task:
    """Progress of diabetes, by 10 measures of a patient: three linear layers."""
    train, test = data("diabetes")
    return Task(
        model=initialised(lambda: _network(10, 32, 16, 1), seeded(seed)),
        batches=Shuffled(train, 32, seeded(seed)),
        loss=supervised(mse_loss),
        evaluate=mean_loss(mse_loss, test),
        metric="loss",
        # AdamW at 0.001 of six rates: 0.549 at most; SGD with Nesterov momentum at 0.003: 0.555.
        target=0.55,
        epochs=20,
        batch_size=32,
    )
