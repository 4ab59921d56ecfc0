"""The CUDA back end: a formula becomes the text of a Triton kernel that updates chunks of tensors in one pass.

The numbers are those of the CPU kernels and of eager torch, bit for bit: no contracted multiplications, and quotients
and roots that are rounded once. A step waits for memory, so they cost nothing.
"""

import builtins
import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schuss.engine import cache as code_cache
from schuss.engine.stages import Sums
from schuss.engine.storage import BLOCK, MAPS, Layout, Storage, compute_dtype, slots, traced
from schuss.engine.text import call, dtype_name, indented, listed, safe_names, wrapped
from schuss.engine.trace import Expr, Formula, to_source, used

NUM_WARPS = 8
CHUNK = BLOCK * NUM_WARPS
"""Elements of one program: 8 of each role per thread, which is two 128-bit loads of float32.

An H200 hides its latency with about 30 kB under way per multiprocessor. A program of AdamW loads 32 kB at once and
needs few enough registers for several of them; a smaller chunk would pay more often for reading its addresses. One
block of 8-bit codes per warp makes the search for its absmax an exchange between lanes, without shared memory.
"""
TABLES = ("work", "sizes", "addresses", "row_of", "table", "streams", "factor", "skip")
"""What a kernel is launched with. It is compiled once, wherever in a buffer of the caller they begin."""
SUM_TABLES = ("work", "sizes", "addresses", "row_of", "table", "sums", "factor")
"""What a kernel that sums is launched with."""
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False, "sanitize_overflow": False}
"""How kernels are compiled. Hashes overflow on purpose."""


@dataclass(frozen=True)
class Element:
    """How kernels load and store an element of a dtype. `{}` stands for the value, `{random}` for 32 random bits."""

    memory: str
    load: str = "{}"
    store: str = "{}"
    stochastic: str = ""


ELEMENTS = {
    torch.float32: Element("float32"),
    torch.float64: Element("float64"),
    torch.bfloat16: Element("uint16", "widen_bfloat16({})", "narrow_bfloat16({})", "stochastic_bfloat16({}, {random})"),
    torch.float16: Element("float16", "widen_float16({})", "narrow_float16({})", "stochastic_float16({}, {random})"),
    torch.int8: Element("int8", "decode_int8({})", "encode_int8({})"),
    torch.uint8: Element("uint8", "decode_uint8({})", "encode_uint8({})"),
}


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
    lines, new = to_source(_in_words(formula), call, lambda number: _constant(value, number), names)
    columns = [_Column(names[letter], part, layout[letter]) for letter, part in slots(layout)]
    blocks, stochastic = any(s.blockwise for s in layout.values()), layout["p"].stochastic
    stores = [
        line
        for letter, storage in layout.items()
        if letter in new and new[letter] != names[letter]
        for line in _store(names[letter], storage, new[letter], value)
    ]
    tile = _tile(blocks)
    keys = ["key0", "key1"] if stochastic else []
    if stochastic:
        tile += ["random = random_bits(start + i, key0, key1)"]
    read = {node.value for node in used(formula.outputs.values()) if node.op == "name"}
    loads = [_load(names[letter], storage, value) for letter, storage in layout.items() if letter in read]
    addresses = [c.address for c in columns]
    arguments = ["start", "size", *addresses, *(names[name] for name in scalars), *keys]
    stream = ["stream = tl.load(streams + tensor)"] if stochastic else []
    stream += [f"{key} = stream_key(stream >> {32 * k}, {names['step']})" for k, key in enumerate(keys)]
    factor = ["if factor is not None:", f"    {names['gain']} *= tl.load(factor)"] if "gain" in scalars else []
    table = listed({names[letter]: storage for letter, storage in layout.items()})
    return "".join(
        f"{line}\n"
        for line in (
            f'"""{title}\n',
            *wrapped(f"One pass over {table}; computed in {value}."),
            "A program updates the chunk of a tensor that its row of work names. Columns of addresses:",
            *wrapped(f"{', '.join(c.name for c in columns)}; of the table of scalars: {', '.join(scalars)}."),
            '"""\n',
            "import triton",
            "import triton.language as tl\n",
            f"from schuss.engine.triton_words import *  # digest {_words_digest()}\n\n",
            *(line for d in dict.fromkeys(s.dtype for s in layout.values() if s.blockwise) for line in _conversions(d)),
            "@triton.jit",
            *_wrapped("def update(", [*arguments, "FULL:\xa0tl.constexpr", "TILE:\xa0tl.constexpr"], "):"),
            *indented([*tile, *(c.pointer for c in columns), *loads, *lines, *stores]),
            "\n",
            *_wrapped("@triton.jit(do_not_specialize_on_alignment=[", list(map(repr, TABLES)), "])"),
            f"def kernel({', '.join(TABLES)}, CHUNK: tl.constexpr):",
            *indented(
                [
                    "if skip is not None:",
                    "    if tl.load(skip) != 0:",
                    "        return",
                    "at = work + 2 * tl.program_id(0)",
                    "tensor = tl.load(at).to(tl.int64)",
                    "start = tl.load(at + 1).to(tl.int64) * CHUNK",
                    "size = tl.load(sizes + tensor)",
                    f"column = addresses + tensor * {len(columns)}",
                    *(f"{name} = tl.load(column + {k})" for k, name in enumerate(addresses)),
                    f"row = table + tl.load(row_of + tensor).to(tl.int64) * {len(scalars)}",
                    *(f"{names[name]} = tl.load(row + {k})" for k, name in enumerate(scalars)),
                    *factor,
                    *stream,
                    *_whole_chunks(addresses),
                    *indented(_wrapped("update(", [*arguments, "True", "CHUNK"], ")")),
                    "else:  # in tiles, since masks of a whole chunk would take registers from the path above",
                    "    end = tl.minimum(size, start + CHUNK)",
                    "    while start < end:",
                    *indented(indented(_wrapped("update(", [*arguments, "False", "CHUNK // 4"], ")"))),
                    "        start += CHUNK // 4",
                ]
            ),
        )
    )


