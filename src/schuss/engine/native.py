"""What generated CPU kernels are made of: the vocabulary of rules on one number, and arrays at given addresses.

Everything here is inlined into the kernels by Numba. Words are written so that LLVM turns them into vector
instructions: a choice is a `select`, not a branch, and bfloat16 is widened and rounded in integer registers.
"""
# mypy: ignore-errors
# (Numba infers the types of what it compiles; mypy does not know its intrinsics.)

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from schuss.engine.storage import HIGH, MULTIPLIERS, ROOTS, SHIFTS, SMALLEST_ABSMAX

# No fastmath: a step waits for memory, not for arithmetic, and without contracted multiplications every element is
# rounded alike wherever it lies in a vector, a chunk or a tensor, and as eager torch rounds it.
inline = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@intrinsic
def pointer(typing_context, address, dtype):
    """The int64 `address` as a pointer to `dtype`, for `numba.carray`."""
    signature = types.CPointer(dtype.dtype)(address, dtype)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def load(typing_context, address, dtype):
    """The `dtype` at the int64 `address`."""
    signature = dtype.dtype(address, dtype)

    def generate(context, builder, signature, args):
        kind = context.get_value_type(signature.return_type)
        return builder.load(builder.inttoptr(args[0], kind.as_pointer()))

    return signature, generate


