"""Whether a workload is one, said in a line if it is not; and what a table tells of it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from schuss.lab.workload import Task, Workload

T = TypeVar("T")

HEADER = ("workload", "what it is", "para-\nmeters", "steps", "target", "ms per\nstep", "s per\nrun")


@dataclass(frozen=True)
class Facts:
    """A workload that passed.

    Args:
        workload: itself.
        task: of the seed that was checked; it has taken steps that move nothing.
        scores: what it evaluates before training.
        step_s: seconds of a step without the optimizer's own: batch, forward and backward.
        loss: of the first batch, before training.
    """

    workload: Workload
    task: Task
    scores: Mapping[str, float]
    step_s: float
    loss: float

    def cells(self) -> tuple[str, ...]:
        """Below `HEADER`."""
        task = self.task
        return (
            self.workload.name,
            self.workload.description,
            f"{task.parameters:,}",
            f"{task.steps:,}",
            f"{task.metric} {'≥' if task.better == 'higher' else '≤'} {task.target:g}",
            f"{1e3 * self.step_s:.2f}",
            f"{task.steps * self.step_s:.1f}",
        )


def check(workload: Workload, *, seed: int = 0, seconds: float = 0.2) -> Facts:
    """Make a workload's task, take its loss, gradients and scores, make it again, and time its steps.

    Args:
        workload: it.
        seed: of the task.
        seconds: of steps that are timed, after the first; at least two of them, in [0, inf).

    Raises:
        ValueError: it raises, gives no `Task`, a loss that is not finite or has no gradient, scores without its metric
            or without "loss", batches only once, or another loss for the same seed.
    """
    with torch.random.fork_rng(devices=[]):
        return _checked(workload, seed, seconds)


def _checked(workload: Workload, seed: int, seconds: float) -> Facts:
    name = workload.name
    task, loss = _begun(workload, seed)
    # It moves nothing, and takes sparse gradients as well as dense ones.
    optimizer = torch.optim.SGD([p for p in task.model.parameters() if p.requires_grad], lr=0.0)
    _call(f"{name}: the backward pass of its loss", loss.backward)
    gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
    if not gradients:
        raise ValueError(f"{name}: the loss depends on no parameter of the model; compute it from model(...)")
    if not all(_values(gradient).isfinite().all() for gradient in gradients):
        raise ValueError(f"{name}: a gradient of the first batch is not finite")
    scores = _call(f"{name}: evaluate", lambda: task.scores(optimizer))
    if (lacking := task.lacking(scores)) is not None:
        raise ValueError(f"{name}: {lacking}")
    for key in dict.fromkeys(("loss", task.metric)):
        if not math.isfinite(scores[key]):
            raise ValueError(f"{name}: {key!r} of evaluate is {scores[key]} before training")
    _, second = _begun(workload, seed)
    if second.item() != loss.item():
        raise ValueError(
            f"{name}: the first loss of seed {seed} is {loss.item():.9g} and, when made again, {second.item():.9g}; "
            "draw weights, order and noise from torch.Generator().manual_seed(seed)"
        )
    return Facts(workload, task, scores, _timed(name, task, optimizer, seconds), loss.item())


def _call(what: str, function: Callable[[], T]) -> T:
    """What anybody's function returns."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("sklearn"):
            raise  # part of what the lab is installed with
        line = " ".join(str(error).split())
        raise ValueError(f"{what} raised {type(error).__name__}: {line}") from error


def made(workload: Workload, seed: int) -> Task:
    """The task of a seed.

    Raises:
        ValueError: the function raises, or gives no `Task`.
    """
    task: object = _call(f"{workload.name}: the function", lambda: workload(seed))
    if not isinstance(task, Task):
        kind = type(task).__name__
        raise ValueError(f"{workload.name}: the function must return a schuss.lab.workload.Task, got {kind}")
    return task


def _begun(workload: Workload, seed: int) -> tuple[Task, Tensor]:
    """A task and its first loss."""
    name, task = workload.name, made(workload, seed)
    batch = next(_epoch(name, task))
    torch.default_generator.manual_seed(seed)  # for dropout; what was drawn before has to be fixed without it
    return task, _loss(name, task, batch)


def _epoch(name: str, task: Task) -> Iterator[Any]:
    """The batches of an epoch; at least one."""
    batches = _call(f"{name}: batches", lambda: iter(task.batches))
    nothing, count = object(), 0
    while (batch := _call(f"{name}: batches", lambda: next(batches, nothing))) is not nothing:
        count += 1
        yield batch
    if count == 0:
        raise ValueError(f"{name}: batches gave none; each time one goes through them must be a whole epoch")


def _loss(name: str, task: Task, batch: Any, which: str = "the first batch") -> Tensor:
    loss: object = _call(f"{name}: loss", lambda: task.loss(task.model, batch))
    if not isinstance(loss, Tensor):
        raise ValueError(f"{name}: loss must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{name}: loss must be one number, got shape {tuple(loss.shape)}; take its mean")
    if loss.is_complex():
        raise ValueError(f"{name}: loss must be a real number, got {loss.dtype}; take its absolute value, say")
    if not loss.requires_grad:
        raise ValueError(f"{name}: the loss has no gradient; do not detach it, or compute it without gradients")
    if not math.isfinite(loss.item()):
        raise ValueError(f"{name}: the loss of {which} is {loss.item()}")
    return loss


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _timed(name: str, task: Task, optimizer: torch.optim.Optimizer, seconds: float) -> float:
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 2:
        began = perf_counter()
        for batch in _epoch(name, task):
            optimizer.zero_grad()
            loss = _loss(name, task, batch, "a later batch" if taken else "the first batch")
            _call(f"{name}: the backward pass of its loss", loss.backward)
            ended = perf_counter()
            taken.append(ended - began)
            began = ended
            if sum(taken) >= seconds and len(taken) >= 2:
                break
    return median(taken)
