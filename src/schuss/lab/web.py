"""What the pages of the lab share: style, script, colours of optimizers, and how figures look on them."""

import math
from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

# Dark enough for a line of two pixels on white, light enough on a dark page.
COLOURS = ("#2f6fed", "#f07c12", "#0f9d58", "#e11d48", "#8b5cf6", "#0b8793", "#b7791f", "#64748b")

CONFIG: Mapping[str, Any] = {"responsive": True, "displayModeBar": False}
"""Of Plotly."""

LAYOUT: Mapping[str, Any] = {
    "template": "none",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hovermode": "closest",
    "font": {"family": "system-ui, sans-serif", "size": 12},
}
"""Of a figure; the page's script adds the colours of its theme."""


def filled(package: str, page: str, *, made_by: str, title: str, **words: object) -> str:
    """A page of a package, with what the pages share, and `words`, which are HTML, in their places.

    Args:
        package, page: where its text is.
        made_by: the subcommand, by which a page is known again.
        title: HTML too.
        words: the others.
    """
    style, script = (_text("schuss.lab", f"web.{suffix}") for suffix in ("css", "js"))
    head = Template(_text("schuss.lab", "web.html")).substitute(title=title, command=made_by, style=style)
    return Template(_text(package, page)).substitute(words, head=head, title=title, script=script)


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def named(i: int, name: str) -> str:
    """A name after a dot of its colour."""
    return f'<i style="background:{colour(i)}"></i>{escape(name)}'


def log_ticks(decades: float) -> dict[str, Any]:
    """Of an axis that spans so many powers of ten."""
    if decades <= 3:
        return {"dtick": "D2", "tickformat": "~g"}  # at 1, 2 and 5 of each power, written out
    return {"dtick": math.ceil(decades / 7), "exponentformat": "power"}


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
