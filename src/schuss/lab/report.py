"""A comparison as one HTML page that needs nothing from outside, and its numbers as JSON and CSV."""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from plotly.offline import get_plotlyjs

from schuss.lab.evidence import LEVEL, R_MAX, Profile
from schuss.lab.ranking import Goal, Standing, Trial, header, remarks, table
from schuss.lab.run import Run
from schuss.lab.store import versions
from schuss.lab.tensorboard import write
from schuss.lab.web import COLOURS, CONFIG, LAYOUT, colour, filled, named

if TYPE_CHECKING:
    from schuss.lab.compare import Comparison, Result

Figure = dict[str, Any]
"""Traces and layout for Plotly, and what the page's script needs to know of them."""

POINTS = 250
"""Of a drawn curve; the files have them all."""
EARLY = 80
"""As many more, evenly spaced in the logarithm."""


def save(comparison: "Comparison", folder: Path, *, command: str, tensorboard: bool = False) -> list[Path]:
    """Write the page and its numbers, and return the files."""
    document = record(comparison, command=command)
    numbers = {
        "compare.json": json.dumps(_finite(document), allow_nan=False),
        "standings.csv": _csv(standing_rows(comparison)),
        "runs.csv": _csv(run_rows(comparison)),
        "curves.csv": _csv(curve_rows(comparison)),
    }
    page = to_html(comparison, command=command, files=list(numbers), folder=folder)
    texts = {"compare.html": page, **numbers}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    events = [write(comparison, folder / "tensorboard")] if tensorboard else []
    return [*(folder / name for name in texts), *events]


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
        "confirmed": standing.confirmed,
        "edge": standing.edge,
        "error": standing.failed,
        "trials": [_trial(trial) for trial in standing.trials],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    names = [name for name in trial.runs[0].test if all(name in run.test for run in trial.runs)]
    finals = {name: trial.final(name) for name in names} if trial.finished else {}
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
    """A row for each optimizer and learning rate on each workload; `best` marks the one that it stands at.

    And one more with `confirmed` where it stands there on seeds of its own.
    """
    scores = {cost: comparison.profile(cost) for cost in ("steps", "seconds")}
    for result in comparison.results:
        for standing in result.standings:
            for trial in standing.every:
                cells = _trial(trial)
                finals = cells.pop("final")
                yield {
                    "workload": result.goal.workload,
                    "rank": standing.rank,
                    "optimizer": standing.optimizer,
                    "best": standing.is_best(trial),
                    "confirmed": standing.confirmed and trial is standing.best,
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


def to_html(
    comparison: "Comparison", *, command: str = "", files: Sequence[str] = (), folder: Path | None = None
) -> str:
    """Contents, ranked tables, remarks, learning curves and sensitivity to the learning rate, with Plotly in the page.

    Args:
        command: how to make it again.
        files: names of the files beside it.
        folder: in which it will lie; landscapes that are there are linked to.
    """
    results, goals = comparison.results, comparison.goals
    # By name, not by rank: an optimizer keeps its colour from one report on the same optimizers to the next.
    numbers = {name: i for i, name in enumerate(sorted(candidate.name for candidate in comparison.candidates))}
    only = next(iter(goals.values())) if len(goals) == 1 else None
    several = len(results) > 1
    figures = [_profiles(comparison, numbers)] if several else []
    count = len(figures)
    sections = []
    for i, result in enumerate(results):
        theirs = _figures(result.standings, result.goal, numbers)
        figures += theirs
        sections.append(_section(i, result, theirs, numbers, count, heading=only is None))
        count += len(theirs)
    for i, figure in enumerate(figures):
        figure["id"] = f"f{i}"
    entrants = [standing.optimizer for standing in results[0].standings] if results else []
    order = [row[1] for row in comparison.scores()[1]] if several else entrants
    made = f"{len(comparison.runs)} runs, {_count(len(comparison.seeds), 'seed')}"
    made += f" and {len(comparison.confirming)} to confirm" if comparison.confirming else ""
    return filled(
        "schuss.lab",
        "report.html",
        made_by="compare",
        title=f"Optimizers on {escape(only.workload) if only else f'{len(goals)} workloads'}",
        description=escape(only.description) if only else "",
        facts=f'<p class="facts">{_facts(only)}; {made}</p>' if only else f'<p class="facts">{made}</p>',
        remarks="".join(f'<ul class="notice" role="note"><li>{escape(line)}</li></ul>' for line in comparison.remarks),
        contents=_contents(comparison) if only is None else "",
        bar="" if figures else "hidden",
        legend="".join(
            f'<button type="button" aria-pressed="true" data-run="{numbers[name]}" '
            f'title="Double click, or Shift with a click or Enter: this one only">{named(numbers[name], name)}</button>'
            for name in order
        ),
        spread="" if max(len(comparison.seeds), len(comparison.confirming)) > 1 else "hidden",
        scores=_scores(comparison, figures[:1], numbers) if several else "",
        sections="".join(sections),
        chosen="from other seeds than are shown" if comparison.confirming else "for all alike",
        files=_links(files, folder),
        command=escape(command),
        versions=escape(", ".join(f"{name} {version}" for name, version in _versions(comparison).items())),
        # No text in it can end the script.
        figures=json.dumps(_finite(figures), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        config=json.dumps(dict(CONFIG)),
    )


def _scores(comparison: "Comparison", figures: Sequence[Figure], numbers: Mapping[str, int]) -> str:
    about = (
        "Score: 1 for the fastest to the target everywhere, "
        f"0 for one that is never within {R_MAX:g} times the fastest."
    )
    rows = _table(*comparison.scores(), numbers)
    return f'<section id="all"><h2>All workloads</h2><p>{about}</p>{rows}{_placed(figures, 0)}</section>'


def _contents(comparison: "Comparison") -> str:
    results = {result.goal.workload: (i, result) for i, result in enumerate(comparison.results)}
    items = []
    if len(results) > 1:
        best = comparison.scores()[1][0]
        items.append(f'<a href="#all">All workloads<small>best score: {escape(best[1])}, {best[2]}</small></a>')
    for name in comparison.goals:
        if name in results:
            i, result = results[name]
            first = f"first: {escape(result.standings[0].optimizer)}"
            items.append(f'<a href="#w{i}">{escape(name)}<small>{first}</small></a>')
        else:
            items.append(f"<span>{escape(name)}<small>no run yet</small></span>")
    return f'<nav class="contents" aria-label="Contents"><ol>{"".join(f"<li>{item}</li>" for item in items)}</ol></nav>'


def _links(files: Sequence[str], folder: Path | None) -> str:
    links = [(name, name) for name in files] + ([] if folder is None else _landscapes(folder))
    if not links:
        return ""
    return "<p>Beside this page: " + ", ".join(f'<a href="{quote(file)}">{text}</a>' for file, text in links) + "</p>"


def _landscapes(folder: Path) -> list[tuple[str, str]]:
    """Files and titles, as HTML, of the pages of `schuss landscape` in a folder."""
    found = []
    for path in sorted(folder.glob("*.html")):
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(4096)
        title = re.search("<title>([^<]*)</title>", head)
        if title is not None and '<meta name="generator" content="schuss landscape">' in head:
            found.append((path.name, f"landscape: {title[1]}"))
    return found


def _facts(goal: Goal) -> str:
    size = f"{_count(goal.parameters, 'parameter')}, {_count(goal.steps, 'step')} in batches of {goal.batch_size}"
    return f"{size}; target: {escape(goal.aim)}"


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _section(
    i: int, result: "Result", figures: Sequence[Figure], numbers: Mapping[str, int], first: int, *, heading: bool
) -> str:
    goal = result.goal
    title = (
        f'<h2>{escape(goal.workload)}</h2><p>{escape(goal.description)}</p><p class="facts">{_facts(goal)}</p>'
        if heading
        else ""
    )
    notes = "".join(f"<li>{escape(line)}</li>" for line in remarks(result.standings))
    rows = _table(header(goal), table(result.standings), numbers)
    return f'<section id="w{i}">{title}{rows}<ul>{notes}</ul>{_placed(figures, first)}</section>'


def _placed(figures: Sequence[Figure], first: int) -> str:
    """Where figures will be drawn: their captions, and buttons for those axes that may be either."""
    html = []
    for i, figure in enumerate(figures, start=first):
        buttons = "".join(
            f'<button type="button" aria-pressed="{str(log).lower()}" data-log="{axis}" '
            f'aria-label="Logarithmic {axis} axis">log {axis}</button>'
            for axis, log in figure["log"].items()
            if axis in figure["choices"]
        )
        caption = escape(figure["caption"])
        html.append(
            f"<figure{' class=wide' if figure['wide'] else ''}><figcaption><span>{caption}"
            f"<small>{escape(figure['note'])}</small></span><span>{buttons}</span></figcaption>"
            f'<div class="plot" id="f{i}" role="img" aria-label="{caption}"></div></figure>'
        )
    return f'<div class="figures">{"".join(html)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Mapping[str, int]) -> str:
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><td>{rank}</td><th scope="row"><span>{named(numbers[optimizer], optimizer)}</span></th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for rank, optimizer, *cells in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Ranking">'
        f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(standings: Sequence[Standing], goal: Goal, numbers: Mapping[str, int]) -> list[Figure]:
    """The figures of a workload. The page's script draws them, and hides and shows by `meta.run`, the optimizer."""
    # Optimizers of torch come last and dotted, so that both lines show where they agree with ours.
    drawn = sorted(standings, key=lambda standing: standing.optimizer.startswith("torch:"))
    figures = []
    for name in dict.fromkeys((goal.metric, "loss")):
        scale, unit = (100, " %") if goal.percent and name == goal.metric else (1, "")
        curves = [trace for s in drawn if (trace := _curve(s, numbers, name, scale)) is not None]
        figures.append(
            _curves(f"Test {name}{unit}", "At the best learning rate, mean over seeds", curves, percent=bool(unit))
        )
        figures.append(_rates(drawn, goal, numbers, name, scale, unit))
    runs = [run for standing in standings for run in standing.best.runs]
    window = max(10, max((len(run.train_loss) for run in runs), default=0) // POINTS)
    curves = [trace for s in drawn if (trace := _training(s, numbers, window)) is not None]
    note = f"At the best learning rate, mean over seeds, smoothed over about {window} steps"
    figures.append(_curves("Training loss", note, curves, wide=True))
    return figures


def _curve(standing: Standing, numbers: Mapping[str, int], name: str, scale: float) -> dict[str, Any] | None:
    """A test value, over the seeds that recorded it."""
    runs = [run for run in standing.best.runs if run.error is None]
    curves = [[scale * value for value in run.test[name]] for run in runs]
    return _line(standing, numbers, curves, [run.steps for run in runs], [run.seconds for run in runs])


def _training(standing: Standing, numbers: Mapping[str, int], window: int) -> dict[str, Any] | None:
    """The loss of each batch, smoothed; the time of a step lies between those of two evaluations."""
    runs = [run for run in standing.best.runs if run.error is None]
    steps = [range(1, 1 + len(run.train_loss)) for run in runs]
    seconds = [run.seconds_at(these) for run, these in zip(runs, steps, strict=True)]
    return _line(standing, numbers, [_smooth(run.train_loss, window) for run in runs], steps, seconds)


def _line(
    standing: Standing,
    numbers: Mapping[str, int],
    curves: Sequence[Sequence[float]],
    steps: Sequence[Sequence[int]],
    seconds: Sequence[Sequence[float]],
) -> dict[str, Any] | None:
    """Mean over seeds, as far as the shortest goes; with the lowest and the highest seed if there are several."""
    length = min(map(len, curves), default=0)
    if length == 0:
        return None
    label = escape(standing.optimizer)
    kept = _thinned(length)
    columns = [[curve[i] for curve in curves] for i in kept]
    several = len(curves) > 1
    spread = "<br>seeds %{customdata[0]:.4g} to %{customdata[1]:.4g}" if several else ""
    return {
        "type": "scatter",
        "mode": "lines",
        **_style(standing.optimizer, numbers),
        "x": [steps[0][i] for i in kept],
        "y": [_short(statistics.fmean(column)) for column in columns],
        **({"customdata": [[_short(min(column)), _short(max(column))] for column in columns]} if several else {}),
        "meta": {
            "kind": "curve",
            "run": numbers[standing.optimizer],
            "seconds": [_short(statistics.fmean(clock[i] for clock in seconds)) for i in kept],
        },
        "hovertemplate": f"%{{y:.4g}} at %{{x:.5g}}{spread}<extra>{label}, lr {standing.best.lr:g}</extra>",
    }


def _curves(
    caption: str, note: str, data: list[dict[str, Any]], *, percent: bool = False, wide: bool = False
) -> Figure:
    """A figure of curves: against steps, or seconds."""
    shown = [value for trace in data for value in trace["y"] if math.isfinite(value)]
    late = [value for trace in data for value in trace["y"][len(trace["y"]) // 3 :] if math.isfinite(value)]
    extent: list[float] | None = None
    log = bool(shown) and min(shown) > 0 and not percent
    if late and percent:
        # From the last two thirds of training, in which the optimizers differ by a few percent at most.
        margin = 0.06 * (100 - min(late)) + 0.1
        extent = [max(0, min(late) - margin), 100 + margin]
    elif log:
        # A run that diverges would press all others to the floor.
        starts = [trace["y"][0] for trace in data if math.isfinite(trace["y"][0])]
        top = min(max(shown), 10 * max(starts, default=math.inf))
        extent = [min(shown) / 1.15, top * 1.15]
    return {
        "caption": caption, "note": note, "wide": wide, "data": data, "layout": _layout(), "range": extent,
        "log": {"x": False, "y": log}, "choices": ["x", "y"] if log or percent else ["x"],
        "x": {"steps": "step", "seconds": "seconds of training"},
    }  # fmt: skip


def _rates(
    standings: Sequence[Standing], goal: Goal, numbers: Mapping[str, int], name: str, scale: float, unit: str
) -> Figure:
    """The final value against the learning rate; crosses stand at the worse end of the figure, one row each."""
    data = []
    rows: dict[float, int] = {}
    higher = name == goal.metric and goal.better == "higher"
    values: list[float] = []
    for standing in standings:
        label, meta = escape(standing.optimizer), {"kind": "rates", "run": numbers[standing.optimizer]}
        finished = [trial for trial in standing.trials if trial.finished]
        finals = [trial.final(name) for trial in finished]
        values += [scale * mean.value for mean in finals]
        style = _style(standing.optimizer, numbers)
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", **style,
                "x": [trial.lr for trial in finished], "y": [scale * mean.value for mean in finals],
                "error_y": {"array": [scale * mean.error for mean in finals], "thickness": 1.2, "width": 3},
                "marker": {
                    "size": [12 if standing.is_best(trial) else 6 for trial in finished],
                    "opacity": 1, "line": {"width": 0},  # Plotly's own for sizes that differ is see-through
                },
                "customdata": [f" ± {scale * m.error:.2g}" if math.isfinite(m.error) else "" for m in finals],
                "meta": meta,
                "hovertemplate": f"%{{y:.4g}}%{{customdata}} at lr %{{x:g}}<extra>{label}</extra>",
            }
        )  # fmt: skip
        broken = [trial for trial in standing.trials if not trial.finished]
        heights = []
        for trial in broken:
            rows[trial.lr] = rows.get(trial.lr, -1) + 1
            heights.append(0.035 + 0.05 * rows[trial.lr])
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": label, "legendgroup": standing.optimizer,
                "x": [trial.lr for trial in broken], "y": [h if higher else 1 - h for h in heights], "yaxis": "y2",
                "marker": {"symbol": "x", "size": 9, "color": colour(numbers[standing.optimizer])},
                "customdata": [_ends(trial) for trial in broken],
                "meta": meta | {"kind": "broken"},
                "hovertemplate": f"%{{customdata}} at lr %{{x:g}}<extra>{label}</extra>",
            }
        )  # fmt: skip
    log = bool(values) and min(values) > 0 and not unit
    lrs = sorted({trial.lr for standing in standings for trial in standing.trials})
    apart = [lr for i, lr in enumerate(lrs) if i == 0 or lr > 1.5 * lrs[i - 1]]  # 0.009 and 0.01 would overprint
    few = {"tickvals": apart, "ticktext": [f"{lr:g}" for lr in apart]} if len(apart) <= 6 else {}
    layout = _layout(
        xaxis={"title": {"text": "learning rate"}, **few},
        yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    )
    crosses = "; a cross: it diverged or failed" if rows else ""
    of = ", of the seeds that it was chosen from" if any(standing.confirmed for standing in standings) else ""
    return {
        "caption": f"Final test {name}{unit} against the learning rate", "wide": False,
        "note": f"Mean and standard error{of}; a large dot: the best{crosses}",
        "data": data, "layout": layout, "range": _padded(values, log, higher, max(rows.values(), default=-1) + 1),
        "log": {"x": True, "y": log}, "choices": ["y"] if log or unit else [],
    }  # fmt: skip


def _ends(trial: Trial) -> str:
    counts = ((word, trial.count(word)) for word in ("diverged", "failed"))
    return ", ".join(f"{word}: {n} of {len(trial.runs)} runs" for word, n in counts if n)


def _padded(values: Sequence[float], log: bool, higher: bool, rows: int) -> list[float] | None:
    """The extent of values with a margin, at the worse end with room for so many rows of crosses."""
    if not values:
        return None
    low, high = (math.log(min(values)), math.log(max(values))) if log else (min(values), max(values))
    span = (high - low) or (0.1 if log else 0.1 * abs(high) or 0.1)
    worse = span * (0.08 + 0.07 * rows)
    low, high = (low - worse, high + 0.08 * span) if higher else (low - 0.08 * span, high + worse)
    return [math.exp(low), math.exp(min(high, 709.0))] if log else [low, high]


def _profiles(comparison: "Comparison", numbers: Mapping[str, int]) -> Figure:
    """The share of workloads on which an optimizer needs at most so many times the cost of the fastest."""
    steps, seconds = comparison.profile("steps"), comparison.profile("seconds")
    ratios = [r for p in (steps, seconds) for column in p.ratios.values() for r in column if math.isfinite(r)]
    last = max(R_MAX, 1.1 * max(ratios, default=1.0))
    data = []
    for name in sorted(steps.costs, key=lambda name: (name.startswith("torch:"), -steps.score(name))):
        ways = {cost: _stairs(profile, name, last) for cost, profile in (("steps", steps), ("seconds", seconds))}
        style = _style(name, numbers)
        data.append(
            {
                "type": "scatter", "mode": "lines", **style, "line": style["line"] | {"shape": "hv", "width": 2.5},
                "x": ways["steps"][0], "y": ways["steps"][1],
                "meta": {"kind": "profile", "run": numbers[name]}
                | {key: way[0] for key, way in ways.items()} | {f"{key}_y": way[1] for key, way in ways.items()},
                "hovertemplate": f"%{{y:.3g}} % within %{{x:.3g}} times<extra>{escape(name)}</extra>",
            }
        )  # fmt: skip
    of = {cost: f"{cost}, as a multiple of the fastest" for cost in ("steps", "seconds")}
    return {
        "caption": "Performance profiles", "wide": True,
        "note": "Workloads % on which it reaches the target in so many times the steps or seconds of the fastest",
        "data": data, "layout": _layout(), "range": [-3, 103], "log": {"x": True, "y": False},
        "choices": ["x"], "x": of,
    }  # fmt: skip


def _stairs(profile: Profile, name: str, last: float) -> tuple[list[float], list[float]]:
    """Where the share of workloads rises, and to how many per cent."""
    there = sorted({1.0, last, *(ratio for ratio in profile.ratios[name] if math.isfinite(ratio))})
    return there, [100 * profile.share(name, tau) for tau in there]


def _style(optimizer: str, numbers: Mapping[str, int]) -> dict[str, Any]:
    # Whose colour is already taken is dashed.
    dash = (
        "dot"
        if optimizer.startswith("torch:")
        else ("solid", "dash", "dashdot")[numbers[optimizer] // len(COLOURS) % 3]
    )
    return {
        "name": escape(optimizer),  # Plotly reads tags in labels
        "legendgroup": optimizer,
        "line": {"color": colour(numbers[optimizer]), "width": 2, "dash": dash},
    }


def _layout(*, xaxis: Mapping[str, Any] | None = None, **layout: Any) -> Figure:
    return {
        **LAYOUT,
        "showlegend": False,
        "margin": {"l": 52, "r": 14, "t": 8, "b": 46},
        "xaxis": {"zeroline": False, **(xaxis or {})},
        "yaxis": {"zeroline": False},
        **layout,
    }


def _thinned(length: int) -> list[int]:
    """Which points of a curve to draw: no more than show, also at the start of a logarithmic axis; first and last."""
    if length <= POINTS:
        return list(range(length))
    even = (round(i * (length - 1) / (POINTS - 1)) for i in range(POINTS))
    early = (round(length ** (i / EARLY)) - 1 for i in range(EARLY))
    return sorted({*even, *early})


def _short(value: float) -> float:
    """To seven digits, which is more than can be seen."""
    return float(f"{value:.7g}")


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average, corrected for its start at zero."""
    weight = 1 - 1 / window
    average, smoothed = 0.0, []
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**i))
    return smoothed