def sum_source(title: str, sums: Sums, layout: Layout, value: str | None = None) -> str:
    """The text of a kernel that sums the values of formulas over each chunk, in float64.

    Args:
        title: what the kernel is, for its reader.
        sums: what is summed.
        layout: the storage of each role of the table of addresses.
        value: the dtype that the formulas are computed in; None: as the rule.
    """
    value = value or dtype_name(compute_dtype(layout))
    formula, scalars = sums.formula, sums.scalars
    names = safe_names([*layout, *scalars], taken())
    lines, new = to_source(_in_words(formula), call, lambda number: _constant(value, number), names)
    letters = {node.value for node in used(formula.outputs.values()) if node.op == "name"}
    all_columns = [(letter, _Column(names[letter], part, layout[letter])) for letter, part in slots(layout)]
    columns = [(k, column) for k, (letter, column) in enumerate(all_columns) if letter in letters]
    addresses = [column.address for _, column in columns]
    wanted = [(k, name) for k, name in enumerate(scalars) if name in letters]
    arguments = ["sums", "start", "size", *addresses, *(names[name] for _, name in wanted)]
    blocks = any(column.storage.blockwise for _, column in columns)
    products = [" * ".join(f"({new[output]}).to(tl.float64)" for output in term) for term in sums.terms]
    maps = dict.fromkeys(s.dtype for letter, s in layout.items() if letter in letters and s.blockwise)
    scaled = any(name == "gain" for _, name in wanted)
    table = listed({names[letter]: storage for letter, storage in layout.items() if letter in letters})
    factor = ["if factor is not None:", f"    {names['gain']} *= tl.load(factor)"] if scaled else []
    return "".join(
        f"{line}\n"
        for line in (
            f'"""{title}\n',
            *wrapped(f"Sums over {table}; computed in {value}, summed in float64."),
            'A program sums the chunk of a tensor that its row of work names.\n"""\n',
            "import triton",
            "import triton.language as tl\n",
            f"from schuss.engine.triton_words import *  # digest {_words_digest()}\n\n",
            *(line for dtype in maps for line in _conversions(dtype)),
            "@triton.jit",
            *_wrapped("def update(", [*arguments, "FULL:\xa0tl.constexpr", "TILE:\xa0tl.constexpr"], "):"),
            *indented(
                [
                    *_tile(blocks),
                    *(column.pointer for _, column in columns),
                    *(_load(names[letter], layout[letter], value) for letter in layout if letter in letters),
                    *lines,
                    *(line for k, product in enumerate(products) for line in _sum(k, product, len(products), blocks)),
                ]
            ),
            "\n",
            *_wrapped("@triton.jit(do_not_specialize_on_alignment=[", list(map(repr, SUM_TABLES)), "])"),
            f"def kernel({', '.join(SUM_TABLES)}, CHUNK: tl.constexpr):",
            *indented(
                [
                    "at = work + 2 * tl.program_id(0)",
                    "tensor = tl.load(at).to(tl.int64)",
                    "start = tl.load(at + 1).to(tl.int64) * CHUNK",
                    "size = tl.load(sizes + tensor)",
                    f"column = addresses + tensor * {len(all_columns)}",
                    *(f"{column.address} = tl.load(column + {k})" for k, column in columns),
                    *([f"row = table + tl.load(row_of + tensor).to(tl.int64) * {len(scalars)}"] if wanted else []),
                    *(f"{names[name]} = tl.load(row + {k})" for k, name in wanted),
                    *factor,
                    *_whole_chunks(addresses),
                    *indented(_wrapped("update(", [*arguments, "True", "CHUNK"], ")")),
                    "else:",
                    *indented(_wrapped("update(", [*arguments, "False", "CHUNK"], ")")),
                ]
            ),
        )
    )


