"""Which parameters of a model are its hidden matrices, and what the others are."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from schuss.training.parameters import (
    BARE,
    LISTS,
    NO_DECAY,
    Leaf,
    Match,
    is_embedding,
    is_known,
    select,
    several,
    text_of,
)

__all__ = ["Role", "roles"]

Role = Literal["matrix", "head", "embedding", "norm", "bias", "vector", "other"]
"""What a parameter is: the weight of a hidden layer, as a matrix or a convolution kernel; the weight of an output
layer; in an embedding; in a norm; a bias; a vector or a scalar, or what has one row or one column; or a tensor of more
dimensions that belongs to no layer, as position embeddings and stacked experts."""

_HEAD = re.compile(r"(?:\w+_)?(?:head|classifier|unembed|unembedding)|score|embed_out")
"""Names of output layers."""


def roles(
    model: nn.Module, leaves: Sequence[Leaf], heads: Match | Iterable[Match] | None
) -> dict[Leaf, tuple[Role, str]]:
    """What each parameter is, and why, as far as its module does not say it.

    Args:
        model: whose.
        leaves: its parameters.
        heads: which belong to output layers, or None to find them: by their names, outside of blocks; or else the last
            layer, if it is in no block. A weight that is shared with an embedding is neither looked for nor found.
    """
    found: dict[Leaf, tuple[Role, str]] = {leaf: (_role(leaf), "") for leaf in leaves}
    if heads is None:
        output = _heads(model, [leaf for leaf in leaves if found[leaf][0] == "matrix"], _is_tied(leaves))
    else:
        output = {leaf: f"heads {text_of(m)}" for m in several(heads) for leaf in select(m, leaves, "heads")}
    for leaf, (role, _) in found.items():
        if leaf in output and role in ("matrix", "other"):
            found[leaf] = "head", output[leaf]
        elif role == "other":
            found[leaf] = role, "no weight of a layer"
        elif role == "matrix" and min(_sides(leaf)) == 1:
            found[leaf] = "vector", "one row or column"
    return found


def _role(leaf: Leaf) -> Role:
    """What a parameter is; an embedding or in a norm if it is that in any of its places."""
    found = [_role_there(*place, own=leaf.parameter.dim()) for place in leaf.roles]
    return next((role for role in found if role in ("embedding", "norm")), found[0])


def _role_there(module: nn.Module, name: str, dimensions: int, own: int) -> Role:
    known = is_known(module)
    if is_embedding(module) or (not known and dimensions > 1 and "embed" in type(module).__name__.lower()):
        return "embedding"
    if isinstance(module, NO_DECAY):
        return "norm"
    if "bias" in name.split("_") and (known or own < 2):
        return "bias"
    if own < 2:
        return "vector"
    # Flattening what has three dimensions would mix experts that have nothing to do with each other.
    return "matrix" if known or (name == "weight" and own == 2) else "other"


def _sides(leaf: Leaf) -> tuple[int, int]:
    """Rows and columns of a weight, with all but the first dimension as one."""
    p = leaf.parameter
    return p.shape[0], p.numel() // max(p.shape[0], 1)


def _is_tied(leaves: Sequence[Leaf]) -> bool:
    """Whether the table of an embedding is an output layer, too."""
    return any(len({is_embedding(module) for module, _, _ in leaf.roles}) > 1 for leaf in leaves)


def _heads(model: nn.Module, weights: Sequence[Leaf], tied: bool) -> dict[Leaf, str]:
    """The weights of output layers, and why."""
    modules = dict(model.named_modules(remove_duplicate=False))
    named: dict[str, tuple[Leaf, str]] = {}
    for leaf in weights:
        path = _path(leaf)
        for i, part in enumerate(path, start=1):
            if _HEAD.fullmatch(part) and not _is_in_block(modules, path[:i]):
                named[".".join(path[:i])] = leaf, f"head, by the name {part}"  # of several in it, the last one
                break
    if named or tied or not weights:
        return dict(named.values())
    last = weights[-1]
    is_weight = last.roles[0][1] == "weight"
    return {last: "head, the last layer"} if is_weight and not _is_in_block(modules, _path(last)) else {}


def _path(leaf: Leaf) -> list[str]:
    """The names that lead to the module that a parameter is the weight of."""
    path = leaf.names[0].split(".")[:-1]
    return path[: path.index("parametrizations")] if "parametrizations" in path else path


def _is_in_block(modules: Mapping[str, nn.Module], path: Sequence[str]) -> bool:
    """Whether a module is inside of one that stands in a list of its like."""
    chain = [modules[".".join(path[:i])] for i in range(len(path))]
    return any(
        isinstance(parent, LISTS)
        and type(child) not in BARE
        and (isinstance(parent, nn.ModuleList) or sum(type(other) is type(child) for other in parent.children()) > 1)
        for parent, child in pairwise(chain)
    )
