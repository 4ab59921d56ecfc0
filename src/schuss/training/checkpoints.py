"""Checkpoints of a whole run: one file with all that it needs to go on as if it had never stopped.

A file is what `torch.save` writes, so that `torch.load` reads it, and an end of 56 bytes: the length of that, its
SHA-256 and a mark. A file without the right end is damaged. It gets its name when all of it is on the disk.
"""

import errno
import hashlib
import inspect
import operator
import os
import random
import re
import secrets
import struct
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from schuss import bounds

if sys.platform != "win32":
    import fcntl

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint"]

FORMAT = 1
_END = struct.Struct("<Q32s16s")
_MARK = b"schuss ckpt end\n"
_CHUNK = 1 << 20
_NAME = re.compile(r"step-(\d{8,})\.schuss")
_TEMPORARY = re.compile(r"\..+\.schuss\.[0-9a-f]{16}\.tmp")
_TAG = "schuss: "
"""Of the keys that stand for what `torch.load` refuses."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded, or not into these objects. Nothing has been changed."""


class _Damaged(CheckpointError):
    """A file that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` has loaded.

    Attributes:
        step, epoch, loss: as they were given to `save_checkpoint`, or None.
        extra: plain values as they were given; the states of objects that have not been loaded.
        path: the file.
    """

    step: int | None
    epoch: int | None
    loss: float | None
    extra: dict[str, Any]
    path: Path


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    schedule: Any = None,
    scaler: Any = None,
    data: Any = None,
    step: int | None = None,
    epoch: int | None = None,
    loss: float | torch.Tensor | None = None,
    extra: Mapping[str, Any] | None = None,
    keep_last: int | None = 3,
) -> Path:
    """Save all that a run needs to go on, in one file that is there whole or not at all.

    The random numbers of Python, NumPy, torch and its CUDA devices are saved too. Save between two steps; gradients
    are not in a checkpoint. Of several processes of `torch.distributed` the first one writes, and the others only
    return.

    Args:
        path: a folder, for a file step-00001234.schuss in it, or a file, whose name ends in .schuss.
        model, optimizer, schedule, scaler: objects with `state_dict` and `load_state_dict`, or dicts of them by name.
        data: the same, a loader with a position of its own for one. Of torch's DataLoader its generator, its sampler
            and its dataset are saved, as far as they have a state.
        step: steps taken, in [0, inf); it names the file in a folder.
        epoch: yours to count, in [0, inf).
        loss: any number.
        extra: by name: objects with `state_dict`; generators of torch, NumPy and Python; plain values: numbers,
            strings, bytes, tensors, arrays, and lists, tuples, dicts and sets of them.
        keep_last: how many checkpoints of a folder stay, in [1, inf): this one and those of the steps before it. None:
            all.

    Returns:
        The file.

    Raises:
        TypeError: something that no checkpoint holds; the message names it. Nothing has been written then.
        ValueError: an argument out of its bounds; a folder and no step.
        RuntimeError: inside `optimizer.averaged()`.
        OSError: the disk is full, say. Earlier checkpoints stay, and the file that was begun is removed.
    """
    owner = "save_checkpoint"
    step, epoch = _count(owner, "step", step), _count(owner, "epoch", epoch)
    if keep_last is not None and _count(owner, "keep_last", keep_last) == 0:
        raise ValueError(f"{owner}: keep_last must be None or in [1, inf), got 0")
    path = Path(path)
    into_folder = path.is_dir() or path.suffix != ".schuss"
    if into_folder and path.exists() and not path.is_dir():
        raise ValueError(f"{owner}: {path} is a file whose name does not end in .schuss; name a folder or such a file")
    if into_folder and step is None:
        raise ValueError(f"{owner}: step is needed to name a file in {path}; give it, or a file that ends in .schuss")
    target = path / f"step-{step:08d}.schuss" if into_folder else path
    given = _given(owner, model=model, optimizer=optimizer, schedule=schedule, scaler=scaler, data=data)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return target
    payload: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "epoch": epoch,
        "loss": None if loss is None else bounds.number(loss),
        "parts": {key: _saved(f"{owner}: {_label(*key)}", of) for key, of in given.items()},
        "extra": {
            _encode_key(name, f"{owner}: extra"): _saved(f"{owner}: {_label('extra', name)}", value)
            if _has_state(value)
            else {"value": _encode(value, f"{owner}: {_label('extra', name)}")}
            for name, value in (extra or {}).items()
        },
    }
    # Last: a loader may draw a seed when it is asked for its state.
    payload["rng"] = {name: _encode(_state(of), name) for name, of in _generators().items()}
    _make_folder(target.parent)
    _remove_leftovers(target.parent)
    try:
        with _replacing(target) as file:
            _write(payload, file)
    except OSError as error:
        error.add_note(f"while saving {target}; earlier checkpoints are as they were")
        raise
    if into_folder:
        assert step is not None
        _keep(path, step, keep_last)
    return target


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: Any = None,
    optimizer: Any = None,
    schedule: Any = None,
    scaler: Any = None,
    data: Any = None,
    extra: Mapping[str, Any] | None = None,
    map_location: Any = None,
    strict: bool = True,
    rng: bool = True,
) -> Checkpoint:
    """Load what `save_checkpoint` has saved, all of what is asked for or nothing.

    The whole file is checked before anything is changed, and no code in it is run. Make the objects first, as at the
    start of the run, a schedule after its optimizer.

    Args:
        path: a file, or a folder, for its newest file that is not damaged.
        model, optimizer, schedule, scaler, data: what to load into, as it was given to `save_checkpoint`. What is left
            out is not loaded.
        extra: by name, objects and generators to load into.
        map_location: as in `torch.load`: where the file's tensors are put before they are copied. None: where they
            were.
        strict: whether it is an error if something is asked for that is not in the file; if an optimizer or a schedule
            is of another class than it was; if an optimizer is loaded, but not all else that the file holds beside
            `extra`; and if a model or optimizer has other names. Else it is a warning, or as
            `load_state_dict(..., strict=False)` has it.
        rng: whether to restore the random numbers of Python, NumPy, torch and CUDA.

    Returns:
        Step, epoch, loss, extra values, and the file.

    Raises:
        FileNotFoundError: no such file, or no checkpoint in the folder.
        CheckpointError: a file that is damaged, that holds what only running code could load, or that does not fit.
            Nothing has been changed then.
        TypeError: something to load into that has no `load_state_dict`.
        RuntimeError: inside `optimizer.averaged()`.
    """
    owner = "load_checkpoint"
    given = _given(owner, model=model, optimizer=optimizer, schedule=schedule, scaler=scaler, data=data)
    for name, target in (extra or {}).items():
        if not _has_state(target):
            raise TypeError(
                f"{owner}: {_label('extra', name)} must have state_dict and load_state_dict, or be a generator, got "
                f"{type(target).__name__}; plain values are in what load_checkpoint returns"
            )
    file, payload = _find(Path(path), map_location)
    parts: Mapping[tuple[str, str], Any] = payload["parts"]
    saved = {**parts, **{("extra", name): kept for name, kept in payload["extra"].items()}}
    wanted = {**given, **{("extra", name): target for name, target in (extra or {}).items()}}
    _check_names(file, saved, wanted, strict=strict)
    plan = [
        _Part(_label(*key), wanted[key], saved[key]["state"], saved[key]["type"])
        for kind in ("optimizer", "schedule", "scaler", "model", "extra", "data")
        for key in wanted
        if key[0] == kind and "state" in saved.get(key, ())
    ]
    for part in plan:
        _check(file, part, strict=strict)
    generators = _restorable(file, payload["rng"]) if rng else []
    generators += [part for part in plan if isinstance(part.target, _RANDOM)]
    _apply(file, plan, generators, strict=strict)
    values = {
        name: kept["value" if "value" in kept else "state"]
        for name, kept in payload["extra"].items()
        if ("extra", name) not in wanted
    }
    return Checkpoint(payload["step"], payload["epoch"], payload["loss"], values, file)


