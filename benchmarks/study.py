"""The study of docs/study.md: every rule on the built-in workloads, with equal budgets. Writes a report.

    python benchmarks/study.py [--jobs 2] [--seeds 3] [--confirm 10] [--workload NAME] [--out out/study]

Every optimizer gets five learning rates, about a factor of three apart, and up to two more where its best one lies at
an edge; the ranking is on ten seeds more at the best of them. All else is the default of its class. A run is complete:
its rate falls linearly to zero, but for Schedule-Free's. Runs are kept in `runs.sqlite` in the folder: stopped by
Ctrl-C and started again, it goes on.
"""

import argparse
import time
from pathlib import Path

from study_entrants import entrants

from schuss.lab.compare import compare
from schuss.lab.run import Run
from schuss.lab.workloads import WORKLOADS

LEFT_OUT = ("zipf_sparse",)
"""Only for optimizers that take sparse gradients."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--confirm", type=int, default=10, help="seeds on which the ranking is")
    parser.add_argument("--workload", action="append", help="one of them; may be repeated (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    given = parser.parse_args()
    names = given.workload or [name for name in WORKLOADS if name not in LEFT_OUT]
    began = last = time.monotonic()

    def on_run(run: Run, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 20:
            last = time.monotonic()
            print(f"{done} of {total} runs after {(last - began) / 60:.0f} min", flush=True)

    comparison = compare(
        names, entrants(), seeds=given.seeds, confirm=given.confirm, jobs=given.jobs, threads=1,
        store=given.out / "runs.sqlite", on_run=on_run,
    )  # fmt: skip
    if comparison.runs:
        print(comparison)
    for path in comparison.save(given.out, command="python benchmarks/study.py"):
        print(path)


if __name__ == "__main__":
    main()
