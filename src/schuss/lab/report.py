"""A comparison as one HTML page that needs nothing from outside, and its numbers as JSON and CSV."""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.io import to_html as figure_to_html

from schuss.lab.evidence import LEVEL
from schuss.lab.ranking import Goal, Standing, Trial, header, remarks, table
from schuss.lab.run import Run
from schuss.lab.store import versions

if TYPE_CHECKING:
    from schuss.lab.compare import Comparison, Result

# Mid-tones, legible on a white and on a dark page.
COLOURS = ("#3b82f6", "#f97316", "#16a34a", "#e5484d", "#8b5cf6", "#0d9b9b", "#db2777", "#b7791f", "#64748b")

# Ticks at 1, 2 and 5 of each decade, written out.
LOG = {"type": "log", "dtick": "D2", "tickformat": "~g"}


def save(comparison: "Comparison", folder: Path, *, command: str) -> list[Path]:
    """Write the page and its numbers, and return the files."""
    document = record(comparison, command=command)
    texts = {
        "compare.html": to_html(comparison, command=command),
        "compare.json": json.dumps(_finite(document), allow_nan=False),
        "standings.csv": _csv(standing_rows(comparison)),
        "runs.csv": _csv(run_rows(comparison)),
        "curves.csv": _csv(curve_rows(comparison)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


# --- numbers ----------------------------------------------------------------------------------------------------------


def record(comparison: "Comparison", *, command: str = "") -> dict[str, Any]:
    """Everything, in dicts, lists, strings and numbers."""
    results = comparison.results
    return {
        "command": command,
        "versions": _versions(comparison),
        "level": LEVEL,
        "runs_made": len(comparison.runs),
        "runs_planned": comparison.total,
        "remarks": comparison.remarks,
        "workloads": [
            asdict(result.goal) | {"standings": [_standing(s) for s in result.standings], "remarks": result.remarks}
            for result in results
        ],
        "profiles": {cost: comparison.profile(cost).record() for cost in ("steps", "seconds")} if results else {},
        "runs": [_run(comparison.goals[run.workload], run) for run in comparison.runs],
    }


def _versions(comparison: "Comparison") -> dict[str, str]:
    return versions() | {"threads": str(comparison.threads)}


def _run(goal: Goal, run: Run) -> dict[str, Any]:
    fields = asdict(run) | {"status": goal.status(run)}
    return fields | {f"test_{name}": values for name, values in fields.pop("test").items()}


def _standing(standing: Standing) -> dict[str, Any]:
    return {
        "rank": standing.rank,
        "optimizer": standing.optimizer,
        "best": _trial(standing.best),
        "p": standing.p,
        "tied": standing.tied,
        "edge": standing.edge,
        "error": standing.failed,
        "trials": [_trial(trial) for trial in standing.trials],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    finals = {name: trial.final(name) for name in trial.runs[0].test} if trial.finished else {}
    return {
        "lr": trial.lr,
        "runs": len(trial.runs),
        **{status: trial.count(status) for status in ("finished", "diverged", "failed")},
        "reached": trial.reached,
        "steps_to_target": trial.steps_to_target,
        "seconds_to_target": trial.seconds_to_target,
        "step_ms": trial.step_ms,
        "train_step_ms": trial.train_step_ms,
        "final": {name: {"mean": mean.value, "standard_error": mean.error} for name, mean in finals.items()},
    }


def standing_rows(comparison: "Comparison") -> Iterable[dict[str, Any]]:
    """A row for each optimizer and learning rate on each workload; `best` marks the one that it stands at."""
    scores = {cost: comparison.profile(cost) for cost in ("steps", "seconds")}
    for result in comparison.results:
        for standing in result.standings:
            for trial in standing.trials:
                cells = _trial(trial)
                finals = cells.pop("final")
                yield {
                    "workload": result.goal.workload,
                    "rank": standing.rank,
                    "optimizer": standing.optimizer,
                    "best": trial is standing.best,
                    "p": standing.p if trial is standing.best else None,
                    **cells,
                    **{f"{name}_{part}": v for name, mean in finals.items() for part, v in mean.items()},
                    **{f"score_by_{cost}": profile.score(standing.optimizer) for cost, profile in scores.items()},
                    "error": standing.failed,
                }


def run_rows(comparison: "Comparison") -> Iterable[dict[str, Any]]:
    """A row for each run."""
    for run in comparison.runs:
        goal = comparison.goals[run.workload]
        reached = goal.reached(run)
        yield {
            "workload": run.workload,
            "optimizer": run.optimizer,
            "lr": run.lr,
            "seed": run.seed,
            "status": goal.status(run),
            **{f"final_{name}": values[-1] for name, values in run.test.items()},
            "steps": run.steps[-1] if run.steps else None,
            "seconds": run.seconds[-1] if run.seconds else None,
            "steps_to_target": None if reached is None else run.steps[reached],
            "seconds_to_target": None if reached is None else run.seconds[reached],
            "step_ms": run.step_ms,
            "train_step_ms": run.train_step_ms,
            "error": run.error,
        }


def curve_rows(comparison: "Comparison") -> Iterable[dict[str, Any]]:
    """A row for each evaluation of each run, with the mean training loss since the one before."""
    for run in comparison.runs:
        for i, step in enumerate(run.steps):
            since = run.train_loss[run.steps[i - 1] : step] if i else ()
            yield {
                "workload": run.workload,
                "optimizer": run.optimizer,
                "lr": run.lr,
                "seed": run.seed,
                "epoch": i,
                "step": step,
                "seconds": run.seconds[i],
                "train_loss": statistics.fmean(since) if since else None,
                **{f"test_{name}": values[i] for name, values in run.test.items()},
            }


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    """With every column that any row has; nothing where there is no finite number."""
    written = list(rows)
    names = list(dict.fromkeys(name for row in written for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_finite(row) for row in written)
    return file.getvalue()


def _finite(value: Any) -> Any:
    """JSON has no word for nan and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


# --- the page ---------------------------------------------------------------------------------------------------------


def to_html(comparison: "Comparison", *, command: str = "") -> str:
    """Ranked tables, remarks, learning curves and sensitivity to the learning rate, with Plotly inside the page."""
    results = comparison.results
    # By name, not by rank: an optimizer keeps its colour from one report on the same optimizers to the next.
    names = sorted(candidate.name for candidate in comparison.candidates)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    page = Template(resources.files("schuss.lab").joinpath("report.html").read_text(encoding="utf-8"))
    only = results[0].goal if len(results) == 1 else None
    library = iter([True])  # Plotly is put in once
    first = results[0].standings if results else ()
    return page.substitute(
        title=f"Optimizers on {escape(only.workload) if only else f'{len(results)} workloads'}",
        description=escape(only.description) if only else "",
        sections="".join(_section(result, colours, library, heading=only is None) for result in results),
        remarks="".join(f"<li>{escape(line)}</li>" for line in comparison.remarks),
        scores=f'<h2>All workloads</h2><div class="scroll">{_table(*comparison.scores(), colours)}</div>'
        if len(results) > 1
        else "",
        legend="".join(
            f'<button aria-pressed="true" data-optimizer="{escape(standing.optimizer)}">'
            f"{_name(standing.optimizer, colours)}</button>"
            for standing in first
        ),
        command=escape(command),
        versions=escape(", ".join(f"{name} {version}" for name, version in _versions(comparison).items())),
    )


def _section(result: "Result", colours: Mapping[str, str], library: Any, *, heading: bool) -> str:
    goal = result.goal
    title = f"<h2>{escape(goal.workload)}</h2><p>{escape(goal.description)}</p>" if heading else ""
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        + figure_to_html(
            figure,
            include_plotlyjs=next(library, False),
            full_html=False,
            default_height="340px",
            config={"responsive": True, "displayModeBar": False},
        )
        + "</figure>"
        for caption, figure in _figures(result.standings, goal, colours).items()
    )
    notes = "".join(f"<li>{escape(line)}</li>" for line in remarks(result.standings))
    return (
        f'<section>{title}<div class="scroll">{_table(header(goal), table(result.standings), colours)}</div>'
        f"<ul>{notes}</ul><main>{figures}</main></section>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], colours: Mapping[str, str]) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><td>{rank}</td><th>{_name(optimizer, colours)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for rank, optimizer, *cells in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _name(optimizer: str, colours: Mapping[str, str]) -> str:
    return f'<i style="background:{colours[optimizer]}"></i>{escape(optimizer)}'


def _figures(standings: Sequence[Standing], goal: Goal, colours: Mapping[str, str]) -> dict[str, go.Figure]:
    """Figures by caption. The legend group of a trace is its optimizer, by which the page hides and shows it."""
    scale, unit = (100, " (%)") if goal.percent else (1, "")
    shown = {} if goal.metric == "loss" else {goal.metric: _figure("epoch", f"test {goal.metric}{unit}")}
    test_loss = _figure("epoch", "test loss", yaxis=LOG)
    train_loss = _figure("step", "training loss", yaxis=LOG)
    by_lr = _figure("learning rate", "final test loss", xaxis={"type": "log", "dtick": 1}, yaxis=LOG)
    finals = [t.final("loss").value for standing in standings for t in standing.trials if t.finished]
    above = 1.5 * max(finals, default=1.0)
    late: list[float] = []
    # Optimizers of torch come last and dotted, so that both lines show where they agree with ours.
    for standing in sorted(standings, key=lambda standing: standing.optimizer.startswith("torch:")):
        name = standing.optimizer
        runs = [run for run in standing.best.runs if run.error is None]
        label = escape(name)  # Plotly reads tags in labels
        style = {
            "name": label,
            "legendgroup": name,
            "line": {"color": colours[name], "width": 2, "dash": "dot" if name.startswith("torch:") else "solid"},
        }
        curve = {
            **style, "mode": "lines", "hovertemplate": f"%{{y:.4g}}<extra>{label}, lr {standing.best.lr:g}</extra>",
        }  # fmt: skip
        for metric, figure in shown.items():
            values = [scale * value for value in _mean(run.test[metric] for run in runs)]
            late += values[len(values) // 3 :]
            figure.add_scatter(y=values, **curve)
        test_loss.add_scatter(y=_mean(run.test_loss for run in runs), **curve)
        train_loss.add_scatter(y=_smooth(_mean(run.train_loss for run in runs)), x0=1, **curve)
        finished = [(trial.lr, trial.final("loss")) for trial in standing.trials if trial.finished]
        by_lr.add_scatter(
            x=[lr for lr, _ in finished],
            y=[mean.value for _, mean in finished],
            error_y={"array": [mean.error for _, mean in finished], "thickness": 1, "width": 3},
            mode="lines+markers",
            hovertemplate=f"%{{y:.4g}} at lr %{{x:g}}<extra>{label}</extra>",
            **style,
        )
        broken = [trial.lr for trial in standing.trials if not trial.finished]
        by_lr.add_scatter(
            x=broken,
            y=[above] * len(broken),
            mode="markers",
            marker={"symbol": "x", "size": 9, "color": colours[name]},
            hovertemplate=f"diverged or failed at lr %{{x:g}}<extra>{label}</extra>",
            name=label,
            legendgroup=name,
        )
    there = [value for value in late if math.isfinite(value)]
    if goal.percent and there:
        # From the last two thirds of training, in which the optimizers differ by a few percent at most.
        shown[goal.metric].update_yaxes(range=[min(there) - 1, 100.3])
    return {
        **{f"Test {m} at the best learning rate, mean over seeds": figure for m, figure in shown.items()},
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
            "yaxis_title": escape(y),
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
