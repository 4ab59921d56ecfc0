"""Optimizers round other optimizers."""

from schuss.wrappers.base import Wrapper as Wrapper
from schuss.wrappers.lookahead import Lookahead as Lookahead

__all__ = ["Lookahead", "Wrapper"]
