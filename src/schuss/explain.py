"""What one optimizer is, on a page: its formula, what each hyperparameter does, when it is right, its cost and trap.

What `schuss explain` prints. The formula is read from the rule, hyperparameters from the constructor and its docstring,
bytes from a plan, and the advice from the optimizer's section of docs/optimizers.md, which is part of the package.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from schuss import describe, optim
from schuss.rule import ENGINE_KEYS

ADVICE = ("When", "When not", "Traps", "Learning rates")
"""The paragraphs of a section that are advice, by how they begin."""
_SIDE = 1024


@dataclass(frozen=True)
class Hyperparameter:
    """An argument of an optimizer's constructor.

    Args:
        name: of the argument.
        default: as Python writes it; "" if it has none.
        meaning: what the docstring says of it.
    """

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Explanation:
    """What is to be said about an optimizer.

    Args:
        name: of its class.
        summary: in a line.
        formula: as mathematics, in text; "" for a method that has none.
        hyperparameters: but for those that all optimizers share.
        shared: names of the arguments that all share.
        advice: Markdown by the words of `ADVICE`; empty for an optimizer that schuss does not know.
        state: bytes of state per element of a large float32 matrix, or of a vector if it takes no matrix; None if that
            is not the same for all elements.
        traffic: bytes that a step reads and writes per element, likewise.
        source: authors, year, arXiv id.
    """

    name: str
    summary: str
    formula: str
    hyperparameters: tuple[Hyperparameter, ...]
    shared: tuple[str, ...]
    advice: Mapping[str, str]
    state: float | None
    traffic: float | None
    source: str

    def to_markdown(self) -> str:
        """All of it as a page of Markdown."""
        formula = [f"```text\n{self.formula}\n```"] if self.formula else []
        return "\n\n".join([self.head, *formula, self.body]) + "\n"

    @property
    def head(self) -> str:
        """What comes before the formula, in Markdown."""
        return f"# {self.name}\n\n{self.summary}"

    @property
    def body(self) -> str:
        """What comes after it."""
        rows = [f"| `{h.name}` | {f'`{h.default}`' if h.default else ''} | {h.meaning} |" for h in self.hyperparameters]
        parts = ["\n".join(["| hyperparameter | default | what it is |", "|---|---|---|", *rows])]
        if self.shared:
            parts.append(f"Beside these, what all optimizers take: {', '.join(self.shared)}.")
        parts += [f"**{word}.** {text}" for word, text in self.advice.items()]
        parts.append(f"**Cost.** {self.cost}")
        parts.append(f"**Source.** {self.source}")
        return "\n\n".join(parts)

    @property
    def cost(self) -> str:
        """Memory and traffic in words."""
        if self.state is None or self.traffic is None:
            return "Twice history_size vectors as long as all parameters together, and whatever the closure takes."
        floor = 12  # of a step without state: p and g are read, p is written
        return (
            f"{self.state:.4g} bytes of state per float32 element, and {self.traffic:.4g} bytes read and written in a "
            f"step, where plain SGD moves {floor}."
        )


def explain(name: str) -> Explanation:
    """What is to be said about the optimizer called `name`, of schuss or, as `module:Class`, of anybody.

    Raises:
        ValueError: there is none, or it is no schuss optimizer.
    """
    known: dict[str, Any] = {cls.__name__: cls for cls in optim.OF_ANOTHER_KIND}
    cls = known[name] if name in known else describe.find(name)
    has_formula = not issubclass(cls, optim.LBFGS)
    state = traffic = None
    if has_formula:
        state, traffic = _cost(cls)
    meanings = _meanings(cls)
    arguments = {k: v for k, v in inspect.signature(cls).parameters.items() if k != "params"}
    own = [k for k, v in arguments.items() if k not in _SHARED and v.kind is not v.VAR_KEYWORD]
    return Explanation(
        name=cls.__name__,
        summary=describe.summary(cls),
        formula="\n\n".join(describe.written(cls, {})) if has_formula else "",
        hyperparameters=tuple(
            Hyperparameter(k, "" if (default := arguments[k].default) is inspect.Parameter.empty else repr(default),
                           meanings.get(k, ""))
            for k in own
        ),
        shared=tuple(k for k, v in arguments.items() if k not in own),
        advice=_advice(cls.__name__) if ":" not in name else {},
        state=state,
        traffic=traffic,
        source=cls.source,
    )  # fmt: skip


_SHARED = {*ENGINE_KEYS} - {"decoupled_weight_decay"}


def _cost(cls: type[Any]) -> tuple[float, float]:
    """Bytes of state and of traffic per element."""
    optimizer, p = describe.example(cls, {}, side=_SIDE)
    plan = optimizer.plan()
    return plan.state_bytes / p.numel(), plan.traffic_bytes / p.numel()


def _meanings(cls: type) -> dict[str, str]:
    """What the docstring of an optimizer says of each argument, in a line each."""
    text = inspect.getdoc(cls) or ""
    _, _, arguments = text.partition("\nArgs:\n")
    found: dict[str, str] = {}
    for entry in re.findall(r"^    (\S.*(?:\n {8,}.*)*)", arguments.split("\n\n")[0], flags=re.MULTILINE):
        names, _, meaning = " ".join(entry.split()).partition(": ")
        for name in names.split(", "):
            found[name] = meaning
    for name, meaning in found.items():
        if other := re.fullmatch(r"as for `(\w+)`\.", meaning):
            found[name] = _meanings(getattr(optim, other[1])).get(name, meaning)
    return found


def _advice(name: str) -> dict[str, str]:
    """The paragraphs of advice of an optimizer's section, without the words that they begin with."""
    section = _sections().get(name, "")
    found: dict[str, str] = {}
    for paragraph in section.split("\n\n"):
        # When and when not share a paragraph.
        for word, text in re.findall(r"\*([A-Z][a-z ]+)\.\*\s+(.*?)(?=\s\*[A-Z][a-z ]+\.\*\s|\Z)", _joined(paragraph)):
            word = {"Trap": "Traps"}.get(word, word)
            if word in ADVICE:
                text = re.sub(r"\[([^\]]+)\]\(#[^)]+\)", r"\1", text)
                text = re.sub(r"\[([^\]]+)\]\(([\w-]+\.md)[^)]*\)", r"\1 (docs/\2)", text)
                found[word] = re.sub(":$", ".", text)  # the example that follows is left out
    return {word: found[word] for word in ADVICE if word in found}


def _joined(paragraph: str) -> str:
    return " ".join(paragraph.split())


@cache
def _sections() -> dict[str, str]:
    """The sections of the page about optimizers, by heading."""
    page = files("schuss").joinpath("optimizers.md")
    text = (page if page.is_file() else Path(__file__).parents[2] / "docs" / "optimizers.md").read_text("utf-8")
    return {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
