"""Files of checkpoints: written whole or not at all, and read only if they are what was written.

A file is what `torch.save` writes, so that `torch.load` reads it, and an end of 56 bytes: the length of that, its
SHA-256 and a mark. A file without the right end is damaged. It gets its name when all of it is on the disk.
"""

import errno
import hashlib
import os
import re
import secrets
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from schuss.training.encoding import decode

if sys.platform != "win32":
    import fcntl

FORMAT = 1
_END = struct.Struct("<Q32s16s")
_MARK = b"schuss ckpt end\n"
_CHUNK = 1 << 20
_NAME = re.compile(r"step-(\d{8,})\.schuss")
_TEMPORARY = re.compile(r"\..+\.schuss\.[0-9a-f]{16}\.tmp")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded, or not into these objects. Nothing has been changed."""


class Damaged(CheckpointError):
    """A file that is not what was written."""


class _Sink:
    """The file that `torch.save` writes into: counts and hashes, and keeps the first error.

    After an error torch goes on to the end of its archive, and would hide the error behind one of its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.length = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            self._hash.update(data)
        size = memoryview(data).nbytes
        self.length += size
        return size

    def flush(self) -> None:
        pass

    def end(self) -> bytes:
        return _END.pack(self.length, self._hash.digest(), _MARK)


def write(payload: Mapping[str, Any], file: BinaryIO) -> None:
    """What is saved, and the end of a checkpoint."""
    sink = _Sink(file)
    torch.save(payload, sink)  # type: ignore[arg-type]
    if sink.error is not None:
        raise sink.error
    file.write(sink.end())


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of `target` after the block, when it is on the disk; or leaves no trace."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        file = temporary.open("xb")
        if _lock(file) is not False and temporary.exists():
            break
        file.close()  # somebody has taken it for a leftover, before it was locked
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":
            file.close()
        os.replace(temporary, target)  # still locked
        _sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):  # what is written is on the disk, or the error is known
            file.close()


def _lock(file: BinaryIO) -> bool | None:
    """Mark a file as being written, until it is closed or its process ends; None where files cannot be locked."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun to write; what a live one writes is locked."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError), path.open("rb") as file:
                if _lock(file):
                    path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, that survive a crash."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot
            raise
    finally:
        os.close(descriptor)


def _files(folder: Path) -> dict[int, Path]:
    """Step -> file, the newest first."""
    found = {int(match[1]): p for p in folder.iterdir() if (match := _NAME.fullmatch(p.name)) and p.is_file()}
    return dict(sorted(found.items(), reverse=True))


def keep(folder: Path, step: int, keep_last: int | None) -> None:
    """Remove whole files of steps before this one, but for the newest; what is damaged does not count, and stays."""
    files = _files(folder)
    if later := [p.name for s, p in files.items() if s > step]:
        warnings.warn(
            f"save_checkpoint: {folder} has checkpoints of later steps than {step}, {later[0]} the last; "
            "load_checkpoint takes that one. Remove them, or save this run elsewhere",
            stacklevel=3,
        )
    if keep_last is not None:
        whole = [path for s, path in files.items() if s <= step and _has_end(path)]
        for path in whole[keep_last:]:
            path.unlink(missing_ok=True)


def _has_end(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            _read_end(file, path)
    except (OSError, Damaged):
        return False
    return True


def _read_end(file: BinaryIO, path: Path) -> tuple[int, bytes]:
    """Length and hash of what was saved, if the file is as long as it was."""
    advice = "load an earlier checkpoint, or its folder for the newest that is whole"
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise Damaged(f"{path}: the file is empty; {advice}")
    file.seek(max(size - _END.size, 0))
    end = file.read(_END.size)
    if len(end) < _END.size or not end.endswith(_MARK):
        raise Damaged(f"{path}: the end of a checkpoint is missing: it is cut short, damaged, or none; {advice}")
    length, digest, _ = _END.unpack(end)
    if length + _END.size != size:
        raise Damaged(f"{path}: the file has {size:,} bytes, but {length + _END.size:,} were written; {advice}")
    return length, digest


def find(path: Path, map_location: Any) -> tuple[Path, dict[str, Any]]:
    """The file that a path means, and what is in it."""
    if not path.is_dir():
        return path, _read(path, map_location)
    bad: dict[Path, str] = {}
    while candidates := [file for file in _files(path).values() if file not in bad]:
        try:
            payload = _read(candidates[0], map_location)
        except FileNotFoundError:  # another process keeps the last ones only
            continue
        except Damaged as error:
            bad[candidates[0]] = str(error).split(";")[0]
        else:
            if bad:
                warnings.warn(f"load_checkpoint: {'; '.join(bad.values())}. Loads {candidates[0].name}", stacklevel=3)
            return candidates[0], payload
    if bad:
        raise CheckpointError(f"{path}: all checkpoints are damaged. {'; '.join(bad.values())}")
    raise FileNotFoundError(errno.ENOENT, "there is no checkpoint (step-*.schuss) in the folder", str(path))


def _read(path: Path, map_location: Any) -> dict[str, Any]:
    """What is in a file, after all of it has been checked."""
    with path.open("rb") as file:
        left, digest = _read_end(file, path)
        file.seek(0)
        found = hashlib.sha256()
        while left and (chunk := file.read(min(left, _CHUNK))):
            found.update(chunk)
            left -= len(chunk)
        if found.digest() != digest:
            raise Damaged(
                f"{path}: the checksum is not that of what was written: the file is damaged; load an earlier "
                "checkpoint, or its folder for the newest that is whole"
            )
        file.seek(0)
        try:
            payload: dict[str, Any] = decode(torch.load(file, map_location=map_location, weights_only=True))
        except (MemoryError, torch.OutOfMemoryError, OSError):
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0]
            if "Weights only load failed" in reason:
                reason = "it holds more than data, which is code to run, or was written by other means"
            raise CheckpointError(
                f"{path}: torch.load(weights_only=True) refuses it: {reason}; nothing has been run or changed. "
                "If a device is missing here, give map_location; else do not load it in other ways, unless you trust "
                "its source"
            ) from error
    form = payload.get("format") if isinstance(payload, dict) else None
    if isinstance(form, int) and form > FORMAT:
        raise CheckpointError(f"{path}: the file has format {form}, of a newer schuss than this; update schuss")
    if form != FORMAT or not _is_complete(payload):
        raise CheckpointError(f"{path}: the file holds data, but not as save_checkpoint writes it; use torch.load")
    return payload


def _is_complete(payload: Mapping[str, Any]) -> bool:
    if not all(isinstance(payload.get(name), dict) for name in ("parts", "extra", "rng")):
        return False
    kept = [*payload["parts"].values(), *payload["extra"].values()]
    return all(name in payload for name in ("step", "epoch", "loss")) and all(
        isinstance(k, dict) and ({"type", "state"} <= k.keys() or "value" in k) for k in kept
    )
