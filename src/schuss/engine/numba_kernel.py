"""The text of a CPU kernel: a formula that updates a chunk of one tensor in one pass, whatever it is stored as."""

import builtins
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch

from schuss.engine.stages import Sums
from schuss.engine.storage import BLOCK, MAPS, Layout, Storage, compute_dtype, slots, traced
from schuss.engine.text import call, dtype_name, indented, listed, safe_names, wrapped
from schuss.engine.trace import Formula, to_source, used


@dataclass(frozen=True)
class Element:
    """How kernels load and store an element of a dtype. `{}` stands for the value, `{random}` for 32 random bits."""

    array: str
    itemsize: int
    load: str = "{}"
    store: str = "{}"
    stochastic: str = ""


ELEMENTS = {
    torch.float32: Element("float32", 4),
    torch.float64: Element("float64", 8),
    torch.bfloat16: Element(
        "uint16", 2, "widen_bfloat16({})", "narrow_bfloat16({})", "stochastic_bfloat16({}, {random})"
    ),
    torch.float16: Element("uint16", 2, "widen_float16({})", "narrow_float16({})", "stochastic_float16({}, {random})"),
    torch.int8: Element("int8", 1, "decode_int8({})", "encode_int8({})"),
    torch.uint8: Element("uint8", 1, "decode_uint8({})", "encode_uint8({})"),
}


NUMBERS = tuple(dtype for dtype in ELEMENTS if dtype not in MAPS)
"""The dtypes that parameters and gradients may have."""
CHUNK = 16384
"""Elements of a tensor that one kernel call updates: p, g and two states of it stay in a core's cache."""


def kernel_source(title: str, formula: Formula, scalars: tuple[str, ...], layout: Layout) -> str:
    """The text of the kernel of a formula.

    Args:
        title: what the kernel is, for its reader.
        formula: the traced rule with its pieces.
        scalars: names of the scalars, in the order of a row of the table.
        layout: the storage of each input of the formula.
    """
    value = dtype_name(compute_dtype(layout))
    names = safe_names([*layout, *scalars], taken())

    lines, new = to_source(formula, call, constants(value), names)
    maps = list(dict.fromkeys(s.dtype for s in layout.values() if s.blockwise))
    begin, count = ("block", "n") if maps else ("start", "count")
    role = Role(names, value, begin, count)
    columns = slots(layout)
    arrays = [role.array(k, letter, part, layout[letter]) for k, (letter, part) in enumerate(columns)]
    read = {node.value for node in used(formula.outputs.values()) if node.op == "name"}
    loads = [role.load(letter, storage) for letter, storage in layout.items() if letter in read]
    stores, scales, encodes = [], [], []
    for letter, storage in layout.items():
        if letter in new and new[letter] != names[letter]:
            stores += role.store(letter, storage, new[letter])
            if storage.blockwise:
                arrays.append(f"{names[letter]}_values = carray(scratch({BLOCK}, float32), ({BLOCK},))")
                arrays.append(f"{names[letter]}_top = int32(0)")
                scales.append(role.scale(letter))
                encodes.append(role.encode(letter, storage))
    once = [f"{names[name]} = scalar[{i}]" for i, name in enumerate(scalars)]
    if streams := layout["p"].stochastic:
        once += random_keys(names["step"])
    arrays += [f"{names[letter]}_scale = {names[letter]}_absmax[0]" for letter, part in columns if part == "absmax"]
    body = [*arrays, f"for i in range({count}):", *indented([*loads, *lines, *stores])]
    if encodes:
        body += [*scales, f"for i in range({count}):", *indented(encodes)]
    if maps:
        body = [*_BLOCKS, *indented(body)]
    table = listed({names[letter]: storage for letter, storage in layout.items()})
    integers = ", int8, int32, int64, uint8" if maps else ", int32, int64"
    return "".join(
        f"{line}\n"
        for line in (
            f'"""{title}\n',
            *wrapped(f"One pass over {table}; computed in {value}."),
            f"context: addresses of the table of data pointers [tensor, {len(columns)}], of each tensor's row, and of",
            *wrapped(f"the rows of scalars ({', '.join(scalars)}){'; then of the random streams' if streams else ''}."),
            '"""\n',
            "import numpy as np",
            f"from numba import carray, cfunc, float32, float64{integers}, uint16, void\n",
            f"from schuss.engine.native import *  # digest {native_digest()}\n\n",
            *(line for dtype in maps for line in _conversions(dtype)),
            '@cfunc(void(int64, int64, int64, int64), cache=True, error_model="numpy")',
            "def kernel(context, tensor, start, count):",
            *indented(
                [
                    f"tables = carray(pointer(context, int64), ({3 + streams},))",
                    f"at = carray(pointer(tables[0] + tensor * {8 * len(columns)}, int64), ({len(columns)},))",
                    ROW,
                    scalars_row(value, len(scalars)),
                    *once,
                    *body,
                ]
            ),
        )
    )


