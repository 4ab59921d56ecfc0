"""A plan as text."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from schuss.engine.plan import Entry

_SHOWN = 24  # tensors of the fastest path beyond these are summed up; all others are named


def render(
    owner: str, entries: "Sequence[Entry]", state_bytes: int, traffic_bytes: int, *, storage: bool = False
) -> str:
    """The table that `print(optimizer.plan())` shows; with `storage`, what each tensor's state is stored as."""
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
    rows = [("tensor", "shape", "dtype", *(("state",) if storage else ()), "back end", "why")]
    for e in entries:
        if id(e) in named:
            shape = "x".join(map(str, e.p.shape)) or "scalar"
            stored = (_stored(e),) if storage else ()
            rows.append(
                (e.name, shape, str(e.p.dtype).removeprefix("torch."), *stored, e.route.backend, e.route.reason)
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if len(fast) > _SHOWN:
        lines.append(f"  ... and {_count(len(fast) - _SHOWN, 'more tensor')} by {fast[0].route.backend}")
    return "\n".join(lines)


def _stored(e: "Entry") -> str:
    """What the states are stored as, once if all alike."""
    texts = {name: f"{storage.dtype}".removeprefix("torch.") for name, (storage, _) in e.stored.items()}
    texts = {name: "int8" if text == "uint8" else text for name, text in texts.items()}
    alike = len(set(texts.values())) == 1
    text = next(iter(texts.values())) if alike else ", ".join(f"{name} {text}" for name, text in texts.items())
    why = next((why for _, why in e.stored.values() if why), "")
    return f"{text} ({why})" if why else text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"
