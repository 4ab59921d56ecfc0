"""What stands around an optimizer in a training loop: parameter groups, clipping, windows of micro-batches."""

from schuss.training.accumulate import Window as Window
from schuss.training.accumulate import Windows as Windows
from schuss.training.accumulate import accumulate as accumulate
from schuss.training.clipping import clip_grad_norm_ as clip_grad_norm_
from schuss.training.groups import NO_DECAY as NO_DECAY
from schuss.training.groups import Assignment as Assignment
from schuss.training.groups import Groups as Groups
from schuss.training.groups import Match as Match
from schuss.training.groups import param_groups as param_groups
from schuss.training.groups import unfreeze as unfreeze

__all__ = [
    "NO_DECAY",
    "Assignment",
    "Groups",
    "Match",
    "Window",
    "Windows",
    "accumulate",
    "clip_grad_norm_",
    "param_groups",
    "unfreeze",
]