def sum_source(title: str, sums: Sums, layout: Layout, value: str | None = None) -> str:
    """The text of a kernel that sums the values of formulas over a stretch of a tensor, in float64.

    Args:
        title: what the kernel is, for its reader.
        sums: what is summed.
        layout: the storage of each role of the table of addresses.
        value: the dtype that the formulas are computed in; None: as the rule.
    """
    value = value or dtype_name(compute_dtype(layout))
    formula, scalars = sums.formula, sums.scalars
    names = safe_names([*layout, *scalars], taken())
    lines, new = to_source(formula, call, constants(value), names)
    columns = slots(layout)
    letters = {node.value for node in used(formula.outputs.values()) if node.op == "name"}
    read = [(k, letter, part) for k, (letter, part) in enumerate(columns) if letter in letters]
    maps = list(dict.fromkeys(s.dtype for letter, s in layout.items() if letter in letters and s.blockwise))
    role = Role(names, value, "block", "n")
    totals = Totals(sums, new, value)
    body = [
        *_BLOCKS,
        *indented(
            [
                *(role.array(k, letter, part, layout[letter]) for k, letter, part in read),
                *(f"{names[letter]}_scale = {names[letter]}_absmax[0]" for _, letter, part in read if part == "absmax"),
                *totals.of_block,
                "for i in range(n):",
                *indented([*(role.load(n, s) for n, s in layout.items() if n in letters), *lines, *totals.add]),
                *totals.end_block,
            ]
        ),
    ]
    wanted = [(i, name) for i, name in enumerate(scalars) if name in letters]
    table = listed({names[letter]: storage for letter, storage in layout.items() if letter in letters})
    return "".join(
        f"{line}\n"
        for line in (
            f'"""{title}\n',
            *wrapped(f"Sums over {table}; computed in {value}, blocks summed in float64."),
            f"context: addresses of the table of data pointers [tensor, {len(columns)}], of each tensor's row, of the",
            *wrapped(f"rows of scalars ({', '.join(scalars)}), of all chunks' sums, and of each tensor's first chunk."),
            '"""\n',
            "import numpy as np",
            "from numba import carray, cfunc, float32, float64, int8, int32, int64, uint8, uint16, void\n",
            f"from schuss.engine.native import *  # digest {native_digest()}\n\n",
            *(line for dtype in maps for line in _conversions(dtype)),
            '@cfunc(void(int64, int64, int64, int64), cache=True, error_model="numpy")',
            "def kernel(context, tensor, start, count):",
            *indented(
                [
                    "tables = carray(pointer(context, int64), (5,))",
                    f"at = carray(pointer(tables[0] + tensor * {8 * len(columns)}, int64), ({len(columns)},))",
                    "first = carray(pointer(tables[4] + tensor * 8, int64), (1,))[0]",
                    *([ROW, scalars_row(value, len(scalars))] if wanted else []),
                    *(f"{names[name]} = scalar[{i}]" for i, name in wanted),
                    *totals.start,
                    *body,
                    *totals.write(f"tables[3] + (first + start // {CHUNK})"),
                ]
            ),
        )
    )


def factor(text: str) -> str:
    """An expression as a factor."""
    return text if re.fullmatch(r"\w+(\(.*\))?", text) else f"({text})"


class Totals:
    """The statements of a kernel that sum products.

    Those of a block are multiplied and added in the dtype that is computed in, the blocks in float64. To widen every
    term would halve the length of the vectors in which everything else is computed, and take longer than the memory.
    """

    def __init__(self, sums: Sums, outputs: Mapping[str, str], value: str) -> None:
        terms = [" * ".join(factor(outputs[output]) for output in term) for term in sums.terms]
        self._count = len(terms)
        self.start = [f"sum{k}_ = float64(0)" for k in range(self._count)]
        self.of_block = [f"part{k}_ = {value}(0)" for k in range(self._count)]
        self.add = [f"part{k}_ = add_in_any_order(part{k}_, {term})" for k, term in enumerate(terms)]
        self.end_block = [f"sum{k}_ += float64(part{k}_)" for k in range(self._count)]

    def write(self, place: str) -> list[str]:
        """The statements that write the sums to a row of a table, of which `place` is the address in rows."""
        base, _, row = place.partition(" + ")
        return [
            f"sums = carray(pointer({base} + {row} * {8 * self._count}, float64), ({self._count},))",
            *(f"sums[{k}] = sum{k}_" for k in range(self._count)),
        ]


_BLOCKS = (f"for block in range(start, start + count, {BLOCK}):", f"    n = min({BLOCK}, start + count - block)")
"""The loop over the blocks of a stretch: those of 8-bit codes."""

ROW = "row = int64(carray(pointer(tables[1] + tensor * 4, int32), (1,))[0])"


