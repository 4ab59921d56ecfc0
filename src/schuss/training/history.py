"""What a training has done, as `fit` returns it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["History", "Stopped", "metric"]

Stopped = Literal["", "epochs", "steps", "signal", "patience", "max_seconds", "on_step"]


@dataclass
class History:
    """What a training has done, since its first step, also if it was interrupted in between.

    Attributes:
        steps: steps of the optimizer, with those that it left out.
        epochs: epochs that are over.
        skipped: steps that changed nothing, because a gradient was infinite or NaN.
        evaluations: for each its "step", and its values by name.
        seconds: the time of it all, with evaluations and checkpoints.
        stopped: why the last call of `fit` came back: "epochs" or "steps", as many as were asked for; "patience",
            "max_seconds", "signal" or "on_step".
        resumed: the step of the checkpoint from which the last call of `fit` went on, or 0.
        mode: whether the "min" or the "max" of the first values of evaluations is the best.
    """

    steps: int = 0
    epochs: int = 0
    skipped: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: Stopped = ""
    resumed: int = 0
    mode: Literal["min", "max"] = "min"
    _losses: list[float] = field(default_factory=list, repr=False)
    _waiting: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def losses(self) -> list[float]:
        """The loss of each step. They stay on their device until this is read, or a hundred of them wait."""
        if self._waiting:
            self._losses += torch.stack(self._waiting).tolist()
            self._waiting.clear()
        return self._losses

    @property
    def best(self) -> dict[str, float] | None:
        """The evaluation whose first value is the best, the first of equal ones; None while all are NaN."""
        sign = 1 if self.mode == "min" else -1
        numbers = [e for e in self.evaluations if not math.isnan(metric(e))]
        return min(numbers, key=lambda e: sign * metric(e), default=None)

    @property
    def stale(self) -> int:
        """How many evaluations there were since the best one."""
        best = self.best
        return len(self.evaluations) if best is None else len(self.evaluations) - 1 - self.evaluations.index(best)

    def add(self, loss: Tensor, *, skipped: bool) -> None:
        """Count a step.

        Args:
            loss: its loss, without dimensions.
            skipped: whether the optimizer left it out.
        """
        self.steps += 1
        self.skipped += skipped
        self._waiting.append(loss)
        if len(self._waiting) == 100:
            _ = self.losses

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {name: getattr(self, name) for name in ("steps", "epochs", "skipped", "seconds")}
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return kept | {"losses": losses, "evaluations": [dict(e) for e in self.evaluations]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there.

        Args:
            state_dict: what `state_dict` returned.
        """
        vars(self).update({name: value for name, value in state_dict.items() if name != "losses"})
        self._losses, self._waiting, self.resumed = state_dict["losses"].tolist(), [], self.steps


def metric(evaluation: Mapping[str, float]) -> float:
    """What evaluations are compared by: the first value that is not the step."""
    return next(value for name, value in evaluation.items() if name != "step")
