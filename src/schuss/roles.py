"""Matrices apart from the rest, in words that optimizers for matrices alone can use."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from schuss.bounds import Interval

MATRICES, OTHERS = "matrices", "others"
"""The two parts of a model that `param_groups(model, matrices=...)` tells apart, as their groups name them."""


def takes_matrices_only(optimizer: type) -> bool:
    """Whether an optimizer has a meaning for matrices alone: one of schuss says so, and torch has Muon."""
    dimensions = getattr(optimizer, "dimensions", None)
    if isinstance(dimensions, str):
        return Interval.parse(dimensions).low >= 2
    return any(cls.__name__ == "Muon" for cls in optimizer.__mro__)


def check_matrices(owner: str, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise if parameters of fewer than two dimensions are among those of an optimizer for matrices.

    Args:
        owner: the optimizer, for the message.
        groups: as a user gives them, or as an optimizer keeps them.

    Raises:
        ValueError: there are some; it says which, and where they belong.
    """
    check_dimensions(owner, [pair for i, group in enumerate(groups) for pair in names_of(group, i)], "[2, inf)")


def check_dimensions(owner: str, named: Sequence[tuple[str, torch.Tensor]], dimensions: str) -> None:
    """Raise if parameters have other numbers of dimensions than an optimizer is for.

    Args:
        owner: the optimizer, for the message.
        named: its parameters with their names.
        dimensions: the interval of these numbers.

    Raises:
        ValueError: there are some; it says which, and where they belong.
    """
    allowed = Interval.parse(dimensions)
    wrong = [(name, p) for name, p in named if p.dim() not in allowed]
    if not wrong:
        return
    told = ", ".join(f"{name} {tuple(p.shape)}" for name, p in wrong[:5])
    told += f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    count = f"{len(wrong)} of {len(named)}"
    if allowed.low >= 2 and any(p.dim() < 2 for _, p in wrong):
        raise ValueError(
            f"{owner}: its parameters must be matrices, of two dimensions{' or more' * (allowed.high > 2)}; {count} "
            f"are not: {told}. They belong to another optimizer, as embeddings and output heads do: "
            f"groups = schuss.param_groups(model, {MATRICES}={{...}}) tells them apart, and schuss.Combined.of(groups, "
            f"{MATRICES}=optim.Muon, {OTHERS}=optim.AdamW) steps both"
        )
    raise ValueError(
        f"{owner}: the number of dimensions of its parameters must be in {dimensions}; {count} have another: {told}. "
        "Give them to another optimizer" + (": Muon takes kernels of convolutions" if allowed.high == 2 else "")
    )


def names_of(group: Mapping[str, Any], index: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A group's parameters with their names, or with words for those that have none."""
    given = group["params"]
    names = group.get("param_names")
    for i, p in enumerate([given] if isinstance(given, torch.Tensor) else given):
        if isinstance(p, tuple):
            yield p
        else:
            yield names[i] if names else f"parameter {i} of group {index}", p
