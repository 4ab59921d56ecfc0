"""Optimizers that are more than a class: pairs for the parts of a model, wrappers, options. `compare` knows them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import schuss
from schuss import optim


def muon_and_adamw(model: nn.Module, lr: float, **settings: Any) -> torch.optim.Optimizer:
    """Muon for the hidden matrices of a model, with steps as large as AdamW's, and AdamW for the rest.

    Args:
        model: whose parameters.
        lr: of both, in [0, inf).
        settings: of `schuss.param_groups`.

    Raises:
        ValueError: it has no hidden matrix.
    """
    return _pair(model, lr, optim.Muon, settings)


def normuon_and_adamw(model: nn.Module, lr: float, **settings: Any) -> torch.optim.Optimizer:
    """NorMuon in the place of Muon: for matrices of two dimensions, so that AdamW has the kernels of convolutions."""
    kernels = any(p.dim() > 2 for p in model.parameters())
    overrides = [(_has_more_than_two_dimensions, {"optimizer": "others"})] if kernels else []
    return _pair(model, lr, optim.NorMuon, {"overrides": overrides} | settings)


def lookahead_adamw(parameters: Iterable[nn.Parameter], lr: float, **settings: Any) -> torch.optim.Optimizer:
    """AdamW in a `Lookahead` with its default k and α."""
    return schuss.Lookahead(optim.AdamW(parameters, lr=lr, **settings))


RECIPES: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "Muon+AdamW": muon_and_adamw,
    "NorMuon+AdamW": normuon_and_adamw,
    "Lookahead+AdamW": lookahead_adamw,
    "Cautious+AdamW": optim.AdamW,
    "AMSGrad": optim.Adam,
}
"""By the names that `schuss compare` takes."""

ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "Cautious+AdamW": {"cautious": True},
    "AMSGrad": {"amsgrad": True},
    "SGD": {"momentum": 0.9, "nesterov": True},  # plain SGD is hardly ever what one means by SGD on a neural network
}
"""By the same names, and those of classes, of torch too: what they are called with."""


def _pair(
    model: nn.Module, lr: float, rule: type[torch.optim.Optimizer], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    # At AdamW's step sizes one rate serves both.
    groups = schuss.param_groups(model, lr=lr, matrices={"adjust_lr_fn": "match_rms_adamw"}, **settings)
    return schuss.Combined.of(groups, matrices=rule, others=optim.AdamW)


def _has_more_than_two_dimensions(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 2
