"""Optuna's storages: opened for several processes, and cleared of trials whose process is gone."""

import os
import re
import socket
import sqlite3
import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState
from sqlalchemy import event

from schuss.lab.run import said

_PULSE: Mapping[str, Any] = {"heartbeat_interval": 20, "grace_period": 120}
"""How often a process says that it lives, and after how long a silence it does not, in seconds."""


def beside(path: Path) -> str:
    """The URL of a file.

    Raises:
        ValueError: SQLAlchemy would take a part of its name for options.
    """
    if "?" in str(path):
        raise ValueError(f"tune: a database cannot be in {str(path)!r}, for '?' ends a URL: choose another folder")
    return f"sqlite:///{path}"


def opened(storage: str | BaseStorage | None) -> tuple[BaseStorage, bool]:
    """The storage, and whether it is ours to close."""
    if storage is None:
        return optuna.storages.InMemoryStorage(), True
    if not isinstance(storage, str):
        return storage, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if not storage.startswith("sqlite"):
                return RDBStorage(storage, **_PULSE), True
            if (path := storage.partition(":///")[2]) in ("", ":memory:"):
                return RDBStorage(storage), True
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _check_ours(Path(path.partition("?")[0]))
            made = RDBStorage(storage, {"connect_args": {"timeout": 60}}, **_PULSE)
    except Exception as error:  # of a driver that is missing, a server that does not answer, a URL that is none
        raise ValueError(
            f"tune: cannot open the storage {masked(storage)!r}: {masked(said(error))}; a file is sqlite:///tune.db"
        ) from error
    event.listen(made.engine, "connect", _set_up)
    made.remove_session()
    made.engine.dispose()  # what is connected without it
    return made, True


def _check_ours(path: Path) -> None:
    """Raise if a file is some other program's database."""
    if path.is_file() and path.stat().st_size:
        with closing(sqlite3.connect(path)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if tables and "studies" not in tables:
            raise ValueError(f"it is a database, but no study of Optuna's; tables: {', '.join(sorted(tables)[:3])}")


def _set_up(connection: Any, _: Any) -> None:
    """With SQLite as it comes, each of a trial's some thirty writes waits for the disk."""
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):
        connection.execute(f"PRAGMA {pragma}")


def masked(text: str) -> str:
    """Without the password of a URL."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def beats(storage: BaseStorage) -> bool:
    """Whether it knows when each process was last heard of."""
    return isinstance(storage, RDBStorage) and storage.get_heartbeat_interval() is not None


def bury(study: optuna.Study, storage: BaseStorage) -> None:
    """Give up trials whose process is gone: at once on this machine, on others when they have been silent."""
    if beats(storage):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get("process", (None, 0))
        if host == socket.gethostname() and os.name == "posix" and not _is_alive(process):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
