"""What an optimizer is, read from its class: the table of all, the formula as mathematics, the kernel as text."""

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.printing.pretty.stringpict import prettyForm

from schuss import optim
from schuss.bounds import nearest
from schuss.engine.bucket import make
from schuss.engine.numba_kernel import NUMBERS
from schuss.engine.route import missing_form
from schuss.engine.stages import MEANS, SIZES, SUMS, Domain, Sums, Transform, is_staged
from schuss.engine.state import chosen, parameter_storage
from schuss.engine.storage import SMALLEST_BLOCKWISE, Layout, Storage, as_reals
from schuss.engine.trace import Expr, Formula, Graph, parameters, used
from schuss.formula import MatrixCall
from schuss.lookup import named
from schuss.matrices.newton_schulz import orthogonalize
from schuss.optimizer import Optimizer
from schuss.rule import Rule

SYMBOLS = {
    "lr": "gamma",
    "gamma": "gamma_c",
    "eps": "epsilon",
    "weight_decay": "lambda",
    "momentum": "mu",
    "step": "t",
    "beta2_decay": "tau",
}
"""How papers write what code calls by a word."""


@dataclass(frozen=True)
class Row:
    """A line of the table of optimizers."""

    name: str
    summary: str
    state_bytes: int
    """Bytes of state per float32 element, with the default hyperparameters; only of states that are like the element's
    parameter."""
    source: str
    beside: tuple[str, ...] = ()
    """What a parameter has beside them: "rows", a number for each row or column, or "squares", square matrices with its
    sides."""

    @property
    def state(self) -> str:
        """All of it in words, as `schuss list` shows it: "8 + squares"."""
        return " + ".join([str(self.state_bytes), *self.beside])


_BESIDE = {"columns": "rows", "left": "squares", "right": "squares"}


def table() -> list[Row]:
    """The optimizers of schuss."""
    rows = []
    for cls in (*optim.RULES, *optim.OF_ANOTHER_KIND):
        rule, group = _declared(cls, {})
        likes = ["squares" if callable(s.like) else s.like for s in rule.present(rule.variant(group))]
        states = cls.vectors_kept(group) if issubclass(cls, optim.LBFGS) else likes.count("p")
        beside = dict.fromkeys(_BESIDE.get(like, like) for like in likes if like != "p")
        rows.append(Row(cls.__name__, summary(cls), 4 * states, cls.source, tuple(beside)))
    return rows


