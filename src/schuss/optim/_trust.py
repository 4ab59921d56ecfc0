"""The trust ratio of LARS and LAMB."""

from typing import Any

from schuss.formula import logical_and, minimum, where

LARGEST = 1e30
"""An update that has all but vanished is not divided by its norm, which would overflow in float32."""


def trust_ratio(of_p: Any, of_update: Any) -> Any:
    """One norm over the other: what makes an update as long as the parameter; 1 where one of them is 0."""
    both = logical_and(of_p != 0, of_update != 0)  # true of NaN, too: it must not pass for a tensor of zeros
    return where(both, minimum(of_p / of_update, LARGEST), 1.0)
