"""Schedules: pure functions of the step that compose, and `Schedule`, which drives hyperparameters by them.

A schedule is called with a step and returns a factor: `cosine(1000)(250)`. It has no state, so training that resumes
at step t continues exactly, whatever happened before t.
"""

from schuss.schedules.compose import absolute as absolute
from schuss.schedules.compose import join as join
from schuss.schedules.compose import scale as scale
from schuss.schedules.compose import warmup as warmup
from schuss.schedules.compose import wsd as wsd
from schuss.schedules.curves import constant as constant
from schuss.schedules.curves import cosine as cosine
from schuss.schedules.curves import cosine_restarts as cosine_restarts
from schuss.schedules.curves import cyclical as cyclical
from schuss.schedules.curves import exponential as exponential
from schuss.schedules.curves import inverse_sqrt as inverse_sqrt
from schuss.schedules.curves import linear as linear
from schuss.schedules.curves import multi_step as multi_step
from schuss.schedules.curves import one_cycle as one_cycle
from schuss.schedules.curves import one_minus_sqrt as one_minus_sqrt
from schuss.schedules.curves import polynomial as polynomial
from schuss.schedules.curves import step as step
from schuss.schedules.drive import Schedule as Schedule
from schuss.schedules.expression import parse as parse
from schuss.schedules.function import Function as Function

__all__ = [
    "Function", "Schedule", "absolute", "constant", "cosine", "cosine_restarts", "cyclical", "exponential",
    "inverse_sqrt", "join", "linear", "multi_step", "one_cycle", "one_minus_sqrt", "parse", "polynomial", "scale",
    "step", "warmup", "wsd",
]  # fmt: skip
