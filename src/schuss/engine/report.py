"""A plan as text."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from schuss.engine.plan import Entry

_SHOWN = 24  # tensors of the fastest path beyond these are summed up; all others are named


def render(owner: str, entries: "Sequence[Entry]", state_bytes: int, traffic_bytes: int) -> str:
    """The table that `print(optimizer.plan())` shows."""
    elements = sum(e.p.numel() for e in entries)
    groups = len({e.group for e in entries})
    per_element = f" ({state_bytes / elements:.1f} bytes per element)" if elements else ""
    backends = ", ".join(f"{name} {count}" for name, count in Counter(e.route.backend for e in entries).most_common())
    lines = [
        f"{owner}: {_count(len(entries), 'tensor')} with {_count(elements, 'element')} in {_count(groups, 'group')}",
        f"  back ends  {backends}",
        f"  state      {_bytes(state_bytes)}{per_element}",
        f"  traffic    {_bytes(traffic_bytes)} per step",
    ]
    fast = [e for e in entries if not e.route.reason]
    named = {id(e) for e in fast[:_SHOWN]} | {id(e) for e in entries if e.route.reason}
    rows = [("tensor", "shape", "dtype", "back end", "why")]
    for e in entries:
        if id(e) in named:
            shape = "x".join(map(str, e.p.shape)) or "scalar"
            rows.append((e.name, shape, str(e.p.dtype).removeprefix("torch."), e.route.backend, e.route.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if len(fast) > _SHOWN:
        lines.append(f"  ... and {_count(len(fast) - _SHOWN, 'more tensor')} by {fast[0].route.backend}")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"
