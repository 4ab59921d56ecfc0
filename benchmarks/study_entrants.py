"""Who takes part in the study: every rule of schuss that dense gradients drive, and the usual forms of some."""

from typing import Any

import torch
from torch import nn

from schuss import optim
from schuss.lab.candidate import Candidate, around, candidates
from schuss.lab.recipes import muon_and_adamw, normuon_and_adamw


def muon_or_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """As the recipe; where there is no hidden matrix, all is the rest, which has AdamW."""
    return _or_adamw(muon_and_adamw, model, lr)


def normuon_or_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """As `muon_or_adamw`."""
    return _or_adamw(normuon_and_adamw, model, lr)


def _or_adamw(recipe: Any, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    try:
        made: torch.optim.Optimizer = recipe(model, lr)
    except ValueError as error:
        if "no hidden matrix" not in str(error):
            raise
        return optim.AdamW(model.parameters(), lr=lr)
    return made


PAIRS = {optim.Muon: ("Muon+AdamW", muon_or_adamw), optim.NorMuon: ("NorMuon+AdamW", normuon_or_adamw)}
"""Rules for matrices only, and what makes whole optimizers of them."""

FORMS = ("AMSGrad", "Lookahead+AdamW", "Cautious+AdamW")
"""Recipes beside the rules."""


def entrants() -> list[Candidate]:
    """All of them, each at five learning rates round its centre."""
    named = [*(rule.__name__ for rule in optim.RULES if rule not in PAIRS), *FORMS]
    given = {one.name: one for one in candidates(named)}
    given |= {name: Candidate(name, build, given["AdamW"].lrs) for name, build in PAIRS.values()}
    return [Candidate(one.name, one.build, around(one.lrs[1], 5), one.arguments) for one in given.values()]