@intrinsic
def prefetch(typing_context, address):
    """Begin to bring what lies at the int64 `address` into the cache; a hint, for any address."""
    signature = types.void(address)

    def generate(context, builder, signature, args):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        hint = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(hint, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def store(typing_context, address, value):
    """Write `value` at the int64 `address`."""
    signature = types.void(address, value)

    def generate(context, builder, signature, args):
        kind = context.get_value_type(signature.args[1])
        builder.store(args[1], builder.inttoptr(args[0], kind.as_pointer()))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def where(typing_context, condition, yes, no):
    """`yes` if `condition` else `no`, without a branch."""
    signature = yes(types.boolean, yes, yes)

    def generate(context, builder, signature, args):
        return builder.select(args[0], args[1], args[2])

    return signature, generate


@intrinsic
def add_in_any_order(typing_context, total, term):
    """A term added to a sum: the sum may be kept as a vector. A chunk's sum is the same whoever adds it."""
    signature = total(total, total)

    def generate(context, builder, signature, args):
        return builder.fadd(args[0], args[1], flags=("reassoc",))

    return signature, generate


@intrinsic
def widen_bfloat16(typing_context, bits):
    """The float32 whose upper half is `bits`."""
    signature = types.float32(types.uint16)

    def generate(context, builder, signature, args):
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return signature, generate


@intrinsic
def narrow_bfloat16(typing_context, value):
    """The bits of the bfloat16 nearest to a float32, ties to even; every NaN becomes torch's, 0x7fc0."""
    signature = types.uint16(types.float32)

    def generate(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        result = builder.select(builder.fcmp_unordered("uno", args[0], args[0]), word(0x7FC0), rounded)
        return builder.trunc(result, ir.IntType(16))

    return signature, generate


@intrinsic
def widen_float16(typing_context, bits):
    """A float16, given by its bits, as float32."""
    signature = types.float32(types.uint16)

    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return signature, generate


@intrinsic
def narrow_float16(typing_context, value):
    """The bits of the float16 nearest to a float32."""
    signature = types.uint16(types.float32)

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return signature, generate


@intrinsic(prefer_literal=True)
def scratch(typing_context, count, dtype):
    """An array of the function's own, of `count` (a literal) elements, as a pointer; not initialised."""
    signature = types.CPointer(dtype.dtype)(count, dtype)
    length = count.literal_value

    def generate(context, builder, signature, args):
        kind = ir.ArrayType(context.get_value_type(dtype.dtype), length)
        return builder.bitcast(cgutils.alloca_once(builder, kind), context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def magnitude(typing_context, value):
    """The bits of |value| as int32, which order as the numbers do: infinity above them, NaN above infinity."""
    signature = types.int32(types.float32)

    def generate(context, builder, signature, args):
        word = ir.IntType(32)
        return builder.and_(builder.bitcast(args[0], word), word(0x7FFFFFFF))

    return signature, generate


@intrinsic
def from_magnitude(typing_context, bits):
    """The float32 that has these bits."""
    signature = types.float32(types.int32)

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return signature, generate


def _cut_off(result):
    signature = result(types.float32)

    def generate(context, builder, signature, args):
        return builder.trunc(builder.fptosi(args[0], ir.IntType(32)), ir.IntType(8))

    return signature, generate


@intrinsic
def cut_off_int8(typing_context, value):
    """A float32 in (-129, 128) without its fraction."""
    return _cut_off(types.int8)


@intrinsic
def cut_off_uint8(typing_context, value):
    """A float32 in [0, 256) without its fraction."""
    return _cut_off(types.uint8)


def _chords(degree, inverse):
    """`storage.root_*`, or `storage.power_*`."""
    shift, first = ROOTS[degree]

    def word(typing_context, value):
        signature = types.float32(types.float32)

        def generate(context, builder, signature, args):
            kind = ir.IntType(32)
            bits = builder.bitcast(args[0], kind)
            if inverse:
                large = builder.icmp_signed(">", bits, kind(first))
                bits = builder.shl(builder.sub(builder.select(large, bits, kind(first)), kind(first)), kind(shift))
            else:
                bits = builder.add(builder.ashr(bits, kind(shift)), kind(first))
            return builder.bitcast(bits, ir.FloatType())

        return signature, generate

    return intrinsic(word)


root_2, root_4, power_2, power_4 = (_chords(degree, inverse) for inverse in (False, True) for degree in ROOTS)


@inline
def larger(top, value):
    """The larger of a magnitude and that of a value; NaN if one of them is."""
    bits = magnitude(value)
    return where(bits > top, bits, top)


@inline
def scale_of(top):
    """A block's absmax as it is stored, and what its values are multiplied by to get their shares of it."""
    absmax = from_magnitude(top)
    small = absmax < np.float32(SMALLEST_ABSMAX)
    return where(small, np.float32(0), absmax), where(small, np.float32(0), np.float32(1) / absmax)


def _mix(builder, x):
    """`storage.mix` on a 32-bit register."""
    word = x.type
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
        x = builder.xor(x, builder.lshr(x, word(shift)))
        x = x if multiplier is None else builder.mul(x, word(multiplier))
    return x


@intrinsic
def stream_key(typing_context, half, step):
    """`storage.keys`: the key of one half of a stream (int64, its lower 32 bits count) at a step, as uint32."""
    signature = types.uint32(types.int64, types.int64)

    def generate(context, builder, signature, args):
        word = ir.IntType(32)
        return _mix(builder, builder.xor(*(builder.trunc(arg, word) for arg in args)))

    return signature, generate


@intrinsic
def random_bits(typing_context, index, key0, key1):
    """`storage.random_bits`: 32 random bits for an element, as uint32."""
    signature = types.uint32(types.int64, types.uint32, types.uint32)

    def generate(context, builder, signature, args):
        word = ir.IntType(32)
        high = builder.trunc(builder.lshr(args[0], ir.IntType(64)(32)), word)
        x = builder.xor(builder.xor(builder.trunc(args[0], word), args[1]), builder.mul(high, word(HIGH)))
        return _mix(builder, builder.xor(_mix(builder, x), args[2]))

    return signature, generate


@intrinsic
def stochastic_bfloat16(typing_context, value, random):
    """The bits of one of the two bfloat16 around a float32, the nearer the likelier; every NaN becomes 0x7fc0."""
    signature = types.uint16(types.float32, types.uint32)

    def generate(context, builder, signature, args):
        word = ir.IntType(32)
        raised = builder.add(builder.bitcast(args[0], word), builder.lshr(args[1], word(16)))
        result = builder.select(
            builder.fcmp_unordered("uno", args[0], args[0]), word(0x7FC0), builder.lshr(raised, word(16))
        )
        return builder.trunc(result, ir.IntType(16))

    return signature, generate


@intrinsic
def stochastic_float16(typing_context, value, random):
    """The bits of one of the two float16 around a float32, the nearer the likelier."""
    signature = types.uint16(types.float32, types.uint32)

    def generate(context, builder, signature, args):
        word, real = ir.IntType(32), ir.FloatType()
        bits = builder.bitcast(args[0], word)
        biased = builder.and_(builder.lshr(bits, word(23)), word(0xFF))
        # One unit of float16's last place here: 2^-10 of the power of two below |x|, but never under 2^-24.
        exponent = builder.select(builder.icmp_unsigned("<", biased, word(113)), word(113), biased)
        unit = builder.bitcast(builder.shl(builder.sub(exponent, word(10)), word(23)), real)
        per_unit = builder.bitcast(builder.shl(builder.sub(word(264), exponent), word(23)), real)
        share = builder.fmul(builder.uitofp(builder.lshr(args[1], word(19)), real), real(2.0**-13))
        size = builder.bitcast(builder.and_(bits, word(0x7FFFFFFF)), real)
        whole = builder.sitofp(builder.fptosi(builder.fadd(builder.fmul(size, per_unit), share), word), real)
        sign = builder.and_(bits, word(0x80000000))
        rounded = builder.bitcast(builder.or_(builder.bitcast(builder.fmul(whole, unit), word), sign), real)
        finite = builder.icmp_unsigned("<", biased, word(255))
        result = builder.select(finite, rounded, args[0])
        return builder.bitcast(builder.fptrunc(result, ir.HalfType()), ir.IntType(16))

    return signature, generate


@inline
def remainder(value, stored):
    """What rounding to `stored` cut off; nothing where it is not finite."""
    return where(abs(stored) < type(value)(np.inf), value - stored, type(value)(0))


def has_float16() -> bool:
    """Whether this CPU converts float16 in hardware; without it LLVM would call a routine that Numba does not link."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("f16c") or features.get("fp16") or features.get("fullfp16"))


@inline
def sqrt(x):
    return np.sqrt(x)


@inline
def exp(x):
    return np.exp(x)


@inline
def log(x):
    return np.log(x)


@inline
def absolute(x):
    return abs(x)


@inline
def sign(x):
    one, zero = type(x)(1), type(x)(0)
    return where(x > zero, one, where(x < zero, -one, zero))


@inline
def lerp(a, b, weight):
    one, half = type(weight)(1), type(weight)(0.5)
    return where(abs(weight) < half, a + weight * (b - a), b + (weight - one) * (b - a))


@inline
def maximum(a, b):
    return where((a > b) | (a != a), a, b)


@inline
def minimum(a, b):
    return where((a < b) | (a != a), a, b)


@intrinsic
def logical_and(typing_context, a, b):
    """Both, without a branch."""
    signature = types.boolean(types.boolean, types.boolean)

    def generate(context, builder, signature, args):
        return builder.and_(args[0], args[1])

    return signature, generate


@intrinsic
def call_kernel(typing_context, kernel, context_, tensor, start, count):
    """Call the kernel at the address `kernel`: void(int64 context, int64 tensor, int64 start, int64 count)."""
    signature = types.void(types.int64, types.int64, types.int64, types.int64, types.int64)

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return signature, generate


def _c_call(result, argument_count):
    """An intrinsic that calls a C function at an address, with 64-bit arguments."""
    signature = result(*[types.int64] * (argument_count + 1))

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(context.get_value_type(signature.return_type), [ir.IntType(64)] * argument_count)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return signature, generate


@intrinsic
def c_call_word(typing_context, function, a, b):
    """A C function of two 64-bit arguments that returns a pointer or int64, called by its address."""
    return _c_call(types.int64, 2)


@intrinsic
def c_call_status(typing_context, function, a, b):
    """A C function of two 64-bit arguments that returns an int32 status, called by its address."""
    return _c_call(types.int32, 2)
