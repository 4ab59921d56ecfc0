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
from numba.extending import intrinsic

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


def has_float16() -> bool:
    """Whether this CPU converts float16 in hardware; without it LLVM would call a routine that Numba does not link."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("f16c") or features.get("fp16") or features.get("fullfp16"))


@inline
def sqrt(x):
    return np.sqrt(x)


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
