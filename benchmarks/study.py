"""The study of docs/study.md: every rule on the built-in workloads, with equal budgets. Writes reports.

    python benchmarks/study.py [--jobs 2] [--seeds 3] [--confirm 10] [--part NAME] [--out out/study]
    python benchmarks/study.py --page docs/study.md

Every optimizer gets five learning rates, about a factor of three apart, and up to two more where its best one lies at
an edge; the ranking is on ten seeds more at the best of them. All else is the default of its class. A run is complete:
its rate falls linearly to zero, but for Schedule-Free's. Runs are kept in `runs.sqlite` in the folder: stopped by
Ctrl-C and started again, it goes on.
"""

import argparse
import time
from pathlib import Path

import study_page
from study_entrants import entrants

from schuss.lab.candidate import Candidate, around, candidates
from schuss.lab.compare import Comparison, compare
from schuss.lab.run import Run
from schuss.lab.workloads import WORKLOADS

TWELVE = (
    "SGD", "AdamW", "NAdamW", "RAdam", "ADOPT", "Lion", "AdEMAMix", "MARS", "Prodigy", "ScheduleFreeAdamW", "SOAP",
    "Muon+AdamW",
)  # fmt: skip
"""Who trains the largest model: a run of it takes as long as those of all others together."""

SPARSE = ("SparseAdam", "SGD", "Adagrad")
"""Who takes sparse gradients."""


def parts() -> dict[str, tuple[list[str], list[Candidate]]]:
    """Comparisons by name: workloads, and who takes part."""
    largest, sparse = "char_gpt", "zipf_sparse"
    everyone = entrants()
    return {
        "all": ([name for name in WORKLOADS if name not in (largest, sparse)], everyone),
        largest: ([largest], [one for one in everyone if one.name in TWELVE]),
        sparse: ([sparse], [Candidate(c.name, c.build, around(c.lrs[1], 5)) for c in candidates(SPARSE)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seeds", type=int, default=3, help="on which learning rates are chosen")
    parser.add_argument("--confirm", type=int, default=10, help="seeds on which the ranking is")
    parser.add_argument("--part", action="append", choices=[*parts()], help="may be repeated (default: all of them)")
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    parser.add_argument("--page", type=Path, help="whose tables, picture and numbers are to be made anew")
    given = parser.parse_args()
    if given.page is not None and given.part is not None:
        parser.error("--page needs all parts")
    began = last = time.monotonic()

    def on_run(run: Run, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 20:
            last = time.monotonic()
            print(f"{done} of {total} runs after {(last - began) / 60:.0f} min", flush=True)

    made: dict[str, Comparison] = {}
    for name, (workloads, those) in parts().items():
        if given.part is None or name in given.part:
            comparison = made[name] = compare(
                workloads, those, seeds=given.seeds, confirm=given.confirm, jobs=given.jobs, threads=1,
                store=given.out / "runs.sqlite", on_run=on_run,
            )  # fmt: skip
            print(comparison)
            for path in comparison.save(given.out / name, command=f"python benchmarks/study.py --part {name}"):
                print(path)
            if comparison.interrupted:
                return
    if given.page is not None:
        for path in study_page.write(made, given.page):
            print(path)


if __name__ == "__main__":
    main()
