"""What the texts of CPU and GPU kernels have in common."""

import re
from collections.abc import Collection, Sequence

import torch


def call(word: str, args: Sequence[str]) -> str:
    """A call of a word of the vocabulary."""
    return f"{word}({', '.join(args)})"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as it is written without torch."""
    return str(dtype).removeprefix("torch.")


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
