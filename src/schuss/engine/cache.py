"""Generated code as files: written once, read by people, and used again by the next process.

A file is named by the digest of its text, so a changed formula is a new file and nothing is ever overwritten with
something else. Numba keeps its machine code beside it, keyed by the processor.
"""

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

_lock = threading.Lock()
_substitute: Path | None = None


def folder() -> Path:
    """The folder of generated code: `SCHUSS_CACHE_DIR`, or `schuss` in the user's cache folder."""
    if chosen := os.environ.get("SCHUSS_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "schuss"


def load(label: str, text: str) -> ModuleType:
    """The module made of `text`, from its file in the cache folder.

    Where the folder cannot be written, a folder of this process alone takes its place: the start is slower, since
    kernels are compiled anew, and nothing else changes.
    """
    name = f"{label}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    full_name = f"schuss.generated.{name}"
    with _lock:
        if full_name in sys.modules:
            return sys.modules[full_name]
        for place in (folder, _folder_of_this_process):
            try:
                path = _write(place() / f"{name}.py", text)
                _discard_damaged(path)
                return _import(full_name, path)
            except (OSError, RuntimeError) as error:  # RuntimeError: Numba found no place for its machine code
                failure = error
    raise RuntimeError(
        f"no folder for generated code can be written, not even a temporary one ({failure}); "
        "set SCHUSS_CACHE_DIR to a writable folder or choose backend='foreach'"
    )


def _write(path: Path, text: str) -> Path:
    """Write atomically, so that a process that starts at the same time sees a whole file or none."""
    try:
        if path.read_text(encoding="utf-8") == text:
            if not os.access(path.parent, os.W_OK):
                raise OSError(f"{path.parent} is read-only")
            return path
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _discard_damaged(path: Path) -> None:
    """Remove machine code of the file that was cut off, by a full disk say: Numba would not recover from it."""
    for file in (path.parent / "__pycache__").glob(f"{path.stem}*.nb[ic]"):
        if not file.read_bytes().endswith(b"."):  # the last byte of every pickle
            file.unlink(missing_ok=True)


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # while it runs, too: Numba caches functions of importable modules only
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _folder_of_this_process() -> Path:
    global _substitute
    if _substitute is None:
        _substitute = Path(tempfile.mkdtemp(prefix="schuss-"))
    return _substitute
