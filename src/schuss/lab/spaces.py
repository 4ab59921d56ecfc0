"""What `tune` varies, and from where to where: one table of ranges with their sources, and how settings are read."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from schuss.bounds import nearest

__all__ = ["TABLE", "Range", "Space", "limits", "space", "table"]

OWN = "a choice of schuss"
GIVEN = "given"
ALGOPERF = "AlgoPerf, Dahl et al. 2023, arXiv:2306.07179"
ANY = "any other"


@dataclass(frozen=True)
class Range:
    """A hyperparameter and the interval in which it is searched, evenly on the logarithm.

    Args:
        name: the argument of the constructor, or `1-beta1`, `1-momentum`: the distance of an average from 1.
        low: in (0, inf).
        high: in (low, inf).
        source: who says so.
        optimizers: names of classes, separated by commas.
    """

    name: str
    low: float
    high: float
    source: str = OWN
    optimizers: str = ANY

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"tune: the range of {self.name} must be 0 < low < high, got {self.low:g}:{self.high:g}")
        if self.name.startswith("1-") and self.high >= 1:
            raise ValueError(f"tune: the range of {self.name} must end below 1, got {self.high:g}")

    @property
    def floor(self) -> float:
        """How far it may be extended downwards. Where a decay or an epsilon is lowest it already does nothing."""
        return self.low if self.name in ("weight_decay", "eps") else 1e-6 if self.name.startswith("1-") else 0.0

    @property
    def ceiling(self) -> float:
        """How far it may be extended upwards."""
        return max(self.high, 0.9) if self.name.startswith("1-") else math.inf

    def at(self, part: float) -> float:
        """The value at a part in [0, 1] of the way, on the logarithm."""
        return float(min(max(self.low * (self.high / self.low) ** part, self.low), self.high))

    def where(self, value: float) -> float:
        """The part of the way at which a value is."""
        return math.log(value / self.low) / math.log(self.high / self.low)


_ADAM_LIKE = (
    "AdamW, Adam, NAdam, NAdamW, Adamax, ADOPT, AdaBelief, AdEMAMix, LaProp, StableAdamW, MARS, LAMB, SparseAdam"
)
_L2 = "Adam, NAdam, RAdam, Adamax, ADOPT, Adagrad, Adadelta, RMSprop, ASGD"

# The first row that names a class counts; classes of torch.optim have the rows of their namesakes.
TABLE: tuple[Range, ...] = (
    Range("lr", 1e-4, 1e-1, f"{ALGOPERF}: 1e-4 to 1e-2; small networks want up to ten times more", _ADAM_LIKE),
    Range("lr", 1e-3, 1.0, "Liu et al. 2020, arXiv:1908.03265: 0.003 to 0.1", "RAdam"),
    Range("lr", 1e-2, 5.0, f"{ALGOPERF}, Nesterov: 0.02 to 5", "SGD, ASGD"),
    Range("lr", 1e-5, 3e-2, "Chen et al. 2023, arXiv:2302.06675: 3 to 10 times less than AdamW", "Lion, Signum"),
    Range("lr", 5e-4, 0.5, "the authors' README: 5 to 10 times AdamW's; Xie et al. 2022, arXiv:2208.06677", "Adan"),
    Range("lr", 0.1, 250.0, "the authors' README: 10 to 50 times SGD's; Defazio et al. 2024, arXiv:2405.15682",
          "ScheduleFreeSGD"),
    Range("lr", 1e-4, 1.0, "the authors' README: 1 to 10 times AdamW's; Defazio et al. 2024, arXiv:2405.15682",
          "ScheduleFreeAdamW, ScheduleFreeRAdam"),
    Range("lr", 0.5, 2.0, "the authors: leave it at 1; Mishchenko, Defazio 2023, arXiv:2306.06101", "Prodigy"),
    Range("lr", 2e-3, 0.2, "Jordan 2024: 0.02", "Muon, NorMuon"),
    Range("lr", 1e-4, 1e-1, "Liu et al. 2025, arXiv:2502.16982: as AdamW's", "Muon(match_rms_adamw), "
          "NorMuon(match_rms_adamw)"),
    Range("lr", 1e-4, 1e-1, f"{ALGOPERF}: 1e-4 to 1e-2; Vyas et al. 2024, arXiv:2409.11321: 3e-3", "SOAP, Shampoo"),
    Range("lr", 1e-4, 1e-1, f"{ALGOPERF}: 1e-4 to 1e-2", "Adafactor"),
    Range("lr", 1e-3, 1.0, OWN, "Adagrad"),
    Range("lr", 1e-5, 1e-1, OWN, "RMSprop"),
    Range("lr", 1e-2, 10.0, OWN, "Adadelta"),
    Range("lr", 1e-1, 30.0, OWN, "LARS"),
    Range("lr", 1e-4, 1e-1, OWN, "Rprop"),
    Range("weight_decay", 1e-7, 1e-3, f"{ALGOPERF}, Nesterov: 1e-7 to 5e-5", "SGD, LARS, ScheduleFreeSGD"),
    Range("weight_decay", 1e-6, 1e-2, f"{OWN}: it is added to the gradient", _L2),
    Range("weight_decay", 1.5e-2, 10.0, "Chen et al. 2023, arXiv:2302.06675: 3 to 10 times AdamW's", "Lion, Signum"),
    Range("weight_decay", 5e-3, 1.0, ALGOPERF),
    Range("1-beta1", 1e-2, 0.3, f"{ALGOPERF}, Shampoo: 0.01 to 0.15", "SOAP, Shampoo, ScheduleFreeAdamW"),
    Range("1-beta1", 4e-3, 0.3, f"{ALGOPERF}: 0.004 to 0.1"),
    Range("1-momentum", 5e-3, 0.3, OWN),
    Range("eps", 1e-16, 1e-4, OWN, "AdaBelief, LaProp"),
    Range("eps", 1e-10, 1e-4, OWN, _ADAM_LIKE + ", RAdam, Adan, ScheduleFreeAdamW, RMSprop, Adagrad"),
    Range("1-beta2", 1e-4, 0.1, "Semenov et al. 2025, arXiv:2509.01440: 0.0001 to 0.01; larger in short trainings"),
    Range("1-beta3", 1e-5, 0.1, OWN),
    Range("1-alpha", 1e-3, 0.3, OWN, "RMSprop"),
    Range("1-rho", 1e-3, 0.3, OWN, "Adadelta"),
)  # fmt: skip
"""Ranges that `tune` searches unless it is told others."""

STAGES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (0, ("lr",)),
    (10, ("1-beta1", "1-momentum", "1-alpha", "1-rho")),
    (25, ("weight_decay", "eps")),
    (50, ("1-beta2", "1-beta3")),
)
"""From how many trials on what is tuned. Google's tuning playbook, 2023: below 10 trials the rate, from 10 also β1,
from 25 also ε, with many more also β2. The weight decay has been put beside ε."""


@dataclass(frozen=True)
class Space:
    """What is varied of an optimizer, and all else that it is built with.

    Args:
        cls: the optimizer's class, or a function that builds it.
        ranges: of what is varied, by name, lr first.
        fixed: arguments of the constructor, lr among them if it is not varied.
    """

    cls: Callable[..., Any]
    ranges: Mapping[str, Range]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, values: Mapping[str, float]) -> dict[str, Any]:
        """The arguments of the constructor at a point of the space, rounded so that they can be printed in full."""
        found = dict(self.fixed)
        for name, value in values.items():
            if not name.startswith("1-"):
                found[name] = float(f"{value:.4g}")
                continue
            target, average = name.removeprefix("1-"), round(1 - float(f"{value:.3g}"), 15)
            if (place := _place(self.cls, target)) is None:
                found[target] = average
            else:
                betas = list(found.get("betas", _defaults(self.cls)["betas"]))
                betas[place] = average
                found["betas"] = tuple(betas)
        return dict(sorted(found.items(), key=lambda item: item[0] != "lr"))

    def default(self) -> dict[str, Any] | None:
        """The arguments with nothing tuned, lr among them; None if the class has no default lr."""
        lr = self.fixed.get("lr", _defaults(self.cls).get("lr"))
        return None if lr is None else {**self.fixed, "lr": float(lr)}


def space(
    cls: Callable[..., Any],
    *,
    trials: int,
    arguments: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    names: Sequence[str] | None = None,
) -> Space:
    """What to vary of an optimizer, and where.

    Args:
        cls: the optimizer's class.
        trials: how many there will be, which decides what is varied.
        arguments: what it is built with besides; a setting counts more.
        settings: what is fixed: arguments of the constructor, or one of its `betas` as `beta1`.
        ranges: (low, high) instead of those of the table; `beta1` means `1-beta1`. What is named here is varied.
        names: what is varied, instead of what the number of trials says.

    Raises:
        ValueError: an unknown name, one that is both fixed and varied, a range that is none, or nothing to vary.
    """
    known, defaults = _known(cls), _defaults(cls)
    fixed = dict(arguments or {})
    for name, value in (settings or {}).items():
        if (place := _place(cls, name)) is not None:
            betas = list(fixed.get("betas", defaults["betas"]))
            betas[place] = value
            fixed["betas"] = tuple(betas)
        elif name in defaults or name in _open(cls):
            fixed[name] = value
        else:
            raise ValueError(f"tune: {_name(cls)} has no {name!r} to set: {nearest(name, _open(cls) or defaults)}")
    held = {_search_name(name, known) for name in settings or ()}
    if "betas" in held:
        held |= {name for name in known if name.startswith("1-beta") and _place(cls, name[2:]) is not None}
    given = {_search_name(name, known): pair for name, pair in (ranges or {}).items()}
    given = {name: _limits(name, pair, ranges or {}) for name, pair in given.items()}
    if names is not None:
        wanted = {_search_name(name.strip(), known) for name in names}
    else:
        wanted = {name for begin, some in STAGES if trials >= begin for name in some if name in known} - held
        wanted = {
            name
            for name in wanted
            if not (name == "1-momentum" and not fixed.get("momentum", defaults.get("momentum")))
        }
    wanted |= given.keys()
    for name in sorted(wanted):
        if name not in known:
            raise ValueError(f"tune: {_name(cls)} has no {name!r} to tune: {nearest(name, known)}")
        if name in held:
            raise ValueError(f"tune: {name} is both fixed and tuned; leave out one of them")
    if "lr" not in known and "lr" not in fixed:
        raise ValueError(
            f"tune: {_name(cls)} takes no lr; give it an argument of this name, which is the learning rate"
        )
    if not wanted:
        raise ValueError(f"tune: nothing is left to tune of {_name(cls)}; name something, as in --tune lr")
    chosen = {}
    for name in known:
        if name in wanted:
            found = _row(cls, name, fixed)
            chosen[name] = (
                replace(found, low=given[name][0], high=given[name][1], source=GIVEN) if name in given else found
            )
    return Space(cls, chosen, fixed)


def limits(texts: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Ranges from texts such as "lr=1e-4:1e-1".

    Raises:
        ValueError: one is something else.
    """
    found = {}
    for text in texts:
        name, _, interval = text.partition("=")
        low, _, high = interval.partition(":")
        try:
            found[name.strip()] = float(low), float(high)
        except ValueError:
            raise ValueError(f"--range must be like lr=1e-4:1e-1, got {text!r}") from None
    return found


