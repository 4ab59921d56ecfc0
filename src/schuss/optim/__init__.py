"""Optimizers under torch.optim's names and contract: `from schuss import optim` replaces `from torch import optim`."""

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import (
    LBFGS as LBFGS,
)
from torch.optim import (
    Adafactor as Adafactor,
)
from torch.optim import (
    Muon as Muon,
)
from torch.optim import (
    Optimizer as Optimizer,
)
from torch.optim import (
    SparseAdam as SparseAdam,
)
from torch.optim import (
    swa_utils as swa_utils,
)

from schuss.optim.adadelta import Adadelta as Adadelta
from schuss.optim.adagrad import Adagrad as Adagrad
from schuss.optim.adam import Adam as Adam
from schuss.optim.adam import AdamW as AdamW
from schuss.optim.adamax import Adamax as Adamax
from schuss.optim.adopt import ADOPT as ADOPT
from schuss.optim.asgd import ASGD as ASGD
from schuss.optim.lion import Lion as Lion
from schuss.optim.nadam import NAdam as NAdam
from schuss.optim.radam import RAdam as RAdam
from schuss.optim.rmsprop import RMSprop as RMSprop
from schuss.optim.rprop import Rprop as Rprop
from schuss.optim.sgd import SGD as SGD
from schuss.optimizer import Optimizer as _Rule

if TYPE_CHECKING:
    from schuss.optim import lr_scheduler as lr_scheduler

FROM_TORCH = ("Adafactor", "LBFGS", "Muon", "Optimizer", "SparseAdam", "swa_utils")
"""Names that are torch's own objects, handed on so that the import can be replaced."""

RULES: tuple[type[_Rule], ...] = (
    SGD, Adagrad, Adadelta, RMSprop, Adam, AdamW, NAdam, RAdam, Adamax, ASGD, Rprop, ADOPT, Lion,
)  # fmt: skip
"""The optimizers of schuss: `schuss list` shows them, and every generic test runs on each."""

__all__ = [
    "ADOPT", "ASGD", "LBFGS", "SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "Muon",
    "NAdam", "Optimizer", "RAdam", "RMSprop", "Rprop", "SparseAdam", "lr_scheduler", "swa_utils",
]  # fmt: skip
__all__ += [name for name in torch.optim.__all__ if name not in __all__]


def __getattr__(name: str) -> Any:
    """`lr_scheduler`, and what else this version of torch.optim has."""
    if name == "lr_scheduler":  # not everybody's: it is imported when it is first used
        return importlib.import_module("schuss.optim.lr_scheduler")
    if name in torch.optim.__all__:
        return getattr(torch.optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
