"""How a role of a kernel lies in memory: as numbers of a dtype, as blocks of 8-bit codes, or rounded in a special way.

A rule computes in float32 (float64 for float64 tensors) whatever its states are stored as: a storage is what a kernel
does between memory and the formula. Back ends differ in how they say it; what it is, and the 8-bit maps, is said here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from schuss.engine.trace import Expr, Formula, Graph
from schuss.formula import absolute, where, word

Rounding = Literal["nearest", "stochastic", "kahan"]
ROUNDINGS = ("nearest", "stochastic", "kahan")

BLOCK = 256
"""Elements, neighbours in memory, that share one float32 absmax."""
SMALLEST_BLOCKWISE = 4096
"""Tensors with fewer elements keep float32: they are biases and norms, where bytes do not count and errors do."""
SMALLEST_ABSMAX = 2.0**-126
"""A block whose largest element is no normal float32 is stored as zeros: its reciprocal would be infinite."""

# --- maps of 8-bit codes ----------------------------------------------------------------------------------------------


def _bits(x: float) -> int:
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32))


# The bits of a float32, read as a number, are nearly its logarithm: shifting them takes a root. The sum that is added
# puts the root of 1 at the largest code.
ROOTS = {2: (1, _bits(127.0) - (_bits(1.0) >> 1)), 4: (2, _bits(255.0) - (_bits(1.0) >> 2))}
"""Which root -> the shift and the sum."""


def _root(degree: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The largest code times the root of a float32 in [0, 1], along chords; for NaN some larger number."""
    shift, origin = ROOTS[degree]

    def root(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) >> shift) + origin).view(torch.float32)

    root.__name__ = f"root_{degree}"
    return root