def table(rows: Iterable[Range] = TABLE) -> str:
    """The ranges as text, one a line."""
    cells = [(row.name, f"{row.low:g}", f"{row.high:g}", row.optimizers, row.source) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {low:>{widths[1]}} to {high:<{widths[2]}}  {optimizers}\n{'':{widths[0]}}  {source}"
        for name, low, high, optimizers, source in cells
    )


def _name(cls: Callable[..., Any]) -> str:
    return getattr(cls, "__name__", type(cls).__name__)


def _defaults(cls: Callable[..., Any]) -> dict[str, Any]:
    """Named arguments but the first, which are the parameters, with their defaults; None for those that have none."""
    named = list(inspect.signature(cls).parameters.items())[1:]
    return {
        name: None if argument.default is argument.empty else argument.default
        for name, argument in named
        if argument.kind not in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL)
    }


def _open(cls: Callable[..., Any]) -> tuple[str, ...]:
    """Arguments that every optimizer of schuss takes, if this is one."""
    from schuss.optimizer import Optimizer
    from schuss.options import Options

    return (*_defaults(cls), *Options.__annotations__) if isinstance(cls, type) and issubclass(cls, Optimizer) else ()


def _place(cls: Callable[..., Any], name: str) -> int | None:
    """Which of the betas `beta2` is, if they are one argument."""
    betas = _defaults(cls).get("betas")
    number = name.removeprefix("beta")
    if name.startswith("beta") and number.isdecimal() and isinstance(betas, tuple) and 1 <= int(number) <= len(betas):
        return int(number) - 1
    return None