def _tile(blocks: bool) -> list[str]:
    """The indices of a tile's elements: in rows, one for each block of 8-bit codes, if there are such."""
    lines = ["i = tl.arange(0, TILE)"]
    if blocks:
        lines = ["block = tl.arange(0, TILE // BLOCK)", "i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]"]
    lines += ["count = tl.minimum(size - start, TILE).to(tl.int32)", "inside = None if FULL else i < count"]
    return [*lines, "blocks = None if FULL else block * BLOCK < count"] if blocks else lines


def _sum(k: int, product: str, count: int, blocks: bool) -> list[str]:
    """The statements that write sum number `k` of `count` of a tile."""
    terms = f"sum{k}_" if not blocks else f"tl.sum(sum{k}_, axis=1)"
    return [
        f"sum{k}_ = {product}",
        f"sum{k}_ = sum{k}_ if FULL else tl.where(inside, sum{k}_, 0)",
        f"tl.store(sums + tl.program_id(0) * {count} + {k}, tl.sum({terms}, axis=0))",
    ]


@dataclass(frozen=True)
class _Column:
    """A column of the table of addresses, and the array that begins there."""

    letter: str
    part: str
    storage: Storage

    @property
    def name(self) -> str:
        return self.letter if self.part == "values" else f"{self.letter}_{PARTS[self.part]}"

    @property
    def address(self) -> str:
        return f"{self.name}_at"

    @property
    def pointer(self) -> str:
        if self.part == "absmax":  # one or a few numbers for each program: no vectors to align
            return f"{self.name}_ = pointer({self.address} + start // BLOCK * 4, tl.float32, False)"
        size = self.storage.dtype.itemsize
        offset = "start" if size == 1 else f"start * {size}"
        return f"{self.name}_ = pointer({self.address} + {offset}, tl.{ELEMENTS[self.storage.dtype].memory}, FULL)"


PARTS = {"absmax": "absmax", "compensation": "rest"}


def _load(name: str, storage: Storage, value: str) -> str:
    element = ELEMENTS[storage.dtype]
    loaded = element.load.format(f"tl.load({name}_ + i, inside)")
    if storage.blockwise:
        loaded += f" * tl.load({name}_absmax_ + block, blocks)[:, None]"
    if storage.kahan:
        loaded += " + " + element.load.format(f"tl.load({name}_rest_ + i, inside)")
    return f"{name} = ({loaded}).to(tl.{value})" if _converts(storage, value) else f"{name} = {loaded}"


def _store(name: str, storage: Storage, result: str, value: str) -> list[str]:
    element, result = ELEMENTS[storage.dtype], f"({result}).to(tl.float32)" if _converts(storage, value) else result
    if storage.blockwise:
        return [
            f"{name}_absmax, {name}_inverse = scale_of({result}, i, inside)",
            f"tl.store({name}_absmax_ + block, {name}_absmax, blocks)",
            f"tl.store({name}_ + i, {element.store.format(f'{result} * {name}_inverse[:, None]')}, inside)",
        ]
    if storage.kahan:
        rest = f"remainder({result}, {element.load.format(f'{name}_bits')})"
        return [
            f"{name}_bits = {element.store.format(result)}",
            f"tl.store({name}_ + i, {name}_bits, inside)",
            f"tl.store({name}_rest_ + i, {element.store.format(rest)}, inside)",
        ]
    text = element.stochastic if storage.stochastic else element.store
    return [f"tl.store({name}_ + i, {text.format(result, random='random')}, inside)"]


def _converts(storage: Storage, value: str) -> bool:
    return value == "float64" and storage.dtype != torch.float64


