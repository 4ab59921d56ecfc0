"""The parameters of a model, each once: what it is in, and which of them are meant."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

NO_DECAY: tuple[type[nn.Module], ...] = (
    _NormBase,  # BatchNorm and InstanceNorm of all dimensions, and SyncBatchNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
)
"""Modules none of whose parameters decay."""

Match = str | type[nn.Module] | nn.Module | torch.Tensor | Callable[[str, nn.Parameter], bool]
"""Which parameters are meant: a regular expression for whole parts of the dotted name ("head" means head.weight and
model.head.bias, not overhead.weight); all in modules of a type; all in a module; a parameter; or those for which a
function of name and parameter is true."""

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
BARE = {nn.Module, *LISTS, nn.ParameterList, nn.ParameterDict}
"""Types of torch that do not say what a parameter of theirs is for."""


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter, by what matches know of it."""

    names: tuple[str, ...]
    parameter: nn.Parameter = field(repr=False)
    modules: tuple[nn.Module, ...] = field(repr=False)


# --- what a parameter is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Leaf(Member):
    """A parameter, with what it is to each module that has it: the module, its name there, and its dimensions."""

    roles: tuple[tuple[nn.Module, str, int], ...]

    def verdict(self) -> tuple[bool, str]:
        """Whether it decays, and why; not where any of its modules says so."""
        verdicts = [_verdict(*role) for role in self.roles]
        return next((v for v in verdicts if not v[0]), verdicts[0])


def _verdict(module: nn.Module, role: str, dimensions: int) -> tuple[bool, str]:
    kind = type(module).__name__
    if isinstance(module, NO_DECAY):
        return False, f"{role} of {kind}"
    # In a layer of torch the word bias is part of its interface: in_proj_bias, bias_ih_l0, bias_k.
    if is_known(module) and "bias" in role.split("_"):
        return False, f"{role} of {kind}"
    if is_known(module) and dimensions >= 2:
        return True, f"{role} of {kind}"
    return dimensions >= 2, f"{role} of {kind}, by its {dimensions} dimension{'s' * (dimensions != 1)}"


def is_known(module: nn.Module) -> bool:
    """Whether it is a layer of torch, or of a subclass of one."""
    return any(cls.__module__.startswith("torch.nn.modules.") and cls not in BARE for cls in type(module).__mro__)


def collect(model: nn.Module) -> list[Leaf]:
    """The parameters in the order of `model.named_parameters()`, each once."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, Leaf] = {}
    for prefix, module in modules.items():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError("param_groups: FullyShardedDataParallel flattens parameters; use fully_shard")
        path = prefix.split(".") if prefix else []
        above = tuple(modules[".".join(path[:i])] for i in range(len(path) + 1))
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, p in own.items():
            if isinstance(p, nn.UninitializedParameter):
                raise ValueError(
                    f"param_groups: {'.'.join([*path, name])} has no shape yet; call the model once before"
                )
            role = module, name, p.dim()
            if isinstance(module, ParametrizationList):  # of the module two levels up, whose tensor it makes
                role = above[-3], path[-1], max(q.dim() for q in own.values())
            old = found.get(id(p), Leaf((), p, (), ()))
            found[id(p)] = Leaf(
                (*old.names, ".".join([*path, name])), p, (*old.modules, *above), (*old.roles, role)
            )  # fmt: skip
    if not found:
        raise ValueError(f"param_groups: {type(model).__name__} has no parameters")
    return [*found.values()]


def is_embedding(module: nn.Module) -> bool:
    """Whether it is a table of which some rows are taken."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


# --- what is meant ----------------------------------------------------------------------------------------------------

_P = TypeVar("_P", bound=Member)


def select(match: Match, leaves: Sequence[_P], argument: str, *, owner: str = "param_groups") -> list[_P]:
    """Those that `match` means, at least one."""
    if chosen := [leaf for leaf in leaves if _means(match, leaf, argument, owner)]:
        return chosen
    hint = ""
    if isinstance(match, str):
        names = [name for leaf in leaves for name in leaf.names]
        inside = [name for name in names if re.search(match, name)]
        parts = [".".join(path[:i]) for path in (n.split(".") for n in names) for i in range(1, len(path) + 1)]
        parts += [part for name in names for part in name.split(".")]
        near = inside or difflib.get_close_matches(match, dict.fromkeys(parts), 3)
        near = near or [*dict.fromkeys(name.partition(".")[0] for name in names)]
        whole = "it must match whole parts of a name; " * bool(inside)
        hint = f"; {whole}near it: {', '.join(near[:3])}"
    kind = "parameter" if owner == "param_groups" else "frozen parameter"
    raise ValueError(f"{owner}: {argument}: {text_of(match)} means no {kind}{hint}")


def several(matches: Match | Iterable[Match]) -> Iterable[Match]:
    """One match, or several, as several."""
    if isinstance(matches, (str, nn.Module, torch.Tensor)) or callable(matches):
        return (matches,)
    return matches


def _means(match: Match, leaf: Member, argument: str, owner: str) -> bool:
    if isinstance(match, str):
        try:
            re.compile(match)
            pattern = re.compile(rf"(?:^|\.)(?:{match})(?:\.|$)")
        except re.error as error:
            raise ValueError(f"{owner}: {argument}: {match!r} is not a regular expression: {error}") from None
        return any(pattern.search(name) for name in leaf.names)
    if isinstance(match, type):
        return any(isinstance(module, match) for module in leaf.modules)
    if isinstance(match, nn.Module):
        return any(module is match for module in leaf.modules)
    if isinstance(match, torch.Tensor):
        return leaf.parameter is match
    if callable(match):
        return any(match(name, leaf.parameter) for name in leaf.names)
    raise TypeError(
        f"{owner}: {argument}: what is meant must be a regular expression, a module, a type of module, a parameter or "
        f"a function of name and parameter, got {match!r}"
    )


def text_of(match: Match) -> str:
    """A match in a message."""
    if isinstance(match, (type, nn.Module, torch.Tensor)):
        return match.__name__ if isinstance(match, type) else f"this {type(match).__name__}"
    return repr(match) if isinstance(match, str) else getattr(match, "__name__", repr(match))
