"""What the texts of CPU and GPU kernels have in common."""

import re
import textwrap
from collections.abc import Collection, Mapping, Sequence

import torch

from schuss.engine.storage import Storage


def call(word: str, args: Sequence[str]) -> str:
    """A call of a word of the vocabulary."""
    return f"{word}({', '.join(args)})"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as it is written without torch."""
    return str(dtype).removeprefix("torch.")


def wrapped(text: str, indent: str = "") -> list[str]:
    """A sentence, or a statement with brackets, in lines of a readable length.

    Args:
        text: in one line; a no-break space keeps together what belongs together, and is written as a space.
        indent: before all lines but the first.
    """
    lines = textwrap.wrap(text, 108, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def listed(stored: Mapping[str, Storage]) -> str:
    """What is stored, and as what, for `wrapped`: `p: float32, g: float32`."""
    return ", ".join(f"{name}: {storage}".replace(" ", "\xa0") for name, storage in stored.items())


def indented(statements: Sequence[str]) -> list[str]:
    """Statements as the body of something."""
    return [f"    {statement}" for statement in statements]


def safe_names(names: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """What the letters and scalars of a rule are called in a kernel: themselves, unless the kernel has the name.

    Args:
        names: the letters and scalars.
        taken: names that the kernel's text has for itself; it also ends names in an underscore and in _PARTS.
    """
    safe: dict[str, str] = {}
    for name in names:
        new = name
        while new in taken or new in safe.values() or _PARTS.fullmatch(new):
            new = f"v_{new}_0"
        safe[name] = new
    return safe


_PARTS = re.compile(r"t\d+|.*_|.*_(new|rest|bits|values|absmax|top|scale|inverse|at)")
