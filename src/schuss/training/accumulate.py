"""Gradient accumulation: micro-batches whose gradients add up to that of the large batch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from schuss import bounds

__all__ = ["Window", "Windows", "accumulate"]

Batch = TypeVar("Batch")
_Size = Callable[[Batch], float | Tensor]


def accumulate(
    loader: Iterable[Batch],
    steps: int,
    *,
    size: _Size[Batch] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    model: nn.Module | None = None,
) -> "Windows[Batch]":
    """Windows of `steps` micro-batches, each of which gives the gradient of one large batch.

        for window in accumulate(loader, steps=4):
            optimizer.zero_grad()
            for x, y in window:
                window.backward(loss_fn(model(x), y))
            optimizer.step()
            scheduler.step()

    The loss of micro-batch i of n_i examples is weighted with n_i / N, where N is the sum of the sizes that are really
    in the window: the last window, which may be shorter, counts fully. To know N before the first `backward`, a window
    takes its micro-batches from the loader at once, and lets go of each as it is used.

    With `model`, the gradients of distributed processes are exchanged once per window, and where they are averaged,
    N is averaged too (one small exchange and one wait per window), so that processes may have unequal windows: the
    gradient is that of all examples of all of them.

    Args:
        loader: gives micro-batches; gone through once for every loop over the result.
        steps: micro-batches per window, in [1, inf).
        size: what the mean of the loss divides by, of a micro-batch: examples, or tokens that are not masked, or the
            sum of class weights; in (0, inf). By default the length of the first tensor found in the batch. A size
            that is a tensor is read at once, which waits for its device.
        reduction: whether the loss is the "mean" over its micro-batch, or a "sum", whose micro-batches may have
            size 0.
        model: the model as it is called, to hold back the exchange of gradients (`no_sync` of DistributedDataParallel
            and FSDP, `set_requires_gradient_sync` of `fully_shard`) for all but the last micro-batch of a window. A
            module that has neither is taken for one that exchanges none.

    Returns:
        An iterable of windows, once more for each epoch. Its length, where the loader has one, is the number of
        optimizer steps of an epoch.

    Raises:
        TypeError: `steps` is no integer; a batch without a tensor and no `size`; a loss that is no tensor.
        ValueError: `steps` or a size out of its bounds; a loader that gives nothing; a loss that is no scalar.
        RuntimeError: `backward` not called exactly once for each micro-batch.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"accumulate: steps must be an integer in [1, inf), got {steps!r}")
    bounds.check("accumulate", "steps", steps, "[1, inf)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"accumulate: reduction must be 'mean' or 'sum', got {reduction!r}")
    return Windows(loader, steps, size or first_length, reduction, model)


class Windows(Generic[Batch]):
    """What `accumulate` returns; see there."""

    def __init__(
        self, loader: Iterable[Batch], steps: int, size: _Size[Batch], reduction: str, model: nn.Module | None
    ) -> None:
        self._loader, self._steps, self._size, self._reduction, self._model = loader, steps, size, reduction, model

    def __len__(self) -> int:
        """Windows per epoch: the number of micro-batches over `steps`, rounded up."""
        if not isinstance(self._loader, Sized):
            raise TypeError(f"accumulate: a {type(self._loader).__name__} has no length, so its windows have none")
        return -(-len(self._loader) // self._steps)

    def __iter__(self) -> "Iterator[Window[Batch]]":
        batches, first = iter(self._loader), True
        while taken := deque(islice(batches, self._steps)):
            first = False
            window = Window(taken, self._sizes(taken), self._reduction, self._model)
            yield window
            window._check_finished()
        if first:
            raise ValueError("accumulate: the loader gave no batch; a generator does so after its first epoch")

    def _sizes(self, batches: "deque[Batch]") -> list[float]:
        allowed, sizes = "(0, inf)" if self._reduction == "mean" else "[0, inf)", []
        for i, batch in enumerate(batches, start=1):
            size = self._size(batch)
            if type(size) is not int or size <= 0:  # an int above 0, as it mostly is, needs no check
                bounds.check("accumulate", f"size of micro-batch {i} of {len(batches)}", size, allowed)
            sizes.append(bounds.number(size))
        if not sum(sizes) > 0:
            bounds.check("accumulate", "size of the window", sum(sizes), "(0, inf)")
        return sizes


class Window(Generic[Batch]):
    """The micro-batches between two steps of the optimizer. Loop over it once, and call `backward` once for each.

    Attributes:
        size: N, the sum of the sizes of its micro-batches; those of this process.
    """

    def __init__(
        self, batches: "deque[Batch]", sizes: Sequence[float], reduction: str, model: nn.Module | None
    ) -> None:
        self._batches, self._model = batches, model
        self._parts = sizes if reduction == "mean" else [1.0] * len(sizes)
        self.size = sum(sizes)
        self._divisor = _mean_over_processes(self.size, model)
        self._current: int | None = None
        self._used = 0
        self._begun = self._abandoned = False
        self._loss: Tensor | None = None

    def __len__(self) -> int:
        """The number of micro-batches: `steps`, or fewer in the last window."""
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        if self._begun:
            raise RuntimeError("accumulate: a window lets go of its micro-batches; loop over it once")
        self._begun = True
        for i in range(len(self)):
            # The forward pass of DistributedDataParallel reads the switch too, so it covers the body of the loop.
            with nullcontext() if i + 1 == len(self) else _no_sync(self._model):
                self._current = i
                yield self._batches.popleft()
                if self._abandoned:
                    break
                if self._used == i:
                    raise RuntimeError(f"accumulate: backward was not called for {self._name(i)}")
        self._current = None

    @property
    def weight(self) -> float:
        """What the loss of the current micro-batch is multiplied with: n_i / N, or 1 / N for losses that are sums."""
        return self._parts[self._position()] / self._divisor

    def weighted(self, loss: Tensor) -> Tensor:
        """The loss times `weight`, for those who call `backward` themselves: `scaler.scale(window.weighted(loss))`.

        Args:
            loss: a scalar: the loss of the current micro-batch.
        """
        i = self._position()
        if self._used > i:
            raise RuntimeError(f"accumulate: backward was called twice for {self._name(i)}; add the losses up first")
        if not isinstance(loss, Tensor):
            raise TypeError(f"accumulate: the loss must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"accumulate: the loss must be a scalar, got shape {tuple(loss.shape)}")
        self._used += 1
        weight = self.weight
        scaled = loss if weight == 1 else loss * weight
        if self._divisor == self.size and loss.dtype == torch.float32 and not loss.dim():
            value = scaled.detach()
        else:
            value = loss.detach().reshape(())
            value = value.to(torch.promote_types(value.dtype, torch.float32)) * (self._parts[i] / self.size)
        self._loss = value if self._loss is None else self._loss + value
        return scaled

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the current micro-batch, with its weight in the window.

        Args:
            loss: a scalar: the loss of the current micro-batch.
        """
        self.weighted(loss).backward()

    def abandon(self) -> None:
        """Leave out the rest of the window, whose gradients are worth nothing then: `zero_grad`, and no step."""
        self._abandoned = True
        self._batches.clear()

    @property
    def loss(self) -> Tensor:
        """The loss of the whole window, a 0-d tensor without history, in float32 or wider; of this process.

        Nothing waits for the device until its value is read, with `float(window.loss)` say.
        """
        if self._loss is None or self._used < len(self):
            raise RuntimeError(f"accumulate: the loss of a window is known after {len(self)} calls of backward")
        return self._loss

    def _position(self) -> int:
        if self._current is None:
            raise RuntimeError("accumulate: call backward inside the loop over the window")
        return self._current

    def _name(self, i: int) -> str:
        return f"micro-batch {i + 1} of {len(self)}"

    def _check_finished(self) -> None:
        if not self._abandoned and self._used < len(self):
            raise RuntimeError(
                f"accumulate: {self._used} of the {len(self)} micro-batches of a window were used, so its gradient is "
                "not that of the large batch; go through all of them, or abandon() the window"
            )


def first_length(batch: Any) -> int:
    if (length := _search(batch)) is None:
        raise TypeError(f"accumulate: found no tensor in a {type(batch).__name__}; pass size=")
    return length


def _search(batch: Any) -> int | None:
    """The length of the first tensor or array that has one."""
    if hasattr(batch, "shape"):
        return int(batch.shape[0]) if len(batch.shape) else None
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, (tuple, list)):
        parts = batch
    elif is_dataclass(batch):
        parts = (getattr(batch, field.name) for field in fields(batch))
    return next((length for part in parts if (length := _search(part)) is not None), None)


def _no_sync(model: nn.Module | None) -> AbstractContextManager[None]:
    if callable(make := getattr(model, "no_sync", None)):
        context: AbstractContextManager[None] = make()
        return context
    return _no_reduction(model) if hasattr(model, "set_requires_gradient_sync") else nullcontext()


@contextmanager
def _no_reduction(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _mean_over_processes(size: float, model: nn.Module | None) -> float:
    """What to divide by so that the average of the gradients over processes is divided by the sum of all sizes."""
    exchanges = hasattr(model, "no_sync") or hasattr(model, "set_requires_gradient_sync")
    if model is None or not exchanges or not (dist.is_available() and dist.is_initialized()):
        return size
    # Of all processes, those that hold the same examples (tensor parallel) included: a mean does not mind.
    group = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None
    total = torch.tensor(size, dtype=torch.float64, device=next(model.parameters()).device)
    dist.all_reduce(total, group=group)
    return total.item() / dist.get_world_size(group)
