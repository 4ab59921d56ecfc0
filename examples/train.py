"""A whole training loop on real data: groups, a schedule, accumulation, clipping, and checkpoints to resume from.

Run it, interrupt it, run it again: it goes on where the last checkpoint was, and ends with the same loss. Delete
checkpoint.pt to start anew. Needs scikit-learn.
"""

import math
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from schuss import optim  # or: from torch import optim

EPOCHS, BATCH, MICRO = 10, 128, 48  # a batch is gathered from micro-batches, the last of them smaller
CHECKPOINT = Path("checkpoint.pt")

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
shuffled = torch.randperm(len(labels))
train, test = shuffled[:1437], shuffled[1437:]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
groups = [
    {"params": [(n, p) for n, p in model.named_parameters() if p.dim() >= 2], "weight_decay": 0.05},
    {"params": [(n, p) for n, p in model.named_parameters() if p.dim() < 2], "weight_decay": 0.0},
]
optimizer = optim.AdamW(groups, lr=0.01)
steps, warmup = EPOCHS * math.ceil(len(train) / BATCH), 10
scheduler = optim.lr_scheduler.LambdaLR(
    optimizer, lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps)))
)
order = torch.Generator().manual_seed(0)

first = 0
if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT, weights_only=True)
    for part, state in zip((model, optimizer, scheduler), saved["parts"], strict=True):
        part.load_state_dict(state)
    order.set_state(saved["order"])
    first = saved["epoch"]
    print(f"going on after epoch {first}")

for epoch in range(first, EPOCHS):
    total = 0.0
    for batch in train[torch.randperm(len(train), generator=order)].split(BATCH):
        optimizer.zero_grad()
        for micro in batch.split(MICRO):
            loss = nn.functional.cross_entropy(model(images[micro]), labels[micro], reduction="sum") / len(batch)
            loss.backward()  # for each micro-batch, so that one graph is kept at a time
            total += loss.item() * len(batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()  # after the optimizer, once per step
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).double().mean().item()
    print(f"epoch {epoch + 1:2d}  loss {total / len(train):.4f}  test accuracy {accuracy:.1%}")
    parts = [part.state_dict() for part in (model, optimizer, scheduler)]
    torch.save({"parts": parts, "order": order.get_state(), "epoch": epoch + 1}, CHECKPOINT)
