"""schuss: optimizers for PyTorch, each written once as a formula and run as one fused pass over memory."""

from schuss import formula as formula
from schuss import optim as optim
from schuss.optimizer import Optimizer as Optimizer
from schuss.optimizer import Options as Options
from schuss.rule import State as State
from schuss.training import accumulate as accumulate
from schuss.training import clip_grad_norm_ as clip_grad_norm_
from schuss.training import param_groups as param_groups
from schuss.training import unfreeze as unfreeze

__version__ = "0.1.0"

__all__ = [
    "Optimizer",
    "Options",
    "State",
    "accumulate",
    "clip_grad_norm_",
    "formula",
    "optim",
    "param_groups",
    "unfreeze",
]
