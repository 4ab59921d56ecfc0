"""Schedules from text, for the command line and for configuration files."""

import ast
import inspect
from typing import Any

from schuss.bounds import nearest
from schuss.schedules import compose, curves
from schuss.schedules.function import Function

NAMES: dict[str, type[Function]] = {
    cls.__name__: cls
    for cls in (
        curves.constant, curves.linear, curves.cosine, curves.polynomial, curves.one_minus_sqrt, curves.exponential,
        curves.step, curves.multi_step, curves.inverse_sqrt, curves.one_cycle, curves.cyclical, curves.cosine_restarts,
        compose.wsd, compose.join, compose.scale, compose.warmup, compose.absolute,
    )
}  # fmt: skip
"""Every schedule by name."""

LONGEST = 10_000


def parse(text: str) -> Function:
    """The schedule that an expression names, such as "warmup(cosine(1000), 100)". `parse(repr(f)) == f`.

    Nothing is evaluated: there are calls of the schedules' names, numbers, strings, True, False, None, lists, and
    names alone, as in by=cosine.

    Args:
        text: at most 10,000 characters.

    Raises:
        ValueError: anything else, an unknown name, or an argument that a schedule does not take.
    """
    if len(text) > LONGEST:
        raise ValueError(f"an expression has at most {LONGEST} characters, got {len(text)}")
    try:
        schedule = _value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"not an expression: {error.msg}: {text!r}") from None
    except (OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"an expression that is too large: {error}") from None
    except TypeError as error:
        raise ValueError(str(error)) from None
    if not isinstance(schedule, Function):
        raise ValueError(f"not a schedule: {text!r}; write a call such as cosine(1000)")
    return schedule


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(k.arg for k in keywords):
            return _call(_named(name), [_value(a) for a in args], {str(k.arg): _value(k.value) for k in keywords})
        case ast.Name(id=name):
            return _named(name)
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
    raise ValueError(f"not a call, a number, a list or a name: {ast.unparse(node)}")


def _named(name: str) -> type[Function]:
    if name not in NAMES:
        raise ValueError(f"unknown schedule {name!r}; {nearest(name, NAMES)}")
    return NAMES[name]


def _call(cls: type[Function], args: list[Any], keywords: dict[str, Any]) -> Function:
    known = inspect.signature(cls).parameters
    for name in keywords:
        if name not in known:
            raise ValueError(f"{cls.__name__}: unknown argument {name!r}; {nearest(name, known)}")
    try:
        bound = inspect.signature(cls).bind(*args, **keywords)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None
    return cls(*bound.args, **bound.kwargs)