# --- what is given ----------------------------------------------------------------------------------------------------


def _count(owner: str, name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be an integer, got {value!r} ({type(value).__name__})") from None
    bounds.check(owner, name, number, "[0, inf)")
    return number


def _given(owner: str, **kinds: Any) -> dict[tuple[str, str], Any]:
    """(kind, name) -> object; a lone one has the name ""."""
    found = {}
    for kind, value in kinds.items():
        if value is None:
            continue
        for name, item in ({"": value} if _has_state(value) or not isinstance(value, Mapping) else value).items():
            if kind == "data" and isinstance(item, DataLoader):
                item = _Loader(item)
            elif not _has_state(item):
                raise TypeError(
                    f"{owner}: {_label(kind, name)} must have state_dict and load_state_dict, or be a dict of what has "
                    f"them, got {type(item).__name__}"
                )
            if getattr(item, "_is_averaged", False):
                raise RuntimeError(f"{owner}: {_label(kind, name)} is inside averaged(); save and load outside of it")
            if isinstance(item, nn.Module):
                item = _unwrapped(item)
                if _is_sharded(item):
                    raise TypeError(
                        f"{owner}: {_label(kind, name)} is sharded over processes; use torch.distributed.checkpoint"
                    )
            found[kind, name] = item
    return found


def _label(kind: str, name: str) -> str:
    return f"{kind}[{name!r}]" if name else kind


def _unwrapped(module: nn.Module) -> nn.Module:
    """Without what torch.compile and data parallelism put round it, so that its names are the same with and without."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def _is_sharded(module: nn.Module) -> bool:
    """By name, since their modules need not have been imported."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in module.modules()) or any(
        type(p).__name__ == "DTensor" for p in module.parameters()
    )


