"""What the lab adds to a training: the time of a kept run of `schuss compare` against the same loop written by hand.

    python benchmarks/lab.py [--rounds 9] [--workload NAME]

Both alternate, and the medians of their ratios are printed. Making the task, evaluations and steps are the same in
both; the lab adds the schedule, the record of losses and times, random states that are restored, and the store.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from schuss import optim
from schuss.lab.candidate import Candidate
from schuss.lab.run import attempt, rehearse
from schuss.lab.store import Store, settings
from schuss.lab.workload import Workload
from schuss.lab.workloads import WORKLOADS

LR = 1e-3


def by_hand(workload: Workload) -> float:
    """Seconds of a run as one would write it."""
    began = time.perf_counter()
    task = workload(0)
    optimizer = optim.AdamW(task.model.parameters(), lr=LR)
    scheduler = optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=task.steps)
    for _ in range(task.epochs):
        for batch in task.batches:
            optimizer.zero_grad()
            loss = task.loss(task.model, batch)
            loss.item()  # to look at it
            loss.backward()
            optimizer.step()
            scheduler.step()
        task.model.eval()
        with torch.no_grad():
            task.evaluate(task.model)
        task.model.train()
    return time.perf_counter() - began


def in_the_lab(workload: Workload, candidate: Candidate, store: Store) -> float:
    """Seconds of the same run, made and kept."""
    began = time.perf_counter()
    key = settings("none", workload.name, candidate, LR, seed=0, epochs=1, warmup=0.0)
    store.get(key)
    run = attempt(workload, candidate, LR, seed=0, epochs=None, warmup=0.0)
    store.put(key, run)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workload", action="append", help="may be repeated (default: all but zipf_sparse)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    candidate = Candidate("AdamW", optim.AdamW, (LR,))
    print("| workload | by hand, s | in the lab, s | ratio |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "runs.sqlite") as store:
        for name in given.workload or [name for name in WORKLOADS if name != "zipf_sparse"]:
            workload = WORKLOADS[name]
            rehearse(workload, candidate)
            pairs = [(by_hand(workload), in_the_lab(workload, candidate, store)) for _ in range(given.rounds)]
            one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            print(f"| {name} | {one:.3f} | {other:.3f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
