"""Figures of a landscape, and the page with a slider over the steps. Needs the lab extra."""

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from schuss import __version__
from schuss.lab.landscape.result import NEEDS_KALEIDO
from schuss.lab.landscape.surface import Array
from schuss.lab.landscape.trajectory import Trajectory
from schuss.lab.web import CONFIG, LAYOUT, colour, filled, log_ticks, named

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from schuss.lab.landscape.result import Landscape

# Low is tinted, high is the page: what lies on it stays legible.
SHADES = {"light": ("#b9c8de", "#e3eaf3", "#fbfcfe"), "dark": ("#33475f", "#222c39", "#16191f")}
LINES = {"light": "rgba(70, 90, 120, .38)", "dark": "rgba(160, 185, 220, .30)"}
STEPS = (2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)
"""Distances of contours, in powers of ten; the largest that gives enough of them is taken."""
FEWEST = 9
LOWEST = 0.005
"""Part of the grid that lies below the first contour."""


def levels(z: Array, floor: float) -> tuple[Array, float, float, float]:
    """Logarithms of the loss above `floor`, to base 10, and the first, the last and the distance of the contours.

    From the lowest few of the grid's points to its highest. Below them all is one colour: a point may lie on a minimum
    by chance.
    """
    gaps = np.where(np.isfinite(z) & (z > floor), z - floor, np.nan)
    if not np.isfinite(gaps).any():
        return np.zeros_like(z), -1.0, 1.0, 0.25
    low, high = (float(np.log10(np.nanquantile(gaps, q))) for q in (LOWEST, 1.0))
    for distance in STEPS:
        if high - low >= FEWEST * distance:
            break
    first, last = math.ceil(low / distance) * distance, math.floor(high / distance + 1e-9) * distance
    logs = np.log10(np.where(np.isfinite(gaps), np.maximum(gaps, 10 ** (first - 0.999 * distance)), np.nan))
    return (
        np.where(np.isfinite(z) & ~np.isfinite(logs), first - 0.999 * distance, logs),
        first,
        max(last, first),
        distance,
    )


def figure(seen: "Landscape", *, legend: bool = True) -> "go.Figure":
    """Contours, minima, and a line for each optimizer with a marker where it is now."""
    go = _plotly()
    fig = go.Figure()
    logs, first, last, distance = levels(seen.z, seen.floor)
    ticks, texts = _ticks(first, last)
    fig.add_contour(
        x=seen.x.tolist(), y=seen.y.tolist(), z=np.round(logs, 5).tolist(), name="loss",
        contours={"start": first, "end": last, "size": distance, "coloring": "fill"},
        line={"width": 0.8, "color": LINES["light"], "smoothing": 1.0}, colorscale=_scale("light"), hoverinfo="skip",
        colorbar={
            "orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "ypad": 4, "xpad": 0,
            "thickness": 9, "len": 1.0, "outlinewidth": 0,
            "tickvals": ticks, "ticktext": texts, "ticks": "", "title": {"text": _loss_name(seen), "side": "bottom"},
        },
    )  # fmt: skip
    if seen.minima:
        fig.add_scatter(
            x=[x for x, _ in seen.minima], y=[y for _, y in seen.minima], mode="markers", name="minimum",
            marker={"symbol": "star", "size": 19, "color": "#f5b301", "line": {"width": 1, "color": "#5c4300"}},
            hovertemplate=f"minimum, loss {seen.lowest:.4g}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    for i, run in enumerate(seen.trajectories):
        fig.add_scatter(**_path(run, i), meta={"kind": "path", "run": i})
    for i, run in enumerate(seen.trajectories):
        x, y = run.points[-1]
        fig.add_scatter(
            x=[x], y=[y], mode="markers", name=run.label, legendgroup=run.label, showlegend=False, hoverinfo="skip",
            marker={"size": 11, "color": colour(i), "line": {"width": 2, "color": "#fff"}},
            meta={"kind": "head", "run": i}, cliponaxis=True,
        )  # fmt: skip
    x, y = seen.trajectories[0].points[0]
    fig.add_scatter(
        x=[x], y=[y], mode="markers", name="start", hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 13, "color": "#1e2430", "line": {"width": 2.5}},
        meta={"kind": "start"},
    )  # fmt: skip
    x0, x1, y0, y1 = seen.box
    # A gradient is at right angles to the contours only where both axes have one scale.
    fig.update_layout(
        **LAYOUT,
        showlegend=legend,
        margin={"l": 52, "r": 14, "t": 10, "b": 92, "autoexpand": legend},
        xaxis={"range": [x0, x1], "title": seen.axes[0], "constrain": "domain", "zeroline": False, "showgrid": False},
        yaxis={
            "range": [y0, y1], "title": seen.axes[1], "constrain": "domain", "zeroline": False, "showgrid": False,
            "scaleanchor": "x",
        },
    )  # fmt: skip
    return fig


