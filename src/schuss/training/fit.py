"""The training loop: steps in the right order, and what is due between them."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from schuss import bounds
from schuss.training.accumulate import Window, first_length
from schuss.training.accumulate import accumulate as windows_of
from schuss.training.checkpoints import load_checkpoint, save_checkpoint
from schuss.training.epochs import Epochs
from schuss.training.history import History, Stopped, metric
from schuss.training.progress import Record, recording
from schuss.training.signals import Signals
from schuss.training.step import PRECISIONS, Loss, Step, check_optimizer, evaluating, mean_loss, with_modes

__all__ = ["fit"]

Batch = TypeVar("Batch")
Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


def fit(
    model: nn.Module,
    data: Iterable[Batch],
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    schedule: LRScheduler | None = None,
    schedule_every: Literal["step", "epoch"] = "step",
    accumulate: int = 1,
    size: Callable[[Batch], float | Tensor] | None = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float | None = None,
    device: torch.device | str | None = None,
    evaluate: Evaluate | Iterable[Any] | None = None,
    evaluate_every: int | None = None,
    mode: Literal["min", "max"] = "min",
    patience: int | None = None,
    max_seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep_last: int | None = 3,
    resume: bool = True,
    log: str | os.PathLike[str] | Record | None = None,
    log_every: int = 10,
    progress: bool = True,
    on_step: Callable[[History], object] | None = None,
) -> History:
    """Train a model; with `checkpoint`, go on where an earlier call was interrupted, to the same bits.

    One step: `zero_grad`, then forward, loss and `backward` for each micro-batch of a window, then clipping, the
    optimizer, and the schedule. If the optimizer leaves a step out, because of a GradScaler or nonfinite="skip", then
    the schedule does too. After the step come `on_step`, an evaluation and a checkpoint, if they are due.

    An evaluation sees `model.eval()`, no gradients, and the averages of an optimizer with `ema_decay`, or of one with
    an eval mode, such as Schedule-Free's. It changes neither modes nor the random numbers of the training. The first
    SIGTERM or SIGINT (Ctrl-C) ends the training after the step, with a checkpoint; a second SIGINT at once.

    Args:
        model: on its device. One in eval mode is put into train mode as a whole, one in train mode is left as it is,
            so that modules of it may stay in eval mode.
        data: gives batches, once per epoch.
        loss_fn: the mean loss of a batch, a scalar. If its first parameter is called `model`, it is called as
            `loss_fn(model, batch)`, for batches of any kind. Else as `loss_fn(model(x), y)`, for batches (x, y).
        optimizer: any that needs no closure.
        epochs: how often to go through the data, in [1, inf).
        steps: of the optimizer, those that it leaves out included, in [1, inf). One of the two is needed; the first
            that is reached ends the training.
        schedule: any scheduler of this optimizer; ReduceLROnPlateau steps after each evaluation, with its first value.
        schedule_every: whether the schedule counts "step" or "epoch".
        accumulate: micro-batches per step, in [1, inf); fewer in the last step of an epoch.
        size: what the mean of the loss divides by, as in `schuss.accumulate`; by default the examples of a batch.
        precision: what the forward pass computes in; other than float32 by autocast, float16 with a GradScaler.
        scaler: a GradScaler of your own.
        clip_norm: limit of the norm of all gradients, in (0, inf], for optimizers that have no `max_norm`.
        device: where batches are moved to; by default that of the model's first parameter.
        evaluate: `evaluate(model)` returns a number, or numbers by name, of which the first decides. Or data, of which
            the mean loss is taken.
        evaluate_every: steps, in [1, inf); None: after each epoch. The end of a training is evaluated too.
        mode: whether the first value of an evaluation is better when it is less, "min", or more, "max".
        patience: stop after so many evaluations that are not better than the best before, in [1, inf).
        max_seconds: stop after the step during which so much time of this call is over, in (0, inf).
        checkpoint: a folder. The best evaluation's is best.schuss.
        checkpoint_every: steps, in [1, inf); None: after each epoch. The end of every call is saved too.
        keep_last: how many checkpoints stay, in [1, inf), or None for all.
        resume: go on from the newest checkpoint of the folder, if there is one. If not, there must be none.
        log: a folder for TensorBoard, or a function that is called with the step and values by name: "loss" (mean of
            the last `log_every` steps), "lr", "grad_norm" if it is known, and evaluations as "evaluation/...".
        log_every: steps, in [1, inf), after which losses are fetched from the device to be logged and shown.
        progress: whether to show a bar, if stderr is a terminal.
        on_step: called after each step; something true ends the training.

    Returns:
        Losses, evaluations, and why it stopped.

    Raises:
        ValueError: an argument out of its bounds; data that give no batch; a loss that is no scalar.
        TypeError: an optimizer that needs a closure; a batch that does not go with `loss_fn`.
        CheckpointError: the newest checkpoint is of another training.
        RuntimeError: several processes of `torch.distributed`.
    """
    plateau = schedule if isinstance(schedule, ReduceLROnPlateau) else None
    for name, value, known in (
        ("precision", precision, (*PRECISIONS,)), ("schedule_every", schedule_every, ("step", "epoch")),
        ("mode", mode, ("min", "max")),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"fit: {name} must be one of {', '.join(known)}, got {value!r}")
    for name, count in (
        ("epochs", epochs), ("steps", steps), ("accumulate", accumulate), ("evaluate_every", evaluate_every),
        ("patience", patience), ("checkpoint_every", checkpoint_every), ("log_every", log_every),
    ):  # fmt: skip
        bounds.check("fit", name, count, "[1, inf)" if name in ("accumulate", "log_every") else "None or [1, inf)")
        if not isinstance(count, int | None):
            raise TypeError(f"fit: {name} must be an integer, got {count!r}")
    bounds.check("fit", "max_seconds", max_seconds, "None or (0, inf)")
    bounds.check("fit", "clip_norm", clip_norm, "None or (0, inf]")
    if epochs is None and steps is None:
        raise ValueError("fit: give epochs or steps, or it would never end")
    for name, given in (("evaluate_every", evaluate_every), ("patience", patience), ("ReduceLROnPlateau", plateau)):
        if given is not None and evaluate is None:
            raise ValueError(f"fit: {name} needs evaluate, a function or data")
    if checkpoint_every is not None and checkpoint is None:
        raise ValueError("fit: checkpoint_every needs checkpoint, a folder")
    check_optimizer(optimizer, model, schedule)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError("fit: is for one process, since several would not stop at the same step; write the loop")

    device = torch.device(device or next(model.parameters()).device)
    loss = Loss(loss_fn, device, precision)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=precision == "float16")
    # ReduceLROnPlateau waits for evaluations, and a Schedule with follow=True counts by itself.
    counts = None if plateau or getattr(schedule, "follow", False) else schedule
    step = Step(model, loss, optimizer, scaler, clip_norm, counts if schedule_every == "step" else None)
    values_of = evaluate if evaluate is None or callable(evaluate) else mean_loss(loss, evaluate, size or first_length)
    history, position = History(mode=mode), Epochs(data)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "data": position.stateful}
    parts |= {"scaler": scaler if scaler.is_enabled() else None, "extra": {"history": history, "position": position}}
    if checkpoint is not None and resume:
        with suppress(FileNotFoundError):
            load_checkpoint(checkpoint, **parts, map_location="cpu")
    elif checkpoint is not None and any(Path(checkpoint).glob("step-*.schuss")):
        raise ValueError(f"fit: {checkpoint} has checkpoints; resume=True goes on from there, or name another folder")

    def moment() -> tuple[int, ...]:
        return history.steps, history.epochs, len(history.evaluations)

    began, before, saved = time.monotonic(), history.seconds, moment()
    told: Stopped = "patience" if patience is not None and history.stale >= patience else ""
    if not model.training:
        model.train()
    for one in with_modes(optimizer):
        one.train()

    def finished() -> Stopped:
        if signals.received:
            return "signal"
        if epochs is not None and history.epochs >= epochs:
            return "epochs"
        if steps is not None and history.steps >= steps:
            return "steps"
        if max_seconds is not None and time.monotonic() - began >= max_seconds:
            return "max_seconds"
        return told

    def windows() -> Iterable[Window[Batch]]:
        batches = position.rest()
        if position.taken:  # perhaps all of them
            first = list(islice(batches, 1))
            if not first:
                return ()
            batches = chain(first, batches)
        return windows_of(batches, accumulate, size=size)

    def save(name: str = "") -> None:
        nonlocal saved
        if checkpoint is None or (saved == moment() and not name):
            return
        history.seconds = before + time.monotonic() - began
        save_checkpoint(
            Path(checkpoint) / name, **parts, step=history.steps, epoch=history.epochs, keep_last=keep_last,
            loss=history.losses[-1] if history.losses else None,
        )  # fmt: skip
        saved = saved if name else moment()

    def record(values: Mapping[str, float]) -> None:
        for one in records:
            one(history.steps, values)

    def evaluation() -> None:
        nonlocal told
        assert values_of is not None
        with evaluating(model, optimizer):
            found = values_of(model)
        values = {n: bounds.number(v) for n, v in (found if isinstance(found, Mapping) else {"value": found}).items()}
        if not values or "step" in values:
            raise ValueError(f"fit: evaluate must return a number, or numbers by names other than 'step', got {found}")
        history.evaluations.append({"step": history.steps, **values})
        told = "patience" if patience is not None and history.stale >= patience else told
        if plateau is not None:
            plateau.step(metric(values))
        record({f"evaluation/{name}": value for name, value in values.items()})
        if history.stale == 0:
            save("best.schuss")

    def is_evaluated() -> bool:
        return evaluate is None or history.steps == (history.evaluations[-1]["step"] if history.evaluations else 0)

    def between(*, stepped: bool) -> None:
        """What is due after a step, after an epoch, and of a training that was interrupted before it."""
        nonlocal told
        an_epoch_ended = history.steps > 0 and position.taken == 0
        try:
            if stepped and records and history.steps % log_every == 0:
                record({"loss": fmean(history.losses[-log_every:]), **step.values()})
            if stepped and on_step is not None and on_step(history):
                told = "on_step"
            is_due = history.steps % evaluate_every == 0 if evaluate_every else an_epoch_ended
            if is_due and not is_evaluated() and finished() not in ("signal", "max_seconds"):
                evaluation()
        except BaseException:
            save()
            raise
        if an_epoch_ended if checkpoint_every is None else history.steps % checkpoint_every == 0 < history.steps:
            save()

    total = _total(data, accumulate, epochs, steps)
    with Signals() as signals, recording(log, progress=progress, total=total, done=history.steps) as records:
        between(stepped=False)
        while not (why := finished()):
            for window in windows():
                happened = step(window)
                position.taken += len(window)
                history.add(window.loss, skipped=not happened)
                between(stepped=True)
                if finished():
                    break
            else:
                position.end()
                history.epochs += 1
                if counts is not None and schedule_every == "epoch":
                    counts.step()
                between(stepped=False)
        save()
        # Not in the checkpoint, so that a longer training goes on from there as if it had not stopped.
        if not is_evaluated() and why in ("epochs", "steps", "on_step"):
            evaluation()
    history.stopped = why
    history.seconds = before + time.monotonic() - began
    return history


def _total(data: Iterable[Any], accumulate: int, epochs: int | None, steps: int | None) -> int | None:
    """Steps of the whole training, if they are known."""
    of_epochs = None
    if epochs is not None and isinstance(data, Sized):
        with suppress(TypeError):  # a DataLoader of data without a length
            of_epochs = epochs * -(-len(data) // accumulate)
    return min((n for n in (of_epochs, steps) if n is not None), default=None)
