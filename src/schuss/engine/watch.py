"""Noticing cheaply that nothing has changed.

A kernel works on addresses, so before each launch everything they rest on is compared with what is there: the
gradients' presence and layout, that `optimizer.state` still holds the same tensors, that each tensor still has its
memory. Asked through Python that is five questions a tensor of 50 ns each, which is all the time that a step of many
small tensors has. So a compiled loop asks: Python's objects through its stable C API, and tensors through the stable C
interface that torch has for ahead-of-time compiled models. Where that interface is not found, `Portable` asks the
same questions in Python.
"""

import ctypes
import operator
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHANGED, OTHERS, INSIDE = -1, 1, 2
"""The plan must be made anew; other tensors have gradients; a gradient lies inside a larger storage."""


@dataclass
class Watched:
    """What a table of addresses rests on. Arrays are as `driver.unchanged` describes them."""

    params: list[torch.Tensor]
    states: list[dict[str, Any]]
    keys: tuple[str, ...]
    tensors: list[list[torch.Tensor]]
    """[tensor][key]: the tensors that the states held under the keys."""
    address: np.ndarray[Any, Any]
    scalar_address: np.ndarray[Any, Any]
    active: np.ndarray[Any, Any]
    grad_dtype: torch.dtype


class Portable:
    """The comparison through torch's Python interface."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._layouts = [(p.shape, significant_strides(p)) for p in watched.params]

    def __call__(self, grads: Sequence[torch.Tensor | None]) -> int:
        """As `driver.unchanged`: -1 if the plan must be made anew, else flags."""
        w = self._watched
        roles = w.address.shape[1]
        pattern = 0
        for t, p in enumerate(w.params):
            shape, strides = self._layouts[t]
            if p.data_ptr() != w.address[t, 0] or p.shape != shape or significant_strides(p) != strides:
                return CHANGED
            for k, key in enumerate(w.keys):
                if w.states[t].get(key) is not (tensor := w.tensors[t][k]):
                    return CHANGED
                if tensor.data_ptr() != (w.address[t, 2 + k] if 2 + k < roles else w.scalar_address[t, 2 + k - roles]):
                    return CHANGED
            grad = grads[t]
            if (grad is not None) != w.active[t]:
                w.active[t] = grad is not None
                pattern |= OTHERS
            if grad is not None:
                if (
                    type(grad) is not torch.Tensor
                    or grad.layout != torch.strided
                    or grad.dtype != w.grad_dtype
                    or grad.device.type != "cpu"
                    or grad.shape != shape
                    or significant_strides(grad) != strides
                ):
                    return CHANGED
                if grad.storage_offset():
                    pattern |= INSIDE
                w.address[t, 1] = grad.data_ptr()
        return pattern


class Native:
    """The comparison as one compiled loop."""

    def __init__(self, watched: Watched, interface: "Interface", loop: Any) -> None:
        w = self._watched = watched
        self._interface, self._loop = interface, loop
        self._scratch = np.zeros(1, np.int64)
        count = len(w.params)
        self._params = identities(w.params)
        self._objects = np.zeros((count, len(w.keys)), np.int64)
        for t, tensors in enumerate(w.tensors):
            self._objects[t] = identities(tensors)
        self._dicts, self._keys = identities(w.states), identities(w.keys)
        self._numel = np.array([p.numel() if p.is_contiguous() else -1 for p in w.params], np.int64)
        self._begin = np.zeros(count + 1, np.int64)
        np.cumsum([2 * p.dim() for p in w.params], out=self._begin[1:])
        self._layout = np.array([n for p in w.params for n in (*p.shape, *p.stride())] or [0], np.int64)
        self._traits = interface.traits(w.grad_dtype)

    def __call__(self, grads: Sequence[torch.Tensor | None]) -> int:
        """As `driver.unchanged`: -1 if the plan must be made anew, else flags."""
        w, interface = self._watched, self._interface
        return int(
            self._loop(
                interface.functions,
                self._scratch,
                self._scratch.ctypes.data,
                id(None),
                id(torch.Tensor),
                interface.handle_offset,
                id(grads),
                self._params,
                self._objects,
                self._dicts,
                self._keys,
                w.address,
                w.scalar_address,
                self._numel,
                self._layout,
                self._begin,
                self._traits,
                w.active,
            )
        )


def watch(watched: Watched) -> Portable | Native:
    """The fastest comparison that this torch allows."""
    if (interface := find_interface()) is None:
        return Portable(watched)
    from schuss.engine.numba import driver

    return Native(watched, interface, driver().unchanged)


def significant_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that say where elements lie: those of dimensions of more than one element."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


class Same:
    """Whether a list still holds the objects that a sequence holds, by identity."""

    def __init__(self, expected: Iterable[Any]) -> None:
        self._expected = list(expected)
        self._identities = identities(self._expected)
        self._interface = find_interface()

    def __call__(self, present: list[Any]) -> bool:
        """Compare a list with the objects."""
        if len(present) != len(self._expected):
            return False
        if self._interface is None or len(present) < 16:
            return all(map(operator.is_, present, self._expected))
        from schuss.engine.numba import driver

        return bool(driver().same_objects(self._interface.functions[0], id(present), self._identities))


def identities(objects: Collection[Any]) -> np.ndarray[Any, Any]:
    """The addresses of Python objects."""
    return np.fromiter(map(id, objects), np.int64, len(objects))


@dataclass(frozen=True)
class Interface:
    """Addresses of the C functions that `driver.unchanged` calls."""

    functions: np.ndarray[Any, Any]
    handle_offset: int
    """Where a Python tensor keeps the C++ tensor that torch's C interface takes the address of."""

    def traits(self, dtype: torch.dtype) -> np.ndarray[Any, Any]:
        """What the interface says of the layout, dtype and device of a dense CPU tensor of this dtype."""
        example = torch.empty(1, dtype=dtype)
        return np.array([_ask(self.functions[i], id(example) + self.handle_offset, ctypes.c_int32) for i in (3, 7, 8)])