def _power(degree: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of `_root`; 0 for 0."""
    shift, origin = ROOTS[degree]

    def power(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32).clamp(min=origin) - origin << shift).view(torch.float32)

    power.__name__ = f"power_{degree}"
    return power


root_2, root_4, power_2, power_4 = (word(make(degree)) for make in (_root, _power) for degree in ROOTS)


@dataclass(frozen=True)
class Map:
    """A map between 8-bit codes and shares of a block's absmax, as two formulas.

    A share is nearly a power of a code: the one that its bits give for a shift. Compared with the powers themselves,
    and with others' maps, by `benchmarks/state_maps.py`.

    Args:
        top: the largest code; it stands for the absmax itself.
        decode: code -> share in [-1, 1].
        encode: share -> code with a fraction, which is cut off. A block with NaN or infinity has an absmax that
            is such, and decodes to that whatever its codes are.
    """

    top: int
    decode: Callable[[Any], Any]
    encode: Callable[[Any], Any]


def _decode_signed(code: Any) -> Any:
    share = power_2(absolute(code))
    return where(code < 0, -share, share)


def _encode_signed(share: Any) -> Any:
    # Small codes are rounded down, not to the nearest: where gradients have vanished, a momentum that decays by a tenth
    # at each step would else be rounded back to where it was, and drive its parameter for ever.
    root = root_2(absolute(share))
    near, below = root + 0.5, root * 1.035
    code = where(near < below, near, below)
    code = where(code < 127.5, code, 127.5)  # NaN, too
    return where(share < 0, -code, code)


def _decode_unsigned(code: Any) -> Any:
    return power_4(code)


def _encode_unsigned(share: Any) -> Any:
    # Nothing but zero becomes zero: a root of zero below a momentum that is not would blow the step up.
    code = root_4(share) + 0.5
    return where(share > 0, where(code > 1, code, 1.0), 0.0)


MAPS = {
    torch.int8: Map(127, _decode_signed, _encode_signed),
    torch.uint8: Map(255, _decode_unsigned, _encode_unsigned),
}
"""The dtype of the codes tells the map: int8 for states of either sign, uint8 for states that are never negative."""


def traced(function: Callable[[Any], Any], name: str) -> Formula:
    """A formula of one argument, `name`, for kernels; its value is called "out"."""
    graph = Graph()
    out = function(graph.name(name))
    assert isinstance(out, Expr)
    return Formula((name,), {"out": out})


@dataclass(frozen=True)
class Storage:
    """How the values of one role lie in memory.

    Args:
        dtype: of the elements; int8 and uint8 are codes of blocks, with their absmax in a second tensor.
        rounding: how new values become elements. "kahan" keeps what was rounded off in a second tensor.
    """

    dtype: torch.dtype
    rounding: Rounding = "nearest"

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        if self.blockwise:
            return f"{kind} in blocks of {BLOCK}"
        return kind if self.rounding == "nearest" else f"{kind} with {self.rounding} rounding"

    def bytes(self, elements: int) -> int:
        """How much memory that many values take; what Kahan's rounding keeps is a state of its own."""
        return elements * self.dtype.itemsize + (4 * -(-elements // BLOCK) if self.blockwise else 0)

    @property
    def blockwise(self) -> Map | None:
        """The map of 8-bit codes, if these are such."""
        return MAPS.get(self.dtype)

    @property
    def stochastic(self) -> bool:
        """Whether storing draws random bits."""
        return self.rounding == "stochastic"

    @property
    def kahan(self) -> bool:
        """Whether a second tensor holds what was rounded off."""
        return self.rounding == "kahan"


Layout = Mapping[str, Storage]
"""Letter -> storage of every role of a kernel: p, g and the states, in the order of the formula's inputs."""


def as_reals(layout: Layout) -> Layout:
    """The layout of complex tensors as pairs of reals; any other as it is."""
    return {letter: replace(storage, dtype=real(storage.dtype)) for letter, storage in layout.items()}


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real view of a complex tensor; any other dtype unchanged."""
    return dtype.to_real()


def compute_dtype(layout: Layout) -> torch.dtype:
    """What a kernel computes in: float64 if anything it reads is, else float32."""
    return torch.float64 if any(s.dtype == torch.float64 for s in layout.values()) else torch.float32


def slots(layout: Layout) -> list[tuple[str, str]]:
    """The columns of the table of addresses, as (letter, tensor): "values" first, "absmax" or "compensation" if any.

    p and g come first; what belongs to p beside its values comes last.
    """
    columns = []
    for letter, storage in layout.items():
        columns.append((letter, "values"))
        if storage.blockwise:
            columns.append((letter, "absmax"))
    if "p" in layout and layout["p"].kahan:
        columns.append(("p", "compensation"))
    return columns


# --- random bits for stochastic rounding -----------------------------------------------------------------------------

# Each element draws 32 bits from its index alone, through two rounds of a 32-bit integer hash (the multipliers of
# C. Wellons' "lowbias32", 2018) with one half of a 64-bit key before each: no state, so the bits do not depend on
# threads, chunks or where a run was resumed.
SHIFTS, MULTIPLIERS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
HIGH = 0x9E3779B9
"""Spreads the upper half of an index over 32 bits, for tensors of more than 2^32 elements."""


def mix(x: Any) -> Any:
    """The hash, on 32-bit numbers held in wider integers (Python's, or an int64 tensor's)."""
    x = x ^ (x >> SHIFTS[0])
    x = (x * MULTIPLIERS[0]) & 0xFFFFFFFF
    x = x ^ (x >> SHIFTS[1])
    x = (x * MULTIPLIERS[1]) & 0xFFFFFFFF
    return x ^ (x >> SHIFTS[2])


def stream(seed: int, position: int) -> int:
    """The 64-bit stream of a parameter, told by its position in the optimizer."""
    x = (seed * 0x9E3779B97F4A7C15 + position + 1) & 0xFFFFFFFFFFFFFFFF
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):  # splitmix64 (Steele et al. 2014)
        x = ((x ^ (x >> shift)) * multiplier) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def keys(stream: int, step: int) -> tuple[int, int]:
    """The two 32-bit keys of a parameter at a step."""
    return mix((stream & 0xFFFFFFFF) ^ step), mix((stream >> 32) ^ step)


def random_bits(index: Any, key: tuple[int, int]) -> Any:
    """32 random bits for each element index (memory order), as wider integers."""
    low = (index & 0xFFFFFFFF) ^ key[0] ^ (((index >> 32) * HIGH) & 0xFFFFFFFF)
    return mix(mix(low) ^ key[1])
