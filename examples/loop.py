"""The training loop by hand, on real data, with everything that belongs to it; and `schuss.fit`, to the same bits.

By hand it trains for two epochs, begins anew from the checkpoint, as a run that was interrupted does, and trains for
two more. `fit` trains for four without a stop. Needs scikit-learn.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import schuss
from schuss import optim
from schuss.schedules import cosine, warmup
from schuss.training import load_checkpoint, save_checkpoint

EPOCHS, MICRO, ACCUMULATE = 4, 40, 4  # nine steps in an epoch; the last micro-batch has 37 examples

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def build():
    """What has a state: model, data, optimizer and schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    loader = DataLoader(train, MICRO, shuffle=True, generator=torch.Generator().manual_seed(0))
    groups = schuss.param_groups(model, weight_decay=0.05)  # not of biases and norms
    optimizer = optim.AdamW(groups, lr=0.01, max_norm=1.0, ema_decay=0.95)
    steps = EPOCHS * len(schuss.accumulate(loader, ACCUMULATE))
    return model, loader, optimizer, schuss.Schedule(optimizer, lr=warmup(cosine(steps), steps // 10))


def accuracy(model):
    return (model(test[0]).argmax(1) == test[1]).double().mean().item()


def by_hand(folder: Path, epochs: int):
    model, loader, optimizer, schedule = build()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "data": loader}
    windows, first, losses = schuss.accumulate(loader, ACCUMULATE), 0, []
    if folder.exists():
        saved = load_checkpoint(folder, **parts)
        first, losses = saved.epoch, saved.extra["losses"]
    for epoch in range(first, epochs):
        model.train()
        for window in windows:
            optimizer.zero_grad()
            for x, y in window:
                window.backward(cross_entropy(model(x), y))  # weighted by its share of the window
            optimizer.step()  # clips the sum of the gradients first, and averages the parameters after
            schedule.step()  # once per step of the optimizer, after it
            losses.append(window.loss.item())
        model.eval()
        with optimizer.averaged(), torch.no_grad():
            print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}  test accuracy {accuracy(model):.1%}")
        step = (epoch + 1) * len(windows)
        save_checkpoint(folder, **parts, step=step, epoch=epoch + 1, extra={"losses": losses})
    return model, losses


def by_fit():
    model, loader, optimizer, schedule = build()
    history = schuss.fit(
        model, loader, cross_entropy, optimizer, epochs=EPOCHS, schedule=schedule, accumulate=ACCUMULATE,
        evaluate=accuracy, mode="max",
    )  # fmt: skip
    return model, history


with TemporaryDirectory() as folder:
    by_hand(Path(folder) / "run", epochs=2)
    print("begins anew, from the checkpoint")
    model, losses = by_hand(Path(folder) / "run", EPOCHS)

other, history = by_fit()
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
assert history.losses == losses
assert history.best is not None
assert history.best["value"] > 0.85
print(f"fit: the same {history.steps} losses, the same bits; best accuracy {history.best['value']:.1%}")
