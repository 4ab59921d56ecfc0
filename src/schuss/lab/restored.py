"""A block after which everything that a training changes is what it was before, bit for bit."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from schuss.engine.process import uninterrupted
from schuss.optimizer import Optimizer as Ours
from schuss.training.stateful import RANDOM, Loader, generators_here, has_state, restore, state_of

__all__ = ["restored"]

OWNERS = (nn.Module, Optimizer, LRScheduler)
"""The objects whose attributes are restored; of others only that they are where they were."""


@contextmanager
def restored(*things: Any, data: Any = None) -> Iterator[None]:
    """A block after which things are what they were, also if it raises or is interrupted.

    Objects stay the same objects, and tensors keep their memory: what changed in them is undone in place. Gradients
    are taken away for the block and put back after it. The random numbers of Python, NumPy, torch and CUDA go on as if
    the block had not been.

    Args:
        things: modules, optimizers, schedulers; with the tensors, arrays, generators, dicts, lists and sets in them.
        data: what gives batches: the position of one with `state_dict`, the generators and the workers of a DataLoader.
    """
    before = Snapshot([*things, *generators_here().values()], data)
    try:
        before.begin()
        yield
    finally:
        with uninterrupted():
            before.restore()


class Snapshot:
    """What things, and all that can be reached from them, are at this moment.

    Args:
        things: where to begin.
        data: see `restored`.
    """

    def __init__(self, things: Iterable[Any], data: Any) -> None:
        self._seen: dict[int, Any] = {}  # and kept alive, so that no other object gets the same id
        self._undo = ExitStack()  # the last first, and all of them even if one raises
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._loader: DataLoader[Any] | None = data if isinstance(data, DataLoader) else None
        self._workers = None if self._loader is None else self._loader._iterator
        waiting = list(things)
        while waiting:
            thing = waiting.pop()
            if id(thing) not in self._seen:
                self._seen[id(thing)] = thing
                waiting += self._keep(thing)
        # Restored before the generators, since a loader may draw a seed when it is given its position.
        if self._loader is not None:
            held = Loader(self._loader)
            self._undo.callback(held.load_state_dict, deepcopy(held.state_dict()))
        elif has_state(data):
            self._undo.callback(restore, data, deepcopy(state_of(data)), strict=True)

    def begin(self) -> None:
        """Take away what the block would write into, or use up."""
        for tensor, _ in self._gradients:
            tensor.grad = None
        if self._loader is not None:
            self._loader._iterator = None  # persistent workers, whose random numbers would go on

    def restore(self) -> None:
        """Go back to that moment."""
        self._undo.close()
        for tensor, gradient in self._gradients:
            tensor.grad = gradient
        if self._loader is not None:
            self._loader._iterator = self._workers

    def _keep(self, thing: Any) -> Iterable[Any]:
        """Note how to restore a thing; what is in it."""
        if isinstance(thing, OWNERS):
            if isinstance(thing, Ours):  # its plan would keep state alive that is gone
                self._undo.callback(setattr, thing, "_plan", None)
            return (vars(thing),)
        if isinstance(thing, MethodType):  # a hook of a schedule that counts by itself, say
            return (thing.__self__,)
        if isinstance(thing, tuple):
            return thing
        if isinstance(thing, (dict, list, set, deque)):
            old = dict(thing) if isinstance(thing, dict) else list(thing)
            self._undo.callback(_refill, thing, old)
            return list(old.values()) if isinstance(old, dict) else old
        if isinstance(thing, Tensor):
            self._keep_tensor(thing)
        elif isinstance(thing, np.ndarray) and thing.flags.writeable:
            self._undo.callback(np.copyto, thing, thing.copy())
        elif isinstance(thing, RANDOM):
            self._undo.callback(restore, thing, state_of(thing), strict=True)
        return ()

    def _keep_tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor):
            raise ValueError("a lazy module has no weights yet; call the model on a batch first")
        if tensor.is_leaf and tensor.requires_grad:
            self._gradients.append((tensor, tensor.grad))
        if tensor.is_leaf:
            self._undo.callback(tensor.requires_grad_, tensor.requires_grad)
        place = tensor.detach()
        if not tensor.is_inference() and not _repeats(place):  # nobody writes into those
            value = place.clone(memory_format=torch.preserve_format)
            self._undo.callback(_put_back, tensor, place, value)


@torch.no_grad()
def _put_back(tensor: Tensor, place: Tensor, value: Tensor) -> None:
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
        moved = tensor.data_ptr() != place.data_ptr() or tensor.shape != place.shape or tensor.dtype != place.dtype
        if moved:  # somebody has assigned its `data`
            tensor.data = place
    place.copy_(value)


def _repeats(tensor: Tensor) -> bool:
    """Whether several elements are one place in memory."""
    strided = tensor.layout == torch.strided
    return strided and any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _refill(container: Any, old: Any) -> None:
    """Put back what was in a dict, list, set or deque, in its order; one that has not changed is not touched."""
    now = _places(dict(container) if isinstance(old, dict) else list(container))
    if now != _places(old):
        container.clear()
        container.update(old) if isinstance(container, (dict, set)) else container.extend(old)


def _places(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return [(id(key), id(value)) for key, value in content.items()]
    return [id(value) for value in content]
