"""What stands around an optimizer in a training loop: parameter groups, clipping, micro-batches, checkpoints."""

from schuss.training.accumulate import Window as Window
from schuss.training.accumulate import Windows as Windows
from schuss.training.accumulate import accumulate as accumulate
from schuss.training.checkpoints import Checkpoint as Checkpoint
from schuss.training.checkpoints import CheckpointError as CheckpointError
from schuss.training.checkpoints import load_checkpoint as load_checkpoint
from schuss.training.checkpoints import save_checkpoint as save_checkpoint
from schuss.training.clipping import clip_grad_norm_ as clip_grad_norm_
from schuss.training.fit import fit as fit
from schuss.training.groups import Assignment as Assignment
from schuss.training.groups import Groups as Groups
from schuss.training.groups import param_groups as param_groups
from schuss.training.history import History as History
from schuss.training.parameters import NO_DECAY as NO_DECAY
from schuss.training.parameters import Match as Match
from schuss.training.unfreeze import unfreeze as unfreeze

__all__ = [
    "NO_DECAY",
    "Assignment",
    "Checkpoint",
    "CheckpointError",
    "Groups",
    "History",
    "Match",
    "Window",
    "Windows",
    "accumulate",
    "clip_grad_norm_",
    "fit",
    "load_checkpoint",
    "param_groups",
    "save_checkpoint",
    "unfreeze",
]