def _known(cls: Callable[..., Any]) -> tuple[str, ...]:
    """What can be tuned of a class, in the order in which it matters."""
    defaults = _defaults(cls)

    def has(name: str) -> bool:
        target = name.removeprefix("1-")
        if target != name and _place(cls, target) is not None:
            return True
        default = defaults.get(target)
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        required = target == "lr" and target in defaults
        return (number or required) and (name == "lr" or _listed(cls, name, {}) is not None)

    return tuple(name for _, some in STAGES for name in some if has(name))


def _listed(cls: Callable[..., Any], name: str, fixed: Mapping[str, Any]) -> Range | None:
    kind = _name(cls)
    if fixed.get("adjust_lr_fn") == "match_rms_adamw":
        kind += "(match_rms_adamw)"
    if name == "weight_decay" and fixed.get("decoupled_weight_decay"):
        kind = ANY
    rows = [row for row in TABLE if row.name == name]
    for wanted in (kind, ANY):
        for row in rows:
            if wanted in row.optimizers.split(", "):
                return row
    return None


def _row(cls: Callable[..., Any], name: str, fixed: Mapping[str, Any]) -> Range:
    if (row := _listed(cls, name, fixed)) is not None:
        return row
    lr = _defaults(cls)["lr"]
    if not lr:
        return replace(TABLE[0], optimizers=_name(cls))
    low, high = float(f"{lr / 30:.1g}"), float(f"{30 * lr:.1g}")
    return Range("lr", low, high, "thirty times less and more than its default", _name(cls))


def _search_name(name: str, known: Iterable[str]) -> str:
    return f"1-{name}" if f"1-{name}" in known else name


def _limits(name: str, pair: tuple[float, float], ranges: Mapping[str, Any]) -> tuple[float, float]:
    """Those of `1-beta1` if those of `beta1` were given."""
    low, high = pair
    return (low, high) if name in ranges else (round(1 - high, 15), round(1 - low, 15))
