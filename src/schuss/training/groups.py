"""Parameter groups: which parameter gets what, and why."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from torch import nn

from schuss import bounds
from schuss.roles import MATRICES, OTHERS, check_matrices
from schuss.training.matrices import Role, roles
from schuss.training.parameters import (
    LISTS,
    NO_DECAY,
    Leaf,
    Match,
    Member,
    collect,
    is_embedding,
    select,
    several,
    text_of,
)

__all__ = ["Assignment", "Groups", "param_groups"]

PLACE = "optimizer"
"""The key of a group that says for which optimizer it is."""


@dataclass(frozen=True, eq=False)
class Assignment(Member):
    """What a parameter got, and why.

    Attributes:
        names: its dotted names, more than one where it is shared; the first is the one that it goes by.
        parameter: itself.
        modules: all that it is in.
        settings: the hyperparameters of its group.
        reason: what decided.
        group: the index of its group, or None while it is frozen.
        role: what it is, where `matrices` asks for it: "matrix", "head", "embedding", "norm", "bias", "vector" or
            "other"; else None.
    """

    settings: Mapping[str, Any]
    reason: str
    group: int | None = None
    role: Role | None = None


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
    matrices: Mapping[str, Any] | None = None,
    heads: Match | Iterable[Match] | None = None,
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
        matrices: settings of the hidden matrices, such as {"lr": 0.02, "weight_decay": 0.1}, where these have an
            optimizer of their own; what is not in it, they have like the rest. Every group then has a key "optimizer":
            "matrices", or "others". Hidden matrices are the weights of two dimensions or more of torch's layers and
            their subclasses, and what is called weight and has two in other modules; not embeddings, output layers,
            nor what has one row or one column. An override of "optimizer" moves a parameter.
            `schuss.Combined.of(groups, matrices=optim.Muon, others=optim.AdamW)` takes them.
        heads: with `matrices`: which parameters belong to output layers, an empty tuple for none. None finds them: what
            is called head, lm_head, classifier, score and the like outside of repeated blocks, its last weight if it
            has several; without such a name the last layer of the model, if it is in no repeated block.

    Returns:
        The groups, to be handed to an optimizer. Their parameters are (name, tensor) pairs.

    Raises:
        ValueError: a match that matches nothing; a setting out of its bounds, or misspelt; nothing to train; no hidden
            matrix, or a vector that is moved among them.
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
    if heads is not None and matrices is None:
        raise ValueError("param_groups: heads is for matrices, which is None; matrices={} tells them apart")
    if matrices is not None:
        check_settings("matrices", matrices)
        if PLACE in matrices:
            raise ValueError(f"param_groups: matrices: {PLACE} is no setting; their groups say {MATRICES!r}")
    pairs = [*(overrides.items() if isinstance(overrides, Mapping) else overrides)]
    leaves = collect(model)
    exempt = _exempt(model, leaves)
    for match in several(no_decay):
        for leaf in select(match, leaves, "no_decay"):
            exempt.setdefault(leaf, f"no_decay {text_of(match)}")
    changes: dict[Leaf, list[tuple[Match, Mapping[str, Any]]]] = {}
    for match, settings in pairs:
        check_settings(f"overrides {text_of(match)}", settings)
        for leaf in select(match, leaves, "overrides"):
            changes.setdefault(leaf, []).append((match, settings))
    frozen = {leaf for match in several(freeze) for leaf in select(match, leaves, "freeze")}
    depths = _depths(model, leaves, layers) if layer_decay is not None else []
    found = {} if matrices is None else roles(model, leaves, heads)
    if found and all(role != "matrix" for role, _ in found.values()):
        output = ", ".join(leaf.names[0] for leaf, (role, _) in found.items() if role == "head")
        raise ValueError(
            f"param_groups: matrices: {type(model).__name__} has no hidden matrix"
            + f"; {output} seems to be of its output layer, and heads=() says that there is none" * bool(output)
        )
    base: dict[str, Any] = {
        name: value for name, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None
    }
    assignments = []
    for i, leaf in enumerate(leaves):
        decays, reason = (False, exempt[leaf]) if leaf in exempt else leaf.verdict()
        override = {name: value for _, change in changes.get(leaf, []) for name, value in change.items()}
        own, role = {**base}, None
        if matrices is not None:
            role, why = found[leaf]
            place = override.get(PLACE, MATRICES if role == "matrix" else OTHERS)
            own = {PLACE: place, **base, **(matrices if place == MATRICES else {})}
            reason += f"; {why}" * bool(why)
        if layer_decay is not None:
            own["lr"] *= layer_decay ** (max(depths) - depths[i])
            reason += f"; depth {depths[i]} of {max(depths)}"
        if not decays:
            own["weight_decay"] = 0.0
        reason += "".join(f"; overrides {text_of(match)}" for match, _ in changes.get(leaf, []))
        assignments.append(Assignment(leaf.names, leaf.parameter, leaf.modules, own | override, reason, role=role))
    moved = [(a.names[0], a.parameter) for a in assignments if a.settings.get(PLACE) == MATRICES]
    check_matrices(f"param_groups: {MATRICES}", [{"params": moved}])
    trained = {leaf.names for leaf in leaves if leaf.parameter.requires_grad and leaf not in frozen}
    if not trained:
        raise ValueError(f"param_groups: {type(model).__name__} has no parameter that is not frozen")
    for leaf in frozen:
        leaf.parameter.requires_grad_(False)
    return Groups(numbered(assignments, trained))


# --- weight decay -----------------------------------------------------------------------------------------------------


def _exempt(model: nn.Module, leaves: Sequence[Leaf]) -> dict[Leaf, str]:
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
    model: nn.Module, leaves: Sequence[Leaf], layers: Iterable[nn.Module] | Callable[[str], int] | None
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
        norm = isinstance(module, NO_DECAY) and not is_embedding(module)
        if before is not None and (norm or (is_embedding(module) and is_embedding(before))):
            units[-1].append(module)
        else:
            units.append([module])
        before = module
    return units


def _walk(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are layers: elements of lists, and what stands beside them."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    for child in children:
        if isinstance(module, LISTS):  # blocks, whatever lists they have, or models one after the other
            alone = sum(type(other) is type(child) for other in children) == 1
            inside = alone and any(_is_trunk(m) for m in _lists(child))
        else:
            inside = any(True for _ in _lists(child))
        if isinstance(child, LISTS) or inside:
            yield from _walk(child)
        else:
            yield child


def _lists(module: nn.Module) -> Iterator[nn.Module]:
    for name, m in module.named_modules():
        if isinstance(m, LISTS) and "parametrizations" not in name.split("."):
            yield m


def _is_trunk(module: nn.Module) -> bool:
    """Whether it is a list of blocks, not of single layers."""
    return any(next(child.children(), None) is not None for child in module.children())


def check_settings(argument: str, settings: Mapping[str, Any], *, owner: str = "param_groups") -> None:
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"{owner}: {argument} must be settings by name, such as {{'lr': 0.01}}, got {type(settings).__name__}"
        )
    for name, value in settings.items():
        if isinstance(value, (Mapping, set)):
            raise TypeError(
                f"{owner}: {argument}: {name} must be the value of a setting, a number say, got {type(value).__name__}"
            )
        if name in ("lr", "weight_decay"):
            bounds.check(owner, f"{argument}: {name}" if argument else name, value, "[0, inf)")
        elif name == "params":
            raise ValueError(f"{owner}: {argument}: params is no setting")
        elif name == PLACE and not isinstance(value, str):
            raise TypeError(f"{owner}: {argument}: {PLACE} must be a name, as a string, got {value!r}")
        # The optimizer is not known here, and torch ignores a key that none has.
        elif close := difflib.get_close_matches(name, ("lr", "weight_decay"), 1, cutoff=0.85):
            raise ValueError(f"{owner}: {argument}: unknown setting {name!r}; did you mean {close[0]!r}?")


# --- groups -----------------------------------------------------------------------------------------------------------


def numbered(assignments: Sequence[Assignment], members: Iterable[tuple[str, ...]]) -> list[Assignment]:
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