def summary(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def find(name: str) -> type[Optimizer]:
    """The optimizer called `name`, of schuss or, as `module:Class`, of anybody.

    Raises:
        ValueError: there is none, or it is no schuss optimizer, or one without a formula.
    """
    if ":" in name:
        cls = named(name)
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise ValueError(f"{name} is not a subclass of schuss.Optimizer")
    else:
        known = {cls.__name__: cls for cls in (*optim.RULES, *optim.OF_ANOTHER_KIND)}
        if name not in known:
            raise ValueError(f"unknown optimizer {name!r}: {nearest(name, known)}")
        cls = known[name]
    if issubclass(cls, optim.LBFGS):
        raise ValueError(f"{name} is a search along lines: it has neither a formula of one element nor a plan")
    return cls


@dataclass(frozen=True)
class Kernel:
    """A kernel as text, and what it was made from."""

    label: str
    source: str
    layout: Layout
    sums: bool = False
    """Whether it finds sums, and stores nothing."""
    heading: str = ""
    """Which of several passes it is."""


def kernels(
    cls: type[Optimizer],
    settings: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "numba",
) -> list[Kernel]:
    """The kernels of an optimizer in the order of a step's passes, for tensors large enough for every storage.

    Args:
        cls: the optimizer.
        settings: hyperparameters and options: state_dtype and rounding choose what they load and store.
        dtype: of the parameters and gradients.
        backend: "numba" or "triton".

    Raises:
        ValueError: the back end has none for this rule.
    """
    optimizer, p = example(cls, settings, dtype)
    rule, group = optimizer._rule, optimizer.param_groups[0]
    variant = rule.variant(group, p)
    there = {n: rule.states[n] for n, exists in rule.letters(variant).items() if exists}
    states = {n: chosen(optimizer, p, state)[0] for n, state in there.items() if state.like == "p"}
    if (obstacle := missing_form(rule.needs(variant), backend, p, states.values())) is not None:
        raise ValueError(f"{cls.__name__}: {backend} has no kernel for {obstacle}; backend='reference' prints the rule")
    pieces = rule.pieces(rule.unpack(rule.numbers(group)))
    layout = as_reals({"p": parameter_storage(optimizer, p), "g": Storage(p.dtype), **states})
    of_formula, of_sums = _texts(f"{cls.__module__}.{cls.__name__}", backend, "vectors" in rule.needs(variant))
    made, label = make(rule, variant, pieces, layout, of_formula, of_sums), cls.__name__.lower()
    found: list[Kernel] = []
    for k, level in enumerate(made.stages.levels if made.stages is not None else ()):
        if level.sums is not None:
            found.append(Kernel("sum", made.sums[k], layout, sums=True, heading="finds sums"))
        if level.transforms:
            told = "; ".join(map(_told, level.transforms))
            found.append(Kernel(label, made.stores[k], layout, heading=f"writes matrices for torch: {told}"))
    found.append(Kernel(label, made.kernel, layout, heading="updates"))
    if len(found) == 1:
        return [replace(found[0], heading="")]
    return [replace(one, heading=f"pass {k} of {len(found)} {one.heading}") for k, one in enumerate(found, start=1)]


def _texts(
    title: str, backend: str, in_rows: bool
) -> tuple[
    Callable[[Formula, tuple[str, ...], Layout, Mapping[str, Domain]], str],
    Callable[[Sums, Layout], str],
]:
    """What writes the kernels of formulas and of sums, as the buckets of a back end do."""
    of_sums = f"Sums of {title}"
    if in_rows:
        from schuss.engine.numba_rows import rows_source

        return (
            lambda formula, scalars, layout, vectors: rows_source(title, formula, scalars, layout, vectors),
            lambda sums, layout: rows_source(of_sums, sums.formula, sums.scalars, layout, sums.vectors, sums),
        )
    if backend == "triton":
        from schuss.engine.triton import kernel_source, sum_source
    else:
        from schuss.engine.numba_kernel import kernel_source, sum_source
    return (
        lambda formula, scalars, layout, _: kernel_source(title, formula, scalars, layout),
        lambda sums, layout: sum_source(of_sums, sums, layout),
    )


def _told(transform: Transform) -> str:
    """A function of matrices as a statement of the kernels' names."""
    call = f"{transform.node.op.function.__name__}({transform.argument})"
    return call if transform.result is None else f"{transform.result} = {call}"


def show(
    cls: type[Optimizer],
    settings: Mapping[str, Any],
    *,
    backend: str | None = None,
    dtype: str = "float32",
    latex: bool = False,
    ptx: str | None = None,
) -> str:
    """What `schuss show` prints: an optimizer's formula, its rule as Python (reference), or its kernel.

    Args:
        cls, settings: the optimizer, with hyperparameters and options.
        backend: "reference", or "numba" or "triton" for the kernel of that compiler.
        dtype: of the parameters, for a kernel.
        latex: print the formula as LaTeX.
        ptx: an architecture such as "sm_90": the triton kernel compiled for it.

    Raises:
        ValueError: a dtype that no kernel is generated for, or a hyperparameter out of its bounds.
        TypeError: a hyperparameter that the optimizer does not have.
        RuntimeError: triton cannot compile here.
    """
    if backend in ("numba", "triton"):
        known = (*NUMBERS, torch.complex64, torch.complex128)
        kinds = {str(d).removeprefix("torch."): d for d in known}
        if dtype not in kinds:
            raise ValueError(f"no kernel for dtype {dtype!r}: {nearest(dtype, kinds)}")
        shown = []
        for one in kernels(cls, settings, kinds[dtype], backend=backend):
            text = one.source
            if ptx is not None:
                from schuss.engine.triton import compiled

                text = compiled(one.label, one.source, one.layout, ptx, sums=one.sums).ptx
            mark = "//" if ptx is not None else "#"
            shown.append((f"{mark} --- {one.heading} ---\n\n" if one.heading else "") + text.strip())
        return "\n\n\n".join(shown)
    if backend == "reference":
        parts = (
            [cls.scalars, cls.rule] if "scalars" in vars(cls) or cls.scalars is not Optimizer.scalars else [cls.rule]
        )
        return "\n".join(textwrap.dedent(inspect.getsource(part)) for part in parts).rstrip()
    if latex:
        longer, equations = formulas(cls, settings)
        return "\n".join(rf"{sympy.latex(e)} \\" for e in (*longer, *equations))
    equations_ = [textwrap.indent(text, "  ") for text in written(cls, settings)]
    return "\n\n".join([f"{cls.__name__}: {summary(cls)}", *equations_, f"Source: {cls.source}"])


def written(cls: type[Optimizer], settings: Mapping[str, Any]) -> list[str]:
    """An optimizer's formula as equations in text, each of several lines."""
    longer, equations = formulas(cls, settings)
    return [sympy.pretty(e, use_unicode=True, wrap_line=False) for e in map(_with_words, (*longer, *equations))]


def formulas(cls: type[Optimizer], settings: Mapping[str, Any]) -> tuple[list[sympy.Eq], list[sympy.Eq]]:
    """An optimizer's formula as equations: of the step's longer scalars, and of the states and the parameter.

    The rule and its scalars are run on symbols; short scalars are put in where they are used.
    """
    rule, group = _declared(cls, settings)
    variant = rule.variant(group)
    pieces = rule.pieces(rule.unpack(rule.numbers(group)))
    scalars = _scalars(rule, group)
    formula, names = rule.trace(variant, pieces)
    shared = _shared(formula)
    written = {str(name): _previous(str(name)) for name in formula.inputs} | {"g": sympy.Symbol("g_t")}
    longer: list[sympy.Eq] = []
    read = {node.value for node in used(formula.outputs.values()) if node.op == "name"}
    for name in (n for n in names if n in read):
        value = scalars.get(name, _symbol(name))
        if value.has(sympy.Piecewise) or value.count_ops() > 5:
            longer.append(sympy.Eq(_symbol(name), value, evaluate=False))
            value = _symbol(name)
        written[name] = value
    convert = _Converter(written, shared)
    for name, node in sorted(formula, key=lambda pair: pair[0] == "p"):
        current = sympy.Symbol(f"{name}_t")
        convert.equations.append(sympy.Eq(current, convert(node), evaluate=False))
        if node.op != "name":
            convert.known[node] = current
    return longer, convert.equations


def _shared(formula: Formula) -> dict[Expr, str]:
    """What is used more than once and too long for it, most of all what is summed over; with a letter for each."""
    if not is_staged(formula):
        return {}
    users: dict[Expr, set[Expr]] = {}
    for node in used(formula.outputs.values()):
        for arg in node.args:
            users.setdefault(arg, set()).add(node)
    letters = (letter for letter in "uwxyzabcde" if letter not in formula.inputs)
    known = set(formula.outputs.values())
    found = {}
    for node, by in users.items():
        enough = 4 if any(user.op in (*SUMS, *MEANS) for user in by) else 12
        if len(by) > 1 and len(used([node])) > enough and not known & {node}:
            found[node] = next(letters)
    return found


def _declared(cls: type[Optimizer], settings: Mapping[str, Any]) -> tuple[Rule, dict[str, Any]]:
    optimizer, _ = example(cls, settings)
    return optimizer._rule, optimizer.param_groups[0]


def example(
    cls: type[Optimizer],
    settings: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    side: int = math.isqrt(SMALLEST_BLOCKWISE),
) -> tuple[Optimizer, torch.Tensor]:
    """An optimizer of one parameter that it takes, a matrix if it can be, and this parameter."""
    shapes = [(side, side), (side * side,), *((side, side, *[1] * more) for more in range(1, 9))]
    p = next(q for shape in shapes if cls.takes(q := torch.empty(shape, dtype=dtype, device="meta")))
    return cls([p], **settings), p


def _scalars(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> mathematics of every scalar of a step."""
    graph = Graph()
    tuples = {k: tuple(graph.name(f"{_singular(k)}{i + 1}") for i in range(n)) for k, n in rule.lengths.items()}
    hyper: dict[str, Any] = {k: tuples.get(k, graph.name(k)) for k in rule.numeric}
    flags = {k: sympy.Integer(group[k]) for k in rule.numeric if isinstance(group[k], bool)}
    constants = {"gain": -1 if group.get("maximize") else 1, "decoupled": int(rule.is_decoupled(group))}
    kept = {n: graph.name(n) for n in (*rule.scalar_states, "step", "first", "dtype_eps")}
    wanted = parameters(rule.scalars)
    values = dict(rule.scalars(**{n: (hyper | constants | kept)[n] for n in wanted}))
    values.setdefault("decay", 1 - hyper["lr"] * hyper["weight_decay"] if "weight_decay" in hyper else 1)
    values.setdefault("gain", constants["gain"])
    first = sympy.Eq(sympy.Symbol("t"), 1) if rule.has_step else sympy.Symbol("first")
    known = {n: _previous(n) for n in rule.scalar_states if n != "step"} | {"first": first} | flags
    convert = _Converter(known)
    return {n: convert(v) if isinstance(v, Expr) else _number(v) for n, v in values.items()}


class _Converter:
    """Expressions of a rule as sympy's, with names written as papers write them."""

    def __init__(self, names: Mapping[str, Any], shared: Mapping[Expr, str] | None = None) -> None:
        self.names, self.shared = names, shared or {}
        self.known: dict[Expr, Any] = {}
        self.equations: list[sympy.Eq] = []
        """Of what is given a letter, and of matrices that are decomposed, in the order in which they are needed."""

    def __call__(self, node: Expr) -> Any:
        if node not in self.known:
            value = self._convert(node)
            if node in self.shared:
                value, meaning = sympy.Symbol(f"{self.shared[node]}_t"), value
                self.equations.append(sympy.Eq(value, meaning, evaluate=False))
            self.known[node] = value
        return self.known[node]

    def _convert(self, node: Expr) -> Any:
        if node.op == "name":
            return self.names.get(node.value, _symbol(node.value))
        if node.op == "const":
            return _number(node.value)
        if node.op in SIZES:
            return sympy.Symbol(node.op, integer=True, positive=True)
        if node.op == "div" and _is_size(node.args[1]) and node.args[0].op in SUMS:
            return Mean(sympy.prod(map(self, node.args[0].args)))
        if isinstance(node.op, MatrixCall):
            return self._matrices(node)
        return _SYMPY[node.op](*map(self, node.args))

    def _matrices(self, node: Expr) -> Any:
        name, args = node.op.function.__name__, list(map(self, node.args))
        if name != orthogonalize.__name__ or any(equation.lhs == _USV for equation in self.equations):
            return sympy.Function(name, real=True)(*args)
        self.equations.append(sympy.Eq(_USV, args[0], evaluate=False))
        return _UV


def _is_size(node: Expr) -> bool:
    """Whether it is the divisor of a mean, which is never 0."""
    return node.op == "maximum" and [arg.op for arg in node.args] == ["size", "const"]


class _Word(sympy.Function):  # type: ignore[misc]
    """A word about a whole tensor, printed as it is written in rules."""

    text, tex, brackets = "", "", ("(", ")", r"\left(", r"\right)")
    is_real = True

    def _pretty(self, printer: Any) -> Any:
        inside = printer._print_seq(self.args, delimiter=", ")
        return prettyForm(*prettyForm(*inside.parens(*self.brackets[:2])).left(self.text))

    def _latex(self, printer: Any, exp: Any = None) -> str:
        inside = ", ".join(map(printer._print, self.args))
        written = f"{self.tex}{self.brackets[2]} {inside} {self.brackets[3]}"
        return written if exp is None else f"{written}^{{{exp}}}"


class Mean(_Word):
    text, tex = "mean", r"\operatorname{mean}"


class Total(_Word):
    text, tex = "sum", r"\operatorname{sum}"


class RowMean(_Word):
    text, tex = "row_mean", r"\operatorname{mean}_{\text{row}}"


class ColumnMean(_Word):
    text, tex = "column_mean", r"\operatorname{mean}_{\text{column}}"


class Everywhere(_Word):
    text, tex = "everywhere", r"\operatorname{sum}_{\text{tensors}}"


class Inner(_Word):
    text, tex, brackets = "dot", "", ("(", ")", r"\left\langle", r"\right\rangle")


class Norm(_Word):
    text, tex, brackets = "norm", "", ("(", ")", r"\left\lVert", r"\right\rVert")
    is_nonnegative = True


class Largest(_Word):
    text = "max"


class Smallest(_Word):
    text = "min"


def _with_words(equation: sympy.Eq) -> sympy.Eq:
    """An equation whose maxima and minima are printed as other functions are."""
    left, right = (side.replace(sympy.Max, Largest).replace(sympy.Min, Smallest) for side in equation.args)
    return sympy.Eq(left, right, evaluate=False)


class _Product(sympy.Symbol):  # type: ignore[misc]
    """A product of matrices, as one symbol."""

    def _pretty(self, printer: Any) -> Any:
        return prettyForm(self.name)

    def _latex(self, printer: Any) -> str:
        return str(self.name).replace("ᵀ", "^T")


_USV, _UV = _Product("U S Vᵀ", real=True), _Product("U Vᵀ", real=True)
"""What is orthogonalized, as a decomposition, and what comes out."""


_SYMPY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lerp": lambda a, b, weight: a + weight * (b - a),
    "logical_and": sympy.And,
    "dot": lambda a, b: Norm(a) ** 2 if a == b else Inner(a, b),
    "total": Total,
    "row_mean": RowMean,
    "column_mean": ColumnMean,
    "everywhere": Everywhere,
    "sqrt": sympy.sqrt,
    "exp": sympy.exp,
    "log": sympy.log,
    "absolute": sympy.Abs,
    "sign": sympy.sign,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
    "where": lambda condition, yes, no: sympy.Piecewise((yes, _condition(condition)), (no, True)),
}


def _condition(value: Any) -> Any:
    """A flag among the scalars is a number, 0 or 1."""
    return sympy.Ne(value, 0) if isinstance(value, sympy.Integer) else value


def _number(value: float) -> Any:
    return sympy.Integer(int(value)) if float(value).is_integer() and abs(value) < 1e9 else sympy.Float(value, 3)


def _singular(name: str) -> str:
    return name if name in SYMBOLS else name.removesuffix("s")


def _symbol(name: str) -> sympy.Symbol:
    word = name.rstrip("0123456789")
    number = name[len(word) :]
    word = SYMBOLS.get(word, word)
    return sympy.Symbol(f"{word}_{number}" if number else SYMBOLS.get(name, word), real=True)


def _previous(name: str) -> sympy.Symbol:
    return sympy.Symbol(f"{name}_t-1", real=True)
