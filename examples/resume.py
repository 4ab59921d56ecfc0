"""A training that is stopped in the middle of an epoch and goes on, to the bits of one that was never stopped.

By `schuss.fit`, stopped by the SIGTERM of a cluster and by a number of steps; and by a loop by hand. Needs
scikit-learn.
"""

import os
import signal
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import schuss
from schuss import optim
from schuss.schedules import cosine
from schuss.training import load_checkpoint, save_checkpoint

EPOCHS, BATCH = 3, 64
digits = load_digits()
data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target))


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(1))
    optimizer = optim.AdamW(model.parameters(), lr=0.005)
    return model, loader, optimizer, schuss.Schedule(optimizer, lr=cosine(EPOCHS * len(loader)))


def by_fit(folder: Path | None = None, **options):
    model, loader, optimizer, schedule = build()
    history = schuss.fit(
        model, loader, cross_entropy, optimizer, epochs=EPOCHS, schedule=schedule, checkpoint=folder, **options
    )
    print(f"fit: steps {history.resumed} to {history.steps}, stopped by {history.stopped}")
    return model


def by_hand(folder: Path, stop: int | None = None):
    """The position in the data is the state of their generator when the epoch began, and a number of batches."""
    model, loader, optimizer, schedule = build()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    epoch = taken = 0
    if folder.exists():
        saved = load_checkpoint(folder, **parts)  # and the random numbers, of dropout here
        epoch, taken = saved.extra["epoch"], saved.extra["taken"]
        loader.generator.set_state(saved.extra["begin"])
    while epoch < EPOCHS:
        begin = loader.generator.get_state()
        for x, y in islice(loader, taken, None):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            taken += 1
            if (step := epoch * len(loader) + taken) == stop:
                save_checkpoint(folder, **parts, step=step, extra={"epoch": epoch, "taken": taken, "begin": begin})
                return model
        epoch, taken = epoch + 1, 0
    return model


def kill(history):
    if history.steps == 40:
        os.kill(os.getpid(), signal.SIGTERM)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


whole = by_fit()
with TemporaryDirectory() as name:
    folder = Path(name)
    by_fit(folder / "signal", on_step=kill)
    assert same(by_fit(folder / "signal"), whole)
    by_fit(folder / "steps", steps=10)
    by_fit(folder / "steps", steps=51)
    assert same(by_fit(folder / "steps"), whole)
    assert not same(by_hand(folder / "hand", stop=40), whole)
    assert same(by_hand(folder / "hand"), whole)
print("all end with the same bits")