_PROTOCOL = ("state_dict", "load_state_dict")
_RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _has_state(of: Any) -> bool:
    return isinstance(of, _RANDOM) or all(callable(getattr(of, name, None)) for name in _PROTOCOL)


def _state(of: Any) -> Any:
    if isinstance(of, torch.Generator):
        return of.get_state()
    if isinstance(of, np.random.Generator):
        return of.bit_generator.state
    if isinstance(of, np.random.RandomState):
        return of.get_state(legacy=False)
    if isinstance(of, random.Random):
        version, numbers, gauss = of.getstate()
        return {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss}
    return of.state_dict()


def _restore(of: Any, state: Any, *, strict: bool) -> None:
    if isinstance(of, torch.Generator):
        of.set_state(state.cpu())  # map_location may have moved it
    elif isinstance(of, np.random.Generator):
        of.bit_generator.state = state
    elif isinstance(of, np.random.RandomState):
        of.set_state(state)
    elif isinstance(of, random.Random):
        of.setstate((state["version"], tuple(state["numbers"].tolist()), state["gauss"]))
    elif "strict" in inspect.signature(of.load_state_dict).parameters:
        of.load_state_dict(state, strict=strict)
    else:
        of.load_state_dict(state)


def _generators() -> dict[str, Any]:
    """The generators that nobody has to name."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return {
        "python": _owner(random.getstate),
        "numpy": _owner(np.random.get_state),
        "torch": torch.default_generator,
        **{f"cuda:{i}": generator for i, generator in enumerate(cuda)},
    }


def _owner(method: Any) -> Any:
    return method.__self__


class _Loader:
    """A DataLoader: its own state if it has one, as torchdata's StatefulDataLoader has, else what in it has one."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader if _has_state(loader) else None
        self.pieces: dict[str, Any] = {}
        inside = {"sampler": loader.sampler, "batch_sampler": loader.batch_sampler, "dataset": loader.dataset}
        for name, owner in {"loader": loader, **({} if self._loader else inside)}.items():
            if owner is not loader and _has_state(owner):
                self.pieces[name] = owner
            elif isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                self.pieces[f"{name}.generator"] = generator

    def state_dict(self) -> dict[str, Any]:
        position = {} if self._loader is None else {"position": _state(self._loader)}
        return position | {name: _state(piece) for name, piece in self.pieces.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        if self._loader is not None and "position" in state_dict:
            _restore(self._loader, state_dict["position"], strict=strict)
            # It makes its iterator now and draws a seed, not in the run, after the generators are restored.
            self._loader.state_dict()  # type: ignore[attr-defined]
        here, there = {*self.pieces}, {*state_dict} - {"position"}
        if strict and here != there:
            saved, own = (", ".join(sorted(names)) or "nothing" for names in (there, here))
            raise ValueError(f"saved of the loader: {saved}; to load here: {own}")
        for name, piece in self.pieces.items():
            if name in state_dict:
                _restore(piece, state_dict[name], strict=strict)


# --- what torch.load takes, without running code ----------------------------------------------------------------------

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def _saved(where: str, of: Any) -> dict[str, Any]:
    return {"type": type(of).__name__, "state": _encode(_state(of), where)}


def _encode(value: Any, where: str) -> Any:
    """A value as a file holds it; NumPy's under a tag.

    Raises:
        TypeError: it has no place in a file; the message names `where`.
    """
    kind = type(value)
    if _is_refused(value):
        return {_TAG + kind.__name__: hex(value) if value else ""}
    if kind in _PLAIN:
        return value
    if kind in (torch.Tensor, nn.Parameter):
        if value.is_meta:
            raise TypeError(f"{where} is a tensor on the meta device, which has no elements to save")
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, np.ma.MaskedArray):
        try:
            tensor = torch.from_numpy(np.array(value))
        except (TypeError, ValueError):
            raise TypeError(f"{where} is of NumPy's dtype {value.dtype}, which torch does not have") from None
        return {_TAG + ("array" if isinstance(value, np.ndarray) else "number"): tensor}
    if kind is set:
        return {_encode_key(item, where) for item in value}
    if kind in (list, tuple):
        return kind(_encode(item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind in (dict, OrderedDict, Counter, defaultdict):
        new: Any = OrderedDict() if kind is OrderedDict else Counter() if kind is Counter else {}
        for key, item in value.items():
            new[_encode_key(key, where)] = _encode(item, f"{where}[{key!r}]")
        for name, item in getattr(value, "__dict__", {}).items():  # a module's versions
            setattr(new, name, _encode(item, f"{where}.{name}"))
        return new
    if isinstance(value, torch.Tensor):
        raise TypeError(
            f"{where} is a {kind.__name__}, which this file does not hold; sharded models belong to "
            "torch.distributed.checkpoint"
        )
    raise TypeError(
        f"{where} is of type {kind.__name__}, which cannot be loaded without running code; save tensors, numbers, "
        "strings, and lists, tuples, dicts and sets of them, or an object with state_dict and load_state_dict"
    )


def _encode_key(key: Any, where: str) -> Any:
    if type(key) is tuple:
        return tuple(_encode_key(item, where) for item in key)
    if type(key) not in _PLAIN or _is_refused(key) or (isinstance(key, str) and key.startswith(_TAG)):
        raise TypeError(f"{where} has {key!r} ({type(key).__name__}) for a key; use other strings and numbers")
    return key


def _is_refused(value: Any) -> bool:
    """Whether it is plain, and `torch.load` refuses it nevertheless."""
    return (type(value) is bytes and not value) or (type(value) is int and value.bit_length() > 2000)


def _decode(value: Any) -> Any:
    """What was encoded. Containers are new."""
    if isinstance(value, (list, tuple, set)) and type(value) is not torch.Size:
        return type(value)(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and isinstance(key := next(iter(value)), str) and key.startswith(_TAG):
        if key in (_TAG + "int", _TAG + "bytes"):
            return int(value[key], 16) if key == _TAG + "int" else b""
        array = value[key].cpu().numpy()
        return array if key == _TAG + "array" else array[()]
    new: Any = type(value)()
    for key, item in value.items():
        new[key] = _decode(item)
    if hasattr(value, "__dict__"):
        vars(new).update(_decode(vars(value)))
    return new


# --- files ------------------------------------------------------------------------------------------------------------


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


def _write(payload: Mapping[str, Any], file: BinaryIO) -> None:
    sink = _Sink(file)
    torch.save(payload, sink)  # type: ignore[arg-type]
    if sink.error is not None:
        raise sink.error
    file.write(sink.end())


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
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


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun to write; what a live one writes is locked."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError), path.open("rb") as file:
                if _lock(file):
                    path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
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


def _keep(folder: Path, step: int, keep_last: int | None) -> None:
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
    except (OSError, _Damaged):
        return False
    return True


def _read_end(file: BinaryIO, path: Path) -> tuple[int, bytes]:
    """Length and hash of what was saved, if the file is as long as it was."""
    advice = "load an earlier checkpoint, or its folder for the newest that is whole"
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise _Damaged(f"{path}: the file is empty; {advice}")
    file.seek(max(size - _END.size, 0))
    end = file.read(_END.size)
    if len(end) < _END.size or not end.endswith(_MARK):
        raise _Damaged(f"{path}: the end of a checkpoint is missing: it is cut short, damaged, or none; {advice}")
    length, digest, _ = _END.unpack(end)
    if length + _END.size != size:
        raise _Damaged(f"{path}: the file has {size:,} bytes, but {length + _END.size:,} were written; {advice}")
    return length, digest


def _find(path: Path, map_location: Any) -> tuple[Path, dict[str, Any]]:
    """The file that a path means, and what is in it."""
    if not path.is_dir():
        return path, _read(path, map_location)
    bad: dict[Path, str] = {}
    while candidates := [file for file in _files(path).values() if file not in bad]:
        try:
            payload = _read(candidates[0], map_location)
        except FileNotFoundError:  # another process keeps the last ones only
            continue
        except _Damaged as error:
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
            raise _Damaged(
                f"{path}: the checksum is not that of what was written: the file is damaged; load an earlier "
                "checkpoint, or its folder for the newest that is whole"
            )
        file.seek(0)
        try:
            payload: dict[str, Any] = _decode(torch.load(file, map_location=map_location, weights_only=True))
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


# --- loading ----------------------------------------------------------------------------------------------------------


_NOTHING = "Nothing has been changed"


@dataclass(frozen=True)
class _Part:
    """An object, and the state to load into it."""

    label: str
    target: Any
    state: Any
    saved_of: str = ""


def _check_names(
    file: Path, saved: Mapping[tuple[str, str], Any], wanted: Mapping[tuple[str, str], Any], *, strict: bool
) -> None:
    missing = [_label(*key) for key in wanted if "state" not in saved.get(key, ())]
    resumes = any(kind == "optimizer" for kind, _ in wanted)
    forgotten = [_label(*key) for key in saved if resumes and key not in wanted and key[0] != "extra"]
    there = ", ".join(_label(*key) for key in saved) or "nothing"
    problems = []
    if missing:
        problems.append(f"{', '.join(missing)} cannot be loaded, for the file holds {there}")
    if forgotten:
        problems.append(f"{', '.join(forgotten)} of the file has no object to load into; give it")
    if problems and strict:
        raise CheckpointError(f"{file}: {'; '.join(problems)}; strict=False leaves it out. {_NOTHING}")
    if problems:
        warnings.warn(f"load_checkpoint: {file.name}: {'; '.join(problems)}; left out", stacklevel=3)


def _check(file: Path, part: _Part, *, strict: bool) -> None:
    """Raise if a state does not fit an object, as far as one can tell without loading it."""
    try:
        problem = _problem(part.target, part.state, strict=strict)
    except Exception as error:
        problem = f"it is not such a state: {error!r}"
    is_named = part.label.startswith(("optimizer", "schedule"))
    if not problem and strict and is_named and part.saved_of != type(part.target).__name__:
        problem = f"it was saved of {part.saved_of}, this is {type(part.target).__name__}; strict=False loads it anyway"
    if problem:
        raise CheckpointError(f"{file}: {part.label} cannot be loaded: {problem}. {_NOTHING}")


def _problem(target: Any, state: Any, *, strict: bool) -> str:
    if isinstance(target, nn.Module) and not _loads_its_own_way(target):
        return _model_problem(target, state, strict=strict)
    if isinstance(target, Optimizer):
        return _optimizer_problem(target, state)
    here = getattr(target, "base_lrs", None)
    there = state.get("base_lrs") if isinstance(state, dict) else None
    if here is not None and there is not None and len(here) != len(there):
        return f"it was saved for {len(there)} parameter groups, and there are {len(here)}"
    return ""


def _loads_its_own_way(model: nn.Module) -> bool:
    return any(
        m._load_state_dict_pre_hooks or type(m)._load_from_state_dict is not nn.Module._load_from_state_dict
        for m in model.modules()
    )


def _model_problem(model: nn.Module, saved: Any, *, strict: bool) -> str:
    own = model.state_dict()
    shapes = [
        f"{name} has shape {tuple(saved[name].shape)} in the file, {tuple(own[name].shape)} here"
        for name in own
        if isinstance(own[name], torch.Tensor) and name in saved and saved[name].shape != own[name].shape
    ]
    names = [
        f"{what}: {', '.join(there)}"
        for what, there in (
            ("only in the file", [name for name in saved if name not in own]),
            ("not in the file", [name for name in own if name not in saved]),
        )
        if there and strict
    ]
    found = shapes + names
    return "; ".join(found[:10]) + "; ..." * (len(found) > 10)


def _optimizer_problem(optimizer: Optimizer, state: Any) -> str:
    groups, saved = optimizer.param_groups, state.get("param_groups", ())
    if len(groups) != len(saved):
        return f"it was saved with {len(saved)} parameter groups, and there are {len(groups)}"
    if all("param_names" in group for group in (*groups, *saved)):
        from schuss.optimizer import Optimizer as Ours

        different = [i for i in range(len(groups)) if groups[i]["param_names"] != saved[i]["param_names"]]
        if isinstance(optimizer, Ours) or not different:
            return ""  # matches by name, and says what does not
        return f"the parameters of group {different[0]} have other names, or another order"
    for i, (there, here) in enumerate(zip(saved, groups, strict=True)):
        if len(there["params"]) != len(here["params"]):
            return f"group {i} was saved with {len(there['params'])} parameters, and has {len(here['params'])}"
    return ""


def _restorable(file: Path, saved: Mapping[str, Any]) -> list[_Part]:
    """The generators of this process that have a state in the file."""
    if dist.is_available() and dist.is_initialized() and (rank := dist.get_rank()) != 0:
        warnings.warn(
            f"load_checkpoint: {file.name} has the random numbers of process 0, not of process {rank}, whose "
            "generators stay as they are; seed them, and give rng=False",
            stacklevel=3,
        )
        return []
    if any(name.startswith("cuda") for name in saved) and torch.cuda.is_available():
        torch.cuda.init()
    here = _generators()
    if lost := [name for name in saved if name not in here]:
        warnings.warn(
            f"load_checkpoint: {file.name} has random numbers of {', '.join(lost)}, which this machine lacks; with "
            "rng=False none are restored",
            stacklevel=3,
        )
    return [_Part(name, here[name], state) for name, state in saved.items() if name in here]


def _apply(file: Path, plan: list[_Part], generators: list[_Part], *, strict: bool) -> None:
    """Load all, or change nothing."""
    undo = [(part.label, _undo(part.target)) for part in (*plan, *generators)]
    part = None
    try:
        # Generators twice: first to see that they can be, last since what is loaded may draw numbers.
        for part in (*generators, *plan):
            _restore(part.target, part.state, strict=strict)
        for part in generators:
            _restore(part.target, part.state, strict=strict)
    except BaseException as error:
        stuck = []
        for label, restore in reversed(undo):
            try:
                restore()
            except Exception:
                stuck.append(label)
        if not isinstance(error, Exception) or part is None:
            raise
        rest = f"{', '.join(stuck)} cannot be put back either; all else is as it was" if stuck else _NOTHING
        raise CheckpointError(f"{file}: {part.label} cannot be loaded: {str(error).rstrip('.')}. {rest}") from error


def _undo(target: Any) -> Callable[[], None]:
    """What brings an object back to what it is now."""
    from schuss.optimizer import Optimizer as Ours

    if isinstance(target, Optimizer) and type(target).load_state_dict in (
        Optimizer.load_state_dict,
        Ours.load_state_dict,
    ):
        before = dict(vars(target))  # they make new state and new groups, and leave these as they are

        def put_back() -> None:
            vars(target).clear()
            vars(target).update(before)

        return put_back
    if isinstance(target, _Loader):  # not its position: asking would start workers
        before = {name: deepcopy(_state(piece)) for name, piece in target.pieces.items()}
        return lambda: target.load_state_dict(before)
    state = deepcopy(_state(target))
    return lambda: _restore(target, state, strict=True)
