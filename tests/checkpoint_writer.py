"""A small training run with all that has a state; as a script, the run in processes that are killed while they save.

    python checkpoint_writer.py FOLDER KILLS

forks children of one warm process, which has loaded the folder's newest checkpoint. Each steps and saves until it is
killed. Then the newest checkpoint must be whole, no older than the last save that had returned, and hold the numbers
that the child had. Prints what it has seen as JSON.
"""

import hashlib
import json
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from schuss import optim
from schuss.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

BATCH, EXAMPLES = 64, 400  # seven batches an epoch, the last one short


class Shuffled(Sampler[int]):
    """A new order each epoch, from a seed and the epoch; goes on in the middle of one."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed, self.epoch, self.taken = size, seed, 0, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        while self.taken < self.size:
            self.taken += 1
            yield order[self.taken - 1]
        self.epoch, self.taken = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.seed, self.epoch, self.taken = (state_dict[name] for name in ("seed", "epoch", "taken"))


def digest(*states: Any) -> str:
    """A hash of every bit of nested states."""
    found = hashlib.sha256()

    def feed(value: Any) -> None:
        found.update(type(value).__name__.encode())
        if isinstance(value, dict):
            for key in sorted(value, key=repr):
                found.update(repr(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple, set)):
            for item in sorted(value, key=repr) if isinstance(value, set) else value:
                feed(item)
        elif isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            found.update(value.tobytes())
        else:
            found.update(repr(value).encode())

    feed(list(states))
    return found.hexdigest()


def generators() -> tuple[Any, ...]:
    """The states of the generators that everybody shares."""
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()


@cache
def dataset() -> TensorDataset:
    digits = load_digits()
    x = torch.tensor(digits.images[:EXAMPLES], dtype=torch.float32).flatten(1) / 16
    return TensorDataset(x, torch.tensor(digits.target[:EXAMPLES]))


class Run:
    """Digits: dropout, augmentation with random numbers of all kinds, an average, clipping, a schedule, a shuffle."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.noise = np.random.default_rng(seed)
        self.mask = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)
        )  # fmt: skip
        self.optimizer = optim.AdamW(self.model.named_parameters(), lr=0.01, ema_decay=0.9, max_norm=1.0, **options)
        self.schedule = optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 20, 2)
        self.loader = DataLoader(dataset(), BATCH, sampler=Shuffled(EXAMPLES, seed), generator=torch.Generator())
        self.step = self.epoch = 0
        self.loss = 0.0

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "data": self.loader,
        }  # fmt: skip

    @property
    def generators(self) -> dict[str, Any]:
        return {"noise": self.noise, "mask": self.mask}

    def train(self) -> Iterator[int]:
        """Train; after each step its number."""
        while True:
            for x, y in self.loader:
                x = x + 0.01 * random.random() + 0.01 * float(np.random.rand() + self.noise.random())
                x = x * (torch.rand(x.shape, generator=self.mask) < 0.95)
                self.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.model(x), y)
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.step, self.loss = self.step + 1, loss.item()
                yield self.step
            self.epoch += 1

    def train_until(self, step: int) -> None:
        if self.step < step:
            next(s for s in self.train() if s == step)

    def save(self, path: Path, *, keep_last: int | None = 3, **extra: Any) -> Path:
        return save_checkpoint(
            path, **self.parts, step=self.step, epoch=self.epoch, loss=self.loss, keep_last=keep_last,
            extra={**self.generators, "digest": self.digest(), **extra},
        )  # fmt: skip

    def load(self, path: Path, **options: Any) -> Checkpoint:
        found = load_checkpoint(path, **self.parts, extra=self.generators, **options)
        assert found.step is not None
        assert found.epoch is not None
        assert found.loss is not None
        self.step, self.epoch, self.loss = found.step, found.epoch, found.loss
        return found

    def digest(self) -> str:
        """A hash of all that decides how the run goes on."""
        states = [of.state_dict() for of in (self.model, self.optimizer, self.schedule, self.loader.sampler)]
        own = (self.noise.bit_generator.state, self.mask.get_state(), self.step, self.loss)
        return digest(*states, own, generators())


def child(run: Run, folder: Path, report: int) -> None:
    """Go on; tell which step is saved."""
    sizes = random.Random(os.getpid())
    for step in run.train():
        os.write(report, struct.pack("<q", step - 1))  # the first time: it is about to save
        run.save(folder, keep_last=2, ballast=torch.zeros(sizes.randrange(1, 1 << 18), dtype=torch.uint8))


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    build = partial(Run, backend="foreach")  # a process that has not loaded Numba forks in half the time
    build().train_until(2)
    delays, longest, leftovers, finished, last, run = random.Random(0), 0.02, 0, 0, -1, build()
    for _ in range(kills):
        reading, writing = os.pipe()
        numbers = random.getstate()
        if (pid := os.fork()) == 0:
            try:
                random.setstate(numbers)  # Python seeds it anew in a child
                child(run, folder, writing)
            finally:
                os._exit(1)
        os.close(writing)
        os.read(reading, 8)
        time.sleep(delays.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the child has failed by itself"
        reported = os.read(reading, 1 << 16)
        os.close(reading)
        durable = struct.unpack("<q", reported[-8:])[0] if reported else last
        leftovers += any(path.name.endswith(".tmp") for path in folder.iterdir())
        finished += len(reported) // 8
        longest *= 0.9 if reported else 1.05  # a third of the children finish a save, however fast the machine is
        try:
            run = build()
            found = run.load(folder)
        except FileNotFoundError:
            assert durable == -1, "a checkpoint was there, and is gone"
            continue
        assert found.extra["digest"] == run.digest()
        assert run.step >= durable, f"step {durable} was saved, {run.step} is the newest"
        last = run.step
    run = build()
    run.load(folder)
    run.train_until(last + 10)
    run.save(folder)
    whole = build()
    whole.train_until(last + 10)
    print(
        json.dumps(
            {
                "same": digest(whole.model.state_dict(), whole.optimizer.state_dict())
                == digest(run.model.state_dict(), run.optimizer.state_dict()),
                "steps": last,
                "saves": finished,
                "torn": leftovers,
                "files": len([*folder.iterdir()]),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
