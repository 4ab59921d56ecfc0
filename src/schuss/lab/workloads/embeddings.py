"""Tables of vectors, of which a batch has a few rows: features as rare as words are, and a matrix with gaps."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from schuss.lab.workload import Task
from schuss.lab.workloads.parts import (
    Drawn,
    Shuffled,
    initialised,
    loss_and_accuracy,
    mean_loss,
    seeded,
    supervised,
)

FEATURES, PER_EXAMPLE, CLASSES = 2000, 16, 10
BATCH_SIZE = 128


@cache
def zipf(features: int = FEATURES) -> Tensor:
    """Frequencies by rank, in proportion to 1 / rank: Zipf's law."""
    frequencies = 1 / torch.arange(1, features + 1, dtype=torch.float64)
    return frequencies / frequencies.sum()


@cache
def preferences() -> Tensor:
    """A score of each feature for each class, standard normal, and the same for every seed of a run."""
    return torch.randn(FEATURES, CLASSES, generator=seeded(0))


def bags(examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Examples of 16 features each, and their classes.

    A class is drawn from the softmax of twice the sum of the features' scores over the root of their number.
    """
    x = torch.multinomial(zipf(), examples * PER_EXAMPLE, replacement=True, generator=generator)
    x = x.view(examples, PER_EXAMPLE)
    chances = torch.softmax(2 * preferences()[x].sum(dim=1) / PER_EXAMPLE**0.5, dim=1)
    return x, torch.multinomial(chances, 1, generator=generator).squeeze(1)


@cache
def held_out() -> tuple[Tensor, Tensor]:
    """The same for every seed of a run."""
    return bags(4096, seeded(1))


class Bags(nn.Module):
    """Scores of classes: products of their vectors and the sum of the features' vectors."""

    def __init__(self, *, sparse: bool, width: int = 16) -> None:
        super().__init__()
        self.features = nn.EmbeddingBag(FEATURES, width, mode="sum", sparse=sparse)
        self.classes = nn.Embedding(CLASSES, width, sparse=sparse)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of examples."""
        return self.features(x) @ self.classes(torch.arange(CLASSES)).T  # type: ignore[no-any-return]


def zipf_dense(seed: int) -> Task:
    """Classes of bags of features as rare as words: embeddings."""
    return _bags(seed, sparse=False)


def zipf_sparse(seed: int) -> Task:
    """Classes of bags of features: embeddings with sparse gradients."""
    return _bags(seed, sparse=True)


def _bags(seed: int, *, sparse: bool) -> Task:
    random = seeded(seed)
    return Task(
        model=initialised(lambda: Bags(sparse=sparse), random, embedding_std=0.1),
        # Drawn anew, for otherwise the tables would learn rare features by heart.
        batches=Drawn(64, lambda: bags(BATCH_SIZE, random)),
        loss=supervised(cross_entropy),
        evaluate=loss_and_accuracy(held_out()),
        metric="loss",
        # AdamW, on dense gradients, at 0.03 of six rates: 1.302 at most; SparseAdam at 0.03: 1.305; SGD with Nesterov
        # momentum at 0.3: 1.36.
        target=1.31,
        epochs=8,
        batch_size=BATCH_SIZE,
    )


ROWS, COLUMNS, RANK = 200, 150, 5
NOISE = 0.1
"""Standard deviation of what is added to entries whose own is 1."""


@cache
def entries() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Three tenths of the entries of a matrix, as (row, column) and value: four fifths to train, one to test.

    The matrix has rank 5, and singular values about in proportion to 1, 1/2, ... 1/5; its entries have variance 1.
    The data are part of the task, so they do not change with the seed of a run.
    """
    generator = seeded(0)
    left = torch.randn(ROWS, RANK, generator=generator) / torch.arange(1, RANK + 1)
    matrix = left @ torch.randn(RANK, COLUMNS, generator=generator)
    matrix /= matrix.std()
    known = torch.randperm(ROWS * COLUMNS, generator=generator)[: ROWS * COLUMNS * 3 // 10]
    x = torch.stack([known // COLUMNS, known % COLUMNS], dim=1)
    y = matrix.flatten()[known] + NOISE * torch.randn(len(known), generator=generator)
    train = len(known) * 4 // 5
    return (x[:train], y[:train]), (x[train:], y[train:])


class Factors(nn.Module):
    """Entries as products of a row's and a column's vector."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, RANK)
        self.columns = nn.Embedding(COLUMNS, RANK)

    def forward(self, x: Tensor) -> Tensor:
        """Values at (row, column)."""
        return (self.rows(x[:, 0]) * self.columns(x[:, 1])).sum(dim=1)  # type: ignore[no-any-return]


def factorisation(seed: int) -> Task:
    """Missing entries of a noisy matrix of rank 5: a product of two thin ones."""
    train, test = entries()
    return Task(
        # Small, so that training begins at the saddle where all products are zero.
        model=initialised(Factors, seeded(seed), embedding_std=0.1),
        batches=Shuffled(train, BATCH_SIZE, seeded(seed)),
        loss=supervised(mse_loss),
        evaluate=mean_loss(mse_loss, test),
        metric="loss",
        # AdamW at 0.03 of five rates: 0.0131 at most, with noise alone 0.01; SGD with Nesterov momentum at 0.3: 0.020.
        target=0.0135,
        epochs=20,
        batch_size=BATCH_SIZE,
    )
