"""What generated GPU kernels are made of: the vocabulary of rules on a tile of elements, and storages.

Numbers are those of `schuss.engine.native`, bit for bit: quotients and roots are rounded once, a choice ignores what is
not chosen, and bfloat16 is widened and rounded in integer registers, since Triton's interpreter truncates it and
hardware has another NaN.
"""
# mypy: ignore-errors
# (Triton infers the types of what it compiles, and a jit function sees only those globals that are `tl.constexpr`.)

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

from schuss.engine import storage

BLOCK = tl.constexpr(storage.BLOCK)
SMALLEST_ABSMAX = tl.constexpr(storage.SMALLEST_ABSMAX)
SHIFTS = tl.constexpr(storage.SHIFTS)
MULTIPLIERS = tl.constexpr(storage.MULTIPLIERS)
HIGH = tl.constexpr(storage.HIGH)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""In the interpreter there is no libdevice, and NumPy's functions stand in for Triton's."""
ORIGIN_2, ORIGIN_4 = (tl.constexpr(origin) for _, origin in storage.ROOTS.values())

# --- memory -----------------------------------------------------------------------------------------------------------


@triton.jit
def pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The int64 `address` as a pointer; ALIGNED promises a multiple of 16 bytes, and so 128-bit loads and stores."""
    at = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


# --- numbers ----------------------------------------------------------------------------------------------------------


@triton.jit
def float32(number: tl.constexpr):
    return tl.full((), number, tl.float32)


@triton.jit
def float64(number: tl.constexpr):
    """A bare literal would pass through float32."""
    return tl.full((), number, tl.float64)


@triton.jit
def negative(x):
    """Triton's own minus is 0 - x, which loses the sign of zero."""
    return x * -1


@triton.jit
def divide(x, y):
    """Triton's own division of float32 is approximate."""
    if x.dtype == tl.float64 or y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def power(x, y):
    """A power that is no whole number; Triton's interpreter has none."""
    return libdevice.pow(x, y)


@triton.jit
def sqrt(x):
    """Triton's own root of float32 is approximate. (Triton 3.5 takes a subnormal for 0 here, later ones do not.)"""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def exp(x):
    """Triton's own exponential of float32 is approximate."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def log(x):
    """Triton's own logarithm of float32 is approximate."""
    if INTERPRETED:
        return tl.log(x)
    else:
        return libdevice.log(x)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def where(condition, yes, no):
    return tl.where(condition, yes, no)


@triton.jit
def sign(x):
    one = tl.full((), 1, x.dtype)
    return tl.where(x > 0, one, tl.where(x < 0, -one, 0 * one))


@triton.jit
def lerp(a, b, weight):
    return tl.where(tl.abs(weight) < 0.5, a + weight * (b - a), b + (weight - 1) * (b - a))


@triton.jit
def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def logical_and(a, b):
    return a & b


# --- half types -------------------------------------------------------------------------------------------------------


@triton.jit
def widen_bfloat16(bits):
    """The float32 whose upper half is `bits`."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow_bfloat16(x):
    """The bits of the bfloat16 nearest to a float32, ties to even; every NaN becomes torch's, 0x7fc0."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def stochastic_bfloat16(x, random):
    """The bits of one of the two bfloat16 around a float32, the nearer the likelier; every NaN becomes 0x7fc0."""
    raised = (x.to(tl.uint32, bitcast=True) + (random >> 16)) >> 16
    return tl.where(x != x, 0x7FC0, raised).to(tl.uint16)


@triton.jit
def widen_float16(x):
    return x.to(tl.float32)


@triton.jit
def narrow_float16(x):
    """The float16 nearest to a float32."""
    return x.to(tl.float16)


@triton.jit
def stochastic_float16(x, random):
    """One of the two float16 around a float32, the nearer the likelier; infinity and NaN pass through all steps."""
    bits = x.to(tl.uint32, bitcast=True)
    # One unit of float16's last place here: 2^-10 of the power of two below |x|, but never under 2^-24.
    exponent = tl.maximum((bits >> 23) & 0xFF, 113)
    unit = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
    per_unit = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
    share = (random >> 19).to(tl.float32) * 0.0001220703125  # 2^-13
    rounded = tl.floor(tl.abs(x) * per_unit + share) * unit
    return (rounded.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True).to(tl.float16)


@triton.jit
def remainder(x, stored):
    """What rounding to `stored` cut off; nothing where it is not finite."""
    return tl.where(tl.abs(stored) < float("inf"), x - stored, 0)


# --- random bits ------------------------------------------------------------------------------------------------------


@triton.jit
def mix(x):
    """`storage.mix` in uint32."""
    x = (x ^ (x >> SHIFTS[0])) * MULTIPLIERS[0]
    x = (x ^ (x >> SHIFTS[1])) * MULTIPLIERS[1]
    return x ^ (x >> SHIFTS[2])


@triton.jit
def stream_key(half, step):
    """`storage.keys`: the key of one half of a stream (int64, its lower 32 bits count) at a step."""
    return mix(half.to(tl.uint32) ^ step.to(tl.int64).to(tl.uint32))


@triton.jit
def random_bits(index, key0, key1):
    """`storage.random_bits`: 32 bits for each element index (int64)."""
    return mix(mix(index.to(tl.uint32) ^ key0 ^ ((index >> 32).to(tl.uint32) * HIGH)) ^ key1)


# --- blocks of 8-bit codes --------------------------------------------------------------------------------------------


@triton.jit
def scale_of(x, i, inside):
    """The absmax of each row as it is stored, and what its values are multiplied by to get their shares of it."""
    bits = tl.broadcast_to(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, i.shape)  # order as the numbers do, NaN on top
    if inside is not None:
        bits = tl.where(inside, bits, 0)
    absmax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    small = absmax < SMALLEST_ABSMAX
    return tl.where(small, 0.0, absmax), tl.where(small, 0.0, tl.div_rn(1.0, absmax))


@triton.jit
def root_2(x):
    """`storage.root_2`."""
    return ((x.to(tl.int32, bitcast=True) >> 1) + ORIGIN_2).to(tl.float32, bitcast=True)


@triton.jit
def root_4(x):
    """`storage.root_4`."""
    return ((x.to(tl.int32, bitcast=True) >> 2) + ORIGIN_4).to(tl.float32, bitcast=True)


@triton.jit
def power_2(x):
    """`storage.power_2`."""
    return ((tl.maximum(x.to(tl.int32, bitcast=True), ORIGIN_2) - ORIGIN_2) << 1).to(tl.float32, bitcast=True)


@triton.jit
def power_4(x):
    """`storage.power_4`."""
    return ((tl.maximum(x.to(tl.int32, bitcast=True), ORIGIN_4) - ORIGIN_4) << 2).to(tl.float32, bitcast=True)


# --- sums -------------------------------------------------------------------------------------------------------------


@triton.jit
def add_up(sums, ends, result, count, TILE: tl.constexpr):
    """The sum of a tensor's chunks: a program for each tensor and each of its `count` sums."""
    tensor, which = tl.program_id(0), tl.program_id(1)
    start = tl.load(ends + tensor - 1, tensor > 0, other=0)
    end = tl.load(ends + tensor)
    total = tl.zeros([TILE], tl.float64)
    while start < end:
        i = start + tl.arange(0, TILE)
        total += tl.load(sums + i * count + which, i < end, other=0)
        start += TILE
    tl.store(result + tensor * tl.num_programs(1) + which, tl.sum(total, axis=0))
