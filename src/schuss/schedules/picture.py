"""Pictures of a schedule: text for a terminal, a page with Plotly."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schuss.schedules.function import Function

MOST = 20_000
"""Points in a picture: more steps than that are thinned out evenly."""

BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""The dots of a character, row by row."""


def sample(schedule: Function, steps: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps 0 to steps - 1, or so many of them as fit into a picture, and the schedule's values."""
    t = np.unique(np.linspace(0, steps - 1, min(steps, MOST)).astype(np.int64))
    return t, schedule(t)


def text(values: Sequence[float] | NDArray[np.float64], *, width: int = 72, height: int = 12, dots: bool = True) -> str:
    """Values drawn as a line, with the top and the bottom of the axis: 0, if that is not further off than they spread.

    Args:
        values: at even distances, finite, at least one.
        width, height: in characters, in [1, inf).
        dots: draw with braille, of which a character has 2 × 4 dots; else with asterisks.
    """
    rows, columns = (4, 2) if dots else (1, 1)
    values = np.asarray(values, dtype=np.float64)
    low, high = _range(float(values.min()), float(values.max()))
    heights = np.rint((values - low) / (high - low) * (rows * height - 1)).astype(int)
    edges = np.linspace(0, len(values), columns * width + 1)
    grid = np.zeros((rows * height, columns * width), dtype=bool)
    for i, (begin, end) in enumerate(zip(edges[:-1].astype(int), np.ceil(edges[1:]).astype(int), strict=True)):
        part = heights[begin : max(end, begin + 1)]
        grid[part.min() : part.max() + 1, i] = True
    cells = grid[::-1].reshape(height, rows, width, columns).swapaxes(1, 2)
    if dots:
        codes = 0x2800 + (cells * BRAILLE).sum(axis=(2, 3))
        lines = ["".join(map(chr, row)) for row in codes.tolist()]
    else:
        lines = ["".join("*" if cell.any() else " " for cell in row).rstrip() for row in cells]
    digits = next((n for n in range(3, 17) if f"{high:.{n}g}" != f"{low:.{n}g}"), 17)
    labels = [f"{high:.{digits}g}", *[""] * (height - 2), f"{low:.{digits}g}"][:height]
    margin = max(map(len, labels))
    return "\n".join(f"{label:>{margin}} | {line}" for label, line in zip(labels, lines, strict=True))


def _range(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis."""
    spread = high - low
    if low > 0 and (low <= spread or spread == 0):
        low = 0.0
    elif high < 0 and (-high <= spread or spread == 0):
        high = 0.0
    return low, 1.0 if low == high else high


def page(schedule: Function, steps: int, *, lr: float = 1.0) -> str:
    """An HTML page with an interactive picture, which needs no network."""
    import plotly.graph_objects as go

    t, values = sample(schedule, steps)
    line = go.Scatter(x=t, y=lr * values, mode="lines", line={"color": "#3b82f6"})
    figure = go.Figure(line)
    figure.update_layout(
        title=repr(schedule), xaxis_title="step", yaxis_title="factor" if lr == 1 else "learning rate",
        yaxis_rangemode="tozero", template="plotly_white", hovermode="x",
    )  # fmt: skip
    return str(figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
