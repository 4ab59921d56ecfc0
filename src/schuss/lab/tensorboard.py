"""The runs of a comparison for TensorBoard: curves and hyperparameters."""

import math
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from schuss.lab.run import Run

if TYPE_CHECKING:
    from schuss.lab.compare import Comparison

EVENTS = "events.out.tfevents.*"


def write(comparison: "Comparison", folder: Path | str) -> Path:
    """Write each run to workload/optimizer/lr/seed in a folder; events that were in it before are gone.

    Scalars are `train/loss` by step, and `test/...`, what the workload evaluates. Times are those of the training, so
    TensorBoard's relative axis has the seconds of it.

    Args:
        folder: is made if it is not there.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    check()
    folder = Path(folder)
    for old in list(folder.rglob(EVENTS)):
        old.unlink()
        for parent in old.parents:  # a run that is no longer there leaves no empty folders
            if parent == folder or any(parent.iterdir()):
                break
            parent.rmdir()
    folder.mkdir(parents=True, exist_ok=True)
    workloads = _folders(comparison.goals)
    optimizers = _folders(candidate.name for candidate in comparison.candidates)
    began = time.time()
    for run in comparison.runs:
        if run.error is None:
            metric = comparison.goals[run.workload].metric
            place = folder / workloads[run.workload] / optimizers[run.optimizer] / f"{run.lr:g}" / f"seed_{run.seed}"
            _write(run, place, metric, began)
    return folder


def check() -> None:
    """Whether it can be written.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'compare: its curves need TensorBoard: pip install "schuss[lab]"', name=error.name
        ) from error


def _write(run: Run, folder: Path, metric: str, began: float) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    # `SummaryWriter.add_hparams` would begin a second run in a folder below.
    settings = {"workload": run.workload, "optimizer": run.optimizer, "lr": run.lr, "seed": run.seed}
    finals = {f"test/{name}": math.nan for name in dict.fromkeys((metric, "loss"))}
    with SummaryWriter(str(folder), max_queue=1000) as writer:
        for summary in hparams(settings, finals):
            writer.file_writer.add_summary(summary)
        steps = range(1, 1 + len(run.train_loss))
        for step, loss, at in zip(steps, run.train_loss, run.seconds_at(steps), strict=True):
            writer.add_scalar("train/loss", loss, step, walltime=began + at)
        for name, values in run.test.items():
            for step, value, at in zip(run.steps, values, run.seconds, strict=True):
                writer.add_scalar(f"test/{name}", value, step, walltime=began + at)


def _folders(names: Iterable[str]) -> dict[str, str]:
    """A folder's name for each: letters, digits and a few signs that every file system takes, no two the same."""
    found: dict[str, str] = {}
    for name in names:
        base = folder = re.sub(r"[^\w.+=-]+", "_", name)[:80].strip("._") or "_"
        count = 1
        while folder.lower() in (taken.lower() for taken in found.values()):
            count += 1
            folder = f"{base}_{count}"
        found[name] = folder
    return found
