"""A comparison as one HTML page that needs nothing from outside, and as JSON."""

import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import metadata, resources
from string import Template
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.io import to_html as figure_to_html

from schuss import __version__
from schuss.lab.compare import Run
from schuss.lab.ranking import HEADER, Standing, remarks, table
from schuss.lab.workload import Workload

# Mid-tones, legible on a white and on a dark page.
COLOURS = ("#3b82f6", "#f97316", "#16a34a", "#e5484d", "#8b5cf6", "#0d9b9b", "#db2777", "#b7791f", "#64748b")

# Ticks at 1, 2 and 5 of each decade, written out.
LOG = {"type": "log", "dtick": "D2", "tickformat": "~g"}


def to_json(runs: Iterable[Run], *, command: str, workload: Workload) -> str:
    """All that was recorded, with null for numbers that are not finite."""
    document = {
        "command": command,
        "workload": workload.name,
        "versions": versions(),
        "runs": [_record(run) for run in runs],
    }
    return json.dumps(_finite(document), allow_nan=False)


def _record(run: Run) -> dict[str, Any]:
    record = asdict(run) | {"diverged": run.diverged}
    return record | {f"test_{name}": values for name, values in record.pop("test").items()}


def to_html(standings: Sequence[Standing], *, command: str, workload: Workload) -> str:
    """Ranked table, remarks, learning curves and sensitivity to the learning rate, with Plotly inside the page."""
    # By name, not by rank: an optimizer keeps its colour from one report on the same optimizers to the next.
    names = sorted(standing.optimizer for standing in standings)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    figures = [
        f"<figure><figcaption>{caption}</figcaption>"
        + figure_to_html(
            figure,
            include_plotlyjs=i == 0,
            full_html=False,
            default_height="340px",
            config={"responsive": True, "displayModeBar": False},
        )
        + "</figure>"
        for i, (caption, figure) in enumerate(_figures(standings, colours).items())
    ]
    page = Template(resources.files("schuss.lab").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=f"Optimizers on {escape(workload.name)}",
        description=escape(workload.description),
        table=_table(standings, colours),
        remarks="".join(f"<li>{escape(line)}</li>" for line in remarks(standings)),
        legend="".join(
            f'<button aria-pressed="true" data-optimizer="{escape(standing.optimizer)}">'
            f"{_name(standing.optimizer, colours)}</button>"
            for standing in standings
        ),
        figures="".join(figures),
        command=escape(command),
        versions=escape(", ".join(f"{name} {version}" for name, version in versions().items())),
    )


def versions() -> dict[str, str]:
    """What the numbers depend on besides the command."""
    return {
        "schuss": __version__,
        **{name: metadata.version(name) for name in ("torch", "numba", "scikit-learn")},
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def _finite(value: Any) -> Any:
    """JSON has no word for nan and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _table(standings: Sequence[Standing], colours: Mapping[str, str]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in HEADER)
    rows = "".join(
        f"<tr><td>{rank}</td><th>{_name(optimizer, colours)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for rank, optimizer, *cells in table(standings)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _name(optimizer: str, colours: Mapping[str, str]) -> str:
    return f'<i style="background:{colours[optimizer]}"></i>{escape(optimizer)}'


def _figures(standings: Sequence[Standing], colours: Mapping[str, str]) -> dict[str, go.Figure]:
    """Figures by caption. The legend group of a trace is its optimizer, by which the page hides and shows it."""
    accuracy = _figure("epoch", "test accuracy (%)")
    test_loss = _figure("epoch", "test loss", yaxis=LOG)
    train_loss = _figure("step", "training loss", yaxis=LOG)
    by_lr = _figure("learning rate", "final test loss", xaxis={"type": "log", "dtick": 1}, yaxis=LOG)
    finals = [trial.loss.value for standing in standings for trial in standing.trials if not trial.diverged]
    above = 1.5 * max(finals, default=1.0)
    floor = 100.0
    # Optimizers of torch come last and dotted, so that both lines show where they agree with ours.
    for standing in sorted(standings, key=lambda standing: standing.optimizer.startswith("torch:")):
        name, runs = standing.optimizer, standing.best.runs
        percent = [100 * value for value in _mean(run.test_accuracy for run in runs)]
        floor = min(floor, percent[len(percent) // 3] - 1)
        style = {
            "name": name,
            "legendgroup": name,
            "line": {"color": colours[name], "width": 2, "dash": "dot" if name.startswith("torch:") else "solid"},
        }
        curve = {**style, "mode": "lines", "hovertemplate": f"%{{y:.4g}}<extra>{name}, lr {standing.best.lr:g}</extra>"}
        accuracy.add_scatter(y=percent, **curve)
        test_loss.add_scatter(y=_mean(run.test_loss for run in runs), **curve)
        train_loss.add_scatter(y=_smooth(_mean(run.train_loss for run in runs)), x0=1, **curve)
        finished = [trial for trial in standing.trials if not trial.diverged]
        by_lr.add_scatter(
            x=[trial.lr for trial in finished],
            y=[trial.loss.value for trial in finished],
            error_y={"array": [trial.loss.error for trial in finished], "thickness": 1, "width": 3},
            mode="lines+markers",
            hovertemplate=f"%{{y:.4g}} at lr %{{x:g}}<extra>{name}</extra>",
            **style,
        )
        diverged = [trial.lr for trial in standing.trials if trial.diverged]
        by_lr.add_scatter(
            x=diverged,
            y=[above] * len(diverged),
            mode="markers",
            marker={"symbol": "x", "size": 9, "color": colours[name]},
            hovertemplate=f"diverged at lr %{{x:g}}<extra>{name}</extra>",
            name=name,
            legendgroup=name,
        )
    # From the last two thirds of training, in which the optimizers differ by a few percent at most.
    accuracy.update_yaxes(range=[floor, 100.3])
    return {
        "Test accuracy at the best learning rate, mean over seeds": accuracy,
        "Test loss at the best learning rate, mean over seeds": test_loss,
        "Training loss at the best learning rate, mean over seeds, smoothed over about ten steps": train_loss,
        "Final test loss against the learning rate, with standard errors; a cross marks divergence": by_lr,
    }


def _figure(x: str, y: str, **layout: Any) -> go.Figure:
    return go.Figure(
        layout={
            "template": "none",
            "showlegend": False,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 60, "r": 12, "t": 8, "b": 48},
            "hovermode": "closest",
            "xaxis_title": x,
            "yaxis_title": y,
            **layout,
        }
    )


def _mean(curves: Iterable[Sequence[float]]) -> list[float]:
    """Mean over seeds, as far as the shortest of them goes."""
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start at zero."""
    average, smoothed = 0.0, []
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**i))
    return smoothed
