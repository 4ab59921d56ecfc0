"""The CPU back end: kernels and loops compiled by Numba, and how many threads share a launch."""

import threading
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from schuss.engine import cache as code_cache
from schuss.engine.numba_kernel import CHUNK, NUMBERS, native_digest
from schuss.engine.process import is_forked, uninterrupted


@cache
def driver() -> Any:
    """The compiled loops (`schuss.engine.driver`), loaded through the cache folder."""
    _choose_threading_layer()
    text = files("schuss.engine").joinpath("driver.py").read_text(encoding="utf-8")
    return code_cache.load("driver", f"{text}\n# with native {native_digest()}, chunks of {CHUNK}\n")


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
    return dtype in NUMBERS


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
    else:
        _in_parallel(loops.launch_parallel, count, *arguments)


def sweep(count: int, *arguments: Any) -> None:
    """Run a kernel that updates nothing, on `count` threads."""
    loops = driver()
    if count == 1 or is_forked():
        loops.walk(*arguments, 0, 1)
    else:
        _in_parallel(loops.sweep_parallel, count, *arguments)


def _in_parallel(loop: Any, count: int, *arguments: Any) -> None:
    import numba

    numba.set_num_threads(count)
    if _layer_is_safe():
        loop(count, *arguments)
    else:
        with _one_at_a_time:
            loop(count, *arguments)


@cache
def _layer_is_safe() -> bool:
    from numba.np.ufunc import parallel

    parallel._launch_threads()  # type: ignore[no-untyped-call]
    return bool(parallel.threading_layer() != "workqueue")  # type: ignore[no-untyped-call]
