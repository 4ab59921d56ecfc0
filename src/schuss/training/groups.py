"""Parameter groups: which parameter gets what, and why."""

import difflib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from schuss import bounds
from schuss.schedules import Schedule

__all__ = ["NO_DECAY", "Assignment", "Groups", "Match", "param_groups", "unfreeze"]

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

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BARE = {nn.Module, *_LISTS, nn.ParameterList, nn.ParameterDict}
"""Types of torch that do not say what a parameter of theirs is for."""


@dataclass(frozen=True, eq=False)
class _Parameter:
    names: tuple[str, ...]
    parameter: nn.Parameter = field(repr=False)
    modules: tuple[nn.Module, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Assignment(_Parameter):
    """What a parameter got, and why.

    Attributes:
        names: its dotted names, more than one where it is shared; the first is the one that it goes by.
        parameter: itself.
        modules: all that it is in.
        settings: the hyperparameters of its group.
        reason: what decided.
        group: the index of its group, or None while it is frozen.
    """

    settings: Mapping[str, Any]
    reason: str
    group: int | None = None


class Groups(Sequence[dict[str, Any]]):
    """Parameter groups for any optimizer; `print` shows which parameter got what, and why.

    Every look gives fresh dicts, so one `Groups` serves several optimizers. What a group gets is decided by
    `param_groups`, not by writing into these dicts.
    """

    def __init__(self, assignments: Iterable[Assignment]) -> None:
        """Take what `param_groups` has decided.

        Args:
            assignments: of all parameters, in the order of the model; their groups are numbered from 0.
        """
        self._assignments = tuple(assignments)

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """Every parameter of the model, once, in the order of the model."""
        return self._assignments

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that are in no group, because they are frozen."""
        return tuple(a.names[0] for a in self._assignments if a.group is None)

    def __len__(self) -> int:
        return 1 + max((a.group for a in self._assignments if a.group is not None), default=-1)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        members = self._members(range(len(self))[index])
        return {"params": [(a.names[0], a.parameter) for a in members], **members[0].settings}

    def __repr__(self) -> str:
        return "\n".join([*(self._head(i) for i in range(len(self))), *self._frozen_head()])

    def __str__(self) -> str:
        lines: list[str] = []
        for i in range(len(self)):
            lines += [self._head(i), *_table(self._members(i))]
        return "\n".join([*lines, *self._frozen_head(), *_table(self._members(None), settings=True)])

    def _members(self, group: int | None) -> list[Assignment]:
        return [a for a in self._assignments if a.group == group]

    def _head(self, group: int) -> str:
        members = self._members(group)
        return f"group {group}: {_settings(members[0].settings)}; {_amount(members)}"

    def _frozen_head(self) -> list[str]:
        return [f"frozen: {_amount(members)}"] if (members := self._members(None)) else []


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = 0.01,
    no_decay: Match | Iterable[Match] = (),
    layer_decay: float | None = None,
    layers: Iterable[nn.Module] | Callable[[str], int] | None = None,
    overrides: Mapping[Match, Mapping[str, Any]] | Iterable[tuple[Match, Mapping[str, Any]]] = (),
    freeze: Match | Iterable[Match] = (),
) -> Groups:
    """Parameter groups by what each parameter is: norms, embeddings and biases do not decay, all else does.

    What a parameter is, its module says, not its name: none in a module of `NO_DECAY` decays, nor do biases and 1-D
    parameters of torch's other layers. In modules that torch does not know, parameters of fewer than two dimensions do
    not decay. Neither do those that the model names itself, in a method `no_weight_decay()` or by an attribute
    `_no_weight_decay` of the parameter. One that is shared decays only if it would everywhere; what a parametrization
    is made of gets what the tensor that it makes would.

    Equal settings make one group. Groups come in the order of their first parameters in the model: the same model
    with the same arguments gives the same groups, as checkpoints need it.

    Args:
        model: whose parameters; those with `requires_grad=False` get no group until `unfreeze` gives them one.
        lr: learning rate, in [0, inf). Without it the groups have none, and the optimizer's holds.
        weight_decay: of the parameters that decay, in [0, inf); None: the optimizer's.
        no_decay: more that do not decay, one match or several: a regular expression for whole parts of the dotted
            name ("head" means head.weight and model.head.bias, not overhead.weight), a module or a type of module with
            all that is in it, a parameter, or a function of name and parameter.
        layer_decay: factor in (0, 1] of the learning rate from each layer to the one before: the last has lr, the one
            at depth d of 0, ..., D has lr * layer_decay^(D - d). Needs `lr`. A shared parameter counts where it comes
            first.
        layers: what the depths are. Modules, such as the list of blocks: all that comes before the first has depth 0,
            the i-th i + 1, all that comes after them one more. Or a function of the name. By default modules in the
            order of the model, the elements of Sequential and ModuleList one by one but not what is inside of a block;
            a norm counts to the module before it, and so does an embedding after an embedding.
        overrides: pairs of a match and the settings that it gives. All that match apply in their order, so that
            of two for the same setting the later wins. They come last: a `weight_decay` or an `lr` given here holds
            as it is, for a norm and with `layer_decay` too.
        freeze: matches of parameters that are to be frozen; `requires_grad` is set for them.

    Returns:
        The groups, to be handed to an optimizer. Their parameters are (name, tensor) pairs.

    Raises:
        ValueError: a match that matches nothing; a setting out of its bounds, or misspelt; nothing to train.
        TypeError: a match of another type; a depth that is no integer.
    """
    for name, value, bound in (
        ("lr", lr, "None or [0, inf)"),
        ("weight_decay", weight_decay, "None or [0, inf)"),
        ("layer_decay", layer_decay, "None or (0, 1]"),
    ):
        bounds.check("param_groups", name, value, bound)
    if layer_decay is not None and lr is None:
        raise ValueError("param_groups: layer_decay needs lr, the learning rate of the last layer")
    if layers is not None and layer_decay is None:
        raise ValueError("param_groups: layers is for layer_decay, which is None")
    pairs = [*(overrides.items() if isinstance(overrides, Mapping) else overrides)]
    leaves = _collect(model)
    exempt = _exempt(model, leaves)
    for match in _several(no_decay):
        for leaf in _select(match, leaves, "no_decay"):
            exempt.setdefault(leaf, f"no_decay {_text(match)}")
    changes: dict[_Leaf, list[tuple[Match, Mapping[str, Any]]]] = {}
    for match, settings in pairs:
        _check_settings(f"overrides {_text(match)}", settings)
        for leaf in _select(match, leaves, "overrides"):
            changes.setdefault(leaf, []).append((match, settings))
    frozen = {leaf for match in _several(freeze) for leaf in _select(match, leaves, "freeze")}
    depths = _depths(model, leaves, layers) if layer_decay is not None else []
    assignments = []
    for i, leaf in enumerate(leaves):
        decays, reason = (False, exempt[leaf]) if leaf in exempt else leaf.verdict()
        settings = {} if lr is None else {"lr": lr}
        if layer_decay is not None and lr is not None:
            settings["lr"] = lr * layer_decay ** (max(depths) - depths[i])
            reason += f"; depth {depths[i]} of {max(depths)}"
        if weight_decay is not None or not decays:
            settings["weight_decay"] = weight_decay if weight_decay is not None and decays else 0.0
        for match, change in changes.get(leaf, []):
            settings |= change
            reason += f"; overrides {_text(match)}"
        assignments.append(Assignment(leaf.names, leaf.parameter, leaf.modules, settings, reason))
    trained = {leaf.names for leaf in leaves if leaf.parameter.requires_grad and leaf not in frozen}
    if not trained:
        raise ValueError(f"param_groups: {type(model).__name__} has no parameter that is not frozen")
    for leaf in frozen:
        leaf.parameter.requires_grad_(False)
    return Groups(_numbered(assignments, trained))


def unfreeze(
    optimizer: torch.optim.Optimizer,
    groups: Groups,
    match: Match | None = None,
    *,
    scheduler: LRScheduler | Iterable[LRScheduler] | None = None,
    like: int = 0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train frozen parameters from now on, with what `param_groups` decided for them.

    Sets `requires_grad`, adds groups to the optimizer, whose other state stays, and enlarges the schedulers: a new
    group's learning rate is to that of the group `like` what it would be, had both been there from the start.

    To resume from a checkpoint that was saved after this, make model, groups, optimizer and schedulers as then, call
    this as then, and load.

    Args:
        optimizer: made from `groups`.
        groups: enlarged too, so that `print(groups)` and `len(groups)` stay true.
        match: which of the frozen parameters; None: all.
        scheduler: the one or those that the optimizer has, or an empty tuple to leave them out.
        like: index of the group whose schedule the new ones follow with schedulers of torch. A `Schedule` decides
            itself which groups it drives.
        settings: for these parameters, instead of what `param_groups` decided.

    Returns:
        The optimizer's new groups.

    Raises:
        ValueError: no frozen parameter is meant; the optimizer has other groups than `groups`; it has a scheduler,
            and none was given; a setting out of its bounds.
    """
    _check_settings("unfreeze", settings, owner="unfreeze")
    waiting = [a for a in groups.assignments if a.group is None]
    if not waiting:
        raise ValueError("unfreeze: no parameter of these groups is frozen")
    if match is not None:
        waiting = _select(match, waiting, "match", owner="unfreeze")
    before = len(groups)
    if len(optimizer.param_groups) != before:
        raise ValueError(f"unfreeze: the optimizer has {len(optimizer.param_groups)} groups, not these {before}")
    for i, (live, group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        if [id(p) for p in live["params"]] != [id(p) for _, p in group["params"]]:
            raise ValueError(f"unfreeze: group {i} of the optimizer has other parameters than that of groups")
    if scheduler is None and any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError("unfreeze: the optimizer has a scheduler; pass scheduler=, or scheduler=() if it is done with")
    schedulers = [*(scheduler or ())] if scheduler is None or isinstance(scheduler, Iterable) else [scheduler]
    theirs = [s for s in schedulers if not isinstance(s, Schedule)]
    thawed = {a.names for a in waiting}
    enlarged = Groups(
        _numbered(
            [replace(a, settings={**a.settings, **settings}) if a.names in thawed else a for a in groups.assignments],
            thawed,
        )
    )
    default = optimizer.defaults.get("lr", 0.0)
    if isinstance(default, torch.Tensor):  # schedulers write into it: groups without their own have this very tensor
        sharing = (live for live, group in zip(optimizer.param_groups, groups, strict=True) if "lr" not in group)
        default = next((live["initial_lr"] for live in sharing if "initial_lr" in live), default)
    declared = [bounds.number(group.get("lr", default)) for group in enlarged]
    if theirs and declared[like] == 0 and any(declared[before:]):
        raise ValueError(
            f"unfreeze: the learning rate of group {like} is 0 and scales to no other; choose another like"
        )
    try:
        for group in enlarged[before:]:
            optimizer.add_param_group(group)
    except BaseException:
        del optimizer.param_groups[before:]
        raise
    if theirs:
        for i in range(before, len(enlarged)):
            _join(optimizer, theirs, i, like, declared[i], declared[like])
    for ours in schedulers:
        if isinstance(ours, Schedule):
            ours.load_state_dict(ours.state_dict())  # to the step at which it is, of which the new groups take note
    for a in waiting:
        a.parameter.requires_grad_(True)
    groups._assignments = enlarged.assignments
    return optimizer.param_groups[before:]


# --- what a parameter is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Leaf(_Parameter):
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
    if _is_known(module) and "bias" in role.split("_"):
        return False, f"{role} of {kind}"
    if _is_known(module) and dimensions >= 2:
        return True, f"{role} of {kind}"
    return dimensions >= 2, f"{role} of {kind}, by its {dimensions} dimension{'s' * (dimensions != 1)}"


def _is_known(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("torch.nn.modules.") and cls not in _BARE for cls in type(module).__mro__)


def _collect(model: nn.Module) -> list[_Leaf]:
    """The parameters in the order of `model.named_parameters()`, each once."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, _Leaf] = {}
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
            old = found.get(id(p), _Leaf((), p, (), ()))
            found[id(p)] = _Leaf(
                (*old.names, ".".join([*path, name])), p, (*old.modules, *above), (*old.roles, role)
            )  # fmt: skip
    if not found:
        raise ValueError(f"param_groups: {type(model).__name__} has no parameters")
    return [*found.values()]


def _exempt(model: nn.Module, leaves: Sequence[_Leaf]) -> dict[_Leaf, str]:
    """What does not decay because the model says so, in the two ways that are in use."""
    exempt = {leaf: "marked _no_weight_decay" for leaf in leaves if getattr(leaf.parameter, "_no_weight_decay", False)}
    by_name = {name: leaf for leaf in leaves for name in leaf.names}
    for prefix, module in model.named_modules():
        if callable(named := getattr(module, "no_weight_decay", None)):
            for name in named():
                if (leaf := by_name.get(f"{prefix}.{name}" if prefix else name)) is not None:
                    exempt.setdefault(leaf, f"no_weight_decay() of {type(module).__name__}")
    return exempt


# --- depth ------------------------------------------------------------------------------------------------------------


def _depths(
    model: nn.Module, leaves: Sequence[_Leaf], layers: Iterable[nn.Module] | Callable[[str], int] | None
) -> list[int]:
    if layers is not None and not isinstance(layers, Iterable):
        depths = [layers(leaf.names[0]) for leaf in leaves]
        for leaf, depth in zip(leaves, depths, strict=True):
            if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
                raise TypeError(
                    f"param_groups: layers({leaf.names[0]!r}) must be an integer in [0, inf), got {depth!r}"
                )
        return depths
    units = [[m] for m in layers] if layers is not None else _units(model)
    depth_of = {id(module): i for i, unit in enumerate(units) for module in unit}
    found = [min((depth_of[id(m)] for m in leaf.modules if id(m) in depth_of), default=None) for leaf in leaves]
    if layers is None:  # what lies in no unit belongs to a module of units, and comes before them
        depths, following = [], max((d for d in found if d is not None), default=0)
        for d in reversed(found):
            following = following if d is None else d
            depths.append(following)
        dense = {depth: i for i, depth in enumerate(sorted(set(depths)))}  # a head that is shared is no layer
        return [dense[depth] for depth in reversed(depths)]
    for i in range(len(units)):
        if i not in found:
            raise ValueError(f"param_groups: layers[{i}] has no parameter of the model")
    first = next(i for i, d in enumerate(found) if d is not None)
    return [(0 if i < first else len(units) + 1) if d is None else d + 1 for i, d in enumerate(found)]


def _units(model: nn.Module) -> list[list[nn.Module]]:
    """Modules in order, those of one depth together."""
    units: list[list[nn.Module]] = []
    before: nn.Module | None = None
    for module in _walk(model):
        norm = isinstance(module, NO_DECAY) and not _is_embedding(module)
        if before is not None and (norm or (_is_embedding(module) and _is_embedding(before))):
            units[-1].append(module)
        else:
            units.append([module])
        before = module
    return units


def _walk(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are layers: elements of lists, and what stands beside them."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    for child in children:
        if isinstance(module, _LISTS):  # blocks, whatever lists they have, or models one after the other
            alone = sum(type(other) is type(child) for other in children) == 1
            inside = alone and any(_is_trunk(m) for m in _lists(child))
        else:
            inside = any(True for _ in _lists(child))
        if isinstance(child, _LISTS) or inside:
            yield from _walk(child)
        else:
            yield child


def _lists(module: nn.Module) -> Iterator[nn.Module]:
    for name, m in module.named_modules():
        if isinstance(m, _LISTS) and "parametrizations" not in name.split("."):
            yield m


def _is_trunk(module: nn.Module) -> bool:
    """Whether it is a list of blocks, not of single layers."""
    return any(next(child.children(), None) is not None for child in module.children())


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


# --- what is meant ----------------------------------------------------------------------------------------------------

_P = TypeVar("_P", bound=_Parameter)


def _select(match: Match, leaves: Sequence[_P], argument: str, *, owner: str = "param_groups") -> list[_P]:
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
    raise ValueError(f"{owner}: {argument}: {_text(match)} means no {kind}{hint}")


def _several(matches: Match | Iterable[Match]) -> Iterable[Match]:
    if isinstance(matches, (str, nn.Module, torch.Tensor)) or callable(matches):
        return (matches,)
    return matches


def _means(match: Match, leaf: _Parameter, argument: str, owner: str) -> bool:
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


def _text(match: Match) -> str:
    if isinstance(match, (type, nn.Module, torch.Tensor)):
        return match.__name__ if isinstance(match, type) else f"this {type(match).__name__}"
    return repr(match) if isinstance(match, str) else getattr(match, "__name__", repr(match))


def _check_settings(argument: str, settings: Mapping[str, Any], *, owner: str = "param_groups") -> None:
    for name, value in settings.items():
        if name in ("lr", "weight_decay"):
            bounds.check(owner, f"{argument}: {name}" if argument else name, value, "[0, inf)")
        elif name == "params":
            raise ValueError(f"{owner}: {argument}: params is no setting")
        # The optimizer is not known here, and torch ignores a key that none has.
        elif close := difflib.get_close_matches(name, ("lr", "weight_decay"), 1, cutoff=0.85):
            raise ValueError(f"{owner}: {argument}: unknown setting {name!r}; did you mean {close[0]!r}?")


# --- groups -----------------------------------------------------------------------------------------------------------


def _numbered(assignments: Sequence[Assignment], members: Iterable[tuple[str, ...]]) -> list[Assignment]:
    """With a group for each of `members`, after those that there are; equal settings, one group."""
    taken = {a.group for a in assignments if a.group is not None}
    new: dict[tuple[tuple[str, Any], ...], int] = {}
    return [
        replace(a, group=new.setdefault(_key(a.settings), len(taken) + len(new))) if a.names in members else a
        for a in assignments
    ]


def _key(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    def hashable(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    return tuple((name, hashable(settings[name])) for name in sorted(settings))


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items()) or "defaults"


def _amount(members: Sequence[Assignment]) -> str:
    count, elements = len(members), sum(a.parameter.numel() for a in members)
    return f"{count:,} tensor{'s' * (count != 1)}, {elements:,} element{'s' * (elements != 1)}"


def _table(members: Sequence[Assignment], *, settings: bool = False) -> list[str]:
    """A line for each parameter: name, shape, reason, other names."""
    rows = []
    for a in members:
        shape = "×".join(map(str, a.parameter.shape)) or "scalar"
        also = f"; also {', '.join(a.names[1:])}" if len(a.names) > 1 else ""
        rows.append((a.names[0], shape, a.reason + also + (f" -> {_settings(a.settings)}" if settings else "")))
    widths = [max(len(row[i]) for row in rows) for i in range(2)] if rows else []
    return [f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {reason}" for name, shape, reason in rows]


# --- schedulers -------------------------------------------------------------------------------------------------------


def _join(
    optimizer: torch.optim.Optimizer, schedulers: Iterable[LRScheduler], new: int, like: int, lr: float, base: float
) -> None:
    """Let a new group follow the schedule of group `like`.

    torch's schedulers keep a value per group in lists and in the groups. All make a group's learning rate from its
    first one by an affine function: times a factor, or towards `eta_min`.
    """
    group, model = optimizer.param_groups[new], optimizer.param_groups[like]

    def scaled(value: Any) -> Any:
        if lr == base:
            return value
        return lr if bounds.number(value) == base else bounds.number(value) * (lr / base)

    floor = sum(_floor(scheduler) for scheduler in schedulers)
    first, now = bounds.number(model.get("initial_lr", base)), bounds.number(model["lr"])
    if lr != base:
        now = floor + (now - floor) * (scaled(first) - floor) / (first - floor) if first != floor else scaled(now)
    group["lr"] = torch.full_like(model["lr"], now) if isinstance(model["lr"], torch.Tensor) else now
    for key in ("initial_lr", "max_lr", "min_lr", "swa_lr"):
        if key in model:
            group[key] = scaled(model[key])
    for key in ("max_momentum", "base_momentum"):
        if key in model:
            group[key] = model[key]
            group |= {name: model[name] for name in ("momentum", "betas") if name in model}
    for part in _parts(schedulers):
        for name in ("base_lrs", "max_lrs", "_last_lr", "lr_lambdas", "min_lrs", "base_momentums", "max_momentums"):
            values = getattr(part, name, None)
            if isinstance(values, list) and len(values) == new:
                value = values[like]
                if name in ("base_lrs", "max_lrs"):
                    value = scaled(value)
                setattr(part, name, [*values, group["lr"] if name == "_last_lr" else value])


def _parts(schedulers: Iterable[LRScheduler]) -> Iterator[LRScheduler]:
    """The schedulers, and those that they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from _parts(getattr(scheduler, "_schedulers", ()))


def _floor(scheduler: LRScheduler) -> float:
    """The learning rate that every group tends to at present."""
    if isinstance(scheduler, SequentialLR):
        return _floor(scheduler._schedulers[bisect_right(scheduler._milestones, scheduler.last_epoch)])
    return float(getattr(scheduler, "eta_min", 0.0))
