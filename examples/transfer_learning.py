"""Transfer learning: pretrain a network on the digits 0 to 4, train a new head on 5 to 9, then all of it, gently.

It shows how, not how much is won: of so easy digits, forty examples are enough to learn from scratch. Needs
scikit-learn.
"""

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import schuss
from schuss import optim
from schuss.schedules import cosine

HEAD, WHOLE, BATCH = 20, 10, 20  # epochs with the backbone frozen, and after that

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(digits.target)
large = TensorDataset(images[labels < 5], labels[labels < 5])
few = torch.cat([torch.nonzero(labels == digit).flatten()[:8] for digit in range(5, 10)])
small = TensorDataset(images[few], labels[few] - 5)
rest = torch.tensor(sorted({*torch.nonzero(labels >= 5).flatten().tolist()} - {*few.tolist()}))

torch.manual_seed(0)
backbone = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
)  # fmt: skip
model = nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(128, 5)))


def train(data, optimizer, epochs, schedule=None):
    loader = DataLoader(data, BATCH, shuffle=True)
    return schuss.fit(model, loader, cross_entropy, optimizer, epochs=epochs, schedule=schedule)


def accuracy():
    model.eval()
    with torch.no_grad():
        found = (model(images[rest]).argmax(1) == labels[rest] - 5).double().mean().item()
    model.train()
    return found


train(large, optim.AdamW(model.parameters(), lr=0.003), epochs=5)

model.head = nn.Linear(128, 5)
groups = schuss.param_groups(model, freeze="backbone")
optimizer = optim.AdamW(groups, lr=0.01)
schedule = schuss.Schedule(optimizer, lr=cosine((HEAD + WHOLE) * len(small) // BATCH))
backbone.eval()  # or its BatchNorms would go on averaging; fit leaves a part that is in eval mode as it is
before = [t.clone() for t in backbone.state_dict().values()]
frozen = train(small, optimizer, HEAD, schedule)
assert all(torch.equal(a, b) for a, b in zip(before, backbone.state_dict().values(), strict=True))
head = accuracy()
print(f"new head: loss {frozen.losses[-1]:.3f}, accuracy on {len(rest)} digits after {len(few)} examples {head:.1%}")

schuss.unfreeze(optimizer, groups, scheduler=schedule, lr=0.001)  # a tenth of the head's, on the same curve
rates = [group["lr"] for group in optimizer.param_groups]
backbone.eval()
thawed = train(small, optimizer, WHOLE, schedule)
print(f"all of it: loss {thawed.losses[-1]:.3f}, accuracy {accuracy():.1%}")
assert [round(rate / rates[-1], 9) for rate in rates] == [10, 10, 1, 1]  # with weight decay and without, each
assert not torch.equal(before[0], backbone[0].weight)
assert thawed.losses[-1] < frozen.losses[-1] < frozen.losses[0]
assert head > 0.7