def _conversions(dtype: torch.dtype) -> list[str]:
    """The functions between 8-bit codes and shares of a block's absmax."""
    name, map, text = dtype_name(dtype), MAPS[dtype], []
    for word, argument, function in (("decode", "code", map.decode), ("encode", "share", map.encode)):
        lines, new = to_source(_in_words(traced(function, argument)), call, lambda n: _constant("float32", n))
        result = new["out"]
        if word == "decode":
            lines = [f"{argument} = {argument}.to(tl.float32)", *lines]
        else:
            result = f"({result}).to(tl.int32).to(tl.{name})"  # cuts the fraction off
        text += ["@triton.jit", f"def {word}_{name}({argument}):", *indented([*lines, f"return {result}"]), "\n"]
    return text


def _in_words(formula: Formula) -> Formula:
    """The formula with what Triton's operators do differently from IEEE as words, and whole powers as products."""
    done: dict[Expr, Expr] = {}

    def rewritten(node: Expr) -> Expr:
        if node not in done:
            args = tuple(rewritten(arg) for arg in node.args)
            if node.op in ("name", "const"):
                done[node] = node
            elif node.op == "pow" and args[1].op == "const" and isinstance(args[1].value, int):
                done[node] = _product(args[0], args[1].value)
            else:
                op = {"div": "divide", "neg": "negative", "pow": "power"}.get(node.op, node.op)
                done[node] = node.graph.node(op, *args)
        return done[node]

    return Formula(formula.inputs, {name: rewritten(node) for name, node in formula})


def _product(base: Expr, exponent: int) -> Expr:
    """A whole power, multiplied in the order of the CPU kernels."""
    result, rest = None, abs(exponent)
    while rest:
        if rest & 1:
            result = base if result is None else base.graph.node("mul", result, base)
        rest >>= 1
        base = base.graph.node("mul", base, base) if rest else base
    one = base.graph.constant(1.0)
    if result is None:
        return one
    return result if exponent > 0 else base.graph.node("divide", one, result)


def _constant(value: str, number: float) -> str:
    return f"{value}({number!r})" if math.isfinite(number) else f"{value}(float('{number}'))"


def _wrapped(head: str, arguments: Sequence[str], tail: str) -> list[str]:
    """A call or a signature in lines of a readable length."""
    return wrapped(f"{head}{', '.join(arguments)}{tail}", "    ")


def _whole_chunks(addresses: Sequence[str]) -> list[str]:
    """The condition that a program's chunk is a whole one, and every array aligned."""
    return wrapped(f"if (start + CHUNK <= size) & (({' | '.join(addresses)}) % 16 == 0):", "        ")


@cache
def taken() -> set[str]:
    """The names that a kernel's text has for itself."""
    own = (
        "kernel update work sizes addresses row_of table streams skip CHUNK FULL TILE at tensor start size column row "
        "stream key0 key1 random end block i count inside blocks factor sums triton tl code share"
    )
    words = {f"{word}_{dtype_name(dtype)}" for word in ("decode", "encode") for dtype in MAPS}
    text = files("schuss.engine").joinpath("triton_words.py").read_text(encoding="utf-8")
    return {*own.split(), *words, *re.findall(r"^(?:def )?(\w+)", text, re.MULTILINE), *dir(builtins)}


@cache
def _words_digest() -> str:
    """Tells the texts that kernels are compiled with: a file of a kernel names them, so that no old one is taken."""
    texts = [files("schuss.engine").joinpath(n).read_text(encoding="utf-8") for n in ("triton_words.py", "storage.py")]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


# --- running ----------------------------------------------------------------------------------------------------------


@cache
def load(label: str, source: str) -> Any:
    """The kernel of this text, ready to `run`. It is compiled by its first run, and kept by Triton on disk."""
    return code_cache.load(label, source).kernel


