"""What `schuss compare` does with its arguments: trains, prints the ranking, and writes the report."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from schuss.lab import report
from schuss.lab.candidate import DEFAULT_NAMES
from schuss.lab.compare import Comparison
from schuss.lab.run import Run
from schuss.lab.tensorboard import check


def compare(
    *,
    workloads: Sequence[str] | None,
    optimizers: Sequence[str] | None,
    lrs: str | None,
    seeds: str,
    confirm: int,
    epochs: int | None,
    warmup: float,
    extend: int,
    jobs: int,
    threads: int,
    out: Path,
    store: Path | None,
    tensorboard: bool,
    show: Callable[[str], None],
) -> bool:
    """Run it.

    Args:
        show: takes what is printed.

    Returns:
        Whether every run has been made; else Ctrl-C has ended it, and the report is on those that have.

    Raises:
        ValueError: an argument that is none; before anything is written.
        OSError: the folder or the store cannot be written.
    """
    if tensorboard:
        check()
    sys.path.insert(0, "")  # module:name is looked for in this folder, as `python -m` does
    names = ["digits"] if workloads is None else _split(",".join(workloads))
    entrants = list(DEFAULT_NAMES) if optimizers is None else _split(",".join(optimizers))
    comparison = Comparison(
        names, entrants, lrs=None if lrs is None else _learning_rates(lrs), seeds=_seeds(seeds), confirm=confirm,
        epochs=epochs, warmup=warmup, extend=extend, threads=threads,
    )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {out}: {error.strerror}") from error
    kept = out / "runs.sqlite" if store is None else store

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("runs", total=comparison.total)

        def on_run(run: Run, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        comparison.run(jobs=jobs, store=kept, on_run=on_run)

    if comparison.runs:
        show(str(comparison))
    # The names are spelt out because the default may change in a later version.
    words = ["schuss", "compare"] + (["--workload", ",".join(names)] if workloads is not None else [])
    words += ["--optimizers", ",".join(candidate.name for candidate in comparison.candidates)]
    words += ["--lrs", lrs] if lrs is not None else []
    words += ["--epochs", str(epochs)] if epochs is not None else []
    words += ["--warmup", f"{warmup:g}"] if warmup else []
    words += ["--extend", str(extend)] if extend != 2 else []
    words += ["--confirm", str(confirm)] if confirm else []
    words += ["--seeds", seeds, "--threads", str(threads)]
    page, *numbers = report.save(comparison, out, command=shlex.join(words), tensorboard=tensorboard)
    events = numbers.pop() if tensorboard else None
    if comparison.recalled:
        show(f"Taken from {kept}: {comparison.recalled} of {len(comparison.runs)} runs; delete it to train them again.")
    if comparison.interrupted:
        show("The same command goes on from here.")
    show(f"Report: {page}\nNumbers: {', '.join(map(str, numbers))}")
    if events is not None:
        show(f"Curves: {shlex.join(['tensorboard', '--logdir', str(events)])}")
    return not comparison.interrupted


def _split(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]


def _learning_rates(text: str) -> list[float]:
    try:
        return [float(word) for word in _split(text)]
    except ValueError:
        raise ValueError(f"--lrs must be numbers separated by commas, got {text!r}") from None


def _seeds(text: str) -> int | list[int]:
    words = _split(text)
    if not words or not all(word.isdecimal() for word in words) or text.strip() == "0":
        raise ValueError(f"--seeds must be a count of at least 1 or integers separated by commas, got {text!r}")
    return list(map(int, words)) if "," in text else int(text)
