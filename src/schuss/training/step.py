"""One step of a training, and one evaluation."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from schuss import bounds
from schuss.engine.pieces import EMA
from schuss.training.accumulate import Window
from schuss.training.clipping import clip_grad_norm_
from schuss.training.epochs import kept_random
from schuss.wrappers.outer import _chain, _needs_closure
from schuss.wrappers.sam import SAM

__all__ = ["PRECISIONS", "Loss", "Step", "check_optimizer", "evaluating", "in_eval_mode", "mean_loss", "with_modes"]

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What autocast takes; None for no autocast."""


class Loss:
    """The loss of a batch.

    Args:
        loss_fn: `loss_fn(model, batch)` if its first parameter is called `model`, else `loss_fn(model(x), y)` for
            batches (x, y).
        device: where batches are moved to.
        precision: one of `PRECISIONS`.
        owner: what messages name.
    """

    def __init__(
        self, loss_fn: Callable[..., Tensor], device: torch.device, precision: str, *, owner: str = "fit"
    ) -> None:
        self._loss_fn, self._device, self._dtype, self._owner = loss_fn, device, PRECISIONS[precision], owner
        try:
            names = [*inspect.signature(loss_fn).parameters]
        except ValueError:  # written in C
            names = []
        self._takes_model = names[:1] == ["model"]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        batch = moved(batch, self._device)
        with nullcontext() if self._dtype is None else torch.autocast(self._device.type, self._dtype):
            if self._takes_model:
                return self._loss_fn(model, batch)
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(
                    f"{self._owner}: a batch must be a pair (x, y) for loss_fn(model(x), y), got a "
                    f"{type(batch).__name__}; for other batches write def loss_fn(model, batch), whose first parameter "
                    "is called model"
                )
            return self._loss_fn(model(batch[0]), batch[1])


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device: what has a method `to`, also inside of tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=device.type == "cuda")
    if callable(to := getattr(batch, "to", None)):
        return to(device)
    if isinstance(batch, (tuple, list)):
        parts = [moved(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, dict):
        return type(batch)((name, moved(part, device)) for name, part in batch.items())
    return batch


@dataclass
class Step:
    """A step of an optimizer on a window of micro-batches.

    Attributes:
        schedule: what steps with the optimizer.
        clip_norm: limit of the norm of the gradients, or None.
        grad_norm: what it was in the last step, if there is a limit.
    """

    model: nn.Module
    loss: Loss
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    clip_norm: float | None
    schedule: LRScheduler | None
    grad_norm: Tensor | None = None

    def __call__(self, window: Window[Any]) -> bool:
        """Take it.

        Returns:
            Whether the optimizer did; else nothing has changed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        for batch in window:
            loss = window.weighted(self.loss(self.model, batch))
            self.scaler.scale(loss).backward()
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.grad_norm = clip_grad_norm_(params, self.clip_norm)
        scale, skipped = self.scaler.get_scale(), getattr(self.optimizer, "skipped_steps", 0)
        self.scaler.step(self.optimizer)  # one of schuss unscales, clips and averages here
        self.scaler.update()  # to less than before if there was no step
        happened = self.scaler.get_scale() >= scale and getattr(self.optimizer, "skipped_steps", 0) == skipped
        if happened and self.schedule is not None:
            self.schedule.step()
        return happened

    def values(self) -> dict[str, float]:
        """The learning rates, and the norm of the gradient of the last step if it is known."""
        groups = self.optimizer.param_groups
        values = {"lr" if len(groups) == 1 else f"lr/{i}": bounds.number(g["lr"]) for i, g in enumerate(groups)}
        norm = getattr(self.optimizer, "last_grad_norm", None) if self.clip_norm is None else self.grad_norm
        return values if norm is None else values | {"grad_norm": bounds.number(norm)}


def check_optimizer(optimizer: Optimizer, model: nn.Module, schedule: LRScheduler | None) -> None:
    """Raise if the optimizer is none for `fit`, or has nothing to do with the model or the schedule."""
    several = next((one for one in _chain(optimizer) if isinstance(one, SAM)), None) or _needs_closure(optimizer)
    if several is not None:
        inside = "" if several is optimizer else f" inside of {type(optimizer).__name__}"
        raise TypeError(
            f"fit: {type(several).__name__}{inside} needs a closure, for it evaluates the loss several times in a "
            "step, and fit once; write the loop by hand, with optimizer.step(closure) on each batch, where closure "
            "clears the gradients, computes the loss, calls backward and returns the loss"
        )
    known = {id(p) for p in model.parameters()}
    if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("fit: the optimizer has no parameter of the model; make it from model.parameters()")
    # An optimizer round another one has the same groups.
    if schedule is not None and schedule.optimizer.param_groups is not optimizer.param_groups:
        raise ValueError("fit: the schedule was made for another optimizer; make it from this one")


@contextmanager
def evaluating(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """A block in eval mode, without gradients, on the averages if the optimizer keeps them; then all is as before.

    An optimizer with an eval mode of its own, such as Schedule-Free's, is in it for the block.
    """
    modes = [(module, module.training) for module in model.modules()]
    has_averages = any(EMA in kept for kept in optimizer.state.values())
    averaged = optimizer.averaged() if has_averages and hasattr(optimizer, "averaged") else nullcontext()
    with kept_random(), averaged, in_eval_mode(optimizer), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:  # model.train() would wake those that are to stay in eval mode
                module.training = training


def with_modes(optimizer: Optimizer) -> list[Any]:
    """The optimizers, of one and those in it, that have `train` and `eval`: whose parameters move between the two."""
    return [one for one in _chain(optimizer) if all(callable(getattr(one, name, None)) for name in ("train", "eval"))]


@contextmanager
def in_eval_mode(optimizer: Optimizer) -> Iterator[None]:
    """A block with parameters where they are to be evaluated; after it, where they are trained."""
    switched = with_modes(optimizer)
    try:
        for one in switched:
            one.eval()
        yield
    finally:
        for one in switched:
            one.train()


def mean_loss(
    loss: Loss, data: Iterable[Any], size: Callable[[Any], float | Tensor]
) -> Callable[[nn.Module], Mapping[str, float]]:
    """An evaluation: the mean of a loss over data, each batch with its size."""

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        total, count = 0.0, 0.0
        for batch in data:
            n = bounds.number(size(batch))
            total, count = total + n * loss(model, batch).item(), count + n
        if count == 0:
            raise ValueError("fit: evaluate gave no batch; a generator does so after its first time")
        return {"loss": total / count}

    return evaluate