def run(
    kernel: Any,
    programs: int,
    work: torch.Tensor,
    sizes: torch.Tensor,
    addresses: torch.Tensor,
    row_of: torch.Tensor,
    table: torch.Tensor,
    streams: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """Launch a kernel on the tensors' device and its current stream.

    Args:
        kernel: what `load` returned.
        programs: how many rows of `work` are run.
        work: int32 [programs, 2]: a tensor, and which of its chunks of CHUNK elements.
        sizes: int64 [tensors]: elements, reals for complex tensors.
        addresses: int64 [tensors, columns], in the order of `storage.slots`.
        row_of: int32 [tensors]: rows of the table.
        table: [rows, scalars] in the dtype that the kernel computes in.
        streams: int64 [tensors], for stochastic rounding.
        factor: one number that the scalar "gain" is multiplied by.
        skip: one float32; if it is not 0 when the kernel runs, nothing is changed.
    """
    if programs:
        with torch.cuda.device_of(work), np.errstate(all="ignore"):  # NumPy computes in Triton's interpreter
            kernel[(programs,)](work, sizes, addresses, row_of, table, streams, factor, skip, CHUNK=CHUNK, **OPTIONS)


def run_sums(
    kernel: Any,
    count: int,
    programs: int,
    work: torch.Tensor,
    sizes: torch.Tensor,
    addresses: torch.Tensor,
    row_of: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch a kernel of `sum_source` that finds `count` sums; returns float64 [programs, count], those of the chunks.

    The other arguments are as for `run`.
    """
    sums = torch.empty(programs, count, dtype=torch.float64, device=work.device)
    if programs:
        with torch.cuda.device_of(work), np.errstate(all="ignore"):
            kernel[(programs,)](work, sizes, addresses, row_of, table, sums, factor, CHUNK=CHUNK, **OPTIONS)
    return sums


def add_up(sums: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The sums of tensors from those of their chunks, in an order that does not change: [tensors, sums].

    Args:
        sums: [chunks, sums], the chunks of a tensor next to one another.
        ends: [tensors]: where each one's chunks end.
    """
    result = torch.empty(len(ends), sums.shape[1], dtype=sums.dtype, device=sums.device)
    if result.numel():
        from schuss.engine import triton_words

        with torch.cuda.device_of(sums), np.errstate(all="ignore"):
            triton_words.add_up[tuple(result.shape)](sums, ends, result, sums.shape[1], TILE=1024, num_warps=4)
    return result


@cache
def obstacle() -> str | None:
    """Why kernels cannot run here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton
    except (ImportError, OSError) as error:
        return f"triton cannot be imported: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        return f"triton {triton.__version__} is older than 3.5"
    if interpreted():
        return None
    if torch.version.hip or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when they were loaded."""
    from triton.runtime.jit import JITFunction

    from schuss.engine import triton_words

    return not isinstance(triton_words.sqrt, JITFunction)


# --- looking at machine code ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A compiled kernel."""

    ptx: str
    cubin: bytes = b""


@dataclass(frozen=True)
class Resources:
    """What a thread of a compiled kernel occupies."""

    registers: int
    spilled_bytes: int
    """Of registers that are written to memory and read back."""


def compiled(
    label: str, source: str, layout: Layout, arch: str = "sm_90", skip: bool = False, *, sums: bool = False
) -> Machine:
    """The machine code of a kernel's text, which takes no GPU.

    Args:
        label, source: as for `load`.
        layout: the layout that the text was made for.
        arch: what it is compiled for, as `sm_90`.
        skip: whether the kernel is launched with a tensor `skip`.
        sums: whether the text is that of a kernel that sums.

    Raises:
        ValueError: `arch` has another form.
        RuntimeError: kernels are interpreted.
    """
    if not (match := re.fullmatch(r"sm_(\d{2,3})", arch)):
        raise ValueError(f"arch must be sm_NN with a compute capability such as sm_90, got {arch!r}")
    if interpreted():
        raise RuntimeError("nothing is compiled with TRITON_INTERPRET=1: unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    table = "*fp64" if compute_dtype(layout) == torch.float64 else "*fp32"
    kinds = {"work": "*i32", "row_of": "*i32", "table": table, "factor": table, "skip": "*fp32", "sums": "*fp64"}
    types = {name: kinds.get(name, "*i64") for name in (SUM_TABLES if sums else TABLES)}
    optional = {"streams": layout["p"].stochastic, "factor": False, "skip": skip}
    absent = [name for name in types if not optional.get(name, True)]
    constants = {"CHUNK": CHUNK} | dict.fromkeys(absent)
    text = ASTSource(load(label, source), types | dict.fromkeys(constants, "constexpr"), constants)
    made = triton.compile(text, target=GPUTarget("cuda", int(match[1]), 32), options=OPTIONS)
    return Machine(made.asm["ptx"], made.asm["cubin"])


def resources(machine: Machine) -> Resources:
    """What the assembler that comes with Triton says of a kernel.

    Raises:
        RuntimeError: it says nothing.
    """
    from triton import knobs

    [target] = re.findall(r"^\.target (\w+)", machine.ptx, re.MULTILINE)
    tools = [getattr(knobs.nvidia, name, None) for name in ("ptxas", "ptxas_blackwell")]  # which, depends on versions
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(machine.ptx, encoding="utf-8")
        options = ["-v", "--fmad=false", f"-arch={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
        runs = [subprocess.run([t.path, *options], capture_output=True, text=True, check=False) for t in tools if t]
    said = next((run.stderr for run in runs if run.returncode == 0), runs[0].stderr)
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or spilled is None:
        raise RuntimeError(f"the assembler says nothing of registers: {said}")
    return Resources(int(registers[1]), int(spilled[1]) + int(spilled[2]))
