"""Optimizers under torch.optim's names and contract: `from schuss import optim` replaces `from torch import optim`."""

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import (
    Optimizer as Optimizer,
)
from torch.optim import (
    swa_utils as swa_utils,
)

from schuss.optim.adabelief import AdaBelief as AdaBelief
from schuss.optim.adadelta import Adadelta as Adadelta
from schuss.optim.adafactor import Adafactor as Adafactor
from schuss.optim.adagrad import Adagrad as Adagrad
from schuss.optim.adam import Adam as Adam
from schuss.optim.adam import AdamW as AdamW
from schuss.optim.adamax import Adamax as Adamax
from schuss.optim.adan import Adan as Adan
from schuss.optim.ademamix import AdEMAMix as AdEMAMix
from schuss.optim.adopt import ADOPT as ADOPT
from schuss.optim.asgd import ASGD as ASGD
from schuss.optim.lamb import LAMB as LAMB
from schuss.optim.laprop import LaProp as LaProp
from schuss.optim.lars import LARS as LARS
from schuss.optim.lbfgs import LBFGS as LBFGS
from schuss.optim.lion import Lion as Lion
from schuss.optim.mars import MARS as MARS
from schuss.optim.muon import Muon as Muon
from schuss.optim.muon import NorMuon as NorMuon
from schuss.optim.nadam import NAdam as NAdam
from schuss.optim.nadamw import NAdamW as NAdamW
from schuss.optim.prodigy import Prodigy as Prodigy
from schuss.optim.radam import RAdam as RAdam
from schuss.optim.rmsprop import RMSprop as RMSprop
from schuss.optim.rprop import Rprop as Rprop
from schuss.optim.schedule_free import ScheduleFreeAdamW as ScheduleFreeAdamW
from schuss.optim.schedule_free import ScheduleFreeRAdam as ScheduleFreeRAdam
from schuss.optim.schedule_free import ScheduleFreeSGD as ScheduleFreeSGD
from schuss.optim.sgd import SGD as SGD
from schuss.optim.shampoo import Shampoo as Shampoo
from schuss.optim.signum import Signum as Signum
from schuss.optim.soap import SOAP as SOAP
from schuss.optim.sparse_adam import SparseAdam as SparseAdam
from schuss.optim.stable_adamw import StableAdamW as StableAdamW
from schuss.optimizer import Optimizer as _Rule

if TYPE_CHECKING:
    from schuss.optim import lr_scheduler as lr_scheduler

FROM_TORCH = ("Optimizer", "swa_utils")
"""Names that are torch's own objects, handed on so that the import can be replaced."""

RULES: tuple[type[_Rule], ...] = (
    SGD, Adagrad, Adadelta, RMSprop, Adam, AdamW, NAdam, RAdam, Adamax, ASGD, Rprop, ADOPT, Lion,
    NAdamW, AdaBelief, Adan, AdEMAMix, LaProp, Signum,
    ScheduleFreeSGD, ScheduleFreeAdamW, ScheduleFreeRAdam,
    LARS, LAMB, StableAdamW, MARS, Prodigy,
    Adafactor, Muon, NorMuon, SOAP, Shampoo,
)  # fmt: skip
"""The optimizers of schuss: `schuss list` shows them, and every generic test runs on each."""

OF_ANOTHER_KIND: tuple[type[_Rule], ...] = (SparseAdam, LBFGS)
"""Those that dense gradients do not drive: one needs sparse ones, one a closure. `schuss list` shows them, too."""

__all__ = [
    "ADOPT", "ASGD", "LAMB", "LARS", "LBFGS", "MARS", "SGD", "SOAP", "AdEMAMix", "AdaBelief", "Adadelta", "Adafactor",
    "Adagrad", "Adam", "AdamW", "Adamax", "Adan", "LaProp", "Lion", "Muon", "NAdam", "NAdamW", "NorMuon",
    "Optimizer", "Prodigy", "RAdam", "RMSprop", "Rprop", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD",
    "Shampoo", "Signum", "SparseAdam", "StableAdamW", "lr_scheduler", "swa_utils",
]  # fmt: skip
__all__ += [name for name in torch.optim.__all__ if name not in __all__]


def __getattr__(name: str) -> Any:
    """`lr_scheduler`, and what else this version of torch.optim has."""
    if name == "lr_scheduler":  # not everybody's: it is imported when it is first used
        return importlib.import_module("schuss.optim.lr_scheduler")
    if name in torch.optim.__all__:
        return getattr(torch.optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