def losses(seen: "Landscape", *, legend: bool = True) -> "go.Figure":
    """The loss above its lowest value against the step, on a logarithmic axis."""
    go = _plotly()
    fig = go.Figure()
    least = 1e-12  # below it all is rounding
    gaps = [[loss - seen.floor for loss in run.losses] for run in seen.trajectories]
    for i, (run, above) in enumerate(zip(seen.trajectories, gaps, strict=True)):
        fig.add_scatter(
            x=run.steps, y=[gap if math.isfinite(gap) and gap > least else None for gap in above], mode="lines",
            name=run.label, legendgroup=run.label, line={"color": colour(i), "width": 1.8}, customdata=run.losses,
            hovertemplate=f"step %{{x}}, loss %{{customdata:.4g}}<extra>{escape(run.label)}</extra>",
            meta={"kind": "curve", "run": i},
        )  # fmt: skip
    # A run that diverges would press all others to the floor.
    kept = [gap for above in gaps for gap in above if math.isfinite(gap) and gap > least]
    starts = [above[0] for above in gaps if math.isfinite(above[0]) and above[0] > 0]
    top = min(max(kept, default=1.0), 30 * max(starts, default=1.0))
    bottom = max(min(kept, default=1e-3), 1e-10 * top)
    fig.update_layout(
        **LAYOUT,
        showlegend=legend,
        margin={"l": 60, "r": 14, "t": 10, "b": 46},
        xaxis={"title": "step", "zeroline": False},
        yaxis={
            "title": _loss_name(seen), "type": "log", "zeroline": False, **log_ticks(math.log10(top / bottom)),
            "range": [math.log10(bottom) - 0.15, math.log10(top) + 0.15],
        },
    )  # fmt: skip
    return fig


def to_html(seen: "Landscape", *, command: str = "") -> str:
    """The page: figures, slider, play button, legend, table, remarks."""
    from plotly.io import to_html as figure_to_html

    def drawn(fig: Any, name: str, *, with_plotly: bool) -> str:
        return str(
            figure_to_html(
                fig, include_plotlyjs=with_plotly, full_html=False, default_height="100%", div_id=name,
                config=dict(CONFIG),
            )
        )  # fmt: skip

    # The contours are a figure of their own, under the others: so they are not drawn anew at every step.
    whole = figure(seen, legend=False)
    ground, plane = _plotly().Figure(whole.data[:1], whole.layout), _plotly().Figure(whole.data[1:], whole.layout)
    plane.update_layout(xaxis={"visible": False}, yaxis={"visible": False})
    x0, x1, y0, y1 = seen.box
    longest = max((run.steps for run in seen.trajectories), key=len)
    return filled(
        "schuss.lab.landscape",
        "page.html",
        made_by="landscape",
        title=escape(_title(seen)),
        formula=escape(seen.formula) + (f" <span>{escape(seen.source)}</span>" if seen.source else ""),
        ground=drawn(ground, "ground", with_plotly=True),
        plane=drawn(plane, "plane", with_plotly=False),
        curves=drawn(losses(seen, legend=False), "curves", with_plotly=False),
        shape="low" if y1 - y0 < 0.8 * (x1 - x0) else "high",
        width=f"{x1 - x0:.6g}",
        height=f"{y1 - y0:.6g}",
        legend="".join(
            f'<button type="button" aria-pressed="true" data-run="{i}">{named(i, run.label)}</button>'
            for i, run in enumerate(seen.trajectories)
        ),
        steps=list(longest),
        last=len(longest) - 1,
        table=_table(seen),
        remarks="".join(f"<li>{escape(line)}</li>" for line in seen.remarks()),
        command=f"<code>{escape(command)}</code>" if command else "",
        versions=escape(f"schuss {__version__}, torch {torch.__version__}, seed {seen.seed}"),
        light=[*SHADES["light"], LINES["light"]],
        dark=[*SHADES["dark"], LINES["dark"]],
    )