_QUESTIONS = tuple(
    f"aoti_torch_{question}"
    for question in (
        "get_data_ptr", "get_layout", "get_dim", "get_sizes", "get_strides", "get_dtype", "get_device_type",
        "get_numel", "is_contiguous", "get_storage_offset",
    )
)  # fmt: skip


@cache
def find_interface() -> Interface | None:
    """The C functions, if this torch has them and they answer rightly; else None."""
    library = Path(torch.__file__).parent / "lib"
    names = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}
    try:
        torch_cpu = ctypes.CDLL(str(library / names.get(sys.platform, "libtorch_cpu.so")))
        functions = [ctypes.pythonapi.PyList_GetItem, ctypes.pythonapi.PyDict_GetItem]
        functions += [getattr(torch_cpu, question) for question in _QUESTIONS]
    except (OSError, AttributeError):
        return None
    addresses = np.array([ctypes.cast(f, ctypes.c_void_p).value for f in functions], np.int64)
    examples = [torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(3, 2).t())]
    offsets = {_find_handle(example) for example in examples}
    if len(offsets) != 1 or (offset := offsets.pop()) is None:
        return None
    if not hasattr(sys, "getrefcount") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None  # borrowed references are only safe under the global lock
    for example in examples:
        if _ask(addresses[2], id(example) + offset, ctypes.c_int64) != example.data_ptr():
            return None
    return Interface(addresses, offset)


def _find_handle(tensor: torch.Tensor) -> int | None:
    """The offset in a Python tensor's memory of the pointer to its C++ tensor, which torch tells as `_cdata`."""
    size = type(tensor).__basicsize__
    words = (ctypes.c_uint64 * (size // 8)).from_address(id(tensor))
    found = [8 * i for i, word in enumerate(words) if i >= 2 and word == tensor._cdata]
    return found[0] if len(found) == 1 else None


def _ask(function: int, handle: int, kind: type[Any]) -> int:
    answer = kind()
    status = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(int(function))(
        handle, ctypes.addressof(answer)
    )
    return int(answer.value) if status == 0 else -1
