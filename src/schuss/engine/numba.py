"""The CPU back end: a formula becomes the text of a Numba kernel that updates a chunk of one tensor in one pass."""

import builtins
import hashlib
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from schuss.engine import cache as code_cache
from schuss.engine.process import is_forked, uninterrupted
from schuss.engine.trace import Formula, to_source


@dataclass(frozen=True)
class Storage:
    """How a dtype lies in memory and how a kernel loads and stores it. `{}` stands for the value."""

    array: str
    itemsize: int
    load: str = "{}"
    store: str = "{}"


STORAGE = {
    torch.float32: Storage("float32", 4),
    torch.float64: Storage("float64", 8),
    torch.bfloat16: Storage("uint16", 2, "widen_bfloat16({})", "narrow_bfloat16({})"),
    torch.float16: Storage("uint16", 2, "widen_float16({})", "narrow_float16({})"),
}


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real view of a complex tensor; any other dtype unchanged."""
    return dtype.to_real() if dtype.is_complex else dtype


def compute_dtype(dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    """What a kernel computes in: float64 if anything it reads is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def kernel_source(title: str, formula: Formula, scalars: tuple[str, ...], dtypes: Mapping[str, torch.dtype]) -> str:
    """The text of the kernel of a formula.

    Args:
        title: what the kernel is, for its reader.
        formula: the traced rule with its pieces.
        scalars: names of the scalars, in the order of a row of the table.
        dtypes: the dtype of each input of the formula.
    """
    value = str(compute_dtype(tuple(dtypes.values()))).removeprefix("torch.")
    roles = list(formula.inputs)
    names = _safe_names([*roles, *scalars])

    def constant(number: float) -> str:
        return f"{value}({number!r})" if math.isfinite(number) else f"{value}(float('{number}'))"

    def word(name: str, args: list[str]) -> str:
        return f"{name}({', '.join(args)})"

    lines, new = to_source(formula, word, constant, names)
    loads, stores, arrays = [], [], []
    for role, letter in enumerate(roles):
        name, storage = names[letter], STORAGE[dtypes[letter]]
        arrays.append(f"{name}_ = carray(pointer(at[{role}] + start * {storage.itemsize}, {storage.array}), (count,))")
        loaded = storage.load.format(f"{name}_[i]")
        converts = value == "float64" and storage.array != value
        loads.append(f"{name} = {value}({loaded})" if converts else f"{name} = {loaded}")
        if letter in new and new[letter] != name:
            result = f"float32({new[letter]})" if converts else new[letter]
            stores.append(f"{name}_[i] = {storage.store.format(result)}")
    width = {"float32": 4, "float64": 8}[value]
    table = ", ".join(f"{name}: {str(dtypes[name]).removeprefix('torch.')}" for name in roles)

    def block(statements: list[str], indent: int) -> str:
        return "".join(f"{' ' * indent}{s}\n" for s in statements)

    return (
        f'"""{title}\n\n'
        f"One pass over {table}; computed in {value}.\n"
        f"context: addresses of the table of data pointers [tensor, {len(roles)}], of each tensor's row, and of the\n"
        f'rows of scalars ({", ".join(scalars)}).\n"""\n\n'
        f"import numpy as np\n"
        f"from numba import carray, cfunc, float32, float64, int32, int64, uint16, void\n\n"
        f"from schuss.engine.native import *  # digest {_native_digest()}\n\n\n"
        '@cfunc(void(int64, int64, int64, int64), cache=True, error_model="numpy")\n'
        "def kernel(context, tensor, start, count):\n"
        "    tables = carray(pointer(context, int64), (3,))\n"
        f"    at = carray(pointer(tables[0] + tensor * {8 * len(roles)}, int64), ({len(roles)},))\n"
        "    row = int64(carray(pointer(tables[1] + tensor * 4, int32), (1,))[0])\n"
        f"    scalar = carray(pointer(tables[2] + row * {width * len(scalars)}, {value}), ({len(scalars)},))\n"
        + block([f"{names[name]} = scalar[{i}]" for i, name in enumerate(scalars)], 4)
        + block(arrays, 4)
        + "    for i in range(count):\n"
        + block(loads, 8)
        + block(lines, 8)
        + block(stores, 8)
    )


_TEMPLATE_NAMES = {"kernel", "context", "tensor", "start", "count", "tables", "at", "row", "scalar", "i"}


def _safe_names(names: list[str]) -> dict[str, str]:
    """What the letters and scalars of a rule are called in a kernel: themselves, unless the kernel has the name."""
    from schuss.engine import native

    taken = _TEMPLATE_NAMES | set(dir(native)) | set(dir(builtins)) | {"cfunc", "carray", "void", "int32", "int64"}
    taken |= {"np", "float32", "float64", "uint16"}
    safe: dict[str, str] = {}
    for name in names:
        new = name
        while new in taken or new in safe.values() or re.fullmatch(r"t\d+|.*_|.*_new", new):
            new = f"v_{new}_0"
        safe[name] = new
    return safe


@cache
def _native_digest() -> str:
    text = files("schuss.engine").joinpath("native.py").read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def driver() -> Any:
    """The compiled loops (`schuss.engine.driver`), loaded through the cache folder."""
    _choose_threading_layer()
    text = files("schuss.engine").joinpath("driver.py").read_text(encoding="utf-8")
    return code_cache.load("driver", f"{text}\n# with native {_native_digest()}\n")


@cache
def prepare() -> None:
    """Load Numba and a first compiled function, which takes it half a second: not in the first step of a training."""
    with uninterrupted():
        driver().read(np.zeros((0, 1), np.int64), np.zeros(1, np.bool_), np.zeros((0, 1)))


@cache
def kernel_address(label: str, source: str) -> int:
    """The address of the compiled kernel of this text."""
    return int(code_cache.load(label, source).kernel.address)


@cache
def supports(dtype: torch.dtype) -> bool:
    """Whether kernels can load and store `dtype` on this machine."""
    if dtype == torch.float16:
        from schuss.engine.native import has_float16

        return has_float16()
    return dtype in STORAGE


def _choose_threading_layer() -> None:
    """Prefer OpenMP, unless the user has chosen: it may be entered from several threads at once, as torch's own loops.

    Numba's last resort, "workqueue", may not; `threads` then lets one launch in at a time.
    """
    from numba import config

    if config.THREADING_LAYER == "default":  # type: ignore[attr-defined]
        config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]


_one_at_a_time = threading.Lock()


def parts(elements: int) -> int:
    """How many threads share a launch: torch's number, fewer where there is little to do."""
    return max(1, min(torch.get_num_threads(), _most_threads(), elements // 32768))


@cache
def _most_threads() -> int:
    from numba import config

    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def launch(count: int, *arguments: Any) -> None:
    """Run a prepared launch on `count` threads.

    On one in a forked process: OpenMP cannot be used in the child of a process that has used it. The bits are the same.
    """
    loops = driver()
    if count == 1 or is_forked():
        loops.launch_serial(*arguments)
        return
    import numba

    numba.set_num_threads(count)
    if _layer_is_safe():
        loops.launch_parallel(count, *arguments)
    else:
        with _one_at_a_time:
            loops.launch_parallel(count, *arguments)


@cache
def _layer_is_safe() -> bool:
    from numba.np.ufunc import parallel

    parallel._launch_threads()  # type: ignore[no-untyped-call]
    return bool(parallel.threading_layer() != "workqueue")  # type: ignore[no-untyped-call]
