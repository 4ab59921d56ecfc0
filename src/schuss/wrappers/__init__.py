"""Optimizers round other optimizers."""

from schuss.wrappers.base import Wrapper as Wrapper
from schuss.wrappers.combined import Combined as Combined
from schuss.wrappers.lookahead import Lookahead as Lookahead
from schuss.wrappers.sam import ASAM as ASAM
from schuss.wrappers.sam import SAM as SAM

__all__ = ["ASAM", "SAM", "Combined", "Lookahead", "Wrapper"]
