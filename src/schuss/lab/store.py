"""Runs that are kept: rows of an SQLite file, each under a key of everything that decides its numbers."""

import hashlib
import inspect
import json
import pickle
import platform
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, Self

import torch

from schuss import __version__
from schuss.lab.candidate import Candidate
from schuss.lab.check import Facts
from schuss.lab.run import PROTOCOL, Run

APPLICATION = 0x5C4055
"""In the file's header, by which another program's file is told from a store."""

TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY,  -- SHA-256 of settings
    workload TEXT NOT NULL,
    optimizer TEXT NOT NULL,
    lr REAL NOT NULL,
    seed INTEGER NOT NULL,
    diverged INTEGER NOT NULL,
    loss REAL,             -- final, on the data that are not trained on
    settings TEXT NOT NULL,
    run TEXT NOT NULL      -- everything that was recorded
) WITHOUT ROWID
"""


class Store:
    """Finished and diverged runs in a file. Several processes may read and write it.

    A write is on the disk when it returns, as far as the process is concerned: one that is killed leaves every run
    that had ended.

    Args:
        path: is made if it is not there, with its folder.

    Raises:
        OSError: it cannot be opened, read or written, or is something else; also later.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with self._readable():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=60)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        [tables] = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        [application] = self._connection.execute("PRAGMA application_id").fetchone()
        if tables and application != APPLICATION:
            raise sqlite3.DatabaseError("it is no store of runs")
        # Readers do not wait for a writer, and a commit is one write to the end of a file.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        with self._connection:
            self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
            self._connection.execute(TABLE)

    def get(self, settings: Mapping[str, Any]) -> Run | None:
        """The run of these settings, if it is there."""
        with self._readable():
            row = self._connection.execute("SELECT run FROM runs WHERE key = ?", (key(settings),)).fetchone()
        try:
            return None if row is None else read(row[0])
        except (KeyError, TypeError, ValueError, AttributeError):  # of another version, or damaged: it is made again
            return None

    def put(self, settings: Mapping[str, Any], run: Run) -> None:
        """Keep a run."""
        row = (
            key(settings), run.workload, run.optimizer, run.lr, run.seed, run.diverged, run.test_loss[-1],
            text(settings), json.dumps(asdict(run)),
        )  # fmt: skip
        with self._readable(), self._connection:
            self._connection.execute(f"INSERT OR REPLACE INTO runs VALUES ({','.join('?' * len(row))})", row)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"cannot use {self.path} as a store of runs: {error}; name another file") from error


def read(record: str) -> Run:
    """A run from its JSON."""
    fields = json.loads(record)
    fields["test"] = {name: tuple(values) for name, values in fields["test"].items()}
    for name in ("train_loss", "steps", "seconds"):
        fields[name] = tuple(fields[name])
    return Run(**fields)


def text(settings: Mapping[str, Any]) -> str:
    """Settings as JSON, always in the same order."""
    return json.dumps(settings, sort_keys=True)


def key(settings: Mapping[str, Any]) -> str:
    """What a run with these settings is kept under."""
    return hashlib.sha256(text(settings).encode()).hexdigest()


def settings(
    fingerprint: str, workload: str, candidate: Candidate, lr: float, *, seed: int, epochs: int, warmup: float
) -> dict[str, Any]:
    """Everything that decides the numbers of a run."""
    return {
        "protocol": PROTOCOL,
        "workload": workload,
        "task": fingerprint,
        "optimizer": candidate.name,
        "arguments": {name: repr(value) for name, value in candidate.arguments.items()},
        "source": source(candidate.build),
        "lr": lr,
        "seed": seed,
        "epochs": epochs,
        "warmup": warmup,
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """What the numbers depend on besides the arguments: versions, threads, instructions."""
    return versions() | {"threads": str(torch.get_num_threads())}


@cache
def _versions() -> dict[str, str]:
    return {
        "schuss": __version__,
        **{name: metadata.version(name) for name in ("torch", "numba", "scikit-learn")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def versions() -> dict[str, str]:
    """Of what runs, and the processor's kind."""
    return dict(_versions())


def fingerprint(facts: Facts) -> str:
    """Of a task: shapes, steps, batch size, metric, the weights and the first loss of seed 0, and the source file.

    Not of its target, which changes no run.
    """
    task = facts.task
    parameters = [(name, [*p.shape], str(p.dtype), p.device.type) for name, p in task.model.named_parameters()]
    # To four digits: not every device gives the same bits twice.
    first = {name: f"{value:.4g}" for name, value in {**facts.scores, "first loss": facts.loss}.items()}
    described = [parameters, len(task.batches), task.batch_size, task.metric, task.better, first]
    digest = hashlib.sha256(json.dumps([described, source(facts.workload.make)]).encode())
    for p in task.model.parameters():
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source(thing: Callable[..., Any]) -> str:
    """A digest of the file that a class or function was written in, or of itself, where there is no file.

    And of what is bound to it: arguments of a partial, defaults and the enclosing variables of a function, attributes
    of an object.
    """
    held: list[Any] = []
    while isinstance(thing, partial):
        held += [*thing.args, *thing.keywords.items()]
        thing = thing.func
    if inspect.ismethod(thing):
        held.append(thing.__self__)
    if inspect.isfunction(thing := inspect.unwrap(thing)):
        held += [*_enclosed(thing), *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).items()]
    elif not (inspect.isroutine(thing) or inspect.isclass(thing)):
        held += vars(thing).items() if hasattr(thing, "__dict__") else ()
        thing = type(thing)
    bound = "".join(map(_digest, held))
    try:
        file = Path(inspect.getsourcefile(thing) or "")
        written = file.read_bytes() if file.is_file() else inspect.getsource(thing).encode()
    except (TypeError, OSError):  # written in C, or typed in
        written = b""
    return hashlib.sha256(written + bound.encode()).hexdigest()


def _enclosed(function: FunctionType) -> Iterator[Any]:
    """What stands in the variables of an enclosing function that it uses."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing stands there yet
            if cell.cell_contents is not function:
                yield cell.cell_contents


def _digest(value: Any) -> str:
    """Of a value that a function holds. One that cannot be written down is like no other, not even itself later."""
    try:
        return source(value) if inspect.isfunction(value) else hashlib.sha256(pickle.dumps(value)).hexdigest()
    except Exception:  # of anybody's object, or of functions that hold each other
        return uuid.uuid4().hex
