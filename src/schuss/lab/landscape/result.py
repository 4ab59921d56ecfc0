"""What has been seen: contours, trajectories, a table; as figures, pages and numbers."""

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schuss.lab.landscape.surface import Array, Box, Point
from schuss.lab.landscape.trajectory import BY_ITERATION, WITHIN, Trajectory

if TYPE_CHECKING:
    import plotly.graph_objects as go

SUFFIXES = (".html", ".json", ".csv", ".png", ".svg")
"""Of the files that a landscape is saved as."""
NEEDS_KALEIDO = (
    'landscape: a {suffix} file needs pip install "schuss[print]" and a Chrome or Chromium (on Debian: apt-get install '
    "chromium); .html, .json and .csv need neither"
)


@dataclass(frozen=True, eq=False)
class Landscape:
    """Contours of a loss and the ways of optimizers over it. Print it for the table, `save` it for the page.

    Attributes:
        name: of the function or the workload.
        formula: of the function, or what the workload is.
        axes: what x and y are.
        box: what is shown: from and to of x, from and to of y.
        x, y: of the grid, and
        z: the loss z[i, j] at (x[j], y[i]).
        trajectories: one of each optimizer, all from the same start.
        minima: where the loss is lowest, if that is known.
        lowest: the value there.
        explained: of a network: the part of the variance of all weights along x and along y.
        source: of the function.
        noisy: whether a step sees a part of the data only.
        steps: that each of them was to take.
        seed: of batches, and of a network's first weights.
    """

    name: str
    formula: str
    axes: tuple[str, str]
    box: Box
    x: Array = field(repr=False)
    y: Array = field(repr=False)
    z: Array = field(repr=False)
    trajectories: tuple[Trajectory, ...]
    minima: tuple[Point, ...] = ()
    lowest: float | None = None
    explained: tuple[float, float] | None = None
    source: str = ""
    noisy: bool = False
    steps: int = 200
    seed: int = 0

    @property
    def is_network(self) -> bool:
        """Whether it is a plane through the weights of a network."""
        return self.explained is not None

    @property
    def floor(self) -> float:
        """What is subtracted before logarithms are taken: the lowest value, if it is known, or 0 if none is below."""
        if self.lowest is not None:
            return self.lowest
        losses = [loss for run in self.trajectories for loss in run.losses if math.isfinite(loss)]
        low = min([float(np.nanmin(np.where(np.isfinite(self.z), self.z, np.nan))), *losses])
        return 0.0 if low > 0 else low

    @property
    def header(self) -> tuple[str, ...]:
        """Of the table."""
        if self.is_network:
            return ("optimizer", "lr", "gradients", "final loss", "lowest loss", "in the plane")
        return ("optimizer", "lr", f"to {WITHIN:g}", "gradients", "final loss", "distance")

    def table(self) -> list[tuple[str, ...]]:
        """A row for each optimizer.

        Steps to 0.001: the step from which on the loss stays within that of its lowest value. Gradients: how often
        the loss was differentiated. Distance: from the nearest minimum, at the end.
        """
        return [self._row(run) for run in self.trajectories]

    def _row(self, run: Trajectory) -> tuple[str, ...]:
        lr = "-" if run.lr is None else f"{run.lr:g}"
        name, gradients = run.title, str(run.evaluations[-1])
        final = "diverged" if run.diverged else f"{run.losses[-1]:.3g}"
        if run.in_plane is not None:
            return name, lr, gradients, final, f"{min(run.losses):.3g}", f"{run.in_plane:.0%}"
        reached = None if self.lowest is None else run.reached(self.lowest)
        distance = f"{run.distance(self.minima):.3g}" if self.minima and not run.diverged else "-"
        return name, lr, "-" if reached is None else str(reached), gradients, final, distance

    def remarks(self) -> list[str]:
        """What is to be known of this picture."""
        return [*self._remarks()]

    def _remarks(self) -> Iterator[str]:
        if self.explained is not None:
            a, b = self.explained
            yield (
                f"The plane holds {a + b:.1%} of the variance of the weights, {a:.1%} along x and {b:.1%} along y. "
                "Contours are the loss on the plane; the loss of a trajectory is that at the weights themselves."
            )
        elif self.noisy:
            yield "Contours and losses are those of all points; a step sees a mini-batch of them."
        for run in self.trajectories:
            left = run.left(self.box)
            if run.diverged and left is not None:
                yield f"{run.label} diverged: it left the box at step {left} and was stopped at step {run.steps[-1]}."
            elif run.diverged:
                yield f"{run.label} diverged after step {run.steps[-1]}."
            elif left is not None:
                yield f"{run.label} left the box at step {left} and had not come back at the end."
        if not self.is_network:
            yield (
                f"To {WITHIN:g}: the step from which on the loss stays within that of its lowest value. Distance: from "
                "the nearest minimum, at the end."
            )
        searched = [run for run in self.trajectories if run.tried]
        if searched:
            rates = sorted(searched[0].tried)
            those = f"the same {len(rates)} for everyone, {rates[0]:g} to {rates[-1]:g}"
            if self.is_network:
                those = "three for each optimizer, about a factor of three apart"
            yield f"Learning rates: the best of {those}, each with as many steps as are shown."
        for run in searched:
            if run.lr in (min(run.tried), max(run.tried)) and len(run.tried) > 3:
                end = "lowest" if run.lr == min(run.tried) else "highest"
                yield f"{run.label}: the best rate is the {end} that was tried."
        if any(run.settings.items() >= BY_ITERATION["LBFGS"].items() for run in self.trajectories):
            yield "A step of L-BFGS is one iteration here, which takes several gradients."

    def __str__(self) -> str:
        """The table and the remarks."""
        rows = [self.header, *self.table()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            f"{row[0]:<{widths[0]}}" + "".join(f"  {row[i]:>{widths[i]}}" for i in range(1, len(row))) for row in rows
        ]
        return "\n".join([*lines, *(f"- {line}" for line in self.remarks())])

    # --- numbers ----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """All of it, with null for numbers that are not finite."""
        return json.dumps(_finite(self.to_dict()), allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        names = (
            "name", "formula", "source", "axes", "box", "minima", "lowest", "floor", "explained", "noisy", "steps",
            "seed",
        )  # fmt: skip
        document: dict[str, Any] = {name: getattr(self, name) for name in names}
        document["remarks"] = self.remarks()
        document["trajectories"] = [
            asdict(run) | {"label": run.label, "tried": [{"lr": lr, "score": score} for lr, score in run.tried.items()]}
            for run in self.trajectories
        ]
        return document | {name: getattr(self, name).tolist() for name in ("x", "y", "z")}

    def to_csv(self) -> str:
        """The trajectories: optimizer, lr, step, gradients, x, y, loss."""
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(("optimizer", "lr", "step", "gradients", "x", "y", "loss"))
        for run in self.trajectories:
            rows = zip(run.steps, run.evaluations, run.points, run.losses, strict=True)
            for step, count, (x, y), loss in rows:
                writer.writerow((run.label, "" if run.lr is None else run.lr, step, count, x, y, loss))
        return written.getvalue()

    # --- pictures ---------------------------------------------------------------------------------------------------

    def plot(self) -> "go.Figure":
        """Contours and trajectories as a Plotly figure. Needs the lab extra.

        Raises:
            ModuleNotFoundError: Plotly is missing.
        """
        from schuss.lab.landscape.page import figure

        return figure(self)

    def plot_losses(self) -> "go.Figure":
        """The losses against the steps as a Plotly figure. Needs the lab extra.

        Raises:
            ModuleNotFoundError: Plotly is missing.
        """
        from schuss.lab.landscape.page import losses

        return losses(self)

    def to_html(self, *, command: str = "") -> str:
        """A page that needs no network. Needs the lab extra.

        Args:
            command: shown at its foot.

        Raises:
            ModuleNotFoundError: Plotly is missing.
        """
        from schuss.lab.landscape.page import to_html

        return to_html(self, command=command)

    def save(self, path: str | os.PathLike[str], *, command: str = "") -> Path:
        """Write it to a file: .html, the page; .json or .csv, numbers; .png or .svg, for print.

        Args:
            path: whose ending says what is written. A page needs the lab extra; .png and .svg also the print
                extra, and a Chrome or Chromium.
            command: shown at the foot of the page.

        Returns:
            The file.

        Raises:
            ValueError: another ending.
            ModuleNotFoundError: Plotly is missing, or kaleido or the browser.
        """
        path = Path(path)
        match path.suffix:
            case ".html":
                path.write_text(self.to_html(command=command), encoding="utf-8")
            case ".json":
                path.write_text(self.to_json(), encoding="utf-8")
            case ".csv":
                path.write_text(self.to_csv(), encoding="utf-8")
            case ".png" | ".svg":
                from schuss.lab.landscape.page import write_image

                write_image(self, path)
            case _:
                raise ValueError(f"save: path must end in {', '.join(SUFFIXES)}, got {path}")
        return path


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