def write_image(seen: "Landscape", path: Path) -> None:
    """The contours with the trajectories, for print. Needs the package kaleido and a Chrome or Chromium."""
    fig = figure(seen)
    x0, x1, y0, y1 = seen.box
    width = 640
    longest = max(len(run.label) for run in seen.trajectories)
    beside = 60 + 7 * longest
    height = width * (y1 - y0) / (x1 - x0)
    fig.update_layout(
        title={"text": _title(seen), "x": 0.02, "y": 0.985, "yanchor": "top"}, margin={"t": 44},
        legend={"x": 1.02, "y": 1, "yanchor": "top", "bgcolor": "rgba(255,255,255,0)"},
        paper_bgcolor="white", width=width + beside, height=height + 130,
    )  # fmt: skip
    try:
        fig.write_image(path, scale=2 if path.suffix == ".png" else 1)
    except Exception as error:  # Plotly's for a missing kaleido, kaleido's own for a missing browser
        if "kaleido" not in str(error).lower() and "chrom" not in str(error).lower():
            raise
        raise ModuleNotFoundError(NEEDS_KALEIDO.format(suffix=path.suffix), name="kaleido") from error


def _path(run: Trajectory, i: int) -> dict[str, Any]:
    shown = [p if all(map(math.isfinite, p)) else (None, None) for p in run.points]
    label = escape(run.label)
    return {
        "x": [x for x, _ in shown],
        "y": [y for _, y in shown],
        "customdata": [[step, loss] for step, loss in zip(run.steps, run.losses, strict=True)],
        "mode": "lines+markers",
        "name": run.label,
        "legendgroup": run.label,
        "line": {"color": colour(i), "width": 2},
        "marker": {"size": 4, "color": colour(i)},
        "hovertemplate": "step %{customdata[0]}, loss %{customdata[1]:.4g}<br>%{x:.4g}, %{y:.4g}"
        f"<extra>{label}</extra>",
    }


def _scale(theme: str) -> list[list[Any]]:
    colours = SHADES[theme]
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def _ticks(first: float, last: float) -> tuple[list[float], list[str]]:
    """Round numbers between two powers of ten: whole powers if there are some, else 1, 2 and 5 of each."""
    powers = range(math.floor(first), math.ceil(last) + 1)
    whole = [float(k) for k in powers if first <= k <= last]
    if len(whole) < 3:
        whole = [k + math.log10(digit) for k in powers for digit in (1, 2, 5)]
        whole = [k for k in whole if first <= k <= last]
    every = max(1, math.ceil(len(whole) / 7))
    return whole[::every], [f"{10**k:.6g}" for k in whole[::every]]


def _loss_name(seen: "Landscape") -> str:
    return "loss" if seen.floor == 0 else f"loss - {seen.floor:.4g}".replace("- -", "+ ")


def _title(seen: "Landscape") -> str:
    return f"Optimizers on {seen.name}"


def _table(seen: "Landscape") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in seen.header)
    rows = "".join(
        f"<tr><th>{named(i, name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for i, (name, *cells) in enumerate(seen.table())
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'landscape: a picture needs the lab extra: pip install "schuss[lab]"; save(path) writes .json and .csv '
            "without",
            name="plotly",
        ) from None
    return go
