"""schuss: optimizers for PyTorch, each written once as a formula and run as one fused pass over memory."""

import importlib
from typing import TYPE_CHECKING, Any

from schuss import formula as formula
from schuss import optim as optim
from schuss.optimizer import Optimizer as Optimizer
from schuss.optimizer import Options as Options
from schuss.rule import State as State

if TYPE_CHECKING:
    from schuss import schedules as schedules
    from schuss.lab.find_lr import find_lr as find_lr
    from schuss.schedules import Schedule as Schedule
    from schuss.training import Checkpoint as Checkpoint
    from schuss.training import CheckpointError as CheckpointError
    from schuss.training import History as History
    from schuss.training import clip_grad_norm_ as clip_grad_norm_
    from schuss.training import load_checkpoint as load_checkpoint
    from schuss.training import param_groups as param_groups
    from schuss.training import save_checkpoint as save_checkpoint
    from schuss.training.accumulate import accumulate as accumulate
    from schuss.training.fit import fit as fit
    from schuss.training.unfreeze import unfreeze as unfreeze
    from schuss.wrappers import ASAM as ASAM
    from schuss.wrappers import SAM as SAM
    from schuss.wrappers import Combined as Combined
    from schuss.wrappers import Lookahead as Lookahead

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "SAM",
    "Checkpoint",
    "CheckpointError",
    "Combined",
    "History",
    "Lookahead",
    "Optimizer",
    "Options",
    "Schedule",
    "State",
    "accumulate",
    "clip_grad_norm_",
    "find_lr",
    "fit",
    "formula",
    "load_checkpoint",
    "optim",
    "param_groups",
    "save_checkpoint",
    "schedules",
    "unfreeze",
]

_LATER = {
    "Checkpoint": "schuss.training",
    "CheckpointError": "schuss.training",
    "History": "schuss.training",
    "fit": "schuss.training",
    "load_checkpoint": "schuss.training",
    "save_checkpoint": "schuss.training",
    "ASAM": "schuss.wrappers",
    "Combined": "schuss.wrappers",
    "Lookahead": "schuss.wrappers",
    "SAM": "schuss.wrappers",
    "Schedule": "schuss.schedules",
    "accumulate": "schuss.training",
    "clip_grad_norm_": "schuss.training",
    "find_lr": "schuss.lab.find_lr",
    "param_groups": "schuss.training",
    "schedules": "schuss",
    "unfreeze": "schuss.training",
}
"""Loaded when they are first asked for: who replaces `torch.optim` does not wait for the rest."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'schuss' has no attribute {name!r}")
    module = importlib.import_module(f"schuss.{name}" if _LATER[name] == "schuss" else _LATER[name])
    value = globals()[name] = module if _LATER[name] == "schuss" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