def random_keys(step: str) -> list[str]:
    """The statements that find the keys of a tensor's random bits."""
    return [
        "stream = carray(pointer(tables[3] + tensor * 8, int64), (1,))[0]",
        *(f"key{k} = stream_key(stream >> {32 * k}, int64({step}))" for k in (0, 1)),
    ]


def scalars_row(value: str, count: int) -> str:
    """The statement that finds a tensor's row of scalars."""
    return f"scalar = carray(pointer(tables[2] + row * {int(value[-2:]) // 8 * count}, {value}), ({count},))"


def constants(value: str) -> Callable[[float], str]:
    """What writes a number in the dtype that a kernel computes in."""
    return lambda number: f"{value}({number!r})" if math.isfinite(number) else f"{value}(float('{number}'))"


@dataclass(frozen=True)
class Role:
    """The statements of a kernel about one role.

    Args:
        names: letter -> what it is called in the kernel.
        value: the dtype that the kernel computes in.
        begin, count: where its arrays begin in the tensor, and how many elements they have.
    """

    names: Mapping[str, str]
    value: str
    begin: str
    count: str

    def array(self, column: int, letter: str, part: str, storage: Storage) -> str:
        name, element, length = f"{self.names[letter]}_", ELEMENTS[storage.dtype], self.count
        offset = f"{self.begin} * {element.itemsize}"
        if part == "absmax":
            name, element, length = f"{name}absmax", ELEMENTS[torch.float32], "1"
            offset = f"{self.begin} // {BLOCK} * 4"
        elif part == "compensation":
            name += "rest"
        return f"{name} = carray(pointer(at[{column}] + {offset}, {element.array}), ({length},))"

    def load(self, letter: str, storage: Storage) -> str:
        name, element = self.names[letter], ELEMENTS[storage.dtype]
        loaded = element.load.format(f"{name}_[i]")
        if storage.blockwise:
            loaded += f" * {name}_scale"
        if storage.kahan:
            loaded += " + " + element.load.format(f"{name}_rest[i]")
        return f"{name} = {self.value}({loaded})" if self._converts(element) else f"{name} = {loaded}"

    def store(self, letter: str, storage: Storage, result: str) -> list[str]:
        name, element = self.names[letter], ELEMENTS[storage.dtype]
        result = f"float32({result})" if self._converts(element) else result
        if storage.blockwise:
            return [f"{name}_values[i] = {result}", f"{name}_top = larger({name}_top, {result})"]
        if storage.kahan:
            stored = element.load.format(f"{name}_bits")
            return [
                f"{name}_bits = {element.store.format(result)}",
                f"{name}_[i] = {name}_bits",
                f"{name}_rest[i] = {element.store.format(f'remainder({result}, {stored})')}",
            ]
        if storage.stochastic:
            return [
                f"{name}_[i] = {element.stochastic.format(result, random=f'random_bits({self.begin} + i, key0, key1)')}"
            ]
        return [f"{name}_[i] = {element.store.format(result)}"]

    def scale(self, letter: str) -> str:
        name = self.names[letter]
        return f"{name}_absmax[0], {name}_inverse = scale_of({name}_top)"

    def encode(self, letter: str, storage: Storage) -> str:
        name = self.names[letter]
        return f"{name}_[i] = {ELEMENTS[storage.dtype].store.format(f'{name}_values[i] * {name}_inverse')}"

    def _converts(self, element: Element) -> bool:
        return self.value == "float64" and element.array != self.value


def _conversions(dtype: torch.dtype) -> list[str]:
    """The functions between 8-bit codes and shares of a block's absmax."""
    name, text = dtype_name(dtype), []
    for word, function, result in (
        ("decode", MAPS[dtype].decode, "{}"),
        ("encode", MAPS[dtype].encode, f"cut_off_{name}({{}})"),
    ):
        lines, new = to_source(traced(function, "x"), call, lambda number: f"float32({number!r})", {"x": "x"})
        argument = "x = float32(code)" if word == "decode" else None
        text += ["@inline", f"def {word}_{name}({'code' if argument else 'x'}):"]
        text += indented([*([argument] if argument else []), *lines, f"return {result.format(new['out'])}"])
        text += ["", ""]
    return text


@cache
def taken() -> set[str]:
    """The names that a kernel's text has for itself."""
    from schuss.engine import native

    own = (
        "kernel context tensor start count tables at row scalar i block n stream key0 key1 first sums "
        "unit beside shape height width line begin"
    )
    words = {f"{word}_{dtype_name(dtype)}" for word in ("decode", "encode") for dtype in MAPS}
    numbers = {"int8", "int32", "int64", "uint8", "uint16", "float32", "float64"}
    return {*own.split(), "cfunc", "carray", "void", "np", *words, *numbers, *dir(native), *dir(builtins)}


@cache
def native_digest() -> str:
    """Tells the texts that kernels are compiled with: they are compiled anew when one changes."""
    texts = [files("schuss.engine").joinpath(name).read_text(encoding="utf-8") for name in ("native.py", "storage.py")]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
