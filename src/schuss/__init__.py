"""schuss: optimizers for PyTorch, each written once as a formula and run as one fused pass over memory."""

from schuss import formula as formula
from schuss import optim as optim
from schuss.optimizer import Optimizer as Optimizer
from schuss.optimizer import Options as Options
from schuss.rule import State as State

__version__ = "0.1.0"

__all__ = ["Optimizer", "Options", "State", "formula", "optim"]
