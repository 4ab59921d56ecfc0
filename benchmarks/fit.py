"""What `schuss.fit` adds to a step, against the loop written by hand. Prints a table in Markdown.

    python benchmarks/fit.py [--quick] [--threads N]

One convolutional network on scikit-learn's digits is trained by both in turn, an epoch each, with one optimizer, one
schedule and the same batches, which are tensors in memory. The data note when a step asks for its first batch; a step's
time is that from one such moment to the next, and medians are over all steps. The last column is what a call of fit
takes beside its steps.
"""

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import schuss
from schuss import optim
from schuss.lab.workloads import images
from schuss.schedules import cosine

Batch = tuple[Tensor, Tensor]


class Noting:
    """Batches that note when every n-th of them is asked for."""

    def __init__(self, batches: list[Batch], every: int) -> None:
        self.batches, self.every, self.moments = batches, every, list[float]()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(self.batches):
            if i % self.every == 0:
                self.moments.append(time.perf_counter())
            yield batch


def by_hand(
    model: nn.Module, data: Noting, optimizer: torch.optim.Optimizer, schedule: Any, accumulate: int
) -> list[float]:
    """The loop with torch alone; with accumulation, that of equal micro-batches."""
    model.train()
    losses = []
    batches = iter(data)
    while window := list(itertools.islice(batches, accumulate)):
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for x, y in window:
            loss = cross_entropy(model(x), y) / len(window)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        schedule.step()
        losses.append(total)
    return [loss.item() for loss in losses]


def by_fit(
    model: nn.Module, data: Noting, optimizer: torch.optim.Optimizer, schedule: Any, accumulate: int
) -> list[float]:
    """The same by `schuss.fit`."""
    return schuss.fit(
        model, data, cross_entropy, optimizer, epochs=1, schedule=schedule, accumulate=accumulate, progress=False
    ).losses


def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = images.digits(0).model
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    return model, optimizer, schuss.Schedule(optimizer, lr=cosine(10**6))


def row(batch_size: int, accumulate: int, epochs: int) -> None:
    """One line of the table."""
    (x, y), _ = images.data()
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))[: 1437 // batch_size]
    loops: list[Callable[..., list[float]]] = [by_hand, by_fit]
    times: dict[Any, list[float]] = {loop: [] for loop in loops}
    whole: dict[Any, list[float]] = {loop: [] for loop in loops}
    model, optimizer, schedule = build()
    for epoch in range(epochs + 1):
        for loop in loops if epoch % 2 else reversed(loops):
            data = Noting(batches, accumulate)
            began = time.perf_counter()
            losses = loop(model, data, optimizer, schedule, accumulate)
            ended = time.perf_counter()
            assert len(losses) == len(data.moments)
            if epoch:
                steps = [after - before for before, after in itertools.pairwise(data.moments)]
                times[loop] += steps
                whole[loop].append(ended - began - sum(steps))
    hand, fit = (1e3 * statistics.median(times[loop]) for loop in loops)
    call = 1e3 * (statistics.median(whole[by_fit]) - statistics.median(whole[by_hand]))
    print(
        f"| {batch_size} | {accumulate} | {hand:.3f} | {fit:.3f} | {1e3 * (fit - hand):+.0f} | "
        f"{100 * (fit / hand - 1):+.1f} % | {call:.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the epochs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {arguments.threads} threads\n")
    print("| batch | accumulate | by hand, ms | fit, ms | difference, µs | | ms per call |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for batch_size, accumulate in ((16, 1), (64, 1), (256, 1), (16, 4)):
        row(batch_size, accumulate, 30 if arguments.quick else 150)


if __name__ == "__main__":
    main()
