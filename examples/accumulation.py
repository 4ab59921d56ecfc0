"""Micro-batches of any sizes that train as the large batch does; and what the mean of their means does instead.

In float64, so that what differs is the computation, not its rounding. Needs scikit-learn.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import schuss
from schuss import optim

EPOCHS, BATCH = 5, 256

digits = load_digits()
images, labels = torch.tensor(digits.images).flatten(1) / 16, torch.tensor(digits.target)
large = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))  # eight, the last of 5 examples
# Three of 80 and one of 16 make a large one; of the last large batch there is one of 5.
small = [(x, y) for images, labels in large for x, y in zip(images.split(80), labels.split(80), strict=True)]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).double()
    return model, optim.SGD(model.parameters(), lr=0.5, momentum=0.9, max_norm=1.0)


def train(batches, accumulate):
    model, optimizer = build()
    history = schuss.fit(model, batches, cross_entropy, optimizer, epochs=EPOCHS, accumulate=accumulate)
    return model, history.losses


def mean_of_means():
    model, optimizer = build()
    for _ in range(EPOCHS):
        for first in range(0, len(small), 4):
            optimizer.zero_grad()
            for x, y in small[first : first + 4]:
                (cross_entropy(model(x), y) / 4).backward()  # wrong: the 16 count as much as the 80, the 5 a quarter
            optimizer.step()
    return model


def distance(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


whole, losses = train(large, 1)
parts, same_losses = train(small, 4)
right, wrong = distance(whole, parts), distance(whole, mean_of_means())
print(f"{len(small)} micro-batches, {len(large)} steps per epoch, loss {losses[0]:.3f} to {losses[-1]:.3f}")
print(f"largest difference of a parameter: {right:.0e}, by the mean of means {wrong:.0e}")
assert len(losses) == EPOCHS * len(large)
torch.testing.assert_close(same_losses, losses, rtol=1e-10, atol=0)
assert right < 1e-11
assert wrong > 1e-3
