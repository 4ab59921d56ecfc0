"""Where the numbers of a training go: TensorBoard, a function, and a bar in the terminal."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

__all__ = ["Record", "recording"]

Record = Callable[[int, Mapping[str, float]], object]
"""Called with the number of steps that are done, and values by name."""


@contextmanager
def recording(
    log: str | os.PathLike[str] | Record | None, *, progress: bool, total: int | None, done: int
) -> Iterator[list[Record]]:
    """Open what is wanted, and close it after the block.

    Args:
        log: a folder for TensorBoard, or a function.
        progress: whether to show a bar, if stderr is a terminal and rich is installed.
        total: steps of the whole training, if they are known.
        done: steps that were done before, in [0, inf).

    Raises:
        ModuleNotFoundError: a folder, and no TensorBoard.
    """
    with ExitStack() as stack:
        records: list[Record] = []
        if callable(log):
            records.append(log)
        elif log is not None:
            records.append(stack.enter_context(_tensorboard(log, done)))
        if progress and sys.stderr.isatty():
            with suppress(ModuleNotFoundError):  # rich comes with the lab
                records.append(stack.enter_context(_bar(total, done)))
        yield records


@contextmanager
def _tensorboard(folder: str | os.PathLike[str], done: int) -> Iterator[Record]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'fit: to log into the folder {os.fspath(folder)} needs TensorBoard: pip install "schuss[lab]"',
            name=error.name,
        ) from error

    def record(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    # What a run wrote after its last checkpoint is written again when it goes on from there.
    writer = SummaryWriter(os.fspath(folder), purge_step=done + 1 if done else None)
    try:
        yield record
    finally:
        writer.close()


@contextmanager
def _bar(total: int | None, done: int) -> Iterator[Record]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def record(step: int, values: Mapping[str, float]) -> None:
        shown.update({name: f"{name} {value:.4g}" for name, value in values.items() if not name.startswith("lr")})
        bar.update(task, completed=step, description="  ".join(shown.values()))

    shown: dict[str, str] = {}
    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield record
