"""The tables, the picture and the numbers of docs/study.md, from the comparisons that `study.py` made."""

import csv
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go

from schuss.lab.compare import Comparison, Result
from schuss.lab.ranking import Standing, header, means, table
from schuss.lab.store import versions


def write(made: Mapping[str, Comparison], page: Path) -> list[Path]:
    """Fill what stands between marks in a page, and write its numbers and its picture beside it.

    Args:
        made: comparisons by the names of `study.parts`.
        page: of Markdown; the text between `<!-- NAME -->` and `<!-- /NAME -->` is replaced.

    Returns:
        The files.
    """
    everyone = made["all"]
    blocks = {
        "facts": _facts(made),
        "scores": _scores(everyone),
        "finals": _finals(everyone),
        "rates": _rates(everyone),
        **{name: _ranking(only.results[0]) for name, only in made.items() if only is not everyone},
    }
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert marks.search(text), f"{page} has no place for {name}"
        text = marks.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")
    numbers, picture = page.with_suffix(".csv"), page.with_suffix(".svg")
    with numbers.open("w", encoding="utf-8", newline="") as file:
        rows = list(_rows(result for one in made.values() for result in one.results))
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    _picture(everyone).write_image(picture)
    return [page, numbers, picture]


def _facts(made: Mapping[str, Comparison]) -> str:
    runs = [run for one in made.values() for run in one.runs]
    lost = sum(run.diverged for run in runs)
    hours = math.fsum(run.seconds[-1] for run in runs if run.seconds) / 3600
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{len(runs):,} runs, {lost} of which diverged; {hours:.1f} hours of training on one core, two of which worked "
        f"side by side. With {known}."
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns stand at the left."""
    rule = [":---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def _order(comparison: Comparison) -> list[str]:
    return [row[1] for row in comparison.scores()[1]]


def _places(comparison: Comparison) -> dict[str, dict[str, Standing]]:
    """Standings by optimizer and workload."""
    found: dict[str, dict[str, Standing]] = {name: {} for name in _order(comparison)}
    for result in comparison.results:
        for standing in result.standings:
            found[standing.optimizer][result.goal.workload] = standing
    return found


def _is_near(standing: Standing) -> bool:
    return standing.rank == 1 or standing.tied


def _scores(comparison: Comparison) -> str:
    places = _places(comparison)
    head = [
        "optimizer",
        "score by steps",
        "targets reached",
        "fewest steps",
        "mean place",
        "best",
        "worst",
        "not told apart",
    ]
    rows = []
    for _, name, score, _, reached, fewest in comparison.scores()[1]:
        own = places[name].values()
        ranks, near = [s.rank for s in own], sum(map(_is_near, own))
        mean = f"{statistics.fmean(ranks):.1f}"
        rows.append([name, score, reached.partition(" ")[0], fewest, mean, str(min(ranks)), str(max(ranks)), str(near)])
    return _markdown(head, rows)


def _finals(comparison: Comparison) -> str:
    """Of each workload the means, to the same digits; the first and those not told apart from it are marked."""
    cells: dict[str, dict[str, str]] = {}
    for result in comparison.results:
        finished = [s for s in result.standings if s.best.finished]
        written = means([s.best.score for s in finished], percent=result.goal.percent)
        for standing, text in zip(finished, written, strict=True):
            value = text.partition(" ")[0]
            marked = f"**{value}**" if standing.rank == 1 else f"*{value}*" if standing.tied else value
            cells.setdefault(standing.optimizer, {})[result.goal.workload] = marked
    names = [result.goal.workload for result in comparison.results]
    head = ["optimizer", *(f"{r.goal.workload}{' %' * r.goal.percent}" for r in comparison.results)]
    return _markdown(
        head, ([name, *(cells.get(name, {}).get(w, "diverged") for w in names)] for name in _order(comparison))
    )


def _rates(comparison: Comparison) -> str:
    places = _places(comparison)
    names = [result.goal.workload for result in comparison.results]
    rows = ([name, *(_rate(own[w]) if w in own else "" for w in names)] for name, own in places.items())
    return _markdown(["optimizer", *names], rows)


def _rate(standing: Standing) -> str:
    """The best one; with a sign where the next was not tried."""
    sign = {"smallest": " ≤", "largest": " ≥", None: ""}[standing.edge]
    return f"{standing.best.lr:g}{sign}" if standing.best.finished else "diverged"


def _ranking(result: Result) -> str:
    """As `schuss compare` prints it, without times, which were taken two at once."""
    head, rows = header(result.goal), table(result.standings)
    kept = [i for i, title in enumerate(head) if not title.startswith(("ms ", "s to"))]
    titles = [head[i].replace("\n", " ") for i in kept]
    return _markdown(titles, ([row[i] for i in kept] for row in rows), left=2)


def _rows(results: Iterable[Result]) -> Iterable[dict[str, object]]:
    """A row for each optimizer on each workload, at its best rate."""
    for result in results:
        for standing in result.standings:
            trial, goal = standing.best, result.goal
            finished = trial.finished
            steps = trial.steps_to_target if finished else math.inf
            yield {
                "workload": goal.workload,
                "metric": goal.metric,
                "rank": standing.rank,
                "optimizer": standing.optimizer,
                "lr": trial.lr,
                "edge": standing.edge or "",
                "rates": len(standing.trials),
                "seeds": len(trial.runs),
                "mean": f"{trial.score.value:.7g}" if finished else "",
                "standard_error": f"{trial.score.error:.3g}" if finished else "",
                "p": "" if standing.p is None else f"{standing.p:.3g}",
                "steps_to_target": f"{steps:g}" if math.isfinite(steps) else "",
                "reached": trial.reached,
                "diverged": trial.count("diverged"),
            }


def _picture(comparison: Comparison) -> go.Figure:
    """Places by optimizer and workload, those that are not told apart from the first in bold."""
    places, names = _places(comparison), [result.goal.workload for result in comparison.results]
    order = [*places][::-1]
    z = [[places[name][w].rank if w in places[name] else None for w in names] for name in order]
    text = [
        [f"<b>{places[n][w].rank}</b>" if _is_near(places[n][w]) else str(places[n][w].rank) for w in names]
        for n in order
    ]
    figure = go.Figure(
        go.Heatmap(
            z=z, x=names, y=order, text=text, texttemplate="%{text}", textfont={"size": 11}, xgap=2, ygap=2,
            colorscale=[[0, "#2f6fed"], [0.35, "#a9c4f5"], [1, "#f3f4f6"]], showscale=False,
        )
    )  # fmt: skip
    figure.update_layout(
        template="none", width=900, height=90 + 20 * len(order), margin={"l": 140, "r": 52, "t": 80, "b": 8},
        font={"family": "sans-serif", "size": 12, "color": "#1e2430"}, paper_bgcolor="#ffffff",
        xaxis={"side": "top", "tickangle": -30},
    )  # fmt: skip
    return figure
