"""The text of a CPU kernel that goes through matrices row by row: it reads, or sums, numbers of rows and columns."""

from collections.abc import Mapping

from schuss.engine.numba_kernel import ROW, Role, Totals, constants, native_digest, random_keys, scalars_row, taken
from schuss.engine.stages import Domain, Sums
from schuss.engine.storage import BLOCK, Layout, compute_dtype, slots
from schuss.engine.text import call, dtype_name, indented, listed, safe_names, wrapped
from schuss.engine.trace import Formula, to_source, used

TABLES = (
    "the table of data pointers [tensor, role]",
    "each tensor's row of scalars",
    "the rows of scalars",
    "the random streams",
    "the stretches: tensor, first row, rows, first stretch of columns",
    "the addresses of numbers of rows and columns [tensor, name]",
    "the shape: rows of a matrix, columns, tensors, rows of a tensor, stretches of columns",
    "the sums of stretches",
    "the sums of rows",
    "the sums of stretches of columns, in the dtype that is computed in",
)
"""What the context holds addresses of."""


def rows_source(
    title: str,
    formula: Formula,
    scalars: tuple[str, ...],
    layout: Layout,
    vectors: Mapping[str, Domain],
    sums: Sums | None = None,
) -> str:
    """The text of a kernel that goes through a stretch of rows of a tensor of at least two dimensions.

    Args:
        title: what the kernel is, for its reader.
        formula: what is stored, or summed.
        scalars: names of the scalars, in the order of a row of the table.
        layout: the storage of each role of the table of addresses.
        vectors: the numbers of rows and columns, in the order of their addresses.
        sums: how outputs are summed; None: they are stored.
    """
    value = dtype_name(compute_dtype(layout))
    names = safe_names([*layout, *scalars, *vectors], taken())
    lines, new = to_source(formula, call, constants(value), names)
    read = {node.value for node in used(formula.outputs.values()) if node.op == "name"}
    stored = {} if sums is not None else {n: new[n] for n in layout if n in new and new[n] != names[n]}
    role, columns = Role(names, value, "begin", "n"), slots(layout)
    arrays = [role.array(k, n, part, layout[n]) for k, (n, part) in enumerate(columns) if n in read or n in stored]
    loads = [role.load(letter, storage) for letter, storage in layout.items() if letter in read]
    stores = [line for letter, result in stored.items() for line in role.store(letter, layout[letter], result)]
    size, of_line, at_end, totals = (
        int(value[-2:]) // 8,
        [],
        [],
        Totals(sums, new, value) if sums and sums.terms else None,
    )
    for k, (name, domain) in enumerate(vectors.items()):
        if name in read and domain == Domain.COLUMNS:
            at = f"(line // height * width + block) * {size}"
            arrays.append(f"{names[name]}_ = carray(pointer(beside[{k}] + {at}, {value}), (n,))")
            loads.append(f"{names[name]} = {names[name]}_[i]")
        elif name in read:
            of_line.append(f"{names[name]} = carray(pointer(beside[{k}] + line * {size}, {value}), (1,))[0]")
    after = []
    if sums is not None:
        for k, output in enumerate(sums.rows):
            of_line.append(f"row{k}_ = float64(0)")
            arrays.append(f"of_row{k}_ = {value}(0)")
            stores.append(f"of_row{k}_ = add_in_any_order(of_row{k}_, {new[output]})")
            after.append(f"row{k}_ += float64(of_row{k}_)")
            at = f"(({k} * shape[2] + tensor) * shape[3] + line) * 8"
            at_end.append(f"carray(pointer(tables[8] + {at}, float64), (1,))[0] = row{k}_")
        for k, output in enumerate(sums.columns):
            at = f"({k} * shape[4] + unit[3] + (line - unit[1]) // height) * width + block"
            arrays.append(f"column{k}_ = carray(pointer(tables[9] + ({at}) * {size}, {value}), (n,))")
            stores.append(f"column{k}_[i] += {new[output]}")
    keyed = bool(stored) and layout["p"].stochastic
    wanted = {*read, *(["step"] if keyed else [])}
    once = [f"{names[name]} = scalar[{i}]" for i, name in enumerate(scalars) if name in wanted]
    once += random_keys(names["step"]) if keyed else []
    table = listed({names[n]: storage for n, storage in layout.items() if n in read or n in stored})
    of_block, add, end_block = (totals.of_block, totals.add, totals.end_block) if totals else ([], [], [])
    loop = [
        f"n = min({BLOCK}, width - block)",
        "begin = line * width + block",
        *arrays,
        *of_block,
        "for i in range(n):",
    ]
    loop += [*indented([*loads, *lines, *stores, *add]), *end_block, *after]
    loop = [*of_line, f"for block in range(0, width, {BLOCK}):", *indented(loop), *at_end]
    text = [
        f'"""{title}\n',
        *wrapped(f"One pass over {table}, row by row; computed in {value}."),
        "context: addresses of",
        *(f"    {what}{'.' if what == TABLES[-1] else ';'}" for what in TABLES),
        *wrapped(f"Roles: {', '.join(f'{names[n]} {part}' for n, part in columns)}."),
        *wrapped(f"Scalars: {', '.join(scalars) or 'none'}."),
        *wrapped(f"Numbers of rows and columns: {', '.join(vectors) or 'none'}."),
        '"""\n',
        "import numpy as np",
        "from numba import carray, cfunc, float32, float64, int32, int64, uint16, void\n",
        f"from schuss.engine.native import *  # digest {native_digest()}\n\n",
        '@cfunc(void(int64, int64, int64, int64), cache=True, error_model="numpy")',
        "def kernel(context, tensor_, start, count):  # one call for each stretch",
        *indented(
            [
                f"tables = carray(pointer(context, int64), ({len(TABLES)},))",
                "unit = carray(pointer(tables[4] + tensor_ * 32, int64), (4,))",
                "tensor = unit[0]",
                f"at = carray(pointer(tables[0] + tensor * {8 * len(columns)}, int64), ({len(columns)},))",
                f"beside = carray(pointer(tables[5] + tensor * {8 * len(vectors)}, int64), ({max(len(vectors), 1)},))",
                "shape = carray(pointer(tables[6], int64), (5,))",
                "height, width = shape[0], shape[1]",
                *([ROW, scalars_row(value, len(scalars))] if once else []),
                *once,
                *(totals.start if totals else []),
                "for line in range(unit[1], unit[1] + unit[2]):",
                *indented(loop),
                *(totals.write("tables[7] + tensor_") if totals else []),
            ]
        ),
    ]
    return "".join(f"{line}\n" for line in text)
